"""Distributed context for work other than training: evaluation, prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate import Accelerator

from toolkit.distributed.launcher import check_launch
from toolkit.distributed.process import init_accelerator, leave
from toolkit.recipe.schema import TrainConfig


@contextlib.contextmanager
def distributed_context(train: TrainConfig) -> Iterator[Accelerator]:
    """Join the processes that a launcher started (or run as the only one), and leave the process group at the end.

    Device and precision are those that training with ``train`` would have. If one process fails, the others end too.
    """
    check_launch(train)
    accelerator = init_accelerator(train)
    yield accelerator
    leave(accelerator)
