"""Content of a run's report page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from toolkit.expectations import check_expectations
from toolkit.formatting import duration, plural
from toolkit.metrics import METRICS
from toolkit.recipe.diagnostics import printable
from toolkit.report.html import (
    HtmlCell,
    HtmlColumn,
    HtmlReport,
    HtmlRow,
    HtmlTable,
    integer,
    name,
    number,
    percent,
    share,
)
from toolkit.report.learning_curves import DECAYS, learning_rates
from toolkit.report.prediction_metrics import (
    Calibration,
    Counts,
    Predictions,
    balanced_accuracy,
    confusion_matrix,
    confusions,
    wilson_interval,
)
from toolkit.report.recipe_section import recipe_table
from toolkit.report.run_data import SPLITS, Record, RunData

CONFUSIONS = 300
"""Maximum number of confused pairs of classes in the table."""

SummaryCard = dict[str, str]


@dataclass
class ReportExtras:
    """Plots and images drawn for the page, in addition to the run's own data."""

    svg: dict[str, str] = field(default_factory=dict)
    """SVG elements by figure name."""
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    scale: tuple[float, float] = (0.0, 1.0)
    """Values shown as black and white in the samples' model inputs."""
    effect_caption: str = ""
    counts: Mapping[str, Counts] | None = None
    """Number of images of each class by split."""
    calibration: Calibration | None = None
    files: Sequence[str] = ()
    """Names of the figure files for print."""


def run_page(facts: RunData, shown: ReportExtras) -> HtmlReport:
    """Build the report page of a run."""
    found = facts.predictions
    svg = {key: Markup(text) for key, text in shown.svg.items()}
    content = {
        "cards": list(_cards(facts)),
        "models": _models(facts),
        "verdicts": check_expectations(facts.recipe, facts.summary) if facts.recipe and facts.summary else [],
        "charts": CHARTS,
        "has_predictions": found is not None,
        "by_class": _by_class(found, shown.counts) if found else None,
        "confusions": _confusions(found) if found else None,
        "calibration_text": _calibration_text(shown.calibration) if shown.calibration else "",
        "reliability": svg.get("reliability", ""),
        "mistakes": shown.mistakes,
        "filters": svg.get("filters"),
        "effect": svg.get("filter-effect"),
        "effect_caption": shown.effect_caption,
        "histogram": svg.get("class-histogram"),
        "samples": shown.samples,
        "scale": shown.scale,
        "recipe": recipe_table(facts.recipe, facts.origins) if facts.recipe else HtmlTable([], []),
        "environment": environment_table(facts.environment),
        "path": str(facts.run.path),
        "figures": shown.files,
    }
    data = {"charts": _charts(facts), "cells": {"confusion": _cells(found)} if found else {}}
    return HtmlReport("run.html", facts.name, _subtitles(facts), _sections(content), facts.missing, data, content)


def _subtitles(facts: RunData) -> list[str]:
    lines = [facts.recipe.recipe.description] if facts.recipe and facts.recipe.recipe.description else []
    if facts.summary is None:
        state = f"not finished; {plural(facts.last_epoch, 'epoch')} done"
    elif facts.stopped_early:
        state = f"finished, stopped early after epoch {facts.last_epoch}"
    else:
        state = f"finished after {plural(facts.last_epoch, 'epoch')}"
    return [*lines, f"run {facts.run.path.resolve().name}: {state}"]


def _sections(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the sections that the template shows."""
    has = bool(content["has_predictions"])
    wanted = [
        ("summary", "Summary", True),
        ("curves", "Curves", True),
        ("classes", "Classes", has),
        ("confusion", "Confusion", has),
        ("calibration", "Calibration", has),
        ("mistakes", "Mistakes", bool(content["mistakes"])),
        ("filters", "Filters", bool(content["filters"])),
        ("data", "Data", bool(content["histogram"] or content["samples"])),
        ("recipe", "Recipe", True),
        ("environment", "Environment", True),
        ("files", "Files", True),
    ]
    return [(key, title) for key, title, is_shown in wanted if is_shown]


# -- summary ----------------------------------------------------------------------------------------------------------


def _cards(facts: RunData) -> Iterator[SummaryCard]:
    """Yield cards with the most important metrics."""
    best = facts.summary["best"] if facts.summary else {}
    figures = (
        ("test accuracy", "test_accuracy", _interval(facts.predictions)),
        ("mean over classes", "test_balanced_accuracy", "test accuracy by class, averaged"),
        ("test top-5 accuracy", "test_top5_accuracy", ""),
    )
    for title, key, hint in figures:
        if key in best:
            yield _card(title, percent(best[key]), hint)
    chosen: Record = next((record for record in facts.epochs if record["epoch"] == facts.best_epoch), {})
    if "val/accuracy" in chosen:
        yield _card(
            "validation accuracy", percent(chosen["val/accuracy"]), f"{facts.best_label} epoch, {facts.best_epoch}"
        )
    planned = f"of {facts.recipe.train.epochs}" if facts.recipe else ""
    yield _card("epochs", str(facts.last_epoch), f"{planned}{', stopped early' if facts.stopped_early else ''}")
    if facts.summary:
        yield from _costs(facts.summary)


def _card(title: str, value: str, hint: str = "") -> SummaryCard:
    return {"name": title, "value": value, "hint": hint}


def _interval(found: Predictions | None) -> str:
    if found is None:
        return ""
    low, high = wilson_interval(int(found.right.sum()), len(found.labels))
    return f"{plural(len(found.labels), 'image')}; 95 % interval {100 * low:.1f} to {100 * high:.1f} %"


def _costs(summary: Record) -> Iterator[SummaryCard]:
    if "parameters" in summary:
        hint = f"{summary.get('trainable_parameters', 0):,} of them trained"
        yield _card("parameters", f"{summary['parameters']:,}", hint)
    images = summary.get("images", {})
    if images:
        yield _card(
            "training images",
            f"{images.get('train', 0):,}",
            f"{images.get('validation', 0):,} validation, {images.get('test', 0):,} test",
        )
    if "seconds" in summary:
        processes = plural(summary.get("processes", 0), "process", "processes")
        speed = f"{summary.get('images_per_s', 0):,.0f} images/s, {processes}"
        yield _card("training time", duration(summary["seconds"]), speed)
    if "device" in summary:
        memory = f"{summary.get('peak_memory_gib', 0):.1f} GiB at most"
        yield _card("device", summary["device"], f"precision {summary.get('precision')}, {memory}")
    if "seed" in summary:
        yield _card("seed", str(summary["seed"]))


def _models(facts: RunData) -> HtmlTable:
    """Compare the best and the last model."""
    shown = [metric for metric in METRICS.values() if metric.model == "best" and metric.split in ("val", "test")]
    titles = (f"{metric.split} {metric.measure.label}" for metric in shown)
    columns = [HtmlColumn("model"), HtmlColumn("epoch", True), *(HtmlColumn(title, True) for title in titles)]
    rows = []
    for model in ("best", "last") if facts.summary else ():
        found = facts.summary[model]  # type: ignore[index]
        values = ((share if metric.measure.unit == "%" else number)(found.get(metric.key)) for metric in shown)
        rows.append(HtmlRow([HtmlCell(model), integer(found["epoch"]), *values], "best" if model == "best" else ""))
    return HtmlTable(columns, rows)


def environment_table(environment: Record) -> HtmlTable:
    """Return a table of a run's environment, one row per entry."""
    rows = []
    for key, value in environment.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        for inner, item in items:
            text = "-" if item is None else str(item)
            rows.append(
                HtmlRow(
                    [HtmlCell(printable(f"{key} {inner}".strip())), HtmlCell(printable(text), name=True, code=True)]
                )
            )
    return HtmlTable([HtmlColumn("what"), HtmlColumn("value")], rows)


# -- curves -----------------------------------------------------------------------------------------------------------

CHARTS = [("loss", "Loss"), ("accuracy", "Accuracy"), ("lr", "Learning rate")]
"""Ids and captions of the charts."""


def _charts(facts: RunData) -> dict[str, Any]:
    best, last = facts.best_epoch, facts.last_epoch
    marks = [{"x": best, "label": f"{facts.best_label}: {best}", "row": 0}]
    if last != best:
        word = "stopped early" if facts.stopped_early else "last"
        marks.append({"x": last, "label": f"{word}: {last}", "row": 1, "dash": "2 4"})
    epoch = {"xLabel": "epoch", "whole": True, "marks": marks}
    losses = [
        _series(facts.epochs, "train/loss", "train", "var(--blue)", dash="6 4"),
        _series(facts.epochs, "val/loss", "validation", "var(--vermilion)"),
    ]
    accuracies = [
        _series(facts.epochs, "train/accuracy", "train", "var(--blue)", 100, dash="6 4"),
        _series(facts.epochs, "val/accuracy", "validation", "var(--vermilion)", 100),
        _series(
            facts.epochs, "val/balanced_accuracy", "validation, mean over classes", "var(--green)", 100, "2 3", False
        ),
        _series(facts.epochs, "val/top5_accuracy", "validation, top 5", "var(--purple)", 100, "9 3 2 3", False),
    ]
    points = learning_rates(facts)
    rates = {"name": "learning rate", "x": [x for x, _ in points], "y": [y for _, y in points], "colour": "var(--blue)"}
    is_log = facts.recipe is not None and facts.recipe.scheduler.name in DECAYS
    return {
        "loss": {**epoch, "yLabel": "cross-entropy (nats)", "series": _filled(losses), "canLog": True},
        "accuracy": {**epoch, "yLabel": "accuracy (%)", "series": _filled(accuracies)},
        "lr": {"xLabel": "epochs done", "yLabel": "learning rate", "series": [rates], "canLog": True, "log": is_log,
               "fromZero": True},
    }  # fmt: skip


def _filled(series: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop series without points; a run may have no validation split."""
    return [one for one in series if one["x"]]


def _series(
    epochs: Sequence[Record], key: str, title: str, colour: str, scale: float = 1, dash: str = "", shown: bool = True
) -> dict[str, Any]:
    points = [(record["epoch"], scale * record[key]) for record in epochs if key in record]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return {"name": title, "x": xs, "y": ys, "colour": colour, "dash": dash, "shown": shown}


# -- test images ------------------------------------------------------------------------------------------------------


def _by_class(found: Predictions, counts: Mapping[str, Counts] | None) -> HtmlTable:
    """Return a table of each class's accuracy, support and most frequent wrong prediction, best class first."""
    matrix = confusion_matrix(found)
    accuracy, support = balanced_accuracy(matrix), matrix.sum(1)
    trained = [("train images", "train"), ("validation images", "validation")] if counts else []
    columns = [
        HtmlColumn("class"),
        HtmlColumn("accuracy", True),
        HtmlColumn("right", True),
        HtmlColumn("test images", True),
    ]
    columns += [*(HtmlColumn(title, True) for title, _ in trained), HtmlColumn("most often mistaken for")]
    rows = []
    for label in np.argsort(-np.nan_to_num(accuracy, nan=-1), kind="stable"):
        wrong = matrix[label].copy()
        wrong[label] = 0
        other = int(wrong.argmax())
        taken = f"{found.classes[other]} ({wrong[other]})" if wrong[other] else ""
        cells = [
            name(found.classes[label]),
            share(float(accuracy[label]), bar=True),
            integer(int(matrix[label, label])),
        ]
        cells += [integer(int(support[label])), *(integer(int(counts[split][label])) for _, split in trained if counts)]
        rows.append(HtmlRow([*cells, name(taken)]))
    return HtmlTable(columns, rows)


def _confusions(found: Predictions) -> HtmlTable:
    matrix = confusion_matrix(found)
    support = matrix.sum(1)
    columns = [
        HtmlColumn("true class"),
        HtmlColumn("predicted class"),
        HtmlColumn("images", True),
        HtmlColumn("of the class", True),
    ]
    rows = [
        HtmlRow(
            [
                name(found.classes[one.label]),
                name(found.classes[one.prediction]),
                integer(one.count),
                share(float(one.count / support[one.label])),
            ]
        )
        for one in confusions(matrix)[:CONFUSIONS]
    ]
    return HtmlTable(columns, rows)


def _cells(found: Predictions) -> dict[str, Any]:
    """Return the nonzero cells of the confusion matrix for the page's script."""
    matrix = confusion_matrix(found)
    rows, columns = np.nonzero(matrix)
    cells = [[int(r), int(c), int(matrix[r, c])] for r, c in zip(rows, columns, strict=True)]
    names = [printable(one) for one in found.classes]
    return {"names": names, "support": matrix.sum(1).tolist(), "cells": cells}


def _calibration_text(found: Calibration) -> str:
    filled = found.counts > 0
    weights = found.counts[filled] / found.counts.sum()
    lean = float((weights * (found.confidence - found.accuracy)[filled]).sum())
    side = "above its accuracy: it is overconfident" if lean > 0 else "below its accuracy: it is underconfident"
    return (
        f"Expected calibration error {percent(found.expected_error)}: the absolute difference between confidence (the "
        "probability of the predicted class) and accuracy in each bin, averaged over the images. On average the "
        f"model's confidence is {percent(abs(lean))} {side}."
    )


def count_by_class(facts: RunData) -> dict[str, Counts]:
    """Return the recorded images per class by split. Raises KeyError, TypeError or ValueError if not recorded."""
    noted = facts.split["images_per_class"]
    counts = {split: np.array(noted[split], dtype=np.int64) for split in SPLITS}
    if any(len(numbers) != len(facts.classes) for numbers in counts.values()):
        raise ValueError("images_per_class does not fit the classes")
    return counts
