"""Exponential moving average of the weights (Polyak & Juditsky 1992), kept beside the model, swapped in to evaluate.

The decay rises with the number of updates, so that the random weights a run starts with are soon forgotten: the ramp of
timm's ModelEmaV3 with ``use_warmup``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RAMP_POWER = 2 / 3
"""timm's ``warmup_power``: after n updates the average is over the last n ** (2 / 3) weights or so."""


def decay_at(decay: float, update: int) -> float:
    """The decay of an update, counted from 1: 0 at first (the average is the weights), ``decay`` at most."""
    return float(min(decay, 1 - update**-RAMP_POWER))


def short_run_warning(decay: float, updates: int) -> str | None:
    """A warning where a run of so many updates is short of the time that the average reaches back; else None.

    A plain average would keep ``decay ** updates`` of its start: 5 % where (1 - decay) x updates is 3.
    """
    if (1 - decay) * updates >= 3:
        return None
    last = decay_at(decay, updates)
    return (
        f"warning: train.ema = {decay:g} is an average over about {1 / (1 - decay):,.0f} steps, and the run has "
        f"{updates:,}: the decay rises to {last:.3g} only, an average over the last {1 / (1 - last):,.0f} or so"
    )


class ModelEma:
    """Average of every trainable parameter; buffers (batch norm statistics) are averages already: the model's stay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self.follow(module)

    def follow(self, module: nn.Module) -> None:
        """Begin to average parameters that train from now on."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in self.averages:
                self.averages[name] = parameter.detach().clone()

    @torch.no_grad()
    def update(self, module: nn.Module, update: int) -> None:
        """After optimizer step number ``update`` of the run, from 1: average = decay x average + (1 - decay) x weight.

        The decay is :func:`decay_at`.
        """
        current = dict(module.named_parameters())
        weights: list[Tensor] = [current[name] for name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay_at(self.decay, update))

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Inside, ``module`` holds the averages; afterwards its own weights again, bit for bit."""
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
