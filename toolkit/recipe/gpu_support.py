"""Which augmentations can be applied to whole batches on the training device (:mod:`toolkit.augment.gpu`).

This depends on the recipe alone and needs no torch, so an unsupported recipe is rejected early.
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
"""Transforms that can be applied to a batch, if :func:`unsupported_on_gpu` accepts their arguments."""

FIXED = frozenset({"CenterCrop", "Grayscale", "Identity", "Pad", "RGB", "Resize"})
"""Transforms known to be deterministic: those before the resize are applied once per image. Others may be random."""


def is_random(split: str, augment: AugmentConfig) -> bool:
    """Return whether the transform of this split may be random, apart from mixup and CutMix."""
    if split == "train" and (augment.auto_augment or augment.random_erasing or augment.alternating_flip):
        return True
    entries: Sequence[TransformConfig] = getattr(augment, split)
    return any(map(is_random_transform, entries))


def is_random_transform(entry: TransformConfig) -> bool:
    """Return whether a transform of a recipe may give different results for the same image."""
    return entry.name not in FIXED or entry.apply_p < 1


UP_TO_CROP = frozenset({"before_resize", "before_crop", "crop", "resize_crop"})
"""Augmentation stages up to the crop."""


def unsupported_on_gpu(split: str, augment: AugmentConfig, *, after_crop: bool = False) -> str | None:
    """Return why the augmentations of a split ("train", "validation", "test") do not work on batches; None if they do.

    ``after_crop``: check only those after the crop.
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
    """Return why a transform cannot be applied to batches, as text that follows its name; None if it can."""
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
