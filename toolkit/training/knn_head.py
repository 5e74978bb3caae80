"""transfer.mode = "knn": k-nearest-neighbor classification on the features of the frozen backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from toolkit.distributed.process import broadcast_object
from toolkit.models.neighbors import CHUNK, LEAST_SHARE, NearestNeighbors
from toolkit.training.logistic_head import split_features, split_labels
from toolkit.training.train_step import RunningMetrics

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer

SAMPLE = 5000
"""Maximum number of training images whose loss and accuracy are computed."""


def train_knn_head(trainer: Trainer, sums: RunningMetrics) -> None:
    """Store the training images in the head, and choose the value of transfer.k with the highest validation accuracy.

    If several are equal, the one with the lowest validation loss is chosen. A collective: the main process chooses.
    Adds a sample of the training images to ``sums``; the nearest neighbor of each of them is itself.
    """
    head, x, labels = _head(trainer), split_features(trainer, "train"), split_labels(trainer, "train")
    ks = sorted({min(k, len(x)) for k in trainer.recipe.transfer.k})
    head.use(x, labels, ks[0])
    validation = split_features(trainer, "validation") if trainer.setup.has("validation") else None
    chosen = ks[0]
    if validation is not None and trainer.accelerator.is_main_process:
        scores = knn_scores(head, validation, split_labels(trainer, "validation"), ks)
        chosen = ks[max(range(len(ks)), key=scores.__getitem__)]
    head.k = broadcast_object(chosen)
    if trainer.accelerator.is_main_process:
        every = -(-len(x) // SAMPLE)
        targets = labels[::every].to(head.features.device)
        with torch.no_grad():
            logits = head(x[::every].to(head.features.device))
        sums.add(F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets)
    progress = trainer.progress
    progress.step, progress.chosen_k = trainer.setup.steps, head.k
    progress.train_images += len(x)
    trainer.display.log(f"{head.k} nearest of {len(x):,} images with {x.shape[1]:,} features")


def refit_knn_head(trainer: Trainer) -> None:
    """Add the validation images to the training images in the head (a collective)."""
    splits, head = ("train", "validation"), _head(trainer)
    x = torch.cat([split_features(trainer, split) for split in splits])
    head.use(x, torch.cat([split_labels(trainer, split) for split in splits]), head.k)
    trainer.display.log(f"{head.k} nearest of {len(x):,} training and validation images")


@torch.no_grad()
def knn_scores(head: NearestNeighbors, x: Tensor, labels: Tensor, ks: list[int]) -> list[tuple[float, float]]:
    """Return accuracy and negative loss on features [n, D] for each number of neighbors."""
    device = head.features.device
    shares = [head.shares(part.to(device), ks) for part in x.split(max(1, CHUNK // len(head.features)))]
    targets, scores = labels.to(device), []
    for of_k in zip(*shares, strict=True):
        share = torch.cat(of_k)
        accuracy = (share.argmax(1) == targets).double().mean().item()
        scores.append((accuracy, -F.nll_loss(share.clamp_min(LEAST_SHARE).log(), targets).item()))
    return scores


def _head(trainer: Trainer) -> NearestNeighbors:
    head = trainer.setup.built.module.get_submodule(trainer.setup.built.head)
    assert isinstance(head, NearestNeighbors)
    return head
