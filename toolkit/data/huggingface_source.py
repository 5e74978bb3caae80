"""Data sets of Hugging Face's library `datasets`: a folder, a data set saved to disk, or one on the Hub.

Images are not decoded by the library: image files are read in place, and images stored in the library's Arrow files,
which are memory-mapped, are read from them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from toolkit.data.datasets import Dataset, encoded_images
from toolkit.data.encoded_sources import EncodedSource, ImageFiles, PartIndex
from toolkit.data.folder_layout import split_of
from toolkit.data.table_columns import read_examples
from toolkit.data.table_files import RowValues, Table
from toolkit.errors import UserError, missing_package
from toolkit.filenames import encode_name
from toolkit.recipe.schema import DataConfig

_SPLIT = "the data set's own split"
"""Name of the split column that :func:`_read` adds."""


class ArrowImages:
    """Encoded images in the Arrow files of a data set, by split; an EncodedSource."""

    def __init__(self, parts: dict[str, Any], column: str, sizes: npt.NDArray[np.int64]) -> None:
        """``parts``: a ``datasets.Dataset`` for each split. ``column``: its image column, of bytes or {bytes, path}.

        ``sizes``: size of each image in bytes, [N].
        """
        self._splits, self._parts = list(parts), [_arrow(part, [column]) for part in parts.values()]
        self._index = PartIndex([len(part) for part in self._parts])
        self._sizes = sizes
        files = [file["filename"] for part in self._parts for file in part.cache_files]
        self._location = files[0] if files else "memory"
        self._version = max((os.stat(file).st_mtime_ns for file in files), default=0)

    def __len__(self) -> int:
        return len(self._index)

    def open(self, i: int) -> BinaryIO:
        """Return the bytes of image i as an in-memory file."""
        at, row = self._index.locate(i)
        (value,) = self._parts[at][row].column(0).to_pylist()
        return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)

    def name(self, i: int) -> str:
        """Return the split of image i and its row in it, counted from 0, such as "train/17"."""
        at, row = self._index.locate(i)
        return f"{self._splits[at]}/{row}"

    def location(self, i: int) -> str:
        """Return the path of a file of the data set, followed by the name of image i."""
        return encode_name(f"{self._location}, {self.name(i)}")

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the size of image i in bytes, and the modification time of the data set's files."""
        return int(self._sizes[i]), self._version


def open_huggingface(config: DataConfig) -> Dataset:
    """Open a data set with the library `datasets`. Raises UserError, which lists the invalid rows if there are any."""
    name = str(config.name)
    parts, notes = _splits(_load(name, config), name, config)
    features = parts["train"].features
    image, label = _image_column(features, name, config), _label_column(features, name, config)
    for split in ("validation", "test"):
        if split in parts and isinstance(label, str) and _has_no_labels(parts[split], label):
            del parts[split]
            notes.append(f"the {split} split of {name} has no labels and is not used")
    columns = config.columns
    if columns.split is not None and len(parts) > 1:
        raise UserError(f"{name} has its own splits ({', '.join(parts)}): remove data.columns.split")
    found = {"image": image, "label": label, "split": columns.split or _SPLIT}
    names = _names(features[label]) if isinstance(label, str) else None
    update = {"columns": columns.model_copy(update=found), "class_names": config.class_names or names}
    reader = partial(_read, parts, image, names if config.class_names is None else None)
    table = Table(Path(name), [*features, _SPLIT], reader, frozenset([image]))
    examples = read_examples(table, config.model_copy(update=update))
    return Dataset(
        name=name,
        classes=examples.classes,
        images=encoded_images(_source(parts, image, name), config),
        labels=examples.labels,
        lists=examples.lists,
        native_size=None,
        native_channels=3,
        notes=(f"{name}: image from column {image!r}, label from column {label!r}", *notes),
        groups=examples.groups,
        weights=examples.weights,
        kept=examples.kept,
    )


# -- opening ----------------------------------------------------------------------------------------------------------


def _load(name: str, config: DataConfig) -> Any:
    """Return the library's Dataset or DatasetDict."""
    try:
        import datasets
    except ImportError:
        raise missing_package('dataset = "huggingface"', "the library `datasets`", "huggingface") from None

    datasets.disable_progress_bars()
    folder = Path(name)
    is_saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if is_saved and config.args:
        raise UserError(f"{name} was saved with save_to_disk, which has no arguments: remove data.args")
    try:
        if is_saved:
            return datasets.load_from_disk(name)
        with _offline(datasets.config, not config.download):
            return datasets.load_dataset(name, **config.args)
    except Exception as error:  # the library raises exceptions of many types
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        if folder.is_dir():
            raise UserError(f"the data set in {name} cannot be read: {reason}") from error
        hint = "" if config.download else "; data.download is false, so only the library's cache was searched"
        raise UserError(
            f"data.name = {name!r} is neither a folder nor a readable data set on the Hugging Face Hub: {reason}{hint}"
        ) from error


@contextmanager
def _offline(settings: Any, is_offline: bool) -> Iterator[None]:
    """Keep the library from using the network."""
    before = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = before or is_offline
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before


def _splits(found: Any, name: str, config: DataConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the splits that the recipe uses, and notes for the log."""
    own = found if isinstance(found, dict) else {"train": found}
    if len(own) == 1:
        return {"train": next(iter(own.values()))}, []
    notes, parts = [], dict[str, Any]()
    for split in ("train", "validation", "test"):
        named = [key for key in own if split_of(key) == split]
        if len(named) > 1:
            raise UserError(f"{name} has several {split} splits: {', '.join(named)}; select one with data.args.split")
        if named and (split == "train" or getattr(config.split, split) != 0):
            parts[split] = own[named[0]]
    unused = [key for key in own if split_of(key) is None]
    if unused:
        notes.append(f"splits that are not used, because their names are unknown: {', '.join(unused)}")
    if "train" not in parts:
        raise UserError(f"{name} has no training split, only {', '.join(own)}; select one with data.args.split")
    return parts, notes


# -- columns ----------------------------------------------------------------------------------------------------------


def _image_column(features: Any, name: str, config: DataConfig) -> str:
    """Return the name of the image column. Raises UserError if there is none, or more than one."""
    found = [key for key, feature in features.items() if _is_image(feature)]
    wanted = config.columns.image or ("image" if "image" in found else found[0] if len(found) == 1 else None)
    if wanted is None:
        has = f"several image columns ({', '.join(found)})" if found else f"no image column, only {_shown(features)}"
        raise UserError(f"{name} has {has}{': select one with data.columns.image' if found else ''}")
    if wanted not in found:
        state = f"contains {features[wanted]}, not images" if wanted in features else f"is not among {_shown(features)}"
        raise UserError(f"{name}: the column {wanted!r} {state}; see data.columns.image")
    return wanted


def _is_image(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _label_column(features: Any, name: str, config: DataConfig) -> str | list[str]:
    """Return the label column, or several of them. Raises UserError if they do not contain classes."""
    wanted = config.columns.label
    if wanted == "label" and "label" not in features:
        found = [key for key, feature in features.items() if _names(feature) is not None]
        if len(found) != 1:
            columns = ", ".join(found) or _shown(features)
            raise UserError(f"{name} has no column 'label', only {columns}: select one with data.columns.label")
        wanted = found[0]
    for key in [wanted] if isinstance(wanted, str) else wanted:
        if key not in features:
            raise UserError(f"{name} has no column {key!r}, only {_shown(features)}; see data.columns.label")
        feature = getattr(features[key], "feature", features[key])
        kind = getattr(feature, "dtype", None)
        if isinstance(kind, str) and kind.startswith(("float", "double", "decimal")):
            raise UserError(f"{name}: the column {key!r} contains {kind} numbers, as for regression, not classes")
        if not isinstance(kind, str) or not kind.startswith(("int", "uint", "string", "large_string", "bool")):
            raise UserError(f"{name}: the column {key!r} contains {feature}, not classes; see data.columns.label")
    return wanted


def _names(feature: Any) -> list[str] | None:
    """Return the class names in a column's ClassLabel feature, or in that of a list of labels; None without one."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return list(names) if isinstance(names, list) else None


def _shown(features: Any) -> str:
    return ", ".join(list(features)[:30])


def _arrow(part: Any, columns: Sequence[str]) -> Any:
    """Return the data set with only these columns, in a format that returns pyarrow tables."""
    return part.select_columns(list(columns)).with_format("arrow")


def _has_no_labels(part: Any, label: str) -> bool:
    """Return whether no row has a label; test splits on the Hub often contain only -1."""
    tables = _arrow(part, [label]).iter(batch_size=8192)
    return all(value in (None, -1) for table in tables for value in table.column(0).to_pylist())


def _read(
    parts: dict[str, Any], image: str, names: list[str] | None, wanted: Sequence[str]
) -> Iterator[tuple[int, RowValues]]:
    """Yield the rows of all splits, numbered from 1. ``names``: class names for the integers in the label column.

    The value of the image column is None, because images are read later.
    """

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(one) for one in value]
        return names[value] if names is not None and isinstance(value, int) and 0 <= value < len(names) else value

    number = 0
    for split, part in parts.items():
        stored = [key for key in wanted if key not in (image, _SPLIT)]
        labeled = {key for key in stored if _names(part.features[key]) is not None}
        for table in _arrow(part, stored).iter(batch_size=8192):
            for row in table.to_pylist():
                number += 1
                values = {key: named(value) if key in labeled else value for key, value in row.items()}
                yield number, [split if key == _SPLIT else values.get(key) for key in wanted]


def _source(parts: dict[str, Any], column: str, name: str) -> EncodedSource:
    """Return the images: files if no row contains bytes, else the bytes in the rows."""
    import pyarrow.compute as pc

    paths: list[str | None] = []
    sizes: list[npt.NDArray[np.int64]] = []
    for part in parts.values():
        for table in _arrow(part, [column]).iter(batch_size=8192):
            values = table.column(0)
            is_struct = hasattr(values.type, "fields")
            encoded = pc.struct_field(values, "bytes") if is_struct else values
            sizes.append(pc.binary_length(encoded).fill_null(-1).to_numpy().astype(np.int64))
            paths += pc.struct_field(values, "path").to_pylist() if is_struct else [None] * len(values)
    every_size = np.concatenate(sizes)
    missing = int((every_size < 0).sum())
    if not missing:
        return ArrowImages(parts, column, every_size)
    if missing < len(paths) or None in paths:
        raise UserError(f"{name}: {missing} of {len(paths)} rows have no image in column {column!r}")
    files = [os.path.abspath(str(path)) for path in paths]
    root = os.path.abspath(name)
    if not all(file.startswith(f"{root}{os.sep}") for file in files):
        root = os.path.commonpath([os.path.dirname(file) for file in files])
    return ImageFiles(Path(root), [os.path.relpath(file, root) for file in files])
