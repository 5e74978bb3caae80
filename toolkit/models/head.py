"""Classifier heads: a linear layer, optionally after batch norm, or hidden layers with batch norm and dropout."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.cache.memory_budget import available_memory, gib
from toolkit.errors import UserError
from toolkit.recipe.schema import HeadConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}


class DropoutLinear(nn.Linear):
    """Linear layer with dropout on its input. Its parameters have the names of a plain linear layer."""

    def __init__(self, in_features: int, out_features: int, p: float, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.drop = nn.Dropout(p)

    def forward(self, input: Tensor) -> Tensor:
        """Map [N, in_features] to [N, out_features]."""
        return F.linear(self.drop(input), self.weight, self.bias)


def build_head(table: HeadConfig, in_features: int, num_classes: int) -> nn.Module:
    """Build a head that maps [N, in_features] to [N, num_classes].

    Each hidden width adds Linear-[BatchNorm]-activation-[Dropout]; a Linear follows. Without hidden widths the head is
    [BatchNorm]-[Dropout]-Linear; the batch norm has no weight and bias, because the linear layer has them (as in the
    linear probe of He et al. 2022, Masked Autoencoders, arXiv:2111.06377, and its code).
    """
    widths = [in_features, *table.hidden, num_classes]
    check_memory(sum(a * b for a, b in pairwise(widths)), f"a head with hidden layers of {table.hidden}")
    if not table.hidden:
        last = (
            DropoutLinear(in_features, num_classes, table.dropout)
            if table.dropout
            else nn.Linear(in_features, num_classes)
        )
        return nn.Sequential(nn.BatchNorm1d(in_features, eps=1e-6, affine=False), last) if table.batch_norm else last
    layers: list[nn.Module] = []
    for width in table.hidden:
        layers.append(nn.Linear(in_features, width, bias=table.has_bias))
        if table.batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(ACTIVATIONS[table.activation]())
        if table.dropout:
            layers.append(nn.Dropout(table.dropout))
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, num_classes))


def check_memory(weights: int, what: str) -> None:
    """Raise UserError if ``weights`` float32 values and their gradients do not fit in memory; no-op on the meta device.

    The operating system may overcommit memory and kill the process when the memory is written to.
    """
    need = 2 * 4 * weights
    if torch.get_default_device().type != "meta" and need > (free := available_memory()):
        raise UserError(
            f"{what} has {weights:,} weights, {gib(need)} with their gradients, but only {gib(free)} of memory are "
            "free: make it smaller"
        )


def with_dropout(layer: nn.Linear, p: float) -> DropoutLinear:
    """Return the linear layer with dropout on its input; the parameters are shared with ``layer``."""
    with torch.device("meta"):
        new = DropoutLinear(layer.in_features, layer.out_features, p, layer.bias is not None)
    new.weight, new.bias = layer.weight, layer.bias
    return new
