"""From the recipe's [optimizer] table to a torch optimiser."""

from __future__ import annotations

from typing import Any

import torch

from toolkit.errors import UserError
from toolkit.recipe.schema import OptimizerTable


def build_optimizer(table: OptimizerTable, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimiser over ``groups`` (each with its own lr and weight_decay).

    sgd, nag, adam and adamw are PyTorch's, with its meaning; every other name is timm's. Arguments that the optimiser
    does not take are a UserError.
    """
    arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.args.items()}
    if table.momentum is not None:
        arguments["momentum"] = table.momentum
    fused: dict[str, Any] = {"fused": True} if _can_fuse(groups) else {}
    try:
        match table.name:
            case "sgd":
                return torch.optim.SGD(groups, lr=table.lr, **{**fused, **arguments})
            case "nag":
                return torch.optim.SGD(groups, lr=table.lr, nesterov=True, **{**fused, **arguments})
            case "adam":
                return torch.optim.Adam(groups, lr=table.lr, **{**fused, **arguments})
            case "adamw":
                return torch.optim.AdamW(groups, lr=table.lr, **{**fused, **arguments})
        return _timm_optimizer(table, groups, arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.name = {table.name!r}: {error}") from None


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    """One kernel for all parameters: on GPUs, where launching many small kernels costs most."""
    return all(p.device.type == "cuda" and p.is_floating_point() for group in groups for p in group["params"])


def _timm_optimizer(
    table: OptimizerTable, groups: list[dict[str, Any]], arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    import timm.optim

    optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
        groups, opt=table.name, lr=table.lr, weight_decay=table.weight_decay, filter_bias_and_bn=False, **arguments
    )
    return optimizer
