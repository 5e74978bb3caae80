"""Formatting of numbers in messages, tables and pages."""

from __future__ import annotations


def plural(count: int, singular: str, plural: str = "") -> str:
    """Format a count with its noun: ``1 class``, ``2,000 classes``. ``plural`` defaults to the singular plus s."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def duration(seconds: float) -> str:
    """Format a duration: ``5 s``, ``12.3 s``, ``5 min``, ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def batch_split(batch_size: int, processes: int, grad_accum_steps: int) -> str:
    """Format how a batch is split: ``64``, ``64 = 2 processes x 32 images``, ``64 = 2 accumulation steps x 32 images``.

    Factors of 1 are left out.
    """
    factors = [(processes, "processes"), (grad_accum_steps, "accumulation steps")]
    parts = [f"{count} {name}" for count, name in factors if count > 1]
    images = batch_size // processes // grad_accum_steps
    return " x ".join([f"{batch_size} = {parts[0]}", *parts[1:], plural(images, "image")]) if parts else f"{batch_size}"
