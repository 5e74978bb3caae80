"""A model's stages, input to output: rows of the parts table, steps of gradual unfreezing and of layer decay."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

EXPANDED = frozenset({"features", "blocks", "stages", "layers", "trunk_output", "encoder", "classifier", "heads"})
"""Names that the libraries give to containers: their children are stages, not they."""


@dataclass(frozen=True)
class Stage:
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


def find_stages(module: nn.Module, heads: tuple[str, ...]) -> list[Stage]:
    """Stages that hold every parameter exactly once; the last is ``heads``, called "head"."""
    names = [name for name, _ in module.named_parameters()]
    groups = _timm_groups(module) or _child_groups(module)
    kept = set(names)
    backbone = [[name for name in group if name in kept and not is_under(name, heads)] for group in groups]
    backbone = _merge(module, [group for group in backbone if group])
    total = _count_prefixes(names)
    prefixes = [_shortest_prefixes(group, total) for group in backbone]
    stages = [Stage(_name(index, parts), parts) for index, parts in enumerate(prefixes)]
    return [*stages, Stage("head", heads)]


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


def _merge(module: nn.Module, groups: list[list[str]]) -> list[list[str]]:
    """Normalisation layers and bare parameters (class token, positions) join what stands before them."""
    merged: list[list[str]] = []
    waiting: list[str] = []
    for group in groups:
        is_small = all(_is_norm_or_bare(module, name) for name in group)
        if is_small and merged:
            merged[-1] = [*merged[-1], *group]
        elif is_small:
            waiting += group
        else:
            merged.append([*waiting, *group])
            waiting = []
    return [*merged, waiting] if waiting else merged


def _is_norm_or_bare(module: nn.Module, parameter: str) -> bool:
    """A layer's own class is what its name says; a parameter of a module that has children is bare."""
    owner = module.get_submodule(parameter.rpartition(".")[0])
    return "Norm" in type(owner).__name__ or next(owner.children(), None) is not None


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
