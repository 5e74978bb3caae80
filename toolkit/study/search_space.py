"""Varied keys of [study] and their conditions, and the search space of [study.space].

A key is written nested or dotted, as in a recipe: ``optimizer.lr = [...]`` and ``"optimizer.lr" = [...]`` are the same.
A configuration is a dictionary from dotted recipe keys to values, the *changes* of a run. A key whose condition does
not hold is left out, so the recipe's own value applies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from toolkit.errors import UserError
from toolkit.recipe.diagnostics import Issue, dotted, error
from toolkit.recipe.toml_positions import KeyPath
from toolkit.similar_names import did_you_mean

Kind = Literal["uniform", "log_uniform", "integers", "choice"]
KINDS: tuple[str, ...] = get_args(Kind)
RANGES = frozenset({*KINDS, "when"})
"""Keys that distinguish a range of a search space from a nested table of recipe keys."""

FORMS = "{ uniform = [a, b] }, { log_uniform = [a, b] }, { integers = [a, b] } or { choice = [...] }"

DIGITS = 6
"""Significant digits of a sampled number: few enough for a table, and identical on every machine."""

SPACE: KeyPath = ("study", "space")


class Leaf(NamedTuple):
    """A value in a table, with its dotted key and its position."""

    key: str
    value: Any
    key_path: KeyPath


def dotted_leaves(table: Mapping[str, Any], key_path: KeyPath, ends: frozenset[str] = frozenset()) -> Iterator[Leaf]:
    """Yield the dotted keys of a table with values and positions. A table with one of the keys ``ends`` is a value."""
    for name, value in table.items():
        here = (*key_path, name)
        if isinstance(value, Mapping) and value and not ends & value.keys():
            for leaf in dotted_leaves(value, here, ends):
                yield leaf._replace(key=f"{name}.{leaf.key}")
        else:
            yield Leaf(name, value, here)


def conditions(table: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the allowed values of a ``when`` table by dotted key."""
    leaves = dotted_leaves(table, ())
    return {leaf.key: tuple(leaf.value) if isinstance(leaf.value, list) else (leaf.value,) for leaf in leaves}


def same(one: Any, other: Any) -> bool:
    """Return whether two TOML values are equal; unlike in Python, true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


@dataclass(frozen=True)
class LocatedValue:
    """A value of a varied key, and its position in the study's file."""

    value: Any
    key_path: KeyPath


@dataclass(frozen=True)
class SearchParameter:
    """A varied key, its values, and the conditions under which it is active."""

    key: str
    """Dotted recipe key."""
    kind: Kind
    values: tuple[Any, ...]
    """Range (lowest, highest), both inclusive; for a choice, its options."""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Conditions under which the key is active: the allowed values of other keys."""
    key_path: KeyPath = ()
    """Position of the key in the study's file."""
    located: tuple[LocatedValue, ...] = ()
    """The values with their positions, in [study.grid] and [study.zip]."""

    def at(self, position: float) -> Any:
        """Map a position from 0 to 1, uniformly distributed, to a value of the range."""
        low, high = self.values[0], self.values[-1]
        if self.kind == "choice":
            return self.values[min(int(position * len(self.values)), len(self.values) - 1)]
        if self.kind == "integers":
            return int(min(low + math.floor(position * (high - low + 1)), high))
        if self.kind == "log_uniform":
            return self.rounded(math.exp(math.log(low) + position * (math.log(high) - math.log(low))))
        return self.rounded(low + position * (high - low))

    def rounded(self, value: float) -> float:
        """Return ``value`` rounded to :data:`DIGITS` significant digits and clipped to the range."""
        low, high = self.values
        return float(min(max(float(f"{value:.{DIGITS}g}"), low), high))

    def position(self, option: Any) -> int:
        """Return the index of an option of a choice."""
        return next(index for index, value in enumerate(self.values) if same(value, option))

    def can_be(self, value: Any) -> bool:
        """Return whether the parameter can have the value."""
        if self.kind == "choice":
            return any(same(value, option) for option in self.values)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.values[0] <= value <= self.values[1]


@dataclass(frozen=True)
class SearchSpace:
    """All parameters of a search, ordered so that each comes after those that its condition depends on."""

    parameters: tuple[SearchParameter, ...]
    base: Mapping[str, Any]
    """Values of the recipe by dotted key, used by conditions on keys that do not vary."""

    def configuration(self, choose: Callable[[SearchParameter], Any]) -> dict[str, Any]:
        """Build a configuration by calling ``choose`` for each active parameter, in order."""
        changes: dict[str, Any] = {}
        for parameter in self.parameters:
            if self._is_active(parameter, changes):
                changes[parameter.key] = choose(parameter)
        return changes

    def draw(self, random: np.random.Generator) -> dict[str, Any]:
        """Sample a configuration. Inactive parameters consume a random number too, which keeps the sequence aligned."""
        positions = dict(zip(self.keys, random.random(len(self.parameters)).tolist(), strict=True))
        return self.configuration(lambda parameter: parameter.at(positions[parameter.key]))

    def active(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the active keys of ``values``, which has a value for every key."""
        return self.configuration(lambda parameter: values[parameter.key])

    @property
    def keys(self) -> list[str]:
        """The varied keys."""
        return [parameter.key for parameter in self.parameters]

    @cached_property
    def _varied(self) -> frozenset[str]:
        return frozenset(self.keys)

    def _is_active(self, parameter: SearchParameter, changes: Mapping[str, Any]) -> bool:
        return all(
            (key in changes or key not in self._varied)
            and any(same(changes.get(key, self.base.get(key)), allowed) for allowed in values)
            for key, values in parameter.when.items()
        )


def random_configurations(space: SearchSpace, count: int, seed: int) -> list[dict[str, Any]]:
    """Sample ``count`` distinct configurations; fewer if the space is exhausted.

    With the same seed, a longer list begins with the shorter one.
    """
    random, misses = np.random.default_rng(seed), 0
    found: list[dict[str, Any]] = []
    while len(found) < count and misses < MAX_MISSES:
        sampled = space.draw(random)
        if sampled in found:
            misses += 1
        else:
            found.append(sampled)
            misses = 0
    return found


MAX_MISSES = 100
"""Number of consecutive duplicate samples after which a space counts as exhausted."""


def read_space(table: Mapping[str, Any], base: Mapping[str, Any]) -> SearchSpace:
    """Read a [study.space] table. ``base``: values of the recipe by dotted key.

    Raises UserError with all errors.
    """
    parameters, issues = read_parameters(table)
    issues = issues or list(check_conditions(parameters, base, SPACE))
    if issues:
        raise UserError("\n".join(f"{issue.message}{issue.hint and '; '}{issue.hint or ''}" for issue in issues))
    return SearchSpace(tuple(in_order(parameters)), base)


def read_parameters(table: Mapping[str, Any]) -> tuple[list[SearchParameter], list[Issue]]:
    """Read the parameters of a [study.space] table. Also return the issues found."""
    parameters: list[SearchParameter] = []
    issues = [] if table else [Issue(f"study.space is empty: give recipe keys with {FORMS}", SPACE, at="key")]
    for leaf in dotted_leaves(table, SPACE, RANGES):
        try:
            parameters.append(_parameter(leaf))
        except UserError as fault:
            issues.append(error(leaf.key_path, str(fault), at="key"))
    return parameters, issues


def _parameter(leaf: Leaf) -> SearchParameter:
    """Read one key of [study.space]. Raises UserError; its message does not name the key."""
    value = leaf.value
    if not isinstance(value, Mapping):
        last = leaf.key.rsplit(".", 1)[-1]
        hint = did_you_mean(last, KINDS, prefix="; ", otherwise="; write a list of values as { choice = [...] }")
        raise UserError(f"expected {FORMS}{hint if isinstance(value, list) else ''}")
    kinds = [name for name in value if name != "when"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise UserError(
            f"expected one of {FORMS}, and optionally when = {{...}}; found {', '.join(value) or 'nothing'}"
        )
    kind: Any = kinds[0]
    when = value.get("when", {})
    if not isinstance(when, Mapping):
        raise UserError('when: expected recipe keys with values, such as when = { optimizer.name = "sgd" }')
    return SearchParameter(leaf.key, kind, _checked(kind, value[kind]), conditions(when), leaf.key_path)


def _checked(kind: Kind, values: Any) -> tuple[Any, ...]:
    """Check and return the ends of a range, or the options of a choice. Raises UserError."""
    if not isinstance(values, list):
        raise UserError(f"{kind}: expected a list, found {values!r}")
    if kind == "choice":
        if not values or any(same(a, b) for i, a in enumerate(values) for b in values[:i]):
            raise UserError(f"choice: expected at least one value and no duplicates, found {values!r}")
        return tuple(values)
    number = int if kind == "integers" else (int, float)
    numbers = all(isinstance(v, number) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    what = "whole numbers" if kind == "integers" else "numbers"
    if len(values) != 2 or not numbers or not values[0] < values[1]:
        raise UserError(f"{kind}: expected two {what}, the lower one first, found {values!r}")
    if kind == "log_uniform" and values[0] <= 0:
        raise UserError(f"log_uniform: expected two numbers above 0, found {values!r}")
    return tuple(values) if kind == "integers" else tuple(float(v) for v in values)


def check_conditions(parameters: Sequence[SearchParameter], known: Iterable[str], table: KeyPath) -> Iterator[Issue]:
    """Yield the issues in the conditions of a table's keys. ``known``: other keys that conditions may refer to."""
    by_key, known = {parameter.key: parameter for parameter in parameters}, list(known)
    for parameter in parameters:
        name = f"{dotted(parameter.key_path)}: when"
        for key, values in parameter.when.items():
            key_path = (*parameter.key_path, "when")
            if key in by_key:
                wrong = [value for value in values if not by_key[key].can_be(value)]
                if wrong:
                    yield Issue(f"{name} {key} = {wrong[0]!r}: the {table[-1]} never gives it that value", key_path)
            elif key not in known:
                hint = did_you_mean(key, [*by_key, *known]) or None
                yield Issue(f"{name} {key}: no such key", key_path, hint=hint)
    try:
        TopologicalSorter({key: parameter.when.keys() & by_key for key, parameter in by_key.items()}).prepare()
    except CycleError as cycle:
        text = f"{dotted(table)}: conditions are circular: {' on '.join(reversed(cycle.args[1]))}"
        yield Issue(text, table, at="key")


def in_order(parameters: Iterable[SearchParameter]) -> Iterator[SearchParameter]:
    """Yield each parameter after those that its condition refers to, otherwise in the given order."""
    waiting = {parameter.key: parameter for parameter in parameters}
    while waiting:
        key = next(k for k, parameter in waiting.items() if not parameter.when.keys() & waiting.keys())
        yield waiting.pop(key)
