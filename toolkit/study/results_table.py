"""Results table of a study: one row per setting, with its metrics over the seeds and the published values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError
from toolkit.metrics import METRICS, higher_is_better, metric_of
from toolkit.recipe.study_schema import StudyConfig
from toolkit.similar_names import did_you_mean
from toolkit.study.directory import StudyRun
from toolkit.study.grid import label
from toolkit.study.results import RunResult
from toolkit.study.significance import MeanWithInterval, estimate, welch
from toolkit.study.text_table import DASH, MINUS, TextTable

MISSING = DASH
"""Shown in place of a missing metric."""


@dataclass(frozen=True)
class ResultRow:
    """A row of the table: runs that differ only in their seeds (or were grouped by keys), and their metrics."""

    name: str
    results: Sequence[RunResult]
    metrics: dict[str, MeanWithInterval]
    """Mean and interval of each metric over the finished runs."""
    is_best: bool = False

    @property
    def finished(self) -> list[RunResult]:
        """The finished runs; only these enter the metrics."""
        return [result for result in self.results if result.is_finished]

    @property
    def published(self) -> dict[str, float]:
        """Published metrics; empty if the runs have different ones."""
        first = self.results[0].member
        return first.published if all(_same_published(result.member, first) for result in self.results) else {}

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

    @property
    def open(self) -> str:
        """States of the unfinished runs, as in ``1 failed, 2 missing``; for a single run, its state."""
        states = Counter(result.state for result in self.results if not result.is_finished)
        if len(self.results) == 1:
            return next(iter(states), "")
        return ", ".join(f"{count} {state}" for state, count in states.items())


def _same_published(one: StudyRun, other: StudyRun) -> bool:
    return one.published == other.published and one.published_spread == other.published_spread


def build_rows(results: Sequence[RunResult], table: StudyConfig, by: Sequence[str] = ()) -> list[ResultRow]:
    """Build the rows of a study in its order and mark the best. ``by``: group the runs by these recipe keys instead."""
    groups: dict[str, list[RunResult]] = {}
    name = _grouping(results, by)
    for result in results:
        groups.setdefault(name(result), []).append(result)
    confidence = table.output.confidence
    rows = [ResultRow(name, group, _estimates(group, confidence)) for name, group in groups.items()]
    best = best_row(rows, table.output.best_by.replace("/", "_"))
    return [ResultRow(row.name, row.results, row.metrics, is_best=row is best) for row in rows]


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
    values = {metric: [r.metrics[metric] for r in group if metric in r.metrics] for metric in METRICS}
    return {metric: estimate(found, confidence) for metric, found in values.items() if found}


def _grouping(results: Sequence[RunResult], by: Sequence[str]) -> Callable[[RunResult], str]:
    """Return a function that maps a run to the name of its row."""
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


# -- table ------------------------------------------------------------------------------------------------------------


def check_columns(columns: Sequence[str]) -> None:
    """Raise UserError for an unknown metric."""
    for column in columns:
        if column not in METRICS:
            raise UserError(f"--columns {column}: there is no such metric{nearest(column, METRICS)}")


def build_results_table(
    rows: Sequence[ResultRow], table: StudyConfig, name: str, columns: Sequence[str], *, intervals: bool
) -> TextTable:
    """Build the text table of results. ``intervals``: show confidence intervals instead of standard deviations."""
    compared = {column for column in columns if any(column in row.published for row in rows)}
    several, unfinished = any(len(row.results) > 1 for row in rows), any(row.open for row in rows)
    head = ["setting", *(["runs"] if several else [])]
    published = ["published"] if table.not_comparable else ["published", "diff."]
    for column in columns:
        head += [METRICS[column].heading, *(published if column in compared else [])]
    head += ["open"] if unfinished else []
    cells = []
    for row in rows:
        line = [row.name, *([_count(row)] if several else [])]
        for column in columns:
            line += [_measured(row, column, intervals)]
            line += _published(row, column)[: len(published)] if column in compared else ()
        cells.append([*line, *([row.open] if unfinished else [])])
    marked = frozenset(index for index, row in enumerate(rows) if row.is_best)
    lines = notes(rows, table, compared=bool(compared), intervals=intervals)
    lines += [line for row in rows for column in columns for line in _against_several(row, column, table)]
    return TextTable(
        title(table, name), head, cells, marked, lines, frozenset({0, len(head) - 1} if unfinished else {0})
    )


def title(table: StudyConfig, name: str) -> str:
    """Return the title of a study's tables."""
    return table.description or name


def number(metric: str, value: float, *, signed: bool = False, mean: bool = False) -> str:
    """Format a metric for a cell; a mean of integers has one decimal."""
    shown = metric_of(metric).measure
    decimals = 1 if mean and not shown.decimals and value != int(value) else shown.decimals
    return f"{value * shown.scale:{'+' if signed else ''},.{decimals}f}".replace("-", MINUS)


def _measured(row: ResultRow, column: str, intervals: bool) -> str:
    found = row.metrics.get(column)
    if found is None:
        return MISSING
    mean = number(column, found.mean, mean=found.n > 1)
    if found.std is None or not METRICS[column].measure.varies:
        return mean
    if intervals:
        return f"{mean} {interval_text(column, found.interval, signed=False)}"
    return f"{mean} ± {number(column, found.std, mean=True)}"


def _published(row: ResultRow, column: str) -> tuple[str, str]:
    published, found = row.published.get(column), row.metrics.get(column)
    if published is None:
        return "", ""
    difference = number(column, found.mean - published, signed=True, mean=True) if found else MISSING
    if row.not_comparable:
        difference = f"not comparable: {row.not_comparable}"
    shown, several = number(column, published), row.published_spread.get(column)
    if several is not None and several.std is not None:
        shown += f" ± {number(column, several.std, mean=True)}"
    return shown, difference


def _against_several(row: ResultRow, column: str, table: StudyConfig) -> list[str]:
    """Return a note that compares a measured mean with a published mean over several runs, by Welch's t-test."""
    published, found = row.published_spread.get(column), row.metrics.get(column)
    if published is None or row.not_comparable:
        return []
    what = f"{row.name}, {METRICS[column].heading}: the published mean is over {published.n} runs"
    if found is None:
        return [f"{what}."]
    test = welch(found, published)
    if test is None:
        return [f"{what}; Welch's t-test needs at least two measured runs, and values that vary."]
    interval = interval_text(column, test.interval(table.output.confidence))
    return [
        f"{what}. Welch's t-test, measured {MINUS} published over {found.n} and {published.n} runs: "
        f"{number(column, test.difference, signed=True, mean=True)}, "
        f"{table.output.confidence * 100:g} % interval {interval}, p {p_value(test.p)}."
    ]


def interval_text(metric: str, interval: tuple[float, float] | None, *, signed: bool = True) -> str:
    """Format an interval of a metric, or of a difference of two, as a cell."""
    if interval is None:
        return MISSING
    low, high = (number(metric, end, signed=signed, mean=True) for end in interval)
    return f"[{low}, {high}]"


def p_value(p: float | None) -> str:
    """Format a p-value as a cell."""
    return MISSING if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _count(row: ResultRow) -> str:
    done, wanted = len(row.finished), len(row.results)
    return str(done) if done == wanted else f"{done} of {wanted}"


def notes(rows: Sequence[ResultRow], table: StudyConfig, *, compared: bool, intervals: bool) -> list[str]:
    """Return the notes below the table: finished runs, best row, spread over seeds, sources of published metrics."""
    results = [result for row in rows for result in row.results]
    finished = [result for result in results if result.is_finished]
    found = [f"{len(finished)} of {len(results)} runs finished; only these are counted."]
    if any(row.is_best for row in rows):
        so_far = "" if len(finished) == len(results) else " so far"
        best = next(row.name for row in rows if row.is_best)
        found.append(f"Best{so_far} by {table.output.best_by} (never by a test metric): {best}.")
    found += _about_spread(rows, table.output.confidence, intervals)
    if compared and table.not_comparable:
        found.append(f"Published: {table.source or 'see the study'}. Not comparable: {table.not_comparable}.")
    elif compared:
        found.append(f"Published: {table.source or 'see the study'}; diff.: measured {MINUS} published.")
    if table.note:
        found.append(table.note)
    members = {row.name: row.results[0].member for row in rows}
    for note in dict.fromkeys(member.note for member in members.values() if member.note):
        found.append(f"{'; '.join(name for name, member in members.items() if member.note == note)}: {note}")
    found += [f"{name}: published in {m.source}." for name, m in members.items() if m.source not in ("", table.source)]
    return found + [
        f"{r.member.row}, seed {r.member.seed}: {r.state}: {r.failure_reason}" for r in results if r.failure_reason
    ]


def _about_spread(rows: Sequence[ResultRow], confidence: float, intervals: bool) -> list[str]:
    most = max((len(row.finished) for row in rows), default=0)
    least = min((len(row.finished) for row in rows if row.finished), default=0)
    if most == 0:
        return []
    found = []
    if most > 1:
        what = (
            f"[{confidence * 100:g} % confidence interval, Student's t]"
            if intervals
            else f"± standard deviation (n {MINUS} 1)"
        )
        found.append(f"Mean {what} over the runs of a row.")
    if least == 1:
        which = "Rows with one run" if most > 1 else "One run per row"
        found.append(f"{which}: the spread over seeds is not known, so differences may be due to chance.")
    return found


# -- records ----------------------------------------------------------------------------------------------------------


def records(rows: Sequence[ResultRow], columns: Sequence[str]) -> list[dict[str, object]]:
    """Return one record per row; accuracies are fractions, not percentages, and missing metrics are None."""
    return [_record(row, columns) for row in rows]


def _record(row: ResultRow, columns: Sequence[str]) -> dict[str, object]:
    record: dict[str, object] = {
        "row": row.name,
        "runs": len(row.results),
        "finished": len(row.finished),
        "best": row.is_best,
        "open": row.open,
        **({"not_comparable": row.not_comparable} if row.published and row.not_comparable else {}),
    }
    for column in columns:
        found = row.metrics.get(column)
        low, high = (found.interval if found else None) or (None, None)
        record |= {
            column: found.mean if found else None,
            f"{column}_std": found.std if found else None,
            f"{column}_low": low,
            f"{column}_high": high,
        }
        if column in row.published:
            published = row.published[column]
            record[f"{column}_published"] = published
            record[f"{column}_difference"] = found.mean - published if found and not row.not_comparable else None
        several = row.published_spread.get(column)
        if several is not None:
            test = welch(found, several) if found and not row.not_comparable else None
            record |= {
                f"{column}_published_std": several.std,
                f"{column}_published_n": several.n,
                f"{column}_welch_p": test.p if test else None,
            }
    return record
