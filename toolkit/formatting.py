"""Numbers in messages, tables and pages."""

from __future__ import annotations


def plural(count: int, singular: str, plural: str = "") -> str:
    """A count with its noun: ``1 class``, ``2,000 classes``. ``plural`` defaults to the singular and an s."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"
