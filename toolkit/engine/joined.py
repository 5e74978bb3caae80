"""The processes of a launcher for work that is not training: evaluation, prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from accelerate import Accelerator

from toolkit.engine.launcher import check_launch
from toolkit.engine.peers import watch_peers
from toolkit.engine.process import start
from toolkit.recipe.schema import TrainTable


@contextlib.contextmanager
def joined(train: TrainTable) -> Iterator[Accelerator]:
    """Join the processes that a launcher has started (or be the only one), and leave them all together.

    Device and precision are those that training by ``train`` would have here. When one process fails, the others end.
    """
    check_launch(train)
    accelerator = start(train)
    peers = watch_peers()
    yield accelerator
    if peers is not None:
        peers.close()
    accelerator.wait_for_everyone()
    if dist.is_initialized():
        dist.destroy_process_group()
