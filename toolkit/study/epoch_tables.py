"""Per-epoch tables of a study: one column per row of the study, with x for epochs after a run's last one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from toolkit.metrics import METRICS, higher_is_better, metric_of
from toolkit.recipe.study_schema import StudyConfig
from toolkit.study.results_table import MISSING, ResultRow, number, title
from toolkit.study.text_table import BEST, DECLINE, TextTable

ENDED = "x"
"""Shown for epochs after a run's last one."""


def build_epoch_tables(
    rows: Sequence[ResultRow], table: StudyConfig, name: str, metrics: Sequence[str]
) -> list[TextTable]:
    """Build the per-epoch tables: for one metric, one with a column per row; for several, one per row of the study.

    Published metrics are shown in a second table, or in adjacent columns. Empty if no run is finished.
    """
    done = [row for row in rows if row.finished]
    if not done or not metrics:
        return []
    if len(metrics) == 1:
        return _metric_tables(rows, table, name, metrics[0])
    return [_row_table(row, table, name, metrics) for row in done]


def epoch_metrics(rows: Sequence[ResultRow], table: StudyConfig) -> list[str]:
    """Return the metrics of the per-epoch tables: output.per_epoch and the published ones; empty without per_epoch."""
    wanted = table.output.per_epoch
    published = [metric for row in rows for result in row.results for metric in result.member.published_epochs]
    return list(dict.fromkeys([*sorted(published), wanted])) if wanted else []


def mean_by_epoch(row: ResultRow, metric: str) -> list[float]:
    """Return the per-epoch mean over a row's finished runs, up to the longest run."""
    curves = [result.values(metric) for result in row.finished]
    length = max((len(curve) for curve in curves), default=0)
    return [statistics.fmean(curve[i] for curve in curves if len(curve) > i) for i in range(length)]


def _metric_tables(rows: Sequence[ResultRow], table: StudyConfig, name: str, metric: str) -> list[TextTable]:
    columns = {row.name: mean_by_epoch(row, metric) for row in rows}
    caption = f"{title(table, name)}: {metric_of(metric).heading} by epoch"
    notes = _notes(rows, [row.name for row in rows if not row.finished])
    test_accuracies = {
        row.name: row.metrics["test_accuracy"].mean if "test_accuracy" in row.metrics else None for row in rows
    }
    tables = [_marked_table(caption, columns, metric, notes, test_accuracies)]
    published = {row.name: row.results[0].member.published_epochs.get(metric, []) for row in rows}
    if any(published.values()):
        test_accuracies = {row.name: row.published.get("test_accuracy") for row in rows}
        tables.append(_marked_table(f"{caption}, as published", published, metric, _source(table), test_accuracies))
    return tables


def _marked_table(
    caption: str,
    columns: dict[str, list[float]],
    metric: str,
    notes: Sequence[str],
    test_accuracies: dict[str, float | None],
) -> TextTable:
    """Build a table with a column per row, marking its best epoch and a decline after it, and test accuracies below.

    ``test_accuracies`` is each row's test accuracy as a fraction; None if there is none.
    """
    text_table = _text_table(caption, columns, [metric] * len(columns), notes)
    cells = [list(line) for line in text_table.rows]
    sign = 1 if higher_is_better(metric) else -1
    for index, column in enumerate(columns.values(), 1):
        if not column:
            continue
        best = max(range(len(column)), key=lambda epoch: sign * column[epoch])  # the first in case of ties
        cells[best][index] = f"{BEST}{cells[best][index]}"
        if best + 1 < len(column) and sign * column[best + 1] < sign * column[best]:
            cells[best + 1][index] = f"{DECLINE}{cells[best + 1][index]}"
    if any(value is not None for value in test_accuracies.values()):
        values = (test_accuracies[name] for name in columns)
        line = [MISSING if value is None else number("test_accuracy", value) for value in values]
        cells.append([METRICS["test_accuracy"].heading, *line])
    legend = f"{BEST}: the best epoch of the column; {DECLINE}: the epoch after it, if it is worse."
    return replace(text_table, rows=cells, notes=[legend, *notes])


def _row_table(row: ResultRow, table: StudyConfig, name: str, metrics: Sequence[str]) -> TextTable:
    columns, column_metrics = {}, []
    published = row.results[0].member.published_epochs
    for metric in metrics:
        heading = metric_of(metric).heading
        columns[heading] = mean_by_epoch(row, metric)
        column_metrics.append(metric)
        if metric in published:
            columns[f"{heading}, published"] = published[metric]
            column_metrics.append(metric)
    notes = [*_notes([row], []), *(_source(table) if published else [])]
    return _text_table(f"{title(table, name)}: {row.name}, by epoch", columns, column_metrics, notes)


def _text_table(
    caption: str, columns: dict[str, list[float]], metrics: Sequence[str], notes: Sequence[str]
) -> TextTable:
    length = max(len(column) for column in columns.values())
    cells = [[str(epoch + 1), *(_cell(column, epoch, metric) for column, metric in zip(columns.values(), metrics,
              strict=True))] for epoch in range(length)]  # fmt: skip
    return TextTable(caption, ["epoch", *columns], cells, notes=notes)


def _cell(column: Sequence[float], epoch: int, metric: str) -> str:
    if not column:
        return MISSING
    return number(metric, column[epoch]) if epoch < len(column) else ENDED


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
