"""Numbers in messages, tables and pages."""

from __future__ import annotations


def plural(count: int, singular: str, plural: str = "") -> str:
    """A count with its noun: ``1 class``, ``2,000 classes``. ``plural`` defaults to the singular and an s."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def duration(seconds: float) -> str:
    """A time span: ``12.3 s``, ``5 min``, ``2 h 7 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
