"""JPEG files decoded straight into an array, by simplejpeg where it is installed, in two thirds of Pillow's time.

Both are libjpeg-turbo with the same settings, and give the same bytes (tested). Whatever is not plain (grey, CMYK,
huge, damaged) is left to Pillow, whose word counts on what can be read.
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
    """What decodes plain JPEG files, for keys of kept pixels."""
    return "Pillow" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"


def decode_jpeg(data: bytes) -> npt.NDArray[np.uint8] | None:
    """A colour JPEG as uint8 [h, w, 3]; None where Pillow is to be asked."""
    if simplejpeg is None or not data.startswith(START):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        limit = Image.MAX_IMAGE_PIXELS
        if colorspace != "YCbCr" or (limit is not None and height * width > limit):
            return None
        pixels: Any = simplejpeg.decode_jpeg(data)
    except Exception:  # whatever it is that simplejpeg cannot do: Pillow can, or says why not
        return None
    whole: npt.NDArray[np.uint8] = pixels
    return whole
