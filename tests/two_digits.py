"""A small multi-label data set in memory: two digits side by side, labeled with the set of both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from toolkit.data.dataset_info import DATASETS
from toolkit.data.datasets import Dataset
from toolkit.data.image_sources import InMemoryImages
from toolkit.recipe.schema import DataConfig

SIZES = {"train": 300, "validation": 100, "test": 100}


def open_two_digits(table: DataConfig) -> Dataset:
    """Return 500 images of 16x16 pixels with official lists; the opener of a data set."""
    digits, random = load_digits(), np.random.default_rng(0)
    count = sum(SIZES.values())
    pairs = random.choice(len(digits.images), (count, 2))
    pixels = np.zeros((count, 16, 16), dtype=np.uint8)
    for side in (0, 1):
        pixels[:, 4:12, 8 * side : 8 * side + 8] = np.rint(digits.images[pairs[:, side]] * (255 / 16))
    labels = np.zeros((count, 10), dtype=np.uint8)
    labels[np.arange(count)[:, None], digits.target[pairs]] = 1
    ends = np.cumsum(list(SIZES.values()))
    lists = {split: np.arange(end - SIZES[split], end) for split, end in zip(SIZES, ends, strict=True)}
    images = InMemoryImages(pixels, "digits", table.channels or 1)
    return Dataset("digits", [f"digit {d}" for d in range(10)], images, labels, lists, 16, 1)


def use_two_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make data.dataset = "digits" open :func:`open_two_digits` in this process."""
    opener = f"{__name__}.{open_two_digits.__name__}"
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], opener=opener, size=16, images=None))
