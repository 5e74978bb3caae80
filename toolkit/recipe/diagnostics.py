"""Recipe errors and warnings with location and hint, formatted like compiler messages."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from toolkit.errors import UserError
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_key

SHOWN = 30
"""Maximum number of errors listed in a message."""

SOURCE_WIDTH = 110
"""Maximum length of a source line in messages, in characters; longer lines are cut to the part around the error."""


@dataclass(frozen=True)
class Location:
    """A location in a recipe file or in a ``--set`` argument."""

    file: str
    """Path as given by the user, or ``--set``."""
    line: int
    """Line number, counted from 1."""
    column: int
    """Column number, counted from 1, in characters."""
    source_line: str

    def __str__(self) -> str:
        return f"{self.file}:{self.column}" if self.file == "--set" else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Issue:
    """One error or warning about a recipe's values, before it is mapped to a location in a file."""

    message: str
    path: KeyPath
    related: tuple[KeyPath, ...] = ()
    """Other keys that the issue depends on."""
    hint: str | None = None
    severity: Literal["error", "warning"] = "error"
    at: Literal["value", "key", "table"] = "value"
    """Part of the recipe that the message points to: the value, its key, or the enclosing table (for missing keys)."""


@dataclass(frozen=True)
class Diagnostic:
    """An error or warning with its location, ready to be shown."""

    severity: Literal["error", "warning"]
    message: str
    path: KeyPath = ()
    location: Location | None = None
    hint: str | None = None
    note: str | None = None
    file: str | None = None
    """File with the error, if the location in the file is unknown."""

    def __str__(self) -> str:
        location = self.location or self.file
        lines = [f"{location}: {self.severity}: {self.message}" if location else f"{self.severity}: {self.message}"]
        if self.location:
            lines += _excerpt(self.location)
        lines += [f"  {kind}: {text}" for kind, text in (("hint", self.hint), ("note", self.note)) if text]
        return "\n".join(printable(line) for line in lines)


class RecipeError(UserError):
    """An invalid recipe, with all its errors and warnings."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__(diagnostics)
        self.diagnostics = list(diagnostics)

    def __str__(self) -> str:
        errors = sum(item.severity == "error" for item in self.diagnostics)
        shown = [str(item) for item in self.diagnostics[:SHOWN]]
        if len(self.diagnostics) > SHOWN:
            shown.append(f"... and {len(self.diagnostics) - SHOWN} more")
        return "\n".join([*shown, f"{errors} error{'s' if errors != 1 else ''} in the recipe"])


def error(
    key: str | KeyPath,
    text: str,
    *related: str | KeyPath,
    hint: str | None = None,
    at: Literal["value", "key", "table"] = "value",
) -> Issue:
    """Return an error about a key: ``train.batch_size: TEXT``. Keys are paths or dotted names without list indices."""
    path = _path(key)
    return Issue(f"{dotted(path)}: {text}", path, tuple(map(_path, related)), hint or None, at=at)


def warning(
    key: str | KeyPath,
    text: str,
    *related: str | KeyPath,
    hint: str | None = None,
    at: Literal["value", "key", "table"] = "value",
) -> Issue:
    """Return a warning about a key, with arguments as for :func:`error`."""
    return replace(error(key, text, *related, hint=hint, at=at), severity="warning")


def _path(key: str | KeyPath) -> KeyPath:
    return tuple(key.split(".")) if isinstance(key, str) else key


def dotted(path: KeyPath) -> str:
    """Format a key path: ``augment.train[0].name``; parts are quoted if necessary."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{toml_key(part)}" if text else toml_key(part)
    return text


def printable(text: str) -> str:
    """Replace control characters, which a malicious recipe could send to the terminal; tabs are kept."""
    return "".join(
        char
        if char == "\t" or unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp", "Cs")
        else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def _excerpt(location: Location) -> list[str]:
    """Return the source line and a caret under the error; a long line is cut to the part around it."""
    text, column = location.source_line, location.column - 1
    start = max(0, column - SOURCE_WIDTH // 2) if len(text) > SOURCE_WIDTH else 0
    shown = text[start : start + SOURCE_WIDTH]
    left, right = "..." if start else "", "..." if start + SOURCE_WIDTH < len(text) else ""
    number = "" if location.file == "--set" else str(location.line)
    margin = " " * len(number)
    before = left + "".join(_blank(char) for char in text[start:column])
    padding = before.replace("...", "   ", 1) if left else before
    return [f"  {number} | {left}{shown}{right}", f"  {margin} | {padding}^"]


def _blank(char: str) -> str:
    """Return spaces of the character's width on a terminal."""
    if char == "\t":
        return "\t"
    if unicodedata.combining(char):
        return ""
    return "  " if unicodedata.east_asian_width(char) in "WF" else " "
