"""Predictions of a multi-label run, and the metrics, plots and tables that only its report contains."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from toolkit.reading import UnreadableFile
from toolkit.report.html import HtmlCell, HtmlRow, HtmlTable, integer, name, share
from toolkit.report.kept_columns import kept_columns
from toolkit.report.plot_style import CYCLE, fitted, grid, labeled_axes, short
from toolkit.report.prediction_metrics import Counts, Ints
from toolkit.run_directory import LABEL_COLUMNS, LABEL_SEPARATOR, label_columns
from toolkit.runs import Run
from toolkit.training.classification_metrics import RankingCurve, multi_label_class_metrics, ranking_curves

MAX_PAIRS = 300
"""Maximum number of label pairs in the table of errors."""


@dataclass(frozen=True)
class LabelPredictions:
    """Content of predictions.csv of a multi-label run, in row order."""

    names: list[str]
    """Names of the images."""
    classes: list[str]
    labels: npt.NDArray[np.uint8]
    """1 for each label of an image, [N, K]."""
    predictions: npt.NDArray[np.bool_]
    """Whether each label is predicted, [N, K]."""
    scores: npt.NDArray[np.float32]
    """Probability of each label, 0..1, [N, K]."""
    kept: Mapping[str, list[str]] = field(default_factory=dict)
    """Values of the columns in data.columns.keep, by column, [N] each."""

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether all labels of an image are predicted correctly, [N]."""
        is_correct: npt.NDArray[np.bool_] = (self.predictions == self.labels).all(1)
        return is_correct

    @functools.cached_property
    def curves(self) -> list[RankingCurve]:
        """Precision and recall of each label at every threshold."""
        return ranking_curves(self.labels, self.scores)

    @property
    def largest_errors(self) -> npt.NDArray[np.float32]:
        """Largest difference between score and label among the wrong predictions of each image, [N]; 0 if none."""
        errors = np.abs(self.scores - self.labels) * (self.predictions != self.labels)
        largest: npt.NDArray[np.float32] = errors.max(1)
        return largest

    def worst(self, count: int) -> Ints:
        """Return the rows of up to ``count`` images with wrong predictions, the largest errors first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.argsort(-self.largest_errors[wrong], kind="stable")][:count]

    def text(self, mask: npt.NDArray[Any]) -> str:
        """Return the names of the labels in a mask [K], or "none"."""
        return ", ".join(self.classes[k] for k in np.flatnonzero(mask)) or "none"


def read_label_predictions(run: Run, classes: list[str]) -> LabelPredictions:
    """Read a multi-label predictions.csv. Raises UserError if it is damaged."""
    file, rows, columns = run.path / "predictions.csv", run.prediction_records(), label_columns(classes)
    if not rows or list(rows[0])[: len(columns)] != columns:
        raise UnreadableFile(file, f"it should have rows with the columns {','.join(columns)[:80]}, ...")
    index = {text: number for number, text in enumerate(classes)}
    masks = np.zeros((2, len(rows), len(classes)), dtype=np.uint8)
    for mask, column in zip(masks, LABEL_COLUMNS[1:], strict=True):
        for number, row in enumerate(rows):
            names = [text for text in row[column].split(LABEL_SEPARATOR) if text]
            if any(text not in index for text in names):
                raise UnreadableFile(file, f"line {number + 2} contains a label that the run does not have")
            mask[number, [index[text] for text in names]] = 1
    scores = np.array([list(row.values())[len(LABEL_COLUMNS) : len(columns)] for row in rows], dtype=np.float32)
    names, kept = [row["path"] for row in rows], kept_columns(rows, columns)
    return LabelPredictions(names, classes, masks[0], masks[1].astype(bool), scores, kept)


def label_table(found: LabelPredictions, counts: Mapping[str, Counts] | None, thresholds: list[float]) -> HtmlTable:
    """Return a table of each label's metrics on the test images, the highest average precision first."""
    of_label = multi_label_class_metrics(found.labels, found.predictions)
    precision = [curve.average_precision if curve.positives else np.nan for curve in found.curves]
    areas = [curve.auroc if 0 < curve.positives < len(found.labels) else np.nan for curve in found.curves]
    others = [counts["train"], counts["validation"]] if counts else []
    rows = []
    for k in np.argsort(-np.nan_to_num(precision, nan=-1), kind="stable"):
        shares = (areas[k], of_label.f1[k], of_label.precision[k], of_label.recall[k])
        cells = [name(found.classes[k]), share(float(precision[k]), bar=True), *(share(float(v)) for v in shares)]
        cells += [HtmlCell(f"{thresholds[k]:.3f}", thresholds[k])] if thresholds else []
        cells += [integer(int(n)) for n in (of_label.support[k], of_label.predicted[k], *(c[k] for c in others))]
        rows.append(HtmlRow(cells))
    head = ["label", "average precision", "AUROC", "F1", "precision", "recall", *(["threshold"] if thresholds else []),
            "test images", "predicted", *(["train images", "validation images"] if counts else [])]  # fmt: skip
    return HtmlTable(head, rows, range(1, len(head)))


def error_matrix(found: LabelPredictions) -> Ints:
    """Count the images in which label i (row) is missed and label j (column) is wrongly predicted, [K, K]."""
    missed, wrong = found.labels > found.predictions, found.predictions > found.labels
    matrix: Ints = missed.T.astype(np.int64) @ wrong.astype(np.int64)
    return matrix


def _missed(found: LabelPredictions) -> Ints:
    """Return the number of images in which each label is missed, [K]."""
    missed: Ints = (found.labels > found.predictions).sum(0)
    return missed


def error_cells(found: LabelPredictions) -> dict[str, Any]:
    """Return the nonzero cells of the error matrix, for the page's script."""
    matrix = error_matrix(found)
    cells = [[int(row), int(column), int(matrix[row, column])] for row, column in np.argwhere(matrix)]
    words = ["missed", "wrongly predicted"]
    return {"names": found.classes, "support": _missed(found).tolist(), "cells": cells, "words": words}


def error_table(found: LabelPredictions) -> HtmlTable:
    """Return the most frequent pairs of a missed and a wrongly predicted label of the same image."""
    matrix, missed = error_matrix(found), _missed(found)
    pairs = sorted(np.argwhere(matrix), key=lambda pair: -matrix[tuple(pair)])[:MAX_PAIRS]
    rows = [
        HtmlRow([name(found.classes[i]), name(found.classes[j]), integer(int(matrix[i, j])),
                 share(float(matrix[i, j] / missed[i]))])
        for i, j in pairs
    ]  # fmt: skip
    return HtmlTable(["missed label", "wrongly predicted label", "images", "of the missed"], rows, (2, 3))


def precision_recall_figure(title: str, found: LabelPredictions) -> Figure:
    """Plot precision against recall for each label; if there are many, for those with the lowest average precision."""
    figure, axes = labeled_axes("recall", "precision", fitted(title, 5), (6.3, 4.4), integers=False)
    curves = [(curve.average_precision, k) for k, curve in enumerate(found.curves) if curve.positives]
    for number, (average, k) in enumerate(sorted(curves)[: 2 * len(CYCLE)]):
        curve = found.curves[k]
        style = "--" if number >= len(CYCLE) else "-"
        label = f"{short(found.classes[k], 24)} {100 * average:.1f} %"
        recall, precision = np.append(0.0, curve.recall), np.append(curve.precision[0], curve.precision)
        axes.step(recall, precision, style, where="pre", color=CYCLE[number % len(CYCLE)], linewidth=1.4, label=label)
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.02)
    grid(axes, "x")
    shown = "average precision" if len(curves) <= 2 * len(CYCLE) else "lowest average precision"
    figure.legend(loc="outside right upper", title=shown, title_fontsize=8)
    return figure
