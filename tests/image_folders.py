"""A small recipe on image files, and images of digits in class folders for it."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

RECIPE = """
[recipe]
name = "small"
run_root = {runs}

[data]
dataset = "imagefolder"
root = {data}
image_size = 8
channels = 1
workers = 0
split = {{ validation = 0.2, test = 0.2 }}

[model]
source = "toolkit"

[model.convnet]
blocks = [{{ channels = 4, batch_norm = true, pool = 2 }}]

[optimizer]
name = "sgd"
lr = 0.05

[train]
epochs = 4
batch_size = 12
precision = "no"

[tracking]
trackers = []
"""
CLASSES, EACH = 4, 15
STEPS = 4
"""Per epoch: 40 of the 4 x 15 images are for training."""


def write_recipe(folder: Path) -> Path:
    """Write a recipe for the images in ``folder``/data, with its runs in ``folder``/runs."""
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(runs=json.dumps(str(folder / "runs")), data=json.dumps(str(folder / "data"))))
    return path


@cache
def _digits(label: int) -> list[tuple[int, np.ndarray]]:
    """Return the first images of a digit, 8 x 8 with values from 0 to 255, and their indices in scikit-learn's data."""
    digits = load_digits()
    chosen = np.flatnonzero(digits.target == label)[:EACH]
    return [(int(i), np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)) for i in chosen]


def write_images(root: Path) -> None:
    """Write 60 image files of equal size in bytes to the folders c0 to c3, each with its own modification time."""
    for label in range(CLASSES):
        folder = root / f"c{label}"
        folder.mkdir(parents=True)
        for number, (index, pixels) in enumerate(_digits(label)):
            path = folder / f"{number:02d}.bmp"
            Image.fromarray(pixels).save(path)
            os.utime(path, ns=(0, 10**18 + index))
