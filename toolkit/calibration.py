"""Calibration of a run by temperature scaling: its calibration.json. Does not import torch.

A temperature divides the logits before they become probabilities (Guo et al. 2017, "On calibration of modern neural
networks", arXiv:1706.04599). The predicted classes stay the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from toolkit.reading import Shape, read_json
from toolkit.report.prediction_metrics import BINS, Calibration, calibration
from toolkit.runs import Run

FILE = "calibration.json"


class Reliability(Shape):
    """How well the probabilities of a split's images are calibrated.

    Single-label: the probabilities are those of the predicted classes, and ``accuracy`` is the fraction of correct
    predictions. Multi-label: they are those of all labels, and ``accuracy`` is the fraction of labels that are present.
    """

    nll: float
    """Mean negative log-likelihood of the labels, in nats: the cross-entropy or binary cross-entropy."""
    ece: float
    """Expected calibration error, 0..1."""
    counts: list[int] = Field(min_length=BINS, max_length=BINS)
    """Number of probabilities in each bin."""
    confidence: list[float | None] = Field(min_length=BINS, max_length=BINS)
    """Mean probability in each bin; None for an empty one."""
    accuracy: list[float | None] = Field(min_length=BINS, max_length=BINS)

    @classmethod
    def measured(
        cls, nll: float, probabilities: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]
    ) -> Reliability:
        """Compute the bins from probabilities [N] and whether each prediction is correct, [N]."""
        found = calibration(probabilities, correct)
        confidence, accuracy = (
            [None if np.isnan(value) else value for value in values.tolist()]
            for values in (found.confidence, found.accuracy)
        )
        counts = found.counts.tolist()
        return cls(nll=nll, ece=found.expected_error, counts=counts, confidence=confidence, accuracy=accuracy)

    @property
    def bins(self) -> Calibration:
        """The bins as arrays, for plots."""
        confidence, accuracy = (np.array(values, dtype=np.float64) for values in (self.confidence, self.accuracy))
        return Calibration(np.linspace(0, 1, BINS + 1), np.array(self.counts), confidence, accuracy, self.ece)


class SplitCalibration(Shape):
    """Calibration of a split before and after temperature scaling."""

    images: int
    before: Reliability
    after: Reliability


class TemperatureScaling(Shape):
    """Content of calibration.json."""

    temperature: float
    splits: dict[str, SplitCalibration]
    """Validation, on which the temperature was chosen, and test, if there are test images."""


def read_calibration(run: Run) -> TemperatureScaling | None:
    """Return a run's calibration; None if it is not calibrated. Raises UserError if the file is damaged."""
    path = run.path / FILE
    if not path.exists() or "temperature" not in run.model_card.get("task", {}):
        return None
    return TemperatureScaling.model_validate(read_json(path, TemperatureScaling))


def without_temperature(card: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a model.json without the temperature, which holds only for the weights of that model."""
    task = {key: value for key, value in (card.get("task") or {}).items() if key != "temperature"}
    return card | ({"task": task} if task else {})
