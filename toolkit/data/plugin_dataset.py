"""Data sets of the user's own code: anything with ``__len__`` and ``__getitem__``, as torch.utils.data.Dataset."""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from toolkit import plugins
from toolkit.data.datasets import Dataset, encoded_images
from toolkit.data.encoded_sources import PartIndex, read_bytes
from toolkit.data.table_columns import read_examples
from toolkit.data.table_files import RowValues, Table
from toolkit.errors import UserError, first_line
from toolkit.filenames import encode_name
from toolkit.formatting import plural
from toolkit.hashing import json_hash
from toolkit.recipe.data_schema import DataConfig

_SPLITS = ("train", "validation", "test")

TRIED = 8
"""Number of images that are read twice when a data set is opened."""

_reading = threading.Lock()
"""Held while an item is read: data sets are written for one thread in each process."""


def _new_lock() -> None:
    global _reading
    _reading = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # another thread may have held it


class PluginImages:
    """The images of a data set's splits; an EncodedSource whose images are NumPy files in memory."""

    def __init__(self, parts: dict[str, Any], version: int) -> None:
        """``parts``: a data set for each split. ``version``: int64 that changes with the data, as far as is known."""
        self._splits, self._parts, self._version = list(parts), list(parts.values()), version
        self._index = PartIndex([len(part) for part in self._parts])
        self._names = [getattr(part, "names", None) for part in self._parts]

    def __len__(self) -> int:
        return len(self._index)

    def open(self, i: int) -> BinaryIO:
        """Return image i as a .npy file in memory."""
        at, index = self._index.locate(i)
        file = io.BytesIO()
        np.save(file, _as_array(_item(self._parts[at], index)[0]), allow_pickle=False)
        file.seek(0)
        return file

    def name(self, i: int) -> str:
        """Return the name that the data set gives image i; else its split and its index there, such as "train/17"."""
        at, index = self._index.locate(i)
        names = self._names[at]
        return f"{self._splits[at]}/{index}" if names is None else encode_name(str(names[index]))

    def location(self, i: int) -> str:
        """Return the class of the data set, and the index of image i."""
        at, index = self._index.locate(i)
        return encode_name(f"{type(self._parts[at]).__name__}[{index}]")

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return 1, since the number of bytes is unknown, and the version of the data set."""
        return 1, self._version


def open_plugin_dataset(config: DataConfig) -> Dataset:
    """Build the data set that data.name names, and read its labels. Raises UserError.

    The factory returns one object with ``__len__`` and ``__getitem__(i) -> (image, label)``, whose splits are drawn, or
    a dictionary with one for each official split: train, and validation or test or both. An image is a Pillow image, an
    array or a tensor, [h, w], [h, w, C] or [C, h, w], of any real type. A label is a class, as a number or name, or for
    multi-label an array of 0 and 1, or a list of classes. Optional attributes, each with one value per image:
    ``targets`` (labels, which are then not taken from the items), ``groups``, ``weights`` and ``names``; and
    ``classes`` (their names) and ``version`` (text; without it images are not cached).

    An item depends on its index alone, so that a run can be repeated, resumed and verified; random augmentation belongs
    in [augment]. This is checked for :data:`TRIED` items.
    """
    plugin = plugins.find("dataset", str(config.name))
    parts = _splits(plugin.build(config.args), plugin.name, config)
    _check_attributes(parts, plugin.name)
    source = PluginImages(parts, int(json_hash([plugin.record, config.args, _shared(parts, "version")])[:15], 16))
    _check_items(source, plugin.name, skip=config.on_bad_image == "skip")
    labels = {split: _labels(part, plugin.name) for split, part in parts.items()}
    classes = config.class_names or _shared(parts, "classes")
    if classes is None and isinstance(first := next(iter(labels["train"]), None), np.ndarray):
        classes = [str(number) for number in range(len(first))]
    optional = {key: f"{key}s" for key in ("group", "weight") if _shared(parts, f"{key}s") is not None}
    columns = ["image", "label", "split", *optional]
    settings = {
        "columns": config.columns.model_copy(update={column: column for column in columns}),
        "class_names": None if classes is None or isinstance(classes, str) else [str(name) for name in classes],
    }
    reader = partial(_rows, parts, labels, optional)
    examples = read_examples(
        Table(Path(plugin.name), columns, reader, frozenset(["image"])), config.model_copy(update=settings)
    )
    unversioned = f"{plugin.name} has no attribute `version`, a text to be changed whenever its images change"
    return Dataset(
        name=plugin.name,
        classes=examples.classes,
        images=encoded_images(source, config),
        labels=examples.labels,
        lists=examples.lists,
        native_size=None,
        native_channels=3,
        notes=(f"{plugin.name}: {plural(len(source), 'image')} of {type(parts['train']).__name__}",),
        groups=examples.groups,
        weights=examples.weights,
        why_not_cached=unversioned if _shared(parts, "version") is None else "",
    )


def _splits(found: Any, name: str, config: DataConfig) -> dict[str, Any]:
    """Return the data set of each split that the recipe uses."""
    parts = found if isinstance(found, dict) else {"train": found}
    if unknown := [key for key in parts if key not in _SPLITS]:
        raise UserError(f"the data set {name!r} has the split {unknown[0]!r}; the splits are {', '.join(_SPLITS)}")
    if "train" not in parts:
        raise UserError(f"the data set {name!r} has no split 'train'")
    for split, part in parts.items():
        missing = [method for method in ("__len__", "__getitem__") if not hasattr(part, method)]
        if missing:
            raise UserError(
                f"the data set {name!r} ({split}) is a {type(part).__name__} without {missing[0]}: images are read by "
                "index, so a stream has to be written to shards or files first"
            )
    used = ("train", *(split for split in _SPLITS[1:] if getattr(config.split, split) != 0))
    return {split: parts[split] for split in used if split in parts}


def _check_attributes(parts: dict[str, Any], name: str) -> None:
    """Raise UserError unless attributes with one value per image have that many values, and names are distinct."""
    names = Counter(str(each) for part in parts.values() for each in getattr(part, "names", None) or ())
    if repeated := next((each for each, count in names.items() if count > 1), None):
        raise UserError(f"the data set {name!r} has more than one image named {repeated!r}")
    for part in parts.values():
        for attribute in ("targets", "names", "groups", "weights"):
            values = getattr(part, attribute, None)
            if values is not None and len(values) != len(part):
                raise UserError(f"the data set {name!r} has {len(part)} images, but {len(values)} {attribute}")


def _shared(parts: dict[str, Any], name: str) -> Any:
    """Return an attribute of the training split; None if it has none."""
    return getattr(parts["train"], name, None)


def _labels(part: Any, name: str) -> Sequence[Any]:
    """Return the label of each item, an array of 0 and 1 as a NumPy array; without ``targets``, all items are read."""
    targets = getattr(part, "targets", None)
    found = (_item(part, i)[1] for i in range(len(part))) if targets is None else targets
    try:
        return [_plain(label) for label in found]
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"the labels of the data set {name!r} cannot be read: {first_line(error)}") from error


def _plain(label: Any) -> Any:
    """Return a label as a plain value or a list, or, if it is an array of 0 and 1 (multi-label), as a NumPy array."""
    if hasattr(label, "tolist"):  # an array or tensor
        array = np.asarray(label)
        return array if array.ndim == 1 and np.isin(array, (0, 1)).all() else array.tolist()
    return label


def _rows(
    parts: dict[str, Any], labels: dict[str, Sequence[Any]], optional: dict[str, str], wanted: Sequence[str]
) -> Iterator[tuple[int, RowValues]]:
    """Yield the rows that :func:`toolkit.data.table_columns.read_examples` reads, numbered over all splits."""
    number = 0
    for split, part in parts.items():
        values = {column: getattr(part, attribute) for column, attribute in optional.items()}
        for i, label in enumerate(labels[split]):
            shown = np.flatnonzero(label).tolist() if isinstance(label, np.ndarray) else label
            row = {
                "image": None,
                "label": shown,
                "split": split,
                **{key: _plain(each[i]) for key, each in values.items()},
            }
            yield number, [row[column] for column in wanted]
            number += 1


def _item(part: Any, i: int) -> tuple[Any, Any]:
    """Return image and label of an item. Raises ValueError if it is not such a pair."""
    with _reading:
        item = part[i]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ValueError(f"item {i} is a {type(item).__name__} and not a pair of image and label")
    return item[0], item[1]


def _as_array(image: Any) -> npt.NDArray[Any]:
    """Return an image as an array of its own type. Raises TypeError for other objects."""
    if isinstance(image, Image.Image):
        if image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        return np.asarray(image)
    if isinstance(image, np.ndarray) or hasattr(image, "numpy"):  # a tensor
        return np.asarray(image)
    raise TypeError(f"a {type(image).__name__} is not an image: a Pillow image, an array or a tensor is needed")


def _check_items(source: PluginImages, name: str, *, skip: bool) -> None:
    """Raise UserError if some images cannot be read (``skip``: all of them), or differ when they are read again."""
    if len(source) == 0:
        raise UserError(f"the data set {name!r} has no images")
    indices = range(0, len(source), -(-len(source) // TRIED))
    changed, failed = [], 0
    for i in indices:
        try:
            if read_bytes(source, i) != read_bytes(source, i):
                changed.append(i)
        except Exception as error:  # the user's own code may raise anything
            failed += 1
            if not skip or failed == len(indices):
                raise UserError(
                    f"the data set {name!r} fails at {source.name(i)}: {type(error).__name__}: {first_line(error)}"
                ) from error
    if changed:
        raise UserError(
            f"the data set {name!r} gives another image when {source.name(changed[0])} is read again, so that runs "
            "could not be repeated or resumed: return images without augmentation, and name the transform in [augment] "
            'train, as { name = "plugin:NAME" } if it is your own'
        )
