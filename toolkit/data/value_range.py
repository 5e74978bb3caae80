"""Range of values that is mapped to 0..255 for image files with more than 8 bits per sample.

In an 8-bit file 0 is black and 255 is white. Files with 16-bit, 32-bit or floating-point samples often do not state
which value is white (12-bit sensor data, for example, are stored in 16 bits). One range therefore applies to a whole
data set and is stored in the model card; images are never scaled by their own values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
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
"""Suffix of Pillow's raw modes with 16-bit samples. Of several channels, Pillow keeps only the upper 8 bits each."""


class UnclearValues(ValueError):
    """Raised for an image whose values cannot be mapped to 0..255; the message is the reason."""


@dataclass(frozen=True)
class Extent:
    """The smallest and largest value in images of one kind."""

    kind: Kind
    low: float
    high: float
    name: str
    """Name of the image with the largest value."""
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
    return None


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
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise UnclearValues("it has values that are not finite (NaN or infinity)")
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
    has_color = any(one.kind == "color" for one in extents)
    chosen: Range = (0.0, 1.0)
    if whole.kind != "float":
        chosen = (0, next((2**bits - 1 for bits in DEPTHS if whole.high < 2**bits), 65535))
    is_known = chosen[0] <= whole.low and LEAST_USED * chosen[1] < whole.high <= chosen[1]
    if is_known and not (has_color and chosen != FULL):
        return chosen
    example = f"{whole.name} has the largest"
    if has_color:
        raise UserError(
            f"data.value_range cannot be determined: {whole.images} images have 16 bits per sample, with values up to "
            f"about {whole.high:g} ({example}). Pillow reads only the upper 8 bits of 16-bit color images, so "
            "these would be nearly black: convert them to 8 bits, or accept that with data.value_range = [0, 65535]"
        )
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
        whole = extent_of(image, kind, "")
        if kind == "float" or whole.low < 0 or not LEAST_USED * WHITE_16 < whole.high <= WHITE_16:
            raise UnclearValues(
                f"it has {kind} samples of more than 8 bits, with values from {whole.low:g} to {whole.high:g}, and "
                "it is not known which value is white; convert it to 8 bits"
            )
        value_range = FULL
    if kind == "color":
        if value_range != FULL:
            raise UnclearValues(
                "it has 16-bit color samples, of which only the upper 8 bits can be read, and data.value_range is "
                f"[{value_range[0]:g}, {value_range[1]:g}]; convert it to 8 bits"
            )
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UnclearValues("it has values that are not finite (NaN or infinity)")
    low, high = value_range
    return Image.fromarray(np.rint((values - low) * 255 / (high - low)).clip(0, 255).astype(np.uint8))
