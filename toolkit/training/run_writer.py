"""Writer of a run's metrics.jsonl, best weights and checkpoints during training.

A checkpoint records the length of metrics.jsonl and the best epoch, so it is written after them. Data that cannot be
written (disk full) is kept in memory until the next checkpoint; no checkpoint is written before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from toolkit.runs import Run
from toolkit.training.checkpoint import (
    CheckpointStep,
    best_fault,
    checkpoint_step,
    find_latest,
    refuse_checkpoint,
    save_best,
    save_checkpoint,
)


class RunWriter:
    """Writer of a run's files; does nothing on processes other than the main one and in a dry run (``run`` None)."""

    def __init__(self, run: Run | None, keep: int) -> None:
        self.run, self.keep = run, keep
        self.length = 0
        """Length of metrics.jsonl in bytes."""
        self.digest = hashlib.sha256()
        """SHA-256 of the first ``length`` bytes of metrics.jsonl."""
        self.lines = b""
        """Lines that have not been written to metrics.jsonl yet."""
        self.best: tuple[int, dict[str, Tensor]] | None = None
        """Best epoch and its weights, if they have not been written yet."""
        self.best_weights: dict[str, Any] | None = None
        """Size and SHA-256 of the best weights on disk, see :func:`toolkit.training.checkpoint.save_best`."""

    def begin(self, length: int, log: Callable[[str], None]) -> None:
        """Truncate metrics.jsonl to the ``length`` in bytes recorded by the checkpoint; 0 for a new run."""
        if self.run is None:
            return
        there = self.run.metrics_file.read_bytes()[:length] if self.run.metrics_file.exists() else b""
        if len(there) < length:
            left = f"{len(there)} of the {length} bytes that the checkpoint recorded"
            log(f"warning: metrics.jsonl has {left}; lines are missing")
            there = there[: there.rfind(b"\n") + 1]  # the next line must not be joined to a partial one
        self.length = self.run.write_metrics(len(there), b"")
        self.digest = hashlib.sha256(there)

    def add_line(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, or keep it in memory until it can be written."""
        if self.run is None:
            return
        self.lines += (json.dumps(record) + "\n").encode()
        with contextlib.suppress(OSError):
            self._write_lines()

    def add_speed(self, epoch: int, images_per_s: float) -> None:
        """Append an epoch's speed to throughput.csv, which a resumed run may write twice; lost if the disk is full.

        Not in metrics.jsonl, which is the same for equal runs.
        """
        if self.run is not None:
            with contextlib.suppress(OSError), open(self.run.throughput_file, "a", encoding="utf-8") as file:
                file.write(f"{epoch},{images_per_s:.2f}\n")

    def stage_best_weights(self, epoch: int, state: dict[str, Tensor]) -> None:
        """Keep a copy of the best epoch's weights for the next :meth:`flush`."""
        if self.run is not None:
            self.best = (epoch, {name: tensor.detach().cpu().clone() for name, tensor in state.items()})

    def flush(self) -> None:
        """Write all data kept in memory. Raises OSError (e.g. disk full), after which it is still kept."""
        if self.run is None:
            return
        self._write_lines()
        self.run.sync_metrics()
        if self.best is not None:
            self.best_weights = save_best(self.run.checkpoints, *self.best)
            self.best = None

    def save(self, position: CheckpointStep, content: dict[str, Any]) -> None:
        """Write a checkpoint; call :meth:`flush` first. Raises OSError, which leaves the previous one intact."""
        if self.run is not None:
            save_checkpoint(self.run.checkpoints, position, content, self.keep)

    def refuse(self, position: CheckpointStep, reason: str) -> None:
        """Mark the checkpoint at ``position``, if there is one, as unusable."""
        if self.run is not None:
            with contextlib.suppress(OSError):
                refuse_checkpoint(self.run.checkpoints, position, reason)

    def latest(self) -> CheckpointStep | None:
        """Return the epochs and steps of the newest usable checkpoint, None if there is none."""
        path = None if self.run is None else find_latest(self.run.checkpoints, lambda _: None)
        return None if path is None else checkpoint_step(path)

    def best_fault(self, epoch: int) -> str:
        """Return what is wrong with the best weights on disk, "" if nothing."""
        return "" if self.run is None else best_fault(self.run.checkpoints, epoch, self.best_weights)

    def _write_lines(self) -> None:
        if self.lines and self.run is not None:
            self.length = self.run.write_metrics(self.length, self.lines)
            self.digest.update(self.lines)
            self.lines = b""
