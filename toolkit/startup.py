"""What every entry point of the program does first."""

from __future__ import annotations

import gc

from toolkit.terminal import escape_unknown_characters, open_closed_streams

COLLECT_AFTER = 50_000
"""New objects between two garbage collections. With Python's default of 700, collections take about 14 % of the CPU
time in which torch, torchvision and timm are imported."""


def prepare_process() -> None:
    """Set up garbage collection and the standard streams; call before anything else."""
    gc.set_threshold(COLLECT_AFTER)
    open_closed_streams()
    escape_unknown_characters()
