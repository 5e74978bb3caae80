"""Exponential moving average (EMA) of the weights (Polyak & Juditsky 1992), swapped into the model for evaluation.

The decay is warmed up with the number of updates, so that the random initial weights soon stop contributing, as in
timm's ModelEmaV3 with ``use_warmup``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RAMP_POWER = 2 / 3
"""Equal to timm's ``warmup_power``: after n updates the average covers about the last n ** (2 / 3) updates."""


def decay_at(decay: float, update: int) -> float:
    """Return the decay at an update, counted from 1: 0 at first (the average equals the weights), up to ``decay``."""
    return float(min(decay, 1 - update**-RAMP_POWER))


def short_run_warning(decay: float, updates: int) -> str | None:
    """Return a warning if a run has too few updates for the decay, else None.

    The limit is (1 - decay) x updates = 3, at which an EMA without warm-up would still contain 5 % of the initial
    weights (``decay ** updates``).
    """
    if (1 - decay) * updates >= 3:
        return None
    last = decay_at(decay, updates)
    return (
        f"warning: train.ema = {decay:g} is an average over about {1 / (1 - decay):,.0f} steps, but the run has "
        f"only {updates:,}: the decay reaches {last:.3g}, an average over about the last {1 / (1 - last):,.0f}"
    )


class ModelEma:
    """EMA of every trainable parameter. Buffers are not averaged: batch norm statistics already are averages."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self.follow(module)

    def follow(self, module: nn.Module) -> None:
        """Start averaging parameters that have become trainable."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in self.averages:
                self.averages[name] = parameter.detach().clone()

    @torch.no_grad()
    def update(self, module: nn.Module, update: int) -> None:
        """Update after step ``update`` (from 1): average = decay x average + (1 - decay) x weight.

        The decay is that of :func:`decay_at`.
        """
        current = dict(module.named_parameters())
        weights: list[Tensor] = [current[name] for name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay_at(self.decay, update))

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
