"""Collections of images that are cheap to share between processes: one array or one flat index, no object an image."""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from toolkit.data.jpeg_decoding import decode_jpeg
from toolkit.data.orientation import jpeg_turn, load_oriented
from toolkit.data.value_range import (
    FULL,
    Extent,
    Range,
    UnclearValues,
    extent_of,
    joined,
    sample_kind,
    states_maximum,
    to_bytes,
)
from toolkit.distributed.cpu_count import available_cpus
from toolkit.errors import RunFailed
from toolkit.filenames import encode_name, escape_control_characters

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a number of channels."""

_FILE_FAULTS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.ENAMETOOLONG: "a path that is too long",
    errno.ELOOP: "a circle of links",
    errno.EISDIR: "a folder, not a file",
    errno.ENXIO: "a pipe, socket or device, not a file",
    errno.EACCES: "not readable (permission denied)",
    errno.EPERM: "not readable (permission denied)",
}
"""Faults of the file itself. Others (too many open files, a failing disk) say nothing about it: leaving the image out
would hide them, and differently on every process."""

SAMPLED = 32
"""Files whose whole content enters the identity of a collection of files."""

JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"

BLOCKS_KEPT = 4
"""Blocks of memory that Pillow keeps of freed images. It gives them back to the system, and every new one costs page
faults: a third of a JPEG's decoding."""

if "PILLOW_BLOCKS_MAX" not in os.environ:
    Image.core.set_blocks_max(BLOCKS_KEPT)  # type: ignore[attr-defined]


CANNOT_READ = 'repair or remove it, or set data.on_bad_image = "skip" to leave out images that cannot be read'
"""What to do about a bad image of a data set, with ``data.on_bad_image = "error"``."""

HAS_CHANGED = (
    'data.on_bad_image = "skip" has left out the images that could not be read when training began; this one could be '
    "read then, and a run leaves out nothing after its beginning: bring the file back as it was, and resume"
)
"""The same with ``data.on_bad_image = "skip"``."""


class UnreadableImageError(RunFailed):
    """A file that is no readable image: ``name`` says which, ``reason`` why, ``advice`` what to do."""

    def __init__(self, name: str, reason: str, advice: str = "") -> None:
        super().__init__(f"{name}: {reason}{'; ' + advice if advice else ''}")
        self.name, self.reason, self.advice = name, reason, advice

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[str, str, str]]:
        """The arguments, not the message: the exception must survive the way out of a worker process."""
        return UnreadableImageError, (self.name, self.reason, self.advice)


class ImageSource(Protocol):
    """A numbered collection of images."""

    def __len__(self) -> int: ...

    def load(self, i: int) -> Image.Image:
        """Image i, fully decoded, in mode RGB or L. Raises BadImage."""
        ...

    def decoded(self, i: int) -> Image.Image | Tensor:
        """The same; or, where that is how it is at hand, its bytes: uint8 [h, w, 3], not to be written to."""
        ...

    def name(self, i: int) -> str:
        """What image i is called in messages and files: a path relative to the data's folder, or the like.

        Encoded by :func:`toolkit.filenames.encode_name`.
        """
        ...

    def identity(self, indices: npt.NDArray[np.int64]) -> str:
        """A hash of these images, in order, by which they are known again: another if any of them has changed."""
        ...


class InMemoryImages:
    """Images held in memory as one array, uint8 [N, H, W] or [N, H, W, C]."""

    def __init__(self, pixels: npt.NDArray[np.uint8], prefix: str, channels: int) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
            raise ValueError(f"pixels must be uint8 [N, H, W] or [N, H, W, C], not {pixels.dtype} {pixels.shape}")
        self.pixels, self.prefix, self.mode = pixels, prefix, MODES[channels]

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, i: int) -> Image.Image:
        """Image i in the collection's mode."""
        return to_mode(Image.fromarray(self.pixels[i]), self.mode)

    def decoded(self, i: int) -> Image.Image:
        """The same."""
        return self.load(i)

    def name(self, i: int) -> str:
        """The collection's name and the image's number."""
        return f"{self.prefix}/{i}"

    def identity(self, indices: npt.NDArray[np.int64]) -> str:
        """SHA-256 of shape, mode and pixels."""
        digest = hashlib.sha256(f"{len(indices)} {self.pixels.shape[1:]} {self.mode}".encode())
        for start in range(0, len(indices), 1024):
            digest.update(np.ascontiguousarray(self.pixels[indices[start : start + 1024]]).data)
        return digest.hexdigest()


class ImageFiles:
    """Image files below one folder.

    Their paths lie end to end in one byte buffer: a list of a million str would be copied into every worker process,
    page by page, as its reference counts change.
    """

    def __init__(
        self,
        root: Path,
        paths: Iterable[str],
        channels: int,
        *,
        exif: str = "apply",
        value_range: Range | None = None,
        advice: str = "",
    ) -> None:
        """``exif``: apply or ignore the orientation that files state (:mod:`toolkit.data.orientation`).

        ``value_range``: of samples with more than 8 bits, see :mod:`toolkit.data.value_range`. ``advice`` ends the
        messages
        about bad images.
        """
        self.root, self.mode = str(root), MODES[channels]
        self.exif, self.value_range, self.advice = exif, value_range, advice
        buffer, ends = bytearray(), [0]
        for path in paths:
            buffer += os.fsencode(path)
            ends.append(len(buffer))
        self._buffer = np.frombuffer(bytes(buffer), dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, i: int) -> str:
        """Path of image i relative to the folder, encoded."""
        return encode_name(self._relative(i))

    def path(self, i: int) -> str:
        """Path of image i, as the system knows it."""
        return os.path.join(self.root, self._relative(i))

    def _relative(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(self._buffer[self._ends[i] : self._ends[i + 1]].tobytes())

    def with_range(self, value_range: Range | None) -> ImageFiles:
        """The same images with another range of values."""
        other = copy.copy(self)
        other.value_range = value_range
        return other

    def load(self, i: int) -> Image.Image:
        """Read and decode image i. Raises BadImage for a missing, empty, truncated or non-image file."""
        return as_picture(self.decoded(i))

    def decoded(self, i: int) -> Image.Image | Tensor:
        """The same, as bytes uint8 [h, w, 3] where it came so from the decoder."""
        try:
            with _open(self.path(i)) as file:
                data = file.read()
            pixels = decode_jpeg(data) if self.mode == "RGB" else None
            if pixels is None:
                return self._decoded_by_pillow(data)
            turn = jpeg_turn(data) if self.exif == "apply" else None
            return torch.from_numpy(pixels) if turn is None else Image.fromarray(pixels).transpose(turn)
        except Exception as error:  # a damaged file can make a decoder raise nearly anything
            raise self._fault(error, i) from error

    def _decoded_by_pillow(self, data: bytes) -> Image.Image:
        with Image.open(io.BytesIO(data)) as image:
            kind, value_range = sample_kind(image), FULL if states_maximum(image) else self.value_range
            upright = load_oriented(image, apply=self.exif == "apply")
            if kind is not None:
                upright = to_bytes(upright, kind, value_range)
            return to_mode(upright, self.mode)

    def identity(self, indices: npt.NDArray[np.int64]) -> str:
        """SHA-256 of relative paths, sizes and times of change, and of the content of some of the files.

        The folder's own place does not count: a copy that keeps the times is the same data. Raises BadImage.
        """
        digest = hashlib.sha256(f"{len(indices)} {self.mode} {self.exif} {self.value_range}".encode())
        sampled = set(np.linspace(0, len(indices) - 1, min(SAMPLED, len(indices)), dtype=np.int64).tolist())
        for number, i in enumerate(indices.tolist()):
            try:
                state = os.stat(self.path(i))
                digest.update(os.fsencode(self._relative(i)) + f"\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
                if number in sampled:
                    digest.update(Path(self.path(i)).read_bytes())
            except OSError as error:
                raise self._fault(error, i) from error
        return digest.hexdigest()

    def check(self, i: int, *, decode: bool = False) -> Extent | None:
        """Raise BadImage where image i is bad as far as its first and last bytes tell, without decoding all of it.

        Finds missing and empty files, files that are no image, and truncated JPEG and PNG files. A file without its
        format's end mark may only have something appended: it is decoded to be sure. With ``decode`` every file is.

        Returns the extent of the values of an image that has more than 8 bits per sample, where no range of values has
        been set; for that it is decoded.
        """
        try:
            with _open(self.path(i)) as file, Image.open(file) as image:
                end = {"JPEG": JPEG_END, "PNG": PNG_END}.get(image.format or "", b"")
                is_settled = self.value_range is not None or states_maximum(image)
                kind = None if is_settled else sample_kind(image)
                if kind is not None:
                    image.load()
                    return extent_of(image, kind, self.name(i))
                file.seek(-len(end), os.SEEK_END)
                is_whole = file.read() == end
        except Exception as error:
            raise self._fault(error, i) from error
        if decode or not is_whole:
            self.load(i)
        return None

    def _fault(self, error: Exception, i: int) -> RunFailed:
        """What to raise for a file that could not be read: BadImage, or RunFailed where the machine is to blame."""
        name, path = self.name(i), self.path(i)
        number = error.errno if isinstance(error, OSError) else None  # Pillow's own OSErrors have none
        if isinstance(error, MemoryError) or (number is not None and number not in _FILE_FAULTS):
            return RunFailed(f"{encode_name(path)} could not be read: {error or type(error).__name__}")
        return UnreadableImageError(name, _reason(error, number, path), self.advice)


def as_picture(decoded: Image.Image | Tensor) -> Image.Image:
    """What :meth:`ImageSource.decoded` gives, as a Pillow image."""
    return Image.fromarray(decoded.numpy()) if isinstance(decoded, Tensor) else decoded


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode fully and convert to RGB or L: palettes resolved, alpha dropped.

    Colour becomes greyscale by the usual luma weights (0.299, 0.587, 0.114). Samples of more than 8 bits are taken as
    16-bit ones, which their values must confirm (:func:`toolkit.data.value_range.to_bytes`).
    """
    kind = sample_kind(image)
    image.load()
    if kind is not None:
        image = to_bytes(image, kind, None)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the way to RGB that Pillow asks for
    return image if image.mode == mode else image.convert(mode)


class Checked(NamedTuple):
    """What :func:`check_images` has found."""

    bad: list[tuple[int, str]]
    """Index and reason of each bad image, in the order given."""
    extents: list[Extent]
    """Values of the images with more than 8 bits per sample, one for each kind; only where no range has been set."""


def check_images(
    images: ImageSource,
    indices: npt.NDArray[np.int64],
    *,
    decode: bool,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Checked:
    """Look for bad images among these.

    decode=False looks at the first and last bytes (see :meth:`ImageFiles.check`); decode=True decodes every image, and
    so finds all that training would find. ``threads`` defaults to the CPUs granted. ``progress`` is called with the
    number of images done, now and then.
    """
    if not isinstance(images, ImageFiles):  # an array
        return Checked([], [])

    def look(i: int) -> Extent | str | None:
        try:
            return images.check(i, decode=decode)
        except UnreadableImageError as error:
            return error.reason

    bad: list[tuple[int, str]] = []
    extents: list[Extent] = []
    with ThreadPoolExecutor(threads or available_cpus()) as pool:  # decoders release the interpreter lock
        for start in range(0, len(indices), 1024):
            chunk = [int(i) for i in indices[start : start + 1024]]
            found = list(pool.map(look, chunk))
            bad += [(i, one) for i, one in zip(chunk, found, strict=True) if isinstance(one, str)]
            extents = joined([*extents, *(one for one in found if isinstance(one, Extent))])
            progress(start + len(chunk))
    return Checked(bad, extents)


def _open(path: str) -> BinaryIO:
    """Open an image file. What is not a file is refused: opening a pipe would wait until somebody writes to it."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), path)
    return open(path, "rb")


def _reason(error: Exception, number: int | None, path: str) -> str:
    """What is wrong with a file; ``number`` is the system's, where it has refused to read it."""
    if number in _FILE_FAULTS:
        return _FILE_FAULTS[number]
    if isinstance(error, UnclearValues):
        return str(error)
    if os.path.getsize(path) == 0:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return escape_control_characters(f"damaged ({str(error) or type(error).__name__})")
