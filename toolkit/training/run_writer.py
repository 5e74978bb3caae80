"""What a run writes while it goes on: lines of metrics.jsonl, weights of the best epoch, checkpoints.

A checkpoint tells the length of metrics.jsonl and the best epoch, so it is written after them. What a full disk refuses
is kept in memory and tried again with the next checkpoint; no checkpoint is written before it.
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
    """Writes for the main process of a run; on others (``run`` None) and in a dry run it does nothing."""

    def __init__(self, run: Run | None, keep: int) -> None:
        self.run, self.keep = run, keep
        self.length = 0
        """Bytes of metrics.jsonl."""
        self.digest = hashlib.sha256()
        """Of these bytes."""
        self.lines = b""
        """Not yet in metrics.jsonl."""
        self.best: tuple[int, dict[str, Tensor]] | None = None
        """Epoch and weights not yet on disk."""
        self.best_weights: dict[str, Any] | None = None
        """Size and checksum of the best weights on disk, see :func:`toolkit.training.checkpoint.save_best`."""

    def begin(self, length: int, log: Callable[[str], None]) -> None:
        """Cut metrics.jsonl back to the ``length`` that a checkpoint knew of; 0 for a run that starts."""
        if self.run is None:
            return
        there = self.run.metrics_file.read_bytes()[:length] if self.run.metrics_file.exists() else b""
        if len(there) < length:
            said = f"{len(there)} of the {length} bytes that the checkpoint knew"
            log(f"warning: metrics.jsonl has {said}; lines are missing")
            there = there[: there.rfind(b"\n") + 1]  # what follows must not be joined to half a line
        self.length = self.run.write_metrics(len(there), b"")
        self.digest = hashlib.sha256(there)

    def add_line(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl, now or as soon as the disk takes it."""
        if self.run is None:
            return
        self.lines += (json.dumps(record) + "\n").encode()
        with contextlib.suppress(OSError):
            self._write_lines()

    def stage_best_weights(self, epoch: int, state: dict[str, Tensor]) -> None:
        """Hold a copy of the best epoch's weights for the next :meth:`flush`."""
        if self.run is not None:
            self.best = (epoch, {name: tensor.detach().cpu().clone() for name, tensor in state.items()})

    def flush(self) -> None:
        """Write all that is held. Raises OSError (disk full, ...) and then holds it still."""
        if self.run is None:
            return
        self._write_lines()
        self.run.sync_metrics()
        if self.best is not None:
            self.best_weights = save_best(self.run.checkpoints, *self.best)
            self.best = None

    def save(self, place: CheckpointStep, content: dict[str, Any]) -> None:
        """Write a checkpoint, after a :meth:`flush`. Raises OSError with the one before it still whole."""
        if self.run is not None:
            save_checkpoint(self.run.checkpoints, place, content, self.keep)

    def refuse(self, place: CheckpointStep, reason: str) -> None:
        """Mark the checkpoint at ``place``, if there is one, as not to be used."""
        if self.run is not None:
            with contextlib.suppress(OSError):
                refuse_checkpoint(self.run.checkpoints, place, reason)

    def latest(self) -> CheckpointStep | None:
        """The place of the newest checkpoint that can be used, None where there is none."""
        path = None if self.run is None else find_latest(self.run.checkpoints, lambda _: None)
        return None if path is None else checkpoint_step(path)

    def best_fault(self, epoch: int) -> str:
        """What is wrong with the best weights on disk; "" if nothing."""
        return "" if self.run is None else best_fault(self.run.checkpoints, epoch, self.best_weights)

    def _write_lines(self) -> None:
        if self.lines and self.run is not None:
            self.length = self.run.write_metrics(self.length, self.lines)
            self.digest.update(self.lines)
            self.lines = b""
