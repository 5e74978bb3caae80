"""The columns of data.columns.keep in a run's report: their values for single images, and metrics for each value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from toolkit.report.html import HtmlCell, HtmlRow, HtmlTable, integer, name, share
from toolkit.report.prediction_metrics import RunPredictions, wilson_interval
from toolkit.training.classification_metrics import single_label_class_metrics

if TYPE_CHECKING:
    from toolkit.report.label_predictions import LabelPredictions

MAX_VALUES = 100
"""Maximum number of values in a table; others are only counted."""


def kept_columns(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns of predictions.csv that are not in ``columns``; ``rows`` must not be empty."""
    return {column: [row[column] for row in rows] for column in list(rows[0])[len(columns) :]}


def values_of(kept: Mapping[str, list[str]], row: int) -> str:
    """Return the values of one row as text, such as "site: A, camera: B"; "" if no columns are kept."""
    return ", ".join(f"{column}: {values[row]}" for column, values in kept.items())


def tables_by_value(found: RunPredictions | LabelPredictions | None) -> list[tuple[str, HtmlTable]]:
    """Return, for each column, a table of the metrics of each value, the most frequent value first.

    Columns in which every image has a different value are left out.
    """
    tables: list[tuple[str, HtmlTable]] = []
    if found is None:
        return tables
    for column, texts in found.kept.items():
        values, codes, counts = np.unique(np.array(texts, dtype=object), return_inverse=True, return_counts=True)
        if counts.max() > 1:
            tables.append((column, _table(found, column, values, codes, counts)))
    return tables


def _table(
    found: RunPredictions | LabelPredictions,
    column: str,
    values: npt.NDArray[np.object_],
    codes: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
) -> HtmlTable:
    """Return the table of one column, with distinct ``values``, [n], and the index of each image's value, ``codes``."""
    rows = []
    for value in np.argsort(-counts, kind="stable")[:MAX_VALUES]:
        images = np.flatnonzero(codes == value)
        correct = int(found.correct[images].sum())
        low, high = wilson_interval(correct, len(images))
        interval = HtmlCell(f"{100 * low:.1f} to {100 * high:.1f} %", low)
        cells = [
            name(values[value] or "(empty)"),
            integer(len(images)),
            share(correct / len(images), bar=True),
            interval,
        ]
        rows.append(HtmlRow([*cells, share(_other_metric(found, images))]))
    other = "balanced accuracy" if isinstance(found, RunPredictions) else "micro F1"
    left = len(values) - len(rows)
    notes = [f"the {MAX_VALUES} most frequent of {len(values):,} values"] if left else []
    head = [column, "images", "accuracy", "95 % interval", other]
    return HtmlTable(head, rows, range(1, len(head)), notes=notes)


def _other_metric(found: RunPredictions | LabelPredictions, images: npt.NDArray[np.int64]) -> float:
    """Return the balanced accuracy (mean recall over classes) on ``images``; for multi-label, the micro F1."""
    if isinstance(found, RunPredictions):
        of_class = single_label_class_metrics(found.labels[images], found.predictions[images], len(found.classes))
        return float(of_class.recall[of_class.support > 0].mean())
    labels, predictions = found.labels[images], found.predictions[images]
    decisions = int(labels.sum(dtype=np.int64)) + np.count_nonzero(predictions)
    return float(2 * np.count_nonzero(predictions & (labels == 1)) / decisions) if decisions else 0.0
