"""transfer.wise: weights between a probed and a fine-tuned model (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903).

The paper interpolates between a zero-shot classifier and the model fine-tuned from it. A classifier with a new head has
no zero-shot model; the model at the end of lp_ft's probe replaces it, because fine-tuning starts from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.models.pretrained import StateDict
from toolkit.training.checkpoint import load_weights
from toolkit.training.lr_schedule import epoch_rank

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer


@dataclass(frozen=True)
class Interpolation:
    """Weights between those of the probe and those after fine-tuning."""

    alpha: float
    """0: the probed model; 1: the fine-tuned one."""
    state: StateDict
    """State dict of the whole model, on the CPU."""
    validation: dict[str, float]
    """Validation metrics, such as ``val/loss``; empty without validation images."""


def interpolated(start: StateDict, end: StateDict, alpha: float) -> StateDict:
    """Return (1 - alpha) x start + alpha x end, with integers of ``end``; exactly ``start`` for 0, ``end`` for 1.

    Batch norm statistics are interpolated like weights. Those of the training images would not fit the probe's head,
    which was trained on features normalized by the pretrained statistics: near alpha = 0 accuracy fell by 10 points.
    """
    if alpha == 0:
        return dict(start)
    return {
        name: torch.lerp(start[name].to(value), value, alpha) if value.is_floating_point() else value
        for name, value in end.items()
    }


def choose_interpolation(training: Trainer, end: StateDict) -> tuple[Interpolation, list[dict[str, float]]]:
    """Return the interpolated weights that are best on validation by train.best_metric, and each alpha's metrics.

    A collective. ``end``: the weights after fine-tuning. The trainer's model is unchanged afterwards. Raises
    StopTraining if a stop was requested.
    """
    assert training.run is not None
    module, best_metric = training.setup.built.module, training.recipe.train.best_metric
    start = load_weights(training.run.probed_weights)
    before = _copy(module.state_dict())
    tried: list[Interpolation] = []
    table = []
    try:
        for alpha in training.recipe.transfer.wise:
            module.load_state_dict(interpolated(start, end, alpha))
            validation = _validated(training)
            table.append({"alpha": alpha, **{key.replace("/", "_"): value for key, value in validation.items()}})
            shown = [f", {key} {validation[key]:.4f}" for key in ("val/loss", "val/accuracy") if key in validation]
            training.display.log(f"weights between probe and fine-tuning: alpha {alpha:g}{''.join(shown)}")
            candidate = Interpolation(alpha, _copy(module.state_dict()), validation)
            if not tried or epoch_rank(validation, best_metric) > epoch_rank(tried[0].validation, best_metric):
                tried = [candidate]
    finally:
        module.load_state_dict(before)
    return tried[0], table


def _validated(training: Trainer) -> dict[str, float]:
    """Return the validation metrics of the model in memory; none without validation images (a collective)."""
    if not training.setup.has("validation"):
        return {}
    result = training.evaluate_network(training.train_step.network, "validation")
    return training.setup.task.with_thresholds_of(result).metrics(result, "val/")


def _copy(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}
