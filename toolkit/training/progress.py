"""Training progress and random states, as saved in checkpoints."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class TrainProgress:
    """Training progress of a run; saved in every checkpoint."""

    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed steps of the current epoch."""
    best: dict[str, Any] | None = None
    """Record in metrics.jsonl of the best epoch by train.best_metric."""
    last: dict[str, Any] | None = None
    """Record of the last completed epoch."""
    stopped_early: bool = False
    metrics_bytes: int = 0
    """Length of metrics.jsonl in bytes."""
    train_seconds: float = 0.0
    """Total time of training steps in seconds, including sessions before a resume."""
    train_images: int = 0
    """Images trained on by all processes, including sessions before a resume."""
    sums: list[list[float]] = field(default_factory=list)
    """Running metrics of each process, see :meth:`toolkit.training.train_step.RunningMetrics.state`."""

    @property
    def epochs_begun(self) -> int:
        """Number of completed epochs, plus one if an epoch is in progress."""
        return self.epoch + (self.step > 0)


def random_state() -> dict[str, Any]:
    """Return the states of this process's random number generators, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the generators from :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
