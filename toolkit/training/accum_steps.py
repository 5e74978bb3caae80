"""The search for ``train.grad_accum_steps = "auto"``: the fewest accumulation steps that fit in the device's memory.

As Accelerate's find_executable_batch_size and Lightning's batch size finder do, it trains one step on the recipe's own
batches and retries with smaller micro-batches when memory runs out. But ``train.batch_size`` stays the same.
"""

from __future__ import annotations

import copy
import itertools
import math
import resource
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache

from toolkit.data.preprocessing import stage_of
from toolkit.data.sampling import MicroBatch
from toolkit.distributed.batchnorm import set_replicated
from toolkit.distributed.process import gather_objects, is_out_of_memory
from toolkit.errors import RunFailed
from toolkit.formatting import batch_split
from toolkit.training.optimizer import load_state
from toolkit.training.single_value_batches import check_single_value_batches
from toolkit.training.state import random_state, restore_random_state
from toolkit.training.train_step import NonFiniteDetector, RunningMetrics, TrainCallbacks

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer


def settle_accum_steps(trainer: Trainer, checkpoint: dict[str, Any] | None) -> None:
    """Choose the number of accumulation steps and use it from now on (a collective).

    Call before the optimizer's state and the random states are restored from ``checkpoint``. A resumed run keeps its
    number; on another number of processes it takes a larger one if necessary. Raises RunFailed if no number is enough,
    and UserError if batch norm would get a single value with the number that is.
    """
    setup, processes = trainer.setup, trainer.accelerator.num_processes
    train, before = setup.recipe.train, (checkpoint or {}).get("accum_steps", 1)
    most = train.batch_size // processes
    possible = [number for number in range(min(before, most), most + 1) if most % number == 0]
    if checkpoint is not None and "accum_steps" in checkpoint and len(checkpoint["random"]) == processes:
        chosen, reason = before, "as before"
    else:
        found = gather_objects(_fewest(trainer, possible) if _is_limited(trainer.accelerator.device) else possible[0])
        if None in found:
            raise RunFailed(
                "out of memory even with 1 image at once in each process (train.grad_accum_steps = 'auto'). Try "
                "train.precision = 'bf16', a smaller data.image_size, or a smaller model"
            )
        chosen = max(found)
        fewer = possible[: possible.index(chosen)]
        reason = f"out of memory with {fewer[-1]}" if fewer else "the first one tried"
        if not _is_limited(trainer.accelerator.device):
            reason = "nothing to try on a CPU"
    setup.accum_steps = chosen
    trainer.loaders.use_accum_steps(chosen)
    split = batch_split(train.batch_size, processes, chosen)
    setup.display.log(f'train.grad_accum_steps = "auto" is {chosen} ({reason}): batch size {split}')
    sizes = [stage.image_size for stage in setup.stages]
    set_replicated(setup.built.module, True)  # the check is no collective; each training step sets this again
    known, count = train.model_copy(update={"grad_accum_steps": chosen}), len(setup.splits["train"])
    channels, smallest = setup.preprocessing.channels, min(sizes, key=math.prod)
    check_single_value_batches(setup.built, setup.transfer, known, count, processes, channels, smallest)


def _is_limited(device: torch.device) -> bool:
    """Return whether an allocation can fail: on a CPU, only if the address space of the process is limited."""
    return device.type != "cpu" or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _fewest(trainer: Trainer, possible: list[int]) -> int | None:
    """Return the first of ``possible`` with which this process can train a step; None if there is none.

    No collective, because other processes may run out of memory at other points. All that a step changes is restored.
    With transfer.mode = "gradual" all layer groups are trained, but the optimizer's state of those that are unfrozen
    later is not counted.
    """
    setup, epochs = trainer.setup, trainer.setup.length.epochs
    module, optimizer = setup.built.module, trainer.train_step.optimizer.optimizer
    tensors = list(itertools.chain(module.parameters(), module.buffers()))
    weights = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    trained = [parameter.requires_grad for parameter in module.parameters()]
    random, state = random_state(), copy.deepcopy(optimizer.state_dict())
    stages = setup.stages
    epoch = max(range(epochs), key=lambda epoch: math.prod(stages[stage_of(epoch, epochs, len(stages))].image_size))
    setup.transfer.unfreeze_for_epoch(epochs)
    setup.transfer.train_mode()

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, weights, strict=True):
                tensor.copy_(value)
        for parameter in module.parameters():
            parameter.grad = None
        load_state(optimizer, copy.deepcopy(state))
        setup.stochastic.set_keys(None)
        clear_device_cache(garbage_collection=True)

    found = None
    for number in possible:
        fits = _fits(trainer, number, epoch)
        restore()
        if fits:
            found = number
            break
    for parameter, required in zip(module.parameters(), trained, strict=True):
        parameter.requires_grad_(required)
    restore_random_state(random)
    if setup.recipe.train.compile or setup.recipe.train.cuda_graphs:
        torch.compiler.reset()  # else kernels would be compiled for variable batch sizes, which have been seen here
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.accelerator.device)
    return found


def _fits(trainer: Trainer, number: int, epoch: int) -> bool:
    """Return whether this process has the memory to train the first step of an epoch, without the other processes."""
    step, loader = trainer.train_step, trainer.loaders.train
    alone = replace(
        step,
        wrapped=step.network,
        optimizer=step.optimizer.optimizer,  # without the gradient scaler
        average=None,
        settings=replace(step.settings, max_grad_norm=None, log_every=0),
        finite=NonFiniteDetector(),
    )
    loader.plan = replace(loader.plan, grad_accum_steps=number)
    hooks = TrainCallbacks(lambda _: None, lambda *_: True, lambda *_: None)
    try:
        alone.train_epoch(_Replicated(loader), epoch, 0, RunningMetrics.zero(trainer.accelerator.device, None), hooks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


class _Replicated:
    """Batches of a loader, marked as equal on all processes, so that batch norm does not synchronize."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[MicroBatch, Any]]:
        """Yield the micro-batches of an epoch."""
        for micro, batch in self.loader.epoch(epoch, first_step):
            yield replace(micro, replicated=True), batch
