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
    others receive its layer. Adds the training images to ``sums``. Raises UserError if the features cannot be cached.
    """
    setup, features = trainer.setup, trainer.loaders.features
    head = None if features is None else setup.built.module.get_submodule(features.tail)
    if features is None or not isinstance(head, nn.Linear):
        raise UserError(
            'transfer.mode = "logistic" needs a model whose last layer is a Linear, and features that can be cached '
            '(the log says why they cannot); use "linear_probe"'
        )
    if setup.dataset.weights is not None:
        raise UserError('transfer.mode = "logistic" does not support weights of images; use "linear_probe"')
    x, labels = features.rows("train")[0].flatten(1), _labels(trainer, "train")
    fitted: tuple[Tensor, Tensor, float] | None = None
    has_validation = setup.has("validation")
    validation = features.rows("validation")[0].flatten(1) if has_validation else None
    if trainer.accelerator.is_main_process:
        fitted = _best(trainer, x, labels, validation)
    weight, bias, chosen = broadcast_object(fitted)
    with torch.no_grad():
        head.weight.copy_(weight)
        assert head.bias is not None
        head.bias.copy_(bias)
        if trainer.accelerator.is_main_process:  # each image once, whatever the number of processes
            logits = head(x.to(head.weight.device))
            targets = labels.to(logits.device)
            sums.add(F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets)
    progress = trainer.progress
    progress.step, progress.chosen_C = setup.steps, chosen
    progress.train_images += len(x)
    trainer.display.log(f"logistic regression on {len(x):,} images with {x.shape[1]:,} features: C = {chosen:g}")


def _labels(trainer: Trainer, split: str) -> Tensor:
    return torch.from_numpy(trainer.setup.labels(split).astype("int64"))


def _best(trainer: Trainer, x: Tensor, labels: Tensor, validation: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Return weight and bias of the chosen layer, on the CPU, and its C."""
    strengths = trainer.recipe.transfer.C
    classes = len(trainer.setup.dataset.classes)
    weights, biases, converged = fit_logistic(x, labels.to(x.device), classes, strengths)
    for strength, is_done in zip(strengths, converged, strict=True):
        if not is_done:
            trainer.display.log(f"warning: the fit with C = {strength:g} did not converge")
    best = 0
    if validation is not None:
        targets = _labels(trainer, "validation").to(x.device)
        scores = []
        for weight, bias in zip(weights, biases, strict=True):
            logits = F.linear(validation, weight, bias)
            accuracy = (logits.argmax(1) == targets).double().mean().item()
            scores.append((accuracy, -F.cross_entropy(logits, targets).item()))
        best = max(range(len(strengths)), key=scores.__getitem__)
    return weights[best].cpu(), biases[best].cpu(), strengths[best]
