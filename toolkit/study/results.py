"""Results of a study: its runs, read from their run directories, grouped into rows or ranked as trials of a search.

Does not import torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.errors import UserError
from toolkit.metrics import best_of, higher_is_better, metrics_in
from toolkit.recipe.study_schema import StudyConfig
from toolkit.similar_names import did_you_mean
from toolkit.study.directory import FOLD, RunState, StudyDirectory, StudyRun, failure_of
from toolkit.study.grid import label
from toolkit.study.significance import MeanWithInterval, estimate
from toolkit.study.text_table import MISSING


@dataclass(frozen=True)
class RunResult:
    """One member of a study and the contents of its run directory."""

    member: StudyRun
    state: RunState
    metrics: dict[str, float] = field(default_factory=dict)
    """The metrics of the run (:func:`toolkit.metrics.metrics_in`); empty unless it is finished."""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """Records of the epochs trained so far, finished or not."""
    images: dict[str, int] = field(default_factory=dict)
    """Number of images per split."""
    failure_reason: str = ""
    """Why the run has no metrics, if known."""

    @property
    def is_finished(self) -> bool:
        """Whether the run is finished; only finished runs enter the metrics of a row."""
        return self.state == "finished"

    @property
    def title(self) -> str:
        """Row name, seed and fold."""
        return self.member.title

    def values(self, metric: str) -> list[float]:
        """Return a metric of metrics.jsonl after each epoch trained so far."""
        return [float(record[metric]) for record in self.epochs if metric in record]

    def best(self, metric: str, until: int | None = None) -> float | None:
        """Return the best value of a metric within ``until`` epochs (None: all); None if there is no value."""
        return best_of(self.values(metric)[:until], metric)


def read_results(folder: StudyDirectory) -> list[RunResult]:
    """Read the results of all members of a study, in table order."""
    return [read_result(folder, member) for member in folder.members]


def read_result(folder: StudyDirectory, member: StudyRun) -> RunResult:
    """Read the results of one member of a study; a run with damaged files counts as failed."""
    run = folder.run(member)
    try:
        state = folder.state(member)
        if run is None or state == "missing":
            return RunResult(member, "missing")
        epochs = run.epoch_records()
        if state != "finished":
            failure = failure_of(run) if state == "failed" else None
            return RunResult(member, state, epochs=epochs, failure_reason=failure.line if failure else "")
        summary = run.summary
        return RunResult(
            member,
            state,
            metrics_of(summary, epochs),
            epochs,
            {str(name): int(count) for name, count in summary.get("images", {}).items()},
        )
    except UserError as fault:
        return RunResult(member, "failed", failure_reason=str(fault).strip().splitlines()[0])
    except OSError as fault:
        return RunResult(
            member, "failed", failure_reason=f"{fault.filename or folder.path} cannot be read: {fault.strerror}"
        )


def metrics_of(summary: dict[str, Any], epochs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return all metrics of a finished run from its summary and its epoch records."""
    return {m.name: value for m in metrics_in(summary) if (value := m.read(summary, epochs)) is not None}


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultRow:
    """A row of the table: runs that differ only in seed and fold (or were grouped by keys), and their metrics."""

    name: str
    results: Sequence[RunResult]
    metrics: dict[str, MeanWithInterval]
    """Mean and interval of each metric over the finished runs."""
    is_best: bool = False

    @property
    def finished(self) -> list[RunResult]:
        """The finished runs; only these count in the metrics."""
        return [result for result in self.results if result.is_finished]

    @property
    def published(self) -> dict[str, float]:
        """Published metrics; empty if the runs have different ones."""
        first, *others = (result.member for result in self.results)
        values = (first.published, first.published_spread)
        return first.published if all((one.published, one.published_spread) == values for one in others) else {}

    @property
    def not_comparable(self) -> str:
        """Why the row's metrics cannot be compared with the published ones; empty if they can."""
        return next((result.member.not_comparable for result in self.results if result.member.not_comparable), "")

    @property
    def published_spread(self) -> dict[str, MeanWithInterval]:
        """The published metrics that are means over several runs."""
        spread = self.results[0].member.published_spread
        return {
            metric: MeanWithInterval(value, int(spread[metric]["n"]), spread[metric]["std"], None)
            for metric, value in self.published.items()
            if metric in spread
        }

    def measured(self, metric: str) -> float | None:
        """Return the mean of a metric; None if no finished run has it."""
        return self.metrics[metric].mean if metric in self.metrics else None

    @property
    def open(self) -> str:
        """States of the unfinished runs, as in ``1 failed, 2 missing``; for a single run, its state."""
        states = Counter(result.state for result in self.results if not result.is_finished)
        if len(self.results) == 1:
            return next(iter(states), "")
        return ", ".join(f"{count} {state}" for state, count in states.items())


def build_rows(results: Sequence[RunResult], table: StudyConfig, by: Sequence[str] = ()) -> list[ResultRow]:
    """Build the rows of a study in its order and mark the best. ``by``: group the runs by these recipe keys instead."""
    groups: dict[str, list[RunResult]] = {}
    name = _grouping(results, by)
    for result in results:
        groups.setdefault(name(result), []).append(result)
    rows = [ResultRow(name, group, _estimates(group, table.output.confidence)) for name, group in groups.items()]
    best = best_row(rows, table.output.best_by.replace("/", "_"))
    return [replace(row, is_best=row is best) for row in rows]


def best_row(rows: Sequence[ResultRow], metric: str) -> ResultRow | None:
    """Return the row with the best mean of a validation metric; None if no finished run has that metric.

    Ties in accuracy are broken by the validation loss, ties in loss by the accuracy, and remaining ties by order.
    """
    return min((r for r in rows if metric in r.metrics), key=lambda r: _rank(r, metric), default=None)


def best_first(rows: Sequence[ResultRow], metric: str) -> list[ResultRow]:
    """Sort rows by a validation metric, breaking ties as :func:`best_row` does; rows without it come last, in order."""
    metric = metric.replace("/", "_")
    return sorted(rows, key=lambda r: _rank(r, metric))


def _rank(row: ResultRow, metric: str) -> tuple[float, ...]:
    """Return a sort key that puts the best row first."""
    second = "val_accuracy" if metric == "val_loss" else "val_loss"
    return tuple(
        (-1 if higher_is_better(name) else 1) * row.metrics[name].mean if name in row.metrics else math.inf
        for name in (metric, second)
    )


def _estimates(group: Sequence[RunResult], confidence: float) -> dict[str, MeanWithInterval]:
    names = dict.fromkeys(name for result in group for name in result.metrics)
    values = {name: [r.metrics[name] for r in group if name in r.metrics] for name in names}
    return {name: estimate(found, confidence) for name, found in values.items()}


def _grouping(results: Sequence[RunResult], by: Sequence[str]) -> Callable[[RunResult], str]:
    """Return a function that returns the row name of a run."""
    if not by:
        return lambda result: result.member.row
    known = dict.fromkeys(["recipe.seed", *(key for result in results for key in result.member.changes)])
    for key in by:
        if key not in known:
            raise UserError(f"--by {key}: no run of the study varies it{nearest(key, known)}")

    def named(result: RunResult) -> str:
        values = {"recipe.seed": result.member.seed, **result.member.changes}
        return ", ".join(f"{short_key(key, by)} {short_value(values[key]) if key in values else MISSING}" for key in by)

    return named


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the closest known name, or with all known names if none is close."""
    return did_you_mean(name, known, prefix="; ", otherwise=f"; there are: {', '.join(known) or 'none'}")


def short_key(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a dotted key if it is unique among the keys, else the whole key."""
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in keys) == 1 else key


def short_value(value: Any) -> str:
    """Format a recipe value as a cell; numbers have four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else label(value)


# -- trials of a search -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialResult:
    """One configuration of a search."""

    trial: int
    """Index of the trial in the order of proposals, from 0."""
    result: RunResult
    value: float | None
    """The search metric at the best epoch; None for a configuration that has not been trained yet."""

    @property
    def epochs(self) -> int:
        """Number of epochs trained so far."""
        return len(self.result.epochs)

    def measured(self, metric: str) -> float | None:
        """Return a metric; None if the trial does not have it, or, except for the epochs, is not finished."""
        return float(self.epochs) if metric == "epochs" else self.result.metrics.get(metric)


def ranked_trials(results: Sequence[RunResult], metric: str) -> list[TrialResult]:
    """Rank all configurations, best first: by whether they are finished, then by epochs reached, then by ``metric``.

    Values after few and after many epochs are not comparable, so finished configurations come before unfinished ones.
    Failed ones come last.
    """
    found = [TrialResult(i, r, r.best(metric)) for i, r in enumerate(results)]
    sign = -1 if higher_is_better(metric) else 1

    def rank(outcome: TrialResult) -> tuple[bool, bool, int, float]:
        result = outcome.result
        value = math.inf if outcome.value is None else sign * outcome.value
        reached = 0 if result.is_finished else -outcome.epochs
        return result.state == "failed", not result.is_finished, reached, value

    return sorted(found, key=rank)


def varied_keys(results: Sequence[RunResult]) -> list[str]:
    """Return the keys set by any configuration, in order of appearance, without the fold."""
    return list(dict.fromkeys(key for result in results for key in result.member.changes if key != FOLD))
