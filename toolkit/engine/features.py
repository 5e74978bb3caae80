"""Frozen features computed once.

Where transfer freezes everything up to one submodule (the tail) and what reaches it does not change from epoch to
epoch, the tail's inputs are computed once and training goes on from there: the same losses, without the frozen layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.data.loading import EvaluationBatch
from toolkit.data.transforms import is_deterministic
from toolkit.engine.evaluate import to_device
from toolkit.models.prefix import frozen_prefix, prefix_features, prefix_is_exact
from toolkit.models.transfer import Transfer
from toolkit.recipe.schema import Recipe

MEMORY_SHARE = 0.4
"""Features may take this share of the memory that is free on the machine, over all its processes."""


def tail_of(recipe: Recipe, transfer: Transfer) -> str | None:
    """Name of the submodule behind the frozen part, or None where the shortcut would change the experiment."""
    augment = recipe.augment
    if recipe.data.cache == "off" or recipe.transfer.mode == "gradual":
        return None
    if not is_deterministic("train", augment) or augment.mixup or augment.cutmix:
        return None
    return frozen_prefix(transfer)


def is_worthwhile(module: nn.Module, tail: str, sample: Tensor, images: int, local_processes: int) -> tuple[bool, str]:
    """Whether the shortcut is exact on ``sample`` and its features fit in memory; if not, why."""
    if not prefix_is_exact(module, tail, sample):
        return False, "the frozen part is not deterministic"
    one = prefix_features(module, tail, sample[:1])
    need = one.numel() * one.element_size() * images * local_processes
    free = available_memory()
    if need > free * MEMORY_SHARE:
        return False, f"its features would take {need / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"
    return True, ""


@torch.no_grad()
def compute_features(
    module: nn.Module,
    tail: str,
    batches: Iterable[EvaluationBatch],
    count: int,
    device: torch.device,
    *,
    autocast_dtype: torch.dtype | None,
    channels_last: bool,
) -> Tensor:
    """Inputs of ``tail`` for every example of a split, float32 [count, ...] on the CPU of every process (a collective).

    ``batches`` are this process's share; ``module`` is left in evaluation mode.
    """
    module.eval()
    features: Tensor | None = None
    for positions, images, _ in batches:
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            batch = prefix_features(module, tail, to_device(images, device, channels_last)).float().cpu()
        if features is None:
            features = batch.new_zeros((count, *batch.shape[1:]))
        features[torch.from_numpy(positions)] = batch
    return _join(features, count, device)


def _join(features: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Every process's rows together; a process may have had none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert features is not None
        return features
    shapes: list[tuple[int, ...] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, None if features is None else tuple(features.shape[1:]))
    shape = next(s for s in shapes if s is not None)
    mine = torch.zeros((count, *shape)) if features is None else features
    shared = mine.to(device) if dist.get_backend() == "nccl" else mine
    dist.all_reduce(shared)
    return shared.cpu()


def available_memory() -> int:
    """Bytes that can be taken without pushing anything out: the system's word, within this process's cgroup."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError, StopIteration):
        pass  # no such files here, or "max": no limit
    return free
