"""Range of values that is mapped to 0..255 for image files with more than 8 bits per sample.

In an 8-bit file 0 is black and 255 is white. Files with 16-bit, 32-bit or floating-point samples often do not state
which value is white (12-bit sensor data, for example, are stored in 16 bits). One range therefore applies to a whole
data set and is stored in the model card; images are never scaled by their own values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from toolkit.errors import UserError

Kind = Literal["integer", "float", "color"]
"""Grayscale with 16- or 32-bit integer samples, grayscale with float samples, several channels of 16 bits."""

Range = tuple[float, float]
"""The values of black and of white."""

DEPTHS = (8, 10, 12, 14, 16)
"""Usual bit depths of cameras and scanners."""

WHITE_16 = 65535
FULL: Range = (0, WHITE_16)
"""The whole 16-bit range, as the values of black and white."""

LEAST_USED = 0.25
"""A range is assumed only if the largest value exceeds this fraction of its maximum."""

_SIXTEEN_BITS = re.compile(r";16[BLN]$")
"""Suffix of Pillow's raw modes with 16-bit samples. Of images with several channels, Pillow keeps the upper 8 bits."""


class UnclearValues(ValueError):
    """Raised for an image whose values cannot be mapped to 0..255; the message is the reason."""


@dataclass(frozen=True)
class Extent:
    """The smallest and largest value in images of one kind."""

    kind: Kind
    low: float
    high: float
    name: str
    """Name of the image that has the largest value."""
    images: int = 1


def sample_kind(image: Image.Image) -> Kind | None:
    """Return the kind of samples of an image that is opened but not loaded; None for at most 8 bits per sample."""
    if image.mode.startswith("I"):
        return "integer"
    if image.mode == "F":
        return "float"
    for tile in getattr(image, "tile", ()):
        names = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(name, str) and _SIXTEEN_BITS.search(name) for name in names):
            return "color"
    if is_planar(image):
        return "color"
    return None


def is_planar(image: Image.Image) -> bool:
    """Return whether a TIFF file, open but not decoded, stores its channels one after the other with 16 bits each.

    Pillow does not read such files correctly.
    """
    tags = getattr(image, "tag_v2", {})
    return tags.get(284) == 2 and max(tags.get(258, (8,))) > 8


def states_maximum(image: Image.Image) -> bool:
    """Return whether the file of an image that is not loaded yet states its white value, as PGM does in its header.

    Pillow maps that value to 65535, so no other range applies to the file.
    """
    return image.format == "PPM" and any(tile[0] in ("ppm", "ppm_plain") for tile in getattr(image, "tile", ()))


def extent_of(image: Image.Image, kind: Kind, name: str) -> Extent:
    """Return the smallest and largest value of a loaded image. Raises UnclearValues for NaN and infinity."""
    if kind == "color":
        pixels = np.asarray(image)
        if image.getbands()[-1] in ("A", "a"):  # alpha is not a color
            pixels = pixels[..., :-1]
        return Extent(kind, 257.0 * int(pixels.min()), 257.0 * int(pixels.max()), name)
    return replace(extent_of_values(np.asarray(image), name), kind=kind)


def extent_of_values(values: npt.NDArray[Any], name: str) -> Extent:
    """Return the smallest and largest value of an array. Raises UnclearValues for NaN and infinity."""
    if not np.isfinite(values).all():
        raise UnclearValues("it has values that are not finite (NaN or infinity)")
    kind: Kind = "float" if values.dtype.kind == "f" else "integer"
    return Extent(kind, float(values.min()), float(values.max()), name)


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """Merge the extents of many images into one per kind."""
    found: dict[Kind, Extent] = {}
    for one in extents:
        known = found.get(one.kind)
        if known is None:
            found[one.kind] = one
            continue
        name = one.name if one.high > known.high else known.name
        found[one.kind] = Extent(
            one.kind, min(one.low, known.low), max(one.high, known.high), name, one.images + known.images
        )
    return [found[kind] for kind in sorted(found)]


def choose_range(extents: list[Extent]) -> Range | None:
    """Choose the range of values for a data set with these extents, one per kind; None if all its images have 8 bits.

    Integer samples: 0 to the maximum of the smallest bit depth (8, 10, 12, 14 or 16) that fits all images. Float
    samples: 0 to 1. Raises UserError if the values do not fit, or do not exceed a quarter of that range.
    """
    if not extents:
        return None
    if len({one.kind == "float" for one in extents}) > 1:
        raise UserError(
            f"data.value_range cannot be determined: {extents[0].name} and {extents[1].name} have samples of different "
            "kinds (integer and floating point), and one range must hold for all images; convert the images to 8 bits, "
            "or to one kind"
        )
    whole = joined(replace(one, kind=extents[0].kind) for one in extents)[0]
    chosen: Range = (0.0, 1.0)
    if whole.kind != "float":
        chosen = (0, next((2**bits - 1 for bits in DEPTHS if whole.high < 2**bits), 65535))
    is_known = chosen[0] <= whole.low and LEAST_USED * chosen[1] < whole.high <= chosen[1]
    if is_known:
        return chosen
    example = f"{whole.name} has the largest"
    raise UserError(
        f"data.value_range cannot be determined: {whole.images} images have {whole.kind} samples of more than 8 bits, "
        f"with values from {whole.low:g} to {whole.high:g} ({example}), and their files do not state which value is "
        "white; set data.value_range = [BLACK, WHITE], or convert the images to 8 bits"
    )


def describe_range(extents: list[Extent], chosen: Range) -> str:
    """Describe the chosen range in one line for the log."""
    count, low, high = sum(e.images for e in extents), min(e.low for e in extents), max(e.high for e in extents)
    return (
        f"{count:,} images have more than 8 bits per sample, with values from {low:g} to {high:g}: {chosen[0]:g} is "
        f"black and {chosen[1]:g} is white in all of them (data.value_range sets another range)"
    )


def to_bytes(image: Image.Image, kind: Kind, value_range: Range | None) -> Image.Image:
    """Convert a loaded image to 8 bits, mode L; an image of kind "color" is returned unchanged.

    ``value_range[0]`` becomes 0 and ``value_range[1]`` 255; values in between are rounded, values beyond are clipped.
    If ``value_range`` is None, an image is accepted only if its values show that they are 16-bit. Raises UnclearValues
    otherwise.
    """
    if value_range is None:
        value_range = _assumed_range(extent_of(image, kind, ""))
    if kind == "color":
        return image
    return Image.fromarray(values_to_bytes(np.asarray(image), value_range))


def values_to_bytes(values: npt.NDArray[Any], value_range: Range | None) -> npt.NDArray[np.uint8]:
    """Convert an array of any real type to uint8 like :func:`to_bytes`; uint8 is unchanged, and True becomes 255."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = _assumed_range(extent_of_values(values, "")) if value_range is None else value_range
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise UnclearValues("it has values that are not finite (NaN or infinity)")
    scaled: npt.NDArray[np.uint8] = np.rint((values - low) * 255 / (high - low)).clip(0, 255).astype(np.uint8)
    return scaled


def _assumed_range(whole: Extent) -> Range:
    """Return the range for one image if the data set has none. Raises UnclearValues unless its values need 16 bits."""
    if whole.kind == "float" or whole.low < 0 or not LEAST_USED * WHITE_16 < whole.high <= WHITE_16:
        raise UnclearValues(
            f"it has {whole.kind} samples of more than 8 bits, with values from {whole.low:g} to {whole.high:g}, and "
            "the value that means white is unknown; convert it to 8 bits"
        )
    return FULL
