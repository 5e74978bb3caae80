"""Batch norm statistics of averaged weights, computed by a pass over training images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.distributed.batchnorm import average_statistics, recomputed_statistics, set_replicated
from toolkit.distributed.process import autocast_dtype, gather_objects
from toolkit.training.evaluation import to_device

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer


def update_average_statistics(trainer: Trainer, epoch: int) -> None:
    """Compute the batch norm statistics of the averaged weights after ``epoch``, from 0, if they need own ones.

    A collective. Only those of layers that normalize by the batch in training. Raises StopTraining on request.
    """
    average, network = trainer.train_step.average, trainer.train_step.network
    if average is None or not average.has_own_statistics or not average.is_evaluated:
        return
    trainer.setup.transfer.train_mode()
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
    }
    if not layers:
        return
    average.keep_statistics(network, layers)
    with average.swapped_in(network):
        recompute_batch_norm(trainer, epoch, list(layers.values()))


@torch.no_grad()
def recompute_batch_norm(trainer: Trainer, epoch: int, layers: Sequence[nn.Module]) -> None:
    """Replace the running statistics of batch norm ``layers`` by the means over the batches of ``epoch``, from 0.

    A collective. Images, their order and their augmentation are those of training, without mixup and CutMix. As in
    torch's update_bn, all batches have the same weight; unlike in update_bn, dropout is off.
    Raises StopTraining on request.
    """
    network, accelerator = trainer.train_step.network, trainer.accelerator
    dtype, channels_last = autocast_dtype(accelerator.mixed_precision), trainer.recipe.train.channels_last
    loader = trainer.loaders.train
    rounds = max(gather_objects(sum(1 for _ in loader.plan.epoch(epoch, 0))))
    with recomputed_statistics(network, layers):
        for micro, batch in trainer.consensus.stop_aware(loader.epoch(epoch), rounds):
            if accelerator.num_processes > 1:
                set_replicated(network, micro.replicated)
            with torch.autocast(accelerator.device.type, dtype=dtype, enabled=dtype is not None):
                network(to_device(batch.images[: micro.own], accelerator.device, channels_last))
    if accelerator.num_processes > 1 and not trainer.recipe.train.sync_batch_norm:
        average_statistics(network)
