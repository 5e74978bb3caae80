"""Tolerant loading of a run directory: missing or damaged files are listed, and the rest is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from toolkit.calibration import TemperatureScaling, read_calibration
from toolkit.data.preprocessing import Preprocessing
from toolkit.errors import UserError
from toolkit.evaluations import Evaluation, evaluation_names, read_evaluation
from toolkit.formatting import plural
from toolkit.locks import is_held
from toolkit.reading import UnreadableFile, read_json, require_file
from toolkit.recipe import Recipe
from toolkit.recipe.diagnostics import printable
from toolkit.recipe.earlier_versions import update_summary
from toolkit.report.kept_columns import kept_columns
from toolkit.report.label_predictions import LabelPredictions, read_label_predictions
from toolkit.report.prediction_metrics import Calibration, Counts, RunPredictions, calibration
from toolkit.run_directory import PREDICTION_COLUMNS
from toolkit.runs import Run
from toolkit.training.lr_schedule import epoch_rank
from toolkit.tta import TtaResult, read_tta

T = TypeVar("T")
Record = dict[str, Any]

SPLITS = ("train", "validation", "test")
DAMAGE = (LookupError, TypeError, ValueError, OSError, AttributeError, ArithmeticError, RecursionError, RuntimeError)
"""Exceptions that reading a file with invalid content may raise."""


@dataclass(frozen=True)
class ConvFilters:
    """Weights of the first convolution."""

    layer: str
    before: npt.NDArray[np.float32]
    """Weights before training, [filters, channels, height, width]."""
    after: npt.NDArray[np.float32]
    """Weights of the best epoch, [filters, channels, height, width]."""


@dataclass(frozen=True)
class Mistake:
    """A misclassified test image."""

    name: str
    label: str
    prediction: str
    probability: float
    image: Image.Image | None
    """The image; None if it is not available."""
    kept: str = ""
    """Values of the image in the columns of data.columns.keep, as text."""


@dataclass(frozen=True)
class TrainingSamples:
    """One training image of each class, as in the file and as the model's input."""

    classes: list[str]
    files: list[Image.Image]
    inputs: list[Image.Image]
    """The images as the model receives them in evaluation."""
    augmented: list[Image.Image]
    """The images as the model receives them in training, with random augmentation; empty if the recipe has none."""
    scale: tuple[float, float]
    """Input values that are shown as black and as white."""


@dataclass(frozen=True)
class FilterEffect:
    """An image to which single filters of the first convolution are applied."""

    filters: list[int]
    """Indices of the filters that are applied."""
    caption: str
    image: Image.Image
    input: npt.NDArray[np.float32]
    """The image as the model's input, [C, H, W]."""


@dataclass
class RunData:
    """Contents of a run directory, and what a report shows of the data set."""

    run: Run
    recipe: Recipe | None = None
    origins: dict[str, str] = field(default_factory=dict)
    """Origin of each recipe key's value; empty if the run did not record it."""
    summary: Record | None = None
    environment: Record = field(default_factory=dict)
    epochs: list[Record] = field(default_factory=list)
    """Records logged at the end of epochs."""
    steps: list[Record] = field(default_factory=list)
    """Records logged within epochs."""
    card: Record = field(default_factory=dict)
    """Content of checkpoints/model.json."""
    split: Record = field(default_factory=dict)
    """Content of split.json, including the names of the images by split."""
    predictions: RunPredictions | None = None
    label_predictions: LabelPredictions | None = None
    """Predictions of a multi-label run, which has no ``predictions``."""
    filters: ConvFilters | None = None
    counts: dict[str, Counts] | None = None
    """Number of images of each class by split."""
    mistakes: list[Mistake] = field(default_factory=list)
    """The misclassified test images with the highest probabilities, highest first."""
    samples: TrainingSamples | None = None
    effect: FilterEffect | None = None
    scaling: TemperatureScaling | None = None
    """Temperature scaling of the model; None if it is not calibrated."""
    tta: list[TtaResult] = field(default_factory=list)
    """Accuracies without and with test-time augmentation."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Evaluations of the best model on other data sets."""
    missing: list[str] = field(default_factory=list)
    """Messages about what cannot be shown, and why."""

    @property
    def name(self) -> str:
        """Name of the recipe, or of the parent folder if the recipe cannot be read."""
        return self.recipe.recipe.name if self.recipe else self.run.path.resolve().parent.name

    @property
    def classes(self) -> list[str]:
        """Class names in label order; empty if unknown."""
        return list(self.card.get("classes", []))

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels."""
        return self.recipe is not None and self.recipe.task.kind == "multi_label"

    @property
    def thresholds(self) -> list[float]:
        """Threshold of each label of a multi-label run; empty if unknown."""
        return list(self.card.get("task", {}).get("thresholds", []))

    @property
    def preprocessing(self) -> Preprocessing:
        """The run's preprocessing. Raises UserError if model.json does not contain it."""
        try:
            return Preprocessing.from_dict(self.card["preprocessing"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.run.checkpoints / 'model.json'} has no preprocessing ({error})") from None

    @property
    def train_preprocessing(self) -> Preprocessing:
        """Preprocessing of the run's training images in its last epochs; raises like :attr:`preprocessing`."""
        stored = self.card.get("train_preprocessing")
        return Preprocessing.from_dict(stored) if isinstance(stored, dict) else self.preprocessing

    @property
    def best_epoch(self) -> int:
        """Number of the best epoch, whose model is selected."""
        if self.summary:
            return int(self.summary["best"]["epoch"])
        best_metric = self.recipe.train.best_metric if self.recipe else "val/accuracy"
        best = max(self.epochs, key=lambda record: epoch_rank(record, best_metric))  # the first in case of ties
        return int(best["epoch"])

    @property
    def best_label(self) -> str:
        """Label of the best epoch in plots."""
        return "last" if self.recipe and self.recipe.train.best_metric == "last" else "best"

    @property
    def last_epoch(self) -> int:
        """Number of the last completed epoch."""
        return int(self.epochs[-1]["epoch"])

    @property
    def end_label(self) -> str:
        """Label of the last epoch in plots."""
        return "stopped early" if self.stopped_early else "last"

    @property
    def calibration(self) -> Calibration | None:
        """Calibration on the test images; None without predictions."""
        found = self.predictions
        return calibration(found.probabilities, found.correct) if found else None

    @property
    def decays_by_factors(self) -> bool:
        """Whether the schedule multiplies the learning rate by a factor, which suits a logarithmic scale."""
        names = ("step", "multi_step", "exponential", "plateau")
        return self.recipe is not None and self.recipe.scheduler.name in names

    @property
    def state(self) -> str:
        """State of the run, such as "finished after 20 epochs" or "not finished; 3 epochs done"."""
        epochs = plural(self.last_epoch if self.epochs else 0, "epoch")
        if self.stopped_early:
            return f"finished, stopped early after epoch {self.last_epoch}"
        if self.summary is not None:
            return f"finished after {epochs}"
        return f"{'being trained' if is_held(self.run.path / '.lock') else 'not finished'}; {epochs} done"

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ended the run."""
        return bool(self.summary and self.summary.get("stopped_early"))

    def try_load(self, what: str, read: Callable[[], T]) -> T | None:
        """Call :func:`try_load`, adding failures to ``self.missing``."""
        return try_load(self.missing, what, read)


def try_load(missing: list[str], what: str, read: Callable[[], T]) -> T | None:
    """Return ``read()``; if it fails, return None and add a line to ``missing`` with ``what`` and the reason."""
    try:
        return read()
    except UserError as error:
        missing.append(printable(f"{what}: {error}"))
    except DAMAGE as error:
        missing.append(printable(f"{what}: damaged ({type(error).__name__}: {error})"))
    return None


def load_progress(run: Run) -> RunData:
    """Load recipe, metrics and, of a finished run, the summary."""
    data = RunData(run)
    data.recipe = data.try_load("the recipe", lambda: run.recipe)
    _read_metrics(data)
    if run.is_finished and data.epochs:
        data.summary = data.try_load("test metrics", lambda: _checked_summary(data))
    return data


def load_run_data(run: Run) -> RunData:
    """Load a run directory. Raises UserError if it has no finished epoch."""
    data = load_progress(run)
    if not data.epochs:
        raise UserError(
            f"{run.path} has no finished epoch yet, so there is nothing to report ({_missing_epochs_reason(run)}); "
            "`toolkit status` shows its progress"
        )
    if not run.is_finished:
        data.try_load("test metrics", lambda: _checked_summary(data))  # adds the reason why there are none
    data.environment = data.try_load("the environment", lambda: run.environment) or {}
    data.card = data.try_load("the names of the classes", lambda: _checked_card(run)) or {}
    data.split = data.try_load("the lists of images", lambda: run.split) or {}
    data.origins = data.try_load("the origins of the recipe's values", lambda: run.origins) or {}
    if (data.summary is not None and run.has_test) or (run.path / "predictions.csv").exists():
        if data.is_multi_label:
            data.label_predictions = data.try_load("predictions", lambda: read_label_predictions(run, data.classes))
        else:
            data.predictions = data.try_load("predictions", lambda: read_predictions(run, data.classes))
    data.scaling = data.try_load("calibration", lambda: read_calibration(run))
    data.tta = data.try_load("test-time augmentation", lambda: read_tta(run)) or []
    for name in evaluation_names(run):
        found = data.try_load(f"evaluation {name}", lambda name=name: read_evaluation(run, name))  # type: ignore[misc]
        data.evaluations += [] if found is None else [found]
    data.filters = data.try_load("filters of the first layer", lambda: _read_filters(run))
    return data


def _missing_epochs_reason(run: Run) -> str:
    return "metrics.jsonl has no line of an epoch" if run.metrics_file.exists() else "it has no metrics.jsonl"


def _read_metrics(data: RunData) -> None:
    """Read the valid lines of metrics.jsonl; the last line of a killed run may be incomplete."""
    lines = data.try_load("metrics", lambda: list(data.run.metric_lines())) or []
    bad = [number for number, line in enumerate(lines, 1) if isinstance(line, ValueError)]
    for line in lines:
        if not isinstance(line, ValueError):
            record = _numbers(line)
            (data.epochs if "train/loss" in record else data.steps).append(record)
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        data.missing.append(f"{len(bad)} of {len(lines)} lines of metrics.jsonl: damaged (line {shown})")


def _checked_summary(data: RunData) -> Record:
    """Return the summary without values that should be numbers and are not. Raises UserError if epochs are missing."""
    file = data.run.path / "summary.json"
    summary = update_summary(read_json(file))  # the valid parts of a damaged summary are shown
    for model in ("best", "last"):
        if not isinstance(summary.get(model), dict) or not isinstance(summary[model].get("epoch"), int):
            raise UserError(f"{file} is damaged: it has no {model}.epoch")
        wrong = [key for key, value in summary[model].items() if not isinstance(value, int | float)]
        data.missing += [printable(f"{model}.{key}: {file} is damaged: not a number") for key in wrong]
    texts = {key: str(summary[key]) for key in ("device", "precision") if key in summary}
    tables = {key: _numbers(summary[key]) for key in ("best", "last", "images") if isinstance(summary.get(key), dict)}
    return _numbers(summary) | texts | tables


def _numbers(values: Record) -> Record:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _checked_card(run: Run) -> Record:
    card = run.model_card
    classes = card.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{run.checkpoints / 'model.json'} is damaged: it lists no classes")
    return card


def read_predictions(run: Run, classes: list[str]) -> RunPredictions:
    """Read predictions.csv. If ``classes`` is empty, it is taken from the file. Raises UserError if damaged."""
    file, rows = run.path / "predictions.csv", run.prediction_records()
    if not rows:
        raise UnreadableFile(file, "it has no rows")
    classes = classes or sorted({row[column] for row in rows for column in ("label", "prediction")})
    index = {name: number for number, name in enumerate(classes)}
    unknown = next((row for row in rows if row["label"] not in index or row["prediction"] not in index), None)
    if unknown is not None:
        raise UnreadableFile(file, f"line {rows.index(unknown) + 2} names a class that the run does not have")
    return RunPredictions(
        [row["path"] for row in rows],
        classes,
        np.array([index[row["label"]] for row in rows], dtype=np.int64),
        np.array([index[row["prediction"]] for row in rows], dtype=np.int64),
        np.array([float(row["probability"]) for row in rows], dtype=np.float64),
        kept_columns(rows, PREDICTION_COLUMNS),
    )


def _read_filters(run: Run) -> ConvFilters:
    """Read the first convolution's weights before and after training."""
    from safetensors import SafetensorError, safe_open

    if not run.first_layer.exists():
        raise UserError(f"{run.first_layer} is missing: the model has no convolution, or an older version trained it")
    for path in (run.first_layer, run.best_weights):
        require_file(path)
    try:
        with safe_open(run.first_layer, "numpy") as file:
            (layer,) = file.keys()
            before = file.get_tensor(layer)
        with safe_open(run.best_weights, "numpy") as file:
            if layer in file.keys():  # noqa: SIM118 (the file is no mapping)
                return ConvFilters(layer, before, file.get_tensor(layer))
        from safetensors.torch import load_file

        from toolkit.models.lora import merge_lora

        return ConvFilters(layer, before, merge_lora(load_file(run.best_weights))[layer].numpy())
    except (SafetensorError, FileNotFoundError, KeyError) as error:
        raise UserError(f"{run.checkpoints}: the weights cannot be read ({error})") from None
