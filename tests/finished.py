"""Small finished runs for tests of evaluate, predict, explain and export, trained in the test's process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from cli import toolkit
from PIL import Image
from sklearn.datasets import load_digits

from toolkit.runs import Run, open_run

CONVNET = """
[model]
source = "toolkit"

[model.convnet]
blocks = [{ channels = 6, batch_norm = true, pool = 2 }, { channels = 8, batch_norm = true, dropout = 0.1 }]
"""
RESNET18 = """
[model]
source = "torchvision"
name = "resnet18"
"""
TIMM = """
[model]
source = "timm"
name = "test_resnet"
"""

ON_FILES = """
[recipe]
name = "tiny"
run_root = {runs}
seed = 0

[data]
dataset = "imagefolder"
root = {data}
image_size = {size}
workers = 0

[optimizer]
name = "sgd"
lr = 0.02
momentum = 0.9

[train]
epochs = {epochs}
batch_size = 16
eval_batch_size = 12
precision = "no"

[tracking]
trackers = []
"""


def digit_files(root: Path, train: int = 8, test: int = 5) -> Path:
    """Write the given numbers of digits per class, as PNG files of 8x8 pixels, to train/<digit>/ and test/<digit>/."""
    digits = load_digits()
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        for split, chosen in (("train", members[:train]), ("test", members[train : train + test])):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for index in chosen:
                pixels = np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    return root


def train_on_files(folder: Path, model: str, *settings: str, size: int = 16, epochs: int = 1) -> Run:
    """Train a run on :func:`digit_files` in ``folder``/data, which is created if needed."""
    if not (folder / "data").is_dir():
        digit_files(folder / "data")
    path = folder / "recipe.toml"
    folders = {"runs": json.dumps(str(folder / "runs")), "data": json.dumps(str(folder / "data"))}
    path.write_text(ON_FILES.format(**folders, size=size, epochs=epochs) + model)
    return train(path, *settings)


def train(recipe: Path, *settings: str) -> Run:
    """Run `toolkit train RECIPE --no-report --set ...`."""
    outcome = toolkit("train", recipe, "--no-report", *(part for setting in settings for part in ("--set", setting)))
    assert outcome.status == 0, outcome.stderr
    return open_run(outcome.stdout.splitlines()[-1])
