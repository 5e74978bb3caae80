"""The columns of a table of labeled images: paths, labels, splits, groups, weights, and others that are kept.

Values are collected in flat arrays while the rows are read, so that a table of a million rows needs little memory.
"""

from __future__ import annotations

import functools
import os
import re
import reprlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from toolkit.data.encoded_sources import PackedStrings
from toolkit.data.folder_layout import SPLIT_NAMES, split_of
from toolkit.data.sampling import IntArray
from toolkit.data.table_files import BadRow, Table
from toolkit.errors import UserError
from toolkit.filenames import encode_name
from toolkit.formatting import plural
from toolkit.recipe.data_schema import ColumnsConfig, DataConfig
from toolkit.similar_names import did_you_mean

PATH_COLUMNS = ("image", "path", "file", "filename", "file_name")
"""Image columns if data.columns.image is not set: the only one of these in the table, or else "image"."""

SHOWN = 10
"""Maximum number of invalid rows listed in a message."""

_INTEGER = re.compile(r"-?\d{1,1000}")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Examples:
    """All rows of a table, in file order."""

    rows: npt.NDArray[np.int64]
    """Row number of each example, for messages, [N]."""
    paths: PackedStrings
    """Path of each image; "" for an image in the table that has no path."""
    encoded: str | None
    """Column that contains the bytes of the images; None if the images are files."""
    repeated: list[tuple[int, int]]
    """Pairs of indices (repeated path, its first occurrence)."""
    classes: list[str]
    labels: npt.NDArray[Any]
    """Class indices, int64 [N]; multi-label: uint8 [N, classes], 1 for each label of an image, else 0."""
    lists: dict[str, IntArray]
    """Row indices of each split; without a split column, all are in "train"."""
    groups: IntArray | None
    """Group number of each example, int64 [N]."""
    weights: npt.NDArray[np.float64] | None
    """Weight of each example in the training loss, at least 0, [N]."""
    kept: dict[str, PackedStrings]
    """Values of the columns in data.columns.keep, encoded as in predictions.csv."""


class RowFaults:
    """Collects the invalid rows of a table and reports them in one error."""

    def __init__(self, table: Table) -> None:
        self.table, self.found = table, dict[int, str]()

    def add(self, row: int, fault: str) -> None:
        """Record what is wrong with a row; only the first fault of each row is kept."""
        self.found.setdefault(row, fault)

    def check(self) -> None:
        """Raise UserError if any row is invalid, listing the first ten and the total number."""
        if not self.found:
            return
        where = self.table.describe_row
        shown = "; ".join(f"{where(row)}: {fault}" for row, fault in sorted(self.found.items())[:SHOWN])
        more = f"; and {len(self.found) - SHOWN} more" if len(self.found) > SHOWN else ""
        raise UserError(
            f"{plural(len(self.found), 'row')} of {self.table.path} cannot be used: {shown}{more}. "
            "Correct or remove them"
        )


class _Column(Protocol):
    def add(self, value: Any) -> None:
        """Append the value of the next row. Raises ValueError with a message for the user if it is invalid."""


class _Paths:
    """The image column: paths relative to ``root``; if ``encoded``, images in the table, whose path is optional."""

    def __init__(self, encoded: bool, root: str) -> None:
        self.encoded, self.root, self.strings, self.hashes = encoded, root, PackedStrings(), array("q")

    def add(self, value: Any) -> None:
        if not self.encoded and (not isinstance(value, str) or not value):
            shown = reprlib.repr(value)
            raise ValueError("no image path" if value in (None, "") else f"the image path {shown} is not text")
        if value is not None and "\0" in value:
            raise ValueError("a null character in the image path")
        self.strings.append(value or "")
        self.hashes.append(hash(self._normal(value or "")))

    def _normal(self, path: str) -> str:
        """Return the path normalized, so that ./a.png and a.png are equal."""
        if self.encoded or (path[0] != "/" and "./" not in path and "//" not in path):  # fast path; rows may be many
            return path
        return os.path.relpath(os.path.join(self.root, path), self.root)

    def repeated(self) -> Iterator[tuple[int, int]]:
        """Yield (index, index of the first occurrence) for each path that occurs more than once."""
        hashes = np.frombuffer(self.hashes, dtype=np.int64)
        found, counts = np.unique(hashes, return_counts=True)
        first: dict[str, int] = {}
        for i in np.flatnonzero(np.isin(hashes, found[counts > 1])).tolist():
            if (path := self._normal(self.strings[i])) and first.setdefault(path, i) != i:
                yield i, first[path]


class _Codes:
    """A column of names, which get integer codes in order of first occurrence."""

    def __init__(self, what: str, read: Callable[[str], str] = lambda text: text) -> None:
        self.what, self.read, self.codes, self.values = what, read, dict[str, int](), array("q")

    def code(self, value: Any) -> int:
        """Return the code of a name; the value may be text or a whole number."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = str(value).strip() if isinstance(value, str | int) else ""
        if not text:
            shown = reprlib.repr(value)
            raise ValueError(f"no {self.what}" if value in (None, "") else f"the {self.what} {shown} is not a name")
        return self.codes.setdefault(self.read(text), len(self.codes))

    def add(self, value: Any) -> None:
        self.values.append(self.code(value))


class _Labels(_Codes):
    """The label column: one label per row, or several, as a list or as text with a separator."""

    def __init__(self, separator: str | None) -> None:
        super().__init__("label")
        self.separator, self.ends, self.is_multi = separator, array("q"), separator is not None

    def add(self, value: Any) -> None:
        if not self.ends and isinstance(value, list):
            self.is_multi = True
        if not self.is_multi:
            super().add(value)
        else:
            if self.separator is not None and isinstance(value, str):
                value = [part for part in value.split(self.separator) if part.strip()]
            if not isinstance(value, list):
                raise ValueError(f"the labels {value!r} are not a list")
            self.values.extend([self.code(one) for one in value])
        self.ends.append(len(self.values))


_INDICATOR_VALUES = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
"""Includes the forms that pandas writes to CSV files for floats and booleans."""


class _Indicator:
    """One of several label columns: 1 for images with its label and 0 for the others."""

    def __init__(self, name: str) -> None:
        self.name, self.values = name, bytearray()

    def add(self, value: Any) -> None:
        number = _INDICATOR_VALUES.get(str(value).strip().lower())
        if number is None:
            raise ValueError(f"{self.name} is {reprlib.repr(value)} instead of 0 or 1")
        self.values.append(number)


class _Weights:
    def __init__(self) -> None:
        self.values = array("d")

    def add(self, value: Any) -> None:
        try:
            weight = float(value)
        except (TypeError, ValueError):
            weight = -1
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight {value!r} is not a finite number of at least 0")
        self.values.append(weight)


class _Kept:
    """A column of any values, as text for files: numbers unchanged, other text encoded like names."""

    def __init__(self) -> None:
        self.strings = PackedStrings()

    def add(self, value: Any) -> None:
        self.strings.append("" if value is None else _text_for_files(str(value)))


@functools.lru_cache(1024)  # most columns have few values
def _text_for_files(text: str) -> str:
    return text if _NUMBER.fullmatch(text) else encode_name(text)


def read_examples(table: Table, config: DataConfig) -> Examples:
    """Read all rows of a table. Raises UserError for missing columns, and one for all invalid rows together."""
    names = choose_columns(table, config.columns)
    encoded = names["image"] in table.encoded
    paths, rows, faults = _Paths(encoded, config.root_folder), array("q"), RowFaults(table)
    many = isinstance(config.columns.label, list)
    labels = _Labels(config.label_separator)
    indicators = [_Indicator(name) for name in config.columns.label] if many else []
    splits, groups, weights = _Codes("split", _split_name), _Codes("group"), _Weights()
    optional: dict[str, _Column] = {"split": splits, "group": groups, "weight": weights}
    kept = {name: _Kept() for name in config.columns.keep}
    columns: list[_Column] = [paths, *indicators, *(optional[key] for key in optional if key in names), *kept.values()]
    if not indicators:
        columns.insert(1, labels)
    wanted = [names["image"], *(config.columns.label if many else [names["label"]])]
    for row, values in table.read([*wanted, *(names[key] for key in optional if key in names), *kept]):
        if isinstance(values, BadRow):
            faults.add(row, values)
            continue
        rows.append(row)
        for column, value in zip(columns, values, strict=True):
            try:
                column.add(value)
            except ValueError as error:
                faults.add(row, str(error))
    faults.check()
    if not rows:
        raise UserError(f"{table.path} has no rows below the column names")
    repeated = list(paths.repeated())
    for i, first in () if encoded else repeated:
        faults.add(rows[i], f"{paths.strings[i]} is also in {table.describe_row(rows[first])}")
    row_numbers = np.frombuffer(rows, dtype=np.int64)
    if indicators:
        classes = list(config.columns.label)
        array_of_labels: npt.NDArray[Any] = np.stack([np.frombuffer(c.values, np.uint8) for c in indicators], axis=1)
    else:
        stated = None if many else table.class_names.get(names["label"])
        class_names = read_class_names(config.class_names)
        classes, array_of_labels = _labels(labels, class_names, stated, row_numbers, faults)
    faults.check()
    return Examples(
        rows=row_numbers,
        paths=paths.strings,
        encoded=names["image"] if encoded else None,
        repeated=repeated,
        classes=classes,
        labels=array_of_labels,
        lists=_lists(splits) if "split" in names else {"train": np.arange(len(rows))},
        groups=np.frombuffer(groups.values, dtype=np.int64) if "group" in names else None,
        weights=np.frombuffer(weights.values, dtype=np.float64) if "weight" in names else None,
        kept={encode_name(name): column.strings for name, column in kept.items()},
    )


def choose_columns(table: Table, config: ColumnsConfig) -> dict[str, str]:
    """Return the column for each key of [data.columns] in use, without "label" if there are several label columns.

    Raises UserError if the table does not have one of them.
    """
    names = {key: getattr(config, key) for key in ("label", "split", "group", "weight")}
    found = {key: [name] if isinstance(name, str) else name or [] for key, name in names.items()}
    image = config.image
    if image is None:
        present = [name for name in PATH_COLUMNS if name in table.columns]
        image = present[0] if len(present) == 1 else "image"
    for key, wanted in {"image": [image], **found, "keep": config.keep}.items():
        for name in wanted:
            if name not in table.columns:
                raise UserError(
                    f"{table.path} has no column {name!r}, only {', '.join(table.columns[:30])}; "
                    f"data.columns.{key} sets the column to read{did_you_mean(name, table.columns, prefix=': ')}"
                )
    return {"image": image, **{key: wanted[0] for key, wanted in found.items() if len(wanted) == 1}}


def read_class_names(setting: str | list[str] | None) -> list[str] | None:
    """Return the class names in data.class_names, which is a list or a file with one per line. Raises UserError."""
    if setting is None or isinstance(setting, list):
        names = setting
    else:
        try:
            text = Path(setting).read_text(encoding="utf-8-sig", errors="surrogateescape")
        except OSError as error:
            raise UserError(f"data.class_names = {setting!r} cannot be read: {error.strerror}") from None
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if names is not None and len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"data.class_names has {repeated!r} more than once")
    return names


def _labels(
    labels: _Labels,
    names: list[str] | None,
    stated: list[str] | None,
    rows: npt.NDArray[np.int64],
    faults: RowFaults,
) -> tuple[list[str], npt.NDArray[Any]]:
    """Return the classes, and the labels as in :class:`Examples`; adds rows with unknown labels to ``faults``.

    ``names``: data.class_names. ``stated``: class names stored in the table itself, whose labels are then class
    indices; used if ``names`` is None.
    """
    found, are_indices, source = list(labels.codes), False, "data.class_names"
    if names is None and stated is None:
        are_numbers = all(map(_INTEGER.fullmatch, found))
        names = sorted(found, key=(lambda text: (int(text), text)) if are_numbers else None)
        numbers = {name: i for i, name in enumerate(names)}
    else:
        source = source if names else "the class names in the table"
        are_indices = not names or not any(map(_INTEGER.fullmatch, names))  # else integers are names, not indices
        names = names or stated or []
        numbers = {name: i for i, name in enumerate(names)}
        numbers |= {str(i): i for i in range(len(names))} if are_indices else {}
    index = np.array([numbers.get(text, -1) for text in found], dtype=np.int64)
    codes, ends = np.frombuffer(labels.values, dtype=np.int64), np.frombuffer(labels.ends, dtype=np.int64)
    values = index[codes]
    for place in np.flatnonzero(values < 0):
        row, text = rows[np.searchsorted(ends, place, side="right")], found[codes[place]]
        hint = f", whose indices are 0 to {len(names) - 1}" if are_indices and _INTEGER.fullmatch(text) else ""
        faults.add(int(row), f"the label {text!r} is not in {source}{hint}")
    if not labels.is_multi:
        return names, values
    matrix = np.zeros((len(rows), len(names)), dtype=np.uint8)
    matrix[np.repeat(np.arange(len(rows)), np.diff(ends, prepend=0)), values] = 1
    return names, matrix


def _split_name(text: str) -> str:
    split = split_of(text)
    if split is None:
        raise ValueError(f"unknown split {text!r} (train, validation, test, or another usual name such as val)")
    return split


def _lists(splits: _Codes) -> dict[str, IntArray]:
    """Return the row indices of each split that occurs in the column, and of "train" in any case."""
    codes = np.frombuffer(splits.values, dtype=np.int64)
    named = [split for split in SPLIT_NAMES if split in splits.codes or split == "train"]
    return {split: np.flatnonzero(codes == splits.codes.get(split, -1)) for split in named}


def describe_encoding(table: Table, examples: Examples) -> list[str]:
    """Return a note for the log if paths or labels are not UTF-8, as in files in Latin-1."""
    is_odd = np.array([any("\udc80" <= char <= "\udcff" for char in name) for name in examples.classes])
    odd = np.flatnonzero(is_odd[examples.labels] if examples.labels.ndim == 1 else examples.labels @ is_odd)
    buffer, ends = examples.paths.arrays()
    high = np.unique(np.searchsorted(ends, np.flatnonzero(buffer > 127), side="right") - 1)
    in_path = [i for i in high.tolist() if any("\udc80" <= char <= "\udcff" for char in examples.paths[i])]
    rows = sorted({*odd.tolist(), *in_path})
    if not rows:
        return []
    more = f" and {plural(len(rows) - 1, 'other row')}" if len(rows) > 1 else ""
    return [
        f"{table.describe_row(int(examples.rows[rows[0]]))}{more} of {table.path} are not UTF-8, which is how tables "
        "are read; if the file is in another encoding, such as Latin-1 or Windows-1252, save it as UTF-8"
    ]


def describe_columns(table: Table, config: ColumnsConfig) -> list[str]:
    """Return notes for the log: which columns are read, and whether an unused column looks like splits."""
    labels = {"label": ", ".join(config.label)} if isinstance(config.label, list) else {}
    used = {**choose_columns(table, config), **labels, **({"keep": ", ".join(config.keep)} if config.keep else {})}
    notes = [f"{table.path}: " + ", ".join(f"{key} from column {name!r}" for key, name in used.items())]
    for name in table.columns if config.split is None else ():
        if name.lower() == "split":
            notes.append(f"column {name!r} is not used; to take the splits from it, set data.columns.split = {name!r}")
    return notes
