"""Checks of [study] made before any run is expanded; one small function per rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from toolkit.metrics import metric_of
from toolkit.recipe.diagnostics import Issue
from toolkit.recipe.study_schema import StudyConfig
from toolkit.recipe.toml_positions import KeyPath
from toolkit.similar_names import did_you_mean
from toolkit.study.directory import FOLD, StudyRun
from toolkit.study.grid import MAX_COMBINATIONS, count_products, read_variables, uneven
from toolkit.study.search_space import (
    RANGES,
    SPACE,
    SearchParameter,
    check_conditions,
    conditions,
    dotted_leaves,
    read_parameters,
    same,
)

FORMS = ("rows", "grid", "zip", "seeds", "random", "bohb")
FIXED = {
    "recipe.name": "it is the study's name, which all its runs share",
    "recipe.run_root": "all runs of a study are in one directory",
    "recipe.seed": "give study.seeds = [0, 1, 2], so that the table has mean and standard deviation over them",
}
"""Keys that cannot vary, with the reason."""


def check_study(table: StudyConfig, given: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield all issues. ``given`` is the table as written in the file, ``base`` the recipe's values by dotted key."""
    yield from _something_is_varied(table, given)
    yield from _metrics_have_images(table, given, base)
    yield from _search_is_complete(table)
    yield from _row_names_are_unique(table)
    yield from _seeds_are_unique(table)
    grid, faults = read_variables(table.grid, ("study", "grid"))
    zip_, more = read_variables(table.zip, ("study", "zip"))
    yield from [*faults, *more]
    yield from _keys_are_varied_once(table, [*grid, *zip_])
    yield from _conditions_can_hold(table, grid, zip_, base)
    if not faults and not more:
        yield from _size_is_within_limit(table, grid, zip_)
    if table.space and (table.random or table.bohb):
        parameters, wrong = read_parameters(table.space)
        yield from wrong or check_conditions(parameters, base, SPACE)


def check_claims(table: StudyConfig, members: Sequence[StudyRun]) -> Iterator[Issue]:
    """Yield issues in the study's claims: unknown rows, runs or columns."""
    rows = list(dict.fromkeys(member.row for member in members))
    for number, claim in enumerate(table.claims):
        key_path: KeyPath = ("study", "claims", number)
        if table.bohb is not None or table.random is not None:
            yield Issue("study.claims: the rows of a search are not known in advance", key_path, at="key")
            return
        if claim.metric not in table.output.columns:
            hint = "add it to study.output.columns"
            yield Issue(f"study.claims: {claim.metric} is not a column of the table", (*key_path, "metric"), hint=hint)
        if isinstance(claim.better, str) and isinstance(claim.than, list):
            for name in (claim.better, *claim.than):
                if name not in rows:
                    key = "better" if name == claim.better else "than"
                    hint = did_you_mean(name, rows, otherwise=f"the rows are: {', '.join(rows)}")
                    yield Issue(f"study.claims: there is no row {name!r}", (*key_path, key), hint=hint)
            if claim.better in claim.than or rows == [claim.better]:
                yield Issue("study.claims: a row is compared with itself", (*key_path, "than"))
            continue
        for key, group in (("better", claim.better), ("than", claim.than)):
            if isinstance(group, dict) and not any(in_group(member, group) for member in members):
                yield Issue(f"study.claims: no run has the values of {key}", (*key_path, key))


def in_group(member: StudyRun, group: Mapping[str, Any]) -> bool:
    """Return whether the study sets these recipe keys to the given values for a run."""
    return all(
        key in member.changes and any(same(member.changes[key], value) for value in allowed)
        for key, allowed in conditions(group).items()
    )


def _something_is_varied(table: StudyConfig, given: Mapping[str, Any]) -> Iterator[Issue]:
    for form in ("rows", "grid", "zip", "space"):
        if form in given and not given[form]:
            yield Issue(f"study.{form} is empty, so there are no runs", ("study", form), at="key")
    if not any(form in given for form in (*FORMS, "space")):
        hint = 'for example [study.grid] with optimizer.lr = [0.1, 0.01], or [[study.rows]] with name = "..."'
        message = f"[study] varies nothing: set one or more of {', '.join(FORMS)}"
        yield Issue(message, ("study",), hint=hint, at="key")


def _metrics_have_images(table: StudyConfig, given: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield an issue for each metric named in [study] whose split is empty in all runs."""
    varied = {leaf.key for form in (table.grid, table.zip, table.space) for leaf in dotted_leaves(form, ())}
    varied |= {leaf.key for row in table.rows for leaf in dotted_leaves(row.set, ())}
    output = given.get("output", {})
    for split, short in (("validation", "val"), ("test", "test")):
        key = f"data.split.{split}"
        if base.get(key) != 0 or any(leaf == key or leaf.startswith(f"{key}.") for leaf in varied):
            continue
        named: list[tuple[KeyPath, str]] = []
        named += [(("study", "output", "columns", i), name) for i, name in enumerate(output.get("columns", []))]
        named += [(("study", "output", one), output[one]) for one in ("best_by", "per_epoch") if one in output]
        if table.bohb is not None:
            named.append((("study", "bohb", "metric"), table.bohb.metric))
        for path, metric in named:
            if metric_of(metric).split == short:
                message = f"{path[1]}.{path[2]}: no run has {metric}, since {key} = 0"
                yield Issue(f"study.{message}", path, hint=f"use a training metric, or give {key} another value")


def _search_is_complete(table: StudyConfig) -> Iterator[Issue]:
    searches = [name for name in ("random", "bohb") if getattr(table, name) is not None]
    if len(searches) == 2:
        yield Issue("study: give random or bohb, not both", ("study", "bohb"), at="key")
    if table.space and not searches:
        hint = "for example [study.random] with runs = 20, or [study.bohb] with trials = 30"
        yield Issue("study.space needs study.random or study.bohb, which sample from it", ("study", "space"), hint=hint)
    for name in searches:
        if not table.space:
            message = f"study.{name} needs [study.space] to sample from"
            hint = "for example optimizer.lr = { log_uniform = [1e-6, 1e-1] }"
            yield Issue(message, ("study", name), hint=hint, at="key")
        for form in ("rows", "grid", "zip", *(["seeds"] if name == "bohb" else [])):
            if getattr(table, form):
                message = f"study.{form} cannot be combined with study.{name}, which samples every run from study.space"
                yield Issue(message, ("study", form), at="key")


def _row_names_are_unique(table: StudyConfig) -> Iterator[Issue]:
    names = [row.name for row in table.rows]
    for number, name in enumerate(names):
        if not name.strip():
            yield Issue(f"study.rows[{number}].name is blank", ("study", "rows", number, "name"))
        elif name in names[:number]:
            message = f"study.rows[{number}].name: {name!r} is already the name of row {names.index(name)}"
            yield Issue(message, ("study", "rows", number, "name"))


def _seeds_are_unique(table: StudyConfig) -> Iterator[Issue]:
    seeds = table.seeds
    if isinstance(seeds, list) and len(set(seeds)) < len(seeds):
        yield Issue("study.seeds: duplicate seed", ("study", "seeds"))


def _keys_are_varied_once(table: StudyConfig, variables: list[SearchParameter]) -> Iterator[Issue]:
    varied = {variable.key: variable.key_path for variable in variables}
    for variable in variables:
        if varied[variable.key] != variable.key_path:
            yield Issue(f"{variable.key} varies in study.grid and in study.zip", variable.key_path, at="key")
    key_paths = [(v.key, v.key_path) for v in variables]
    key_paths += [(leaf.key, leaf.key_path) for leaf in dotted_leaves(table.space, ("study", "space"), RANGES)]
    for key, key_path in key_paths:
        if key == FOLD and key_path[1] == "space":
            text = f"{key} cannot be a search parameter: set one fold for all runs, or vary it in study.grid"
            yield Issue(text, key_path, at="key")
        if key in FIXED:
            yield Issue(f"{key} cannot vary: {FIXED[key]}", key_path, at="key")
        yield from _belongs_to_a_run(key, key_path)
    for number, row in enumerate(table.rows):
        for leaf in dotted_leaves(row.set, ("study", "rows", number, "set")):
            if not leaf.key.startswith("expected_metrics."):  # a row may have its own expected metrics
                yield from _belongs_to_a_run(leaf.key, leaf.key_path)
            if leaf.key in ("recipe.name", "recipe.run_root") or (leaf.key == "recipe.seed" and table.seeds):
                yield Issue(f"{leaf.key} cannot vary: {FIXED[leaf.key]}", leaf.key_path, at="key")
            if any(leaf.key == key or leaf.key.startswith(f"{key}.") for key in varied):
                message = (
                    f"{leaf.key} is set by the row {row.name!r} and varies in study.{_varying_table(leaf.key, varied)}"
                )
                yield Issue(message, leaf.key_path, at="key")


def _varying_table(key: str, varied: Mapping[str, KeyPath]) -> str:
    """Return the table that varies the key: ``grid`` or ``zip``."""
    return next(str(key_path[1]) for other, key_path in varied.items() if key == other or key.startswith(f"{other}."))


def _belongs_to_a_run(key: str, key_path: KeyPath) -> Iterator[Issue]:
    table = key.split(".")[0]
    if table in ("study", "slurm", "extends", "expected_metrics"):
        yield Issue(f"{key} cannot vary: [{table}] is not part of a run", key_path, at="key")


def _conditions_can_hold(
    table: StudyConfig, grid: list[SearchParameter], zip_: list[SearchParameter], base: Mapping[str, Any]
) -> Iterator[Issue]:
    rows = [leaf.key for row in table.rows for leaf in dotted_leaves(row.set, ())]
    known = [*(v.key for v in zip_), *rows, *base]
    for variable in zip_:
        if variable.when:
            yield Issue(f"{variable.key}: a list in study.zip cannot have a condition", variable.key_path, at="key")
    yield from check_conditions(grid, known, ("study", "grid"))
    known += [v.key for v in grid]
    for number, item in enumerate(table.published):
        for key in conditions(item.where):
            if key not in known:
                key_path: KeyPath = ("study", "published", number, "where")
                hint = did_you_mean(key, known)
                yield Issue(f"study.published[{number}].where: no such key {key}", key_path, hint=hint)


def _size_is_within_limit(
    table: StudyConfig, grid: list[SearchParameter], zip_: list[SearchParameter]
) -> Iterator[Issue]:
    wrong = uneven(zip_)
    if wrong:
        yield wrong
        return
    steps = len(zip_[0].values) if zip_ else 1
    seeds = table.seeds if isinstance(table.seeds, int) else len(table.seeds or [1])
    count = max(1, len(table.rows)) * steps * count_products(grid) * seeds
    if count > MAX_COMBINATIONS:
        message = f"study: {count:,} combinations; the limit is {MAX_COMBINATIONS:,}"
        yield Issue(message, ("study", "grid"), hint="shorten the lists, or search: [study.random]", at="key")
