"""Averages of the weights that are swapped into the model for evaluation: EMA, SWA, Lookahead, Schedule-Free.

Exponential moving average (EMA): Polyak & Juditsky 1992. By default its decay is warmed up with the number of updates,
so that the random initial weights soon have a negligible coefficient, as in timm's ModelEmaV3 with ``use_warmup``.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.formatting import plural
from toolkit.recipe.schema import TrainConfig

RAMP_POWER = 2 / 3
"""Equal to timm's ``warmup_power``: after n updates the average covers about the last n ** (2 / 3) updates."""


def check_swa_start(train: TrainConfig, epochs: int) -> None:
    """Raise UserError if train.swa_start is beyond a run of ``epochs``, whose number train.steps may determine."""
    if train.swa_start is not None and train.swa_start > epochs:
        raise UserError(
            f"train.swa_start = {train.swa_start} is beyond the run's {plural(epochs, 'epoch')}, so that nothing would "
            f"be averaged: set {epochs} or less"
        )


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

    has_own_statistics = False
    """Whether batch norm statistics are computed for the averages, by a pass over the training images."""

    def __init__(self, module: nn.Module) -> None:
        self.averages: dict[str, Tensor] = {}
        self.follow(module)

    @property
    def is_evaluated(self) -> bool:
        """Whether the model is evaluated and saved with the averages in place of its weights."""
        return True

    def follow(self, module: nn.Module) -> None:
        """Start averaging parameters that have become trainable."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in self.averages:
                self.averages[name] = parameter.detach().clone()

    def before_step(self, module: nn.Module, lr: float) -> None:  # noqa: B027
        """Prepare ``module`` for an optimizer step with learning rate ``lr``."""

    @abstractmethod
    def update(self, module: nn.Module, step: int) -> None:
        """Update the averages after optimizer step ``step`` of the run, counted from 1."""

    def _weights(self, module: nn.Module) -> list[Tensor]:
        """Return the module's parameters in the order of ``averages``."""
        current = dict(module.named_parameters())
        return [current[name] for name in self.averages]

    def keep_statistics(self, module: nn.Module, layers: Iterable[str]) -> None:
        """Store copies of the buffers of the batch norm layers with these names, to be swapped in with the weights."""
        for layer in layers:
            for name, buffer in module.get_submodule(layer).named_buffers(recurse=False):
                full = f"{layer}.{name}" if layer else name
                if full not in self.averages:
                    self.averages[full] = buffer.clone()

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
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if name in self.averages:
                tensor.data, self.averages[name] = self.averages[name], tensor.data


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


class Swa(WeightAverage):
    """Equal average of the weights at the ends of epochs: SWA (Izmailov et al. 2018, arXiv:1803.05407).

    Also holds the batch norm statistics of the averaged weights, which :meth:`keep_statistics` adds.
    """

    has_own_statistics = True

    def __init__(self, module: nn.Module, start: int, steps_per_epoch: int, last_step: int) -> None:
        """``start``: number of the first averaged epoch, from 1. ``last_step``: the last one of the run."""
        super().__init__(module)
        self.start, self.steps_per_epoch, self.last_step = start, steps_per_epoch, last_step
        self.count = 0
        """Number of averaged models."""

    @property
    def is_evaluated(self) -> bool:
        """Whether any weights have been averaged."""
        return self.count > 0

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After the last step of epoch ``start`` or a later one: average += (weight - average) / (count + 1)."""
        is_end = step % self.steps_per_epoch == 0 or step == self.last_step
        if not is_end or step <= (self.start - 1) * self.steps_per_epoch:
            return
        weights = dict(module.named_parameters())
        names = [name for name in self.averages if name in weights]
        averages = [self.averages[name] for name in names]
        torch._foreach_lerp_(averages, [weights[name] for name in names], 1 / (self.count + 1))
        self.count += 1


class ScheduleFree(WeightAverage):
    """Schedule-Free learning (Defazio et al. 2024, arXiv:2405.15682, equations 2 to 4) around any optimizer.

    ``averages`` are x, ``base`` are the weights z that the optimizer changes, and between two steps the module has
    y = (1 - beta) z + beta x, where gradients are computed. In the warm-up, step t has a weight in x that is
    proportional to the square of its learning rate, as in the paper's code.
    """

    has_own_statistics = True

    def __init__(self, module: nn.Module, beta: float) -> None:
        self.base: dict[str, Tensor] = {}
        super().__init__(module)
        self.beta, self.squared_lr, self.sum_of_squares = beta, 0.0, 0.0

    def follow(self, module: nn.Module) -> None:
        """Start averaging parameters that have become trainable."""
        super().follow(module)
        for name, _ in module.named_parameters():
            if name in self.averages and name not in self.base:
                self.base[name] = self.averages[name].clone()

    @torch.no_grad()
    def before_step(self, module: nn.Module, lr: float) -> None:
        """Set the weights to z; their gradients remain those at y."""
        self.squared_lr = lr**2
        torch._foreach_copy_(self._parameters(module), list(self.base.values()))

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After each step: z = weight, x += c (z - x) with c the step's share of all weights, and weight = y."""
        self.sum_of_squares += self.squared_lr
        share = self.squared_lr / self.sum_of_squares if self.sum_of_squares else 1.0
        weights, averages = self._parameters(module), [self.averages[name] for name in self.base]
        torch._foreach_copy_(list(self.base.values()), weights)
        torch._foreach_lerp_(averages, weights, share)
        torch._foreach_lerp_(weights, averages, self.beta)

    def _parameters(self, module: nn.Module) -> list[Tensor]:
        current = dict(module.named_parameters())
        return [current[name] for name in self.base]
