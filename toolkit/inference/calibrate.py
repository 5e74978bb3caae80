"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599): choose the temperature of a run's logits on validation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax
from torch import Tensor

from toolkit.calibration import FILE, Reliability, SplitCalibration, TemperatureScaling
from toolkit.distributed.process import main_only
from toolkit.errors import UserError
from toolkit.inference.evaluate import measure, split_images
from toolkit.inference.tta import with_tta
from toolkit.runs import Run
from toolkit.training.resume import check_recipe
from toolkit.training.task import task_from_dict
from toolkit.training.trained_model import load_model

LIMITS = (0.01, 100.0)
"""Range of temperatures that are tried."""

Logits = npt.NDArray[np.floating]
"""Logits of a split, [N, K]."""
Labels = npt.NDArray[np.integer]
"""Class indices, [N]; multi-label: 1 for present labels, [N, K]."""


@dataclass(frozen=True)
class _LogitsAlone:
    """Keeps the logits of each example; see :class:`toolkit.training.evaluation.Outcomes`."""

    width: int
    """Number of classes."""

    def outcomes(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits


def calibrate(run: Run, accelerator: Accelerator, data_root: Path | None = None) -> TemperatureScaling:
    """Choose the temperature on a run's validation images, and write it to model.json. Collective.

    NLL and expected calibration error before and after, on the validation and test images, are written to
    calibration.json. Raises UserError if the run has not finished or has no validation images, if its images are not
    available, or if no temperature minimizes the NLL.
    """
    check_finished(run)
    check_recipe(run)
    if not run.split["validation"]:
        raise UserError(
            f"{run.path} has no validation images to choose the temperature on: train with data.split.validation"
        )
    trained = with_tta(load_model(run.path, model=run.factory))
    splits = [split for split in ("validation", "test") if run.split[split]]
    found: dict[str, tuple[Logits, Labels]] = {}
    for split in splits:
        images = split_images(run, split, trained, data_root)
        result = measure(run, trained, split, images, _LogitsAlone(len(trained.classes)), accelerator)
        found[split] = result.outcomes, result.labels
    temperature = best_temperature(*found["validation"])
    scaling = TemperatureScaling(
        temperature=temperature,
        splits={
            split: SplitCalibration(
                images=len(labels),
                before=reliability(logits, labels, 1.0),
                after=reliability(logits, labels, temperature),
            )
            for split, (logits, labels) in found.items()
        },
    )

    def write() -> None:
        run.write_json(FILE, scaling.model_dump())
        _write_temperature(run, temperature)

    main_only(accelerator, write)
    return scaling


def remove_calibration(run: Run) -> None:
    """Remove the temperature from model.json, and calibration.json."""
    check_finished(run)
    _write_temperature(run, 1.0)
    (run.path / FILE).unlink(missing_ok=True)


def check_finished(run: Run) -> None:
    """Raise UserError if the run has not finished: training would change the weights, and overwrite model.json."""
    if not run.is_finished:
        raise UserError(f"{run.path} has not finished: its model can be calibrated after the training")


def _write_temperature(run: Run, temperature: float) -> None:
    card = run.model_card
    task = task_from_dict(card.get("task"), len(card["classes"]))
    run.write_json("checkpoints/model.json", card | {"task": replace(task, temperature=temperature).to_dict()})


def negative_log_likelihood(logits: Logits, labels: Labels, temperature: float) -> float:
    """Return the mean cross-entropy (multi-label: binary cross-entropy) of logits divided by ``temperature``."""
    scaled = logits.astype(np.float64) / temperature
    if labels.ndim == 1:
        return float(-np.take_along_axis(log_softmax(scaled, axis=1), labels[:, None], 1).mean())
    return float(np.logaddexp(0, np.where(labels == 1, -scaled, scaled)).mean())


def best_temperature(logits: Logits, labels: Labels) -> float:
    """Return the temperature that minimizes the negative log-likelihood.

    The log-likelihood is concave in 1/temperature, so that the minimum is unique. Raises UserError if it is not within
    :data:`LIMITS`: if all predictions are correct, every lower temperature is better; if the labels do not depend on
    the logits, every higher one.
    """
    if labels.ndim == 1:
        correct = np.take_along_axis(logits, labels[:, None], 1)[:, 0] >= logits.max(1)
    else:
        correct = np.where(labels == 1, logits, -logits) >= 0
    if correct.all():  # the minimum would not show it: the likelihood is rounded to 1 above the lowest temperature
        raise _no_temperature(labels, "all predictions are correct, so that every lower temperature is better")
    low, high = (math.log(limit) for limit in LIMITS)
    found = minimize_scalar(
        lambda x: negative_log_likelihood(logits, labels, math.exp(x)),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-6},
    )
    temperature = math.exp(found.x)
    if not 1.1 * LIMITS[0] < temperature < LIMITS[1] / 1.1:
        reason = (
            "almost all predictions are correct, and the logits of the others hardly differ"
            if temperature < 1
            else "the predictions are no better than chance, so that every higher temperature is better"
        )
        raise _no_temperature(labels, reason)
    return temperature


def _no_temperature(labels: Labels, reason: str) -> UserError:
    return UserError(f"no temperature can be chosen on {len(labels)} validation images: {reason}")


def reliability(logits: Logits, labels: Labels, temperature: float) -> Reliability:
    """Return how well the probabilities of logits divided by ``temperature`` are calibrated."""
    scaled = logits.astype(np.float64) / temperature
    nll = negative_log_likelihood(logits, labels, temperature)
    if labels.ndim == 1:
        probabilities = np.exp(log_softmax(scaled, axis=1).max(1))
        return Reliability.measured(nll, probabilities, logits.argmax(1) == labels)
    return Reliability.measured(nll, expit(scaled).reshape(-1), labels.reshape(-1) == 1)
