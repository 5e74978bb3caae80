"""Learning rates, which the toolkit computes as functions of the step, against torch's schedulers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm.scheduler
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
        (
            {"name": "multi_step", "milestones": [3, 5, 11], "gamma": 0.2},
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5, 11], 0.2),
        ),
        (
            {"name": "linear", "end_factor": 0.07},
            lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.07, 12),
        ),
        (
            {"name": "cosine_restarts", "T_0": 4, "min_lr": 0.01},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01),
        ),
        (
            {"name": "cosine_restarts", "T_0": 2, "T_mult": 2, "min_lr": 0.01},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2, eta_min=0.01),
        ),
        ({"name": "constant"}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    ],
)
def test_each_schedule_equals_torchs_epoch_by_epoch(table: dict, make) -> None:
    computed = [learning_rate(SchedulerConfig(**table), PEAK, epoch, 12) for epoch in range(12)]
    assert computed == pytest.approx(stepped(make, 12), rel=1e-9)


@pytest.mark.parametrize(
    ("table", "make"),
    [
        (
            {"name": "cosine_restarts", "T_0": 1.5, "T_mult": 2, "cycle_decay": 0.5},
            lambda o: timm.scheduler.CosineLRScheduler(o, 1.5, cycle_mul=2, cycle_decay=0.5, cycle_limit=9),
        ),
        (
            {"name": "cosine_restarts", "T_0": 3, "cycle_decay": 0.5, "warmup_epochs": 2, "warmup_start_factor": 0.1},
            lambda o: timm.scheduler.CosineLRScheduler(
                o, 3, cycle_decay=0.5, cycle_limit=9, warmup_t=2, warmup_lr_init=0.1 * PEAK, warmup_prefix=True
            ),
        ),
        (
            {"name": "polynomial", "power": 3.0, "min_lr": 0.01, "warmup_epochs": 2, "warmup_start_factor": 0.1},
            lambda o: timm.scheduler.PolyLRScheduler(
                o, 10, power=3.0, lr_min=0.01, warmup_t=2, warmup_lr_init=0.1 * PEAK, warmup_prefix=True
            ),
        ),
    ],
)
def test_schedules_equal_timms_within_epochs_too(table: dict, make) -> None:
    scheduler = make(optimizer())
    for step in range(48):
        (expected,) = scheduler._get_lr(step / 4)
        assert learning_rate(SchedulerConfig(**table), PEAK, step / 4, 12) == pytest.approx(expected, rel=1e-9)


def test_warm_up_and_linear_decay_make_the_triangle_of_airbench() -> None:
    """airbench94: from 0.2 of the peak to the peak in 23 % of 9.9 epochs, then to 0.07 of it."""
    table = SchedulerConfig(name="linear", end_factor=0.07, warmup_epochs=0.23 * 9.9, warmup_start_factor=0.2)
    for epoch in np.linspace(0, 9.9, 100):
        expected = PEAK * np.interp(epoch, [0, 0.23 * 9.9, 9.9], [0.2, 1, 0.07])
        assert learning_rate(table, PEAK, epoch, 9.9) == pytest.approx(expected)


def test_milestones_may_lie_within_epochs() -> None:
    table = SchedulerConfig(name="multi_step", milestones=[2.5, 7])
    rates = [learning_rate(table, PEAK, epoch, 12) for epoch in (2.25, 2.5, 6.75, 7, 11)]
    assert rates == pytest.approx([PEAK, PEAK / 10, PEAK / 10, PEAK / 100, PEAK / 100])


def test_flat_cosine_equals_fastais_formula() -> None:
    """fit_flat_cos of fastai: combine_scheds([0.75, 0.25], [SchedNo, SchedCos]), with SchedCos as below."""
    table = SchedulerConfig(name="flat_cosine", min_lr=PEAK / 1e5)
    for step in range(80):
        position = step / 80
        falling = PEAK + (1 + math.cos(math.pi * (1 - (position - 0.75) / 0.25))) * (PEAK / 1e5 - PEAK) / 2
        expected = PEAK if position < 0.75 else falling
        assert learning_rate(table, PEAK, step / 10, 8) == pytest.approx(expected)


@pytest.mark.parametrize(("decay_type", "middle"), [("1-sqrt", 1 - math.sqrt(0.5)), ("linear", 0.5)])
def test_wsd_warms_up_stays_and_falls_at_the_end(decay_type: str, middle: float) -> None:
    table = SchedulerConfig(
        name="wsd", decay_type=decay_type, warmup_epochs=1, warmup_start_factor=0, min_lr=0.02, decay_fraction=0.4
    )
    rates = [learning_rate(table, PEAK, epoch, 10) for epoch in (0, 0.5, 1, 3, 6, 8, 10)]
    assert rates == pytest.approx([0, PEAK / 2, PEAK, PEAK, PEAK, 0.02 + middle * (PEAK - 0.02), 0.02])
    by_default = SchedulerConfig(name="wsd")
    assert [learning_rate(by_default, PEAK, e, 10) < PEAK for e in (7.9, 8.1)] == [False, True]


def test_step_and_exponential_are_constant_within_an_epoch_and_cosine_is_not() -> None:
    for name, holds in (("step", True), ("exponential", True), ("cosine", False), ("linear", False)):
        table = SchedulerConfig(name=name, step_size=1 if name == "step" else None)
        assert (learning_rate(table, PEAK, 2.0, 10) == learning_rate(table, PEAK, 2.75, 10)) is holds


def test_one_cycle_peaks_at_its_given_step() -> None:
    table = SchedulerConfig(name="one_cycle", pct_start=0.25, start_factor=0.1, end_factor=0.001)
    rates = [learning_rate(table, PEAK, epoch / 10, 8) for epoch in range(81)]
    assert rates[0] == pytest.approx(PEAK * 0.1)
    assert rates[20] == pytest.approx(PEAK)
    assert max(rates) == pytest.approx(PEAK)
    assert rates[80] == pytest.approx(PEAK * 0.001)


@pytest.mark.parametrize(
    "name", ["constant", "step", "multi_step", "exponential", "cosine", "linear", "flat_cosine", "plateau"]
)
def test_warmup_is_linear_and_then_the_schedule_starts(name: str) -> None:
    table = SchedulerConfig(
        name=name,
        step_size=5 if name == "step" else None,
        milestones=[5] if name == "multi_step" else [],
        warmup_epochs=2.0,
        warmup_start_factor=0.1,
    )
    plain = table.model_copy(update={"warmup_epochs": 0.0})
    assert learning_rate(table, PEAK, 0, 10) == pytest.approx(0.1 * PEAK)
    middle = learning_rate(plain, PEAK, 1, 10) if name in ("exponential",) else PEAK
    assert learning_rate(table, PEAK, 1, 10) == pytest.approx(0.55 * middle)
    if name not in ("cosine", "linear"):  # these begin where the warm-up ends
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
