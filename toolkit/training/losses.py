"""Training losses: functions of logits and targets with one value per example."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.recipe.training_schema import TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits [n, K] and targets to the loss of each example [n]. Targets: class indices, int64 [n], or probabilities of the
classes, [n, K]; for multi-label, probabilities that each label is present."""


def training_loss(
    table: TrainConfig, label_smoothing: float, class_weights: Tensor | None, *, multi_label: bool = False
) -> Loss:
    """Return the recipe's training loss.

    ``class_weights``, float32 [K], weight each class's share of a target; for multi-label [2, K], the weights of absent
    and of present labels. None weights all equally.
    """
    args = table.loss_args
    weigh = functools.partial(
        binary_loss,
        smoothing=label_smoothing,
        smooth_toward=0.5 if multi_label else None,
        weights=None if class_weights is None else class_weights.expand(2, -1),
    )
    match table.loss:
        case "cross_entropy":
            return functools.partial(
                F.cross_entropy, weight=class_weights, reduction="none", label_smoothing=label_smoothing
            )
        case "bce" if multi_label:
            return weigh
        case "bce":
            return functools.partial(binary_cross_entropy, smoothing=label_smoothing, weight=class_weights)
        case "focal":
            return functools.partial(weigh, gamma_positive=args.gamma, gamma_negative=args.gamma, alpha=args.alpha)
        case "asymmetric":
            gammas = {"gamma_positive": args.gamma_positive, "gamma_negative": args.gamma_negative}
            return functools.partial(weigh, **gammas, clip=args.clip)


def binary_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, weight: Tensor | None) -> Tensor:
    """Return the mean over the classes of the binary cross-entropy of each class (Wightman et al. 2021, section 3.1).

    Arguments and result are those of :data:`Loss`. Smoothed targets are those of cross-entropy, as in timm's
    BinaryCrossEntropy.
    """
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[1])
    targets = targets.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="none").mean(1)


def binary_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma_positive: float = 0.0,
    gamma_negative: float = 0.0,
    clip: float = 0.0,
    alpha: float | None = None,
    smoothing: float = 0.0,
    smooth_toward: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the mean over the classes of a focused binary cross-entropy of each class; see :data:`Loss`.

    With the probability p of a class, the loss of a present one is -(1 - p)^gamma_positive log(p), and of an absent one
    -q^gamma_negative log(1 - q), where q = max(p - clip, 0). With both gammas and clip 0 it is the binary
    cross-entropy, with equal gammas the focal loss (Lin et al. 2017, arXiv:1708.02002), whose ``alpha`` weights present
    classes and 1 - alpha absent ones; in general it is the asymmetric loss (Ridnik et al. 2021, arXiv:2009.14119).

    ``smoothing`` moves targets toward ``smooth_toward``, by default 1 / K. ``weights``, [2, K]: of absent and of
    present classes.
    """
    logits = logits.float()
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[1])
    middle = 1 / logits.shape[1] if smooth_toward is None else smooth_toward
    targets = targets.to(logits.dtype) * (1 - smoothing) + smoothing * middle
    not_present, not_absent = -F.logsigmoid(-logits), -F.logsigmoid(logits)  # -log(1 - p) and -log(p)
    present = not_absent * torch.exp(-gamma_positive * not_present) if gamma_positive else not_absent
    if clip:
        clipped = (logits.sigmoid() - clip).clamp(min=1e-8)
        absent = -torch.log1p(-clipped) * clipped**gamma_negative
    else:
        absent = not_present * torch.exp(-gamma_negative * not_absent) if gamma_negative else not_present
    if alpha is not None:
        present, absent = alpha * present, (1 - alpha) * absent
    if weights is not None:
        present, absent = weights[1] * present, weights[0] * absent
    return (targets * present + (1 - targets) * absent).mean(1)
