"""Statistics of a data set for `toolkit data`: file formats, co-occurring labels, groups."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from scipy.sparse import csr_array

from toolkit.data.array_images import NUMPY, read_values
from toolkit.data.datasets import Dataset
from toolkit.data.image_sources import EncodedImages
from toolkit.data.sampling import IntArray
from toolkit.data.splits import SPLITS
from toolkit.data.value_range import sample_kind


def stored_format(dataset: Dataset, i: int) -> str:
    """Describe how image i is stored: file format, channels and bits per sample, such as "PNG, 1 x 16 bits"."""
    images = dataset.images
    if not isinstance(images, EncodedImages):
        return f"array, {dataset.native_channels} x 8 bits"
    with images.source.open(i) as file:
        try:
            with Image.open(file) as image:
                if image.mode == "P":
                    return f"{image.format}, 8-bit palette"
                return f"{image.format}, {len(image.getbands())} x {_bits(image)}"
        except UnidentifiedImageError:  # a format that is decoded without Pillow
            file.seek(0)
            data = file.read()
    values = read_values(data, images.channels, images.page, apply_exif=False)
    bits = f"{8 * values.dtype.itemsize} bits{' (float)' if values.dtype.kind == 'f' else ''}"
    return f"{'NumPy' if data.startswith(NUMPY) else 'TIFF'}, {values.shape[2]} x {bits}"


def _bits(image: Image.Image) -> str:
    """Return the bits per sample of an image that is open but not decoded."""
    kind = sample_kind(image)
    if kind == "float":
        return "32 bits (float)"
    if kind is None:
        return "1 bit" if image.mode == "1" else "8 bits"
    return "32 bits" if image.mode == "I" and image.format != "PNG" else "16 bits"


@dataclass(frozen=True)
class LabelStatistics:
    """Statistics of a multi-label data set: number of labels per image, and pairs of labels that occur together."""

    per_image: dict[int, int]
    """Number of images by number of labels."""
    pairs: list[tuple[int, int, int]]
    """Two class indices and the number of images with both labels, most frequent first."""
    counts: IntArray
    """Number of images with each label, [K]."""

    def to_json(self, classes: list[str]) -> dict[str, Any]:
        """Return a JSON-serializable dict with class names instead of indices."""
        pairs = [{"labels": [classes[a], classes[b]], "images": count} for a, b, count in self.pairs]
        return {"labels_per_image": {str(n): count for n, count in self.per_image.items()}, "label_pairs": pairs}

    def lines(self, classes: list[str], shown: int) -> list[str]:
        """Return lines of text that list the ``shown`` most frequent pairs."""
        numbers = ", ".join(f"{n} ({count:,})" for n, count in self.per_image.items())
        found = [f"labels per image  {numbers}"]
        if self.pairs:
            found.append(f"together   {len(self.pairs):,} pairs of labels are in the same image")
        for a, b, count in self.pairs[:shown]:
            shares = (f"{100 * count / self.counts[label]:.0f} % of {classes[label]}" for label in (a, b))
            found.append(f"  {classes[a]} and {classes[b]}: {count:,} ({', '.join(shares)})")
        if len(self.pairs) > shown:
            found.append(f"  ... and {len(self.pairs) - shown:,} more")
        return found


def label_statistics(labels: npt.NDArray[np.uint8]) -> LabelStatistics:
    """Count labels and pairs of labels. ``labels``: 1 for each label of an image, else 0, [N, K]."""
    matrix = csr_array(labels.astype(np.int64))
    both = (matrix.T @ matrix).tocoo()
    above = both.row < both.col
    rows, columns, counts = both.row[above], both.col[above], both.data[above]
    order = np.lexsort((columns, rows, -counts))
    numbers, images = np.unique(labels.sum(1, dtype=np.int64), return_counts=True)
    pairs = np.stack([rows, columns, counts], 1)[order].tolist()
    return LabelStatistics(
        dict(zip(numbers.tolist(), images.tolist(), strict=True)),
        [(a, b, count) for a, b, count in pairs],
        labels.sum(0, dtype=np.int64),
    )


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of groups of images, such as all images of one patient."""

    by_split: dict[str, int]
    """Number of groups with images in each split."""
    count: int
    largest: int
    """Number of images in the largest group."""
    median: float
    """Median number of images per group."""
    across: dict[str, int]
    """Number of groups with images in both splits of a pair (leakage), by pair, such as "train, test"."""

    def lines(self) -> list[str]:
        """Return lines of text."""
        splits = ", ".join(f"{count:,} in {split}" for split, count in self.by_split.items())
        found = [f"groups     {self.count:,} ({splits}), median {self.median:g} images, maximum {self.largest:,}"]
        for pair, count in self.across.items():
            if count:
                found.append(f"leakage    {count:,} groups have images in both {pair.replace(', ', ' and ')}")
        return found


def group_statistics(groups: IntArray, splits: dict[str, IntArray]) -> GroupStatistics:
    """Count the groups in each split. ``groups``: group number of each image, [N]."""
    own = {split: np.unique(groups[splits[split]]) for split in SPLITS}
    _, sizes = np.unique(groups[np.concatenate([splits[split] for split in SPLITS])], return_counts=True)
    across = {f"{a}, {b}": len(np.intersect1d(own[a], own[b])) for a, b in combinations(SPLITS, 2)}
    by_split = {split: len(found) for split, found in own.items()}
    return GroupStatistics(by_split, len(sizes), int(sizes.max()), float(np.median(sizes)), across)
