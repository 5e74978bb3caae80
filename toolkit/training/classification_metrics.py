"""Metrics of single-label and multi-label classification, with NumPy; scikit-learn gives the same values.

A label is *present* in an image or *absent* from it. It is predicted if its score is at least the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class ClassMetrics:
    """Precision, recall, F1 and support of each class or label, [K]; 0 where the denominator is 0."""

    precision: Floats
    """Correct predictions of the class, divided by the number of its predictions."""
    recall: Floats
    """Correct predictions of the class, divided by the number of its images."""
    f1: Floats
    """Harmonic mean of precision and recall."""
    support: Ints
    """Number of images of the class."""
    predicted: Ints
    """Number of images for which the class is predicted."""

    @classmethod
    def of_counts(cls, hits: Ints, support: Ints, predicted: Ints) -> ClassMetrics:
        """Compute the metrics from the number of correct predictions, of images and of predictions of each class."""
        f1 = _ratio(2 * hits, support + predicted)
        return cls(_ratio(hits, predicted), _ratio(hits, support), f1, support, predicted)


def _ratio(numerator: Ints, denominator: Ints) -> Floats:
    out = np.zeros(len(denominator))
    found: Floats = np.divide(numerator, denominator, out=out, where=denominator > 0)
    return found


def single_label_class_metrics(labels: Ints, predictions: Ints, classes: int) -> ClassMetrics:
    """Return the metrics of each class. ``labels`` and ``predictions``: class indices, [N]."""
    hits, support, predicted = (
        np.bincount(values, minlength=classes) for values in (labels[labels == predictions], labels, predictions)
    )
    return ClassMetrics.of_counts(hits, support, predicted)


def multi_label_class_metrics(labels: npt.NDArray[np.uint8], predictions: Bools) -> ClassMetrics:
    """Return the metrics of each label. ``labels`` and ``predictions``: 1 for present or predicted labels, [N, K]."""
    present = labels.astype(bool)
    hits, support, predicted = (np.count_nonzero(mask, 0) for mask in (present & predictions, present, predictions))
    return ClassMetrics.of_counts(hits, support, predicted)


@dataclass(frozen=True)
class RankingCurve:
    """Ranking of all images by their score for one label, and the number of images found at each threshold."""

    thresholds: Floats
    """Distinct scores in decreasing order, [n]."""
    hits: Ints
    """Number of images with at least this score in which the label is present, [n]."""
    retrieved: Ints
    """Number of images with at least this score, [n]."""

    @property
    def positives(self) -> int:
        """Number of images in which the label is present."""
        return int(self.hits[-1])

    @property
    def precision(self) -> Floats:
        """Precision at each threshold."""
        found: Floats = self.hits / self.retrieved
        return found

    @property
    def recall(self) -> Floats:
        """Recall at each threshold; the label must be present in some image."""
        found: Floats = self.hits / self.positives
        return found

    @property
    def false_positive_rate(self) -> Floats:
        """False positive rate at each threshold; the label must be absent from an image."""
        misses = self.retrieved - self.hits
        found: Floats = misses / misses[-1]
        return found

    @property
    def average_precision(self) -> float:
        """Average precision, 0..1: the mean of the precisions, weighted by the increases in recall.

        Not interpolated, as in scikit-learn's average_precision_score. The label must be present in some image.
        """
        return float(np.sum(np.diff(self.recall, prepend=0.0) * self.precision))

    @property
    def auroc(self) -> float:
        """Area under the ROC curve, 0..1; the label must be present in some images and absent from others."""
        return float(np.trapezoid(np.append(0.0, self.recall), np.append(0.0, self.false_positive_rate)))

    @property
    def best_threshold(self) -> float:
        """Threshold with the highest F1, and the highest one in case of ties; 0.5 if the label is never present.

        It is midway between two scores, so that rounding errors do not change the predictions (Lipton et al. 2014,
        "Optimal thresholding of classifiers to maximize F1 measure").
        """
        if not self.positives:
            return DEFAULT_THRESHOLD
        best = int(np.argmax(2 * self.hits / (self.retrieved + self.positives)))
        below = self.thresholds[best + 1] if best + 1 < len(self.thresholds) else 0.0
        return float((self.thresholds[best] + below) / 2)


def ranking_curve(present: npt.NDArray[np.generic], scores: npt.NDArray[np.floating]) -> RankingCurve:
    """Return the curve of one label. ``present``: 1 for images with the label, [N]. ``scores``: in 0..1, [N]."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    last_of_equals = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    hits = np.cumsum(present[order].astype(np.int64))[last_of_equals]
    return RankingCurve(ranked[last_of_equals], hits, last_of_equals + 1)


def ranking_curves(labels: npt.NDArray[np.uint8], scores: npt.NDArray[np.floating]) -> list[RankingCurve]:
    """Return the curve of each label. ``labels``: 1 for present labels, [N, K]. ``scores``: in 0..1, [N, K]."""
    return [ranking_curve(labels[:, k], scores[:, k]) for k in range(labels.shape[1])]


CURVE_COLUMNS = ("class", "threshold", "precision", "recall", "false_positive_rate")
"""Columns of curves.csv."""
MAX_CURVES, MAX_CURVE_POINTS = 50, 100
"""Maximum number of classes in curves.csv, and of thresholds of each."""


def curve_rows(curves: Sequence[RankingCurve], classes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of curves.csv: points of each class's precision-recall and ROC curve, in the order of the classes.

    Of many classes only those with the lowest average precision are included, of many thresholds an equally spaced
    selection by rank. Classes that are present in all images, or in none, have no curves.
    """
    drawn = [k for k, curve in enumerate(curves) if 0 < curve.positives < curve.retrieved[-1]]
    hardest = sorted(drawn, key=lambda k: curves[k].average_precision)[:MAX_CURVES]
    for k in sorted(hardest):
        curve = curves[k]
        points = np.unique(np.linspace(0, len(curve.thresholds) - 1, MAX_CURVE_POINTS).round().astype(np.int64))
        values = (curve.thresholds, curve.precision, curve.recall, curve.false_positive_rate)
        for point in points:
            yield classes[k], *(f"{column[point]:.6g}" for column in values)


def single_label_metrics(labels: Ints, predictions: Ints, in_top5: Bools, classes: int) -> dict[str, float]:
    """Return accuracy, top-5 accuracy, balanced accuracy and macro F1 of class indices, [N].

    Balanced accuracy is the mean recall over the classes that occur; macro F1 is the mean F1 over the classes that
    occur or are predicted, as in scikit-learn.
    """
    of_class = single_label_class_metrics(labels, predictions, classes)
    return {
        "accuracy": float((predictions == labels).mean()),
        "top5_accuracy": float(in_top5.mean()),
        "balanced_accuracy": float(of_class.recall[of_class.support > 0].mean()),
        "macro_f1": float(of_class.f1[of_class.support + of_class.predicted > 0].mean()),
    }


def multi_label_metrics(
    labels: npt.NDArray[np.uint8], predictions: Bools, curves: Sequence[RankingCurve]
) -> dict[str, float]:
    """Return the metrics of labels [N, K], their predictions [N, K] and the curves of their scores.

    accuracy is the subset accuracy: the fraction of images whose labels are all predicted correctly. map is the mean
    average precision over the labels that are present in some image; auroc is the mean area under the ROC curve over
    the labels that are present in some images and absent from others. macro_f1 is the mean F1 over all labels, and
    micro_f1 the F1 over the predictions of all labels together. Undefined metrics are left out.
    """
    of_label = multi_label_class_metrics(labels, predictions)
    hits, decisions = np.count_nonzero(predictions & (labels == 1)), of_label.support.sum() + of_label.predicted.sum()
    found = {
        "accuracy": float((predictions == labels).all(1).mean()),
        "macro_f1": float(of_label.f1.mean()),
        "micro_f1": float(2 * hits / decisions) if decisions else 0.0,
    }
    precisions = [curve.average_precision for curve in curves if curve.positives]
    areas = [curve.auroc for curve in curves if 0 < curve.positives < len(labels)]
    found |= {"map": float(np.mean(precisions))} if precisions else {}
    return found | ({"auroc": float(np.mean(areas))} if areas else {})
