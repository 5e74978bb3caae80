"""Suggestions for misspelled names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_NAME = 80
"""Names that are longer than this get no suggestion: difflib's time is quadratic in their length."""


def similar_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` known names similar to ``name``, best first, ignoring case."""
    by_folded: dict[str, str] = {}
    for candidate in known:
        by_folded.setdefault(candidate.casefold(), candidate)
    if len(name) > LONGEST_NAME:
        return []
    return [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, count)]


def did_you_mean(name: str, known: Iterable[str], count: int = 1, *, prefix: str = "", otherwise: str = "") -> str:
    """Return ``prefix`` and ``did you mean a or b?``; ``otherwise`` if no known name is similar."""
    similar = similar_names(name, known, count)
    return f"{prefix}did you mean {' or '.join(similar)}?" if similar else otherwise
