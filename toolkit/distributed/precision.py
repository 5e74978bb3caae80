"""Mixed precision: resolve a recipe's train.precision for the available hardware."""

from __future__ import annotations

import os

import torch

from toolkit.errors import UserError


def on_gpu() -> bool:
    """Return whether this process trains on a GPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1")


def resolve_precision(wanted: str) -> str:
    """Resolve "auto" to "bf16" on a GPU with hardware bf16, otherwise to "no". Raises UserError if unsupported.

    On a CPU "auto" is always "no", even if it has bf16 units: some models train twice as fast in bf16 there, others at
    half the speed (benchmarks/README.md), and a recipe's results should not depend on a speed measurement.
    """
    gpu = on_gpu()
    if wanted == "auto":
        return "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if wanted == "fp16" and not gpu:
        raise UserError("train.precision = 'fp16' needs a GPU, and none is used here: use 'no', 'bf16' or 'auto'")
    if wanted == "bf16" and gpu and not torch.cuda.is_bf16_supported():
        raise UserError("train.precision = 'bf16': this GPU does not support bf16: use 'fp16', 'no' or 'auto'")
    return wanted


def precision_line(wanted: str, precision: str) -> str:
    """Return a log line with the precision and the reason for it."""
    if wanted != "auto":
        return f"precision {precision}, set in the recipe"
    if precision == "bf16":
        return "precision bf16 (auto): the GPU supports it"
    if not on_gpu():
        return "precision no (auto): on a CPU bf16 is faster for some models, slower for others (see toolkit bench)"
    major, minor = torch.cuda.get_device_capability()
    return f"precision no (auto): a GPU of compute capability {major}.{minor} has no bf16 units (from 8.0 on)"
