"""The report page of a run."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from toolkit.calibration import TemperatureScaling
from toolkit.evaluations import Evaluation
from toolkit.expectations import check_expectations
from toolkit.formatting import duration, plural
from toolkit.metrics import Metric, headline, metric_of, metrics_in
from toolkit.report.html import (
    HtmlCell,
    HtmlRow,
    HtmlTable,
    code,
    integer,
    metric_cell,
    name,
    percent,
    share,
    write_page,
)
from toolkit.report.kept_columns import tables_by_value
from toolkit.report.label_predictions import error_cells, error_table, label_table
from toolkit.report.learning_curves import learning_rates, points
from toolkit.report.prediction_metrics import (
    Calibration,
    ClassConfusion,
    Counts,
    RunPredictions,
    accuracy_by_class,
    confusion_cells,
    confusions,
    correct_by_class,
    support,
    wilson_interval,
)
from toolkit.report.recipe_table import environment_table, recipe_table
from toolkit.report.run_data import Record, RunData
from toolkit.study.significance import McNemar
from toolkit.tta import TtaResult

MAX_CONFUSIONS = 300
"""Maximum number of confused pairs of classes in the table."""
SMALL_SIDE = 64
"""Images with sides of at most this number of pixels are embedded unchanged and enlarged for display."""

SummaryCard = tuple[str, str, str]
"""Name, value and details of a metric that is shown at the top of the page."""


def write_run_page(path: Path, data: RunData, svg: Mapping[str, str], files: Sequence[Path]) -> Path:
    """Write the report page of a run. ``svg`` holds SVG elements by figure name, ``files`` the figures for print."""
    found, several = data.predictions, data.label_predictions
    cells = _cells(found) if found else error_cells(several) if several else None
    by_class = _by_class(found, data.counts) if found else None
    if several:
        by_class = label_table(several, data.counts, data.thresholds)
    charts = _charts(data)
    return write_page(
        path,
        "run.html",
        {"charts": charts, "cells": {"confusion": cells} if cells else {}},
        title=data.name,
        subtitles=_subtitles(data),
        missing=data.missing,
        run=data,
        cards=list(_cards(data)),
        models=models_table(data),
        expectations=check_expectations(data.recipe, data.summary) if data.recipe and data.summary else [],
        evaluations=_evaluations(data),
        charts=[(id_, "Metrics" if id_ == "accuracy" and several else CHARTS[id_]) for id_ in charts],
        by_class=by_class,
        by_value=tables_by_value(found or several),
        confusions=_confusions(found) if found else error_table(several) if several else None,
        calibration_text=_calibration_text(data.calibration) if data.calibration else "",
        tta=_tta(data.tta),
        scaling=_scaling(data.scaling) if data.scaling else None,
        svg={name: Markup(text) for name, text in svg.items()},
        recipe=recipe_table(data.recipe, data.origins) if data.recipe else None,
        environment=environment_table([data.environment]),
        files=[file.name for file in files],
        data_uri=data_uri,
        is_small=lambda image: max(image.size) <= SMALL_SIDE,
    )


def _subtitles(data: RunData) -> list[str]:
    lines = [data.recipe.recipe.description] if data.recipe and data.recipe.recipe.description else []
    return [*lines, f"run {data.run.path.resolve().name}: {data.state}"]


def data_uri(image: Image.Image, side: int) -> str:
    """Encode an image as a data URI: small ones as PNG, others as WebP whose longer side has at most ``side``."""
    image = image.convert("RGB")
    data = io.BytesIO()
    if max(image.size) <= SMALL_SIDE:
        image.save(data, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(data, "WEBP", quality=72, method=4)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


# -- summary ----------------------------------------------------------------------------------------------------------


def _cards(data: RunData) -> Iterator[SummaryCard]:
    """Yield the summary cards of a run: its most important metrics and costs."""
    best = data.summary["best"] if data.summary else {}
    metrics = (
        (
            ("test mAP", "test_map", "mean average precision over the labels"),
            ("test micro F1", "test_micro_f1", "over the predictions of all labels together"),
            ("test macro F1", "test_macro_f1", "mean F1 over the labels"),
            ("test accuracy", "test_accuracy", "all labels of an image are correct"),
        )
        if data.is_multi_label
        else (
            ("test accuracy", "test_accuracy", _interval(data.predictions)),
            ("balanced test accuracy", "test_balanced_accuracy", "mean recall over the classes"),
            ("test top-5 accuracy", "test_top5_accuracy", ""),
        )
    )
    for title, key, details in metrics:
        if key in best:
            yield title, percent(best[key]), details
    epoch: Record = next((record for record in data.epochs if record["epoch"] == data.best_epoch), {})
    if (key := headline(epoch, "val/")) in epoch:
        yield metric_of(key).label, percent(epoch[key]), f"{data.best_label} epoch, {data.best_epoch}"
    planned = _planned(data)
    yield "epochs", str(data.last_epoch), f"{planned}{', stopped early' if data.stopped_early else ''}"
    yield from _costs(data.summary or {})


def _planned(data: RunData) -> str:
    """Return the planned number of epochs, "of 30", followed by the length in the recipe if that is not in epochs."""
    epochs = data.run.planned_epochs() if data.recipe else None
    if data.recipe is None or epochs is None:
        return ""
    return f"of {epochs}" if data.recipe.train.epochs == epochs else f"of {epochs} ({data.recipe.train.length_text})"


def _interval(found: RunPredictions | None) -> str:
    if found is None:
        return ""
    low, high = wilson_interval(int(found.correct.sum()), len(found.labels))
    return f"{plural(len(found.labels), 'image')}; 95 % interval {100 * low:.1f} to {100 * high:.1f} %"


def _costs(summary: Record) -> Iterator[SummaryCard]:
    if "parameters" in summary:
        yield "parameters", f"{summary['parameters']:,}", f"{summary.get('trainable_parameters', 0):,} trainable"
    if images := summary.get("images", {}):
        details = f"{images.get('validation', 0):,} validation, {images.get('test', 0):,} test"
        yield "training images", f"{images.get('train', 0):,}", details
    if "seconds" in summary:
        processes = plural(summary.get("processes", 0), "process", "processes")
        speed = f"{summary.get('images_per_s', 0):,.0f} images/s, {processes}"
        yield "training time", duration(summary["seconds"]), speed
    if "device" in summary:
        memory = f"peak memory {summary.get('peak_memory_gib', 0):.1f} GiB"
        yield "device", summary["device"], f"precision {summary.get('precision')}, {memory}"
    if "seed" in summary:
        yield "seed", str(summary["seed"]), ""


def _measured(data: RunData, *splits: str) -> list[Metric]:
    """Return the metrics of the best model on ``splits`` that are computed for the run's kind of task."""
    kind = "multi_label" if data.is_multi_label else "single_label"
    best = [metric for metric in metrics_in(data.summary or {}) if metric.model == "best" and metric.split in splits]
    return [metric for metric in best if kind in metric.measure.tasks]


def models_table(data: RunData) -> HtmlTable:
    """Return a table that compares the best and the last model; for an unfinished run, the best and the last so far."""
    metrics, rows = _measured(data, *(("val", "test") if data.summary else ("val",))), []
    for model, epoch in (("best", data.best_epoch), ("last", data.last_epoch)):
        record: Record = next((record for record in data.epochs if record["epoch"] == epoch), {})
        found = data.summary[model] if data.summary else {key.replace("/", "_"): v for key, v in record.items()}
        values = [metric_cell(metric, found.get(metric.key)) for metric in metrics]
        rows.append(HtmlRow([HtmlCell(model), integer(epoch), *values], "best" if model == "best" else ""))
    return HtmlTable(["model", "epoch", *(metric.label for metric in metrics)], rows, range(1, len(metrics) + 2))


def _evaluations(data: RunData) -> HtmlTable:
    """Return a table of the best model's metrics on other data sets, below those on the run's own images."""
    best = data.summary["best"] if data.summary else {}
    own = next((split for split in ("test", "val") if f"{split}_accuracy" in best), None)
    metrics = _measured(data, own or "test")
    keys = [metric.key.partition("_")[2] for metric in metrics]
    rows, notes = [], []
    if own is not None:
        split = "test" if own == "test" else "validation"
        images = (data.summary or {}).get("images", {}).get(split, 0)
        values = [metric_cell(metric, best.get(metric.key)) for metric in metrics]
        rows.append(HtmlRow([name(f"{split} images of the run"), code(""), integer(images), *values], "best"))
    for each in data.evaluations:
        source = f"{each.data} --split {each.split}" if each.split else each.data
        values = [metric_cell(metric, each.metrics.get(key)) for metric, key in zip(metrics, keys, strict=True)]
        rows.append(HtmlRow([name(each.name), code(source), integer(each.images), *values]))
        notes += [f"{each.name}: {note}" for note in _evaluation_notes(data, each)]
    head = ["data set", "source", "images", *(metric.measure.heading for metric in metrics)]
    return HtmlTable(head, rows, range(2, len(head)), notes=notes)


def _evaluation_notes(data: RunData, found: Evaluation) -> Iterator[str]:
    if found.missing_classes:
        yield f"no images of {len(found.missing_classes)} of the model's classes"
    if found.unknown_classes:
        images, classes = sum(found.unknown_classes.values()), plural(len(found.unknown_classes), "class", "classes")
        yield f"without {plural(images, 'image')} of {classes} that the model does not have"
    if data.summary is not None and found.epoch != data.best_epoch:
        when = "before the run had finished" if found.epoch is None else f"with the model of epoch {found.epoch}"
        yield f"evaluated {when}; the best one is now that of epoch {data.best_epoch}: evaluate it again"


# -- curves -----------------------------------------------------------------------------------------------------------

CHARTS = {"loss": "Loss", "accuracy": "Accuracy", "lr": "Learning rate"}
"""Captions of the charts by id."""

MULTI_LABEL_CURVES = {
    "val/map": ("validation, mAP", "var(--vermilion)", ""),
    "val/micro_f1": ("validation, micro F1", "var(--green)", "2 3"),
    "val/macro_f1": ("validation, macro F1", "var(--purple)", "9 3 2 3"),
    "val/accuracy": ("validation, accuracy", "var(--orange)", "6 2"),
    "train/accuracy": ("train, accuracy", "var(--blue)", "6 4"),
}
"""Name, color and dashes of a multi-label run's curves; all but the first two are hidden at first."""


def _charts(data: RunData) -> dict[str, Any]:
    """Return the learning curves for the page's script."""
    best, last = data.best_epoch, data.last_epoch
    markers = [{"x": best, "label": f"{data.best_label}: {best}", "row": 0}]
    if last != best:
        markers.append({"x": last, "label": f"{data.end_label}: {last}", "row": 1, "dash": "2 4"})
    by_epoch = {"xLabel": "epoch", "integerTicks": True, "markers": markers}

    def series(key: str, title: str, color: str, dash: str, *, shown: bool = True) -> list[dict[str, Any]]:
        """Return a list of one series; empty if there are no values, as in a run without validation images."""
        xs, ys = points(data.epochs, key, 1 if key.endswith("loss") else 100)
        return [{"name": title, "x": xs, "y": ys, "color": color, "dash": dash, "shown": shown}] if xs else []

    losses = [
        *series("train/loss", "train", "var(--blue)", "6 4"),
        *series("val/loss", "validation", "var(--vermilion)", ""),
    ]
    accuracies = [
        *series("train/accuracy", "train", "var(--blue)", "6 4"),
        *series("val/accuracy", "validation", "var(--vermilion)", ""),
        *series("val/balanced_accuracy", "validation, balanced", "var(--green)", "2 3", shown=False),
        *series("val/top5_accuracy", "validation, top 5", "var(--purple)", "9 3 2 3", shown=False),
    ]
    kind = "binary " if data.is_multi_label else ""
    if data.is_multi_label:
        curves = enumerate(MULTI_LABEL_CURVES.items())
        accuracies = [each for i, (key, style) in curves for each in series(key, *style, shown=i < 2)]
    xs, ys = learning_rates(data)
    rates = {"name": "learning rate", "x": xs, "y": ys, "color": "var(--blue)"}
    charts: dict[str, Any] = {
        "loss": {**by_epoch, "yLabel": f"{kind}cross-entropy (nats)", "series": losses, "canLog": True},
        "accuracy": {**by_epoch, "yLabel": "%" if data.is_multi_label else "accuracy (%)", "series": accuracies},
    }
    if xs:  # a layer that is fitted has no learning rate
        charts["lr"] = {"xLabel": "completed epochs", "yLabel": "learning rate", "series": [rates], "canLog": True,
                        "log": data.decays_by_factors, "fromZero": True}  # fmt: skip
    return charts


# -- test images ------------------------------------------------------------------------------------------------------


def _by_class(found: RunPredictions, counts: Mapping[str, Counts] | None) -> HtmlTable:
    """Return a table of each class's accuracy, support and most frequent wrong prediction, best class first."""
    accuracy, images, correct = accuracy_by_class(found), support(found), correct_by_class(found)
    most_wrong: dict[int, ClassConfusion] = {}
    for cell in confusions(found):
        most_wrong.setdefault(cell.label, cell)
    others = [counts["train"], counts["validation"]] if counts else []
    rows = []
    for label in np.argsort(-np.nan_to_num(accuracy, nan=-1), kind="stable"):
        wrong = most_wrong.get(int(label))
        numbers = [correct[label], images[label], *(count[label] for count in others)]
        cells = [
            name(found.classes[label]),
            share(float(accuracy[label]), bar=True),
            *(integer(int(n)) for n in numbers),
        ]
        rows.append(HtmlRow([*cells, name(f"{found.classes[wrong.prediction]} ({wrong.images})" if wrong else "")]))
    head = ["class", "accuracy", "correct", "test images", *(["train images", "validation images"] if counts else [])]
    return HtmlTable([*head, "most often mistaken for"], rows, range(1, len(head)))


def _confusions(found: RunPredictions) -> HtmlTable:
    images = support(found)
    rows = [
        HtmlRow([name(found.classes[label]), name(found.classes[prediction]), integer(count),
                 share(float(count / images[label]))])
        for label, prediction, count in confusions(found)[:MAX_CONFUSIONS]
    ]  # fmt: skip
    return HtmlTable(["true class", "predicted class", "images", "of the true class"], rows, (2, 3))


def _cells(found: RunPredictions) -> dict[str, Any]:
    """Return the nonzero cells of the confusion matrix, for the page's script."""
    return {"names": found.classes, "support": support(found).tolist(), "cells": confusion_cells(found)}


def _scaling(found: TemperatureScaling) -> HtmlTable:
    """Return a table of NLL and expected calibration error before and after temperature scaling, by split."""
    rows = [
        HtmlRow([HtmlCell(split), HtmlCell(state), HtmlCell(f"{each.nll:.4f}"), share(each.ece)])
        for split, measured in found.splits.items()
        for state, each in (("before", measured.before), ("after", measured.after))
    ]
    return HtmlTable(["images", "temperature scaling", "NLL (nats)", "expected calibration error"], rows, (2, 3))


def _tta(found: Sequence[TtaResult]) -> HtmlTable:
    """Return a table of the accuracies without and with test-time augmentation, with McNemar's test."""
    rows = []
    for each in found:
        test = McNemar(each.only_with, each.only_without, each.images)
        low, high = test.interval(0.95)
        interval = f"{100 * test.difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        cells = [share(each.accuracy), share(each.accuracy_with_tta), HtmlCell(interval), HtmlCell(f"{test.p:.3g}")]
        rows.append(HtmlRow([code(" ".join(each.tta)), HtmlCell(each.split), integer(each.images), *cells]))
    head = [
        "augmentation",
        "images of",
        "images",
        "accuracy without",
        "with",
        "difference, 95 % interval (points)",
        "p",
    ]
    return HtmlTable(head, rows, range(2, len(head)))


def _calibration_text(found: Calibration) -> str:
    filled = found.counts > 0
    weights = found.counts[filled] / found.counts.sum()
    difference = float((weights * (found.confidence - found.accuracy)[filled]).sum())
    side = "above its accuracy: it is overconfident" if difference > 0 else "below its accuracy: it is underconfident"
    return (
        f"Expected calibration error {percent(found.expected_error)}: the absolute difference between confidence (the "
        "probability of the predicted class) and accuracy in each bin, averaged over the images. On average the "
        f"model's confidence is {percent(abs(difference))} {side}."
    )
