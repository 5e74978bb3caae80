"""Write the images, labels and splits of a recipe as a table that ``dataset = "table"`` reads back unchanged."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.encoded_sources import ImageFiles, read_bytes
from toolkit.data.image_sources import EncodedImages, as_image
from toolkit.data.preprocessing import resolve_channels
from toolkit.data.sampling import IntArray
from toolkit.data.splits import SPLITS, split_dataset, split_hash
from toolkit.data.table_files import FORMATS, require_pyarrow
from toolkit.errors import UserError
from toolkit.filenames import decode_name
from toolkit.recipe.schema import DataConfig, Recipe
from toolkit.recipe.toml_writer import toml_document
from toolkit.writing import write_atomically

SEPARATORS = (";", "|", ",", "\t", " / ")
"""Separators of several labels in a CSV or TSV file, in order of preference."""

SOURCE_KEYS = frozenset({
    "dataset", "name", "args", "root", "table", "columns", "class_names", "label_separator", "shuffle_shards",
    "cache_limit", "download", "split", "class_folders", "background_class", "images_per_class",
    "test_images_per_class",
})  # fmt: skip
"""Keys of [data] that select the images; the other keys, which set how images are read, are kept in the new recipe."""

BATCH = 256
"""Number of rows of a Parquet file in memory at once."""

Rows = Iterator[dict[str, Any]]


def write_table(recipe: Recipe, path: Path) -> str:
    """Write the table to ``path`` and return the [data] table of a recipe that reads it, as TOML.

    The rows are the training, validation and test images, each split in its own order. Image files are listed by path;
    other images are stored in the table (Parquet only). The class names are written to <name>.classes.txt next to the
    table, in the order of their indices. Raises UserError if the data set cannot be read, the files cannot be written,
    or reading them back does not give the same images, labels and splits.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"--write-table {path}: the format is unknown; the name must end in {', '.join(FORMATS)}")
    if recipe.data.table is not None and path.resolve() == Path(recipe.data.table).resolve():
        raise UserError(f"--write-table {path}: the recipe reads this table; choose another name")
    data = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")
    dataset = open_dataset(data)
    splits = split_dataset(dataset, data)
    images = dataset.images
    is_encoded = isinstance(images, EncodedImages)
    is_file = isinstance(images, EncodedImages) and isinstance(images.source, ImageFiles)
    if not is_file and kind != "Parquet":
        raise UserError(
            f"--write-table {path}: the images of {dataset.name} are not separate files; choose a name that ends in "
            ".parquet, a format that stores the images in the table"
        )
    separator = _separator(dataset) if dataset.is_multi_label and kind in ("CSV", "TSV") else None
    rows = _rows(dataset, splits, separator, embed=not is_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "Parquet":
            _write_parquet(path, rows)
        else:
            text = _json_lines(rows) if kind == "JSON lines" else _csv(rows, "\t" if kind == "TSV" else ",")
            write_atomically(path, text.encode(errors="surrogateescape"))
        names = path.with_suffix(".classes.txt")
        text = "".join(f"{decode_name(name)}\n" for name in dataset.classes)
        write_atomically(names, text.encode(errors="surrogateescape"))
    except OSError as error:
        raise UserError(f"--write-table {path}: cannot be written: {error.strerror or error}") from None
    settings = {key: value for key, value in data.model_dump(exclude_unset=True).items() if key not in SOURCE_KEYS}
    if data.channels is None and (not is_encoded or dataset.native_channels != 3):
        settings["channels"] = dataset.native_channels
    if data.image_size is None and dataset.native_size is not None and recipe.model.weights == "none":
        settings["image_size"] = dataset.native_size
    columns: dict[str, Any] = {"split": "split", **_optional_columns(dataset)}
    if dataset.kept:
        columns["keep"] = [decode_name(name) for name in dataset.kept]
        if clash := {"image", "label", *columns}.intersection(columns["keep"]):
            raise UserError(
                f"--write-table: data.columns.keep names {min(clash)!r}, which is a column of every table that is "
                "written; rename it in your table"
            )
    found: dict[str, Any] = {"dataset": "table", "table": str(path)}
    if is_file:
        found["root"] = images.source.root  # type: ignore[attr-defined]
    found |= {"columns": columns, "class_names": str(names)}
    if separator is not None:
        found["label_separator"] = separator
    empty = {split: 0 for split in ("validation", "test") if not len(splits[split])}
    found |= {**({"split": empty} if empty else {}), **settings}
    _check(DataConfig.model_validate(found), dataset, splits, path)
    return toml_document({"data": found})


def _optional_columns(dataset: Dataset) -> dict[str, str]:
    given = {"group": dataset.groups, "weight": dataset.weights}
    return {name: name for name, values in given.items() if values is not None}


def _separator(dataset: Dataset) -> str:
    """Return a separator that does not occur in any class name. Raises UserError if there is none."""
    for separator in SEPARATORS:
        if not any(separator in decode_name(name) for name in dataset.classes):
            return separator
    raise UserError("--write-table: class names contain all possible label separators; write .jsonl or .parquet")


def _rows(dataset: Dataset, splits: dict[str, IntArray], separator: str | None, *, embed: bool) -> Rows:
    """Yield each row as a dict of values by column. With ``embed``, an image is a dict of its bytes and its name."""
    classes = np.array([decode_name(name) for name in dataset.classes], dtype=object)
    optional = {name: getattr(dataset, f"{name}s") for name in _optional_columns(dataset)}
    for split in SPLITS:
        for i in splits[split].tolist():
            name = decode_name(dataset.images.name(i))
            label: Any = classes[dataset.labels[i]]
            if dataset.is_multi_label:
                label = classes[dataset.labels[i].astype(bool)].tolist()
                label = label if separator is None else separator.join(label)
            image = {"bytes": _encoded(dataset, i), "path": name} if embed else name
            values = {name: column[i].item() for name, column in optional.items()}
            values |= {decode_name(name): decode_name(column[i]) for name, column in dataset.kept.items()}
            yield {"image": image, "label": label, "split": split, **values}


def _encoded(dataset: Dataset, i: int) -> bytes:
    """Return the stored bytes of image i, or a PNG if the data set is in memory."""
    if isinstance(dataset.images, EncodedImages):
        return read_bytes(dataset.images.source, i)
    file = io.BytesIO()
    as_image(dataset.images.load(i)).save(file, "PNG")
    return file.getvalue()


def _csv(rows: Rows, delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    for number, row in enumerate(rows):
        if number == 0:
            writer.writerow(row)
        writer.writerow(row.values())
    return text.getvalue()


def _json_lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_parquet(path: Path, rows: Rows) -> None:
    pa, parquet = require_pyarrow(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        first = next(rows)
        schema, batch = pa.Table.from_pylist([first]).schema, [first]
        if isinstance(first["label"], list):
            schema = schema.set(schema.get_field_index("label"), pa.field("label", pa.list_(pa.string())))
        with parquet.ParquetWriter(temporary, schema) as writer:
            for row in rows:
                if len(batch) == BATCH:
                    writer.write_table(pa.Table.from_pylist(batch, schema))
                    batch = []
                batch.append(row)
            writer.write_table(pa.Table.from_pylist(batch, schema))
        os.replace(temporary, path)
    except (pa.ArrowException, UnicodeError) as error:
        raise UserError(f"{path}: a Parquet file cannot contain names that are not UTF-8: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _check(config: DataConfig, dataset: Dataset, splits: dict[str, IntArray], path: Path) -> None:
    """Read the table back; raise UserError unless it has the same classes, images, labels and splits."""
    found = open_dataset(config)
    found_splits = split_dataset(found, config)
    expected = np.concatenate([dataset.labels[splits[split]] for split in SPLITS])
    is_same = found.classes == dataset.classes and np.array_equal(found.labels, expected)
    if is_same and split_hash(found, found_splits) == split_hash(dataset, splits):
        return
    raise UserError(
        f"reading {path} back does not give the same classes, images and splits; a possible cause is names with line "
        "breaks or with spaces at the start or end"
    )
