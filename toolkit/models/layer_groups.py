"""A model's stages, input to output: rows of the parts table, steps of gradual unfreezing and of layer decay."""

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
"""Names that the libraries give to containers: their children are stages, not they."""


FEWEST = 2
"""So few groups, stated by timm, are no grouping."""


@dataclass(frozen=True)
class LayerGroup:
    """Neighbouring parameters that are frozen, unfrozen and slowed down together."""

    name: str
    prefixes: tuple[str, ...]
    """Dotted names of the modules or parameters that make it up."""

    def holds(self, parameter: str) -> bool:
        """Whether a parameter of this name belongs to the stage."""
        return is_under(parameter, self.prefixes)


def is_under(name: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    """Whether ``name`` is one of these dotted names or lies within one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def find_stages(module: nn.Module, heads: tuple[str, ...], used: Sequence[str]) -> list[LayerGroup]:
    """Stages that hold every parameter exactly once, in the order of their first use; the last is ``heads``, "head".

    ``used`` are names of parameters in the order in which a forward pass first uses them (:class:`probe.Probe`).
    """
    names = [name for name, _ in module.named_parameters()]
    kept = {name for name in names if not is_under(name, heads)}
    groups = [[name for name in group if name in kept] for group in _timm_groups(module)]
    if sum(map(bool, groups)) <= FEWEST:  # not even a stem, some blocks, and what follows them
        groups = [[name for name in group if name in kept] for group in _child_groups(module)]
    parts = _parts(module, groups, _count_prefixes(names), used)
    prefixes = [tuple(part.prefix for part in stage) for stage in _join(parts)]
    stages = [LayerGroup(_name(index, parts), parts) for index, parts in enumerate(prefixes)]
    return [*stages, LayerGroup("head", heads)]


@dataclass(frozen=True)
class _Part:
    """Parameters under one dotted prefix that the library groups together."""

    prefix: str
    group: int
    is_small: bool
    """Only normalization, positions, class tokens and the like: nothing that deserves a stage of its own."""
    first: int
    last: int
    """When the forward pass begins to use the part's first and last parameter; steps in ``used``."""


def _parts(module: nn.Module, groups: list[list[str]], total: Counter[str], used: Sequence[str]) -> list[_Part]:
    """The groups' parts in the order of their first use; what is never used follows what is registered before it."""
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
    """Parts of one group that follow one another are a stage.

    Small parts, and parts whose use begins within the stage before them (position biases that blocks share), belong
    to that stage; small ones at the beginning to the first stage.
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


def _timm_groups(module: nn.Module) -> list[list[str]]:
    """The grouping that a timm model states for layer decay; [] where it states none that works."""
    if not hasattr(module, "group_matcher"):
        return []
    from timm.models import group_parameters

    matcher: Any = module.group_matcher
    try:
        groups = group_parameters(module, matcher(coarse=True))
    except (AttributeError, AssertionError, TypeError, NotImplementedError):
        return []
    return [list(names) for _, names in sorted(groups.items())]


def _child_groups(module: nn.Module, prefix: str = "") -> list[list[str]]:
    """Children in the order of their registration, containers expanded."""
    own = [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
    groups = [own] if own else []
    for name, child in module.named_children():
        if name in EXPANDED:
            groups += _child_groups(child, f"{prefix}{name}.")
        else:
            groups.append([f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()])
    return [group for group in groups if group]


def _without_containers(module: nn.Module, prefix: str, steps: dict[str, int]) -> list[str]:
    """The prefix, or those of its children where it is a list of layers between which others are used."""
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
    """Whether the parameter is no weight or bias of a linear map: of a normalization, a token, a table of positions."""
    owner = module.get_submodule(parameter.rpartition(".")[0])
    return not isinstance(owner, nn.Linear | _ConvNd | nn.Embedding | nn.Bilinear)


def _count_prefixes(names: list[str]) -> Counter[str]:
    """How many of the parameters lie under each dotted prefix."""
    return Counter(prefix for name in names for prefix in _prefixes_of(name))


def _prefixes_of(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _shortest_prefixes(group: list[str], total: Counter[str]) -> tuple[str, ...]:
    """The fewest prefixes that cover exactly this group."""
    inside = _count_prefixes(group)
    found = (next(prefix for prefix in _prefixes_of(name) if inside[prefix] == total[prefix]) for name in group)
    return tuple(dict.fromkeys(found))


def _name(index: int, prefixes: tuple[str, ...]) -> str:
    """The stage's first prefix; a beginning of several top-level parts is the "stem", "head" is kept for the head."""
    if index == 0 and len(prefixes) > 1 and "." not in prefixes[1]:
        return "stem"
    return "neck" if prefixes[0] == "head" else prefixes[0]
