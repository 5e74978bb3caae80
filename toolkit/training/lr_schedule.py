"""Learning rate schedules as functions of the epoch, independent of the number of processes and steps.

:func:`lr_factor` is a pure function of the (fractional) epoch, so a resumed run and a run on another number of
processes have the same schedule. Only the plateau schedule has state.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from toolkit.data.sampling import RunLength
from toolkit.errors import UserError, first_line
from toolkit.metrics import higher_is_better
from toolkit.plugins import PREFIX, Plugin, find
from toolkit.recipe.optimizer_schema import SCHEDULE_KEYS
from toolkit.recipe.resolve import DECAY_FRACTION, GAMMA
from toolkit.recipe.schema import Recipe, SchedulerConfig


def lr_factor(table: SchedulerConfig, epoch: float, epochs: float) -> float:
    """Return the factor of the peak learning rate at ``epoch``, a fraction between 0 (start) and ``epochs`` (end).

    step: StepLR. multi_step: MultiStepLR. exponential: multiply by gamma per epoch. cosine, cosine_restarts: Loshchilov
    & Hutter 2017 (arXiv:1608.03983), one cycle or several. linear, polynomial: LinearLR and PolynomialLR over the
    epochs after the warm-up. one_cycle: Smith & Topin 2018 (arXiv:1708.07120) with cosine annealing. flat_cosine:
    ``fit_flat_cos`` of fastai. wsd: Hu et al. 2024 (arXiv:2404.06395); decay_type "1-sqrt": Haegele et al. 2024
    (arXiv:2405.18392). The warm-up factor multiplies that of the schedule. The lower bound ``min_lr`` is applied by
    :func:`learning_rate`. plugin:NAME: the factor that the plugin's function returns.
    """
    return _warmup(table, epoch) * _base(table, epoch, epochs)


def learning_rate(
    table: SchedulerConfig, peak: float, epoch: float, epochs: float, plateau_factor: float = 1.0
) -> float:
    """Return the learning rate of a parameter group whose peak is ``peak``."""
    if table.name == "plateau":
        return _warmup(table, epoch) * max(peak * plateau_factor, min(table.min_lr, peak))
    if table.name in SCHEDULE_KEYS["min_lr"]:
        floor = min(table.min_lr, peak)
        return _warmup(table, epoch) * (floor + (peak - floor) * _base(table, epoch, epochs))
    return peak * lr_factor(table, epoch, epochs)


def scheduled_rate(
    recipe: Recipe, epoch: float, length: RunLength, scale: float = 1.0, plateau_factor: float = 1.0
) -> float:
    """Return the learning rate at an epoch of a run, of a parameter group whose peak is ``scale`` x optimizer.lr.

    With transfer.mode = "lp_ft", it is constant in the probe, after which the schedule begins. From train.swa_start on
    it is train.swa_lr, if that is set.
    """
    start, swa_lr = recipe.train.swa_start, recipe.train.swa_lr
    if start is not None and swa_lr is not None and epoch >= start - 1:
        return scale * swa_lr
    table, peak, probe = recipe.transfer, recipe.optimizer.lr, recipe.transfer.epochs_of_probe
    if epoch < probe:
        return scale * (peak if table.probe_lr is None else table.probe_lr)
    schedule, epochs = in_epochs(recipe.scheduler, length), length.exact_epochs - probe
    return learning_rate(schedule, scale * peak, epoch - probe, epochs, plateau_factor)


def in_epochs(table: SchedulerConfig, length: RunLength) -> SchedulerConfig:
    """Return the schedule with ``warmup_steps``, if set, converted to ``warmup_epochs``."""
    if table.warmup_steps is None:
        return table
    warmup = table.warmup_steps / length.steps_per_epoch
    return table.model_copy(update={"warmup_epochs": warmup, "warmup_steps": None})


def _warmup(table: SchedulerConfig, epoch: float) -> float:
    if epoch >= table.warmup_epochs:
        return 1.0
    return table.warmup_start_factor + (1 - table.warmup_start_factor) * epoch / table.warmup_epochs


def _base(table: SchedulerConfig, epoch: float, epochs: float) -> float:
    start = min(table.warmup_epochs, epochs)
    match table.name:
        case "step":
            assert table.step_size is not None
            return gamma_of(table) ** (math.floor(epoch) // table.step_size)
        case "multi_step":
            return gamma_of(table) ** bisect.bisect_right(table.milestones, epoch)
        case "exponential":
            return gamma_of(table) ** math.floor(epoch)
        case "cosine":
            return _cosine_between(1.0, 0.0, _share(epoch, start, epochs))
        case "cosine_restarts":
            return _with_restarts(table, max(epoch - start, 0.0))
        case "linear":
            return 1 - (1 - table.end_factor) * _share(epoch, start, epochs)
        case "polynomial":
            return math.pow(1 - _share(epoch, start, epochs), table.power)
        case "flat_cosine" | "wsd":
            share = _share(epoch, (1 - _decay_fraction(table)) * epochs, epochs)
            if table.name == "flat_cosine":
                return _cosine_between(1.0, 0.0, share)
            return 1 - (share if table.decay_type == "linear" else math.sqrt(share))
        case "one_cycle":
            share = min(epoch / epochs, 1.0)
            if share < table.pct_start:
                return _cosine_between(table.start_factor, 1.0, share / table.pct_start)
            return _cosine_between(1.0, table.end_factor, (share - table.pct_start) / (1 - table.pct_start))
        case "constant" | "plateau":
            return 1.0
        case _:
            plugin = find("schedule", table.name.removeprefix(PREFIX))
            length = int(epochs) if epochs == int(epochs) else epochs
            return float(_plugin_schedule(plugin, json.dumps(table.args), length, table.warmup_epochs)(epoch))


def _share(epoch: float, start: float, end: float) -> float:
    """Return the fraction of the epochs from ``start`` to ``end`` that has passed, between 0 and 1."""
    return min(max((epoch - start) / max(end - start, 1e-9), 0.0), 1.0)


def _with_restarts(table: SchedulerConfig, epoch: float) -> float:
    """Return the factor of cosine_restarts; ``epoch`` counts from the end of the warm-up."""
    assert table.T_0 is not None
    cycle, length = 0, table.T_0
    if table.T_mult == 1:
        cycle, epoch = int(epoch // length), epoch % length
    else:
        while epoch >= length:
            cycle, epoch, length = cycle + 1, epoch - length, length * table.T_mult
    return _cosine_between(math.pow(table.cycle_decay, cycle), 0.0, epoch / length)


@functools.lru_cache(maxsize=8)
def _plugin_schedule(plugin: Plugin, arguments: str, epochs: float, warmup_epochs: float) -> Callable[[float], float]:
    """Build the function of a plugin's schedule, once: it is called at every step. ``arguments`` are JSON."""
    schedule: Callable[[float], float] = plugin.build(json.loads(arguments), epochs=epochs, warmup_epochs=warmup_epochs)
    return schedule


def check_schedule(table: SchedulerConfig, epochs: float) -> None:
    """Raise UserError unless a plugin's schedule is a function with finite factors, at least 0, that has no state."""
    if not table.name.startswith(PREFIX):
        return
    points = np.linspace(0, epochs, min(math.ceil(4 * epochs), 1000), endpoint=False).tolist()
    try:
        factors = [_base(table, epoch, epochs) for epoch in points]
        again = [_base(table, epoch, epochs) for epoch in reversed(points)][::-1]
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise UserError(
            f"scheduler.name = {table.name!r} failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    for epoch, factor in zip(points, factors, strict=True):
        if not (math.isfinite(factor) and factor >= 0):
            raise UserError(f"scheduler.name = {table.name!r} gives {factor} at epoch {epoch:g}: expected 0 or more")
    if factors != again:
        raise UserError(
            f"scheduler.name = {table.name!r} gives other factors when it is called again: it must be a function of "
            "the epoch alone, so that a resumed run has the same schedule"
        )


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def gamma_of(table: SchedulerConfig) -> float:
    """Return the recipe's gamma, or the default of the schedule."""
    return table.gamma if table.gamma is not None else GAMMA.get(table.name, 0.1)


def _decay_fraction(table: SchedulerConfig) -> float:
    return table.decay_fraction if table.decay_fraction is not None else DECAY_FRACTION[table.name]


def epoch_rank(record: dict[str, Any], best_metric: str) -> tuple[float, float]:
    """Return a sort key for epoch records by ``train.best_metric``, which orders the best epoch last.

    Ties are broken by the validation loss; ties in the validation loss itself, by the validation accuracy. With
    ``last``, later epochs are better. Missing metrics and NaN rank worst.
    """
    if best_metric == "last":
        return float(record["epoch"]), 0.0

    def rank(metric: str) -> float:
        value = float(record.get(metric, math.nan))
        if math.isnan(value):
            return -math.inf
        return value if higher_is_better(metric) else -value

    return rank(best_metric), rank("val/accuracy" if best_metric == "val/loss" else "val/loss")


@dataclass
class MetricMonitor:
    """Counter of epochs since a metric last improved; used by early stopping and the plateau schedule."""

    higher_is_better: bool
    min_delta: float = 0.0
    relative: bool = False
    """Whether ``min_delta`` is a fraction of the best value so far instead of an absolute difference."""
    best: float | None = None
    waited: int = 0
    """Number of epochs since the last improvement."""

    def update(self, value: float) -> bool:
        """Record one epoch's value; return whether it improves on the best by more than ``min_delta``."""
        if self.best is None:
            improved = not math.isnan(value)
        else:
            delta = self.min_delta * self.best if self.relative else self.min_delta
            improved = value > self.best + delta if self.higher_is_better else value < self.best - delta
        if improved:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return improved

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return asdict(self)

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.best, self.waited = state["best"], state["waited"]


class ReduceLROnPlateau:
    """Schedule that multiplies the learning rate by gamma after ``patience`` + 1 epochs without improvement.

    Equivalent to ``torch.optim.lr_scheduler.ReduceLROnPlateau`` with the same threshold mode and ``cooldown=0``.
    """

    def __init__(self, table: SchedulerConfig) -> None:
        self.gamma, self.patience = gamma_of(table), table.patience
        relative = table.threshold_mode == "rel"
        self.watch = MetricMonitor(higher_is_better(table.metric), table.threshold, relative)
        self.factor = 1.0

    def update(self, value: float) -> None:
        """Record one epoch's value of the monitored metric."""
        self.watch.update(value)
        if self.watch.waited > self.patience:
            self.factor *= self.gamma
            self.watch.waited = 0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"factor": self.factor, "watch": self.watch.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.factor = state["factor"]
        self.watch.load(state["watch"])
