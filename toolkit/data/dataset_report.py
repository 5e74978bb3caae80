"""Report on a recipe's images: counts, sizes, statistics, unreadable files, duplicates and near-duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.data.channel_stats import channel_statistics
from toolkit.data.dataset_statistics import (
    GroupStatistics,
    LabelStatistics,
    group_statistics,
    label_statistics,
    stored_format,
)
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.image_sources import EncodedImages, UnreadableImageError, check_images, to_shown
from toolkit.data.near_duplicates import MOST, MOST_CROPS, SMALLEST, near_pairs, thumbnail
from toolkit.data.near_duplicates import groups as connected
from toolkit.data.preprocessing import Preprocessing, resolve_channels, resolve_preprocessing
from toolkit.data.splits import SPLITS, describe_splits, split_dataset
from toolkit.data.value_range import choose_range, describe_range
from toolkit.distributed.cpu_count import available_cpus
from toolkit.formatting import plural
from toolkit.models.build import expected_input
from toolkit.recipe.diagnostics import printable
from toolkit.recipe.schema import Recipe

SHOWN = 10
"""Maximum number of items per list in the text report; the JSON report has all."""

Sizes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageInfo:
    """Size and content of one decoded image."""

    width: int
    height: int
    thumbnail: npt.NDArray[np.uint8] | None
    """Grayscale thumbnail, uint8 [64, 64]; None if the image is too small to be compared with others."""
    pixels: bytes
    """Hash of size and decoded pixels, independent of the file's name and metadata."""
    stored: str
    """File format, channels and bits per sample, such as "PNG, 1 x 16 bits"."""


@dataclass(frozen=True)
class Duplicates:
    """Groups of duplicate images, either with equal pixels or near-duplicates (rescaled, recompressed, cropped)."""

    across: dict[str, list[list[str]]]
    """Groups of duplicates, as image names, that occur in two splits (leakage), by pair such as "train, test"."""
    within: dict[str, list[list[str]]]
    """Groups of duplicates, as image names, within one split, by split."""
    contradicting: list[list[str]]
    """Groups of duplicates, as image names, whose images differ in class or labels."""
    across_groups: list[list[str]]
    """Groups of duplicates, as image names, that are in several groups of the data set (data.columns.group)."""


@dataclass(frozen=True)
class DatasetReport:
    """All results shown by `toolkit data`."""

    recipe: Recipe
    dataset: Dataset
    splits: dict[str, Sizes]
    preprocessing: Preprocessing
    """Preprocessing with the normalization that training will use."""
    counts: dict[str, Sizes]
    """Number of images of each class, int64 [classes], by split."""
    sizes: Sizes
    """Width and height of every readable image in pixels, int64 [n, 2]."""
    stored: dict[str, int]
    """Number of readable images by file format, channels and bits per sample, most frequent first."""
    mean: tuple[float, ...]
    """Mean of each channel over the training images, pixels in 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel over the training images, pixels in 0..1."""
    unreadable: list[tuple[str, str]]
    """Name of each unreadable image, and the reason."""
    duplicates: Duplicates
    """Groups of images with equal pixels."""
    near: Duplicates
    """Near-duplicates, without the groups in which all pixels are equal."""
    examples: dict[int, int]
    """Index of the first readable training image of each class, by class."""
    labels: LabelStatistics | None = None
    """Statistics of multi-label data; None if each image has one class."""
    groups: GroupStatistics | None = None
    notes: tuple[str, ...] = ()
    """Notes on how the folders were read, what was left out, and where the splits come from."""

    @property
    def classes(self) -> list[str]:
        """Class names, safe to print."""
        return [printable(name) for name in self.dataset.classes]

    def to_json(self) -> dict[str, Any]:
        """Return all results as a JSON-serializable dict."""
        width, height = (_spread(self.sizes[:, axis]) for axis in (0, 1))
        return {
            "recipe": self.recipe.recipe.name,
            "dataset": self.dataset.name,
            "notes": list(self.notes),
            "images": {split: len(self.splits[split]) for split in SPLITS},
            "images_per_class": {
                name: {split: int(self.counts[split][label]) for split in SPLITS}
                for label, name in enumerate(self.classes)
            },
            "width": width,
            "height": height,
            "stored": self.stored,
            **(self.labels.to_json(self.classes) if self.labels else {}),
            **({"groups": asdict(self.groups)} if self.groups else {}),
            "sizes": {f"{w}x{h}": count for (w, h), count in _common_sizes(self.sizes)},
            "mean": list(self.mean),
            "std": list(self.std),
            "unreadable": [{"name": printable(name), "reason": printable(why)} for name, why in self.unreadable],
            "duplicates": _groups_json(self.duplicates),
            "near_duplicates": _groups_json(self.near),
        }


def analyze_dataset(recipe: Recipe, log: Callable[[str], None]) -> DatasetReport:
    """Decode every image that the recipe uses, once or twice, and analyze them. Raises UserError for missing data."""
    data = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")
    dataset = open_dataset(data)
    splits = split_dataset(dataset, data)
    used = np.concatenate([splits[split] for split in SPLITS])
    log(f"decoding {len(used):,} images of {dataset.name}")
    if isinstance(dataset.images, EncodedImages):
        extents = check_images(dataset.images, used, decode=False).extents
        if (value_range := choose_range(extents)) is not None:
            log(describe_range(extents, value_range))
            dataset = replace(dataset, images=dataset.images.with_range(value_range))
    seen, unreadable = hash_images(dataset, used)
    readable = {split: np.array([i for i in splits[split] if int(i) in seen], dtype=np.int64) for split in SPLITS}
    near, searched = find_near_duplicates(dataset, readable, seen)
    preprocessing, mean, std = _statistics(recipe, dataset, readable["train"])
    examples: dict[int, int] = {}
    for index in readable["train"]:
        for label in dataset.labels_of(int(index)):
            examples.setdefault(label, int(index))
    return DatasetReport(
        recipe=recipe,
        dataset=dataset,
        splits=splits,
        preprocessing=preprocessing,
        counts={split: dataset.class_counts(splits[split]) for split in SPLITS},
        sizes=np.array([(found.width, found.height) for found in seen.values()], dtype=np.int64).reshape(-1, 2),
        stored=dict(Counter(found.stored for found in seen.values()).most_common()),
        mean=mean,
        std=std,
        unreadable=unreadable,
        duplicates=find_duplicates(dataset, readable, seen),
        near=near,
        examples=examples,
        labels=label_statistics(dataset.labels[used]) if dataset.is_multi_label else None,
        groups=None if dataset.groups is None else group_statistics(dataset.groups, splits),
        notes=(*dataset.notes, describe_splits(dataset, data), *searched),
    )


def hash_images(dataset: Dataset, indices: Sizes) -> tuple[dict[int, ImageInfo], list[tuple[str, str]]]:
    """Decode and hash images. Returns the readable ones by index, and names and reasons of the unreadable ones."""

    def look(index: int) -> ImageInfo | str:
        try:
            pixels = dataset.images.load(index)
        except UnreadableImageError as error:
            return error.reason
        height, width, channels = pixels.shape
        small = thumbnail(to_shown(pixels)) if min(height, width) >= SMALLEST else None
        digest = hashlib.blake2b(f"{width} {height} {channels} ".encode() + pixels.tobytes(), digest_size=16)
        return ImageInfo(width, height, small, digest.digest(), stored_format(dataset, index))

    numbers = [int(i) for i in indices]
    with ThreadPoolExecutor(available_cpus()) as pool:  # decoders and hashes release the interpreter lock
        results = dict(zip(numbers, pool.map(look, numbers, chunksize=64), strict=True))
    bad = [(dataset.images.name(i), found) for i, found in results.items() if isinstance(found, str)]
    return {i: found for i, found in results.items() if isinstance(found, ImageInfo)}, bad


def find_duplicates(dataset: Dataset, splits: dict[str, Sizes], seen: dict[int, ImageInfo]) -> Duplicates:
    """Find groups of images with equal pixels: across splits, within a split, and across classes."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, found in seen.items():
        groups[found.pixels].append(index)
    return _by_split(dataset, splits, [group for group in groups.values() if len(group) > 1])


def find_near_duplicates(
    dataset: Dataset, splits: dict[str, Sizes], seen: dict[int, ImageInfo]
) -> tuple[Duplicates, list[str]]:
    """Find groups of rescaled, recompressed or cropped versions of an image. Returns notes on what was not searched."""
    indices = [index for index, found in seen.items() if found.thumbnail is not None]
    notes = []
    if len(indices) < len(seen):
        notes.append(f"images with a side below {SMALLEST} pixels were not checked for near-duplicates")
    if len(indices) > MOST:
        notes.append(f"there are more than {MOST:,} images, so near-duplicates were not searched for")
        indices = []
    elif len(indices) > MOST_CROPS:
        notes.append(f"there are more than {MOST_CROPS:,} images, so only whole images were compared, not crops")
    if len(indices) < 2:
        return _by_split(dataset, splits, []), notes
    aspects = np.array([seen[index].width / seen[index].height for index in indices], dtype=np.float32)
    pairs = near_pairs(np.stack([t for index in indices if (t := seen[index].thumbnail) is not None]), aspects)
    found = [[indices[place] for place in group] for group in connected(pairs)]
    return _by_split(dataset, splits, [group for group in found if len({seen[i].pixels for i in group}) > 1]), notes


def _by_split(dataset: Dataset, splits: dict[str, Sizes], groups: list[list[int]]) -> Duplicates:
    split_of = {int(index): split for split in SPLITS for index in splits[split]}
    across: dict[str, list[list[str]]] = {f"{one}, {other}": [] for one, other in combinations(SPLITS, 2)}
    within: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    contradicting, across_groups = [], []
    for members in groups:
        names = {index: dataset.images.name(index) for index in members}
        inside = {split: [names[i] for i in members if split_of[i] == split] for split in SPLITS}
        for split in SPLITS:
            if len(inside[split]) > 1:
                within[split].append(inside[split])
        for one, other in combinations(SPLITS, 2):
            if inside[one] and inside[other]:
                across[f"{one}, {other}"].append([*inside[one], *inside[other]])
        if len({dataset.labels_of(i) for i in members}) > 1:
            contradicting.append(list(names.values()))
        if dataset.groups is not None and len(set(dataset.groups[members].tolist())) > 1:
            across_groups.append(list(names.values()))
    return Duplicates(across, within, contradicting, across_groups)


def _statistics(
    recipe: Recipe, dataset: Dataset, train: Sizes
) -> tuple[Preprocessing, tuple[float, ...], tuple[float, ...]]:
    """Return the training preprocessing, and mean and standard deviation of the images before normalization."""
    data = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")
    weights, size, channels = expected_input(recipe.model), dataset.native_size, dataset.native_channels
    measured: list[tuple[tuple[float, ...], tuple[float, ...]]] = []

    def measure(plain: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
        measured.append(channel_statistics(dataset.images, train, plain))
        return measured[0]

    by_data = data.model_copy(update={"normalize": "dataset"})
    resolve_preprocessing(by_data, weights, size, channels, measure)
    preprocessing = resolve_preprocessing(data, weights, size, channels, lambda plain: measured[0])
    return preprocessing, *measured[0]


def _spread(values: Sizes) -> dict[str, float]:
    """Return minimum, median, mean and maximum; an empty result if there are no values."""
    if len(values) == 0:
        return {}
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": round(float(values.mean()), 2),
        "max": int(values.max()),
    }


def _common_sizes(sizes: Sizes) -> list[tuple[tuple[int, int], int]]:
    """Return the most frequent (width, height) with their counts."""
    return Counter((int(w), int(h)) for w, h in sizes).most_common(SHOWN)


def _groups_json(found: Duplicates) -> dict[str, Any]:
    return {
        "across_splits": _printable(found.across),
        "within_splits": _printable(found.within),
        "of_more_than_one_class": _printable({"": found.contradicting})[""],
        "across_groups": _printable({"": found.across_groups})[""],
    }


def _printable(groups: dict[str, list[list[str]]]) -> dict[str, list[list[str]]]:
    return {key: [[printable(name) for name in group] for group in found] for key, found in groups.items()}


def report_text(report: DatasetReport) -> str:
    """Format the report as text."""
    values = report.to_json()
    total = {split: f"{values['images'][split]:,}" for split in SPLITS}
    lines = [
        f"data set   {report.dataset.name}: {plural(sum(values['images'].values()), 'image')} used, "
        + plural(len(report.classes), "class", "classes"),
        "images     " + ", ".join(f"{total[split]} {split}" for split in SPLITS),
        *(f"note       {note}" for note in report.notes),
        *_class_lines(report),
        *(report.labels.lines(report.classes, SHOWN) if report.labels else []),
        *(report.groups.lines() if report.groups else []),
        *(f"{side:<10} {_spread_text(values[side])} pixels" for side in ("width", "height") if values[side]),
        "sizes      " + ", ".join(f"{size} ({count:,})" for size, count in values["sizes"].items()),
        "stored as  " + "; ".join(f"{kind} ({count:,})" for kind, count in report.stored.items()),
        f"mean       {_values(report.mean)}",
        f"std        {_values(report.std)}  (training images, resized and cropped, pixels in 0..1)",
        f"normalized with mean {_values(report.preprocessing.mean)}, std {_values(report.preprocessing.std)}",
        f"unreadable {len(report.unreadable) or 'none'}",
        *_first([f"{name}: {why}" for name, why in report.unreadable]),
        *_duplicate_lines(report.duplicates, report.near),
    ]
    return "\n".join(printable(line) for line in lines)


def _class_lines(report: DatasetReport) -> list[str]:
    """Format a table of the images per class, the largest class first."""
    from rich.cells import cell_len  # names may have characters of width 0 or 2

    order = np.argsort(-sum(report.counts[split] for split in SPLITS), kind="stable")
    width = max([len("class"), *(cell_len(name) for name in report.classes)])
    rows = [("class", *SPLITS)]
    rows += [(report.classes[c], *(str(report.counts[split][c]) for split in SPLITS)) for c in order]
    return [
        "  " + name + " " * (width - cell_len(name)) + "".join(f"{count:>12}" for count in counts)
        for name, *counts in rows
    ]


def _duplicate_lines(found: Duplicates, near: Duplicates) -> list[str]:
    lines = []
    for subject, duplicates, sign in (("images are", found, "="), ("groups of near-duplicates are", near, "~")):
        for pair, groups in duplicates.across.items():
            what = f"leakage    {len(groups)} {subject} in both {pair.replace(', ', ' and ')}"
            lines += [what, *_examples(groups, sign)] if groups else []
        for split, groups in duplicates.within.items():
            more = "more than once in" if sign == "=" else "within"
            lines += [f"repeated   {len(groups)} {subject} {more} {split}", *_examples(groups, sign)] if groups else []
        if duplicates.contradicting:
            what = f"labels     {len(duplicates.contradicting)} {subject} of more than one class"
            lines += [what, *_examples(duplicates.contradicting, sign)]
        if duplicates.across_groups:
            what = f"groups     {len(duplicates.across_groups)} {subject} in more than one group"
            lines += [what, *_examples(duplicates.across_groups, sign)]
    if not any(found.across.values()):
        lines.append("leakage    none: no two splits share an image with equal pixels")
    return lines


def _examples(groups: list[list[str]], sign: str) -> list[str]:
    return _first([f" {sign} ".join(group) for group in groups])


def _first(items: list[str]) -> list[str]:
    """Return the first items, one per line, and the number of the others."""
    more = [f"  ... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [*(f"  {item}" for item in items[:SHOWN]), *more]


def _spread_text(spread: dict[str, float]) -> str:
    return f"{spread['min']:g} to {spread['max']:g}, median {spread['median']:g}, mean {spread['mean']:g}"


def _values(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
