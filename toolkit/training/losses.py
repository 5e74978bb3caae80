"""Training losses: functions of logits and targets with one value per example."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits [n, K] and targets, labels int64 [n] or probabilities [n, K], to the loss of each example [n]."""


def training_loss(name: Literal["cross_entropy", "bce"], label_smoothing: float, class_weights: Tensor | None) -> Loss:
    """Return the recipe's training loss.

    ``class_weights``, float32 [K], weight each class's share of a target; None weights all classes equally.
    """
    match name:
        case "cross_entropy":
            return functools.partial(
                F.cross_entropy, weight=class_weights, reduction="none", label_smoothing=label_smoothing
            )
        case "bce":
            return functools.partial(binary_cross_entropy, smoothing=label_smoothing, weight=class_weights)


def binary_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, weight: Tensor | None) -> Tensor:
    """Return the mean over the classes of the binary cross-entropy of each class (Wightman et al. 2021, section 3.1).

    Arguments and result are those of :data:`Loss`. Smoothed targets are those of cross-entropy, as in timm's
    BinaryCrossEntropy.
    """
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[1])
    targets = targets.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="none").mean(1)
