"""Reading table files row by row: CSV, TSV, JSON lines and Parquet.

Rows are numbered as users see them: in CSV and TSV files the header is row 1, as in a spreadsheet; in JSON lines and
Parquet files the first row of values is row 1.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from toolkit.errors import UserError, first_line, missing_package
from toolkit.formatting import plural

FORMATS = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".parquet": "Parquet"}
"""File format by suffix."""

BATCH = 8192
"""Number of rows of a Parquet file that are converted at a time."""


class BadRow(str):
    """Message about a row that could not be split into values, such as one with too few fields."""


RowValues = Sequence[Any] | BadRow


@dataclass(frozen=True)
class Table:
    """An open table file, read row by row."""

    path: Path
    columns: list[str]
    read: Callable[[Sequence[str]], Iterator[tuple[int, RowValues]]]
    """Function that takes column names and yields, for each row, its number and its values in these columns."""
    encoded: frozenset[str] = frozenset()
    """Columns of images, as bytes or as {bytes, path}; for these :attr:`read` yields the path or None, no bytes."""
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    """Class names by column of class indices, if the library `datasets` stored them in the file."""
    describe_row: Callable[[int], str] = "row {}".format
    """Function of a row number that returns the text for this row in messages."""


def open_table_file(path: Path) -> Table:
    """Open a table file, whose suffix determines the format.

    Raises UserError if it cannot be read, has no columns, or has two columns with the same name.
    """
    readers = {"CSV": _open_csv, "TSV": _open_csv, "JSON lines": _open_json_lines, "Parquet": open_parquet}
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"data.table = {str(path)!r}: the format is unknown; the name must end in {', '.join(FORMATS)}")
    if not path.is_file():
        raise UserError(f"data.table = {str(path)!r} is not a file; paths are relative to the working directory")
    try:
        table = readers[kind](path)
    except OSError as error:
        raise UserError(f"data.table = {str(path)!r} cannot be read: {error.strerror or error}") from None
    repeated = sorted({name for name in table.columns if table.columns.count(name) > 1})
    if not table.columns or repeated:
        found = f"has more than one column {repeated[0]!r}" if repeated else "is empty"
        raise UserError(f"{path} {found}; each column needs its own name in the first row")
    return table


def _open_csv(path: Path) -> Table:
    """Open a CSV or TSV file in UTF-8. If the header of a CSV file has no comma, the separator may be a semicolon."""

    def rows() -> Iterator[list[str]]:
        with _open_text(path) as file:
            header = file.readline()
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if "," not in header and ";" in header else ","
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            try:
                yield from reader
            except csv.Error as error:
                raise UserError(f"{path}, line {reader.line_num}: {error}") from None

    columns = [name.strip() for name in next(rows(), [])]

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, RowValues]]:
        places = [columns.index(name) for name in wanted]
        for number, row in enumerate(rows(), 1):
            if number == 1 or not row:
                continue
            if len(row) == len(columns):
                yield number, [row[place] for place in places]
            else:
                yield number, BadRow(f"{plural(len(row), 'field')}, but the header has {len(columns)}")

    return Table(path, columns, read)


def _open_text(path: Path) -> TextIO:
    """Open a UTF-8 file without newline translation. Raises UserError for UTF-16, which some programs write.

    Bytes that are not UTF-8 are decoded to surrogates, as Python does for paths, so that such paths still work.
    """
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path} is text in UTF-16; save it as UTF-8")
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _open_json_lines(path: Path) -> Table:
    """Open a file with one JSON object per line; the first one must have all columns."""

    def objects() -> Iterator[tuple[int, Any]]:
        with _open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except ValueError as error:
                    found = BadRow(f"not JSON ({error})")
                yield number, found if isinstance(found, dict | BadRow) else BadRow("not a JSON object")

    _, first = next(objects(), (0, {}))
    if isinstance(first, BadRow):
        raise UserError(f"the first line of {path} is {first}; JSON lines need one object such as {{...}} per line")

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, RowValues]]:
        for number, found in objects():
            if isinstance(found, BadRow):
                yield number, found
            elif missing := [name for name in wanted if name not in found]:
                yield number, BadRow(f"no {missing[0]!r}")
            else:
                yield number, [found[name] for name in wanted]

    return Table(path, list(first), read)


def require_pyarrow(path: Path | str) -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet. Raises UserError if pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_package(str(path), "pyarrow", "parquet") from None
    return pyarrow, parquet


def open_parquet(path: Path | str, file: BinaryIO | None = None) -> Table:
    """Open a Parquet file with pyarrow. ``file``: open file to read instead of ``path``, which is shown in messages."""
    pa, parquet = require_pyarrow(path)
    source = path if file is None else file

    def is_encoded(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return "bytes" in {field.name for field in kind}
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))

    with _parquet_errors(path):
        schema = parquet.read_schema(source)
    encoded = frozenset(field.name for field in schema if is_encoded(field.type))
    with_path = {n for n in encoded if pa.types.is_struct(schema.field(n).type) and "path" in _fields(schema.field(n))}

    def values(batch: Any, name: str) -> list[Any]:
        if name in with_path:
            return list(batch.column(name).field("path").to_pylist())
        return [None] * len(batch) if name in encoded else list(batch.column(name).to_pylist())

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, RowValues]]:
        stored = [f"{name}.path" if name in with_path else name for name in wanted if name not in encoded - with_path]
        number = 0
        with _parquet_errors(path), parquet.ParquetFile(source) as opened:
            for batch in opened.iter_batches(BATCH, columns=stored):
                for row in zip(*(values(batch, name) for name in wanted), strict=True):
                    number += 1
                    yield number, row

    return Table(Path(path), list(schema.names), read, encoded, _class_names(schema.metadata or {}))


def read_encoded(source: Path | BinaryIO, column: str, name: str = "") -> Iterator[list[bytes | None]]:
    """Yield the images in a column of :attr:`Table.encoded` as lists, one per batch of rows. Raises UserError.

    ``name``: file name for messages, required if ``source`` is not a path.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with _parquet_errors(name or source), parquet.ParquetFile(source) as file:
        is_struct = pa.types.is_struct(file.schema_arrow.field(column).type)
        for batch in file.iter_batches(64, columns=[f"{column}.bytes" if is_struct else column]):
            values = batch.column(column)
            yield (values.field("bytes") if is_struct else values).to_pylist()


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the class names by column from the metadata that the library `datasets` writes; {} if there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        inner = {column: feature.get("feature", feature) for column, feature in features.items()}
        return {column: feature["names"] for column, feature in inner.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # no such metadata, or in another format
        return {}


def _fields(field: Any) -> set[str]:
    return {inner.name for inner in field.type}


@contextlib.contextmanager
def _parquet_errors(name: object) -> Iterator[None]:
    """Convert pyarrow's exceptions to UserError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a Parquet file, or is damaged or truncated: {first_line(error)}") from error
