"""Evaluation that counts every example exactly once, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.training.task import EvalResult


class Outcomes(Protocol):
    """Values to compute for each example from logits and labels: those of a task, or others."""

    @property
    def width(self) -> int:
        """Number of columns of :meth:`outcomes`."""
        ...

    def outcomes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the rows of a batch, float32 [n, width]."""
        ...


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    batches: Iterable[tuple[np.ndarray, Tensor, Tensor]],
    labels: np.ndarray,
    task: Outcomes,
    device: torch.device,
    *,
    autocast_dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> EvalResult:
    """Evaluate this process's share of a split and gather the results of all processes (a collective).

    ``batches``: (positions in the split, inputs, labels) of this process only. Every position must occur on exactly one
    process, which is checked. The module is called without DDP, so the processes may have different numbers of batches.
    """
    module.eval()
    forward = _ChunkedForward(module, device, autocast_dtype)
    all_positions: list[np.ndarray] = []
    found: list[Tensor] = []  # kept on the device until the end, to avoid synchronization
    for positions, inputs, targets in batches:
        logits = forward(to_device(inputs, device, channels_last))
        found.append(task.outcomes(logits.float(), targets.to(device, non_blocking=True)))
        all_positions.append(positions)
    # Each process fills its own rows, which are then summed; the last column counts.
    table = torch.zeros(len(labels), task.width + 1)
    if found:
        rows = F.pad(torch.cat(found).cpu(), (0, 1), value=1.0)
        table.index_add_(0, torch.from_numpy(np.concatenate(all_positions)), rows)
    if dist.is_initialized() and dist.get_world_size() > 1:
        shared = table.to(device) if dist.get_backend() == "nccl" else table
        dist.all_reduce(shared)
        table = shared.cpu()
    outcomes = table.numpy()
    if not (outcomes[:, -1] == 1).all():
        wrong = int((outcomes[:, -1] != 1).sum())
        raise AssertionError(f"{wrong} of {len(labels)} examples were not evaluated exactly once")
    return EvalResult(outcomes[:, :-1], labels)


class _ChunkedForward:
    """Forward pass of a module, with a batch divided into smaller chunks if the device runs out of memory.

    Splitting does not change the results, because the module is in evaluation mode.
    """

    def __init__(self, module: nn.Module, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        self.module, self.device, self.autocast_dtype = module, device, autocast_dtype
        self.most: int | None = None
        """Number of examples that fit in memory at once; None until memory has run out."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Map inputs [n, ...] to logits [n, K]. Raises OutOfMemoryError if not even one example fits."""
        while True:
            at_once = min(self.most or len(inputs), len(inputs))
            try:
                with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=bool(self.autocast_dtype)):
                    parts = [self.module(part) for part in inputs.split(at_once)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                self.most = (at_once + 1) // 2


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Move a batch to the device; with ``channels_last``, images [n, C, h, w] get that memory format."""
    if channels_last and images.dim() == 4:
        return images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images.to(device, non_blocking=True)
