"""Expansion of a study's file into its runs: rows x zip x grid x seeds, each with a complete, validated recipe.

Does not import torch. All errors of all runs are reported at once, at their positions in the study's file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.expectations import different_conditions
from toolkit.recipe.diagnostics import Diagnostic, RecipeError
from toolkit.recipe.layers import ConfigLayer, LayeredConfig
from toolkit.recipe.load import LoadedRecipe, located, read_sources, resolve
from toolkit.recipe.resolve import leaves, recipe_hash, with_defaults
from toolkit.recipe.schema import Recipe
from toolkit.recipe.study_schema import PublishedMean, PublishedMetrics, PublishedResults, StudyConfig, StudyRow
from toolkit.recipe.task_checks import unknown_metrics
from toolkit.recipe.toml_positions import KeyPath, Span
from toolkit.recipe.validation import validate
from toolkit.study.directory import FOLD, StudyRun
from toolkit.study.grid import ParameterSet, RowNamer, nested, products, read_variables, zipped
from toolkit.study.search_space import (
    LocatedValue,
    SearchSpace,
    conditions,
    dotted_leaves,
    random_configurations,
    read_space,
    same,
)
from toolkit.study.validation import check_claims, check_study

STUDY: KeyPath = ("study",)
NOT_A_CHANGE = ("recipe.seed", "expected_metrics.")
"""Prefixes of keys that do not change the experiment: [expected_metrics] also applies to rows that set only these."""


@dataclass(frozen=True)
class PlannedRun:
    """A member of a study with its complete recipe."""

    member: StudyRun
    loaded: LoadedRecipe
    changes: ParameterSet
    """The values that the study changes for this run, with their positions in the study's file."""

    @property
    def recipe(self) -> Recipe:
        """The resolved and validated recipe, without [study]."""
        return self.loaded.recipe


@dataclass
class ExpandedStudy:
    """The runs of a study, in table order."""

    runs: list[PlannedRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Messages to the user, for example about duplicate runs."""
    warnings: list[Diagnostic] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of distinct runs."""
        return len({run.member.hash for run in self.runs})


@dataclass(frozen=True)
class StudySpec:
    """A study as defined by its file: ``merged`` is the recipe with [study], ``sources`` are its layers without it.

    [expected_metrics] applies to one recipe. It is omitted from ``sources`` if it is inherited; the file's own table
    applies to runs that change only the seed; and a row may have its own.
    """

    path: str
    sources: list[ConfigLayer]
    merged: LayeredConfig
    table: StudyConfig
    base: Recipe
    """The recipe that the runs change; keys that every run sets may have placeholder values."""
    stating: int | None = None
    """Number of ``sources`` up to and including the last one with published metrics; None: all."""

    @property
    def name(self) -> str:
        """Name of the study and of the recipe of all its runs."""
        return self.base.recipe.name

    @property
    def folder(self) -> Path:
        """The study's directory."""
        return Path(self.base.recipe.run_root) / self.name

    @cached_property
    def base_values(self) -> dict[str, Any]:
        """Values of the base recipe by dotted key; None if a key is not set."""
        content = self.base.model_copy(update={"study": None}).model_dump()
        return {".".join(str(part) for part in path): value for path, value in leaves(content)}

    def run(self, row: str, changes: ParameterSet, seed: LocatedValue | None = None) -> PlannedRun:
        """Build one run. Raises RecipeError."""
        counted = {key: value.value for key, value in changes.items() if not key.startswith(NOT_A_CHANGE)}
        layers = (self._source(key, value) for key, value in changes.items())
        sources = [*(_without(self.sources, "expected_metrics") if counted else self.sources), *layers]
        if seed is not None:
            sources.append(self._source("recipe.seed", seed))
        if self.table.bohb is not None:
            epochs = LocatedValue(self.table.bohb.max_epochs, (*STUDY, "bohb", "max_epochs"))
            sources.append(self._source("train.epochs", epochs))
        loaded = resolve(sources, self.path)
        member = StudyRun(row, loaded.recipe.recipe.seed, counted, recipe_hash(loaded.recipe))
        return PlannedRun(member, loaded, changes)

    @cached_property
    def space(self) -> SearchSpace:
        """The search space."""
        return read_space(self.table.space, self.base_values)

    def configuration_run(self, changes: Mapping[str, Any], seed: LocatedValue | None = None) -> PlannedRun:
        """Build the run of a configuration of the search space; its row is named by the values. Raises RecipeError."""
        key_paths = {parameter.key: parameter.key_path for parameter in self.space.parameters}
        values = {key: LocatedValue(value, key_paths[key]) for key, value in changes.items()}
        return self.run(RowNamer(self.space.parameters).plain(values), values, seed)

    def _source(self, key: str, value: LocatedValue) -> ConfigLayer:
        """Return one changed value as an additional layer of the recipe, with its position in the study's file."""
        origin = self.merged.origin(value.key_path) or self.sources[-1]
        path, depth = tuple(key.split(".")), len(value.key_path)
        spans = {
            (*path, *key_path[depth:]): span
            for key_path, span in origin.spans.items()
            if key_path[:depth] == value.key_path
        }
        here = _nearest(origin, value.key_path)
        named = _nearest(origin, tuple(part for part in value.key_path if isinstance(part, str))) or here
        spans |= {path[:n]: Span(named.key, named.key) for n in range(1, len(path))}
        spans[path] = Span(named.key, here.value)
        return ConfigLayer(origin.name, origin.text, nested(key, value.value), spans, origin.note)


def _nearest(origin: ConfigLayer, key_path: KeyPath) -> Span:
    """Return the span of ``key_path``, or of the innermost enclosing entry that has one."""
    while key_path and key_path not in origin.spans:
        key_path = key_path[:-1]
    return origin.spans.get(key_path) or Span(0, 0)


def is_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> bool:
    """Return whether a file, or its overrides, contain a [study] table. Raises RecipeError if it cannot be read."""
    return any("study" in source.data for source in read_sources(path, overrides))


def read_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> StudySpec:
    """Read a study's file and check its [study] table. Raises RecipeError with all errors in that table."""
    sources = read_sources(path, overrides)
    name = os.fspath(path)
    merged = LayeredConfig()
    for source in sources:
        merged.add(source)
    if "study" not in merged.data:
        message = f"{name} has no [study] table: it is one run. To train it: toolkit train {name}"
        raise RecipeError([Diagnostic("error", message)])
    result = validate(merged.data)
    # Other errors in the recipe are reported for its runs, which may set missing keys.
    issues = [item for item in result.issues if item.path[:1] in (STUDY, ("recipe",))]
    recipe = result.recipe
    if issues or recipe is None or recipe.study is None:
        raise RecipeError(located(issues or result.issues, merged, name))
    inherited, own = [s for s in sources if s.note], [s for s in sources if not s.note]
    bare = [*_without(inherited, "study", "expected_metrics"), *_without(own, "study")]
    last = max(
        (n for n, s in enumerate(sources, 1) if {"rows", "published"} & s.data.get("study", {}).keys()), default=0
    )
    study = StudySpec(name, bare, merged, recipe.study, with_defaults(recipe), last or None)
    issues_in_study = list(check_study(study.table, merged.data["study"], study.base_values))
    issues_in_study += [issue for issue in unknown_metrics(study.base) if issue.path[:1] == STUDY]
    if issues_in_study:
        raise RecipeError(located(issues_in_study, merged, name))
    return study


def _without(sources: Iterable[ConfigLayer], *tables: str) -> list[ConfigLayer]:
    return [replace(s, data={key: value for key, value in s.data.items() if key not in tables}) for s in sources]


def expand(study: StudySpec) -> ExpandedStudy:
    """Return all runs defined by the file; none for bohb, whose runs are created during the search.

    Raises RecipeError with all errors of all runs.
    """
    found = ExpandedStudy()
    errors: dict[tuple[str, str], Diagnostic] = {}
    warnings: dict[tuple[str, str], Diagnostic] = {}
    for row, name, changes in () if study.table.bohb else _rows(study):
        for seed in _seeds(study):
            try:
                run = study.run(name, changes, seed)
            except RecipeError as error:
                _add_new(errors, error.diagnostics, name)
                break  # other seeds have the same errors
            found.runs.append(_with_published(run, study, row, _not_comparable(study, run, seed)))
            _add_new(warnings, run.loaded.warnings, name)
    if errors:
        raise RecipeError(list(errors.values()))
    issues_in_claims = list(check_claims(study.table, [run.member for run in found.runs]))
    if issues_in_claims:
        raise RecipeError(located(issues_in_claims, study.merged, study.path))
    found.warnings = list(warnings.values())
    found.runs, found.notes = _without_duplicates(found.runs)
    changed = any(run.member.changes for run in found.runs) or study.table.bohb
    if changed and any("expected_metrics" in source.data for source in study.sources):
        found.notes.append(
            "[expected_metrics] describes the unchanged recipe; runs that change it are not compared with it"
        )
    return found


def _add_new(known: dict[tuple[str, str], Diagnostic], items: Sequence[Diagnostic], row: str) -> None:
    """Add the diagnostics of a row that no earlier row has with the same message and location."""
    for item in items:
        new = replace(item, note=item.note or f"in the row {row!r}")
        known.setdefault((item.message, str(item.location)), new)


def _seeds(study: StudySpec) -> list[LocatedValue | None]:
    seeds, key_path = study.table.seeds, (*STUDY, "seeds")
    if seeds is None:
        return [None]
    if isinstance(seeds, int):
        first = study.base.recipe.seed
        return [LocatedValue(seed, key_path) for seed in range(first, first + seeds)]
    return [LocatedValue(seed, (*key_path, index)) for index, seed in enumerate(seeds)]


def _rows(study: StudySpec) -> Iterator[tuple[StudyRow | None, str, ParameterSet]]:
    """Yield each table row: the [[study.rows]] entry that it belongs to, its name, and its changes."""
    if study.table.random is not None:
        yield from ((None, name, changes) for name, changes in _random_rows(study))
        return
    grid, _ = read_variables(study.table.grid, (*STUDY, "grid"))
    zip_, _ = read_variables(study.table.zip, (*STUDY, "zip"))
    names = RowNamer(variable for variable in (*zip_, *grid) if variable.key != FOLD)
    for row, changes in _row_changes(study.table):
        for step in zipped(zip_):
            fixed = study.base_values | {key: value.value for key, value in (changes | step).items()}
            for point in products(grid, fixed):
                parts = [row.name if row else "", names.of(step), names.of(point)]
                yield row, ", ".join(filter(None, parts)) or study.name, changes | step | point


def _row_changes(table: StudyConfig) -> Iterator[tuple[StudyRow | None, ParameterSet]]:
    if not table.rows:
        yield None, {}
    for number, row in enumerate(table.rows):
        found = dotted_leaves(row.set, (*STUDY, "rows", number, "set"))
        yield row, {leaf.key: LocatedValue(leaf.value, leaf.key_path) for leaf in found}


def _random_rows(study: StudySpec) -> Iterator[tuple[str, ParameterSet]]:
    """Yield the row names and changes of a random search; unlike BOHB's, they are known before it starts."""
    assert study.table.random is not None
    for changes in random_configurations(study.space, study.table.random.runs, study.table.random.seed):
        run = study.configuration_run(changes)
        yield run.member.row, run.changes


def _with_published(run: PlannedRun, study: StudySpec, row: StudyRow | None, not_comparable: str) -> PlannedRun:
    """Return the run with its published metrics; those of its row take precedence over those of the study."""
    applicable = [item for item in study.table.published if _meets(item, run.recipe)]
    metrics: PublishedMetrics = {}
    for item in applicable:
        metrics |= item.metrics
    metrics |= row.published if row else {}
    sources = [row.source if row else "", *(item.source for item in applicable)]
    notes = [row.note if row else "", *(item.note for item in applicable)]
    several = {name: value for name, value in metrics.items() if isinstance(value, PublishedMean)}
    member = replace(
        run.member,
        published={name: value.mean if isinstance(value, PublishedMean) else value for name, value in metrics.items()},
        published_spread={name: {"std": value.std, "n": value.n} for name, value in several.items()},
        published_epochs=row.published_epochs if row else {},
        source=next(filter(None, sources), ""),
        note=" ".join(filter(None, notes)),
        not_comparable=not_comparable,
    )
    return replace(run, member=member)


def _not_comparable(study: StudySpec, run: PlannedRun, seed: LocatedValue | None) -> str:
    """Return why the run's metrics cannot be compared with the published ones; empty if they can.

    Published metrics apply to the recipe of the file that contains them; a file that extends it, or --set, may change
    the conditions. The reason is also returned for runs without published metrics, since claims compare them.
    """
    if study.table.not_comparable:
        return study.table.not_comparable
    stated = run.recipe
    if study.stating is not None and study.stating < len(study.sources):
        stating = replace(study, sources=study.sources[: study.stating])
        try:
            stated = stating.run(run.member.row, run.changes, seed).recipe
        except RecipeError:
            return "its recipe is incomplete without --set"
    return different_conditions(run.recipe, stated)


def _meets(published: PublishedResults, recipe: Recipe) -> bool:
    """Return whether a recipe has the values for which the metrics were published."""
    content = {".".join(str(part) for part in path): value for path, value in leaves(recipe.model_dump())}
    wanted = conditions(published.where)
    return all(any(same(content.get(key), value) for value in allowed) for key, allowed in wanted.items())


def _without_duplicates(runs: list[PlannedRun]) -> tuple[list[PlannedRun], list[str]]:
    """Merge duplicates: rows with the same recipe share a run, and a repeated row is dropped. Also return messages."""
    kept: list[PlannedRun] = []
    hashes: set[str] = set()
    first: dict[str, str] = {}
    messages: dict[str, None] = {}
    for run in runs:
        row = first.setdefault(run.member.hash, run.member.row)
        if row != run.member.row:
            messages[f"rows {row!r} and {run.member.row!r} are the same run, which is trained once"] = None
        elif run.member.hash in hashes:
            messages[f"row {row!r} appears twice; it is trained once"] = None
            continue
        kept.append(run)
        hashes.add(run.member.hash)
    return kept, list(messages)
