"""Training losses: functions of logits and targets with one value per example."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import UserError, first_line
from toolkit.plugins import PREFIX, find
from toolkit.recipe.training_schema import TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of logits [n, K] and targets that returns the loss of each example, [n].

Targets are class indices, int64 [n], or class probabilities, [n, K]; for multi-label, the probability of each label.
"""


def training_loss(
    table: TrainConfig, label_smoothing: float, class_weights: Tensor | None, *, multi_label: bool = False
) -> Loss:
    """Return the recipe's training loss, which is not a plugin.

    ``class_weights``: weight of each class's probability in a target, float32 [K]; for multi-label, the weights of
    absent and of present labels, [2, K]. None: all weights are 1.
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
            return functools.partial(weigh, threshold=args.target_threshold)
        case "bce":
            return functools.partial(
                binary_cross_entropy,
                smoothing=label_smoothing,
                weight=class_weights,
                threshold=args.target_threshold,
            )
        case "focal":
            return functools.partial(weigh, gamma_positive=args.gamma, gamma_negative=args.gamma, alpha=args.alpha)
        case "asymmetric":
            gammas = {"gamma_positive": args.gamma_positive, "gamma_negative": args.gamma_negative}
            return functools.partial(weigh, **gammas, clip=args.clip)
        case _:
            raise AssertionError(f"no built-in loss is named {table.loss}")


def plugin_loss(
    table: TrainConfig, label_smoothing: float, class_weights: Tensor | None, classes: int, device: torch.device
) -> Loss:
    """Return the loss of a plugin, which gets logits and probabilities as float32. Raises UserError if it fails.

    ``class_weights`` as for :func:`training_loss`; ``classes``: their number K.
    """
    provided = {"num_classes": classes, "class_weights": class_weights, "label_smoothing": label_smoothing}
    loss = find("loss", table.loss.removeprefix(PREFIX)).build(table.loss_args.given, **provided)
    if isinstance(loss, nn.Module):
        if next(loss.parameters(), None) is not None:
            raise UserError(f"train.loss = {table.loss!r} has parameters, which would not be trained: use the model's")
        loss = loss.to(device)
    return lambda logits, targets: loss(logits.float(), targets if targets.dim() == 1 else targets.float())


def check_loss(
    loss: Loss, name: str, classes: int, device: torch.device, *, multi_label: bool, mixed: bool
) -> str | None:
    """Try a plugin's loss on a few logits; return a sentence if it is not exact.

    ``mixed``: also try probabilities as targets, which mixup and CutMix give. Raises UserError unless it returns one
    finite value per example, with a gradient.
    """
    count = 4
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=random).to(device).requires_grad_()
    labels = torch.arange(count, device=device) % classes
    soft = F.one_hot(labels, classes).float()
    for targets in [soft] if multi_label else [labels, soft] if mixed else [labels]:
        try:
            losses = loss(logits, targets)
        except Exception as error:  # the user's own code may raise anything
            kind = "probabilities [n, K]" if targets.dim() == 2 else "class indices [n]"
            raise UserError(
                f"train.loss = {name!r} failed for logits [n, K] and {kind}: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            found = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(
                f"train.loss = {name!r} must return one value per example, [n], not {found} for n = {count}; "
                "PyTorch's losses do with reduction='none'"
            )
        if not losses.isfinite().all() or losses.grad_fn is None:
            what = "has no gradient" if losses.grad_fn is None else "is not finite for ordinary logits"
            raise UserError(f"train.loss = {name!r} {what}")
        alone = torch.cat([loss(logits[i : i + 1], targets[i : i + 1]) for i in range(count)])
        if not torch.allclose(losses, alone, rtol=1e-4, atol=1e-6):
            return (
                f"the loss {name} of an example depends on the other images of its batch, so results depend on the "
                "number of processes and on train.grad_accum_steps"
            )
    return None


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, smoothing: float, weight: Tensor | None, threshold: float | None = None
) -> Tensor:
    """Return the mean over the classes of the binary cross-entropy of each class (Wightman et al. 2021, section 3.1).

    Arguments and result are those of :data:`Loss`. Smoothed targets are those of cross-entropy, as in timm's
    BinaryCrossEntropy. With ``threshold``, those above it then become 1 and the others 0.
    """
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[1])
    targets = _above(threshold, targets.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="none").mean(1)


def _above(threshold: float | None, targets: Tensor) -> Tensor:
    """Return 1 for targets above the threshold and 0 for the others; the targets themselves without a threshold."""
    return targets if threshold is None else (targets > threshold).to(targets.dtype)


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
    threshold: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the binary, focal or asymmetric loss of each example, averaged over the classes; see :data:`Loss`.

    For the probability p of a class, the loss is -(1 - p)^gamma_positive log(p) if the class is present, and
    -q^gamma_negative log(1 - q) if it is absent, where q = max(p - clip, 0). If both gammas and ``clip`` are 0, this
    is the binary cross-entropy; with equal gammas it is the focal loss (Lin et al. 2017, arXiv:1708.02002), in which
    present classes have the weight ``alpha`` and absent classes 1 - alpha; in general it is the asymmetric loss (Ridnik
    et al. 2021, arXiv:2009.14119).

    ``smoothing`` moves targets toward ``smooth_toward``, by default 1 / K. With ``threshold``, targets above it then
    become 1 and the others 0. ``weights``: weights of absent and of present classes, [2, K].
    """
    logits = logits.float()
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[1])
    middle = 1 / logits.shape[1] if smooth_toward is None else smooth_toward
    targets = _above(threshold, targets.to(logits.dtype) * (1 - smoothing) + smoothing * middle)
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
