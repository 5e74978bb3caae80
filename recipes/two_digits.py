"""Write a multi-label data set: images of two of scikit-learn's 8x8 digits side by side, labeled with both.

Usage: python recipes/two_digits.py [FOLDER]     (default: data/two_digits)

Writes the images to FOLDER, and labels.csv with the columns image, label (such as "three;seven") and split. Training,
validation and test images are made from different handwritten digits. The images are the same on every machine.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGES = {"train": 6000, "validation": 1000, "test": 1000}
DIGITS = {"train": (0, 1200), "validation": (1200, 1500), "test": (1500, 1797)}
"""Range (end excluded) of scikit-learn's digits, in random order, that each split is made from."""


def write(folder: Path, images: Mapping[str, int] = IMAGES) -> Path:
    """Write the given number of images for each split and return the path of labels.csv."""
    digits, random = load_digits(), np.random.default_rng(0)
    order = random.permutation(len(digits.target))
    pixels, targets = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8), digits.target[order]
    table = folder / "labels.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "split"])
        for split, count in images.items():
            (folder / split).mkdir(exist_ok=True)
            for number, pair in enumerate(random.integers(*DIGITS[split], (count, 2))):
                name = f"{split}/{number:05d}.png"
                Image.fromarray(np.concatenate(pixels[pair], 1)).save(folder / name)
                labels = sorted(set(targets[pair].tolist()))
                rows.writerow([name, ";".join(NAMES[label] for label in labels), split])
    return table


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "data/two_digits")))
