"""What W&B shows of a finished run besides its metrics: tables, charts, images and files.

Everything is made from the run directory, so that the end of a run and `toolkit sync` send the same.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from toolkit.reading import Shape, read_json
from toolkit.runs import Run
from toolkit.study.directory import member_of

if TYPE_CHECKING:
    from toolkit.report.run_data import RunData
    from toolkit.report.run_images import RunImages

MAX_PREDICTIONS = 64
"""Maximum number of test images in the table of predictions."""
MAX_SAMPLES = 24
"""Maximum number of classes of which an augmented training image is shown."""
MAX_MATRIX = 60
"""Maximum number of classes in the confusion matrix; W&B draws at most 10,000 cells."""
MAX_ROWS = 10_000
"""Maximum number of rows of a table, as in W&B's client."""
SMALLEST_SIDE, LARGEST_SIDE = 64, 128
"""Sides of thumbnails in pixels."""
RESULTS_FILE = "wandb/results.json"
"""File in the run directory that records the W&B step of the results, and whether they have been sent completely."""


@dataclass(frozen=True)
class Chart:
    """A chart that W&B draws from a table by one of its own specifications."""

    spec: str
    fields: dict[str, str]
    """Columns of the table, by their names in the specification."""
    texts: dict[str, str]


def _curves(title: str, x: str, y: str) -> Chart:
    texts = {"title": title, "x-axis-title": x, "y-axis-title": y}
    return Chart("wandb/area-under-curve/v0", {"x": x, "y": y, "class": "class"}, texts)


CELLS = {name: name for name in ("Actual", "Predicted", "nPredictions")}
CHARTS = {
    "confusion_matrix": Chart("wandb/confusion_matrix/v1", CELLS, {"title": "Confusion matrix"}),
    "label_errors": Chart(
        "wandb/confusion_matrix/v1", CELLS, {"title": "Labels missed and wrongly predicted together"}
    ),
    "precision_recall": _curves("Precision and recall", "recall", "precision"),
    "roc": _curves("ROC", "false_positive_rate", "recall"),
    "images_per_s": Chart("wandb/line/v0", {"x": "epoch", "y": "images_per_s"}, {"title": "Images per second"}),
}
"""Charts by name. With a slash in a name, W&B would add random characters to the names of tables."""
IMAGES = {"filters": "First layer before and after training", "training_samples": "Training images after augmentation"}
"""Images and their titles, by name."""
TABLES = ("predictions", "class_metrics")

Rows = list[list[Any]]


class _Record(Shape):
    """Schema of wandb/results.json."""

    step: int
    complete: bool


def uploads(run: Run) -> set[str]:
    """Return what the trackers get of a run besides metrics: the values of tracking.upload, or its default."""
    tracking = run.recipe.tracking
    if tracking.upload is not None:
        chosen = set(tracking.upload)
    else:
        chosen = {"results"} if member_of(run) else {"results", "model"}
    return chosen | ({"model"} if tracking.registry is not None else set())


def results_step(run: Run) -> int:
    """Return the W&B step of the results, the one after the last line of metrics.jsonl."""
    return int(run.metric_records()[-1]["step"]) + 1


def sent_step(run: Run) -> int | None:
    """Return the W&B step at which the results were sent completely; None if they were not."""
    path = run.path / RESULTS_FILE
    record = read_json(path, _Record) if path.exists() else {}
    return record["step"] if record.get("complete") else None


def record_step(run: Run, step: int, *, complete: bool) -> None:
    """Record that sending the results has begun or, with ``complete``, has ended."""
    run.write_json(RESULTS_FILE, {"step": step, "complete": complete})


def send_results(
    target: Any,
    run: Run,
    step: int,
    log: Callable[[str], None],
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Send a finished run's results to an open W&B run, online or offline, and wait until artifacts have arrived.

    ``step``: the W&B step of tables and images. ``log`` is called with what is left out, and why. Stops waiting when
    ``is_stopped`` returns True. Raises what W&B's client raises.
    """
    from toolkit.wandb_artifacts import log_data, log_model

    chosen = uploads(run)
    record_step(run, step, complete=False)
    artifacts, models = [], []
    with _files_of_artifacts_in(run) if target.offline else contextlib.nullcontext():
        if "results" in chosen:
            _log_media(target, run, step)
            _save_files(target, run)
        if chosen & {"results", "images"}:
            artifacts.append(log_data(target, run, with_images="images" in chosen, log=log))
        if "model" in chosen:
            models = log_model(target, run, log)
    if target.offline:
        return
    for artifact in (*artifacts, *models):
        _wait(artifact, is_stopped)
    registry = run.recipe.tracking.registry
    if models and registry is not None and not is_stopped():
        name, _, collection = registry.partition("/")
        target.link_artifact(models[-1], f"wandb-registry-{name}/{collection or run.recipe.recipe.name}")


@contextlib.contextmanager
def _files_of_artifacts_in(run: Run) -> Iterator[None]:
    """Make W&B's client keep the files of artifacts in the run directory, not in the home directory."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = str((run.path / "wandb").absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
        else:
            os.environ["WANDB_DATA_DIR"] = before


def _wait(artifact: Any, is_stopped: Callable[[], bool]) -> None:
    from wandb.sdk.artifacts.exceptions import WaitTimeoutError

    while not is_stopped():
        try:
            artifact.wait(timeout=1)
            return
        except WaitTimeoutError:
            time.sleep(0.1)


# -- tables, charts and images ----------------------------------------------------------------------------------------


def _log_media(target: Any, run: Run, step: int) -> None:
    from toolkit.report.run_data import load_run_data
    from toolkit.report.run_report import load_images, write_report_of

    data = load_run_data(run)
    images = load_images(data, None, ())
    target.log({"epoch": data.last_epoch, **dict(_media(data, images))}, step=step)
    if not run.report_file.exists() or run.report_file.stat().st_mtime < run.summary_file.stat().st_mtime:
        write_report_of(data, page_only=True, log=lambda line: None)


def _media(data: RunData, images: RunImages | None) -> Iterator[tuple[str, Any]]:
    """Yield W&B's objects by name: those for which the run has data."""
    import wandb

    if rows := list(_predictions(data, images)):
        columns = ["image", "path", "label", "prediction", "probability", "correct"]
        if data.is_multi_label:
            columns = ["image", "path", "labels", "predictions", "largest error", "correct"]
        yield "predictions", wandb.Table(columns=columns, data=rows)
    header, rows = _read_table(data.run.path / "class_metrics.csv")
    if rows:
        yield "class_metrics", wandb.Table(columns=header, data=rows)
    header, points = _read_table(data.run.path / "curves.csv")
    charts = {
        "label_errors" if data.is_multi_label else "confusion_matrix": _confusion(data),
        **{name: [[row[header.index(column)] for column in CHARTS[name].fields.values()] for row in points]
           for name in ("precision_recall", "roc")},
        "images_per_s": [[epoch, speed] for epoch, speed in sorted(data.run.throughput().items())],
    }  # fmt: skip
    for name, rows in charts.items():
        if rows:
            chart = CHARTS[name]
            table = wandb.Table(columns=list(chart.fields.values()), data=rows)
            yield name, wandb.plot_table(chart.spec, table, chart.fields, chart.texts)
    if (sheet := _filters(data)) is not None:
        yield "filters", wandb.Image(sheet, caption=IMAGES["filters"])
    if data.samples is not None:
        shown = data.samples.augmented or data.samples.inputs
        pairs = list(zip(shown, data.samples.classes, strict=True))[:MAX_SAMPLES]
        yield (
            "training_samples",
            [wandb.Image(_thumbnail(image), caption=name, file_type="jpg") for image, name in pairs],
        )


def _predictions(data: RunData, images: RunImages | None) -> Iterator[list[Any]]:
    """Yield the rows of the table of predictions: the worst mistakes, then correct images."""
    import wandb

    found = data.predictions or data.label_predictions
    if found is None:
        return
    correct = np.flatnonzero(found.correct)
    if data.predictions is not None:  # the least certain first
        correct = correct[np.argsort(data.predictions.probabilities[correct], kind="stable")]
    for i in [*found.worst(MAX_PREDICTIONS), *correct][:MAX_PREDICTIONS]:
        pixels = images.load(found.names[i]) if images is not None else None
        image = None if pixels is None else wandb.Image(_thumbnail(_shown(pixels)), file_type="jpg")
        yield [image, found.names[i], *_texts(data, int(i)), bool(found.correct[i])]


def _texts(data: RunData, row: int) -> tuple[str, str, float]:
    """Return label, prediction and probability of a test image; of several labels the largest error of a score."""
    if (found := data.predictions) is not None:
        names = found.classes[found.labels[row]], found.classes[found.predictions[row]]
        return *names, float(found.probabilities[row])
    several = data.label_predictions
    assert several is not None
    labels, predictions = several.text(several.labels[row]), several.text(several.predictions[row])
    return labels, predictions, float(several.largest_errors[row])


def _confusion(data: RunData) -> Rows:
    """Return the cells of the confusion matrix, of many classes only those with the most errors."""
    from toolkit.report.label_predictions import error_matrix

    if (found := data.predictions) is not None:
        wrong, size = ~found.correct, len(found.classes)
        errors = np.bincount(found.labels[wrong], minlength=size) + np.bincount(
            found.predictions[wrong], minlength=size
        )
        kept = _largest(errors)
        place = np.full(size, -1)
        place[kept] = np.arange(len(kept))
        rows, columns = place[found.labels], place[found.predictions]
        is_shown = (rows >= 0) & (columns >= 0)
        matrix = np.zeros((len(kept), len(kept)), dtype=np.int64)
        np.add.at(matrix, (rows[is_shown], columns[is_shown]), 1)
    elif (several := data.label_predictions) is not None:
        whole = error_matrix(several)
        kept = _largest(whole.sum(0) + whole.sum(1))
        matrix = whole[np.ix_(kept, kept)]
    else:
        return []
    names = [data.classes[k] for k in kept]
    return [[one, other, int(matrix[i, j])] for i, one in enumerate(names) for j, other in enumerate(names)]


def _largest(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the indices of the largest counts, in increasing order."""
    return np.sort(np.argsort(-counts, kind="stable")[:MAX_MATRIX])


def _filters(data: RunData) -> Image.Image | None:
    """Draw the first layer's filters before and after training."""
    from toolkit.report.conv_filters import filters_figure
    from toolkit.report.plot_style import plot_style

    if data.filters is None:
        return None
    image = io.BytesIO()
    with plot_style(lambda line: None):
        filters_figure(data.name, data.filters).savefig(image, format="png", dpi=120)
    return Image.open(image)


def _shown(pixels: Any) -> Image.Image:
    from toolkit.data.image_sources import to_shown

    return to_shown(pixels)


def _thumbnail(image: Image.Image) -> Image.Image:
    """Return a copy within the limits of a thumbnail's sides; pixels of small images are repeated."""
    image = image.convert("RGB")
    if (factor := SMALLEST_SIDE // max(image.size)) > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def _read_table(path: Path) -> tuple[list[str], Rows]:
    """Return header and rows of a CSV file whose first column is text and whose others are numbers; None for NaN."""
    if not path.exists():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = itertools.islice(csv.reader(file), MAX_ROWS)
    return header, [[row[0], *(None if text == "nan" else float(text) for text in row[1:])] for row in rows]


# -- files ----------------------------------------------------------------------------------------------------------


def _save_files(target: Any, run: Run) -> None:
    """Send the report, the environment, the recipe and the console output, which W&B shows if it is output.log."""
    names = {run.report_file: "report.html", run.path / "environment.json": "environment.json",
             run.path / "recipe.toml": "recipe.toml", run.log_file: "output.log"}  # fmt: skip
    for path, name in names.items():
        if path.exists():
            copy = Path(target.dir) / name
            shutil.copyfile(path, copy)
            target.save(str(copy), base_path=target.dir, policy="now", glob=False)
