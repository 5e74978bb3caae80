"""Metrics of a run's predictions, with NumPy: confusion matrix, accuracy by class, calibration, worst mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Counts = Ints
Floats = npt.NDArray[np.float64]

BINS = 15
"""Number of equal-width confidence bins, as in Guo et al. (2017)."""


@dataclass(frozen=True)
class RunPredictions:
    """Content of predictions.csv, in row order."""

    names: list[str]
    """Names of the images."""
    classes: list[str]
    labels: Ints
    """True class of each image, an index into ``classes``, [N]."""
    predictions: Ints
    """Most probable class of each image, [N]."""
    probabilities: Floats
    """Probability of the predicted class, 0..1, [N]."""
    kept: Mapping[str, list[str]] = field(default_factory=dict)
    """Values of the columns in data.columns.keep, by column, [N] each."""

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each prediction is correct, [N]."""
        is_correct: npt.NDArray[np.bool_] = self.labels == self.predictions
        return is_correct

    def worst(self, count: int) -> Ints:
        """Return the rows of at most ``count`` mistakes with the highest probabilities, highest first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.argsort(-self.probabilities[wrong], kind="stable")][:count]


def confusion_matrix(found: RunPredictions) -> Ints:
    """Count the images of class i (row) predicted as class j (column), [K, K]."""
    size = len(found.classes)
    flat = np.bincount(found.labels * size + found.predictions, minlength=size * size)
    return flat.reshape(size, size).astype(np.int64)


def support(found: RunPredictions) -> Ints:
    """Return the number of images of each class, [K]."""
    return np.bincount(found.labels, minlength=len(found.classes)).astype(np.int64)


def correct_by_class(found: RunPredictions) -> Ints:
    """Return the number of images of each class that are classified correctly, [K]."""
    return np.bincount(found.labels[found.correct], minlength=len(found.classes)).astype(np.int64)


def accuracy_by_class(found: RunPredictions) -> Floats:
    """Return the fraction of each class's images classified correctly, 0..1, [K]; NaN for a class without images."""
    images = support(found)
    share: Floats = np.divide(correct_by_class(found), images, out=np.full(len(images), np.nan), where=images > 0)
    return share


class ClassConfusion(NamedTuple):
    """A pair of true and predicted class, and the number of images."""

    label: int
    prediction: int
    images: int


def confusion_cells(found: RunPredictions) -> list[ClassConfusion]:
    """Return the cells of the confusion matrix that are not 0, row by row.

    The whole matrix of 20,000 classes would take 3 GB.
    """
    size = len(found.classes)
    flat, images = np.unique(found.labels * size + found.predictions, return_counts=True)
    cells = zip((flat // size).tolist(), (flat % size).tolist(), images.tolist(), strict=True)
    return [ClassConfusion(*cell) for cell in cells]


def confusions(found: RunPredictions) -> list[ClassConfusion]:
    """Return the confused pairs of classes, most frequent first."""
    wrong = [cell for cell in confusion_cells(found) if cell.label != cell.prediction]
    return sorted(wrong, key=lambda cell: -cell.images)


@dataclass(frozen=True)
class Calibration:
    """Calibration statistics per confidence bin."""

    edges: Floats
    """Bin edges, 0..1, [BINS + 1]; a bin includes its right edge and not its left one."""
    counts: Ints
    """Number of images in each bin, [BINS]."""
    confidence: Floats
    """Mean probability of each bin's predictions, [BINS]; NaN for an empty bin."""
    accuracy: Floats
    """Fraction of each bin's predictions that are correct, [BINS]; NaN for an empty bin."""
    expected_error: float
    """Expected calibration error, 0..1: the mean over images of |accuracy - confidence| of their bin."""


def calibration(probabilities: Floats, correct: Sequence[bool] | npt.NDArray[np.bool_]) -> Calibration:
    """Compute how well the predicted class's probability is calibrated (Naeini et al. 2015; Guo et al. 2017, eq. 3)."""
    edges = np.linspace(0, 1, BINS + 1)
    bins = np.clip(np.ceil(probabilities * BINS).astype(np.int64) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    filled = counts > 0

    def mean(values: Floats) -> Floats:
        sums = np.bincount(bins, weights=values, minlength=BINS)
        means: Floats = np.divide(sums, counts, out=np.full(BINS, np.nan), where=filled)
        return means

    confidence, accuracy = mean(probabilities), mean(np.asarray(correct, dtype=np.float64))
    error = np.sum(counts[filled] * np.abs(accuracy - confidence)[filled]) / max(len(probabilities), 1)
    return Calibration(edges, counts.astype(np.int64), confidence, accuracy, float(error))


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval (Wilson 1927) of ``correct`` out of ``count`` test images."""
    z, share = 1.959964, correct / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * float(np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)))
    return middle - half, middle + half
