"""Per-epoch tables of a study: one column per row of the study, with x for epochs after a run's last one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from toolkit.metrics import higher_is_better, metric_of
from toolkit.recipe.study_schema import StudyConfig
from toolkit.study.results import ResultRow
from toolkit.study.study_results import StudyResults
from toolkit.study.text_table import BEST, DECLINE, MISSING, Column, TextTable, number

ENDED = "x"
"""Shown for epochs after a run's last one."""


def build_epoch_tables(found: StudyResults) -> list[TextTable]:
    """Build the per-epoch tables: for one metric, one with a column per row; for several, one per row of the study.

    Published metrics are shown in a second table, or in adjacent columns. Empty if no run is finished.
    """
    metrics = epoch_metrics(found)
    done = [row for row in found.rows if row.finished]
    if not done or not metrics:
        return []
    return _metric_tables(found, metrics[0]) if len(metrics) == 1 else [_row_table(found, row, metrics) for row in done]


def epoch_metrics(found: StudyResults) -> list[str]:
    """Return the metrics of the per-epoch tables: output.per_epoch and the published ones; empty without per_epoch."""
    wanted = found.table.output.per_epoch
    if not wanted or found.trials or found.options.by:
        return []
    published = [metric for result in found.results for metric in result.member.published_epochs]
    return list(dict.fromkeys([*sorted(published), wanted]))


def mean_by_epoch(row: ResultRow, metric: str) -> list[float]:
    """Return the per-epoch mean over a row's finished runs, up to the longest run."""
    curves = [result.values(metric) for result in row.finished]
    length = max((len(curve) for curve in curves), default=0)
    return [statistics.fmean(curve[i] for curve in curves if len(curve) > i) for i in range(length)]


def _metric_tables(found: StudyResults, metric: str) -> list[TextTable]:
    rows, caption = found.rows, f"{found.title}: {metric_of(metric).heading} by epoch"
    measured = {row.name: mean_by_epoch(row, metric) for row in rows}
    notes = _notes(rows, [row.name for row in rows if not row.finished])
    tables = [
        _marked_table(caption, measured, metric, notes, {row.name: row.measured("test_accuracy") for row in rows})
    ]
    published = {row.name: row.results[0].member.published_epochs.get(metric, []) for row in rows}
    if any(published.values()):
        test_accuracies = {row.name: row.published.get("test_accuracy") for row in rows}
        caption += ", as published"
        tables.append(_marked_table(caption, published, metric, _source(found.table), test_accuracies))
    return tables


def _marked_table(
    caption: str,
    curves: Mapping[str, Sequence[float]],
    metric: str,
    notes: Sequence[str],
    test_accuracies: Mapping[str, float | None],
) -> TextTable:
    """Build a table with a column per row, marking its best epoch and a decline after it, and test accuracies below.

    ``test_accuracies`` is each row's test accuracy as a fraction; None if there is none.
    """
    columns = _columns([(name, metric, curve) for name, curve in curves.items()])
    sign = 1 if higher_is_better(metric) else -1
    for (_, cells, _), curve in zip(columns[1:], curves.values(), strict=True):
        if not curve:
            continue
        best = max(range(len(curve)), key=lambda epoch: sign * curve[epoch])  # the earliest in case of ties
        cells[best] = f"{BEST}{cells[best]}"
        if best + 1 < len(curve) and sign * curve[best + 1] < sign * curve[best]:
            cells[best + 1] = f"{DECLINE}{cells[best + 1]}"
    if any(value is not None for value in test_accuracies.values()):
        last = [
            metric_of("test_accuracy").heading,
            *(number("test_accuracy", test_accuracies[name]) for name in curves),
        ]
        for (_, cells, _), cell in zip(columns, last, strict=True):
            cells.append(cell)
    legend = f"{BEST}: the best epoch of the column; {DECLINE}: the epoch after it, if it is worse."
    return TextTable.of_columns(caption, columns, notes=[legend, *notes])


def _row_table(found: StudyResults, row: ResultRow, metrics: Sequence[str]) -> TextTable:
    curves, published = [], row.results[0].member.published_epochs
    for metric in metrics:
        heading = metric_of(metric).heading
        curves.append((heading, metric, mean_by_epoch(row, metric)))
        if metric in published:
            curves.append((f"{heading}, published", metric, published[metric]))
    notes = [*_notes([row], []), *(_source(found.table) if published else [])]
    return TextTable.of_columns(f"{found.title}: {row.name}, by epoch", _columns(curves), notes=notes)


def _columns(curves: Sequence[tuple[str, str, Sequence[float]]]) -> list[Column]:
    """Return a column of epoch numbers and a column for each curve, given as (heading, metric, values)."""
    length = max(len(curve) for _, _, curve in curves)
    columns = [Column("epoch", [str(epoch + 1) for epoch in range(length)], is_left=True)]
    for heading, metric, curve in curves:
        missing = ENDED if curve else MISSING
        cells = [number(metric, value) for value in curve]
        columns.append(Column(heading, [*cells, *[missing] * (length - len(curve))]))
    return columns


def _notes(rows: Sequence[ResultRow], missing: Sequence[str]) -> list[str]:
    found = [f"{ENDED}: after the last epoch of the run."]
    if any(len(row.finished) > 1 for row in rows):
        found.append("Mean over the finished runs of a row; in each epoch, over the runs that reached it.")
    if missing:
        found.append(f"{MISSING}: no finished run: {', '.join(missing)}.")
    return found


def _source(table: StudyConfig) -> list[str]:
    return [f"Published: {table.source}."] if table.source else []


def epoch_records(rows: Sequence[ResultRow], metrics: Sequence[str]) -> list[dict[str, object]]:
    """Return one record per row and epoch: the means, and published metrics if there are any."""
    found: list[dict[str, object]] = []
    for row in rows:
        columns: dict[str, Sequence[float]] = {metric_of(metric).name: mean_by_epoch(row, metric) for metric in metrics}
        published = row.results[0].member.published_epochs
        columns |= {f"{metric_of(name).name}_published": published[name] for name in metrics if name in published}
        for epoch in range(max((len(column) for column in columns.values()), default=0)):
            cells = {name: column[epoch] if epoch < len(column) else None for name, column in columns.items()}
            found.append({"row": row.name, "epoch": epoch + 1, **cells})
    return found
