"""Deterministic preprocessing from image to model input, the same in training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from toolkit.errors import UserError
from toolkit.recipe.catalog import PretrainedInput
from toolkit.recipe.earlier_versions import DEFAULTS
from toolkit.recipe.image_size import Size, as_size, as_value
from toolkit.recipe.schema import NORMALIZATIONS, DataConfig, NormalizeValues

SMALL_IMAGE = 64
"""Inputs up to this size (pixels) are resized without a crop margin by default, larger ones with ImageNet's margin."""


@dataclass(frozen=True)
class Preprocessing:
    """The deterministic preprocessing steps from a decoded image to the model's input."""

    channels: int
    image_size: Size
    """Height and width of the input in pixels."""
    resize: int | tuple[int, int] | None
    """Size of the short side, or (height, width), before the crop; None: no resize. With ``border``: size of the long
    side, or (height, width) of the box that images are fitted into."""
    crop: bool
    """Whether a center crop of ``image_size`` follows the resize."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    exif: str = "apply"
    """apply or ignore: whether images are turned upright by their EXIF orientation."""
    value_range: tuple[float, float] | None = None
    """Values of black and white in files with more than 8 bits per sample; None: the training data had no such file."""
    border: tuple[int, ...] | None = None
    """Padding color, 0..255 per channel, if images are fitted and padded; None if they are resized to be cropped."""
    page: int | Literal["channels"] = 0
    """Page of files with several pages, from 0, or "channels" if the pages are the channels."""
    cover: bool = False
    """Whether images keep their aspect ratio and cover a ``resize`` of (height, width), or are stretched to it."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dict for :meth:`from_dict`; ``image_size`` is one number if it is square."""
        return {**asdict(self), "image_size": as_value(self.image_size)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Build from the result of :meth:`to_dict` (JSON turns tuples into lists)."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in {**DEFAULTS["data",], **values}.items()
        }
        return cls(**{**fields, "image_size": as_size(fields["image_size"])})


def resolve_channels(data: DataConfig, *, pretrained: bool) -> DataConfig:
    """Set ``channels`` to 3 if it is not given and pretrained weights are used, which expect color."""
    return data.model_copy(update={"channels": 3}) if data.channels is None and pretrained else data


def as_trained(data: DataConfig, preprocessing: Preprocessing) -> DataConfig:
    """Return ``data`` with the ``exif``, ``value_range`` and ``page`` settings that a model was trained with."""
    found = preprocessing.value_range
    value_range = "auto" if found is None else list(found)
    return data.model_copy(update={"exif": preprocessing.exif, "value_range": value_range, "page": preprocessing.page})


def resolve_preprocessing(
    data: DataConfig,
    weights: PretrainedInput | None,
    native_size: int | None,
    native_channels: int,
    measure: Callable[[Preprocessing], tuple[tuple[float, ...], tuple[float, ...]]],
) -> Preprocessing:
    """Take each setting from the recipe, else from the weights, else from the data set.

    ``measure`` returns the training images' mean and standard deviation per channel (pixels in 0..1) for a
    preprocessing without normalization; it is called only for ``normalize = "dataset"``, and ignores the background of
    letterboxed images. Raises UserError if no image size is known, or if ``normalize`` or ``fill`` does not have one
    value per channel.
    """
    channels = data.channels or (3 if weights else native_channels)
    wanted = data.image_size or (weights.size if weights else native_size)
    if wanted is None:
        raise UserError("data.image_size must be given: neither the weights nor the data set define one")
    size = as_size(wanted)
    resize, cover = _resize(data, weights, size)
    border: tuple[int, ...] | None = None
    if data.resize == "letterbox":
        border = (0,) * channels
    elif data.resize is None and weights and weights.crop_mode == "border":
        border = tuple(round(255 * value) for value in _as_channels(weights.mean, channels))
    interpolation = data.interpolation or (weights.interpolation if weights else "bilinear")
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    crop = data.crop == "center"
    plain = Preprocessing(
        channels, size, resize, crop, interpolation, zeros, ones, data.exif, data.known_range, border, data.page, cover
    )
    is_letterboxed = data.resize == "letterbox"
    mean, std = _normalization(data, weights, replace(plain, crop=False) if is_letterboxed else plain, measure)
    if is_letterboxed:
        border = _fill_color(data.fill, mean)
    for key, values in (("normalize", mean), ("normalize", std), ("fill", border)):
        if values is not None and len(values) != channels:
            raise UserError(f"data.{key} has {len(values)} values for {channels} channels; give one value per channel")
    return replace(plain, mean=mean, std=std, border=border)


def _fill_color(fill: str | list[int], mean: tuple[float, ...]) -> tuple[int, ...]:
    """Return the background color of letterboxed images, 0..255 per channel."""
    if isinstance(fill, list):
        return tuple(fill)
    return tuple(0 if fill == "black" else min(255, max(0, round(255 * value))) for value in mean)


def scaled_size(image: Size, box: Size, *, fit: bool) -> Size:
    """Return the size of an image that is scaled to fit into a box (or to cover it), keeping its aspect ratio."""
    ratio = (max if fit else min)(side / wanted for side, wanted in zip(image, box, strict=True))
    return max(1, round(image[0] / ratio)), max(1, round(image[1] / ratio))


def image_area(preprocessing: Preprocessing, image: Size) -> tuple[slice, slice]:
    """Return the rows and columns of the model's input that an image of this size occupies, without background."""
    size, resize = preprocessing.image_size, preprocessing.resize
    if preprocessing.border is None or resize is None or not preprocessing.crop:
        return slice(0, size[0]), slice(0, size[1])
    scaled = scaled_size(image, as_size(resize), fit=True)
    starts = [max(0, (whole - side) // 2) for whole, side in zip(size, scaled, strict=True)]
    rows, columns = (slice(at, at + min(side, n)) for at, side, n in zip(starts, scaled, size, strict=True))
    return rows, columns


def eval_preprocessing(train: Preprocessing, data: DataConfig, weights: PretrainedInput | None) -> Preprocessing:
    """Return the preprocessing for evaluation and prediction, which differs if ``eval_image_size`` is set."""
    return _at_size(train, data, weights, as_size(data.eval_image_size)) if data.eval_image_size else train


def training_stages(train: Preprocessing, data: DataConfig, weights: PretrainedInput | None) -> list[Preprocessing]:
    """Return the preprocessing for each stage of ``progressive_sizes``; without them there is one stage."""
    sizes = data.progressive_sizes or [as_value(train.image_size)]
    stages = [_at_size(train, data, weights, as_size(size)) for size in sizes]
    if stages[-1].image_size != train.image_size:
        raise UserError(
            f"data.progressive_sizes ends with {sizes[-1]}, but the last size must be data.image_size, which is "
            f"{as_value(train.image_size)}"
        )
    return stages


def stage_of(epoch: int, epochs: int, stages: int) -> int:
    """Return the stage of an epoch (both counted from 0) if the run is divided into ``stages`` equal parts."""
    return min(stages - 1, epoch * stages // epochs)


def _at_size(known: Preprocessing, data: DataConfig, weights: PretrainedInput | None, size: Size) -> Preprocessing:
    """Return the preprocessing for inputs of another size, with the same normalization."""
    resize, cover = _resize(data, weights, size)
    return replace(known, image_size=size, resize=resize, cover=cover)


def _resize(data: DataConfig, weights: PretrainedInput | None, size: Size) -> tuple[int | Size | None, bool]:
    """Return the fields ``resize`` and ``cover`` of the preprocessing for inputs of ``size``."""
    if data.resize == "none":
        return None, False
    if data.resize == "letterbox":
        return size, False
    if data.resize is not None:
        return data.resize if isinstance(data.resize, int) else as_size(data.resize), False
    resize = _default_resize(size, weights)
    return resize, isinstance(resize, tuple) and (not weights or weights.crop_mode == "center")


def _default_resize(size: Size, weights: PretrainedInput | None) -> int | Size:
    """Return the size before a crop to ``size``, from the crop ratio of the weights or ImageNet's 0.875.

    It is one number if it is square.
    """
    if weights:
        height, width = (round(weights.resize * side / weights.image_size) for side in size)
        return (height, width) if weights.crop_mode == "squash" or height != width else height
    if max(size) <= SMALL_IMAGE:
        return size[0] if size[0] == size[1] else size
    height, width = (round(side / 0.875) for side in size)
    return height if height == width else (height, width)


def _normalization(
    data: DataConfig,
    weights: PretrainedInput | None,
    plain: Preprocessing,
    measure: Callable[[Preprocessing], tuple[tuple[float, ...], tuple[float, ...]]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel according to ``data.normalize``."""
    choice, channels = data.normalize, plain.channels
    if isinstance(choice, NormalizeValues):
        return tuple(choice.mean), tuple(choice.std)
    if choice == "auto" and weights:
        return _as_channels(weights.mean, channels), _as_channels(weights.std, channels)
    if choice == "dataset":
        return measure(plain)
    mean, std = NORMALIZATIONS["half" if choice == "auto" else choice]
    return _as_channels(mean, channels), _as_channels(std, channels)


def _as_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one value per channel: unchanged if the number matches, else their average for each channel."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels
