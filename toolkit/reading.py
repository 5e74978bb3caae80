"""Read files that may be missing, damaged or edited by hand; any problem raises UnreadableFile.

Every file of a run or study directory is read here. A folder, named pipe or device in place of a file is rejected
before it is opened, so that reading cannot block.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from toolkit.errors import UserError

MAX_NESTING = 20
"""Maximum nesting of lists and objects in a JSON file; this project writes at most 6 levels."""
LARGEST = 2**63 - 1
"""Larger integers are treated as damage: this project never writes them, and arrays cannot hold them."""


MISSING = "is missing"
"""Argument ``state`` of :class:`UnreadableFile` for a file that does not exist."""

EXPECTED = {
    "missing": "is missing",
    "model_type": "is not a JSON object",
    "dict_type": "is not a JSON object",
    "list_type": "is not a list",
    "string_type": "is not a string",
    "int_type": "is not an integer",
    "float_type": "is not a number",
    "bool_type": "is neither true nor false",
}
"""Messages for pydantic's error types."""


class UnreadableFile(UserError):
    """Raised for a file that does not exist, cannot be read or does not have the expected content."""

    def __init__(self, path: Path, reason: object, state: str = "is damaged") -> None:
        super().__init__(f"{path} {state}: {reason}")
        self.is_missing = state == MISSING


class Shape(BaseModel):
    """Base class of schemas of JSON objects. Keys that a schema does not name may have any value."""

    model_config = ConfigDict(strict=True, extra="allow")


def read_bytes(path: Path) -> bytes:
    """Read a regular file. Raises UnreadableFile."""
    require_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _system_error(path, error) from None


def require_file(path: Path) -> None:
    """Raise UnreadableFile if the file does not exist or is not a regular file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _system_error(path, error) from None
    except ValueError as error:  # a null character in the path
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None
    if not stat.S_ISREG(mode):
        raise UnreadableFile(path, "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")


def _system_error(path: Path, error: OSError) -> UnreadableFile:
    if isinstance(error, FileNotFoundError):
        return UnreadableFile(path, "the run has not reached that point, or the file was removed", MISSING)
    return UnreadableFile(path, error.strerror, "cannot be read")


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises UserError."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UnreadableFile(path, f"it is not UTF-8 text ({error.reason} at byte {error.start:,})") from None


def read_json(path: Path, shape: type[Shape] | None = None) -> dict[str, Any]:
    """Read a JSON object that conforms to ``shape``. Raises UserError."""
    text = read_text(path)
    try:
        return _checked(_parsed(text), shape)
    except ValueError as error:
        raise UnreadableFile(path, error) from None


def check_shape(path: Path, value: dict[str, Any], shape: type[Shape]) -> dict[str, Any]:
    """Return the value read from ``path``. Raises UserError if it does not conform to ``shape``."""
    try:
        return _checked(value, shape)
    except ValueError as error:
        raise UnreadableFile(path, error) from None


def read_json_lines(path: Path, shape: type[Shape] | None = None) -> Iterator[dict[str, Any] | ValueError]:
    """Yield the JSON object of each line, or the error found in it. Raises UserError for the file as a whole.

    A damaged last line without a line break, as left by a killed process, is skipped.
    """
    *lines, rest = read_bytes(path).split(b"\n")
    for line in [*lines, *([rest] if rest else [])]:
        try:
            yield _checked(_parsed(line.decode()), shape)
        except ValueError as error:
            if line is not rest:
                yield error


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read a CSV file that has exactly these columns. Raises UserError."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    found = []
    try:
        if (header := next(rows, [])) != list(columns):
            raise ValueError(f"its first line should be {','.join(columns)}")
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"line {rows.line_num} has {len(row)} cells instead of {len(columns)}")
            found.append(dict(zip(header, row, strict=True)))
    except (ValueError, csv.Error) as error:
        raise UnreadableFile(path, error) from None
    return found


def _parsed(text: str) -> Any:
    """Parse JSON. Raises ValueError if the text is invalid, nested too deeply or has an integer out of range."""
    try:
        value = json.loads(text, parse_int=_parse_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _parse_integer(digits: str) -> int:
    number = int(digits) if len(digits) < 20 else LARGEST + 1
    if abs(number) > LARGEST:
        raise ValueError(f"{digits[:12]}... is out of range")
    return number


def _checked(value: Any, shape: type[Shape] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if shape is not None:
        try:
            shape.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"] if part not in ("int", "float"))
            raise ValueError(f"{where} {EXPECTED.get(first['type']) or 'is wrong: ' + first['msg']}") from None
    return value
