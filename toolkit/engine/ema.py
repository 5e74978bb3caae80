"""Exponential moving average of the weights (Polyak & Juditsky 1992), kept beside the model, swapped in to evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
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
    def update(self, module: nn.Module) -> None:
        """After an optimiser step: average = decay x average + (1 - decay) x weight."""
        current = dict(module.named_parameters())
        weights: list[Tensor] = [current[name] for name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - self.decay)

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
