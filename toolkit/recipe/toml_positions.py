"""Positions of all keys and values in TOML text, so that error messages can point at them.

tomli returns values without positions. The scanner here only finds positions: it relies on tomli having
accepted the text, and therefore neither checks the grammar nor computes values.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import tomli

KeyPath = tuple[str | int, ...]
"""Path to a value: the keys from the document root, and indices of array elements."""


class Span(NamedTuple):
    """Offsets of an entry's key and value from the start of the text, in characters."""

    key: int
    value: int


_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
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


def scan(text: str) -> dict[KeyPath, Span]:
    r"""Return the positions of all keys, tables and array elements of a TOML text that tomli has accepted.

    Lines must end in ``\n``. A table's position is that of its header (the last one, if several define parts of it);
    an array element has no key, so its key and value have the same position.
    """
    scanner = _Scanner(text)
    scanner.document()
    return scanner.spans


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.spans: dict[KeyPath, Span] = {}
        self.lengths: dict[KeyPath, int] = {}  # number of elements of each array of tables so far

    def document(self) -> None:
        table: KeyPath = ()
        self.skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.pair(table)
            self.skip(_BLANK)

    def header(self) -> KeyPath:
        """Scan ``[a.b]`` or ``[[a.b]]``; return the path that the following keys belong to."""
        start = self.at
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        parts = self.key()
        self.at += brackets
        path = self.enter((), parts, start)
        if brackets == 1:
            return path
        index = self.lengths.get(path, 0)
        self.lengths[path] = index + 1
        self.spans[(*path, index)] = Span(parts[-1][1], start)
        return (*path, index)

    def pair(self, table: KeyPath) -> None:
        """Scan ``key = value``."""
        parts = self.key()
        self.at += 1  # the equals sign
        self.skip(_BLANK)
        self.value(self.enter(table, parts, self.at))

    def enter(self, path: KeyPath, parts: list[tuple[str, int]], value: int) -> KeyPath:
        """Record the positions of a dotted key's parts; return the full path of the last part, with array indices."""
        for name, at in parts[:-1]:
            path = (*path, name)
            self.spans.setdefault(path, Span(at, value))
            if path in self.lengths:
                path = (*path, self.lengths[path] - 1)
        name, at = parts[-1]
        self.spans[(*path, name)] = Span(at, value)
        return (*path, name)

    def key(self) -> list[tuple[str, int]]:
        """Scan a dotted key and the space around it; return name and position of each part."""
        self.skip(_BLANK)
        parts = [self.key_part()]
        while self.skip(_DOT):
            parts.append(self.key_part())
        self.skip(_BLANK)
        return parts

    def key_part(self) -> tuple[str, int]:
        at = self.at
        bare = self.skip(_BARE_KEY)
        if bare:
            return bare, at
        quoted = self.skip(_STRING)
        return (quoted[1:-1] if "\\" not in quoted else str(tomli.loads(f"key = {quoted}")["key"])), at

    def value(self, path: KeyPath) -> None:
        """Scan a value; record the positions of the elements or keys in it."""
        first, index = self.text[self.at], 0
        if first == "[":
            while self.next_item("]"):
                self.spans[(*path, index)] = Span(self.at, self.at)
                self.value((*path, index))
                index += 1
        elif first == "{":
            while self.next_item("}"):
                self.pair(path)
        else:
            self.skip(_STRING if first in "\"'" else _SCALAR)

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
