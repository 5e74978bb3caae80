"""Batch norm statistics of averaged weights, computed by a pass over training images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from toolkit.distributed.batchnorm import recomputed_statistics, set_replicated
from toolkit.distributed.process import autocast_dtype
from toolkit.training.evaluation import to_device

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer


@torch.no_grad()
def recompute_batch_norm(trainer: Trainer, epoch: int, layers: Sequence[nn.Module]) -> None:
    """Replace the running statistics of batch norm ``layers`` by their means over the batches of ``epoch``, from 0.

    A collective. The same images, in the same order and with the same augmentation as in training, except mixup and
    CutMix. As in torch's update_bn, all batches have the same weight; unlike there, dropout is off, as in evaluation.
    """
    network, accelerator = trainer.train_step.network, trainer.accelerator
    dtype, channels_last = autocast_dtype(accelerator.mixed_precision), trainer.recipe.train.channels_last
    with recomputed_statistics(network, layers):
        for micro, batch in trainer.loaders.train.epoch(epoch):
            if accelerator.num_processes > 1:
                set_replicated(network, micro.replicated)
            with torch.autocast(accelerator.device.type, dtype=dtype, enabled=dtype is not None):
                network(to_device(batch.images[: micro.own], accelerator.device, channels_last))
