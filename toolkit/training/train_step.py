"""The training steps of one epoch.

The loss of a step is the mean over the images of the *whole* step, whatever the number of processes and accumulation
steps: each process sums its own images' losses and divides by the step's image count, so that gradients summed over
processes equal the gradient of a single process with the whole batch.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.augment.mixup import mix
from toolkit.data.sampling import MicroBatch, hash64, own_range
from toolkit.distributed.batchnorm import set_replicated
from toolkit.distributed.virtual_processes import VirtualProcesses
from toolkit.errors import RunFailed, first_line
from toolkit.models.keyed_dropout import DropoutKeys, example_keys
from toolkit.recipe.schema import AugmentConfig
from toolkit.training.distillation import Teacher
from toolkit.training.ema import WeightAverage
from toolkit.training.evaluation import to_device
from toolkit.training.l2_sp import L2SP
from toolkit.training.losses import Loss
from toolkit.training.sam import at_worst_neighbor
from toolkit.training.task import Task


@dataclass
class RunningMetrics:
    """This process's sums of loss, correct predictions and images so far in an epoch: float64 [V, 3] on the device.

    V is the number of virtual processes, each of which adds to its own row, so that the sums over the rows do not
    depend on the number of processes; 1 without virtual processes.
    """

    values: Tensor
    since_log: Tensor
    """Sums since the last logged step, in the same order."""

    @classmethod
    def zero(cls, device: torch.device, virtual: int | None = None) -> RunningMetrics:
        """Return zero sums, in float32 on MPS, which has no float64. ``virtual``: number of virtual processes."""
        zero = torch.zeros(
            virtual or 1, 3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )
        return cls(zero, zero.clone())

    @classmethod
    def restored(cls, saved: list[list[float]], accelerator: Accelerator, virtual: int | None) -> RunningMetrics:
        """Return this process's share of the sums of an unfinished epoch; ``saved``: :meth:`state` of each process.

        ``virtual``: number of virtual processes; a process takes the rows of its own. Without them, the main process
        takes all if the number of processes changed.
        """
        sums = cls.zero(accelerator.device, virtual)
        if virtual:
            for state in saved:
                sums.add_state(state)
            low, high = own_range(virtual, accelerator.num_processes, accelerator.process_index)
            for values in (sums.values, sums.since_log):
                values[:low] = values[high:] = 0
        elif len(saved) == accelerator.num_processes:
            sums.add_state(saved[accelerator.process_index])
        elif accelerator.is_main_process:
            for state in saved:
                sums.add_state(state)
        return sums

    def add(self, losses: Tensor, right: Tensor, row: int = 0) -> None:
        """Add a micro-batch, without waiting for the device."""
        count = torch.full_like(self.values[0, 2], len(right))
        more = torch.stack([losses.sum().to(self.values), right.sum().to(self.values), count])
        self.values[row] += more
        self.since_log[row] += more

    def means(self, accelerator: Accelerator) -> tuple[float, float]:
        """Return mean loss and accuracy over all processes (a collective)."""
        return _means(self.values, accelerator)

    def metrics_since_log(self, accelerator: Accelerator) -> tuple[float, float]:
        """Return mean loss and accuracy since the last call, over all processes (a collective)."""
        means = _means(self.since_log, accelerator)
        self.since_log.zero_()
        return means

    def state(self) -> list[float]:
        """Return the sums as six numbers for each row, for a checkpoint."""
        return [*self.values.flatten().tolist(), *self.since_log.flatten().tolist()]

    def add_state(self, state: list[float]) -> None:
        """Add sums returned by :meth:`state`."""
        values, since_log = torch.tensor(state, dtype=torch.float64).view(2, -1, 3)
        self.values += values.to(self.values)
        self.since_log += since_log.to(self.since_log)


def _means(values: Tensor, accelerator: Accelerator) -> tuple[float, float]:
    loss, right, count = accelerator.reduce(values, reduction="sum").sum(0).tolist()
    if count == 0:
        raise AssertionError("a mean over no images")
    return loss / count, right / count


class NonFiniteDetector:
    """Detector of the first step whose loss is not finite, which does not make the CPU wait for a GPU.

    On a GPU, each step's result is copied to the CPU asynchronously and read once it has arrived. Only if more than
    ``MOST`` results are pending is the oldest one waited for, which also limits how far the CPU runs ahead.
    """

    MOST = 4

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.bad: int | None = None

    def add(self, step: int, loss: Tensor) -> None:
        """Check a step's loss (a scalar); call after each step."""
        verdict = loss.isfinite()
        if loss.device.type != "cuda":
            self.waiting.append((step, verdict, None))
            return
        copy = torch.empty((), dtype=torch.bool, pin_memory=True)
        copy.copy_(verdict, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((step, copy, event))

    def first_nonfinite_step(self, *, wait: bool = False) -> int | None:
        """Return the first step known to have a non-finite loss; with ``wait``, of all steps so far."""
        while self.waiting:
            step, verdict, event = self.waiting[0]
            if event is not None and not event.query():
                if not wait and len(self.waiting) <= self.MOST:
                    break
                event.synchronize()
            self.waiting.popleft()
            if self.bad is None and not verdict:
                self.bad = step
        return self.bad


@dataclass
class TrainStepConfig:
    """The recipe values that a training step uses."""

    seed: int
    task: Task
    loss: Loss
    augment: AugmentConfig
    """Settings of mixup and CutMix."""
    max_grad_norm: float | None
    channels_last: bool
    cuda_graphs: bool
    steps_per_epoch: int
    log_every: int
    example_weights: Tensor | None = None
    """Weight of the loss of each training image, float32 [N]; None: all 1."""
    first_epoch: int = 0
    """Epoch, from 0, from which updates of the EMA are counted: with mode "lp_ft" the first one of fine-tuning."""
    has_unkeyed_randomness: bool = False
    """Whether the model draws random numbers outside its dropout layers."""
    sam_radius: float | None = None
    """rho of sharpness-aware minimization; None: plain steps."""
    sam_adaptive: bool = False


@dataclass
class TrainCallbacks:
    """Callbacks of :meth:`TrainStep.train_epoch`."""

    set_lr: Callable[[float], None]
    """Called before each step with the fractional epoch, e.g. 2.5 in the middle of the third epoch."""
    after_step: Callable[[int, RunningMetrics], bool]
    """Called after each step with the number of completed steps; True ends the epoch early."""
    log_step: Callable[[int, float, float], None]
    """Called every ``log_every`` steps with the completed steps and the loss and accuracy since the last call."""


@dataclass
class TrainStep:
    """The model, optimizer and average of the weights that training steps update."""

    accelerator: Accelerator
    network: nn.Module
    """The trained module: the whole model, or its tail if the features of a frozen backbone are precomputed."""
    wrapped: nn.Module
    """``network`` as wrapped by Accelerate (DDP, autocast)."""
    optimizer: Any
    stochastic: DropoutKeys
    average: WeightAverage | None
    settings: TrainStepConfig
    virtual: VirtualProcesses | None = None
    """The virtual processes of train.virtual_processes."""
    finite: NonFiniteDetector = field(default_factory=NonFiniteDetector)
    l2_sp: L2SP | None = None
    teacher: Teacher | None = None

    def train_epoch(
        self, loader: Any, epoch: int, first_step: int, sums: RunningMetrics, hooks: TrainCallbacks
    ) -> bool:
        """Train epoch ``epoch`` (0-based) from ``first_step`` on; return False if a callback ended it early.

        ``sums`` holds the metrics of the steps before ``first_step`` and is updated in place.
        """
        settings = self.settings
        step_losses: list[Tensor] = []
        for micro, batch in loader.epoch(epoch, first_step):
            if not step_losses:
                hooks.set_lr(epoch + micro.step / settings.steps_per_epoch)
                parts: list[tuple[MicroBatch, Any]] = []
            losses, right = self._forward_backward(micro, batch, epoch)
            step_losses.append(losses.sum())
            if not micro.replicated or self.accelerator.is_main_process:
                sums.add(losses, right, micro.part if self.virtual else 0)
            if settings.sam_radius is not None:
                parts.append((micro, batch))
            if not micro.is_last:
                continue
            if self.virtual:
                self.virtual.finish()
            if settings.sam_radius is not None:
                with at_worst_neighbor(self.network, settings.sam_radius, adaptive=settings.sam_adaptive):
                    step_losses += [self._forward_backward(*part, epoch)[0].sum() for part in parts]
                    if self.virtual:
                        self.virtual.finish()
            done = micro.step + 1
            self._update((epoch - settings.first_epoch) * settings.steps_per_epoch + done)
            self.finite.add(done, torch.stack(step_losses).sum())
            step_losses = []
            if settings.log_every and done % settings.log_every == 0:
                hooks.log_step(done, *sums.metrics_since_log(self.accelerator))
            if hooks.after_step(done, sums):
                return False
        return True

    def _forward_backward(self, micro: MicroBatch, batch: Any, epoch: int) -> tuple[Tensor, Tensor]:
        """Accumulate a micro-batch's gradients; return loss and correctness of this process's images, each [own]."""
        settings, accelerator = self.settings, self.accelerator
        inputs = to_device(batch.images, accelerator.device, settings.channels_last)
        labels = batch.labels.to(accelerator.device, non_blocking=True)
        targets: Tensor = labels[: micro.own]
        weights = None
        if settings.example_weights is not None:
            weights = settings.example_weights[batch.positions.to(accelerator.device, non_blocking=True)]
        if micro.partners is not None:
            soft = settings.task.soft_targets(labels).to(inputs.dtype)
            if weights is not None:  # mixed images: the weights are mixed in the same proportions
                soft = torch.cat([soft, weights[:, None].to(soft.dtype)], 1)
            key = (settings.seed, epoch, micro.step)
            inputs, targets = mix(inputs, soft, micro.partners, micro.own, settings.augment, key)
            if weights is not None:
                targets, weights = targets[:, :-1], targets[:, -1]
        if self.stochastic.calls:
            keys = example_keys(settings.seed, epoch, np.asarray(batch.draws[: micro.own]))
            self.stochastic.set_keys(torch.from_numpy(keys).to(accelerator.device, non_blocking=True))
        if settings.has_unkeyed_randomness:  # random numbers that differ between processes and recur in a resumed run
            process = 0 if self.virtual else accelerator.process_index
            torch.manual_seed(hash64(settings.seed, epoch, micro.step, micro.part, process))
        if self.virtual:
            self.virtual.begin()
        elif accelerator.num_processes > 1:
            set_replicated(self.network, micro.replicated)
        if settings.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        alone = micro.replicated or self.virtual or accelerator.num_processes == 1
        with contextlib.nullcontext() if micro.is_last else accelerator.no_sync(self.wrapped):
            logits = self.wrapped(inputs[: micro.own])
            losses = settings.loss(logits, targets)
            if self.teacher is not None:
                soft_targets = self.teacher.targets(inputs[: micro.own], batch.positions[: micro.own], epoch)
                losses = self.teacher.distilled(losses, logits, soft_targets)
            if weights is not None:
                losses = losses * weights[: micro.own]
            # DDP averages gradients over processes; scaling by their number gives the sum.
            scale = (1 if alone else accelerator.num_processes) / micro.step_count
            accelerator.backward(losses.sum() * scale)
        if self.virtual:
            self.virtual.end(micro.part)
        right = settings.task.is_correct(logits.detach(), labels[: micro.own])
        return losses.detach(), right

    def _update(self, number: int) -> None:
        """Take optimizer step ``number``, counted from 1 at the start of ``first_epoch``."""
        if self.l2_sp is not None:  # the gradients are still multiplied by the scale of fp16
            scaler = self.accelerator.scaler
            self.l2_sp.add_gradients(1.0 if scaler is None else scaler.get_scale())
        if self.settings.max_grad_norm is not None:
            parameters = [p for p in self.network.parameters() if p.requires_grad]
            self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        if self.average is not None:
            self.average.before_step(self.network, self.optimizer.param_groups[0]["lr"])
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise RunFailed(
                f"the optimizer cannot take a step: {first_line(error)}. Lower optimizer.lr, optimizer.weight_decay, "
                "transfer.head_lr, transfer.backbone_lr, or values in optimizer.args"
            ) from error
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.network, number)
