"""JPEG decoding directly to an array with simplejpeg, if it is installed, in two thirds of Pillow's time.

Both use libjpeg-turbo with the same settings and return the same bytes (tested). Anything unusual (gray, CMYK, huge or
damaged files) is left to Pillow, which alone decides what can be read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

try:
    import simplejpeg
except ImportError:  # an extra of the toolkit: "fast"
    simplejpeg = None

START = b"\xff\xd8\xff"


def jpeg_decoder() -> str:
    """Return the name and version of the decoder that is used for ordinary JPEG files, for cache keys."""
    return "Pillow" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"


def decode_jpeg(data: bytes) -> npt.NDArray[np.uint8] | None:
    """Decode a color JPEG to uint8 [h, w, 3]; None if Pillow must decode it."""
    if simplejpeg is None or not data.startswith(START):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        limit = Image.MAX_IMAGE_PIXELS
        if colorspace != "YCbCr" or (limit is not None and height * width > limit):
            return None
        pixels: Any = simplejpeg.decode_jpeg(data)
    except Exception:  # whatever simplejpeg cannot decode: Pillow can, or reports why not
        return None
    whole: npt.NDArray[np.uint8] = pixels
    return whole
