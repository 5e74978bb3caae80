"""What TensorBoard shows of a finished run besides its metrics: hyperparameters, training images, precision and recall.

Everything is made from the run directory.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.runs import Run
from toolkit.trackers import flatten, scalars

MAX_SAMPLES = 24
"""Maximum number of classes of which an augmented training image is shown."""
THRESHOLDS = 101
"""Number of thresholds of a precision-recall curve, equally spaced from 0 to 1; TensorBoard takes at most 127."""

Floats = npt.NDArray[np.float64]


def log_results(writer: Any, run: Run) -> None:
    """Log a finished run's results to a SummaryWriter; hyperparameters with final metrics go to its folder results/."""
    from toolkit.report.run_data import load_run_data
    from toolkit.report.run_report import load_images

    best, step = run.summary["best"], int(run.metric_records()[-1]["step"])
    metrics = {f"best/{name}": float(value) for name, value in best.items() if isinstance(value, float)}
    hyperparameters = scalars(flatten(run.recipe.model_dump(mode="json", exclude_none=True)))
    writer.add_hparams(hyperparameters, metrics, run_name="results", global_step=step)
    data = load_run_data(run)
    load_images(data, None, ())
    if (samples := data.samples) is not None:
        shown = samples.augmented or samples.inputs
        for name, image in itertools.islice(zip(samples.classes, shown, strict=True), MAX_SAMPLES):
            writer.add_image(f"training_samples/{name}", np.array(image.convert("RGB")), step, dataformats="HWC")
    for name, columns in _curves(run):
        writer.add_pr_curve_raw(f"precision_recall/{name}", *columns, global_step=step, num_thresholds=THRESHOLDS)
    writer.flush()


def _curves(run: Run) -> Iterator[tuple[str, tuple[Floats, ...]]]:
    """Yield each class of curves.csv with the columns of its curve, [THRESHOLDS] each.

    The columns are the numbers of true positives, false positives, true negatives and false negatives, precision and
    recall. At a threshold without a point in curves.csv they are those of the next higher one.
    """
    if not (run.path / "curves.csv").exists():
        return
    images = run.summary["images"]["test"]
    with (run.path / "class_metrics.csv").open(newline="", encoding="utf-8") as file:
        support = {row["class"]: int(float(row["support"])) for row in csv.DictReader(file)}
    with (run.path / "curves.csv").open(newline="", encoding="utf-8") as file:
        for name, rows in itertools.groupby(csv.DictReader(file), lambda row: row["class"]):
            points = np.array([[row["threshold"], row["recall"], row["false_positive_rate"]] for row in rows], float)
            # The first row, above all scores, is for thresholds at which nothing is predicted.
            thresholds, recall, false_positive_rate = np.vstack([[np.inf, 0, 0], points]).T
            # Thresholds decrease; the last point that is not below each threshold:
            at = np.searchsorted(-thresholds, -np.linspace(0, 1, THRESHOLDS), side="right") - 1
            positives, negatives = support[name], images - support[name]
            hits, alarms = np.rint(recall[at] * positives), np.rint(false_positive_rate[at] * negatives)
            precision = hits / np.maximum(hits + alarms, 1)
            yield name, (hits, alarms, negatives - alarms, positives - hits, precision, recall[at])
