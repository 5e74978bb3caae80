"""Finding the columns of paths, labels, splits, groups and weights in a table by their names and values."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from toolkit.data.folder_layout import split_of
from toolkit.data.folder_walk import IMAGE_SUFFIXES
from toolkit.data.table_columns import PATH_COLUMNS
from toolkit.data.table_files import BadRow, Table
from toolkit.errors import UserError

ROWS = 2000
"""Maximum number of rows that are examined."""

LABELS = ("label", "labels", "class", "classes", "class_name", "target", "category", "tags", "species", "y")
SPLITS = ("split", "set", "subset", "partition", "fold")
GROUPS = ("group", "group_id", "patient", "patient_id", "subject", "subject_id", "person_id", "site_id", "slide_id")
LEAST_GROUPS = 10
"""A column with fewer values is not taken for groups: they could not be divided among the splits."""
WEIGHTS = ("sample_weight",)
"""Not "weight": it may be that of a patient."""
SEPARATORS = (";", "|")
"""Separators between several labels in one text; without commas and spaces, which may be part of a name."""

_INDICATORS = {"0", "1", "0.0", "1.0", "true", "false"}


@dataclass(frozen=True)
class GuessedColumns:
    """The keys of [data] that describe the columns of a table."""

    columns: dict[str, Any]
    separator: str | None
    root: str | None
    """Folder that paths are relative to; None: the table's own folder."""
    why: str


def guess_columns(table: Table, given: Mapping[str, Any], root: str | None = None) -> GuessedColumns:
    """Choose the columns that are not ``given``, by key of [data.columns], and the folder of the paths (``root``).

    Raises UserError, which lists all columns, if there is none for the images or the labels.
    """
    rows = [row for _, row in islice(table.read(table.columns), ROWS) if not isinstance(row, BadRow)]
    if not rows:
        raise UserError(f"{table.path} has no rows below the column names")
    values = {name: [row[i] for row in rows] for i, name in enumerate(table.columns)}
    if path := next((name for name in table.columns if _is_image(name)), None):
        raise UserError(f"{table.path} has no column names: its first row holds the image {path}; add a row above it")
    image = given.get("image") or _image_column(table, values)
    rest = {name: found for name, found in values.items() if name not in (image, *map(str, given.values()))}
    columns: dict[str, Any] = {**given, "image": image}
    for key, usual in (("split", SPLITS), ("group", GROUPS), ("weight", WEIGHTS)):
        name = _named(rest, usual)
        if key in given or name is None or (key == "split" and not all(split_of(str(one)) for one in rest[name])):
            continue
        if key != "group" or LEAST_GROUPS <= _distinct(rest[name]) < len(rows):
            columns[key] = name
        del rest[name]
    columns["label"] = label = given.get("label") or _label_columns(table, rest)
    separator = _separator(values.get(label, ())) if isinstance(label, str) else None
    why = "; ".join(f"{key} is {_shown(name)}" for key, name in columns.items())
    if root is None and image in values and image not in table.encoded:
        root = _root(table.path, [str(one) for one in values[image][:20]])
    seen = f"columns by their names and values ({len(rows):,} rows seen): {why}"
    return GuessedColumns(columns, separator, root, seen)


def _shown(name: str | list[str]) -> str:
    return name if isinstance(name, str) else f"{len(name)} columns of 0 and 1"


def _named(values: Iterable[str], usual: Iterable[str]) -> str | None:
    """Return the first column with a usual name, ignoring case."""
    by_name = {name.strip().lower(): name for name in values}
    return next((by_name[name] for name in usual if name in by_name), None)


def _image_column(table: Table, values: dict[str, list[Any]]) -> str:
    found = _named(values, PATH_COLUMNS)
    if found is not None:
        return found
    encoded = [name for name in values if name in table.encoded]
    paths = [name for name, column in values.items() if all(_is_image(one) for one in column)]
    if not encoded and not paths:
        raise UserError(
            f"{table.path} has no column of image paths (ending in .jpg, .png, ...) or images; its columns are "
            f"{', '.join(table.columns[:30])}. If one of them has paths without a suffix: "
            "--set 'data.columns.image=\"NAME\"'"
        )
    return [*encoded, *paths][0]


def _is_image(value: Any) -> bool:
    return isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES)


def _label_columns(table: Table, values: dict[str, list[Any]]) -> str | list[str]:
    """Return the label column, or several columns that contain 1 for their label and 0 otherwise."""
    found = _named(values, LABELS)
    if found is not None:
        return found
    flags = [name for name, column in values.items() if all(str(one).strip().lower() in _INDICATORS for one in column)]
    if len(flags) >= 2:
        return flags
    others = [name for name, column in values.items() if 1 < _distinct(column) <= len(column) // 2]
    if len(others) == 1:
        return others[0]
    raise UserError(
        f"{table.path} has no column with a usual name for labels ({', '.join(LABELS[:4])}, ...); its columns are "
        f"{', '.join(table.columns[:30])}. Name the one with the labels: --set 'data.columns.label=\"NAME\"'"
    )


def _distinct(column: list[Any]) -> int:
    return len({str(one) for one in column})


def _separator(column: Iterable[Any]) -> str | None:
    """Return the separator between several labels in a text, if the same labels occur in different combinations."""
    texts = [one for one in column if isinstance(one, str)]
    for separator in SEPARATORS:
        several = [text for text in texts if separator in text]
        parts = Counter(part.strip() for text in texts for part in text.split(separator) if part.strip())
        if several and len(parts) <= len(set(texts)):
            return separator
    return None


def _root(table: Path, paths: list[str]) -> str | None:
    """Return the folder next to the table in which most paths exist; None if it is the table's own folder."""
    own = table.parent
    candidates = [own, *sorted(child for child in own.iterdir() if child.is_dir()), Path(".")]
    counts = {folder: sum(os.path.exists(folder / path) for path in paths) for folder in candidates}
    best = max(candidates, key=lambda folder: counts[folder])
    if not counts[best]:
        raise UserError(
            f"{table} lists {paths[0]}, which is neither in {own} nor in a folder next to the table: are the images "
            "elsewhere? --set 'data.root=\"FOLDER\"' names their folder"
        )
    return None if best == own else str(best)
