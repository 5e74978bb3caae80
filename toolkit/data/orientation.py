"""EXIF orientation of images: the transposition that makes an image upright."""

from __future__ import annotations

import io

from PIL import ExifTags, Image
from PIL.Image import Transpose

TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""Transposition that rotates an image upright, by orientation tag; no transposition for 1 and all other values."""

_BACK = {**TURNS, 6: Transpose.ROTATE_90, 8: Transpose.ROTATE_270}
"""Inverse of each transposition in TURNS."""

_START_OF_SCAN, _APP1 = 0xDA, 0xE1
"""JPEG markers of the pixel data and of the segment with EXIF or XMP."""


def load_oriented(image: Image.Image, *, apply: bool) -> Image.Image:
    """Decode an open image and rotate it upright according to its orientation tag, unless ``apply`` is false.

    The tag is read from EXIF, else from XMP, in any format. Pillow itself only rotates TIFF files, when decoding them.
    """
    stored = orientation_of(image) if hasattr(image, "tag_v2") else 1
    image.load()
    left = orientation_of(image)
    if apply:
        return image.transpose(TURNS[left]) if left in TURNS else image
    return image.transpose(_BACK[stored]) if stored in TURNS and left not in TURNS else image


def jpeg_turn(data: bytes) -> Transpose | None:
    """Return the transposition that makes a JPEG file upright; None if there is none."""
    if not _has_metadata(data):
        return None
    with Image.open(io.BytesIO(data)) as image:
        return TURNS.get(orientation_of(image))


def orientation_of(image: Image.Image) -> int:
    """Return the orientation tag; 1 if there is none or the metadata cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF can make the reader raise nearly anything
        return 1
    return value if isinstance(value, int) else 1


def _has_metadata(data: bytes) -> bool:
    """Return whether a JPEG file has an EXIF or XMP segment before its pixels; True in case of doubt."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _START_OF_SCAN:
            return False
        if marker == _APP1:
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return True
