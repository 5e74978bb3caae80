"""Transforms from a decoded image to the model's input: :class:`Preprocessing` combined with the augmentations.

Order: before_resize, resize, before_crop, crop, after_crop, timm's policy, float tensor in 0..1, tensor, normalization,
random erasing. The policy and random erasing apply to training images only. torchvision.transforms.v2 draws from
torch's default generator; timm's policies draw from Python's and NumPy's generators.
"""

from __future__ import annotations

import copy
import inspect
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from toolkit.augment.resize import (
    RandomResizedCrop,
    Resize,
    as_bytes,
    as_image,
    is_same_on_bytes,
    on_bytes,
    resizes_bytes,
)
from toolkit.data.image_sources import MODES, ImageSource, as_picture, to_mode
from toolkit.data.preprocessing import Preprocessing
from toolkit.errors import UserError
from toolkit.recipe.catalog import excluded_transforms
from toolkit.recipe.gpu_support import FIXED, is_random
from toolkit.recipe.schema import AugmentConfig, TransformConfig
from toolkit.similar_names import did_you_mean

TENSOR_ONLY = frozenset({"GaussianNoise"})
"""Transforms that need a tensor, and so are applied after the scaling to 0..1 by default."""

CENTER_CROP = "center crop"
"""Start of the description of the fixed crop."""


NamedTransform = tuple[Callable[[Any], Any], str | None]
"""A transform and its description, which fully determines its effect on a Pillow image; None if the transform may be
random."""


class ImageTransform:
    """The transform of one split, from a decoded image to the model's input."""

    def __init__(
        self,
        split: str,
        steps: Sequence[Callable[[Any], Any]],
        preprocessing: Preprocessing,
        fixed: Sequence[str] = (),
        base: int = 0,
        cropped: int = 0,
    ) -> None:
        self.split, self.steps = split, tuple(steps)
        self.mode: str | None = MODES[preprocessing.channels]
        self.size = preprocessing.image_size
        self.fixed = tuple(fixed)
        """Descriptions of the leading deterministic steps."""
        self.base = base
        """Number of these up to the resize, including the fixed crop if it is next."""
        self.cropped = cropped
        """Number of steps up to the crop or its replacement; they may be random."""
        self.draws_from_python = any(type(step).__module__.startswith("timm.") for step in steps)
        """Whether Python's and NumPy's random states must be seeded in addition to torch's."""

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform a Pillow image of any size to float32 [C, image_size, image_size].

        Raises UserError if the result has another size.
        """
        tensor: Tensor = self.begin(image, len(self.steps)).as_subclass(Tensor)
        self._check_size((image.height, image.width), (tensor.shape[-2], tensor.shape[-1]))
        return tensor

    def begin(self, image: Image.Image, count: int) -> Any:
        """Apply the first ``count`` steps to an image. Returns a Pillow image if these steps are among ``fixed``."""
        result: Any = image if self.mode is None else to_mode(image, self.mode)
        for step in self.steps[:count]:
            result = step(result)
        return result

    def pixels(self, image: Image.Image | Tensor, count: int) -> npt.NDArray[np.uint8]:
        """Apply the first ``count`` steps, random or not, all before ToImage. Returns uint8 [h, w, C], read-only.

        ``image`` is a Pillow image or uint8 [h, w, 3]. It is converted between the two only if a step requires it.
        """
        at: Image.Image | Tensor
        if isinstance(image, Tensor) and self.mode in ("RGB", None):
            at = image.permute(2, 0, 1)
        else:
            at = self.begin(as_picture(image), 0)
        for step in self.steps[:count]:
            if isinstance(at, Tensor):
                at = on_bytes(step, at) if is_same_on_bytes(step) else step(as_image(at))
            elif at.mode == "RGB" and resizes_bytes(step):
                at = on_bytes(step, as_bytes(at))
            else:
                at = step(at)
        if isinstance(at, Tensor):
            return at.permute(1, 2, 0).numpy()
        array = np.array(at)
        return array if array.ndim == 3 else array[..., None]

    def _check_size(self, given: tuple[int, int], made: tuple[int, int]) -> None:
        if made != (self.size, self.size):
            raise UserError(
                f"augment.{self.split}, data.resize and data.crop make an image of {made[0]} x {made[1]} pixels out of "
                f"one of {given[0]} x {given[1]}, but data.image_size is {self.size}: set data.crop = 'center', "
                f"or data.resize = [{self.size}, {self.size}]"
            )

    def after(self, count: int) -> ImageTransform:
        """Return the transform that remains after the first ``count`` steps."""
        rest = copy.copy(self)
        rest.steps, rest.fixed, rest.mode = self.steps[count:], self.fixed[count:], None
        rest.base, rest.cropped = 0, max(0, self.cropped - count)
        return rest


class UInt8Transform:
    """The first steps of a transform, until all images have the same size; the rest is then applied to batches."""

    def __init__(self, transform: ImageTransform, count: int) -> None:
        self.transform, self.count = transform, count
        self.is_all = makes_floats(transform.after(count))

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Transform a Pillow image or uint8 [h, w, 3] to uint8 [h, w, C].

        Raises UserError if the size is wrong and no remaining step changes it.
        """
        pixels = self.transform.pixels(image, self.count)
        if self.is_all:
            found = image.shape[:2] if isinstance(image, Tensor) else (image.height, image.width)
            self.transform._check_size((found[0], found[1]), pixels.shape[:2])
        return torch.from_numpy(pixels)


def build_transform(split: str, augment: AugmentConfig, preprocessing: Preprocessing) -> ImageTransform:
    """Build the transform of one split: "train", "validation" or "test".

    Raises UserError, naming the entry, for an unknown or excluded transform, invalid arguments, and more than one
    transform in place of the crop.
    """
    places: dict[str, list[NamedTransform]] = {}
    for number, entry in enumerate(_entries(split, augment)):
        where = f"augment.{split}[{number}]"
        place = entry.stage or ("tensor" if entry.name in TENSOR_ONLY else "after_crop")
        if entry.name in TENSOR_ONLY and place != "tensor":
            raise UserError(
                f"{where}: {entry.name} needs a tensor; set stage = 'tensor' or leave it out, not {place!r}"
            )
        places.setdefault(place, []).append(_build_entry(entry, where, preprocessing.image_size))
    is_train = split == "train"
    up_to_crop = [*places.get("before_resize", []), *_resize_and_crop(split, places, preprocessing)]
    on_images = [*up_to_crop, *places.get("after_crop", [])]
    steps = [
        *(step for step, _ in on_images),
        *([_policy(augment.auto_augment, preprocessing)] if is_train and augment.auto_augment else []),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        *(step for step, _ in places.get("tensor", [])),
        v2.Normalize(list(preprocessing.mean), list(preprocessing.std)),
        *([v2.RandomErasing(p=augment.random_erasing)] if is_train and augment.random_erasing else []),
    ]
    fixed = [text for text in takewhile(bool, (text for _, text in on_images)) if text]
    base = min(len(fixed), _base(places, preprocessing))
    return ImageTransform(split, steps, preprocessing, fixed, base, len(up_to_crop))


def resize_and_crop(preprocessing: Preprocessing) -> list[Callable[[Any], Any]]:
    """Return the fixed steps on Pillow images: antialiased resize, then center crop."""
    return [step for step, _ in (*_resize(preprocessing), *_crop(preprocessing))]


def makes_floats(transform: ImageTransform) -> bool:
    """Return whether a transform only converts uint8 to float and normalizes."""
    return [type(step) for step in transform.steps] == [v2.ToImage, v2.ToDtype, v2.Normalize]


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
    image = images.load(index)
    result: Any = transform.begin(image, 0)
    with random_states_kept():
        for step in transform.steps:
            try:
                result = step(result)
            except Exception as error:  # whatever the transform raises: its message is quoted
                raise UserError(
                    f"augment.{transform.split}: {type(step).__name__} fails on {images.name(index)} "
                    f"({image.width} x {image.height} pixels): {error}"
                ) from error
        return transform(image)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of torch (CPU), NumPy and Python on exit."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _entries(split: str, augment: AugmentConfig) -> list[TransformConfig]:
    """Return the recipe's list of transforms for one split."""
    return {"train": augment.train, "validation": augment.validation, "test": augment.test}[split]


def _base(places: dict[str, list[NamedTransform]], preprocessing: Preprocessing) -> int:
    """Count the steps before the resize, the resize, and the fixed crop if it comes next."""
    count = len(places.get("before_resize", []))
    if places.get("resize_crop"):
        return count
    count += len(_resize(preprocessing))
    return count if places.get("before_crop") or places.get("crop") else count + len(_crop(preprocessing))


def _resize_and_crop(
    split: str, places: dict[str, list[NamedTransform]], preprocessing: Preprocessing
) -> list[NamedTransform]:
    """Return resize and crop, with any transforms between them or in their place."""
    both, crop = places.get("resize_crop", []), places.get("crop", [])
    before_crop = places.get("before_crop", [])
    if len(both) + len(crop) > 1:
        raise UserError(
            f"augment.{split}: only one transform can take the crop's place (stage = 'crop' or 'resize_crop')"
        )
    if both and before_crop:
        raise UserError(
            f"augment.{split}: stage = 'before_crop' cannot be combined with another entry's stage = 'resize_crop'"
        )
    return both or [*_resize(preprocessing), *before_crop, *(crop or _crop(preprocessing))]


def _resize(preprocessing: Preprocessing) -> list[NamedTransform]:
    """Return the fixed antialiased resize, if any."""
    if preprocessing.resize is None:
        return []
    size = preprocessing.resize
    interpolation = InterpolationMode(preprocessing.interpolation)
    if preprocessing.border is not None:
        keep = ResizeKeepRatio(size, longest=1.0, interpolation=preprocessing.interpolation)
        return [(keep, f"resize to long side {size}, {preprocessing.interpolation}")]
    step = Resize(size if isinstance(size, int) else list(size), interpolation=interpolation, antialias=True)
    shown = f"short side {size}" if isinstance(size, int) else f"{size[0]} x {size[1]}"
    return [(step, f"resize to {shown}, {preprocessing.interpolation}")]


def _crop(preprocessing: Preprocessing) -> list[NamedTransform]:
    """Return the fixed center crop, if any."""
    if not preprocessing.crop:
        return []
    if preprocessing.border is not None:
        color = list(preprocessing.border)
        crop = CenterCropOrPad(preprocessing.image_size, fill=color)
        return [(crop, f"{CENTER_CROP} {preprocessing.image_size}, padded with {color}")]
    return [(v2.CenterCrop(preprocessing.image_size), f"{CENTER_CROP} {preprocessing.image_size}")]


def _build_entry(entry: TransformConfig, where: str, image_size: int) -> NamedTransform:
    """Build one augmentation of the recipe."""
    kind = _find(entry.name, where)
    arguments = {name: _argument(name, value, where) for name, value in entry.arguments.items()}
    parameters = inspect.signature(kind).parameters
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        hint = did_you_mean(unknown[0], parameters, prefix="; ", otherwise=".")
        raise UserError(f"{where}: {entry.name} takes no {unknown[0]!r}{hint} It takes: {', '.join(parameters)}")
    if "size" in parameters and "size" not in arguments:
        arguments["size"] = (image_size, image_size)
    try:
        transform = kind(**arguments)
    except Exception as error:  # the class's own checks: TypeError, ValueError, ...
        raise UserError(f"{where}: {entry.name} cannot be created with {_spell(entry.arguments)}: {error}") from error
    if entry.apply_p < 1:
        return v2.RandomApply([transform], p=entry.apply_p), None
    shown = json.dumps(arguments, sort_keys=True, default=str)
    return transform, f"{entry.name} {shown}" if entry.name in FIXED else None


def _find(name: str, where: str) -> type[v2.Transform]:
    """Return a class of torchvision.transforms.v2 by name. Raises UserError if it is unknown or excluded."""
    if name in excluded_transforms():
        raise UserError(f"{where}: {name} cannot be used, since it {excluded_transforms()[name]}")
    known = transform_names()
    if name not in known:
        hint = did_you_mean(name, known, 3, prefix="; ")
        raise UserError(f"{where}: torchvision.transforms.v2 has no {name!r}{hint} (`toolkit transforms` lists all)")
    faster: dict[str, type[v2.Transform]] = {"Resize": Resize, "RandomResizedCrop": RandomResizedCrop}
    kind: type[v2.Transform] = faster.get(name) or getattr(v2, name)
    return kind


def transform_names() -> list[str]:
    """Return the names of the transforms that a recipe can use."""
    public = {name: value for name, value in vars(v2).items() if inspect.isclass(value) and not name.startswith("_")}
    kinds = {name for name, kind in public.items() if issubclass(kind, v2.Transform)}
    return sorted(kinds - excluded_transforms().keys())


def _argument(name: str, value: Any, where: str) -> Any:
    """Convert a TOML value to torchvision's type: names to enumeration members, arrays to tuples."""
    kinds = {"interpolation": InterpolationMode, "policy": v2.AutoAugmentPolicy}
    if name in kinds and isinstance(value, str):
        try:
            return kinds[name](value)
        except ValueError:
            allowed = ", ".join(member.value for member in kinds[name])
            raise UserError(f"{where}: {name} = {value!r} is not one of {allowed}") from None
    if isinstance(value, list):
        return tuple(_argument("", item, where) for item in value)
    return value


def _spell(arguments: dict[str, Any]) -> str:
    """Format arguments for a message."""
    return ", ".join(f"{name} = {value!r}" for name, value in arguments.items()) or "no arguments"


def _policy(text: str, preprocessing: Preprocessing) -> Callable[[Any], Any]:
    """Build timm's RandAugment, AugMix or AutoAugment policy with the fill color and shifts of timm's own training."""
    from timm.data import auto_augment
    from timm.data.transforms import str_to_pil_interp

    fill = tuple(min(255, round(255 * mean)) for mean in preprocessing.mean)
    settings: dict[str, Any] = {
        "translate_const": int(preprocessing.image_size * 0.45),
        "img_mean": fill if len(fill) > 1 else fill[0],
        "interpolation": str_to_pil_interp(preprocessing.interpolation),
    }
    parts = [part for part in text.split("-")[1:] if part not in ("tweights", "t3a", "t3aw")]
    ignored = [part for part in parts if part.startswith("t") or not re.search(r"\d", part)]
    if ignored:  # timm silently ignores a part without a number and an unknown set of operations
        raise UserError(f"augment.auto_augment = {text!r}: {ignored[0]!r} has no effect; {_POLICY_EXAMPLES}")
    try:
        if text.startswith("rand"):
            policy = auto_augment.rand_augment_transform(text, settings)
        elif text.startswith("augmix"):
            policy = auto_augment.augment_and_mix_transform(text, {**settings, "translate_pct": 0.3})
        else:
            policy = auto_augment.auto_augment_transform(text, settings)
    except Exception as error:  # timm raises AssertionError and others for what it cannot parse
        raise UserError(
            f"augment.auto_augment = {text!r} is not a policy that timm knows ({error or type(error).__name__}); "
            f"{_POLICY_EXAMPLES}"
        ) from error
    for operation in getattr(policy, "ops", None) or [each for several in policy.policy for each in several]:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    made: Callable[[Any], Any] = policy
    return made


_POLICY_EXAMPLES = "examples: rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0, 3a"


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize like timm, whose largest magnitudes keep 0 bits: a black image, but an error since Pillow 13."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
