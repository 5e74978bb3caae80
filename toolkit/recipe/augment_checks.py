"""Checks of [augment] across keys: transforms in batches, repeated augmentation, alternating flip, mixing."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.recipe.diagnostics import Issue, error, warning
from toolkit.recipe.gpu_support import is_random, unsupported_on_gpu
from toolkit.recipe.schema import Recipe


def augment(recipe: Recipe) -> Iterator[Issue]:
    """Check ``repeats``, and whether ``run_on`` is possible for the transforms; warn about keys without effect."""
    table = recipe.augment
    mixing = ("augment.mixup", "augment.cutmix")
    if table.mixup_prob != 1 and not (table.mixup or table.cutmix):
        yield warning("augment.mixup_prob", "has no effect without mixup or cutmix", *mixing, at="key")
    if table.mixup_switch_prob != 0.5 and not (table.mixup and table.cutmix):
        text = "has no effect unless both mixup and cutmix are on"
        yield warning("augment.mixup_switch_prob", text, *mixing, at="key")
    if table.repeats > 1 and recipe.data.fixed_views is not None:
        text = f"all {table.repeats} versions of an image in a batch would be the same fixed view"
        yield error("augment.repeats", text, "data.fixed_views", hint="remove one of the two")
    elif table.repeats > 1 and not is_random("train", table):
        text = f"repeats identical images {table.repeats} times, because training images are not augmented randomly"
        yield warning("augment.repeats", text, "augment.train", at="key")
    if table.alternating_flip:
        yield from _alternating_flip(recipe)
    for split in ("train", "validation", "test") if table.run_on == "device" else ():
        obstacle = unsupported_on_gpu(split, table)
        if obstacle is not None:
            hint = 'set "auto" or "workers", or remove it'
            yield error("augment.run_on", f'"device" does not support {obstacle}', f"augment.{split}", hint=hint)


def _alternating_flip(recipe: Recipe) -> Iterator[Issue]:
    """Check that each image occurs once per epoch, and that training images are augmented in batches."""
    table, key = recipe.augment, "augment.alternating_flip"
    obstacle = unsupported_on_gpu("train", table, after_crop=True)
    if table.run_on == "workers":
        yield error(key, 'is applied to whole batches: remove augment.run_on = "workers"', "augment.run_on")
    elif obstacle is not None:
        yield error(key, f"is applied to whole batches, which do not support {obstacle}", "augment.train")
    if recipe.train.sampling == "balanced" or table.repeats > 1:
        other = "augment.repeats" if table.repeats > 1 else "train.sampling"
        yield error(key, f"needs each image exactly once per epoch, which {other} changes", other)
    if (recipe.data.fixed_views or 2) % 2:
        text = f"needs an even number of views, not {recipe.data.fixed_views}, because it flips every second one"
        yield error(key, text, "data.fixed_views")
    for index, entry in enumerate(table.train):
        if entry.name == "RandomHorizontalFlip":
            text = "makes augment.alternating_flip a random flip"
            yield warning(("augment", "train", index), text, key, hint="remove one of the two")
