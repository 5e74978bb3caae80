"""Collections of images that are cheap to share between processes: one array, or encoded images with a flat index.

A decoded image is always a uint8 array [h, w, C]. Only steps that need a Pillow image convert it, which is possible
for 1 channel (grayscale) and 3 channels.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from toolkit.data.array_images import (
    NUMPY,
    Page,
    Values,
    WrongLayout,
    check_header,
    existing_page,
    is_tiff,
    read_values,
    with_channels,
    wrong_channels,
)
from toolkit.data.encoded_sources import EncodedSource, read_bytes
from toolkit.data.jpeg_decoding import decode_jpeg
from toolkit.data.orientation import jpeg_turn, load_oriented
from toolkit.data.value_range import (
    FULL,
    LEAST_USED,
    WHITE_16,
    Extent,
    Range,
    UnclearValues,
    extent_of,
    extent_of_values,
    is_planar,
    joined,
    sample_kind,
    states_maximum,
    to_bytes,
    values_to_bytes,
)
from toolkit.distributed.cpu_count import available_cpus
from toolkit.errors import RunFailed, UserError
from toolkit.filenames import escape_control_characters
from toolkit.formatting import plural

Pixels = npt.NDArray[np.uint8]
"""A decoded image, [h, w, C]; it may be read-only."""

MODES = {1: "L", 3: "RGB"}
"""Pillow mode by number of channels."""

_FILE_FAULTS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.ENAMETOOLONG: "a path that is too long",
    errno.ELOOP: "a loop of links",
    errno.EISDIR: "a folder, not a file",
    errno.ENXIO: "a pipe, socket or device, not a file",
    errno.EACCES: "not readable (permission denied)",
    errno.EPERM: "not readable (permission denied)",
}
"""Error numbers that are caused by the file itself.

Others (too many open files, a failing disk) are caused by the system: skipping the image would hide them, and each
process could skip different images.
"""

SAMPLED = 32
"""Number of images whose encoded bytes are part of the identity of a collection."""

JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"

BLOCKS_KEPT = 4
"""Number of memory blocks of freed images that Pillow keeps for reuse.

By default Pillow returns them to the system, and the page faults caused by new blocks account for a third of the time
needed to decode a JPEG file.
"""

# Cached images are read-only memory maps; PyTorch warns that tensors made from them must not be written to.
warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")

if "PILLOW_BLOCKS_MAX" not in os.environ:
    Image.core.set_blocks_max(BLOCKS_KEPT)  # type: ignore[attr-defined]


CANNOT_READ = 'repair or remove it, or set data.on_bad_image = "skip" to leave out images that cannot be read'
"""Advice for an unreadable image if ``data.on_bad_image = "error"``."""

HAS_CHANGED = (
    'data.on_bad_image = "skip" leaves out only images that cannot be read when training begins, and this one could be '
    "read then: restore the file and resume"
)
"""Advice for an unreadable image if ``data.on_bad_image = "skip"``."""


class UnreadableImageError(RunFailed):
    """Raised for a file that is not a readable image; has its ``name``, the ``reason`` and ``advice`` on what to do."""

    def __init__(self, name: str, reason: str, advice: str = "") -> None:
        super().__init__(f"{name}: {reason}{'; ' + advice if advice else ''}")
        self.name, self.reason, self.advice = name, reason, advice

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[str, str, str]]:
        """Pickle the arguments instead of the message, so that the exception can leave a worker process."""
        return UnreadableImageError, (self.name, self.reason, self.advice)


class ImageSource(Protocol):
    """A numbered collection of images."""

    def __len__(self) -> int: ...

    def load(self, i: int) -> Pixels:
        """Return image i, decoded, with the collection's number of channels. Raises UnreadableImageError."""
        ...

    def name(self, i: int) -> str:
        """Return the name of image i for messages and files, such as its path relative to the data folder.

        Encoded by :func:`toolkit.filenames.encode_name`.
        """
        ...

    def identity(self, indices: npt.NDArray[np.int64]) -> str:
        """Return a hash of these images, in order, for use as a cache key; changes if any image changes."""
        ...


class InMemoryImages:
    """Images in memory as one array, uint8 [N, H, W] or [N, H, W, C]."""

    def __init__(self, pixels: npt.NDArray[np.uint8], prefix: str, channels: int) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
            raise ValueError(f"pixels must be uint8 [N, H, W] or [N, H, W, C], not {pixels.dtype} {pixels.shape}")
        self.prefix, self.channels = prefix, channels
        if channels == 1 and pixels.ndim == 4 and pixels.shape[3] > 1:
            pixels = np.stack([to_pixels(Image.fromarray(image), 1) for image in pixels])
        self.pixels = pixels if pixels.ndim == 4 else pixels[..., None]
        """Pixels of all images, uint8 [N, H, W, channels]."""
        if self.pixels.shape[3] != channels and (self.pixels.shape[3], channels) != (1, 3):
            found = self.pixels.shape[3]
            raise UserError(f"the images of {prefix} have {plural(found, 'channel')}, but data.channels is {channels}")

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, i: int) -> Pixels:
        """Return image i; a gray one is repeated if the collection has 3 channels."""
        image: Pixels = self.pixels[i]
        return image if image.shape[2] == self.channels else np.repeat(image, self.channels, axis=2)

    def name(self, i: int) -> str:
        """Return "<prefix>/<i>"."""
        return f"{self.prefix}/{i}"

    def identity(self, indices: npt.NDArray[np.int64]) -> str:
        """Return the SHA-256 of shape, number of channels and pixels."""
        digest = hashlib.sha256(f"{len(indices)} {self.pixels.shape[1:]} {self.channels}".encode())
        for start in range(0, len(indices), 1024):
            digest.update(np.ascontiguousarray(self.pixels[indices[start : start + 1024]]).data)
        return digest.hexdigest()


class EncodedImages:
    """Images that are decoded when they are loaded, from files or any other source of their bytes."""

    def __init__(
        self,
        source: EncodedSource,
        channels: int,
        *,
        exif: str = "apply",
        value_range: Range | None = None,
        page: Page = 0,
        advice: str = "",
        origin: Callable[[int], str] | None = None,
    ) -> None:
        """``exif``: "apply" or "ignore" the orientation tag of the files (:mod:`toolkit.data.orientation`).

        ``value_range``: black and white values of samples with more than 8 bits (:mod:`toolkit.data.value_range`).
        ``page``: page to read from each file, or "channels" (:mod:`toolkit.data.array_images`). ``advice``: text
        appended to messages about unreadable images. ``origin``: function that returns where image i is listed, such as
        "row 7 of labels.csv", for the same messages.
        """
        self.source, self.channels, self.origin = source, channels, origin
        self.exif, self.value_range, self.page, self.advice = exif, value_range, page, advice

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        """Return the name of image i in its source, such as its path relative to the data folder."""
        return self.source.name(i)

    def with_range(self, value_range: Range | None) -> EncodedImages:
        """Return a copy with another range of values."""
        other = copy.copy(self)
        other.value_range = value_range
        return other

    def load(self, i: int) -> Pixels:
        """Read and decode image i. Raises UnreadableImageError for a missing, empty, truncated or non-image file."""
        try:
            data = read_bytes(self.source, i)
            pixels = decode_jpeg(data) if self.channels == 3 and self.page == 0 else None
            if pixels is None:
                return self._decoded(data)
            turn = jpeg_turn(data) if self.exif == "apply" else None
            return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
        except UserError:  # a missing package
            raise
        except Exception as error:  # a damaged file can make a decoder raise nearly anything
            raise self._fault(error, i) from error

    def _decoded(self, data: bytes) -> Pixels:
        image = self._opened(io.BytesIO(data))
        if image is None:
            return with_channels(values_to_bytes(self._values(data), self.value_range), self.channels)
        with image:
            return self.pixels(image)

    def pixels(self, image: Image.Image) -> Pixels:
        """Return an opened image: decoded, upright and with this collection's number of channels.

        Raises anything for an image that cannot be decoded or has other channels.
        """
        kind, value_range = sample_kind(image), FULL if states_maximum(image) else self.value_range
        upright = load_oriented(image, apply=self.exif == "apply")
        if kind is not None:
            upright = to_bytes(upright, kind, value_range)
        return to_pixels(upright, self.channels)

    def _values(self, data: bytes) -> Values:
        return read_values(data, self.channels, self.page, apply_exif=self.exif == "apply")

    def _opened(self, file: BinaryIO) -> Image.Image | None:
        """Open an image with Pillow, at the requested page; None if :func:`read_values` has to decode it."""
        start = file.read(len(NUMPY))
        file.seek(0)
        if start == NUMPY:
            return None
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            if is_tiff(start):
                return None
            raise
        if self._exceeds_pillow(image):
            return None
        if self.page != 0:
            pages = getattr(image, "n_frames", 1)
            if self.page == "channels" and pages > 1:
                raise WrongLayout(f'data.page = "channels" is only possible for TIFF files, not for {image.format}')
            image.seek(existing_page(0 if self.page == "channels" else self.page, pages))
        return image

    def _exceeds_pillow(self, image: Image.Image) -> bool:
        """Return whether Pillow would lose channels or bits of a TIFF or PNG file, which is open but not decoded."""
        kind = sample_kind(image)
        if image.format not in ("TIFF", "PNG"):
            return False
        if kind == "color":
            return is_planar(image) or self.channels not in MODES or self.value_range not in (None, FULL)
        if image.format == "PNG":
            return False
        return self.page == "channels" or (self.channels not in MODES and len(image.getbands()) != self.channels)

    def identity(self, indices: npt.NDArray[np.int64]) -> str:
        """Return the SHA-256 hash of the images' names, sizes, versions (modification times), and bytes of a sample.

        The path of the folder is not included: a copy with the same modification times has the same identity.
        Raises UnreadableImageError.
        """
        page = f" page {self.page}" if self.page != 0 else ""
        mode = MODES.get(self.channels, f"{self.channels} channels")
        digest = hashlib.sha256(f"{len(indices)} {mode} {self.exif} {self.value_range}{page}".encode())
        sampled = set(np.linspace(0, len(indices) - 1, min(SAMPLED, len(indices)), dtype=np.int64).tolist())
        for number, i in enumerate(indices.tolist()):
            try:
                size, version = self.source.size_and_version(i)
                digest.update(f"{self.name(i)}\0{size}\0{version}\n".encode())
                if number in sampled:
                    digest.update(read_bytes(self.source, i))
            except Exception as error:
                raise self._fault(error, i) from error
        return digest.hexdigest()

    def check(self, i: int, *, decode: bool = False) -> Extent | None:
        """Raise UnreadableImageError if the first and last bytes of image i show that it cannot be read.

        Finds missing and empty files, files that are not images, and truncated JPEG and PNG files, without decoding. A
        file without its format's end marker may only have extra bytes appended, so it is decoded to be sure. With
        ``decode=True`` every file is decoded.

        Returns the extent of the values if the image has more than 8 bits per sample and no range of values is set;
        such an image is always decoded.
        """
        try:
            with self.source.open(i) as file:
                image = self._opened(file)
                if image is None:
                    return self._check_values(file, i, decode=decode)
                with image:
                    end = {"JPEG": JPEG_END, "PNG": PNG_END}.get(image.format or "", b"")
                    is_settled = self.value_range is not None or states_maximum(image)
                    kind = None if is_settled else sample_kind(image)
                    if kind is not None:
                        image.load()
                        found = extent_of(image, kind, self.name(i))
                        is_dark = kind == "color" and found.high <= LEAST_USED * WHITE_16
                        exceeds = is_dark and image.format in ("PNG", "TIFF")
                        return self._check_values(file, i, decode=decode) if exceeds else found
                    file.seek(-len(end), os.SEEK_END)
                    is_whole = file.read() == end
        except UserError:
            raise
        except Exception as error:
            raise self._fault(error, i) from error
        if decode or not is_whole:
            self.load(i)
        return None

    def _check_values(self, file: BinaryIO, i: int, *, decode: bool) -> Extent | None:
        """Check an image that :func:`read_values` decodes; return its extent as :meth:`check` does."""
        file.seek(0)
        if file.read(len(NUMPY)) == NUMPY and not decode:
            file.seek(0)
            kind = check_header(file, self.channels, self.page)
            if self.value_range is not None or kind in (np.uint8, np.bool_):
                return None
        file.seek(0)
        values = self._values(file.read())
        with_channels(np.zeros((1, 1, values.shape[2]), dtype=np.uint8), self.channels)
        if self.value_range is not None or values.dtype in (np.uint8, np.bool_):
            return None
        return extent_of_values(values, self.name(i))

    def _fault(self, error: Exception, i: int) -> RunFailed:
        """Return the exception for a file that could not be read.

        UnreadableImageError for a fault of the file, RunFailed for a fault of the system.
        """
        number = error.errno if isinstance(error, OSError) else None  # Pillow's own OSErrors have none
        if isinstance(error, MemoryError) or (number is not None and number not in _FILE_FAULTS):
            return RunFailed(f"{self.source.location(i)} could not be read: {error or type(error).__name__}")
        reason = self._reason(error, number, i) + (f" ({self.origin(i)})" if self.origin else "")
        return UnreadableImageError(self.name(i), reason, self.advice)

    def _reason(self, error: Exception, number: int | None, i: int) -> str:
        """Describe why image i cannot be read. ``number``: the errno if the operating system reported an error."""
        if number in _FILE_FAULTS:
            return _FILE_FAULTS[number]
        if isinstance(error, UnclearValues | WrongLayout):
            return str(error)
        if self.source.size_and_version(i)[0] == 0:
            return "an empty file"
        if isinstance(error, UnidentifiedImageError):
            return "not an image of a known format"
        return escape_control_characters(f"damaged ({str(error) or type(error).__name__})")


def as_image(pixels: Pixels) -> Image.Image:
    """Convert uint8 [h, w, 1 or 3] to a Pillow image in mode L or RGB."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def as_pixels(image: Image.Image) -> Pixels:
    """Convert a Pillow image with 8 bits per sample to uint8 [h, w, C]."""
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def to_shown(pixels: Pixels) -> Image.Image:
    """Convert uint8 [h, w, C] to a Pillow image for display: the first three channels as RGB, or the first as gray."""
    return as_image(np.ascontiguousarray(pixels[..., : 3 if pixels.shape[2] >= 3 else 1]))


def to_pixels(image: Image.Image, channels: int) -> Pixels:
    """Decode fully and convert to uint8 [h, w, channels].

    For 1 or 3 channels, palettes are resolved and alpha is dropped; color becomes grayscale with the usual luma weights
    (0.299, 0.587, 0.114). With any other number, the image must have exactly that many channels, including alpha, or
    WrongLayout is raised. Samples with more than 8 bits are accepted only if their values show that they are 16-bit
    (:func:`toolkit.data.value_range.to_bytes`).
    """
    kind = sample_kind(image)
    image.load()
    if kind is not None:
        image = to_bytes(image, kind, None)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if such an image is converted to RGB directly
    if channels not in MODES:
        if len(image.getbands()) != channels:
            raise wrong_channels(len(image.getbands()), channels)
        return as_pixels(image)
    return as_pixels(image if image.mode == MODES[channels] else image.convert(MODES[channels]))


def in_stored_order(images: ImageSource, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the indices sorted by the shard that contains each image, so that shards are read one after the other."""
    stored_in = getattr(getattr(images, "source", None), "stored_in", None)
    return indices if stored_in is None else indices[np.argsort(stored_in[indices], kind="stable")]


class ImageCheckResult(NamedTuple):
    """Result of :func:`check_images`."""

    bad: list[tuple[int, str]]
    """Index and reason of each unreadable image, in the given order, or for shards in :func:`in_stored_order`."""
    extents: list[Extent]
    """Range of values of the images with more than 8 bits per sample, one per kind; empty if a range is set."""


def check_images(
    images: ImageSource,
    indices: npt.NDArray[np.int64],
    *,
    decode: bool,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> ImageCheckResult:
    """Find the unreadable images among ``indices``.

    ``decode=False`` checks only the first and last bytes (see :meth:`EncodedImages.check`); ``decode=True`` decodes
    every image and thus finds all images that would fail in training. ``threads`` defaults to the number of available
    CPUs. ``progress`` is called with the number of images checked so far, once per 1,024 images.
    """
    if not isinstance(images, EncodedImages) or (getattr(images.source, "is_checked", False) and not decode):
        return ImageCheckResult([], [])
    indices = in_stored_order(images, indices)

    def check_one(i: int) -> Extent | str | None:
        try:
            return images.check(i, decode=decode)
        except UnreadableImageError as error:
            return error.reason

    bad: list[tuple[int, str]] = []
    extents: list[Extent] = []
    with ThreadPoolExecutor(threads or available_cpus()) as pool:  # decoders release the interpreter lock
        for start in range(0, len(indices), 1024):
            chunk = [int(i) for i in indices[start : start + 1024]]
            found = list(pool.map(check_one, chunk))
            bad += [(i, one) for i, one in zip(chunk, found, strict=True) if isinstance(one, str)]
            extents = joined([*extents, *(one for one in found if isinstance(one, Extent))])
            progress(start + len(chunk))
    return ImageCheckResult(bad, extents)
