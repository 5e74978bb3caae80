"""Supported data sets: how each one's images, labels and official lists are read.

The constants of each data set and the name of its opener are in :mod:`toolkit.data.dataset_info`. Nothing here is
random.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import pkgutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.data.archives import ArchiveImages, find_archive, forget_archives
from toolkit.data.dataset_info import DATASETS
from toolkit.data.encoded_sources import EncodedSource, ImageFiles, JoinedImages, PackedStrings
from toolkit.data.folder_layout import Layout, read_layout
from toolkit.data.folder_walk import FolderWalk
from toolkit.data.image_sources import CANNOT_READ, HAS_CHANGED, EncodedImages, ImageSource, InMemoryImages
from toolkit.data.sampling import IntArray
from toolkit.errors import UserError
from toolkit.filenames import encode_name, escape_control_characters
from toolkit.formatting import plural
from toolkit.recipe.schema import DataConfig

CALTECH_IMAGES, CALTECH_BACKGROUND = "101_ObjectCategories", "BACKGROUND_Google"
CALTECH_SOURCE = "CaltechDATA (https://doi.org/10.22002/D1.20086, file caltech-101.zip)"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with labels, and the data set's official lists."""

    name: str
    classes: list[str]
    """Class names, encoded by :func:`toolkit.filenames.encode_name`; a label is an index into them."""
    images: ImageSource
    labels: npt.NDArray[Any]
    """Class index of each image, int64 [N]; multi-label: uint8 [N, classes], 1 for each label of an image, else 0."""
    lists: dict[str, IntArray]
    """Official lists, int64 indices each: "train" always (may be empty), "validation" and "test" if they exist."""
    native_size: int | None
    """Height and width of all images in pixels; None if they differ."""
    native_channels: int
    notes: tuple[str, ...] = ()
    """Lines for the log: how the folders were read and what was left out."""
    groups: IntArray | None = None
    """Group number of each image, int64 [N]; random splits never divide a group."""
    weights: npt.NDArray[np.float64] | None = None
    """Weight of each image in the training loss, [N]."""
    kept: Mapping[str, PackedStrings] = field(default_factory=dict)
    """Other columns of a table: a text for each image, encoded; by name, encoded."""
    why_not_cached: str = ""
    """Why neither decoded images nor features may be cached; "" if they may."""

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels.ndim == 2

    def labels_of(self, i: int) -> tuple[int, ...]:
        """Return the class of image i, or all its labels, as indices into ``classes``."""
        return tuple(np.flatnonzero(self.labels[i]).tolist()) if self.is_multi_label else (int(self.labels[i]),)

    def with_kept(self, rows: Iterable[Sequence[object]], indices: IntArray) -> Iterator[tuple[object, ...]]:
        """Yield rows about the images at ``indices``, each followed by the image's values in the kept columns."""
        for row, i in zip(rows, indices.tolist(), strict=True):
            yield *row, *(values[i] for values in self.kept.values())

    def class_counts(self, indices: IntArray) -> IntArray:
        """Return the number of images of each class (multi-label: with each label) among ``indices``, int64 [K]."""
        labels = self.labels[indices]
        counts = labels.sum(0) if self.is_multi_label else np.bincount(labels, minlength=len(self.classes))
        return counts.astype(np.int64)


def open_dataset(table: DataConfig, *, for_training: bool = True) -> Dataset:
    """Open the data set of a recipe. Raises UserError if it is missing or its folder layout is invalid.

    ``for_training``: also raise UserError if there are fewer than two classes, or no training images.
    """
    dataset: Dataset = pkgutil.resolve_name(DATASETS[table.dataset].opener)(table)
    where = table.table or table.name or ", ".join(table.roots)
    if for_training and len(dataset.classes) < 2:
        found = f"only the class {dataset.classes[0]!r}" if dataset.classes else "no label in any row"
        hint = ""
        if table.dataset == "imagefolder":
            found += f" ({plural(len(dataset.labels), 'image')})"
            hint = (
                ": images belong in <data.root>/<class>/ or <data.root>/train/<class>/. Is data.root the folder of a "
                "single class, or are the images not sorted into classes?"
            )
        raise UserError(f"{where} has {found}; a classifier needs two or more classes{hint}")
    if for_training and not len(dataset.lists["train"]):
        raise UserError(f"{where} has no training images: no row has the split train")
    classes = [encode_name(name) for name in dataset.classes]
    notes = (*dataset.notes, *_same_names(dataset.classes, where))
    return replace(dataset, classes=classes, notes=tuple(map(escape_control_characters, notes)))


def _same_names(classes: Sequence[str], where: str) -> Iterator[str]:
    """Yield a warning for two class names that are the same text, written with different Unicode characters."""
    known: dict[str, str] = {}
    for name in (name for name in classes if not name.isascii()):
        other = known.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            yield (
                f"warning: {where} has two classes whose names look the same but consist of different Unicode "
                f"characters, {other!a} and {name!a}; if they are one class, write both in the same form, such as NFC"
            )


def open_digits(table: DataConfig) -> Dataset:
    """Open scikit-learn's 1,797 handwritten digits of 8x8 pixels (UCI); values 0..16 are scaled to 0..255."""
    sklearn = importlib.util.find_spec("sklearn")
    assert sklearn is not None, "scikit-learn is a dependency"
    assert sklearn.origin is not None
    # Importing scikit-learn to read its file would take longer than training on it for an epoch.
    with gzip.open(Path(sklearn.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
        rows = np.loadtxt(file, dtype=np.int64, delimiter=",")
    pixels = np.rint(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = InMemoryImages(pixels, "digits", table.channels or 1)
    labels = rows[:, -1]
    return Dataset("digits", [str(d) for d in range(10)], images, labels, {"train": np.arange(len(labels))}, 8, 1)


def open_caltech101(table: DataConfig) -> Dataset:
    """Open Caltech-101 (Li et al. 2022), with the lists train.txt and test.txt next to the images, if they exist."""
    folder = _caltech_folder(Path(table.root_folder))
    walk = FolderWalk(folder / CALTECH_IMAGES)
    folders = walk.above_classes("").folders
    if table.background_class and CALTECH_BACKGROUND not in folders:
        raise UserError(f"data.background_class = true, but {folder / CALTECH_IMAGES / CALTECH_BACKGROUND} is missing")
    classes = [name for name in folders if name != CALTECH_BACKGROUND or table.background_class]
    present = {name: walk.images(name, name) for name in classes}
    empty = [name for name, files in present.items() if not files]
    if len(classes) < 2 or empty:
        raise UserError(
            f"{folder / CALTECH_IMAGES} is incomplete: it has {len(classes)} class folder(s)"
            f"{f', and {empty[0]} holds no image' if empty else ''}; unpack all of Caltech-101"
        )
    with_lists = [(folder / f"{name}.txt").is_file() for name in ("train", "test")]
    if not any(with_lists):
        paths = [path for name in classes for path in present[name]]
        lists = {"train": np.arange(len(paths))}
    elif all(with_lists):
        train, test = (_caltech_list(folder, name, present, table.background_class) for name in ("train", "test"))
        paths = train + test
        repeated = [path for path, count in Counter(paths).items() if count > 1]
        if repeated:
            raise UserError(f"{folder / 'train.txt'} and test.txt together list {repeated[0]} more than once")
        lists = {"train": np.arange(len(train)), "test": np.arange(len(train), len(paths))}
    else:
        found, other = ("train.txt", "test.txt") if with_lists[0] else ("test.txt", "train.txt")
        raise UserError(f"{folder} has {found} but not {other}: put both there, or neither to split all images")
    index = {name: label for label, name in enumerate(classes)}
    labels = np.array([index[path.partition("/")[0]] for path in paths], dtype=np.int64)
    images = encoded_images(ImageFiles(folder / CALTECH_IMAGES, paths), table)
    return Dataset("caltech101", classes, images, labels, lists, None, 3, tuple(walk.notes()))


def _caltech_folder(root: Path) -> Path:
    """Return the folder that contains 101_ObjectCategories."""
    for folder in (root / "caltech101", root, root / "caltech-101"):
        if (folder / CALTECH_IMAGES).is_dir():
            return folder
    raise UserError(
        f"no folder {CALTECH_IMAGES} in data.root = {str(root)!r} or its subfolder caltech101. Caltech-101 is not "
        f"downloaded by this program: get it from {CALTECH_SOURCE} and unpack it there"
    )


def _caltech_list(folder: Path, name: str, present: dict[str, list[str]], background: bool) -> list[str]:
    """Read the paths of one official list, without the background class unless ``background`` is true."""
    lines = (folder / f"{name}.txt").read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    paths = [line.strip() for line in lines if line.strip()]
    if not background:
        paths = [path for path in paths if not path.startswith(f"{CALTECH_BACKGROUND}/")]
    known = {path for files in present.values() for path in files}
    missing = [path for path in paths if path not in known]
    if missing:
        raise UserError(
            f"{folder / f'{name}.txt'} lists {len(missing)} image(s) that are not in {folder / CALTECH_IMAGES}: "
            f"{missing[0]}{', ...' if len(missing) > 1 else ''}; unpack all of Caltech-101, or remove these lines"
        )
    return paths


def open_imagefolder(table: DataConfig) -> Dataset:
    """Open folders of images with one subfolder per class, in a folder per split or directly in the root.

    A root may be a zip or tar file that contains these folders. The images of several roots are combined; their names
    then begin with that of their root.
    """
    roots = table.roots
    unread = [split for split in ("validation", "test") if getattr(table.split, split) == 0]
    layouts = [_layout(root, table, unread) for root in roots]
    classes = sorted({name for layout in layouts for name in layout.classes})
    index = {name: label for label, name in enumerate(classes)}
    sources: dict[str, EncodedSource] = {}
    labels: list[IntArray] = []
    lists: dict[str, list[IntArray]] = {}
    notes: list[str] = []
    count = 0
    for root, layout in zip(root_names(roots), layouts, strict=True):
        paths: list[str] = []
        for split, found in layout.files.items():
            start = count + len(paths)
            for name, files in found.items():
                paths += files
                labels.append(np.full(len(files), index[name], dtype=np.int64))
            lists.setdefault(split, []).append(np.arange(start, count + len(paths)))
        count += len(paths)
        archive = find_archive(layout.root)
        sources[root] = ImageFiles(layout.root, paths) if archive is None else ArchiveImages(*archive, paths)
        notes += layout.notes
    forget_archives()
    images = encoded_images(next(iter(sources.values())) if len(sources) == 1 else JoinedImages(sources), table)
    joined = {split: np.concatenate(parts) for split, parts in lists.items()}
    return Dataset("imagefolder", classes, images, np.concatenate(labels), joined, None, 3, tuple(notes))


def _layout(root: str, table: DataConfig, unread: list[str]) -> Layout:
    if not Path(root).is_dir() and find_archive(root) is None:
        raise UserError(f"data.root = {root!r} is not a folder; dataset = 'imagefolder' reads images from it")
    return read_layout(Path(root), table.class_folders, unread)


def root_names(roots: Sequence[str]) -> list[str]:
    """Return a prefix for the image names of each root: as many of its last folders as make all prefixes different."""
    parts = [Path(os.path.realpath(root)).parts for root in roots]
    for one, other in permutations(range(len(roots)), 2):
        if parts[one][: len(parts[other])] == parts[other]:
            raise UserError(f"data.root: {roots[one]} is inside {roots[other]}, so its images would be used twice")
    parts = [Path(os.path.abspath(root)).parts for root in roots]
    counts = range(1, max(map(len, parts)) + 1)
    names = (["/".join(part[-count:]) for part in parts] for count in counts)
    return next(found for found in names if len(set(found)) == len(found))


def encoded_images(
    source: EncodedSource, table: DataConfig, origin: Callable[[int], str] | None = None
) -> EncodedImages:
    """Return the images of a source, decoded according to the recipe. ``origin``: see :class:`EncodedImages`."""
    return EncodedImages(
        source,
        table.channels or 3,
        exif=table.exif,
        value_range=table.known_range,
        page=table.page,
        advice=CANNOT_READ if table.on_bad_image == "error" else HAS_CHANGED,
        origin=origin,
    )
