"""[study.space]: a search space of recipe keys with ranges, some of which are active only under a condition.

A configuration is a dictionary from dotted recipe keys to values, the *changes* of a run. A key whose condition does
not hold is left out, so the recipe's own value applies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from toolkit.errors import UserError
from toolkit.similar_names import did_you_mean
from toolkit.study.grid import conditions, same

Kind = Literal["uniform", "log_uniform", "integers", "choice"]
KINDS: tuple[str, ...] = get_args(Kind)
FORMS = "{ uniform = [a, b] }, { log_uniform = [a, b] }, { integers = [a, b] } or { choice = [...] }"

DIGITS = 6
"""Significant digits of a sampled number: few enough to show in a table, and the same on every machine."""


@dataclass(frozen=True)
class SearchParameter:
    """One key of the space: its range, and when it is active."""

    key: str
    """Dotted recipe key."""
    kind: Kind
    values: tuple[Any, ...]
    """(lowest, highest), both inclusive; for a choice, its options."""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Conditions under which the key is active: other keys, with the values that each may have."""

    def at(self, position: float) -> Any:
        """Return the value at a position from 0 to 1 of the range; equal intervals are equally probable."""
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
        """Return whether the range contains the value."""
        if self.kind == "choice":
            return any(same(value, option) for option in self.values)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.values[0] <= value <= self.values[1]


@dataclass(frozen=True)
class SearchSpace:
    """All parameters, ordered so that those named in a condition come before those that depend on them."""

    parameters: tuple[SearchParameter, ...]
    base: Mapping[str, Any]
    """Values of the recipe by dotted key, for conditions on keys that do not vary."""

    def configuration(self, choose: Callable[[SearchParameter], Any]) -> dict[str, Any]:
        """Return the changes that result from calling ``choose`` for each active parameter, in order."""
        changes: dict[str, Any] = {}
        for parameter in self.parameters:
            if self._counts(parameter, changes):
                changes[parameter.key] = choose(parameter)
        return changes

    def draw(self, random: np.random.Generator) -> dict[str, Any]:
        """Sample a configuration. Each parameter uses one random number, active or not, so samples stay aligned."""
        positions = dict(zip(self.keys, random.random(len(self.parameters)).tolist(), strict=True))
        return self.configuration(lambda parameter: parameter.at(positions[parameter.key]))

    @property
    def keys(self) -> list[str]:
        """The varied keys."""
        return [parameter.key for parameter in self.parameters]

    def _counts(self, parameter: SearchParameter, changes: Mapping[str, Any]) -> bool:
        varied = set(self.keys)
        return all(
            (key in changes or key not in varied)
            and any(same(changes.get(key, self.base.get(key)), allowed) for allowed in values)
            for key, values in parameter.when.items()
        )


def random_configurations(space: SearchSpace, count: int, seed: int) -> list[dict[str, Any]]:
    """Sample up to ``count`` different configurations; fewer only if the space has no more.

    With the same seed, a longer list begins with the shorter one.
    """
    random, misses = np.random.default_rng(seed), 0
    found: list[dict[str, Any]] = []
    while len(found) < count and misses < MISSES:
        drawn = space.draw(random)
        if drawn in found:
            misses += 1
        else:
            found.append(drawn)
            misses = 0
    return found


MISSES = 100
"""A space counts as exhausted after this many consecutive samples that were already known."""


def read_space(table: Mapping[str, Any], base: Mapping[str, Any]) -> SearchSpace:
    """Read a [study.space] table. ``base``: values of the recipe by dotted key.

    Raises UserError with all errors.
    """
    parameters = {parameter.key: parameter for parameter in read_parameters(table)}
    faults = list(_faults_of_conditions(parameters, base))
    if faults:
        raise UserError("\n".join(faults))
    return SearchSpace(tuple(_in_order(parameters)), base)


def read_parameters(table: Mapping[str, Any]) -> list[SearchParameter]:
    """Read the parameters of a [study.space] table, one by one. Raises UserError with all errors."""
    faults, parameters = [], []
    for path, leaf in _leaves(table):
        key = ".".join(path)
        try:
            parameters.append(_parameter(key, leaf))
        except UserError as fault:
            faults.append(f"study.space.{key}: {fault}")
    if not table:
        faults.append(f"study.space is empty: give recipe keys with {FORMS}")
    if faults:
        raise UserError("\n".join(faults))
    return parameters


def _leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield key paths with their values: a table with a known kind, or anything that is not a table."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value and not _is_range(value):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _is_range(value: Mapping[str, Any]) -> bool:
    """Return whether a table is a range, possibly a malformed one, and not a table of keys."""
    return any(key in KINDS for key in value) or ("when" in value and len(value) <= 2)


def _parameter(key: str, leaf: Any) -> SearchParameter:
    if not isinstance(leaf, Mapping):
        last = key.rsplit(".", 1)[-1]
        hint = did_you_mean(last, KINDS, prefix="; ", otherwise="; write a list of values as { choice = [...] }")
        raise UserError(f"expected {FORMS}{hint if isinstance(leaf, list) else ''}")
    kinds = [name for name in leaf if name != "when"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise UserError(f"expected one of {FORMS}, and optionally when = {{...}}; found {', '.join(leaf) or 'nothing'}")
    kind: Any = kinds[0]
    values = _checked(kind, leaf[kind])
    when = leaf.get("when", {})
    if not isinstance(when, Mapping):
        raise UserError('when: expected recipe keys with values, such as when = { optimizer.name = "sgd" }')
    return SearchParameter(key, kind, values, conditions(when))


def _checked(kind: Kind, values: Any) -> tuple[Any, ...]:
    """Return the checked ends of a range, or the options of a choice."""
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


def _faults_of_conditions(parameters: Mapping[str, SearchParameter], base: Mapping[str, Any]) -> Iterator[str]:
    for parameter in parameters.values():
        for key, values in parameter.when.items():
            start = f"study.space.{parameter.key}: when {key}"
            if key in parameters:
                wrong = [value for value in values if not parameters[key].can_be(value)]
                if wrong:
                    yield f"{start} = {wrong[0]!r}: the space never gives it that value"
            elif key not in base:
                hint = did_you_mean(key, [*parameters, *base], prefix="; ")
                yield f"{start}: neither the space nor the recipe has this key{hint}"
    circle = _circle(parameters)
    if circle:
        yield f"study.space: conditions are circular: {' on '.join(circle)}"


def _circle(parameters: Mapping[str, SearchParameter]) -> list[str]:
    """Return a cycle of keys whose conditions depend on each other; empty if there is none."""

    def follow(key: str, way: list[str]) -> list[str]:
        if key in way:
            return [*way[way.index(key) :], key]
        found = (follow(other, [*way, key]) for other in parameters[key].when if other in parameters)
        return next((circle for circle in found if circle), [])

    return next((circle for key in parameters if (circle := follow(key, []))), [])


def _in_order(parameters: Mapping[str, SearchParameter]) -> Iterator[SearchParameter]:
    """Yield each parameter after those that its condition names, otherwise in file order."""
    waiting = dict(parameters)
    while waiting:
        key = next(k for k, parameter in waiting.items() if not parameter.when.keys() & waiting.keys())
        yield waiting.pop(key)
