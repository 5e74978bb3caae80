"""Inspecting the data: number of images by class and split, and sizes, channels and faults of a sample."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from toolkit.data.array_images import NUMPY, read_values
from toolkit.data.dataset_info import info_of
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.encoded_sources import EncodedSource
from toolkit.data.image_sources import EncodedImages, InMemoryImages, check_images
from toolkit.data.orientation import orientation_of
from toolkit.data.splits import split_dataset
from toolkit.errors import UserError
from toolkit.formatting import plural
from toolkit.new_recipe.source import DataSource
from toolkit.recipe.schema import DataConfig, SplitConfig

SAMPLE = 1000
"""Maximum number of images whose headers are read."""

REMOTE_SAMPLE = 50
"""The same for images that are downloaded from a URL."""

MOST_UNREADABLE = 0.1
"""Maximum fraction of unreadable images in the sample."""


@dataclass(frozen=True)
class DataFacts:
    """Facts about a data set. Training images are counted before validation images are drawn from them."""

    source: DataSource
    classes: int
    counts: tuple[int, ...]
    """Number of training images of each class, or with each label."""
    images: dict[str, int]
    """Number of images in each official list: "train", and "validation" and "test" if they exist."""
    sampled: int
    """Number of images in the sample; 0 if sizes and channels are the published ones."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Width and height of each image in the sample, in pixels."""
    channels: Counter[int] = field(default_factory=Counter)
    """Number of images in the sample by number of channels (1: grayscale)."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """Name and reason for each image in the sample that cannot be read."""
    is_multi_label: bool = False
    labels_per_image: float = 1.0
    groups: int = 0
    dataset: Dataset | None = None
    """The opened data set; None if the data are not on this machine."""

    @property
    def total(self) -> int:
        """Number of all images."""
        return sum(self.images.values())

    @property
    def smallest(self) -> int:
        """Number of training images of the smallest class."""
        return min(self.counts)

    @property
    def largest(self) -> int:
        """Number of training images of the largest class."""
        return max(self.counts)

    @property
    def per_class(self) -> int:
        """Median number of training images per class."""
        return int(statistics.median(self.counts))

    @property
    def imbalance(self) -> float:
        """Number of training images of the largest class, divided by that of the smallest class."""
        return self.largest / self.smallest

    @property
    def side(self) -> int:
        """Median length of the shorter side of the images, in pixels."""
        return int(statistics.median(min(size) for size in self.sizes))

    @property
    def aspect(self) -> float:
        """Median of the longer side divided by the shorter one."""
        return float(statistics.median(max(size) / min(size) for size in self.sizes))

    @property
    def common_size(self) -> tuple[int, int] | None:
        """Height and width of all images in the sample; None if they differ."""
        return (self.sizes[0][1], self.sizes[0][0]) if len(set(self.sizes)) == 1 else None

    @property
    def stored_channels(self) -> int:
        """Number of channels needed for all images: 1 if all are grayscale, 3 if some are in color, else their own."""
        return max(self.channels)

    def split(self, table: dict[str, Any]) -> dict[str, int]:
        """Return the number of images in each split for a [data.split] table. Raises UserError if it is impossible.

        For data that are not on this machine the numbers are computed from the published ones.
        """
        if self.dataset is None:
            return self._published_split(table)
        config = DataConfig(**(self.source.keys | {"split": SplitConfig(**table)}))
        return {name: len(indices) for name, indices in split_dataset(self.dataset, config).items()}

    def _published_split(self, table: dict[str, Any]) -> dict[str, int]:
        train, test = self.images.get("train", 0), self.images.get("test", 0)
        test = test or round(table.get("test", 0.2) * train)
        rest = train if self.images.get("test") else train - test
        validation = self.images.get("validation", 0) or round(table.get("validation", 0.1) * rest)
        return {"train": rest - validation, "validation": validation, "test": test}


def look(source: DataSource) -> DataFacts:
    """Open the data, count the images, and read the headers of a sample.

    Raises UserError if the data cannot be trained on.
    """
    published = _published(source)
    try:
        dataset = open_dataset(DataConfig(**source.keys, download=published is None))
    except UserError:
        if published is None:
            raise
        return published
    images = dataset.images
    train = dataset.lists["train"]
    facts = DataFacts(
        source=source,
        classes=len(dataset.classes),
        counts=tuple(dataset.class_counts(train).tolist()),
        images={name: len(indices) for name, indices in dataset.lists.items()},
        sampled=len(images),
        is_multi_label=dataset.is_multi_label,
        labels_per_image=float(dataset.labels.sum(1).mean()) if dataset.is_multi_label else 1.0,
        groups=0 if dataset.groups is None else len(np.unique(dataset.groups[train])),
        dataset=dataset,
    )
    _check_counts(facts, dataset)
    if isinstance(images, InMemoryImages):
        height, width, channels = images.pixels.shape[1:]
        return replace(facts, sizes=((width, height),), channels=Counter({channels: len(images)}))
    assert isinstance(images, EncodedImages)
    return _sample(facts, dataset, images)


def _published(source: DataSource) -> DataFacts | None:
    """Return the facts about a data set that are known before it is downloaded; None if they are not sufficient."""
    info = info_of(source.keys["dataset"], source.keys.get("name"))
    if info.classes is None or info.images is None or info.size is None:
        return None
    images = {name: count for name, count in zip(("train", "test"), info.images, strict=True) if count}
    counts = (images["train"] // info.classes,) * info.classes
    return DataFacts(source, info.classes, counts, images, 0, ((info.size, info.size),), Counter({info.channels: 1}))


def _check_counts(facts: DataFacts, dataset: Dataset) -> None:
    """Raise UserError if the data have too few images of a class to train and to test."""
    needs_two = "test" not in facts.images or "validation" not in facts.images
    if facts.largest < 2 and needs_two and not facts.is_multi_label:
        raise UserError(
            f"{facts.source.name} has one image of each of its {facts.classes:,} classes: at least two are needed, one "
            "to train and one to test. Are the class folders, or the column of labels, the right ones?"
        )
    empty = [dataset.classes[i] for i, count in enumerate(facts.counts) if not count]
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise UserError(
            f"{plural(len(empty), 'class', 'classes')} of {facts.source.name} have no training image: "
            f"{', '.join(empty[:5])}{more}; add some, or remove these classes"
        )


def _sample(facts: DataFacts, dataset: Dataset, images: EncodedImages) -> DataFacts:
    """Return the facts with the sizes, channels and faults of up to :data:`SAMPLE` evenly spaced images."""
    root = str(facts.source.keys.get("root", ""))
    count = min(len(images), REMOTE_SAMPLE if "://" in root else SAMPLE)
    indices = np.unique(np.linspace(0, len(images) - 1, count).astype(np.int64))
    sizes, channels, bad = [], Counter[int](), list[tuple[str, str]]()
    examples: dict[int, str] = {}
    for i in indices.tolist():
        try:
            width, height, found = image_header(images.source, i)
        except UserError:
            raise
        except Exception as error:  # damaged files raise exceptions of many types
            bad.append((images.name(i), f"{error or type(error).__name__}"))
            continue
        sizes.append((width, height))
        channels[found] += 1
        examples.setdefault(found, images.name(i))
    if len(bad) > MOST_UNREADABLE * len(indices):
        raise UserError(_too_many_unreadable(bad, len(indices)))
    if len(set(channels) - {1, 3}) and len(channels) > 1:
        found_texts = ", ".join(f"{count} of {n} ({examples[n]})" for n, count in channels.most_common())
        raise UserError(
            f"the images have different numbers of channels: {found_texts}. A model takes one number: sort out those "
            "that do not belong, or convert them"
        )
    if (most := max(channels)) not in (1, 3):
        source = replace(facts.source, keys={**facts.source.keys, "channels": most})
        dataset = open_dataset(DataConfig(**source.keys, download=False))
        facts = replace(facts, source=source, dataset=dataset)
        assert isinstance(dataset.images, EncodedImages)
        images = dataset.images
    damaged = {name for name, _ in bad}
    whole = np.array([i for i in indices.tolist() if images.name(i) not in damaged], dtype=np.int64)
    bad += [(images.name(i), reason) for i, reason in check_images(images, whole, decode=False).bad]
    if len(bad) > MOST_UNREADABLE * len(indices):
        raise UserError(_too_many_unreadable(bad, len(indices)))
    return replace(facts, sampled=len(indices), sizes=tuple(sizes), channels=channels, unreadable=tuple(bad))


def _too_many_unreadable(bad: list[tuple[str, str]], sampled: int) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in bad[:3])
    return (
        f"{len(bad):,} of {sampled:,} inspected images cannot be read ({shown}{'; ...' if len(bad) > 3 else ''}): "
        "repair or remove them"
    )


def image_header(source: EncodedSource, i: int) -> tuple[int, int, int]:
    """Return the width and height of image i when upright, and its number of channels without alpha or palette.

    Only the header is read, except for TIFF files that Pillow cannot open. May raise any exception.
    """
    with source.open(i) as file:
        start = file.read(len(NUMPY))
        file.seek(0)
        if start == NUMPY:
            return _array_header(file)
        try:
            with Image.open(file) as image:
                width, height = image.size
                if orientation_of(image) in (5, 6, 7, 8):
                    width, height = height, width
                return (
                    width,
                    height,
                    1 if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode[:2] == "I;" else 3,
                )
        except UnidentifiedImageError:
            file.seek(0)
            data = file.read()
        values = read_values(data, 3, 0, apply_exif=True)  # TIFF; raises the reason for anything else
        return values.shape[1], values.shape[0], values.shape[2]


def _array_header(file: BinaryIO) -> tuple[int, int, int]:
    """Return width, height and channels of a .npy file; the channel axis is the shorter of the first and the last."""
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape = read(file)[0]
    if len(shape) == 2:
        return shape[1], shape[0], 1
    if len(shape) != 3:
        raise ValueError(f"an array of shape {list(shape)} is not an image [h, w], [h, w, C] or [C, h, w]")
    if shape[0] < shape[2]:
        return shape[2], shape[1], shape[0]
    return shape[1], shape[0], shape[2]
