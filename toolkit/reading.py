"""Reading files that may be missing, damaged or edited by hand: whatever is wrong becomes one UserError.

Every file of a run or study directory is read here. A folder, a named pipe or a device in a file's place is refused
before it is opened for reading, so that nothing waits for it.
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
"""Lists and objects within one another in a JSON file; this project writes 6."""
LARGEST = 2**63 - 1
"""Larger whole numbers are damage: nothing that this project writes comes near, and arrays cannot hold them."""


EXPECTED = {
    "missing": "is missing",
    "model_type": "is no JSON object",
    "dict_type": "is no JSON object",
    "list_type": "is no list",
    "string_type": "is no text",
    "int_type": "is no whole number",
    "float_type": "is no number",
    "bool_type": "is neither true nor false",
}
"""pydantic's names of faults, in words."""


class MissingFile(UserError):
    """There is no such file."""


class DamagedFile(UserError):
    """The file is there, and it cannot be read or does not hold what it should."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path} is damaged: {reason}")


class Shape(BaseModel):
    """What the keys of a JSON object must hold. Keys that a shape does not name may hold anything."""

    model_config = ConfigDict(strict=True, extra="allow")


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises MissingFile or another UserError."""
    require_file(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MissingFile(f"{path} is missing: the run has not come that far, or the file was removed") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def require_file(path: Path) -> None:
    """Raise MissingFile where there is no file, and another UserError where something else has its name."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise MissingFile(f"{path} is missing: the run has not come that far, or the file was removed") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null character in the path
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None
    if not stat.S_ISREG(mode):
        raise DamagedFile(path, "a folder has its name" if stat.S_ISDIR(mode) else "it is not a regular file")


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. Raises UserError."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(path, f"it is not UTF-8 text ({error.reason} at byte {error.start:,})") from None


def read_json(path: Path, shape: type[Shape] | None = None) -> dict[str, Any]:
    """A JSON object whose values are what ``shape`` says. Raises UserError."""
    text = read_text(path)
    try:
        return _checked(_parsed(text), shape)
    except ValueError as error:
        raise DamagedFile(path, error) from None


def check_shape(path: Path, value: dict[str, Any], shape: type[Shape]) -> dict[str, Any]:
    """The value that was read from ``path``, if it is what ``shape`` says. Raises UserError where it is not."""
    try:
        return _checked(value, shape)
    except ValueError as error:
        raise DamagedFile(path, error) from None


def read_json_lines(path: Path, shape: type[Shape] | None = None) -> Iterator[dict[str, Any] | ValueError]:
    """The JSON object of each line, or what is wrong with the line. Raises UserError for the file as a whole.

    A last line without its line break, as a killed process leaves it, is left out where it is damaged.
    """
    *lines, rest = read_bytes(path).split(b"\n")
    for line in [*lines, *([rest] if rest else [])]:
        try:
            yield _checked(_parsed(line.decode()), shape)
        except ValueError as error:
            if line is not rest:
                yield error


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that has these columns and no others. Raises UserError."""
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
        raise DamagedFile(path, error) from None
    return found


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, whatever is wrong with it."""
    try:
        value = json.loads(text, parse_int=_whole)
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


def _whole(digits: str) -> int:
    number = int(digits) if len(digits) < 20 else LARGEST + 1
    if abs(number) > LARGEST:
        raise ValueError(f"{digits[:12]}... is not a possible number")
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
