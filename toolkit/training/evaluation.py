"""Evaluation that counts every example exactly once, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class EvalResult:
    """Per-example results on one split, in the split's order; the same on every process."""

    losses: np.ndarray
    """Cross-entropy of each example, float64 [N]."""
    predictions: np.ndarray
    """Class with the highest probability for each example, int64 [N]."""
    probabilities: np.ndarray
    """Probability of the predicted class, float64 [N]."""
    in_top5: np.ndarray
    """Whether the true class is among the five most probable ones, bool [N]."""
    labels: np.ndarray
    """True class of each example, int64 [N]."""

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the metrics of :data:`toolkit.metrics.MEASURES`, each name prefixed (e.g. with ``val/``).

        balanced_accuracy is the mean recall over the classes that occur in the split; macro_f1 the mean F1 over the
        classes that occur in the split or were predicted, as in scikit-learn.
        """
        right = self.predictions == self.labels
        count = int(max(self.labels.max(), self.predictions.max())) + 1
        support, predicted = (np.bincount(classes, minlength=count) for classes in (self.labels, self.predictions))
        hits = np.bincount(self.labels, weights=right, minlength=count)
        present, occurs = support > 0, support + predicted > 0
        return {
            f"{prefix}loss": float(self.losses.mean()),
            f"{prefix}accuracy": float(right.mean()),
            f"{prefix}top5_accuracy": float(self.in_top5.mean()),
            f"{prefix}balanced_accuracy": float((hits[present] / support[present]).mean()),
            f"{prefix}macro_f1": float((2 * hits[occurs] / (support + predicted)[occurs]).mean()),
        }

    def rows(self, names: Sequence[str], classes: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
        """Yield the rows of predictions.csv; ``names`` are those of the images."""
        for name, label, prediction, probability in zip(
            names, self.labels, self.predictions, self.probabilities, strict=True
        ):
            yield name, classes[int(label)], classes[int(prediction)], f"{np.float32(probability):.6g}"


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    batches: Iterable[tuple[np.ndarray, Tensor, Tensor]],
    labels: np.ndarray,
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
        found.append(outcomes(logits.float(), targets.to(device, non_blocking=True)))
        all_positions.append(positions)
    # Columns: count, loss, prediction, probability, top 5. Each process fills its own rows, which are then summed.
    table = torch.zeros(len(labels), 5, dtype=torch.float64)
    if found:
        table.index_add_(0, torch.from_numpy(np.concatenate(all_positions)), torch.cat(found).cpu())
    if dist.is_initialized() and dist.get_world_size() > 1:
        shared = table.to(device) if dist.get_backend() == "nccl" else table
        dist.all_reduce(shared)
        table = shared.cpu()
    count, losses, predictions, probabilities, in_top5 = table.numpy().T
    if not (count == 1).all():
        raise AssertionError(f"{int((count != 1).sum())} of {len(labels)} examples were not evaluated exactly once")
    return EvalResult(
        losses.copy(), predictions.astype(np.int64), probabilities.copy(), in_top5.astype(bool), labels.astype(np.int64)
    )


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


def outcomes(logits: Tensor, targets: Tensor) -> Tensor:
    """Map logits [n, K] and labels [n] to float64 [n, 5]: 1, loss, prediction, its probability, top-5 correctness."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    probability, prediction = logits.softmax(1).max(1)
    top5 = logits.topk(min(5, logits.shape[1]), 1).indices.eq(targets[:, None]).any(1)
    columns = (torch.ones_like(losses), losses, prediction, probability, top5)
    return torch.stack([column.double() for column in columns], 1)


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Move a batch to the device; with ``channels_last``, images [n, C, h, w] get that memory format."""
    if channels_last and images.dim() == 4:
        return images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images.to(device, non_blocking=True)
