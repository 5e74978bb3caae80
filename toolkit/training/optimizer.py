"""Build a torch optimizer from the recipe's [optimizer] table."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.plugins import PREFIX, find
from toolkit.recipe.schema import OptimizerConfig


def build_optimizer(
    table: OptimizerConfig, groups: list[dict[str, Any]], later: Iterable[Tensor] = ()
) -> torch.optim.Optimizer:
    """Build the optimizer for ``groups``, each with its own lr and weight_decay.

    sgd, nag, adam and adamw are PyTorch's; plugin:NAME is a plugin; all other names are timm's. Raises UserError for
    arguments that the optimizer does not accept. ``later``: parameters that will be added during training. The choice
    of the kernel considers them, too: it must be safe for them and must not depend on where a run is resumed.
    """
    arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.args.items()}
    if table.momentum is not None:
        arguments["momentum"] = table.momentum
    if table.name.startswith(PREFIX):
        return _plugin_optimizer(table, groups)
    fused: dict[str, Any] = {"fused": True} if _can_fuse(table.name, groups, later) else {}
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


def _plugin_optimizer(table: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build a plugin's optimizer. Raises UserError unless it keeps the parameter groups with all their entries."""
    momentum = {} if table.momentum is None else {"momentum": table.momentum}
    plugin = find("optimizer", table.name.removeprefix(PREFIX))
    given = [{**group, "params": list(group["params"])} for group in groups]  # add_param_group changes its argument
    optimizer = plugin.build(table.args, params=groups, lr=table.lr, weight_decay=table.weight_decay, **momentum)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"the optimizer {plugin.name} must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if len(optimizer.param_groups) != len(given) or not all(map(_is_kept, given, optimizer.param_groups)):
        raise UserError(
            f"the optimizer {plugin.name} changes its parameter groups (params): it must keep their number, order and "
            "entries, because the learning rate of each is set by the schedule"
        )
    return optimizer


def _is_kept(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Return whether a parameter group has its parameters and entries; the optimizer may add other entries."""
    same = len(before["params"]) == len(after["params"]) and all(map(operator.is_, before["params"], after["params"]))
    return same and all(after.get(key) == value for key, value in before.items() if key != "params")


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer state, which may come from another device type, but keep this optimizer's own kernel flags."""
    kernel_flags = [{key: group[key] for key in _KERNEL_FLAGS if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, flags in zip(optimizer.param_groups, kernel_flags, strict=True):
        group.update(flags)


_KERNEL_FLAGS = ("foreach", "fused", "capturable")
"""Entries of PyTorch's parameter groups that select an implementation and do not affect the result."""


def _can_fuse(name: str, groups: list[dict[str, Any]], later: Iterable[Tensor]) -> bool:
    """Return whether to use PyTorch's fused kernel: always on GPUs, where launching many small kernels is slow.

    On a CPU the fused kernel halves the time of adam and adamw and gains nothing for SGD. It ignores the strides
    of weights and gradients, so it is safe only for contiguous ones.
    """
    parameters = [*(parameter for group in groups for parameter in group["params"]), *later]
    if all(p.device.type == "cuda" and p.is_floating_point() for p in parameters):
        return True
    return name in ("adam", "adamw") and all(
        p.device.type == "cpu" and p.is_floating_point() and p.is_contiguous() for p in parameters
    )


def _timm_optimizer(
    table: OptimizerConfig, groups: list[dict[str, Any]], arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    import timm.optim

    optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
        groups, opt=table.name, lr=table.lr, weight_decay=table.weight_decay, filter_bias_and_bn=False, **arguments
    )
    return optimizer
