"""Reading images that Pillow cannot read, or not at full bit depth: NumPy files, TIFF files with any number of channels
or several pages, and color PNG files with 16 bits per sample.

Values are arrays [h, w, C] of the file's data type; :func:`toolkit.data.value_range.values_to_bytes` converts them to
uint8.
"""

from __future__ import annotations

import io
import warnings
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from toolkit.data.orientation import TURNS, orientation_of
from toolkit.errors import missing_package
from toolkit.formatting import plural

Values = npt.NDArray[Any]
"""Values of an image, [h, w, C], of any real data type."""

Page = int | Literal["channels"]
"""Page number, from 0, or "channels" if the pages are the channels of one image."""

NUMPY = b"\x93NUMPY"
"""First bytes of a .npy file."""

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF files of both byte orders."""


class WrongLayout(ValueError):
    """Raised if an image lacks the requested page or channels; the message states the reason."""


def is_tiff(data: bytes) -> bool:
    """Return whether ``data`` starts like a TIFF file."""
    return data.startswith(_TIFF)


def read_values(data: bytes, channels: int, page: Page, *, apply_exif: bool) -> Values:
    """Decode a .npy, TIFF or PNG file at full bit depth. ``channels``: expected number, to find the channel axis.

    With ``apply_exif``, a TIFF or PNG file is rotated upright according to its orientation tag. Raises WrongLayout if
    the page or the channels are missing, UserError if a required package is not installed, and any exception if the
    file is damaged.
    """
    if data.startswith(NUMPY):
        return _channels_last(_real(np.load(io.BytesIO(data), allow_pickle=False)), channels, page)
    values, orientation = _read_tiff(data, page) if is_tiff(data) else _read_png(data, page)
    return turned(_real(values), orientation) if apply_exif else values


def check_header(file: BinaryIO, channels: int, page: Page) -> np.dtype[Any]:
    """Return the data type of a .npy file from its header.

    Raises ValueError if the header is damaged or the file is truncated, and WrongLayout like :func:`read_values`.
    """
    major, _ = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, kind = header(file)
    if file.tell() + int(np.prod(shape)) * kind.itemsize > file.seek(0, io.SEEK_END):
        raise ValueError("the file is truncated")
    values = _channels_last(_real(np.broadcast_to(np.zeros((), dtype=kind), shape)), channels, page)
    with_channels(np.zeros((1, 1, values.shape[2]), dtype=np.uint8), channels)
    return kind


def with_channels(pixels: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.uint8]:
    """Convert uint8 [h, w, C] to the expected number of channels.

    Grayscale and RGB are converted into each other, and alpha is dropped (2 and 4 channels). Raises WrongLayout if the
    number differs otherwise.
    """
    found = pixels.shape[2]
    if found == channels:
        return pixels
    if channels in (1, 3) and found in (1, 2, 3, 4):
        image = Image.fromarray(pixels[..., 0] if found <= 2 else np.ascontiguousarray(pixels[..., :3]))
        converted = np.array(image.convert("L" if channels == 1 else "RGB"))
        return converted.reshape(*pixels.shape[:2], channels)
    raise wrong_channels(found, channels)


def wrong_channels(found: int, channels: int) -> WrongLayout:
    """Return the exception for an image whose number of channels differs from the recipe's."""
    return WrongLayout(
        f"it has {plural(found, 'channel')}, but data.channels is {channels} (if this is true of all images, set "
        f"data.channels = {found})"
    )


def turned(values: Values, orientation: int) -> Values:
    """Return values rotated upright according to an EXIF orientation from 1 to 8, as Pillow's transpositions do."""
    if orientation not in TURNS:
        return values
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(values[::rows, ::columns])


def _real(values: Values) -> Values:
    if values.dtype.kind not in "biuf":
        raise WrongLayout(f"its values have the data type {values.dtype} and are not numbers")
    return values


def _channels_last(values: Values, channels: int, page: Page) -> Values:
    """Return an array [h, w], [h, w, C] or [C, h, w] as [h, w, C]."""
    if page not in (0, "channels"):
        raise WrongLayout(f"a .npy file has one page, but data.page is {page}")
    if values.ndim == 2:
        return values[..., None]
    if values.ndim == 3 and 0 not in values.shape:
        usual = {channels} if channels not in (1, 3) else {1, 3, 4}
        if values.shape[2] in usual:
            return values
        if values.shape[0] in usual:
            return np.moveaxis(values, 0, 2)
        if min(values.shape[0], values.shape[2]) <= 32:
            raise wrong_channels(min(values.shape[0], values.shape[2]), channels)
    raise WrongLayout(f"an array of shape {list(values.shape)} is not an image [h, w], [h, w, C] or [C, h, w]")


def _read_tiff(data: bytes, page: Page) -> tuple[Values, int]:
    """Return one page of a TIFF file, or all pages as channels, [h, w, C], and the EXIF orientation."""
    try:
        import tifffile
    except ImportError:
        what = "reading this TIFF file (because of its number of channels, its bits per sample or data.page)"
        raise missing_package(what, "tifffile", "tiff") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            chosen: Any = file.pages[0] if page == "channels" else file.pages[existing_page(page, len(file.pages))]
            source = file.series[0] if page == "channels" else chosen
            values, axes = source.asarray(), source.axes
            orientation = chosen.tags.valueof(274, 1)
    except (ValueError, KeyError) as error:
        if "imagecodecs" not in str(error):
            raise
        raise missing_package("reading TIFF files with this compression", "imagecodecs", "tiff") from error
    order = [axes.index("Y"), axes.index("X")]
    others = [axis for axis in range(values.ndim) if axis not in order]
    whole = values.transpose(*order, *others)
    return whole.reshape(*whole.shape[:2], -1), int(orientation)


def existing_page(page: int, pages: int) -> int:
    """Return ``page``. Raises WrongLayout if the file has only ``pages`` pages and this one is missing."""
    if page >= pages:
        raise WrongLayout(f"it has {plural(pages, 'page')}, but data.page is {page} (counted from 0)")
    return page


def _read_png(data: bytes, page: Page) -> tuple[Values, int]:
    """Return the values of a PNG file, uint8 or uint16 [h, w, C], and the EXIF orientation."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    if page not in (0, "channels"):
        raise WrongLayout(f"a PNG file has one page, but data.page is {page}")
    with Image.open(io.BytesIO(data)) as image:
        orientation = orientation_of(image)
    with warnings.catch_warnings():  # torchvision recommends torchcodec, which needs FFmpeg
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return decoded.permute(1, 2, 0).numpy(), orientation
