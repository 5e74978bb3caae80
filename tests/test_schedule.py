"""Learning rates, which the toolkit computes as functions of the step, against torch's schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from toolkit.recipe.schema import SchedulerConfig
from toolkit.training.lr_schedule import MetricMonitor, ReduceLROnPlateau, learning_rate

PEAK = 0.2


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def stepped(make, epochs: int) -> list[float]:
    """Return the learning rate of each epoch under a torch scheduler stepped once per epoch."""
    sgd = optimizer()
    scheduler = make(sgd)
    rates = []
    for _ in range(epochs):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("table", "make"),
    [
        ({"name": "step", "step_size": 4, "gamma": 0.5}, lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.5)),
        ({"name": "step", "step_size": 3}, lambda o: torch.optim.lr_scheduler.StepLR(o, 3)),
        ({"name": "exponential", "gamma": 0.9}, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
        (
            {"name": "cosine", "min_lr": 0.01},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.01),
        ),
        (
            {"name": "polynomial", "power": 2.0},
            lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 12, power=2.0),
        ),
        ({"name": "polynomial"}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 12)),
        ({"name": "constant"}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    ],
)
def test_each_schedule_equals_torchs_epoch_by_epoch(table: dict, make) -> None:
    computed = [learning_rate(SchedulerConfig(**table), PEAK, epoch, 12) for epoch in range(12)]
    assert computed == pytest.approx(stepped(make, 12), rel=1e-9)


def test_step_and_exponential_are_constant_within_an_epoch_and_cosine_is_not() -> None:
    for name, holds in (("step", True), ("exponential", True), ("cosine", False)):
        table = SchedulerConfig(name=name, step_size=1 if name == "step" else None)
        assert (learning_rate(table, PEAK, 2.0, 10) == learning_rate(table, PEAK, 2.75, 10)) is holds


def test_one_cycle_peaks_at_its_given_step() -> None:
    table = SchedulerConfig(name="one_cycle", pct_start=0.25, start_factor=0.1, end_factor=0.001)
    rates = [learning_rate(table, PEAK, epoch / 10, 8) for epoch in range(81)]
    assert rates[0] == pytest.approx(PEAK * 0.1)
    assert rates[20] == pytest.approx(PEAK)
    assert max(rates) == pytest.approx(PEAK)
    assert rates[80] == pytest.approx(PEAK * 0.001)


@pytest.mark.parametrize("name", ["constant", "step", "exponential", "cosine", "plateau"])
def test_warmup_is_linear_and_then_the_schedule_starts(name: str) -> None:
    table = SchedulerConfig(
        name=name, step_size=5 if name == "step" else None, warmup_epochs=2.0, warmup_start_factor=0.1
    )
    plain = table.model_copy(update={"warmup_epochs": 0.0})
    assert learning_rate(table, PEAK, 0, 10) == pytest.approx(0.1 * PEAK)
    middle = learning_rate(plain, PEAK, 1, 10) if name in ("exponential",) else PEAK
    assert learning_rate(table, PEAK, 1, 10) == pytest.approx(0.55 * middle)
    if name != "cosine":  # cosine begins where the warm-up ends
        assert learning_rate(table, PEAK, 3, 10) == learning_rate(plain, PEAK, 3, 10)
    else:
        assert learning_rate(table, PEAK, 2, 10) == pytest.approx(PEAK)


LOSSES = [1.0, 0.9, 0.95, 0.93, 0.91, 0.92, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.49995, 0.7, 0.7]


def reductions(threshold: dict[str, Any], metric: str, values: list[float]) -> list[float]:
    """Return the learning rate after each value; assert that it equals that of PyTorch's scheduler."""
    sgd = optimizer()
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        sgd, "min" if metric == "val/loss" else "max", factor=0.5, patience=2, min_lr=0.04, **threshold
    )
    table = SchedulerConfig(name="plateau", metric=metric, gamma=0.5, patience=2, min_lr=0.04, **threshold)
    computed, rates = ReduceLROnPlateau(table), []
    for epoch, value in enumerate(values):
        reference.step(value)
        computed.update(value)
        rates.append(learning_rate(table, PEAK, epoch, 99, computed.factor))
        assert rates[-1] == pytest.approx(sgd.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("threshold", [{}, {"threshold_mode": "abs"}, {"threshold": 0.02}], ids=str)
def test_reduce_on_plateau_equals_torchs(threshold: dict[str, Any]) -> None:
    assert min(reductions(threshold, "val/loss", LOSSES)) < 0.5 * PEAK, "the learning rate was reduced more than once"
    reductions(threshold, "val/accuracy", [1 - loss / 2 for loss in LOSSES])


def test_the_plateau_threshold_is_relative_unless_the_recipe_says_otherwise() -> None:
    """The second loss is lower by 0.0002: more than 1e-4, but less than 1e-4 times 3."""
    losses = [3.0, 2.9998, 2.9998, 2.9998]
    assert reductions({"threshold_mode": "abs"}, "val/loss", losses) == [PEAK] * 4
    assert reductions({"threshold_mode": "rel"}, "val/loss", losses) == [PEAK] * 3 + [PEAK / 2]
    assert reductions({}, "val/loss", losses) == [PEAK] * 3 + [PEAK / 2]


def test_patience_counts_epochs_without_enough_improvement() -> None:
    patience = MetricMonitor(higher_is_better=True, min_delta=0.01)
    assert [patience.update(v) for v in (0.5, 0.505, 0.52, 0.52, math.nan)] == [True, False, True, False, False]
    assert patience.waited == 2
    assert patience.best == 0.52


def test_a_first_value_of_nan_is_not_the_best() -> None:
    patience = MetricMonitor(higher_is_better=False)
    assert not patience.update(math.nan)
    assert patience.update(3.0)
