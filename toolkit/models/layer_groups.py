"""Divide a model into layer groups, from input to output, for gradual unfreezing, layer decay and the layer table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

EXPANDED = frozenset({"features", "blocks", "stages", "layers", "trunk_output", "encoder", "classifier", "heads"}) | {
    "transformers",
    "dense_stages",
}
"""Names of container modules in the libraries. Their children are layer groups, not the containers themselves."""


FEWEST = 2
"""If timm divides a model into at most this many groups, its division is ignored."""


@dataclass(frozen=True)
class LayerGroup:
    """A group of adjacent layers that share their freeze state and learning-rate multiplier."""

    name: str
    prefixes: tuple[str, ...]
    """Dotted names of the modules or parameters in the group."""

    def holds(self, parameter: str) -> bool:
        """Return whether the parameter named ``parameter`` belongs to the group."""
        return is_under(parameter, self.prefixes)


def is_under(name: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    """Return whether ``name`` equals one of these dotted names or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def find_stages(module: nn.Module, heads: tuple[str, ...], used: Sequence[str]) -> list[LayerGroup]:
    """Return layer groups that contain every parameter exactly once, in the order of their first use.

    The last group is "head" and contains ``heads``. ``used`` are parameter names in the order in which a forward pass
    first uses them (:class:`~toolkit.models.dry_forward.DryForwardResult`).
    """
    names = [name for name, _ in module.named_parameters()]
    kept = {name for name in names if not is_under(name, heads)}
    groups = [[name for name in group if name in kept] for group in _timm_groups(module)]
    if sum(map(bool, groups)) <= FEWEST:  # a useful grouping has at least a stem, blocks and the layers after them
        groups = [[name for name in group if name in kept] for group in _child_groups(module)]
    parts = _parts(module, groups, _count_prefixes(names), used)
    prefixes = [tuple(part.prefix for part in stage) for stage in _join(parts)]
    stages = [LayerGroup(_name(index, parts), parts) for index, parts in enumerate(prefixes)]
    return [*stages, LayerGroup("head", heads)]


@dataclass(frozen=True)
class _Part:
    """Parameters under one dotted prefix that the library (timm) puts into the same group."""

    prefix: str
    group: int
    is_small: bool
    """Whether it has only normalization, position or class token parameters, which form no group of their own."""
    first: int
    last: int
    """Indices into ``used`` at which the part's first and last parameters are first used."""


def _parts(module: nn.Module, groups: list[list[str]], total: Counter[str], used: Sequence[str]) -> list[_Part]:
    """Return the groups' parts in the order of their first use. Unused parameters follow the one registered before."""
    steps = {name: step for step, name in enumerate(used)}
    latest = 0
    for name, _ in module.named_parameters():
        latest = steps.setdefault(name, latest)
    found = []
    for number, group in enumerate(groups):
        for prefix in _shortest_prefixes(group, total):
            for inner in _without_containers(module, prefix, steps):
                inside = [name for name in group if is_under(name, (inner,))]
                is_small = all(_is_small(module, name) for name in inside)
                at = [steps[name] for name in inside]
                found.append(_Part(inner, number, is_small, min(at), max(at)))
    return sorted(found, key=lambda part: part.first)


def _join(parts: list[_Part]) -> list[list[_Part]]:
    """Join consecutive parts of the same library group into one layer group.

    Small parts, and parts first used within the preceding layer group (such as position biases shared by blocks), join
    that group. Small parts at the beginning join the first group.
    """
    stages: list[list[_Part]] = []
    for part in parts:
        stage = stages[-1] if stages else []
        main = next((one for one in stage if not one.is_small), None)
        begins_within = any(part.first < one.last for one in stage)
        if stage and (main is None or part.is_small or part.group == main.group or begins_within):
            stage.append(part)
        else:
            stages.append([part])
    return stages


def block_depths(module: nn.Module, stages: Sequence[LayerGroup]) -> dict[str, int]:
    """Return for each parameter the number of blocks above it, 0 for the head: the exponent of layer decay by block.

    For timm's models the blocks are those of timm's ``param_groups_layer_decay``. For others they are the layer groups,
    with each list of blocks (such as a stage of a ResNet) divided into its blocks.
    """
    groups = _timm_groups(module, coarse=False)
    if sum(map(bool, groups)) <= FEWEST:
        blocks = [block for stage in stages[:-1] for block in _blocks_of(module, stage.prefixes)]
        blocks.append(stages[-1].prefixes)
        names = [name for name, _ in module.named_parameters()]
        groups = [[name for name in names if is_under(name, block)] for block in blocks]
    return {name: len(groups) - 1 - index for index, group in enumerate(groups) for name in group}


def _blocks_of(module: nn.Module, prefixes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Divide a layer group into blocks if it begins with a list of blocks; other parts join the last block."""
    first = module.get_submodule(prefixes[0]) if prefixes[0] in dict(module.named_modules()) else None
    children = list(first.named_children()) if isinstance(first, nn.Sequential | nn.ModuleList) else []
    if len(children) < 2 or any(next(child.children(), None) is None for _, child in children):
        return [prefixes]
    blocks = [(f"{prefixes[0]}.{name}",) for name, _ in children]
    return [*blocks[:-1], (*blocks[-1], *prefixes[1:])]


def _timm_groups(module: nn.Module, *, coarse: bool = True) -> list[list[str]]:
    """Return the grouping that a timm model defines for layer decay; [] if it defines none or it fails.

    ``coarse``: by stage if the model has stages, else by block.
    """
    if not hasattr(module, "group_matcher"):
        return []
    from timm.models import group_parameters

    matcher: Any = module.group_matcher
    try:
        groups = group_parameters(module, matcher(coarse=coarse))
    except (AttributeError, AssertionError, TypeError, NotImplementedError):
        return []
    return [list(names) for _, names in sorted(groups.items())]


def _child_groups(module: nn.Module, prefix: str = "") -> list[list[str]]:
    """Return the parameter names of each child in registration order, with containers expanded."""
    own = [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
    groups = [own] if own else []
    for name, child in module.named_children():
        if name in EXPANDED:
            groups += _child_groups(child, f"{prefix}{name}.")
        else:
            groups.append([f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()])
    return [group for group in groups if group]


def _without_containers(module: nn.Module, prefix: str, steps: dict[str, int]) -> list[str]:
    """Return the prefix, or its children's if it is a list of layers that the forward pass interleaves with others."""
    found = dict(module.named_modules()).get(prefix)
    inside = {step for name, step in steps.items() if is_under(name, (prefix,))}
    others = {step for name, step in steps.items() if not is_under(name, (prefix,))}
    is_apart = any(min(inside) < step < max(inside) for step in others)
    if not isinstance(found, nn.ModuleList | nn.ModuleDict) or not is_apart:
        return [prefix]
    children = [
        f"{prefix}.{name}" for name, child in found.named_children() if next(child.parameters(), None) is not None
    ]
    return [inner for child in children for inner in _without_containers(module, child, steps)]


def _is_small(module: nn.Module, parameter: str) -> bool:
    """Return whether the parameter is not part of a linear map or embedding (normalization, token, position table)."""
    owner = module.get_submodule(parameter.rpartition(".")[0])
    return not isinstance(owner, nn.Linear | _ConvNd | nn.Embedding | nn.Bilinear)


def _count_prefixes(names: list[str]) -> Counter[str]:
    """Count the parameters under each dotted prefix."""
    return Counter(prefix for name in names for prefix in _prefixes_of(name))


def _prefixes_of(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _shortest_prefixes(group: list[str], total: Counter[str]) -> tuple[str, ...]:
    """Return the fewest prefixes that cover exactly this group."""
    inside = _count_prefixes(group)
    found = (next(prefix for prefix in _prefixes_of(name) if inside[prefix] == total[prefix]) for name in group)
    return tuple(dict.fromkeys(found))


def _name(index: int, prefixes: tuple[str, ...]) -> str:
    """Name a layer group after its first prefix.

    A first group of several top-level modules is the "stem"; "head" is reserved for the classifier head.
    """
    if index == 0 and len(prefixes) > 1 and "." not in prefixes[1]:
        return "stem"
    return "neck" if prefixes[0] == "head" else prefixes[0]
