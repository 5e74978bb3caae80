"""[study.grid] and [study.zip]: lists of values, their combinations, and the names of rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from toolkit.recipe.diagnostics import Issue, error
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.type_descriptions import describe_value
from toolkit.study.search_space import (
    Leaf,
    LocatedValue,
    SearchParameter,
    SearchSpace,
    conditions,
    dotted_leaves,
    in_order,
    same,
)

MAX_COMBINATIONS = 100_000
"""Maximum number of combinations; more are almost certainly a mistake and are rejected without being enumerated."""

MAX_LABEL_LENGTH = 40
"""Maximum length of a value in a row's name, in characters; a longer one is shown by its index."""


ParameterSet = dict[str, LocatedValue]
"""The values that a run changes, by dotted key."""


def read_variables(table: Mapping[str, Any], key_path: KeyPath) -> tuple[list[SearchParameter], list[Issue]]:
    """Read the lists of [study.grid] or [study.zip] as parameters of kind choice. Also return the issues found."""
    found = [_variable(leaf) for leaf in dotted_leaves(table, key_path, frozenset({"values", "when"}))]
    return [item for item in found if not isinstance(item, Issue)], [item for item in found if isinstance(item, Issue)]


def _variable(leaf: Leaf) -> SearchParameter | Issue:
    values, when = leaf.value, {}
    if isinstance(leaf.value, Mapping) and "values" in leaf.value:
        unknown = sorted(leaf.value.keys() - {"values", "when"})
        if unknown:
            return error(leaf.key_path, f"takes values and when, not {', '.join(unknown)}", at="key")
        values, when = leaf.value["values"], leaf.value.get("when", {})
        if not isinstance(when, Mapping):
            return error((*leaf.key_path, "when"), "expected recipe keys with values, { optimizer.name = ... }")
    if not isinstance(values, list):
        hint = "a single value for all runs belongs in its own table, outside [study]"
        return error(leaf.key_path, f"expected a list of values, found {describe_value(values)}", hint=hint)
    if not values:
        return error(leaf.key_path, "the list is empty, so there are no runs")
    key_path = (*leaf.key_path, "values") if values is not leaf.value else leaf.key_path
    located = tuple(LocatedValue(value, (*key_path, index)) for index, value in enumerate(values))
    return SearchParameter(leaf.key, "choice", tuple(values), conditions(when), leaf.key_path, located)


def zipped(variables: Sequence[SearchParameter]) -> list[ParameterSet]:
    """Combine the lists element by element: one combination per position."""
    steps = zip(*(variable.located for variable in variables), strict=True)
    return [dict(zip((v.key for v in variables), step, strict=True)) for step in steps] if variables else [{}]


def uneven(variables: Sequence[SearchParameter]) -> Issue | None:
    """Return an issue if the lists of [study.zip] differ in length; None otherwise."""
    lengths = {variable.key: len(variable.values) for variable in variables}
    if len(set(lengths.values())) < 2:
        return None
    found = ", ".join(f"{key} has {length}" for key, length in lengths.items())
    return Issue(f"study.zip: the lists must have the same length; {found} values", ("study", "zip"), at="key")


def products(variables: Sequence[SearchParameter], fixed: Mapping[str, Any]) -> Iterator[ParameterSet]:
    """Yield all distinct combinations, the last variable fastest. Keys whose condition does not hold are omitted.

    ``fixed``: the recipe's other values by dotted key, on which conditions may depend.
    """
    space, seen = SearchSpace(tuple(in_order(variables)), fixed), set()
    for values in itertools.product(*(variable.located for variable in variables)):
        chosen = dict(zip((v.key for v in variables), values, strict=True))
        active = space.active({key: value.value for key, value in chosen.items()})
        combination = {key: value for key, value in chosen.items() if key in active}
        identity = tuple((key, value.key_path) for key, value in combination.items())
        if identity not in seen:
            seen.add(identity)
            yield combination


def count_products(variables: Sequence[SearchParameter]) -> int:
    """Return the number of combinations, ignoring conditions."""
    return math.prod(len(variable.values) for variable in variables)


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return ``{"a": {"b": value}}`` for the dotted key ``a.b``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


class RowNamer:
    """Builds the names of rows from their combinations of values."""

    def __init__(self, variables: Iterable[SearchParameter]) -> None:
        self.variables = {variable.key: variable for variable in variables}
        last = [key.rsplit(".", 1)[-1] for key in self.variables]
        self.short = {
            key: name if last.count(name) == 1 else key for key, name in zip(self.variables, last, strict=True)
        }

    def of(self, combination: ParameterSet) -> str:
        """Return the name of a combination, such as ``adamw, lr 0.01``; for a ``name`` key only the value is shown.

        Keys that are not among the variables are left out.
        """
        shown = {key: value for key, value in combination.items() if key in self.variables}
        return ", ".join(self._part(key, self._value(key, value)) for key, value in shown.items())

    def plain(self, combination: ParameterSet) -> str:
        """Return the name of a combination whose values do not come from a list."""
        return ", ".join(self._part(key, label(value.value)) for key, value in combination.items())

    def _part(self, key: str, value: str) -> str:
        return value if self.short[key] == "name" else f"{self.short[key]} {value}"

    def _value(self, key: str, value: LocatedValue) -> str:
        """Return the value's label if it is short and unique among the key's values; else its number, as in ``#2``."""
        values = self.variables[key].values
        labels = [label(each) for each in values]
        own = label(value.value)
        if len(own) <= MAX_LABEL_LENGTH and labels.count(own) == sum(same(v, value.value) for v in values):
            return own
        return f"#{1 + next(i for i, each in enumerate(values) if same(each, value.value))}"


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
