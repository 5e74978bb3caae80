"""Positions of all keys and values in TOML text, so that error messages can point at them.

tomli returns values without positions. The scanner here only finds positions: it relies on tomli having
accepted the text, and therefore neither checks the grammar nor computes values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import tomli

KeyPath = tuple[str | int, ...]
"""Keys from the document root; array elements by index."""


@dataclass(frozen=True)
class SourcePosition:
    """A position in a text; both numbers are counted from 1, columns in characters."""

    line: int
    column: int


@dataclass(frozen=True)
class SourceSpan:
    """Start positions of an entry's key and value."""

    key: SourcePosition
    value: SourcePosition


_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'  # up to two quotes may precede the closing three
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")
_DOT = re.compile(r"[ \t]*\.[ \t]*")


def scan(text: str) -> dict[KeyPath, SourceSpan]:
    """Return the positions of all keys, tables and array elements of a TOML text that tomli has accepted.

    A table's position is that of its header (the last one, if several define parts of it); an array element has no
    key, so its key and value have the same position.
    """
    return _Scanner(text.replace("\r\n", "\n")).document()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.spans: dict[KeyPath, SourceSpan] = {}
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.lengths: dict[KeyPath, int] = {}  # of the arrays of tables seen so far
        self.line = 0

    def document(self) -> dict[KeyPath, SourceSpan]:
        prefix: KeyPath = ()
        self.skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                prefix = self.header()
            else:
                self.pair(prefix)
            self.skip(_BLANK)
        return self.spans

    def header(self) -> KeyPath:
        """Scan ``[a.b]`` or ``[[a.b]]``; return the path that the following keys belong to."""
        start = self.position()
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        self.skip(_SPACE)
        parts = self.key()
        self.skip(_SPACE)
        self.at += 2 if is_array else 1
        path = self.enter((), parts, start)
        if not is_array:
            return path
        index = self.lengths.get(path, 0)
        self.lengths[path] = index + 1
        self.spans[(*path, index)] = SourceSpan(parts[-1][1], start)
        return (*path, index)

    def pair(self, prefix: KeyPath) -> None:
        parts = self.key()
        self.skip(_SPACE)
        self.at += 1  # the equals sign
        self.skip(_SPACE)
        self.value(self.enter(prefix, parts, self.position()))

    def enter(self, prefix: KeyPath, parts: list[tuple[str, SourcePosition]], value: SourcePosition) -> KeyPath:
        """Record the positions of a key's parts; return the full path of the last, within the last array elements."""
        path = prefix
        for number, (name, place) in enumerate(parts):
            path = (*path, name)
            is_last = number == len(parts) - 1
            if is_last:
                self.spans[path] = SourceSpan(place, value)
            else:
                self.spans.setdefault(path, SourceSpan(place, value))
                if path in self.lengths:
                    path = (*path, self.lengths[path] - 1)
        return path

    def key(self) -> list[tuple[str, SourcePosition]]:
        """Scan a dotted key: name and position of each part."""
        parts = [self.key_part()]
        while self.skip(_DOT):
            parts.append(self.key_part())
        return parts

    def key_part(self) -> tuple[str, SourcePosition]:
        place = self.position()
        bare = self.skip(_BARE_KEY)
        if bare:
            return bare, place
        quoted = self.skip(_STRING)
        return (quoted[1:-1] if "\\" not in quoted else str(tomli.loads(f"key = {quoted}")["key"])), place

    def value(self, path: KeyPath) -> None:
        first = self.text[self.at]
        if first == "[":
            self.array(path)
        elif first == "{":
            self.inline_table(path)
        elif first in "\"'":
            self.skip(_STRING)
        else:
            self.skip(_SCALAR)

    def array(self, path: KeyPath) -> None:
        index = 0
        while self.next_item("]"):
            place = self.position()
            self.spans[(*path, index)] = SourceSpan(place, place)
            self.value((*path, index))
            index += 1

    def inline_table(self, path: KeyPath) -> None:
        while self.next_item("}"):
            self.pair(path)

    def next_item(self, closing: str) -> bool:
        """Skip the opening bracket or a comma; return whether an item follows. If not, skip the closing bracket too."""
        self.skip(_BLANK)
        if self.text[self.at] != closing:
            self.at += 1
            self.skip(_BLANK)
        if self.text[self.at] != closing:
            return True
        self.at += 1
        return False

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Skip the text that the pattern matches here and return it."""
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match.group()

    def position(self) -> SourcePosition:
        """Return the current position. Positions only increase, so the search starts from the last line found."""
        while self.line + 1 < len(self.line_starts) and self.line_starts[self.line + 1] <= self.at:
            self.line += 1
        return SourcePosition(self.line + 1, self.at - self.line_starts[self.line] + 1)
