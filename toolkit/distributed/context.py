"""Distributed context for work other than training: evaluation, prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from accelerate import Accelerator

from toolkit.distributed.failure_detection import close_failure_detector
from toolkit.distributed.launcher import check_launch
from toolkit.distributed.process import init_accelerator, leave
from toolkit.recipe.schema import TrainConfig


@contextlib.contextmanager
def distributed_context(train: TrainConfig) -> Iterator[Accelerator]:
    """Join the processes that a launcher started (or run as the only one), and leave the process group at the end.

    Device and precision are those that training with ``train`` would have. If one process fails, the others end too.
    A process group that the caller has created is used and left as it is.
    """
    check_launch(train)
    is_callers = dist.is_initialized()
    accelerator = init_accelerator(train)
    yield accelerator
    if is_callers:
        close_failure_detector()
    else:
        leave(accelerator)
