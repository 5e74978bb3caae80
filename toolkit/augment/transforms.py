"""From a decoded image to the model's input: the fixed way of :class:`Preprocessing` with the augmentations on it.

Order: before_resize, resize, before_crop, crop, after_crop, timm's policy, float tensor in 0..1, tensor, normalisation,
random erasing. The policy and the erasing are for training images only. All of torchvision.transforms.v2 draws from
torch's default generator; timm's policies draw from Python's and numpy's.
"""

from __future__ import annotations

import copy
import difflib
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

from toolkit.augment.gpu_support import FIXED, is_random
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
from toolkit.recipe.schema import AugmentConfig, TransformConfig

TENSOR_ONLY = frozenset({"GaussianNoise"})
"""Transforms that need a tensor, and so stand after the scaling to 0..1 by default."""

CENTER_CROP = "centre crop"
"""Begins the words for the fixed crop."""


NamedTransform = tuple[Callable[[Any], Any], str | None]
"""A step, and what it does to a Pillow image in words, where these settle it: no randomness, nothing else to know."""


class ImageTransform:
    """One split's way from a decoded image to the model's input."""

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
        """What the first steps do, in words, as far as an image always comes out of them the same."""
        self.base = base
        """How many of those come up to the resize, with the fixed crop where that is next."""
        self.cropped = cropped
        """How many steps come up to the crop, or what stands in its place; they may be random."""
        self.draws_from_python = any(type(step).__module__.startswith("timm.") for step in steps)
        """Whether Python's and numpy's random states must be seeded beside torch's."""

    def __call__(self, image: Image.Image) -> Tensor:
        """Pillow image of any size -> float32 [C, image_size, image_size].

        Raises UserError where the result has another size.
        """
        tensor: Tensor = self.begin(image, len(self.steps)).as_subclass(Tensor)
        self._check_size((image.height, image.width), (tensor.shape[-2], tensor.shape[-1]))
        return tensor

    def begin(self, image: Image.Image, count: int) -> Any:
        """What the first ``count`` steps make of an image: a Pillow image, as long as these are among ``fixed``."""
        result: Any = image if self.mode is None else to_mode(image, self.mode)
        for step in self.steps[:count]:
            result = step(result)
        return result

    def pixels(self, image: Image.Image | Tensor, count: int) -> npt.NDArray[np.uint8]:
        """The same as bytes, [h, w, C], not to be written to; these steps, random or not, come before ToImage.

        image: Pillow image, or uint8 [h, w, 3]. It changes its form where a step asks for it, and no more.
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
        """What is left to do where the first ``count`` steps are done."""
        rest = copy.copy(self)
        rest.steps, rest.fixed, rest.mode = self.steps[count:], self.fixed[count:], None
        rest.base, rest.cropped = 0, max(0, self.cropped - count)
        return rest


class UInt8Transform:
    """The first steps of a transform, up to where all images are of one size, for what does the rest in batches."""

    def __init__(self, transform: ImageTransform, count: int) -> None:
        self.transform, self.count = transform, count
        self.is_all = makes_floats(transform.after(count))

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Pillow image or uint8 [h, w, 3] -> uint8 [h, w, C].

        Raises UserError where nothing will change the size any more, and it is wrong.
        """
        pixels = self.transform.pixels(image, self.count)
        if self.is_all:
            found = image.shape[:2] if isinstance(image, Tensor) else (image.height, image.width)
            self.transform._check_size((found[0], found[1]), pixels.shape[:2])
        return torch.from_numpy(pixels)


def build_transform(split: str, augment: AugmentConfig, preprocessing: Preprocessing) -> ImageTransform:
    """The transform of one split: "train", "validation" or "test".

    Raises UserError, naming the entry, for an unknown transform, one that is of no use here, arguments that it
    refuses, and more than one transform in place of the crop.
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
    """The fixed part on Pillow images: resize (antialiased), then centre crop."""
    return [step for step, _ in (*_resize(preprocessing), *_crop(preprocessing))]


def makes_floats(transform: ImageTransform) -> bool:
    """Whether all that a transform does is to turn bytes into floats and to normalise them."""
    return [type(step) for step in transform.steps] == [v2.ToImage, v2.ToDtype, v2.Normalize]


def is_deterministic(split: str, augment: AugmentConfig) -> bool:
    """Whether an image of this split gives the same input every time, as far as is known.

    False in case of doubt: features of frozen layers are computed once only where this holds.
    """
    is_mixed = split == "train" and bool(augment.mixup or augment.cutmix)
    return not is_mixed and not is_random(split, augment)


def try_transform(transform: ImageTransform, images: ImageSource, index: int) -> Tensor:
    """Apply the transform to one image, with any failure told as the recipe's fault: UserError naming the step.

    Meant for one image of each split before training; random states are left as they were. Raises BadImage where the
    image itself is bad.
    """
    image = images.load(index)
    result: Any = transform.begin(image, 0)
    with random_states_kept():
        for step in transform.steps:
            try:
                result = step(result)
            except Exception as error:  # a transform's own words are the best there are
                raise UserError(
                    f"augment.{transform.split}: {type(step).__name__} fails on {images.name(index)} "
                    f"({image.width} x {image.height} pixels): {error}"
                ) from error
        return transform(image)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Give the random states of torch (CPU), numpy and Python back as they were."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _entries(split: str, augment: AugmentConfig) -> list[TransformConfig]:
    """The recipe's list for one split."""
    return {"train": augment.train, "validation": augment.validation, "test": augment.test}[split]


def _base(places: dict[str, list[NamedTransform]], preprocessing: Preprocessing) -> int:
    """Steps before the resize, the resize, and the fixed crop where that comes next."""
    count = len(places.get("before_resize", []))
    if places.get("resize_crop"):
        return count
    count += len(_resize(preprocessing))
    return count if places.get("before_crop") or places.get("crop") else count + len(_crop(preprocessing))


def _resize_and_crop(
    split: str, places: dict[str, list[NamedTransform]], preprocessing: Preprocessing
) -> list[NamedTransform]:
    """Resize and crop, with what stands between them or in their place."""
    both, crop = places.get("resize_crop", []), places.get("crop", [])
    before_crop = places.get("before_crop", [])
    if len(both) + len(crop) > 1:
        raise UserError(
            f"augment.{split}: only one transform can take the crop's place (stage = 'crop' or 'resize_crop')"
        )
    if both and before_crop:
        raise UserError(
            f"augment.{split}: stage = 'before_crop' has no place where another entry is stage = 'resize_crop'"
        )
    return both or [*_resize(preprocessing), *before_crop, *(crop or _crop(preprocessing))]


def _resize(preprocessing: Preprocessing) -> list[NamedTransform]:
    """Resize, antialiased."""
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
    """The fixed center crop."""
    if not preprocessing.crop:
        return []
    if preprocessing.border is not None:
        color = list(preprocessing.border)
        crop = CenterCropOrPad(preprocessing.image_size, fill=color)
        return [(crop, f"{CENTER_CROP} {preprocessing.image_size}, padded with {color}")]
    return [(v2.CenterCrop(preprocessing.image_size), f"{CENTER_CROP} {preprocessing.image_size}")]


def _build_entry(entry: TransformConfig, where: str, image_size: int) -> NamedTransform:
    """One augmentation of the recipe."""
    kind = _find(entry.name, where)
    arguments = {name: _argument(name, value, where) for name, value in entry.arguments.items()}
    parameters = inspect.signature(kind).parameters
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        near = difflib.get_close_matches(unknown[0], parameters, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{where}: {entry.name} takes no {unknown[0]!r}; {hint}It takes: {', '.join(parameters)}")
    if "size" in parameters and "size" not in arguments:
        arguments["size"] = (image_size, image_size)
    try:
        transform = kind(**arguments)
    except Exception as error:  # the class's own checks: TypeError, ValueError, ...
        raise UserError(f"{where}: {entry.name} cannot be made of {_spell(entry.arguments)}: {error}") from error
    if entry.apply_p < 1:
        return v2.RandomApply([transform], p=entry.apply_p), None
    shown = json.dumps(arguments, sort_keys=True, default=str)
    return transform, f"{entry.name} {shown}" if entry.name in FIXED else None


def _find(name: str, where: str) -> type[v2.Transform]:
    """A class of torchvision.transforms.v2 by name."""
    if name in excluded_transforms():
        raise UserError(f"{where}: {name} cannot be used, since it {excluded_transforms()[name]}")
    known = transform_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{where}: torchvision.transforms.v2 has no {name!r}{hint} (`toolkit transforms` lists all)")
    faster: dict[str, type[v2.Transform]] = {"Resize": Resize, "RandomResizedCrop": RandomResizedCrop}
    kind: type[v2.Transform] = faster.get(name) or getattr(v2, name)
    return kind


def transform_names() -> list[str]:
    """Names of the transforms that a recipe can use."""
    public = {name: value for name, value in vars(v2).items() if inspect.isclass(value) and not name.startswith("_")}
    kinds = {name for name, kind in public.items() if issubclass(kind, v2.Transform)}
    return sorted(kinds - excluded_transforms().keys())


def _argument(name: str, value: Any, where: str) -> Any:
    """A TOML value as torchvision takes it: enumerations by their name, tuples for arrays."""
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
    """Arguments for a message."""
    return ", ".join(f"{name} = {value!r}" for name, value in arguments.items()) or "no arguments"


def _policy(text: str, preprocessing: Preprocessing) -> Callable[[Any], Any]:
    """timm's RandAugment, AugMix or AutoAugment policy, with the fill colour and shifts of timm's own training."""
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
    if ignored:  # timm passes over a part without a number, and an unknown set of operations, in silence
        raise UserError(f"augment.auto_augment = {text!r}: {ignored[0]!r} says nothing; {_POLICY_EXAMPLES}")
    try:
        if text.startswith("rand"):
            policy = auto_augment.rand_augment_transform(text, settings)
        elif text.startswith("augmix"):
            policy = auto_augment.augment_and_mix_transform(text, {**settings, "translate_pct": 0.3})
        else:
            policy = auto_augment.auto_augment_transform(text, settings)
    except Exception as error:  # timm asserts, or fails on what it cannot parse
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
    """timm's posterize, which asks for 0 bits at the largest magnitudes: black, but an error since Pillow 13."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
