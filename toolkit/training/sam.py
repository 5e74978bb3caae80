"""Sharpness-aware minimization (SAM; Foret et al. 2021, arXiv:2010.01412) and its adaptive form, ASAM.

A step takes the gradient of the loss at the weights w, moves to w + e, the point at distance rho at which the loss is
greatest to first order, takes the gradient there, returns to w, and gives this gradient to the optimizer.

The first gradient is that of the whole step, over all accumulation steps and processes, so that e does not depend on
their numbers. (In Foret et al., section 4.1, each accelerator uses its own gradient, "m-sharpness".) It costs one more
all-reduce per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ETA = 0.01
"""Constant that ASAM adds to the absolute values of the weights (Kwon et al. 2021, section 5)."""


@contextmanager
def at_worst_neighbor(module: nn.Module, radius: float, *, adaptive: bool) -> Iterator[None]:
    """Move the parameters that have a gradient to w + e in this context, and set their gradients to None.

    The caller computes the gradients at w + e. On leaving the context, the weights are w again, and all buffers (batch
    norm statistics) are restored exactly.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    weights = [parameter.detach().clone() for parameter in parameters]
    buffers = list(module.buffers())
    kept = [buffer.clone() for buffer in buffers]
    moves = perturbation(weights, [p.grad for p in parameters if p.grad is not None], radius, adaptive=adaptive)
    with torch.no_grad():
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.add_(move)
            parameter.grad = None
    del moves
    yield
    with torch.no_grad():
        for tensor, value in zip([*parameters, *buffers], [*weights, *kept], strict=True):
            tensor.copy_(value)


def perturbation(weights: list[Tensor], gradients: list[Tensor], radius: float, *, adaptive: bool) -> list[Tensor]:
    """Return e for each weight tensor: rho g / ||g||, or for ASAM rho T^2 g / ||T g|| with T = |w| + ETA elementwise.

    The norm is over all tensors. Kwon et al. 2021, arXiv:2102.11600, equation 6.
    """
    scales = [weight.abs() + ETA for weight in weights] if adaptive else [None] * len(weights)
    scaled = [g if scale is None else scale * g for g, scale in zip(gradients, scales, strict=True)]
    factor = radius / (torch.nn.utils.get_total_norm(scaled) + 1e-12)
    return [(g if scale is None else scale * g) * factor for g, scale in zip(scaled, scales, strict=True)]
