"""Where a run stands: what a checkpoint holds besides tensors."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class TrainProgress:
    """Where a run stands; saved in every checkpoint."""

    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed steps of the epoch under way."""
    best: dict[str, Any] | None = None
    """metrics.jsonl's record of the best epoch by train.best_metric."""
    last: dict[str, Any] | None = None
    """The record of the last epoch."""
    stopped_early: bool = False
    metrics_bytes: int = 0
    """Length of metrics.jsonl."""
    train_seconds: float = 0.0
    """Spent in training steps, over all sittings."""
    train_images: int = 0
    """Images trained on, over all processes and sittings."""
    sums: list[list[float]] = field(default_factory=list)
    """Each process's counts in the current epoch, see :meth:`toolkit.training.train_step.RunningMetrics.state`."""

    @property
    def epochs_begun(self) -> int:
        """Completed epochs and the one under way, if any."""
        return self.epoch + (self.step > 0)


def random_state() -> dict[str, Any]:
    """All of this process's generators, as plain values that need no pickle."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
