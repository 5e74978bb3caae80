"""Transforms from a decoded image to the model's input: the preprocessing combined with the augmentations.

Order: before_resize, resize, before_crop, crop, alternating flip, after_crop, timm's policy, float tensor in 0..1,
tensor, normalization, random erasing. Alternating flip, policy and random erasing apply to training images only.
torchvision.transforms.v2 draws from torch's default generator; timm's policies draw from Python's and NumPy's
generators, and plugins from any of them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import CenterCropOrPad
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode

from toolkit.augment.resize import ResizeKeepRatio, as_tensor, has_bytes_form, is_same_on_bytes, on_bytes
from toolkit.augment.steps import AlternatingFlip, Step, policy_step, recipe_step, torchvision_step
from toolkit.data.image_sources import MODES, ImageSource, Pixels, as_image, as_pixels
from toolkit.data.preprocessing import Preprocessing
from toolkit.errors import UserError
from toolkit.formatting import plural
from toolkit.plugins import PREFIX
from toolkit.recipe.gpu_support import is_random
from toolkit.recipe.image_size import as_size, as_value, size_text
from toolkit.recipe.schema import AugmentConfig

TENSOR_ONLY = frozenset({"GaussianNoise"})
"""Transforms that need a tensor; by default they are applied after scaling to 0..1."""

CENTER_CROP = "center crop"
"""Start of the description of a center crop."""


class ImageTransform:
    """The transform of one split, from a decoded image to the model's input."""

    def __init__(
        self, split: str, steps: Sequence[Step], preprocessing: Preprocessing, base: int = 0, cropped: int = 0
    ) -> None:
        self.split, self.steps = split, tuple(steps)
        self.size, self.channels = preprocessing.image_size, preprocessing.channels
        self.fixed = tuple(step.fixed for step in takewhile(lambda step: step.fixed, steps) if step.fixed)
        """Descriptions of the leading deterministic steps."""
        self.base = min(len(self.fixed), base)
        """Number of leading deterministic steps up to the resize, including the center crop if it comes next."""
        self.cropped = cropped
        """Number of steps up to the crop, or to the transform that replaces it; they may be random."""
        self.draws_from_python = any(step.name == "auto_augment" or step.name.startswith(PREFIX) for step in steps)
        """Whether Python's and NumPy's random states must be seeded in addition to torch's."""

    def __call__(self, pixels: Pixels) -> Tensor:
        """Transform uint8 [h, w, C] of any size to float32 [C, H, W] of the model's input size.

        Raises UserError if the result has another size.
        """
        tensor: Tensor = self.apply(pixels, len(self.steps)).as_subclass(Tensor)
        self.check_size(pixels, (tensor.shape[-2], tensor.shape[-1]))
        return tensor

    def apply(self, pixels: Pixels, count: int) -> Any:
        """Apply the first ``count`` steps, even random ones. Returns uint8 [h, w, C] if all are before ToImage."""
        result: Any = pixels
        for step in self.steps[:count]:
            result = _apply(step, result)
        if isinstance(result, Tensor) and not any(step.name == "ToImage" for step in self.steps[:count]):
            return result.as_subclass(Tensor).permute(1, 2, 0).contiguous().numpy()
        return as_pixels(result) if isinstance(result, Image.Image) else result

    def check_size(self, given: Pixels, made: tuple[int, int]) -> None:
        """Raise UserError unless ``made``, the (height, width) after the transform of an image, is the model's size."""
        if made != self.size:
            raise UserError(
                f"augment.{self.split}, data.resize and data.crop make an image of {size_text(made)} pixels from "
                f"one of {given.shape[0]} x {given.shape[1]}, but data.image_size is {as_value(self.size)}: "
                f"set data.crop = 'center', or data.resize = {list(self.size)}"
            )

    def after(self, count: int) -> ImageTransform:
        """Return the transform that remains after the first ``count`` steps."""
        rest = copy.copy(self)
        rest.steps, rest.fixed = self.steps[count:], self.fixed[count:]
        rest.base, rest.cropped = 0, max(0, self.cropped - count)
        return rest


class UInt8Transform:
    """The first steps of a transform, until all images have the same size; the rest is then applied to batches."""

    def __init__(self, transform: ImageTransform, count: int) -> None:
        self.transform, self.count = transform, count
        self.is_all = makes_floats(transform.after(count))

    def __call__(self, pixels: Pixels) -> Tensor:
        """Transform uint8 [h, w, C] to uint8 [h, w, C].

        Raises UserError if the result has the wrong size and no remaining step changes it.
        """
        result = self.transform.apply(pixels, self.count)
        if self.is_all:
            self.transform.check_size(pixels, result.shape[:2])
        return torch.from_numpy(result)


def _apply(step: Step, image: Any) -> Any:
    """Apply a step to an array, uint8 [h, w, C], to a Pillow image or, from ToImage on, to a tensor.

    Steps with an equivalent on arrays return an array. Other steps before ToImage need a Pillow image, or a tensor if
    the number of channels is neither 1 nor 3.
    """
    if isinstance(image, np.ndarray):
        channels = image.shape[2]
        if (channels == 3 and is_same_on_bytes(step.on_image)) or (channels not in MODES and has_bytes_form(step)):
            return on_bytes(step.on_image, image)
        if step.name != "ToImage":
            image = as_image(image) if channels in MODES else tv_tensors.Image(as_tensor(image))
    return step.on_image(image)


def build_transform(split: str, augment: AugmentConfig, preprocessing: Preprocessing) -> ImageTransform:
    """Build the transform of one split: "train", "validation" or "test".

    Raises UserError, naming the entry, for an unknown or excluded transform, invalid arguments, and more than one
    transform that replaces the crop.
    """
    by_stage: dict[str, list[Step]] = {}
    for number, entry in enumerate(getattr(augment, split)):
        where = f"augment.{split}[{number}]"
        stage = entry.stage or ("tensor" if entry.name in TENSOR_ONLY else "after_crop")
        if entry.name in TENSOR_ONLY and stage != "tensor":
            raise UserError(
                f"{where}: {entry.name} needs a tensor; set stage = 'tensor' or leave it out, not {stage!r}"
            )
        by_stage.setdefault(stage, []).append(recipe_step(entry, where, preprocessing.image_size))
    is_train = split == "train"
    up_to_crop = [*by_stage.get("before_resize", []), *_resize_and_crop(split, by_stage, preprocessing)]
    steps = [
        *up_to_crop,
        *([Step("AlternatingFlip", {}, 1.0, AlternatingFlip())] if is_train and augment.alternating_flip else []),
        *by_stage.get("after_crop", []),
        *([policy_step(augment.auto_augment, preprocessing)] if is_train and augment.auto_augment else []),
        torchvision_step("ToImage"),
        torchvision_step("ToDtype", dtype=torch.float32, scale=True),
        *by_stage.get("tensor", []),
        torchvision_step("Normalize", mean=list(preprocessing.mean), std=list(preprocessing.std)),
        *([torchvision_step("RandomErasing", p=augment.random_erasing)] if is_train and augment.random_erasing else []),
    ]
    return ImageTransform(split, steps, preprocessing, _base(by_stage, preprocessing), len(up_to_crop))


def resize_and_crop(preprocessing: Preprocessing) -> list[Step]:
    """Return the preprocessing's steps on Pillow images: antialiased resize, then center crop."""
    return [*_resize(preprocessing), *_crop(preprocessing)]


def makes_floats(transform: ImageTransform) -> bool:
    """Return whether a transform only converts uint8 to float and normalizes the result."""
    return [step.name for step in transform.steps] == ["ToImage", "ToDtype", "Normalize"]


def is_deterministic(split: str, augment: AugmentConfig) -> bool:
    """Return whether an image of this split is known to give the same input every time.

    Features of a frozen backbone are cached only if this is True, so it is False in case of doubt.
    """
    is_mixed = split == "train" and bool(augment.mixup or augment.cutmix)
    return not is_mixed and not is_random(split, augment)


def try_transform(transform: ImageTransform, images: ImageSource, index: int) -> Tensor:
    """Apply the transform to one image, to find errors in the recipe before training.

    The random states are restored. Raises UserError, naming the step, if a step fails, and UnreadableImageError if the
    image cannot be read.
    """
    pixels = images.load(index)
    result: Any = pixels
    with preserved_random_states():
        for step in transform.steps:
            try:
                result = _apply(step, result)
            except Exception as error:  # a transform may raise anything; its message is quoted
                raise UserError(
                    f"augment.{transform.split}: {step.name} fails on {images.name(index)} "
                    f"({pixels.shape[1]} x {pixels.shape[0]} pixels): {error}"
                ) from error
            if not isinstance(result, np.ndarray | Image.Image | Tensor):
                raise UserError(
                    f"augment.{transform.split}: {step.name} must return an image, not {type(result).__name__}"
                )
        made = transform(pixels)
    if len(made) != transform.channels:
        raise UserError(
            f"augment.{transform.split} makes images with {plural(len(made), 'channel')}, but the model takes "
            f"{transform.channels}: see data.channels"
        )
    return made


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Restore the random states of torch (CPU), NumPy and Python on exit."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _base(by_stage: dict[str, list[Step]], preprocessing: Preprocessing) -> int:
    """Count the steps up to the resize, including the center crop if it comes next."""
    count = len(by_stage.get("before_resize", []))
    if by_stage.get("resize_crop"):
        return count
    count += len(_resize(preprocessing))
    return count if by_stage.get("before_crop") or by_stage.get("crop") else count + len(_crop(preprocessing))


def _resize_and_crop(split: str, by_stage: dict[str, list[Step]], preprocessing: Preprocessing) -> list[Step]:
    """Return the resize and the crop, with the transforms between them or that replace them."""
    both, crop = by_stage.get("resize_crop", []), by_stage.get("crop", [])
    before_crop = by_stage.get("before_crop", [])
    if len(both) + len(crop) > 1:
        raise UserError(f"augment.{split}: only one transform can replace the crop (stage = 'crop' or 'resize_crop')")
    if both and before_crop:
        raise UserError(
            f"augment.{split}: stage = 'before_crop' cannot be combined with another entry's stage = 'resize_crop'"
        )
    return both or [*_resize(preprocessing), *before_crop, *(crop or _crop(preprocessing))]


def _resize(preprocessing: Preprocessing) -> list[Step]:
    """Return the preprocessing's antialiased resize as a list of one step; [] if there is none."""
    size, interpolation = preprocessing.resize, preprocessing.interpolation
    if size is None:
        return []
    if preprocessing.border is not None or preprocessing.cover:
        fit, box = preprocessing.border is not None, as_size(size)
        shown = f"resize to {'fit into' if fit else 'cover'} {size_text(box)}, {interpolation}"
        on_image = ResizeKeepRatio(box, fit=fit, interpolation=interpolation)
        return [Step("ResizeKeepRatio", {"size": list(box)}, 1.0, on_image, shown)]
    shown = f"short side {size}" if isinstance(size, int) else f"{size[0]} x {size[1]}"
    return [
        torchvision_step(
            "Resize",
            size=size if isinstance(size, int) else list(size),
            interpolation=InterpolationMode(interpolation),
            antialias=True,
            fixed=f"resize to {shown}, {interpolation}",
        )
    ]


def _crop(preprocessing: Preprocessing) -> list[Step]:
    """Return the preprocessing's center crop as a list of one step; [] if there is none."""
    if not preprocessing.crop:
        return []
    size = list(preprocessing.image_size)
    shown = f"{CENTER_CROP} {size[0] if size[0] == size[1] else size_text(preprocessing.image_size)}"
    if preprocessing.border is None:
        return [torchvision_step("CenterCrop", size=size, fixed=shown)]
    color = list(preprocessing.border)
    crop = CenterCropOrPad(size, fill=color)
    return [Step("CenterCropOrPad", {"size": size, "fill": color}, 1.0, crop, f"{shown}, padded with {color}")]
