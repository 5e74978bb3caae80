"""Checks of combinations of keys that concern the model's input: its size, channels and normalization."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

from toolkit.data.dataset_info import info_of
from toolkit.errors import UserError
from toolkit.formatting import plural
from toolkit.recipe.catalog import weights_input
from toolkit.recipe.diagnostics import Issue, error, warning
from toolkit.recipe.image_size import Size, as_size, convnet_output_size, input_size, size_text
from toolkit.recipe.schema import NORMALIZATIONS, ModelConfig, NormalizeValues, Recipe
from toolkit.recipe.toml_writer import toml_value

COLOR_ONLY = frozenset(
    {"AugMix", "AutoAugment", "ColorJitter", "Grayscale", "JPEG", "RandAugment", "RandomAdjustSharpness",
     "RandomAutocontrast", "RandomGrayscale", "RandomPhotometricDistort", "TrivialAugmentWide"}
)  # fmt: skip
"""Transforms that are possible only for images with 1 or 3 channels."""


def image_size(recipe: Recipe) -> Iterator[Issue]:
    """Check that the size of the model's input is known, and that the resize produces it if there is no crop."""
    data, table, size = recipe.data, recipe.model, input_size(recipe)
    has_expected_size = table.is_published and table.weights != "none"
    if size is None and not has_expected_size:
        text = f'must be given, because the images of "{data.dataset}" differ in size'
        related = ("data.dataset", "model.name", "model.weights")
        yield error("data.image_size", text, *related, hint="for example image_size = 224", at="table")
    if size is not None and size[0] != size[1] and table.source == "torchvision" and table.name.startswith("vit_"):
        text = f"torchvision's {table.name} accepts only square images, not {size_text(size)} pixels"
        yield error("data.image_size", text, "model.name", hint="use a square size, or a ViT from timm")
    if data.resize == "letterbox" and data.crop == "none":
        text = '"letterbox" pads images to image_size instead of cropping them, so crop = "none" contradicts it'
        yield error("data.resize", text, "data.crop", hint='set crop = "center"')
    if data.fill != "mean" and data.resize != "letterbox":
        yield warning("data.fill", 'has no effect without resize = "letterbox"', "data.resize", at="key")
    if isinstance(data.fill, list) and len(data.fill) != channels_of(recipe):
        text = f"{len(data.fill)} values for {plural(channels_of(recipe), 'channel')}"
        yield error("data.fill", text, "data.channels", "data.dataset", hint="give one value per channel")
    yield from _other_sizes(recipe, size)
    # A split's transforms may determine its image size.
    is_plain = not (recipe.augment.train and recipe.augment.validation and recipe.augment.test)
    if data.crop != "none" or data.resize is None or isinstance(data.resize, str) or size is None or not is_plain:
        return
    resized = as_size(data.resize)
    if resized != size:
        shown = size_text(resized) if isinstance(data.resize, list) else f"a short side of {data.resize}"
        text = f'with crop = "none" images would have {shown} pixels, but the model expects {size_text(size)}'
        yield error("data.resize", text, "data.crop", "data.image_size", hint='set crop = "center"')


def _other_sizes(recipe: Recipe, size: Size | None) -> Iterator[Issue]:
    """Check the sizes of evaluation and of the training stages; ``size`` is the model's input size."""
    data, table = recipe.data, recipe.model
    stages = [as_size(stage) for stage in data.progressive_sizes or ()]
    if stages and size is not None and stages[-1] != size:
        text = f"the last size is {size_text(stages[-1])}, but it must be data.image_size, which is {size_text(size)}"
        yield error("data.progressive_sizes", text, "data.image_size", "model.weights")
    if recipe.train.epochs is not None and len(stages) > ceil(recipe.train.epochs):
        text = f"{len(stages)} sizes need at least {len(stages)} epochs"
        yield error("data.progressive_sizes", text, "train.epochs")
    others = {"data.progressive_sizes": stages}
    others["data.eval_image_size"] = [as_size(data.eval_image_size)] if data.eval_image_size else []
    for key, sizes in others.items():
        if size is not None and any(_has_other_shape(table, size, other) for other in sizes):
            name = "the ConvNet" if table.source == "toolkit" else f"torchvision's {table.name}"
            text = f"{name} accepts only inputs of {size_text(size)} pixels"
            yield error(key, text, "data.image_size", "model.name", hint="remove it, or choose another model")


def _has_other_shape(table: ModelConfig, size: Size, other: Size) -> bool:
    """Return whether a model built for inputs of ``size`` is known not to accept inputs of size ``other``."""
    if table.source == "torchvision":
        return size != other and table.name.startswith(("vit_", "maxvit_"))
    if table.source != "toolkit" or table.convnet is None:
        return False
    try:
        return convnet_output_size(table.convnet, size) != convnet_output_size(table.convnet, other)
    except UserError:
        return True


def channels_of(recipe: Recipe) -> int:
    """Return the model's number of input channels: as set, else 3 with pretrained weights, else the data set's."""
    if recipe.data.channels:
        return recipe.data.channels
    return info_of(recipe.data.dataset, recipe.data.name).channels if recipe.model.weights == "none" else 3


def normalization(recipe: Recipe) -> Iterator[Issue]:
    """Check that there is one value per channel; warn if the normalization is not that of the pretrained weights."""
    table, choice, channels = recipe.model, recipe.data.normalize, channels_of(recipe)
    if isinstance(choice, NormalizeValues) and len(choice.mean) != channels:
        text = f"{len(choice.mean)} values for {channels} channel{'s' if channels > 1 else ''}"
        related = ("data.channels", "data.dataset", "model.weights")
        yield error("data.normalize", text, *related, hint="give one value per channel")
    if choice == "auto" or not table.is_published or channels != 3:
        return
    expected = weights_input(table.source, table.name, table.weights)
    if expected is None:
        return
    if choice == "dataset":
        given = "those of the training images"
    else:
        mean, std = (choice.mean, choice.std) if isinstance(choice, NormalizeValues) else NORMALIZATIONS[choice]
        if _close(mean, expected.mean) and _close(std, expected.std):
            return
        given = f"mean {toml_value(mean)} and std {toml_value(std)}"
    text = (
        f"the weights {table.weights} of {table.name} expect mean {toml_value(expected.mean)} and std "
        f"{toml_value(expected.std)}; the recipe uses {given}"
    )
    related = ("model.name", "model.source", "model.weights")
    yield warning("data.normalize", text, *related, hint='normalize = "auto" uses the values of the weights')


def _close(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-3 for a, b in zip(one, other, strict=True))


def channels(recipe: Recipe) -> Iterator[Issue]:
    """Check that the data set can have this number of channels, and that the augmentations support it."""
    table, info = recipe.data, info_of(recipe.data.dataset, recipe.data.name)
    if table.channels in (None, 1, 3):
        return
    if info.size is not None:
        text = f'the images of "{table.dataset}" have {plural(info.channels, "channel")}, not {table.channels}'
        yield error("data.channels", text, "data.dataset", hint="set 1 or 3")
    for split in ("train", "validation", "test"):
        for number, entry in enumerate(getattr(recipe.augment, split)):
            if entry.name in COLOR_ONLY:
                text = f"{entry.name} needs images with 1 or 3 channels, not {table.channels}"
                yield error(("augment", split, number), text, "data.channels")
    if recipe.augment.auto_augment:
        text = f"timm's policies need images with 1 or 3 channels, not {table.channels}"
        yield error("augment.auto_augment", text, "data.channels")
