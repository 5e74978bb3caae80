"""transfer.mode = "logistic": the last layer as a logistic regression on the features of the frozen backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.distributed.process import broadcast_object
from toolkit.errors import UserError
from toolkit.models.logistic import fit_logistic
from toolkit.training.train_step import RunningMetrics

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer


def train_logistic_head(trainer: Trainer, sums: RunningMetrics) -> None:
    """Fit the last layer for each value of transfer.C and keep the one with the highest validation accuracy.

    If several have it, the one with the lower validation loss is kept. A collective: the main process fits, and the
    others receive its layer. Adds the training images to ``sums``.
    """
    x, labels = split_features(trainer, "train"), split_labels(trainer, "train")
    validation = split_features(trainer, "validation") if trainer.setup.has("validation") else None
    fitted = _best(trainer, x, labels, validation) if trainer.accelerator.is_main_process else None
    weight, bias, chosen = broadcast_object(fitted)
    head = _head(trainer)
    _set(head, weight, bias)
    if trainer.accelerator.is_main_process:  # each image once, whatever the number of processes
        with torch.no_grad():
            logits = head(x.to(head.weight.device))
        targets = labels.to(logits.device)
        sums.add(F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets)
    progress = trainer.progress
    progress.step, progress.chosen_C = trainer.setup.steps, chosen
    progress.train_images += len(x)
    trainer.display.log(f"logistic regression on {len(x):,} images with {x.shape[1]:,} features: C = {chosen:g}")


def refit_logistic_head(trainer: Trainer) -> None:
    """Fit the last layer to the training and the validation images, with the chosen C (a collective)."""
    splits = ("train", "validation")
    x = torch.cat([split_features(trainer, split) for split in splits])
    labels = torch.cat([split_labels(trainer, split) for split in splits])
    head, strength = _head(trainer), trainer.progress.chosen_C
    assert strength is not None
    fitted: tuple[Tensor, Tensor] | None = None
    if trainer.accelerator.is_main_process:
        classes, start = len(trainer.setup.dataset.classes), (head.weight.detach(), head.bias.detach())
        weights, biases, converged = fit_logistic(x, labels.to(x.device), classes, [strength], start=start)
        _warn(trainer, [strength], converged)
        fitted = weights[0].cpu(), biases[0].cpu()
    _set(head, *broadcast_object(fitted))
    trainer.display.log(f"logistic regression on {len(x):,} training and validation images: C = {strength:g}")


def split_features(trainer: Trainer, split: str) -> Tensor:
    """Return the features of a split from the cache, [N, D] (a collective)."""
    features = trainer.loaders.features
    if features is None:  # checked before the run began, but free memory may have changed since
        raise UserError(
            f'transfer.mode = "{trainer.recipe.transfer.mode}" needs cached features; the log says why there are none'
        )
    return features.rows(split)[0].flatten(1)


def split_labels(trainer: Trainer, split: str) -> Tensor:
    """Return the labels of a split, int64 [N]."""
    return torch.from_numpy(trainer.setup.labels(split).astype("int64"))


def _head(trainer: Trainer) -> nn.Linear:
    head = trainer.setup.built.module.get_submodule(trainer.setup.built.head)
    assert isinstance(head, nn.Linear)
    return head


def _set(head: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def _best(trainer: Trainer, x: Tensor, labels: Tensor, validation: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Return weight and bias of the chosen layer, on the CPU, and its C."""
    strengths = trainer.recipe.transfer.C
    classes = len(trainer.setup.dataset.classes)
    weights, biases, converged = fit_logistic(x, labels.to(x.device), classes, strengths)
    _warn(trainer, strengths, converged)
    best = 0
    if validation is not None:
        targets = split_labels(trainer, "validation").to(x.device)
        scores = []
        for weight, bias in zip(weights, biases, strict=True):
            logits = F.linear(validation, weight, bias)
            accuracy = (logits.argmax(1) == targets).double().mean().item()
            scores.append((accuracy, -F.cross_entropy(logits, targets).item()))
        best = max(range(len(strengths)), key=scores.__getitem__)
    return weights[best].cpu(), biases[best].cpu(), strengths[best]


def _warn(trainer: Trainer, strengths: list[float], converged: list[bool]) -> None:
    for strength, is_done in zip(strengths, converged, strict=True):
        if not is_done:
            trainer.display.log(f"warning: the fit with C = {strength:g} did not converge")
