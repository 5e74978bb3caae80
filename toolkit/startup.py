"""Process setup that every entry point of the program runs first."""

from __future__ import annotations

import gc

from toolkit.terminal import escape_unknown_characters, open_closed_streams

COLLECT_AFTER = 50_000
"""Number of new objects between two garbage collections. With Python's default of 700, garbage collection takes about
14 % of the CPU time of importing torch, torchvision and timm."""


def prepare_process() -> None:
    """Set up garbage collection and the standard streams; call before anything else."""
    gc.set_threshold(COLLECT_AFTER)
    open_closed_streams()
    escape_unknown_characters()
