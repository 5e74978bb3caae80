"""How an image becomes the model's input: resolved once, the same in training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.earlier_versions import DEFAULTS
from toolkit.recipe.schema import DataConfig, NormalizeValues

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SMALL_IMAGE = 64
"""Up to this size (pixels) images are taken whole by default; above it the usual resize-then-crop of ImageNet holds."""


@dataclass(frozen=True)
class PretrainedInput:
    """What pretrained weights were trained with, as their publisher states it."""

    image_size: int
    """Height and width of the input, pixels; the width where it is not square."""
    resize: int
    """Side before the center crop, pixels: which side, says ``crop_mode``."""
    interpolation: str
    """nearest, bilinear or bicubic."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"
    """center: the short side becomes ``resize``. squash: both sides do, whatever the aspect. border: the long side
    does, and the image is padded to the input's size with the mean color."""
    height: int | None = None
    """Height of an input that is not square, pixels."""


@dataclass(frozen=True)
class Preprocessing:
    """The deterministic part of the way from a decoded image to the model's input."""

    channels: int
    image_size: int
    """Height and width of the input, pixels."""
    resize: int | tuple[int, int] | None
    """Short side (long side with ``border``), or (height, width), before the crop; None: no resize."""
    crop: bool
    """Centre crop to image_size after the resize."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    exif: str = "apply"
    """apply or ignore: whether image files are turned upright by the orientation that they state."""
    value_range: tuple[float, float] | None = None
    """Values of black and white in files with more than 8 bits per sample; None: training saw no such file."""
    border: tuple[int, ...] | None = None
    """Color, 0..255 per channel, that pads images whose long side is ``resize``; None: it is their short side."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, read back by :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Inverse of :meth:`to_dict` (JSON turns tuples into lists)."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in {**DEFAULTS["data",], **values}.items()
        }
        return cls(**fields)


def resolve_channels(data: DataConfig, *, pretrained: bool) -> DataConfig:
    """The table with colour input where nothing is said of it and pretrained weights are used, which expect colour."""
    return data.model_copy(update={"channels": 3}) if data.channels is None and pretrained else data


def as_trained(data: DataConfig, preprocessing: Preprocessing) -> DataConfig:
    """The table with the way in which a trained model's image files were read."""
    found = preprocessing.value_range
    value_range = "auto" if found is None else list(found)
    return data.model_copy(update={"exif": preprocessing.exif, "value_range": value_range})


def resolve_preprocessing(
    data: DataConfig,
    weights: PretrainedInput | None,
    native_size: int | None,
    native_channels: int,
    measure: Callable[[Preprocessing], tuple[tuple[float, ...], tuple[float, ...]]],
) -> Preprocessing:
    """Settle every value: the recipe's word first, then what the weights expect, then the data set's own.

    ``measure`` gives the training images' mean and standard deviation per channel (pixels in 0..1) under a
    preprocessing without normalisation; it is called only for ``normalize = "dataset"``.
    """
    channels = data.channels or (3 if weights else native_channels)
    size = data.image_size or (weights.image_size if weights else native_size)
    if size is None:
        raise UserError("data.image_size must be given: neither the weights nor the data set say one")
    if weights and weights.height and not data.image_size:
        raise UserError(
            f"data.image_size must be given: the weights were trained on images of {weights.height}x"
            f"{weights.image_size} pixels (height x width), but inputs here are square; images are squashed to them"
        )
    resize: int | tuple[int, int] | None
    border: tuple[int, ...] | None = None
    if data.resize == "none":
        resize = None
    elif isinstance(data.resize, list):
        resize = (data.resize[0], data.resize[1])
    elif data.resize is not None:
        resize = data.resize
    elif weights:
        side = round(weights.resize * size / weights.image_size)
        resize = (side, side) if weights.crop_mode == "squash" else side
        if weights.crop_mode == "border":
            border = tuple(round(255 * value) for value in _as_channels(weights.mean, channels))
    else:
        resize = size if size <= SMALL_IMAGE else round(size / 0.875)
    interpolation = data.interpolation or (weights.interpolation if weights else "bilinear")
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    crop = data.crop == "center"
    plain = Preprocessing(channels, size, resize, crop, interpolation, zeros, ones, data.exif, data.known_range, border)
    mean, std = _normalization(data, weights, plain, measure)
    for values in (mean, std):
        if len(values) != channels:
            raise UserError(f"data.normalize: {len(values)} values for {channels} channels; give one value a channel")
    return replace(plain, mean=mean, std=std)


def _normalization(
    data: DataConfig,
    weights: PretrainedInput | None,
    plain: Preprocessing,
    measure: Callable[[Preprocessing], tuple[tuple[float, ...], tuple[float, ...]]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, by ``data.normalize``."""
    choice, channels = data.normalize, plain.channels
    if isinstance(choice, NormalizeValues):
        return tuple(choice.mean), tuple(choice.std)
    if choice == "auto" and weights:
        return _as_channels(weights.mean, channels), _as_channels(weights.std, channels)
    if choice in ("auto", "half"):
        return (0.5,) * channels, (0.5,) * channels
    if choice == "imagenet":
        return _as_channels(IMAGENET_MEAN, channels), _as_channels(IMAGENET_STD, channels)
    if choice == "none":
        return (0.0,) * channels, (1.0,) * channels
    return measure(plain)


def _as_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Colour values for a greyscale input: their average."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels
