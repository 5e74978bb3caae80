"""Choose which preprocessing steps of a split run once per image, which once per example, and which on batches.

The choice depends only on the recipe and the data set, not on caching, so caching does not change any pixel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.augment.gpu import GpuAugmentation
from toolkit.augment.transforms import CENTER_CROP, ImageTransform, build_transform, makes_floats
from toolkit.data.preprocessing import Preprocessing
from toolkit.data.sampling import IntArray
from toolkit.errors import UserError
from toolkit.recipe.gpu_support import unsupported_on_gpu
from toolkit.recipe.schema import AugmentConfig


@dataclass(frozen=True, eq=False)
class PreprocessingPlan:
    """The preprocessing of one split's images, divided into steps per image and steps per batch."""

    transform: ImageTransform
    """The whole transform, for one image."""
    steps: int
    """Number of its first steps that are applied image by image before ``batched``; up to the crop they may be
    random."""
    batched: GpuAugmentation | None
    """Computes model inputs from a uint8 batch of equal-sized images; None: ``transform`` does everything."""
    is_exact: bool
    """Whether ``batched`` gives the result of ``transform`` bit for bit, so that either may be used."""
    why_not_batched: str
    """Why random augmentations, or those up to the crop, cannot be applied to batches; "" if they can."""

    @property
    def is_fixed(self) -> bool:
        """Whether the steps applied image by image are all deterministic, so that their result can be cached."""
        return self.steps <= len(self.transform.fixed)


def plan_preprocessing(
    split: str, augment: AugmentConfig, preprocessing: Preprocessing, seed: int, native_size: int | None
) -> PreprocessingPlan:
    """Choose how the images of one split are preprocessed.

    ``native_size`` is the height and width of all images of the data set, None if they differ. Raises UserError if
    ``augment.run_on = "device"`` or ``augment.alternating_flip`` is not possible.
    """
    transform = build_transform(split, augment, preprocessing)

    def batched_after(steps: int) -> GpuAugmentation:
        return GpuAugmentation(transform.steps[steps:], preprocessing, seed)

    fixed = len(transform.fixed)
    if makes_floats(transform.after(fixed)):
        return PreprocessingPlan(transform, fixed, batched_after(fixed), True, "")
    if augment.run_on == "workers":
        return PreprocessingPlan(transform, 0, None, False, "")
    obstacle = unsupported_on_gpu(split, augment)
    if obstacle is None and not _is_uniform(transform, preprocessing, native_size):
        obstacle = f"augment.{split}: the images have different sizes before the random transforms"
    if obstacle is None:
        return PreprocessingPlan(transform, transform.base, batched_after(transform.base), False, "")
    if augment.run_on == "device":
        raise UserError(f'augment.run_on = "device" is not possible: {obstacle}; set "auto" or "workers"')
    if unsupported_on_gpu(split, augment, after_crop=True) is None and _is_cropped(split, augment, preprocessing):
        cropped = transform.cropped
        return PreprocessingPlan(transform, cropped, batched_after(cropped), False, obstacle)
    if split == "train" and augment.alternating_flip:
        raise UserError(f"augment.alternating_flip is applied to whole batches, which is not possible: {obstacle}")
    return PreprocessingPlan(transform, 0, None, False, obstacle)


def _is_uniform(transform: ImageTransform, preprocessing: Preprocessing, native_size: int | None) -> bool:
    """Return whether all images have the same size after the base steps."""
    crops = preprocessing.crop and transform.base > 0 and transform.fixed[transform.base - 1].startswith(CENTER_CROP)
    return crops or isinstance(preprocessing.resize, tuple) or native_size is not None


def _is_cropped(split: str, augment: AugmentConfig, preprocessing: Preprocessing) -> bool:
    """Return whether all images have the same size after the crop or its replacement."""
    in_place = any(entry.stage in ("crop", "resize_crop") for entry in getattr(augment, split))
    return preprocessing.crop or in_place or isinstance(preprocessing.resize, tuple)


class DevicePreprocessor:
    """Computes model inputs from uint8 batches on the device."""

    def __init__(
        self, plan: PreprocessingPlan, device: torch.device, *, channels_last: bool, beside_workers: bool = False
    ) -> None:
        """``beside_workers``: data workers may be using the other cores at the same time."""
        assert plan.batched is not None
        self.batched, self.device, self.channels_last = plan.batched, device, channels_last
        self.on_one_thread = beside_workers and device.type == "cpu"

    def __call__(self, pixels: Tensor, epoch: int, draws: IntArray) -> Tensor:
        """Convert uint8 [m, h, w, c] to float32 [m, C, H, W]; grayscale is repeated if C is 3."""
        with _one_thread() if self.on_one_thread else contextlib.nullcontext():
            images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            if images.shape[1] != self.batched.channels:
                images = images.expand(-1, self.batched.channels, -1, -1)
            return self.batched(images if self.channels_last else images.contiguous(), epoch, draws)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one PyTorch thread: operations are short, and a second thread would wait for a core used by a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
