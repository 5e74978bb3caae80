"""Augmentation of whole batches on the training device, in place of transforms of single images in workers.

What is random about an example is a function of (seed, epoch, draw) alone: uniform numbers from a counter-based
generator, made into parameters on the CPU, applied to pixels by elementwise operations. So neither the batch around an
example, nor the number of processes, nor the order of calls changes a bit of it (between devices floating point may).
The distributions are torchvision's, the numbers are not: its generators draw one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from toolkit.augment.gpu_crop_flip import BatchOp, Floats, SampledParams
from toolkit.augment.gpu_pipeline import AugmentationPipeline, after_resize, chain_of
from toolkit.augment.gpu_support import unsupported_on_gpu
from toolkit.data.preprocessing import Preprocessing
from toolkit.data.sampling import IntArray, hash64
from toolkit.data.tensor_rows import assign_rows, index_rows, memory_format
from toolkit.errors import UserError
from toolkit.recipe.schema import AugmentConfig

_AUGMENT_STREAM = 0x6175676D656E74
"""Keeps these random numbers apart from all others of the same seed ("augment" in ASCII)."""

_CHUNK = 2**18
"""Values (4 bytes each) that are worked on at once on a CPU, so that they stay in its caches."""


class GpuAugmentation:
    """One split's augmentations, crop and normalisation, for batches."""

    def __init__(self, chain: AugmentationPipeline, preprocessing: Preprocessing, seed: int) -> None:
        self.chain, self.seed = chain, seed
        self.size, self.channels = preprocessing.image_size, preprocessing.channels
        self.mean, self.std = (torch.tensor(values) for values in (preprocessing.mean, preprocessing.std))
        self._row_mean, self._row_std = self.mean.repeat(self.size), self.std.repeat(self.size)

    def __call__(self, images: Tensor, epoch: int, draws: Tensor | IntArray) -> Tensor:
        """uint8 [m, C, h, w] -> float32 [m, C, image_size, image_size] on the same device, normalised.

        images: decoded and resized, all of one size; where the fixed centre crop is the first thing after the resize
        it may have been made already. draws: int64 [m] on the CPU, see
        :meth:`toolkit.data.sampling.SamplingPlan.epoch`.
        Images that are channels_last are worked on, and given back, as such. Nothing waits for a GPU. Each call costs
        some hundred microseconds on its own, so that several small batches are best made in one.

        Raises UserError where the result has another size than image_size.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(f"expected uint8 [m, {self.channels}, h, w], not {images.dtype} {list(images.shape)}")
        plans = self.plans(epoch, draws, (images.shape[2], images.shape[3]))
        tables = _on_device([plan.table for plan in plans], images.device)
        shape = (len(images), self.channels, self.size, self.size)
        made = torch.empty(shape, device=images.device, memory_format=memory_format(images))
        count = len(images) if images.device.type != "cpu" else max(1, _CHUNK // (self.channels * self.size**2))
        for start in range(0, len(images), count):
            part = slice(start, start + count)
            self._make(images[part], made[part], [plan.of(part) for plan in plans], [table[part] for table in tables])
        return made

    def plans(self, epoch: int, draws: Tensor | IntArray, size: tuple[int, int]) -> list[SampledParams]:
        """What each pass of the chain will do to each image of a batch: all that is random about it."""
        slots = [one.slots for one in self.chain.all]
        u = keyed_uniforms(np.asarray(draws), sum(slots), _AUGMENT_STREAM, self.seed, epoch)
        plans: list[SampledParams] = []
        for one, end in zip(self.chain.all, np.cumsum(slots).tolist(), strict=True):
            plans.append(one.plan(u[:, end - one.slots : end], size))
            size = plans[-1].size
        if size != (self.size, self.size):
            raise UserError(
                f"augment, data.resize and data.crop make images of {size[0]} x {size[1]} pixels, but data.image_size "
                f"is {self.size}: set data.crop = 'center', or data.resize = [{self.size}, {self.size}]"
            )
        return plans

    def _make(self, images: Tensor, made: Tensor, plans: Sequence[SampledParams], tables: Sequence[Tensor]) -> None:
        """The chain over some of the images, into ``made``."""
        count = len(self.chain.passes)
        for one, plan, table in zip(self.chain.passes, plans[:count], tables[:count], strict=True):
            images = _where_due(one, images, plan, table)
        self._normalize(images, made)
        if self.chain.erase is not None:
            self.chain.erase.erase(made, plans[-1], tables[-1])

    def _normalize(self, images: Tensor, made: Tensor) -> None:
        """0..255 -> normalised, by torchvision's own operations in their order: bit for bit alike."""
        made.copy_(images)
        if made.device.type == "cpu" and memory_format(made) is torch.channels_last:
            # A row of pixels as one vector: broadcasting over the three channels alone is ten times slower.
            lines = made.permute(0, 2, 3, 1).view(-1, self.size * self.channels)
            lines.mul_(1 / 255).sub_(self._row_mean).div_(self._row_std)
        else:
            mean, std = (values.to(made.device, non_blocking=True)[:, None, None] for values in (self.mean, self.std))
            made.mul_(1 / 255).sub_(mean).div_(std)


def gpu_augmentation(
    augment: AugmentConfig, preprocessing: Preprocessing, seed: int, split: str = "train"
) -> GpuAugmentation | str:
    """The augmentations of a split for batches, or why it has none (in words: the place in the recipe and the name).

    Raises UserError where augment.run_on = "device" and something prevents it, and as
    :func:`toolkit.augment.transforms.build_transform`.
    """
    obstacle = 'augment.run_on = "workers"' if augment.run_on == "workers" else unsupported_on_gpu(split, augment)
    if obstacle is None:
        return GpuAugmentation(chain_of(after_resize(split, augment, preprocessing)), preprocessing, seed)
    if augment.run_on == "device":
        raise UserError(f'augment.run_on = "device", but batches cannot be given {obstacle}; set "auto" or "workers"')
    return obstacle


def keyed_uniforms(draws: IntArray, n: int, *key: int) -> Floats:
    """n numbers in [0, 1) for each draw, a function of (key, draw, number) alone: float64 [m, n].

    :func:`toolkit.data.sampling.hash64` of (*key, draw, 0..n-1), for many draws at once.
    """
    state = np.uint64(hash64(*key)) + draws.astype(np.uint64)
    state = _mixed(_mixed(state)[:, None] + np.arange(n, dtype=np.uint64))
    numbers: Floats = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _mixed(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, as in hash64; uint64 wraps around."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


def _on_device(tables: Sequence[Floats], device: torch.device) -> list[Tensor]:
    """Tables [m, k] as float32 on the device, in one transfer that nothing waits for."""
    if not tables:
        return []
    if device.type == "cpu":
        return [torch.from_numpy(table.astype(np.float32)) for table in tables]
    whole = torch.from_numpy(np.concatenate(tables, 1).astype(np.float32))
    if device.type == "cuda":
        whole = whole.pin_memory()
    return list(whole.to(device, non_blocking=True).split([table.shape[1] for table in tables], 1))


def _where_due(one: BatchOp, images: Tensor, plan: SampledParams, table: Tensor) -> Tensor:
    """A pass over those of the images that it changes."""
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
