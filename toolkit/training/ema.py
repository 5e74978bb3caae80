"""Averages of the weights that are swapped into the model for evaluation: EMA and Lookahead.

Exponential moving average (EMA): Polyak & Juditsky 1992. By default its decay is warmed up with the number of updates,
so that the random initial weights soon stop contributing, as in timm's ModelEmaV3 with ``use_warmup``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.recipe.schema import TrainConfig

RAMP_POWER = 2 / 3
"""Equal to timm's ``warmup_power``: after n updates the average covers about the last n ** (2 / 3) updates."""


def decay_at(decay: float, update: int, *, warmup: bool = True) -> float:
    """Return the decay at an update, counted from 1: 0 at first (the average equals the weights), up to ``decay``.

    Without ``warmup``, it is ``decay`` from the second update on, as in timm's ModelEmaV3 and torch's AveragedModel.
    """
    if not warmup and update > 1:
        return decay
    return float(min(decay, 1 - update**-RAMP_POWER))


def short_run_warning(train: TrainConfig, steps: int) -> str | None:
    """Return a warning if a run of ``steps`` optimizer steps has too few updates for the decay of train.ema, else None.

    The limit is (1 - decay) x updates = 3, at which an EMA without warm-up would still contain 5 % of the first
    weights (``decay ** updates``). Raises UserError if the weights after the first step are the only ones averaged.
    """
    if train.ema is None:
        return None
    decay, every = train.ema, train.ema_steps
    updates = 1 + (steps - 1) // every
    if updates == 1 and steps > 1:
        raise UserError(
            f"train.ema_steps = {every:,} is not less than the {steps:,} steps of the run: only the weights after the "
            f"first step would be averaged. Set {steps - 1:,} or less"
        )
    if (1 - decay) * updates >= 3:
        return None
    unit = "steps" if every == 1 else f"updates, {every:,} steps apart"
    window = f"an average over about {1 / (1 - decay):,.0f} {unit}, but the run has only {updates:,}"
    if not train.ema_warmup:
        share = decay ** (updates - 1)
        return f"warning: train.ema = {decay:g} is {window}: the weights at the first one keep a share of {share:.0%}"
    last = decay_at(decay, updates)
    reached = f"the decay reaches {last:.3g}, an average over about the last {1 / (1 - last):,.0f}"
    return f"warning: train.ema = {decay:g} is {window}: {reached}"


class WeightAverage(ABC):
    """Average of every trainable parameter. Buffers are not averaged: batch norm statistics already are averages."""

    def __init__(self, module: nn.Module) -> None:
        self.averages: dict[str, Tensor] = {}
        self.follow(module)

    def follow(self, module: nn.Module) -> None:
        """Start averaging parameters that have become trainable."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in self.averages:
                self.averages[name] = parameter.detach().clone()

    @abstractmethod
    def update(self, module: nn.Module, step: int) -> None:
        """Update the averages after optimizer step ``step`` of the run, counted from 1."""

    def _weights(self, module: nn.Module) -> list[Tensor]:
        """Return the module's parameters in the order of ``averages``."""
        current = dict(module.named_parameters())
        return [current[name] for name in self.averages]

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Use the averages as weights of ``module`` in this context, then restore its own, bit for bit."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if name in self.averages:
                parameter.data, self.averages[name] = self.averages[name], parameter.data


class ModelEma(WeightAverage):
    """EMA of every trainable parameter."""

    def __init__(self, module: nn.Module, decay: float, *, every: int = 1, warmup: bool = True) -> None:
        """``every``: number of optimizer steps between two updates. ``warmup``: see :func:`decay_at`."""
        super().__init__(module)
        self.decay, self.every, self.warmup = decay, every, warmup

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update after step 1 and every ``every`` steps: average = decay x average + (1 - decay) x weight.

        The decay is that of :func:`decay_at`.
        """
        if (step - 1) % self.every:
            return
        decay = decay_at(self.decay, 1 + (step - 1) // self.every, warmup=self.warmup)
        torch._foreach_lerp_(list(self.averages.values()), self._weights(module), 1 - decay)


class Lookahead(WeightAverage):
    """Slow weights of Lookahead (Zhang et al. 2019, arXiv:1907.08610, algorithm 1), which start at the initial weights.

    timm's Lookahead is not used: its slow weights start at the weights after the first k steps.
    """

    def __init__(self, module: nn.Module, k: int, alpha: float) -> None:
        super().__init__(module)
        self.k, self.alpha = k, alpha

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After every k-th step: slow += alpha x (weight - slow), then weight = slow. The optimizer's state is kept."""
        if step % self.k == 0:
            slow, fast = list(self.averages.values()), self._weights(module)
            torch._foreach_lerp_(slow, fast, self.alpha)
            torch._foreach_copy_(fast, slow)
