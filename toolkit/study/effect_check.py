"""Check that varied values take effect: before a study starts, each varied key must change what is built.

A grid over a value that is never read yields a table of noise. (In the public notebook behind two published tables,
the grid varies the weight decay while the optimizer is given a constant.) So every key is tested: two runs that differ
only in it must differ in their data, transforms, model, optimizer or schedule, as built by
:mod:`toolkit.study.effective_config`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from toolkit.errors import UserError
from toolkit.recipe.diagnostics import Issue, RecipeError, dotted
from toolkit.recipe.load import placed
from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value
from toolkit.study.effective_config import EffectiveConfigs
from toolkit.study.expand import STUDY, ExpandedStudy, PlannedRun, StudySpec
from toolkit.study.grid import LocatedValue, ParameterSet, same
from toolkit.study.search_space import SearchParameter, SearchSpace

TRIED = 24
"""Maximum number of pairs of runs tried before a key is reported to have no effect."""

ASIDE = ("tracking.", "checkpoint.", "expected_metrics.", "recipe.description", "train.log_every")
"""Prefixes of keys that are not part of the experiment."""

CONTEXTS = 64
"""Maximum number of combinations of choices in which a search space is tested; a random sample if there are more."""


@dataclass(frozen=True)
class IneffectiveParameter:
    """A key without effect."""

    key: str
    place: KeyPath
    values: tuple[Any, Any]
    reason: str
    """The reason, if the recipe's own checks give one."""
    where: str = ""
    """The run in which it has no effect; empty if it has none in any."""


def check_parameters_have_effect(study: StudySpec, expansion: ExpandedStudy) -> list[str]:
    """Raise RecipeError for varied keys without effect. Return messages about rows that are equivalent."""
    proof = _EffectChecker(study)
    if study.table.bohb is not None:
        dead = list(proof.ineffective_search_keys())
        remarks: list[str] = []
    else:
        dead = list(proof.ineffective_keys(expansion.runs))
        found, remarks = proof.duplicate_runs(expansion.runs, {item.key for item in dead})
        dead += found
    if dead:
        raise RecipeError(placed((_finding(item) for item in dead), study.merged, study.path))
    return remarks


def _finding(dead: IneffectiveParameter) -> Issue:
    one, other = (toml_value(value) if value is not None else "not set" for value in dead.values)
    where = f" {dead.where}" if dead.where else ""
    reason = dead.reason or "data, model, optimizer and schedule are built the same"
    message = f"{dead.key} varies ({one}, {other}), but changes nothing{where}: {reason}"
    hint = "remove it from the study"
    if dead.where:
        hint = f"vary it only where it has an effect: {dead.key} = {{ values = [...], when = {{ ... }} }}"
    return Issue(message, dead.place, hint=hint, at="key")


class _EffectChecker:
    def __init__(self, study: StudySpec) -> None:
        self.study, self.prints = study, EffectiveConfigs()

    # -- rows, grid, zip, random --------------------------------------------------------------------------------------

    def ineffective_keys(self, runs: Sequence[PlannedRun]) -> Iterator[IneffectiveParameter]:
        """Yield keys for which no two values make a difference in any run."""
        distinct = list({_mark(run.changes): run for run in runs}.values())
        for run in distinct:
            self._build(run)
        for key, values in _varied(distinct, self.study.base_values).items():
            in_rows = [run for run in distinct if key in run.changes and _form(run, key) == "rows"]
            if in_rows and key.startswith(ASIDE):
                continue  # a row may set how it is logged
            tries = list(itertools.islice(self._tries(key, values, distinct), TRIED))
            # A row's value may equal the default implied by its other keys: then another value must make a difference.
            tries += [(run, self._changed(run, key, value)) for run in in_rows for value in _others(run, key)]
            if tries and not any(self._differ(one, other) for one, other in tries):
                yield self._dead(key, tries[0])

    def _build(self, run: PlannedRun) -> None:
        """Check that a run can be built. Raises UserError naming its row."""
        try:
            self.prints.whole(run.recipe)
        except UserError as error:
            raise UserError(f"row {run.member.row!r}: {error}") from None

    def _tries(
        self, key: str, values: Sequence[Any], runs: Sequence[PlannedRun]
    ) -> Iterator[tuple[PlannedRun, PlannedRun | None]]:
        """Yield pairs of runs that differ only in one key; the second is None if it would not be a valid recipe."""
        for run in runs:
            mine = _value(run, key, self.study.base_values)
            for value in values:
                if not same(value, mine):
                    yield run, self._changed(run, key, value)

    def _changed(self, run: PlannedRun, key: str, value: Any) -> PlannedRun | None:
        changes = {name: item for name, item in run.changes.items() if name != key}
        if not same(value, self.study.base_values.get(key)):
            changes[key] = LocatedValue(value, run.changes[key].place if key in run.changes else STUDY)
        try:
            return self.study.run(run.member.row, changes)
        except RecipeError:
            return None

    def _differ(self, one: PlannedRun, other: PlannedRun | None) -> bool:
        """Return whether two runs train differently; a key that makes a recipe invalid has an effect too."""
        if other is None:
            return True
        try:
            return self.prints.differ(one.recipe, _with_seed(other.recipe, one.recipe))
        except UserError:
            return True

    def _dead(self, key: str, pair: tuple[PlannedRun, PlannedRun | None], where: str = "") -> IneffectiveParameter:
        one, other = pair
        assert other is not None, "an invalid recipe counts as different"
        values = _value(one, key, self.study.base_values), _value(other, key, self.study.base_values)
        places = [run.changes[key].place for run in (one, other) if key in run.changes]
        return IneffectiveParameter(key, places[0] if places else STUDY, values, self._reason(key, pair), where)

    def _reason(self, key: str, runs: Iterable[PlannedRun | None]) -> str:
        """Return the warning of the recipe's checks about the key, if any."""
        for run in runs:
            if run is not None:
                for warning in run.loaded.warnings:
                    if dotted(warning.path) == key:
                        return warning.message.removeprefix(f"{key}: ")
        return ""

    def duplicate_runs(
        self, runs: Sequence[PlannedRun], known: set[str]
    ) -> tuple[list[IneffectiveParameter], list[str]]:
        """Find equivalent runs whose recipes differ. Return the grid and zip keys without effect there, and messages.

        ``known``: keys without effect anywhere, which are reported already.
        """
        distinct = list({_mark(run.changes): run for run in runs}.values())
        dead: dict[str, IneffectiveParameter] = {}
        remarks = []
        for group in self.prints.groups([run.recipe for run in distinct]):
            alike = [distinct[index] for index in group]
            one, other = alike[:2]
            idle = [key for key in one.changes if self._is_idle(key, one, alike, distinct)]
            for key in idle:
                if key not in known:
                    dead.setdefault(key, self._dead(key, (one, other), f"in the row {one.member.row!r}"))
            if not idle:
                remarks.append(f"rows {one.member.row!r} and {other.member.row!r} train identically")
        return list(dead.values()), remarks

    def _is_idle(self, key: str, one: PlannedRun, alike: Sequence[PlannedRun], runs: Sequence[PlannedRun]) -> bool:
        """Return whether all runs that differ from ``one`` only in this key are equivalent to it."""
        if _form(one, key) == "rows":
            return False
        rest = _mark(one.changes, without=key)
        siblings = [run for run in runs if key in run.changes and _mark(run.changes, without=key) == rest]
        return len(siblings) > 1 and all(run in alike for run in siblings)

    # -- a space that is searched -------------------------------------------------------------------------------------

    def ineffective_search_keys(self) -> Iterator[IneffectiveParameter]:
        """Yield keys without effect in some combination of the space's choices in which they are active."""
        space = self.study.space
        choices = [parameter for parameter in space.parameters if parameter.kind == "choice"]
        told: set[str] = set()
        for context in _contexts(choices):
            low = _lowest(space, context)
            one = self._drawn(low)
            for parameter in space.parameters:
                if parameter.key in told or parameter.key not in low or parameter.kind == "choice":
                    continue
                other = self._drawn(low | {parameter.key: parameter.values[-1]})
                if not self._differ(one, other):
                    told.add(parameter.key)
                    where = ", ".join(f"{key} = {toml_value(low[key])}" for key in context if key in low)
                    yield self._dead(parameter.key, (one, other), f"where {where}" if where else "")
        for parameter in choices:
            if not self._choice_counts(space, parameter, choices):
                yield IneffectiveParameter(
                    parameter.key, _place(parameter.key), (parameter.values[0], parameter.values[-1]), ""
                )

    def _choice_counts(self, space: SearchSpace, choice: SearchParameter, choices: Sequence[SearchParameter]) -> bool:
        """Return whether any option of a choice differs from the first one in some context."""
        for context in _contexts([parameter for parameter in choices if parameter.key != choice.key]):
            runs = [self._drawn(_lowest(space, {**context, choice.key: value})) for value in choice.values]
            if any(self._differ(runs[0], run) for run in runs[1:]):
                return True
        return False

    def _drawn(self, changes: Mapping[str, Any]) -> PlannedRun:
        """Build a configuration's run and check that it can be trained. Raises RecipeError or UserError naming it."""
        run = self.study.drawn(changes)
        self._build(run)
        return run


def _lowest(space: SearchSpace, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with these choices and the lower end of every range."""
    return space.configuration(lambda parameter: chosen.get(parameter.key, parameter.values[0]))


def _contexts(choices: Sequence[SearchParameter]) -> list[dict[str, Any]]:
    """Return combinations of the options of all choices; a random sample if there are too many."""
    options = [parameter.values for parameter in choices]
    keys = [parameter.key for parameter in choices]
    count = 1
    for values in options:
        count *= len(values)
    if count <= CONTEXTS:
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*options)]
    draw = random.Random(0)
    return [{key: draw.choice(values) for key, values in zip(keys, options, strict=True)} for _ in range(CONTEXTS)]


def _place(key: str) -> KeyPath:
    return (*STUDY, "space", *key.split("."))


def _mark(changes: ParameterSet, without: str = "") -> str:
    return repr({key: value.value for key, value in changes.items() if key != without})


def _varied(runs: Sequence[PlannedRun], base: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the keys that have more than one value over the runs, with these values."""
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.changes):
        values: list[Any] = []
        for run in runs:
            value = _value(run, key, base)
            if not any(same(value, known) for known in values):
                values.append(value)
        if len(values) > 1:
            found[key] = values
    return found


def _value(run: PlannedRun, key: str, base: Mapping[str, Any]) -> Any:
    return run.changes[key].value if key in run.changes else base.get(key)


def _others(run: PlannedRun, key: str) -> list[Any]:
    """Return other values than the run's: nearby numbers, the opposite, or the other options of a choice."""
    value = run.changes[key].value
    if isinstance(value, str):
        table, _, name = key.partition(".")
        field = getattr(Recipe.model_fields[table].annotation, "model_fields", {}).get(name)
        options = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
        return [option for option in options if option != value]
    if isinstance(value, bool):
        return [not value]
    return [value / 2, value * 2] if isinstance(value, float) else [value + 1] if isinstance(value, int) else []


def _form(run: PlannedRun, key: str) -> str:
    """Return the part of the study that sets a run's value: rows, grid, zip or space."""
    place = run.changes[key].place
    return str(place[1]) if len(place) > 1 else ""


def _with_seed(recipe: Recipe, like: Recipe) -> Recipe:
    return recipe.model_copy(update={"recipe": like.recipe})
