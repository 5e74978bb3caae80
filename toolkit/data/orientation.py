"""The EXIF orientation of images: how a file says that its picture must be turned to be seen upright."""

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
"""What makes an image upright, by its orientation tag. 1 and all other values: nothing."""

_BACK = {**TURNS, 6: Transpose.ROTATE_90, 8: Transpose.ROTATE_270}
"""The inverse of each."""

_START_OF_SCAN, _APP1 = 0xDA, 0xE1
"""JPEG markers: the pixels, and the segment that holds EXIF or XMP."""


def load_oriented(image: Image.Image, *, apply: bool) -> Image.Image:
    """Decode an opened image and turn it upright by its tag, or leave the pixels as they are stored.

    The tag is that of EXIF, or else of XMP, in any format. Pillow turns TIFF files, and only these, as it decodes them.
    """
    stored = _tag(image) if hasattr(image, "tag_v2") else 1
    image.load()
    left = _tag(image)
    if apply:
        return image.transpose(TURNS[left]) if left in TURNS else image
    return image.transpose(_BACK[stored]) if stored in TURNS and left not in TURNS else image


def jpeg_turn(data: bytes) -> Transpose | None:
    """What makes a JPEG file upright; None: nothing."""
    if not _has_metadata(data):
        return None
    with Image.open(io.BytesIO(data)) as image:
        return TURNS.get(_tag(image))


def _tag(image: Image.Image) -> int:
    """The orientation tag; 1 where there is none. Unreadable metadata do not make an image unreadable."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF can make the reader raise nearly anything
        return 1
    return value if isinstance(value, int) else 1


def _has_metadata(data: bytes) -> bool:
    """Whether a JPEG file has a segment for EXIF or XMP before its pixels; True in case of doubt."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _START_OF_SCAN:
            return False
        if marker == _APP1:
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return True
