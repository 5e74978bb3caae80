"""The two kinds of classification: everything in training and evaluation that differs between them.

:class:`SingleLabel`: each image has exactly one class. :class:`MultiLabel`: an image has any number of labels, which
are predicted independently.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.data.datasets import Dataset
from toolkit.errors import RunFailed, UserError, first_line
from toolkit.metrics import MEASURES
from toolkit.plugins import PREFIX, find
from toolkit.recipe.schema import Recipe, TaskConfig
from toolkit.run_directory import LABEL_SEPARATOR, PREDICTION_COLUMNS, label_columns
from toolkit.training.classification_metrics import (
    DEFAULT_THRESHOLD,
    ClassMetrics,
    Floats,
    RankingCurve,
    multi_label_class_metrics,
    multi_label_metrics,
    ranking_curve,
    ranking_curves,
    single_label_class_metrics,
    single_label_metrics,
)
from toolkit.training.losses import Loss, training_loss

MAX_SCORES = 20_000_000
"""Maximum number of probabilities of test images that are kept for the curves of the classes; 80 MB."""


@dataclass(frozen=True)
class EvalResult:
    """Results on one split, in the split's order, equal on every process; the methods of a task interpret them."""

    outcomes: npt.NDArray[np.float32]
    """One row per example, as :meth:`SingleLabel.outcomes` returns them, [N, columns]."""
    labels: npt.NDArray[Any]
    """Class indices, int64 [N]; multi-label: 1 for present labels, uint8 [N, K]."""

    @property
    def loss(self) -> float:
        """Mean loss over the examples."""
        return float(self.outcomes[:, 0].astype(np.float64).mean())

    @functools.cached_property
    def curves(self) -> list[RankingCurve]:
        """Precision and recall of each label at every threshold; only for multi-label."""
        return ranking_curves(self.labels, self.outcomes[:, 1:])


class PluginMetric:
    """A metric of the user's own code: a function of labels and probabilities, as scikit-learn has them."""

    def __init__(self, name: str, num_classes: int, *, multi_label: bool) -> None:
        """``name``: as in the recipe. Raises UserError if there is no such plugin, or it fails on random labels."""
        self.name = name.removeprefix(PREFIX)
        if self.name in MEASURES:
            raise UserError(
                f"train.metrics: {self.name!r} is the name of a built-in metric; give the plugin another one"
            )
        self.function = find("metric", self.name).build({}, num_classes=num_classes)
        random = np.random.default_rng(0)
        scores = random.random((4 * num_classes, num_classes))
        labels = random.permutation(np.arange(4 * num_classes) % num_classes)
        try:
            value = self((scores < random.random(scores.shape)).astype(np.uint8) if multi_label else labels, scores)
        except RunFailed as error:
            raise UserError(str(error)) from error
        if not math.isfinite(value):
            raise UserError(f"the metric {self.name!r} is {value} for random labels")

    def __call__(self, labels: npt.NDArray[Any], probabilities: npt.NDArray[np.floating[Any]]) -> float:
        """Return the value for ``labels``, [N] or for multi-label [N, K], and probabilities [N, K], as float64.

        Raises RunFailed if the function fails, or does not return a number.
        """
        try:
            return float(self.function(labels, probabilities.astype(np.float64)))
        except Exception as error:  # the user's own code may raise anything
            text = f"the metric {self.name!r} failed: {type(error).__name__}: {first_line(error)}"
            raise RunFailed(text) from error


@dataclass(frozen=True)
class SingleLabel:
    """Each image has exactly one of ``classes`` classes."""

    classes: int
    extra: tuple[PluginMetric, ...] = ()
    """Other metrics to compute; they need the probabilities of all classes."""
    thresholds: None = None
    is_tuned: Literal[False] = False
    """Always false: there are no thresholds, because the most probable class is predicted."""
    kind: Literal["single_label"] = "single_label"
    reproduced: tuple[str, ...] = ("loss", "accuracy")
    """Metrics that the saved weights must reproduce up to rounding."""
    keeps_scores: bool = False
    """Whether to compute the probabilities of all classes for :meth:`curves`."""
    temperature: float = 1.0
    """Divisor of the logits (temperature scaling; Guo et al. 2017, arXiv:1706.04599)."""
    decision_thresholds: None = None
    """Always None, as ``thresholds``."""

    @property
    def width(self) -> int:
        """Number of columns of :meth:`outcomes`."""
        return 4 + (self.classes if self.has_scores else 0)

    @property
    def has_scores(self) -> bool:
        """Whether :meth:`outcomes` has the probabilities of all classes."""
        return bool(self.extra) or self.keeps_scores

    def with_scores(self, images: int) -> SingleLabel:
        """Return the task with ``keeps_scores``, unless the scores of that many images would take too much memory."""
        return replace(self, keeps_scores=images * self.classes <= MAX_SCORES)

    def loss(self, recipe: Recipe, class_weights: Tensor | None) -> Loss:
        """Return the recipe's training loss; ``class_weights`` as :meth:`balanced_weights` returns them."""
        return training_loss(recipe.train, recipe.augment.label_smoothing, class_weights)

    def balanced_weights(self, labels: npt.NDArray[Any]) -> Floats:
        """Return class weights, [K], proportional to inverse class frequency, with mean 1 over the images."""
        counts = np.bincount(labels, minlength=self.classes)
        weights: Floats = len(labels) / (self.classes * counts)
        return weights

    def soft_targets(self, labels: Tensor) -> Tensor:
        """Convert labels to target probabilities, [n, K]."""
        return F.one_hot(labels, self.classes)

    def is_correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return whether each prediction is correct, bool [n]."""
        return logits.argmax(1) == labels

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each class, [n, K]."""
        return (logits / self.temperature).softmax(1)

    def outcomes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return loss, prediction, its probability and whether the class is among the top 5: float32 [n, 4].

        With ``has_scores``, the probabilities of all classes follow: [n, 4 + K].
        """
        logits = logits / self.temperature
        losses = F.cross_entropy(logits, labels, reduction="none")
        probabilities = logits.softmax(1)
        probability, prediction = probabilities.max(1)
        top5 = logits.topk(min(5, logits.shape[1]), 1).indices.eq(labels[:, None]).any(1)
        found = torch.stack([losses, prediction.float(), probability, top5.float()], 1)
        return torch.cat([found, probabilities], 1) if self.has_scores else found

    def with_thresholds_of(self, result: EvalResult) -> SingleLabel:
        """Return this task unchanged, because it has no thresholds."""
        return self

    def predictions(self, result: EvalResult) -> npt.NDArray[np.int64]:
        """Return the predicted classes, [N]."""
        return result.outcomes[:, 1].astype(np.int64)

    def correct(self, result: EvalResult) -> npt.NDArray[np.bool_]:
        """Return whether each prediction is correct, [N]."""
        found: npt.NDArray[np.bool_] = self.predictions(result) == result.labels
        return found

    def metrics(self, result: EvalResult, prefix: str) -> dict[str, float]:
        """Return the metrics of :data:`toolkit.metrics.MEASURES`, each name prefixed (e.g. with ``val/``)."""
        in_top5 = result.outcomes[:, 3].astype(bool)
        found = single_label_metrics(result.labels, self.predictions(result), in_top5, self.classes)
        found |= {metric.name: metric(result.labels, result.outcomes[:, 4:]) for metric in self.extra}
        return {f"{prefix}{name}": value for name, value in {"loss": result.loss, **found}.items()}

    def class_metrics(self, result: EvalResult) -> tuple[ClassMetrics, dict[str, Floats]]:
        """Return the metrics of each class, and the additional columns of class_metrics.csv."""
        return single_label_class_metrics(result.labels, self.predictions(result), self.classes), {}

    def curves(self, result: EvalResult) -> list[RankingCurve]:
        """Return the curve of each class against all others; empty without scores."""
        scores = result.outcomes[:, 4:]
        return [ranking_curve(result.labels == k, scores[:, k]) for k in range(scores.shape[1])]

    def prediction_columns(self, classes: list[str]) -> Sequence[str]:
        """Return the column names of predictions.csv."""
        return PREDICTION_COLUMNS

    def prediction_rows(
        self, result: EvalResult, names: Sequence[str], classes: list[str]
    ) -> Iterator[tuple[str, ...]]:
        """Yield the rows of predictions.csv. ``names``: names of the images."""
        columns = zip(names, result.labels, self.predictions(result), result.outcomes[:, 2], strict=True)
        for name, label, prediction, probability in columns:
            yield name, classes[int(label)], classes[int(prediction)], f"{probability:.6g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``task`` in model.json."""
        return {"kind": self.kind, **_temperature_entry(self.temperature)}


@dataclass(frozen=True)
class MultiLabel:
    """Each image has any number of ``classes`` labels."""

    classes: int
    thresholds: Floats = field(repr=False)
    """Minimum probability for a label to be predicted, 0..1, [K]; probabilities without temperature scaling."""
    is_tuned: bool = False
    """Whether the thresholds are chosen on the validation images."""
    extra: tuple[PluginMetric, ...] = ()
    """Other metrics to compute."""
    kind: Literal["multi_label"] = "multi_label"
    reproduced: tuple[str, ...] = ("loss",)
    """Without the accuracy, because rounding of a score may change a threshold and thereby many predictions."""
    temperature: float = 1.0
    """Divisor of the logits, as for :class:`SingleLabel`; one for all labels."""

    @property
    def decision_thresholds(self) -> Floats:
        """Minimum of :meth:`probabilities` for a label to be predicted, [K]: the same decisions at any temperature."""
        if self.temperature == 1:
            return self.thresholds
        with np.errstate(divide="ignore"):  # a threshold of 0 or 1
            odds = np.log(self.thresholds) - np.log1p(-self.thresholds)
        found: Floats = 1 / (1 + np.exp(-odds / self.temperature))
        return found

    @property
    def width(self) -> int:
        """Number of columns of :meth:`outcomes`."""
        return 1 + self.classes

    def loss(self, recipe: Recipe, class_weights: Tensor | None) -> Loss:
        """Return the recipe's training loss; ``class_weights`` as :meth:`balanced_weights` returns them."""
        return training_loss(recipe.train, recipe.augment.label_smoothing, class_weights, multi_label=True)

    def balanced_weights(self, labels: npt.NDArray[Any]) -> Floats:
        """Return the weights of absent and of present labels, [2, K]: n / (2 n_absent) and n / (2 n_present)."""
        present = labels.sum(0, dtype=np.int64)
        counts = np.stack([len(labels) - present, present])
        weights: Floats = len(labels) / (2 * np.maximum(counts, 1))
        return weights

    def soft_targets(self, labels: Tensor) -> Tensor:
        """Convert labels to target probabilities, [n, K]."""
        return labels

    def is_correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return whether all labels of each example are predicted correctly with thresholds of 0.5, bool [n]."""
        return ((logits >= 0) == labels.bool()).all(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each label, [n, K]."""
        return (logits / self.temperature).sigmoid()

    def outcomes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean binary cross-entropy of the labels, then their probabilities: float32 [n, 1 + K]."""
        logits = logits / self.temperature
        losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1)
        return torch.cat([losses[:, None], logits.sigmoid()], 1)

    def with_thresholds_of(self, result: EvalResult) -> MultiLabel:
        """Return the task with thresholds chosen on a result for the validation images, unless they are fixed."""
        if not self.is_tuned:
            return self
        return replace(self, thresholds=np.array([curve.best_threshold for curve in result.curves]))

    def predictions(self, result: EvalResult) -> npt.NDArray[np.bool_]:
        """Return the predicted labels, bool [N, K]."""
        found: npt.NDArray[np.bool_] = result.outcomes[:, 1:] >= self.decision_thresholds
        return found

    def correct(self, result: EvalResult) -> npt.NDArray[np.bool_]:
        """Return whether all labels of each example are predicted correctly, [N]."""
        found: npt.NDArray[np.bool_] = (self.predictions(result) == result.labels).all(1)
        return found

    def metrics(self, result: EvalResult, prefix: str) -> dict[str, float]:
        """Return the metrics of :data:`toolkit.metrics.MEASURES`, each name prefixed (e.g. with ``val/``)."""
        found = multi_label_metrics(result.labels, self.predictions(result), result.curves)
        found |= {metric.name: metric(result.labels, result.outcomes[:, 1:]) for metric in self.extra}
        return {f"{prefix}{name}": value for name, value in {"loss": result.loss, **found}.items()}

    def class_metrics(self, result: EvalResult) -> tuple[ClassMetrics, dict[str, Floats]]:
        """Return the metrics of each label, and the additional columns of class_metrics.csv; NaN if undefined."""
        curves = result.curves
        precisions = [curve.average_precision if curve.positives else np.nan for curve in curves]
        areas = [curve.auroc if 0 < curve.positives < len(result.labels) else np.nan for curve in curves]
        others = {"average_precision": np.array(precisions), "auroc": np.array(areas), "threshold": self.thresholds}
        return multi_label_class_metrics(result.labels, self.predictions(result)), others

    def with_scores(self, images: int) -> MultiLabel:
        """Return this task: its outcomes always have the scores."""
        return self

    def curves(self, result: EvalResult) -> list[RankingCurve]:
        """Return the curve of each label."""
        return result.curves

    def prediction_columns(self, classes: list[str]) -> Sequence[str]:
        """Return the column names of predictions.csv."""
        return label_columns(classes)

    def prediction_rows(
        self, result: EvalResult, names: Sequence[str], classes: list[str]
    ) -> Iterator[tuple[str, ...]]:
        """Yield the rows of predictions.csv: image name, labels, predictions, and the probability of each label."""
        columns = zip(names, result.labels, self.predictions(result), result.outcomes[:, 1:], strict=True)
        for name, labels, found, scores in columns:
            texts = (LABEL_SEPARATOR.join(classes[k] for k in np.flatnonzero(mask)) for mask in (labels, found))
            yield (name, *texts, *(f"{score:.9g}" for score in scores))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``task`` in model.json."""
        entry = {"kind": self.kind, "thresholds": self.thresholds.tolist()}
        return entry | _temperature_entry(self.temperature)


Task = SingleLabel | MultiLabel


def _temperature_entry(temperature: float) -> dict[str, Any]:
    """Return the entries of model.json for a temperature; none without temperature scaling."""
    return {} if temperature == 1 else {"temperature": temperature}


def build_task(table: TaskConfig, classes: int, metrics: Sequence[str] = ()) -> Task:
    """Return a recipe's task; thresholds to be chosen on the validation images are 0.5 until then.

    ``metrics``: names of plugins whose metrics are also computed. Raises UserError if one cannot be used.
    """
    extra = tuple(PluginMetric(name, classes, multi_label=table.kind == "multi_label") for name in metrics)
    if table.kind == "single_label":
        return SingleLabel(classes, extra)
    is_tuned = table.threshold == "validation"
    threshold = DEFAULT_THRESHOLD if is_tuned else float(table.threshold)
    return MultiLabel(classes, np.full(classes, threshold), is_tuned, extra)


def task_from_dict(entry: dict[str, Any] | None, classes: int) -> Task:
    """Return a trained model's task from its entry in model.json, which earlier versions did not write (None).

    Raises ValueError if the entry is damaged.
    """
    temperature = 1.0 if entry is None else entry.get("temperature", 1.0)
    if entry is None or entry["kind"] == "single_label":
        return SingleLabel(classes, temperature=temperature)
    thresholds = np.array(entry["thresholds"], dtype=np.float64)
    if thresholds.shape != (classes,):
        raise ValueError(f"task.thresholds has {thresholds.size} values for {classes} classes")
    return MultiLabel(classes, thresholds, temperature=temperature)


def check_labels(dataset: Dataset, kind: str) -> None:
    """Raise UserError if a data set's labels do not match the kind of task."""
    if dataset.is_multi_label == (kind == "multi_label"):
        if dataset.is_multi_label and (name := next((c for c in dataset.classes if LABEL_SEPARATOR in c), None)):
            raise UserError(f"the label {name!r} contains {LABEL_SEPARATOR!r}, which separates the labels in files")
        return
    if dataset.is_multi_label:
        raise UserError(
            f"images of {dataset.name} may have several labels, but task.kind is {kind!r}: set task.kind = "
            '"multi_label", or use a data set with exactly one label per image'
        )
    raise UserError(
        f"images of {dataset.name} have exactly one class each, but task.kind is {kind!r}: set task.kind = "
        '"single_label", or use a data set with several labels per image'
    )


def check_label_splits(dataset: Dataset, splits: dict[str, npt.NDArray[np.int64]]) -> None:
    """Raise UserError if the metrics of a multi-label split would be undefined because no label varies in it."""
    for name, indices in splits.items():
        counts = dataset.labels[indices].sum(0, dtype=np.int64)
        if len(indices) and not ((counts > 0) & (counts < len(indices))).any():
            raise UserError(
                f"no label is present in some of the {len(indices)} {name} images and absent from others, so that mAP "
                "and AUROC are undefined; use more images, or another split"
            )
