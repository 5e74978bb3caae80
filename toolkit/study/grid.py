"""Swept keys of [study]: lists of values, their positions in the file, and how they are combined.

A key is written nested or dotted, as in a recipe: ``optimizer.lr = [...]`` and ``"optimizer.lr" = [...]`` are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.recipe.diagnostics import Issue
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.type_descriptions import describe_value

MOST_COMBINATIONS = 100_000
"""Larger grids are rejected without being enumerated, as they are almost certainly a mistake."""

LONGEST_LABEL = 40
"""Maximum length of a value in a row's name, in characters; a longer one is shown by its index."""


@dataclass(frozen=True)
class LocatedValue:
    """A value that a key takes in some runs, and its position in the study's file."""

    value: Any
    place: KeyPath


@dataclass(frozen=True)
class SweptParameter:
    """A key that varies, in [study.grid] or [study.zip]."""

    key: str
    """Dotted recipe key."""
    place: KeyPath
    """Position of the key in the study's file."""
    values: tuple[LocatedValue, ...]
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Conditions: other keys with their allowed values; if they do not hold, this key keeps the recipe's value."""


ParameterSet = dict[str, LocatedValue]
"""Values in one run, by dotted key."""


def dotted_leaves(table: Mapping[str, Any], place: KeyPath, ends: frozenset[str] = frozenset()) -> Iterator[_Leaf]:
    """Yield the dotted keys of a table with values and positions. A table that contains one of ``ends`` is a value."""
    for name, value in table.items():
        here = (*place, name)
        if isinstance(value, Mapping) and value and not ends & value.keys():
            for leaf in dotted_leaves(value, here, ends):
                yield _Leaf(f"{name}.{leaf.key}", leaf.value, leaf.place)
        else:
            yield _Leaf(name, value, here)


@dataclass(frozen=True)
class _Leaf:
    key: str
    value: Any
    place: KeyPath


def read_variables(table: Mapping[str, Any], place: KeyPath) -> tuple[list[SweptParameter], list[Issue]]:
    """Read the variables of [study.grid] or [study.zip]. Return them with the issues found."""
    variables, faults = [], []
    for leaf in dotted_leaves(table, place, frozenset({"values", "when"})):
        variable = _variable(leaf)
        if isinstance(variable, Issue):
            faults.append(variable)
        else:
            variables.append(variable)
    return variables, faults


def _variable(leaf: _Leaf) -> SweptParameter | Issue:
    value, place, when = leaf.value, leaf.place, {}
    name = ".".join(str(part) for part in leaf.place)
    if isinstance(value, Mapping) and "values" in value:
        unknown = sorted(value.keys() - {"values", "when"})
        if unknown:
            return Issue(f"{name}: takes values and when, not {', '.join(unknown)}", leaf.place, at="key")
        if not isinstance(value.get("when", {}), Mapping):
            return Issue(f"{name}.when: expected recipe keys with values, {{ optimizer.name = ... }}", leaf.place)
        when = conditions(value.get("when", {}))
        value, place = value["values"], (*place, "values")
    if not isinstance(value, list):
        hint = "a single value for all runs belongs in its own table, outside [study]"
        return Issue(f"{name}: expected a list of values, found {describe_value(value)}", leaf.place, hint=hint)
    if not value:
        return Issue(f"{name}: the list is empty, so there are no runs", leaf.place)
    return SweptParameter(leaf.key, leaf.place, tuple(LocatedValue(v, (*place, i)) for i, v in enumerate(value)), when)


def conditions(table: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the allowed values of a ``when`` table by dotted key."""
    leaves = dotted_leaves(table, ())
    return {leaf.key: tuple(leaf.value) if isinstance(leaf.value, list) else (leaf.value,) for leaf in leaves}


def zipped(variables: Sequence[SweptParameter]) -> list[ParameterSet]:
    """Combine the lists element by element: one combination per position."""
    steps = zip(*(variable.values for variable in variables), strict=True)
    return [dict(zip((v.key for v in variables), step, strict=True)) for step in steps] if variables else [{}]


def uneven(variables: Sequence[SweptParameter]) -> Issue | None:
    """Return an issue if the lists of [study.zip] differ in length."""
    lengths = {variable.key: len(variable.values) for variable in variables}
    if len(set(lengths.values())) < 2:
        return None
    told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
    return Issue(f"study.zip: the lists must have the same length; {told} values", ("study", "zip"), at="key")


def products(variables: Sequence[SweptParameter], fixed: Mapping[str, Any]) -> Iterator[ParameterSet]:
    """Yield all distinct combinations, the last variable fastest; keys whose condition does not hold are left out.

    ``fixed``: the other values of the recipe by dotted key, for conditions.
    """
    seen = set()
    for values in itertools.product(*(variable.values for variable in variables)):
        chosen = dict(zip((v.key for v in variables), values, strict=True))
        combination = _holding(variables, chosen, fixed)
        mark = tuple((key, value.place) for key, value in combination.items())
        if mark not in seen:
            seen.add(mark)
            yield combination


def _holding(variables: Sequence[SweptParameter], chosen: ParameterSet, fixed: Mapping[str, Any]) -> ParameterSet:
    """Return the part of ``chosen`` whose conditions hold; a condition on a key that is left out does not hold."""
    by_key = {variable.key: variable for variable in variables}

    def holds(key: str) -> bool:
        return all(
            (other not in by_key or holds(other))
            and any(same(chosen[other].value if other in by_key else fixed.get(other), value) for value in allowed)
            for other, allowed in by_key[key].when.items()
        )

    return {key: value for key, value in chosen.items() if holds(key)}


def circle(variables: Sequence[SweptParameter]) -> str | None:
    """Return a key whose condition depends on itself, if there is one."""
    by_key = {variable.key: variable for variable in variables}

    def leads_back(key: str, way: tuple[str, ...]) -> bool:
        return key in way or any(leads_back(other, (*way, key)) for other in by_key[key].when if other in by_key)

    return next((key for key in by_key if leads_back(key, ())), None)


def count_products(variables: Sequence[SweptParameter]) -> int:
    """Return the number of combinations, ignoring conditions."""
    return math.prod(len(variable.values) for variable in variables)


def same(one: Any, other: Any) -> bool:
    """Return whether two TOML values are equal; unlike in Python, true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return ``{"a": {"b": value}}`` for the dotted key ``a.b``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


class RowNamer:
    """Builds row names from swept values and their combinations."""

    def __init__(self, variables: Iterable[SweptParameter]) -> None:
        self.variables = {variable.key: variable for variable in variables}
        last = [key.rsplit(".", 1)[-1] for key in self.variables]
        self.short = {
            key: name if last.count(name) == 1 else key for key, name in zip(self.variables, last, strict=True)
        }

    def of(self, combination: ParameterSet) -> str:
        """Return the name of a combination, such as ``adamw, lr 0.01``; the value of a ``name`` key stands alone."""
        return ", ".join(self._said(key, self._value(key, value)) for key, value in combination.items())

    def plain(self, combination: ParameterSet) -> str:
        """Return the name of a combination whose values do not come from a list."""
        return ", ".join(self._said(key, label(value.value)) for key, value in combination.items())

    def _said(self, key: str, value: str) -> str:
        return value if self.short[key] == "name" else f"{self.short[key]} {value}"

    def _value(self, key: str, value: LocatedValue) -> str:
        """Return the value's label if it is short and unique among the key's values, else its number, as in ``#2``."""
        values = self.variables[key].values
        words = [label(each.value) for each in values]
        mine = label(value.value)
        if len(mine) <= LONGEST_LABEL and words.count(mine) == sum(same(v.value, value.value) for v in values):
            return mine
        return f"#{1 + next(i for i, each in enumerate(values) if same(each.value, value.value))}"


def label(value: Any) -> str:
    """Format a value for a row's name; transforms in a list are shown by name."""
    if isinstance(value, list | tuple):
        if not value:
            return "none"
        parts = [str(v["name"]) if isinstance(v, Mapping) and "name" in v else label(v) for v in value]
        return "+".join(parts) if any(isinstance(v, Mapping) for v in value) else f"[{', '.join(parts)}]"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {label(item)}" for key, item in value.items()) or "{}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
