"""Check before a study starts that each varied key changes what is built.

A grid over a value that is never read yields a table of noise. (In the public notebook behind two published tables,
the grid varies the weight decay, but the optimizer is created with a constant.) Every key is therefore tested: two
runs that differ only in this key must differ in their data, transforms, model, optimizer or schedule, as built by
:mod:`toolkit.study.effective_config`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from toolkit.errors import UserError
from toolkit.recipe.diagnostics import Issue, RecipeError, dotted
from toolkit.recipe.load import located
from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_writer import toml_value
from toolkit.study.effective_config import EffectiveConfigs
from toolkit.study.expand import STUDY, ExpandedStudy, PlannedRun, StudySpec
from toolkit.study.grid import ParameterSet
from toolkit.study.search_space import LocatedValue, SearchParameter, SearchSpace, same

MAX_PAIRS = 24
"""Maximum number of pairs of runs compared before a key is reported to have no effect."""

NOT_TRAINED = ("tracking.", "checkpoint.", "expected_metrics.", "recipe.description", "train.log_every")
"""Prefixes of keys that do not affect training."""

MAX_CONTEXTS = 64
"""Maximum number of combinations of choices for which a search space is tested; if more exist, a sample is tested."""


def check_parameters_have_effect(study: StudySpec, expansion: ExpandedStudy) -> list[str]:
    """Raise RecipeError for varied keys without effect. Return messages about equivalent rows."""
    checker = _EffectChecker(study)
    messages: list[str] = []
    if study.table.bohb is not None:
        checker.check_space()
    else:
        distinct = list({_text(run.changes): run for run in expansion.runs}.values())
        checker.check_runs(distinct)
        messages = checker.check_duplicates(distinct)
    if checker.issues:
        raise RecipeError(located(checker.issues.values(), study.merged, study.path))
    return messages


class _EffectChecker:
    def __init__(self, study: StudySpec) -> None:
        self.study, self.configs = study, EffectiveConfigs()
        self.issues: dict[str, Issue] = {}
        """The reported issue of each key without effect."""

    # -- rows, grid, zip, random --------------------------------------------------------------------------------------

    def check_runs(self, runs: Sequence[PlannedRun]) -> None:
        """Report the keys whose values make no difference in any run."""
        for run in runs:
            self._build(run)
        for key, values in _varied(runs, self.study.base_values).items():
            in_rows = [run for run in runs if _source_table(run, key) == "rows"]
            if in_rows and key.startswith(NOT_TRAINED):
                continue  # a row may change logging
            pairs = list(itertools.islice(self._pairs(key, values, runs), MAX_PAIRS))
            # A row's value may equal the default implied by its other keys; then another value must make a difference.
            pairs += [(run, self._changed(run, key, value)) for run in in_rows for value in _other_values(run, key)]
            if pairs and not any(self._differ(*pair) for pair in pairs):
                self._report(key, pairs[0])

    def _build(self, run: PlannedRun) -> None:
        """Check that a run can be built. Raises UserError naming its row."""
        try:
            self.configs.check(run.recipe)
        except UserError as error:
            raise UserError(f"row {run.member.row!r}: {error}") from None

    def _pairs(
        self, key: str, values: Sequence[Any], runs: Sequence[PlannedRun]
    ) -> Iterator[tuple[PlannedRun, PlannedRun | None]]:
        """Yield pairs of runs that differ only in one key; the second is None if it would not be a valid recipe."""
        for run in runs:
            for value in values:
                if not same(value, self._value(run, key)):
                    yield run, self._changed(run, key, value)

    def _changed(self, run: PlannedRun, key: str, value: Any) -> PlannedRun | None:
        changes = {name: item for name, item in run.changes.items() if name != key}
        if not same(value, self.study.base_values.get(key)):
            changes[key] = LocatedValue(value, run.changes[key].key_path if key in run.changes else STUDY)
        try:
            return self.study.run(run.member.row, changes)
        except RecipeError:
            return None

    def _differ(self, one: PlannedRun, other: PlannedRun | None) -> bool:
        """Return whether two runs train differently; also True if the change makes the recipe invalid."""
        if other is None:
            return True
        try:
            return self.configs.differ(one.recipe, other.recipe.model_copy(update={"recipe": one.recipe.recipe}))
        except UserError:
            return True

    def _value(self, run: PlannedRun, key: str) -> Any:
        return run.changes[key].value if key in run.changes else self.study.base_values.get(key)

    def _report(
        self, key: str, pair: tuple[PlannedRun, PlannedRun | None], where: str = "", values: Sequence[Any] = ()
    ) -> None:
        """Report a key without effect, as seen on a pair of runs.

        ``where`` describes the runs without effect if the key has an effect in others. ``values`` are the key's values
        if the runs' changes do not contain them.
        """
        runs = [run for run in pair if run is not None]
        values = values or [self._value(run, key) for run in runs]
        one, other = (toml_value(value) if value is not None else "not set" for value in values)
        warnings = [
            warning.message.removeprefix(f"{key}: ")
            for run in runs
            for warning in run.loaded.warnings
            if dotted(warning.path) == key
        ]
        reason = warnings[0] if warnings else "data, model, optimizer and schedule are built the same"
        message = f"{key} varies ({one}, {other}), but changes nothing{where and ' '}{where}: {reason}"
        hint = "remove it from the study"
        if where:
            hint = f"vary it only when it has an effect: {key} = {{ values = [...], when = {{ ... }} }}"
        key_path = next((run.changes[key].key_path for run in runs if key in run.changes), STUDY)
        self.issues.setdefault(key, Issue(message, key_path, hint=hint, at="key"))

    def check_duplicates(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Report grid and zip keys without effect in some row. Return messages about other equivalent rows."""
        messages = []
        for group in self.configs.groups([run.recipe for run in runs]):
            alike = [runs[index] for index in group]
            one, other = alike[:2]
            without_effect = [key for key in one.changes if _has_no_effect(key, one, alike, runs)]
            for key in without_effect:
                self._report(key, (one, other), f"in the row {one.member.row!r}")
            if not without_effect:
                messages.append(f"rows {one.member.row!r} and {other.member.row!r} train identically")
        return messages

    # -- search space -------------------------------------------------------------------------------------------------

    def check_space(self) -> None:
        """Report each key of the search space that has no effect for some combination of choices."""
        space = self.study.space
        choices = [parameter for parameter in space.parameters if parameter.kind == "choice"]
        for context in _contexts(choices):
            lowest = _lowest(space, context)
            one = self._configuration_run(lowest)
            for parameter in space.parameters:
                key = parameter.key
                if key in lowest and parameter.kind != "choice" and key not in self.issues:
                    other = self._configuration_run(lowest | {key: parameter.values[-1]})
                    if not self._differ(one, other):
                        where = ", ".join(f"{name} = {toml_value(lowest[name])}" for name in context if name in lowest)
                        self._report(key, (one, other), where and f"when {where}")
        for choice in choices:
            self._check_choice(choice, [parameter for parameter in choices if parameter is not choice])

    def _check_choice(self, choice: SearchParameter, others: Sequence[SearchParameter]) -> None:
        """Report a choice if none of its options differs from the first one in any context."""
        runs: list[PlannedRun] = []
        for context in _contexts(others):
            runs = [
                self._configuration_run(_lowest(self.study.space, {**context, choice.key: value}))
                for value in choice.values
            ]
            if any(self._differ(runs[0], run) for run in runs[1:]):
                return
        self._report(choice.key, (runs[0], runs[-1]), values=(choice.values[0], choice.values[-1]))

    def _configuration_run(self, changes: Mapping[str, Any]) -> PlannedRun:
        """Build a configuration's run and check that it can be trained. Raises RecipeError or UserError naming it."""
        run = self.study.configuration_run(changes)
        self._build(run)
        return run


def _lowest(space: SearchSpace, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with these choices and the lower end of every range."""
    return space.configuration(lambda parameter: chosen.get(parameter.key, parameter.values[0]))


def _contexts(choices: Sequence[SearchParameter]) -> list[dict[str, Any]]:
    """Return the combinations of the options of all choices; if there are too many, a random sample of them."""
    options = [parameter.values for parameter in choices]
    keys = [parameter.key for parameter in choices]
    if math.prod(map(len, options)) <= MAX_CONTEXTS:
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*options)]
    draw = random.Random(0)
    return [{key: draw.choice(values) for key, values in zip(keys, options, strict=True)} for _ in range(MAX_CONTEXTS)]


def _text(changes: ParameterSet, without: str = "") -> str:
    return repr({key: value.value for key, value in changes.items() if key != without})


def _has_no_effect(key: str, one: PlannedRun, alike: Sequence[PlannedRun], runs: Sequence[PlannedRun]) -> bool:
    """Return whether all runs that differ from ``one`` only in this key are equivalent; never for keys of a row."""
    if _source_table(one, key) == "rows":
        return False
    rest = _text(one.changes, without=key)
    siblings = [run for run in runs if key in run.changes and _text(run.changes, without=key) == rest]
    return len(siblings) > 1 and all(run in alike for run in siblings)


def _varied(runs: Sequence[PlannedRun], base: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the keys that have more than one value over the runs, with these values."""
    found: dict[str, list[Any]] = {key: [] for run in runs for key in run.changes}
    for key, values in found.items():
        for run in runs:
            value = run.changes[key].value if key in run.changes else base.get(key)
            if not any(same(value, known) for known in values):
                values.append(value)
    return {key: values for key, values in found.items() if len(values) > 1}


def _other_values(run: PlannedRun, key: str) -> list[Any]:
    """Return values other than the run's: nearby numbers, the negated boolean, or the other options of a choice."""
    value = run.changes[key].value
    if isinstance(value, str):
        table, _, name = key.partition(".")
        field = getattr(Recipe.model_fields[table].annotation, "model_fields", {}).get(name)
        options = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
        return [option for option in options if option != value]
    if isinstance(value, bool):
        return [not value]
    return [value / 2, value * 2] if isinstance(value, float) else [value + 1] if isinstance(value, int) else []


def _source_table(run: PlannedRun, key: str) -> str:
    """Return the table of [study] that sets this key for a run: rows, grid, zip or space; empty if none does."""
    key_path = run.changes[key].key_path if key in run.changes else ()
    return str(key_path[1]) if len(key_path) > 1 else ""
