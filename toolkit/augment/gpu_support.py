"""Which augmentations can be made for a whole batch at once, on the training device (:mod:`toolkit.augment.gpu`).

Decided from the recipe's words alone, without torch, so that a recipe which asks for the impossible is refused early.
"""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.recipe.schema import AugmentConfig, TransformConfig

GEOMETRIC = frozenset(
    {"CenterCrop", "Pad", "RandomAffine", "RandomCrop", "RandomHorizontalFlip", "RandomPerspective", "RandomRotation",
     "RandomVerticalFlip"}
)  # fmt: skip
COLOR = frozenset({"ColorJitter", "Grayscale", "RandomGrayscale"})
BATCHED = GEOMETRIC | COLOR | {"GaussianBlur", "Identity", "RandomErasing"}
"""The transforms that can be made for a batch, each with the arguments that :func:`why_not_batched` lets pass."""

FIXED = frozenset({"CenterCrop", "Grayscale", "Identity", "Pad", "RGB", "Resize"})
"""Transforms known to draw no random numbers: before the resize they are done once, with it. All others count as
random."""


def is_random(split: str, augment: AugmentConfig) -> bool:
    """Whether an image of this split may look different from time to time, mixing apart."""
    if split == "train" and (augment.auto_augment or augment.random_erasing):
        return True
    entries: Sequence[TransformConfig] = getattr(augment, split)
    return any(entry.name not in FIXED or entry.apply_p < 1 for entry in entries)


UP_TO_CROP = frozenset({"before_resize", "before_crop", "crop", "resize_crop"})
"""Places from which a transform can change how large the crop's images are, or what is in them."""


def unsupported_on_gpu(split: str, augment: AugmentConfig, *, after_crop: bool = False) -> str | None:
    """What keeps a split's augmentations ("train", "validation", "test") from being made in batches; None: nothing.

    after_crop: looks only at those that stand after the crop.
    """
    entries: Sequence[TransformConfig] = getattr(augment, split)
    for index, entry in enumerate(entries):
        reason = None if after_crop and entry.stage in UP_TO_CROP else _obstacle(entry)
        if reason is not None:
            return f"augment.{split}[{index}]: {entry.name}{reason}"
    if split == "train" and augment.auto_augment is not None:
        return f"augment.auto_augment = {augment.auto_augment!r}"
    return None


def _obstacle(entry: TransformConfig) -> str | None:
    """Why one transform is not made in batches, in words that follow its name; None where it is."""
    given = entry.arguments
    if entry.stage == "before_resize":
        return None if entry.name in FIXED and entry.apply_p == 1 else ' stage = "before_resize"'
    if entry.name not in BATCHED:
        return ""
    if entry.stage == "resize_crop":
        return ' stage = "resize_crop"'
    if entry.stage == "tensor" and entry.name in COLOR:
        return ' stage = "tensor"'
    if entry.name in FIXED and entry.apply_p < 1:
        return " with apply_p"  # it may leave images of different sizes in a batch
    if given.get("expand"):
        return " with expand"
    if given.get("interpolation", "nearest") not in ("nearest", "bilinear"):
        return f" with interpolation = {given['interpolation']!r}"
    if given.get("value") == "random":
        return ' with value = "random"'
    return None
