"""Training losses: functions of logits and targets with one value per example."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits [n, K] and targets, labels int64 [n] or probabilities [n, K], to the loss of each example [n]."""


def training_loss(label_smoothing: float, class_weights: Tensor | None) -> Loss:
    """Return the recipe's training loss.

    ``class_weights``, float32 [K], weight each class's share of a target; None weights all classes equally.
    """
    return functools.partial(F.cross_entropy, weight=class_weights, reduction="none", label_smoothing=label_smoothing)
