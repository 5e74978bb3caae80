"""Table of a search: one row per configuration, with its epochs and results, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.metrics import METRICS, best_of, higher_is_better, metric_of
from toolkit.recipe.study_schema import StudyConfig
from toolkit.study.results import RunResult
from toolkit.study.results_table import MISSING, number, short_key, short_value, title
from toolkit.study.text_table import TextTable


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


def search_metric(table: StudyConfig) -> str:
    """Return the metric that BOHB optimizes; for other studies, output.best_by."""
    return table.bohb.metric if table.bohb else table.output.best_by


def outcomes(results: Sequence[RunResult], table: StudyConfig) -> list[TrialResult]:
    """Rank all configurations, best first: by whether they are finished, then by epochs reached, then by value.

    Values after few and after many epochs are not comparable, so finished configurations come before unfinished ones.
    Failed ones come last.
    """
    metric = search_metric(table)
    found = [TrialResult(i, r, best_of(r.values(metric), metric)) for i, r in enumerate(results)]
    sign = -1 if higher_is_better(metric) else 1

    def rank(outcome: TrialResult) -> tuple[bool, bool, int, float, int]:
        result = outcome.result
        value = float("inf") if outcome.value is None else sign * outcome.value
        reached = 0 if result.is_finished else -outcome.epochs
        return result.state == "failed", not result.is_finished, reached, value, outcome.trial

    return sorted(found, key=rank)


def varied_keys(results: Sequence[RunResult]) -> list[str]:
    """Return the keys set by any configuration, in order of appearance."""
    return list(dict.fromkeys(key for result in results for key in result.member.changes))


def build_trial_table(found: Sequence[TrialResult], table: StudyConfig, name: str, columns: Sequence[str]) -> TextTable:
    """Build the table of trials. ``columns``: metrics of finished runs, in addition to the search metric."""
    metric = search_metric(table)
    sought = metric_of(metric).name
    keys = varied_keys([outcome.result for outcome in found])
    shown = [column for column in columns if column not in (sought, "epochs")]
    head = ["trial", *(short_key(key, keys) for key in keys), "state", "epochs", METRICS[sought].heading]
    cells = []
    for outcome in found:
        result = outcome.result
        changes = result.member.changes
        value = MISSING if outcome.value is None else number(sought, outcome.value)
        cells.append(
            [str(outcome.trial), *(short_value(changes[k]) if k in changes else MISSING for k in keys),
             result.state, str(outcome.epochs), value,
             *(number(c, result.metrics[c]) if c in result.metrics else MISSING for c in shown)]
        )  # fmt: skip
    best = frozenset({0} if found and found[0].result.is_finished else ())
    state = len(keys) + 1
    return TextTable(
        title(table, name), [*head, *(METRICS[c].heading for c in shown)], cells, best, _notes(found, table),
        frozenset({0, state}),
    )  # fmt: skip


def _notes(found: Sequence[TrialResult], table: StudyConfig) -> list[str]:
    finished = sum(outcome.result.is_finished for outcome in found)
    spent = sum(outcome.epochs for outcome in found)
    notes = [
        f"{len(found)} configurations, {finished} trained to the end; {spent:,} epochs trained in all.",
        f"Ordered by the epochs reached, then by {search_metric(table)} of the best epoch; never by a test metric.",
        "One run per configuration: differences may be due to chance; train the best ones with several seeds.",
    ]
    notes += [table.note] if table.note else []
    return notes + [
        f"Trial {o.trial}: {o.result.state}: {o.result.failure_reason}" for o in found if o.result.failure_reason
    ]


def trial_records(found: Sequence[TrialResult], table: StudyConfig, columns: Sequence[str]) -> list[dict[str, object]]:
    """Return one record per trial, best first."""
    keys = varied_keys([outcome.result for outcome in found])
    return [
        {
            "trial": outcome.trial,
            **{key: outcome.result.member.changes.get(key) for key in keys},
            "state": outcome.result.state,
            "epochs": outcome.epochs,
            search_metric(table): outcome.value,
            **{column: outcome.result.metrics.get(column) for column in columns if column != "epochs"},
            "run": outcome.result.member.run,
        }
        for outcome in found
    ]
