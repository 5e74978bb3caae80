"""Augmentation of whole batches on the training device, instead of single images in data workers.

The augmentation of an example depends only on (seed, epoch, draw): parameters are sampled on the CPU from a
counter-based generator and applied to the pixels by elementwise operations. Therefore the result does not depend on the
other examples in the batch, the number of processes or the order of calls, bit for bit (floating point may differ
between devices). The distributions equal torchvision's; the individual random numbers do not, because torchvision's
generators are sequential.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from toolkit.augment.gpu_crop_flip import AlternatingFlip, BatchOp, CropFlipOp, Floats, SampledParams
from toolkit.augment.gpu_pipeline import batch_ops
from toolkit.augment.steps import Step
from toolkit.data.preprocessing import Preprocessing
from toolkit.data.sampling import GOLDEN_GAMMA, IntArray, finalize64, hash64
from toolkit.data.tensor_rows import assign_rows, index_rows, memory_format
from toolkit.errors import UserError
from toolkit.recipe.image_size import as_value, size_text

_AUGMENT_STREAM = 0x6175676D656E74
"""Key constant that makes these random numbers independent of all others with the same seed ("augment" in ASCII)."""

_ALTERNATING_STREAM = 0x616C7465726E617465
"""The same constant for the epochs in which images are flipped ("alternate" in ASCII)."""

CHUNK = 2**18
"""Number of values (4 bytes each) that a CPU processes at a time, so that they stay in its caches."""


class GpuAugmentation:
    """The last steps of one split's transform, applied to batches; the steps before them are applied image by image."""

    def __init__(self, steps: Sequence[Step], preprocessing: Preprocessing, seed: int) -> None:
        """``steps``: the last of them is the normalization, optionally followed by random erasing."""
        self.passes, self.erase = batch_ops(steps)
        self.all = [*self.passes, *([self.erase] if self.erase else [])]
        self.alternating = _alternating_column(self.passes)
        self.seed = seed
        self.size, self.channels = preprocessing.image_size, preprocessing.channels
        self.mean, self.std = (torch.tensor(values) for values in (preprocessing.mean, preprocessing.std))
        self._row_mean, self._row_std = self.mean.repeat(self.size[1]), self.std.repeat(self.size[1])

    def __call__(self, images: Tensor, epoch: int, draws: Tensor | IntArray) -> Tensor:
        """Augment and normalize uint8 [m, C, h, w] to float32 [m, C, H, W] on the same device.

        ``draws``: int64 [m] on the CPU, see :meth:`toolkit.data.sampling.SamplingPlan.epoch`. The memory format
        (channels_last) is kept. There is no GPU synchronization. Each call has an overhead of some hundred
        microseconds, so combine small batches.

        Raises UserError if the result does not have the model's input size.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(f"expected uint8 [m, {self.channels}, h, w], not {images.dtype} {list(images.shape)}")
        plans = self.plans(epoch, draws, (images.shape[2], images.shape[3]))
        tables = _on_device([plan.table for plan in plans], images.device)
        shape = (len(images), self.channels, *self.size)
        made = torch.empty(shape, device=images.device, memory_format=memory_format(images))
        count = len(images) if images.device.type != "cpu" else max(1, CHUNK // (self.channels * math.prod(self.size)))
        for start in range(0, len(images), count):
            part = slice(start, start + count)
            self._make(images[part], made[part], [plan.of(part) for plan in plans], [table[part] for table in tables])
        return made

    def plans(self, epoch: int, draws: Tensor | IntArray, size: tuple[int, int]) -> list[SampledParams]:
        """Sample the parameters of each operation of the pipeline for each image of a batch."""
        counts = [one.random_count for one in self.all]
        u = keyed_uniforms(np.asarray(draws), sum(counts), _AUGMENT_STREAM, self.seed, epoch)
        if self.alternating is not None:
            u[:, self.alternating] = alternating_uniforms(np.asarray(draws), self.seed, epoch)
        plans: list[SampledParams] = []
        for one, end in zip(self.all, np.cumsum(counts).tolist(), strict=True):
            plans.append(one.plan(u[:, end - one.random_count : end], size))
            size = plans[-1].size
        if size != self.size:
            raise UserError(
                f"augment, data.resize and data.crop make images of {size_text(size)} pixels, but data.image_size is "
                f"{as_value(self.size)}: set data.crop = 'center', or data.resize = {list(self.size)}"
            )
        return plans

    def _make(self, images: Tensor, made: Tensor, plans: Sequence[SampledParams], tables: Sequence[Tensor]) -> None:
        """Apply the pipeline to ``images`` and write the result to ``made``."""
        for one, plan, table in zip(self.passes, plans, tables, strict=False):  # plans may end with random erasing's
            images = apply_to_changed(one, images, plan, table)
        self._normalize(images, made)
        if self.erase is not None:
            self.erase.erase(made, plans[-1], tables[-1])

    def _normalize(self, images: Tensor, made: Tensor) -> None:
        """Normalize values in 0..255 with torchvision's operations in the same order, for bitwise equal results."""
        made.copy_(images)
        if made.device.type == "cpu" and memory_format(made) is torch.channels_last:
            # Treat a row of pixels as one vector: broadcasting over only the three channels is ten times slower.
            lines = made.permute(0, 2, 3, 1).view(-1, self.size[1] * self.channels)
            lines.mul_(1 / 255).sub_(self._row_mean).div_(self._row_std)
        else:
            mean, std = (values.to(made.device, non_blocking=True)[:, None, None] for values in (self.mean, self.std))
            made.mul_(1 / 255).sub_(mean).div_(std)


def keyed_uniforms(draws: IntArray, n: int, *key: int) -> Floats:
    """Return n numbers in [0, 1) for each draw, which depend only on (key, draw, index): float64 [m, n].

    Vectorized :func:`toolkit.data.sampling.hash64` of (*key, draw, 0..n-1).
    """
    step = np.uint64(GOLDEN_GAMMA)
    state = finalize64(np.uint64(hash64(*key)) + draws.astype(np.uint64) + step)
    offsets = np.arange(n, dtype=np.uint64) + step
    numbers: Floats = (finalize64(state[:, None] + offsets) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def alternating_uniforms(draws: IntArray, seed: int, epoch: int) -> Floats:
    """Return numbers in [0, 1), float64 [m], that are below 0.5 in every second epoch; which one depends on the draw.

    An image has the same draw in each epoch if it occurs once per epoch.
    """
    first = keyed_uniforms(draws, 1, _ALTERNATING_STREAM, seed)[:, 0]
    numbers: Floats = (first + 0.5 * (epoch % 2)) % 1.0
    return numbers


def _alternating_column(operations: Sequence[BatchOp]) -> int | None:
    """Return the index of the alternating flip's number among the random numbers of all operations; None without it."""
    column = 0
    for one in operations:
        for step in one.steps if isinstance(one, CropFlipOp) else (one,):
            if isinstance(step, AlternatingFlip):
                return column
            column += step.random_count
    return None


def _on_device(tables: Sequence[Floats], device: torch.device) -> list[Tensor]:
    """Copy parameter tables [m, k] to the device as float32, in one asynchronous transfer."""
    if not tables:
        return []
    if device.type == "cpu":
        return [torch.from_numpy(table.astype(np.float32)) for table in tables]
    whole = torch.from_numpy(np.concatenate(tables, 1).astype(np.float32))
    if device.type == "cuda":
        whole = whole.pin_memory()
    return list(whole.to(device, non_blocking=True).split([table.shape[1] for table in tables], 1))


def apply_to_changed(one: BatchOp, images: Tensor, plan: SampledParams, table: Tensor) -> Tensor:
    """Apply an operation to the images for which ``plan.applied`` is true."""
    if plan.applied.all():
        return one.apply(images, plan, table)
    due = np.flatnonzero(plan.applied)
    if not len(due):
        return images
    where = torch.from_numpy(due).to(images.device, non_blocking=True)
    changed = one.apply(index_rows(images, where), plan.of(due), table[where])
    result = images.to(changed.dtype, copy=True)
    assign_rows(result, where, changed)
    return result
