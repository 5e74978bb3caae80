"""Single steps from a decoded image to the model's input, and the augmentations that a recipe names.

A :class:`Step` is a name with arguments. Both forms of an augmentation are built from it: the form for single images
here, the form for batches in :mod:`toolkit.augment.gpu_pipeline`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

from toolkit import plugins
from toolkit.augment.resize import RandomResizedCrop, Resize
from toolkit.data.preprocessing import Preprocessing
from toolkit.errors import UserError
from toolkit.recipe.catalog import excluded_transforms
from toolkit.recipe.gpu_support import FIXED
from toolkit.recipe.image_size import Size
from toolkit.recipe.schema import TransformConfig
from toolkit.similar_names import did_you_mean

FASTER: dict[str, type[v2.Transform]] = {"Resize": Resize, "RandomResizedCrop": RandomResizedCrop}
ENUMERATIONS = {"interpolation": InterpolationMode, "policy": v2.AutoAugmentPolicy}


class AlternatingFlip(v2.RandomHorizontalFlip):  # type: ignore[misc]
    """Placeholder of the alternating flip in transforms of single images, where the epoch is unknown: flips at random.

    Training applies it to batches (:class:`toolkit.augment.gpu_crop_flip.AlternatingFlip`).
    """


@dataclass(frozen=True, repr=False)
class Step:
    """One step from an image to the model's input. Calling it applies it to one image."""

    name: str
    """Name of a class in torchvision.transforms.v2, ResizeKeepRatio, AlternatingFlip, timm's CenterCropOrPad or
    auto_augment, or "plugin:" and the name of a plugin."""
    arguments: dict[str, Any]
    """Arguments of that class with torchvision's types, including the defaults."""
    p: float
    """Probability of applying the step; the class's own argument ``p`` applies in addition."""
    on_image: Callable[[Any], Any]
    """Applies the step to one image."""
    fixed: str | None = None
    """Text that fully determines the effect on a Pillow image; None if the step may be random."""

    def __call__(self, image: Any) -> Any:
        """Apply the step to one image (Pillow or tensor)."""
        return self.on_image(image)

    def __repr__(self) -> str:
        """Return the representation of the callable that transforms one image."""
        return repr(self.on_image)

    @property
    def probability(self) -> float:
        """Probability that the step changes an image."""
        return float(self.p * self.arguments.get("p", 1.0))


def torchvision_step(name: str, *, apply_p: float = 1.0, fixed: str | None = None, **arguments: Any) -> Step:
    """Build a step from a class in torchvision.transforms.v2. Raises whatever the class raises for bad arguments."""
    kind = FASTER.get(name) or getattr(v2, name)
    on_image = kind(**arguments)
    complete = inspect.signature(kind).bind(**arguments)
    complete.apply_defaults()
    if apply_p < 1:
        on_image = v2.RandomApply([on_image], p=apply_p)
    return Step(name, complete.arguments, apply_p, on_image, fixed)


def recipe_step(entry: TransformConfig, where: str, image_size: Size) -> Step:
    """Build one augmentation of the recipe; ``where`` names it in messages.

    Raises UserError for an unknown or excluded transform, and for arguments that it does not accept.
    """
    if entry.name.startswith(plugins.PREFIX):
        return _plugin_step(entry, where, image_size)
    _check_name(entry.name, where)
    arguments = {name: _argument(name, value, where) for name, value in entry.arguments.items()}
    parameters = inspect.signature(getattr(v2, entry.name)).parameters
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        hint = did_you_mean(unknown[0], parameters, prefix="; ", otherwise=".")
        raise UserError(f"{where}: {entry.name} takes no {unknown[0]!r}{hint} It takes: {', '.join(parameters)}")
    if "size" in parameters and "size" not in arguments:
        arguments["size"] = image_size
    is_fixed = entry.name in FIXED and entry.apply_p == 1
    fixed = f"{entry.name} {json.dumps(arguments, sort_keys=True, default=str)}" if is_fixed else None
    try:
        return torchvision_step(entry.name, apply_p=entry.apply_p, fixed=fixed, **arguments)
    except Exception as error:  # the class's own checks: TypeError, ValueError, ...
        given = ", ".join(f"{name} = {value!r}" for name, value in entry.arguments.items()) or "no arguments"
        raise UserError(f"{where}: {entry.name} cannot be created with {given}: {error}") from error


def _plugin_step(entry: TransformConfig, where: str, image_size: Size) -> Step:
    on_image = plugins.find("transform", entry.name.removeprefix(plugins.PREFIX)).build(
        entry.arguments, image_size=image_size
    )
    if not callable(on_image):
        raise UserError(
            f"{where}: {entry.name} gives a {type(on_image).__name__}, which cannot be called with an image"
        )
    if entry.apply_p < 1:
        on_image = v2.RandomApply([on_image], p=entry.apply_p)
    return Step(entry.name, entry.arguments, entry.apply_p, on_image)


def _check_name(name: str, where: str) -> None:
    """Raise UserError unless a recipe can use this class of torchvision.transforms.v2."""
    if name in excluded_transforms():
        raise UserError(f"{where}: {name} cannot be used, since it {excluded_transforms()[name]}")
    known = transform_names()
    if name not in known:
        hint = did_you_mean(name, known, 3, prefix="; ")
        raise UserError(f"{where}: torchvision.transforms.v2 has no {name!r}{hint} (`toolkit transforms` lists all)")


def transform_names() -> list[str]:
    """Return the names of the transforms that a recipe can use."""
    public = {name: value for name, value in vars(v2).items() if inspect.isclass(value) and not name.startswith("_")}
    kinds = {name for name, kind in public.items() if issubclass(kind, v2.Transform)}
    return sorted(kinds - excluded_transforms().keys())


def _argument(name: str, value: Any, where: str) -> Any:
    """Convert a TOML value to torchvision's type: names to enumeration members, arrays to tuples."""
    if name in ENUMERATIONS and isinstance(value, str):
        try:
            return ENUMERATIONS[name](value)
        except ValueError:
            allowed = ", ".join(member.value for member in ENUMERATIONS[name])
            raise UserError(f"{where}: {name} = {value!r} is not one of {allowed}") from None
    if isinstance(value, list):
        return tuple(_argument("", item, where) for item in value)
    return value


_POLICY_EXAMPLES = "examples: rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0, 3a"


def policy_step(text: str, preprocessing: Preprocessing) -> Step:
    """Build timm's RandAugment, AugMix or AutoAugment policy, with the fill color and translations that timm uses.

    Raises UserError for a policy that timm does not know.
    """
    from timm.data import auto_augment
    from timm.data.transforms import str_to_pil_interp

    fill = tuple(min(255, round(255 * mean)) for mean in preprocessing.mean)
    settings: dict[str, Any] = {
        "translate_const": int(min(preprocessing.image_size) * 0.45),
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
    return Step("auto_augment", {"policy": text}, 1.0, policy)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize as timm does; 0 bits, timm's largest magnitude, give a black image (Pillow 13 rejects 0 bits)."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
