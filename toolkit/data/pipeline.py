"""How a split's images come to the model: which steps are done once, which for each image, which for whole batches.

The choice depends on the recipe and the data set alone, never on what is kept where: a cache changes no pixel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.augment.gpu import GpuAugmentation, gpu_augmentation
from toolkit.augment.gpu_pipeline import AugmentationPipeline, chain_of
from toolkit.augment.gpu_support import unsupported_on_gpu
from toolkit.augment.transforms import ImageTransform, build_transform, makes_floats
from toolkit.data.preprocessing import Preprocessing
from toolkit.errors import UserError
from toolkit.recipe.schema import AugmentConfig


@dataclass(frozen=True, eq=False)
class PreprocessingPlan:
    """One split's way."""

    transform: ImageTransform
    """The whole way, for one image."""
    steps: int
    """How many of its first steps come before ``batched``, image by image; random ones too, up to the crop."""
    batched: GpuAugmentation | None
    """What makes model inputs of a batch of bytes, all of one size; None: the transform does all, image by image."""
    is_exact: bool
    """Whether ``batched`` gives the transform's own result to the last bit: then either may be used."""
    obstacle: str
    """What keeps random augmentations, or those up to the crop, from being made in batches; "" where nothing does."""

    @property
    def is_fixed(self) -> bool:
        """Whether the first steps always make the same of an image, so that they can be done once."""
        return self.steps <= len(self.transform.fixed)


def plan_preprocessing(
    split: str, augment: AugmentConfig, preprocessing: Preprocessing, seed: int, native_size: int | None
) -> PreprocessingPlan:
    """How one split is delivered. ``native_size``: of all images of the data set, None where they differ.

    Raises UserError for a recipe that asks for the impossible.
    """
    transform = build_transform(split, augment, preprocessing)
    if makes_floats(transform.after(len(transform.fixed))):
        plain = GpuAugmentation(AugmentationPipeline((), None), preprocessing, seed)
        return PreprocessingPlan(transform, len(transform.fixed), plain, True, "")
    if augment.run_on == "workers":
        return PreprocessingPlan(transform, 0, None, False, "")
    batched = gpu_augmentation(augment, preprocessing, seed, split)
    if isinstance(batched, str):
        obstacle = batched
    elif _is_uniform(transform, preprocessing, native_size):
        return PreprocessingPlan(transform, transform.base, batched, False, "")
    else:
        obstacle = f"augment.{split}: the images are of different sizes where the random transforms begin"
    if augment.run_on == "device":
        raise UserError(f'augment.run_on = "device" cannot be: {obstacle}; set "auto" or "workers"')
    if unsupported_on_gpu(split, augment, after_crop=True) is None and _is_cropped(split, augment, preprocessing):
        rest = GpuAugmentation(chain_of(transform.steps[transform.cropped :]), preprocessing, seed)
        return PreprocessingPlan(transform, transform.cropped, rest, False, obstacle)
    return PreprocessingPlan(transform, 0, None, False, obstacle)


def _is_uniform(transform: ImageTransform, preprocessing: Preprocessing, native_size: int | None) -> bool:
    """Whether all images are of one size after the base steps."""
    crops = preprocessing.crop and transform.base > 0 and transform.fixed[transform.base - 1].startswith("centre crop")
    return crops or isinstance(preprocessing.resize, tuple) or native_size is not None


def _is_cropped(split: str, augment: AugmentConfig, preprocessing: Preprocessing) -> bool:
    """Whether all images are of one size after the crop, or what stands in its place."""
    in_place = any(entry.stage in ("crop", "resize_crop") for entry in getattr(augment, split))
    return preprocessing.crop or in_place or isinstance(preprocessing.resize, tuple)


class DevicePreprocessor:
    """Model inputs of a batch of bytes, on the device."""

    def __init__(
        self, delivery: PreprocessingPlan, device: torch.device, *, channels_last: bool, beside_workers: bool = False
    ) -> None:
        """beside_workers: data workers may hold the other cores meanwhile."""
        assert delivery.batched is not None
        self.batched, self.device, self.channels_last = delivery.batched, device, channels_last
        self.on_one_thread = beside_workers and device.type == "cpu"

    def __call__(self, pixels: Tensor, epoch: int, draws: Tensor) -> Tensor:
        """uint8 [m, h, w, c] -> float32 [m, C, image_size, image_size]; greyscale is repeated where C is 3."""
        with _one_thread() if self.on_one_thread else contextlib.nullcontext():
            return self._finished(pixels, epoch, draws)

    def _finished(self, pixels: Tensor, epoch: int, draws: Tensor) -> Tensor:
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        if images.shape[1] != self.batched.channels:
            images = images.expand(-1, self.batched.channels, -1, -1)
        if not self.channels_last:
            images = images.contiguous()
        return self.batched(images, epoch, draws)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Operations on single images are short: a second thread that waits for a worker's core holds up each of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
