"""The runs of a study whose weights can be averaged. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError
from toolkit.formatting import plural
from toolkit.metrics import higher_is_better, metric_of
from toolkit.recipe import Recipe
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory
from toolkit.study.results import RunResult, nearest, read_results

HARMLESS = {"weights", "weights_key", "dropout", "init", "init_std"}
"""Keys of [model] that change neither the parameters of a model nor its output in evaluation."""

SHOWN = 4
"""Maximum number of rows that a message lists for each group of runs."""


@dataclass(frozen=True)
class SoupMember:
    """A finished run whose weights may enter a soup."""

    run: Run
    recipe: Recipe
    result: RunResult

    @property
    def title(self) -> str:
        """Row name, seed and fold."""
        return self.result.title

    def rank(self, metric: str) -> tuple[float, float]:
        """Return a sort key by a validation metric, best first; ties are broken as between rows of a table."""
        first, second = metric_of(metric).name, "val_accuracy" if metric_of(metric).name == "val_loss" else "val_loss"
        value, other = (
            self.result.metrics.get(name, float("-inf") if higher_is_better(name) else float("inf"))
            for name in (first, second)
        )
        return (
            -value if higher_is_better(first) else value,
            -other if higher_is_better(second) else other,
        )


def find_members(folder: StudyDirectory, rows: Sequence[str], log: Callable[[str], None]) -> list[SoupMember]:
    """Return the finished runs of a study (only of ``rows``, if given), best first by its output.best_by.

    Runs without weights are left out with a warning. Raises UserError if fewer than two runs are left, or if they
    differ in architecture, classes, split or preprocessing.
    """
    results = _chosen(read_results(folder), rows)
    finished = {result.member.run: result for result in results if result.is_finished}
    if not finished:
        raise UserError(f"no run of {folder.path} has finished, so there are no weights to average")
    runs = {name: Run(folder.path / name) for name in finished if name is not None}
    deleted = [finished[name].title for name, run in runs.items() if not run.best_weights.is_file()]
    if len(deleted) == len(runs):
        raise UserError(
            f"the finished runs of {folder.path} no longer have weights (checkpoints/best.safetensors): restore them"
        )
    if deleted:
        log(
            f"warning: left out {plural(len(deleted), 'run')} without weights (checkpoints/best.safetensors): "
            f"{_listed(deleted)}"
        )
    members = [
        SoupMember(run, run.recipe, finished[name]) for name, run in runs.items() if finished[name].title not in deleted
    ]
    if len(members) == 1:
        raise UserError(
            f"only one finished run of {folder.path} has weights ({members[0].title}): there is nothing to average"
        )
    _check_alike(members)
    if any(member.recipe.transfer.mode == "knn" for member in members):
        raise UserError('k-nearest-neighbor classifiers (transfer.mode = "knn") have no weights that could be averaged')
    if any(member.recipe.transfer.refit for member in members):
        raise UserError(
            "a soup is evaluated on validation images, but these runs were also trained on them (transfer.refit = true)"
        )
    if any(not member.run.split["validation"] for member in members):
        raise UserError("a soup is evaluated on validation images, but these runs have none (data.split.validation)")
    if warning := different_starts(members):
        log(f"warning: {warning}")
    metric = folder.table.output.best_by
    return sorted(members, key=lambda member: member.rank(metric))


def _chosen(results: list[RunResult], rows: Sequence[str]) -> list[RunResult]:
    known = dict.fromkeys(result.member.row for result in results)
    for row in rows:
        if row not in known:
            raise UserError(f"--row {row!r}: the study has no such row{nearest(row, known)}")
    return [result for result in results if not rows or result.member.row in rows]


def _check_alike(members: Sequence[SoupMember]) -> None:
    """Raise UserError unless the members have the same architecture, classes, split and preprocessing."""
    facts = [_facts(member) for member in members]
    for name in facts[0]:
        groups: dict[str, list[str]] = {}
        for member, fact in zip(members, facts, strict=True):
            groups.setdefault(fact[name], []).append(member.result.member.row)
        if len(groups) > 1:
            rows = [_listed(list(dict.fromkeys(group))) for group in groups.values()]
            named = zip(groups, rows, strict=True) if name == "model.name" else enumerate(rows, 1)
            raise UserError(
                f"a soup averages the weights of one architecture, trained on one split of the data, but the finished "
                f"runs differ in {name} ({'; '.join(f'{key}: {listed}' for key, listed in named)}). Choose rows that "
                "share it with --row"
            )


def _facts(member: SoupMember) -> dict[str, str]:
    """Return everything that must be equal in all members, by its name in messages."""
    card = member.run.model_card
    table = _without(card["model"], HARMLESS)
    return {
        "model.name": f"{table.get('source')} {table.get('name')}",
        "the other keys of [model]": _text(table),
        "their classes": _text(card["classes"]),
        "the kind of task": _text((card.get("task") or {}).get("kind", "single_label")),
        "the split of the data": str(member.run.split["hash"]),
        "the preprocessing of evaluated images": _text([card["preprocessing"], card.get("transforms", [])]),
    }


def _without(value: Any, keys: set[str]) -> Any:
    """Return a JSON value without entries of these names, at any depth."""
    if isinstance(value, dict):
        return {name: _without(each, keys) for name, each in value.items() if name not in keys}
    return [_without(each, keys) for each in value] if isinstance(value, list) else value


def different_starts(members: Sequence[SoupMember]) -> str:
    """Return a warning if the members were not trained from the same initial weights, else ""."""
    weights = {(m.recipe.model.weights, m.recipe.model.weights_key) for m in members}
    seeds = {member.recipe.recipe.seed for member in members if member.recipe.model.weights == "none"}
    if len(weights) == 1 and len(seeds) < 2:
        return ""
    what = "model.weights" if len(weights) > 1 else "random initial weights (recipe.seed, with no pretrained weights)"
    return (
        f"the runs were trained from different {what}. The average of such weights is usually much worse than each of "
        "them; averaging needs runs from the same initial weights (Neyshabur et al. 2020, arXiv:2008.11687)"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)})" if len(names) > SHOWN else "")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
