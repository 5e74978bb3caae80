"""Collections of images that are cheap to share between processes: one array or one flat index, no object an image."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from toolkit.data.cpus import granted_cpus
from toolkit.data.jpeg import decode_jpeg
from toolkit.errors import RunFailed

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a number of channels."""

_FILE_FAULTS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.ENAMETOOLONG: "a path that is too long",
    errno.ELOOP: "a circle of links",
    errno.EISDIR: "a folder, not a file",
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


class BadImage(RunFailed):
    """A file that is no readable image: ``name`` says which, ``reason`` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        """Two arguments, not the message: the exception must survive the way out of a worker process."""
        return BadImage, (self.name, self.reason)


class Images(Protocol):
    """A numbered collection of images."""

    def __len__(self) -> int: ...

    def load(self, i: int) -> Image.Image:
        """Image i, fully decoded, in mode RGB or L. Raises BadImage."""
        ...

    def decoded(self, i: int) -> Image.Image | Tensor:
        """The same; or, where that is how it is at hand, its bytes: uint8 [h, w, 3], not to be written to."""
        ...

    def name(self, i: int) -> str:
        """What image i is called in messages and lists: a path relative to the data's folder, or the like."""
        ...

    def identity(self, indices: npt.NDArray[np.int64]) -> str:
        """A hash of these images, in order, by which they are known again: another if any of them has changed."""
        ...


class ArrayImages:
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


class FileImages:
    """Image files below one folder.

    Their paths lie end to end in one byte buffer: a list of a million str would be copied into every worker process,
    page by page, as its reference counts change. EXIF orientation is not applied, as in torchvision's data sets.
    """

    def __init__(self, root: Path, paths: Iterable[str], channels: int) -> None:
        self.root, self.mode = str(root), MODES[channels]
        buffer, ends = bytearray(), [0]
        for path in paths:
            buffer += os.fsencode(path)
            ends.append(len(buffer))
        self._buffer = np.frombuffer(bytes(buffer), dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, i: int) -> str:
        """Path of image i relative to the folder."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(self._buffer[self._ends[i] : self._ends[i + 1]].tobytes())

    def path(self, i: int) -> str:
        """Path of image i."""
        return os.path.join(self.root, self.name(i))

    def load(self, i: int) -> Image.Image:
        """Read and decode image i. Raises BadImage for a missing, empty, truncated or non-image file."""
        return as_picture(self.decoded(i))

    def decoded(self, i: int) -> Image.Image | Tensor:
        """The same, as bytes uint8 [h, w, 3] where it came so from the decoder."""
        try:
            with open(self.path(i), "rb") as file:
                data = file.read()
            pixels = decode_jpeg(data) if self.mode == "RGB" else None
            if pixels is not None:
                return torch.from_numpy(pixels)
            with Image.open(io.BytesIO(data)) as image:
                return to_mode(image, self.mode)
        except Exception as error:  # a damaged file can make a decoder raise nearly anything
            raise _fault(error, self.name(i), self.path(i)) from error

    def identity(self, indices: npt.NDArray[np.int64]) -> str:
        """SHA-256 of relative paths, sizes and times of change, and of the content of some of the files.

        The folder's own place does not count: a copy that keeps the times is the same data. Raises BadImage.
        """
        digest = hashlib.sha256(f"{len(indices)} {self.mode}".encode())
        sampled = set(np.linspace(0, len(indices) - 1, min(SAMPLED, len(indices)), dtype=np.int64).tolist())
        for number, i in enumerate(indices.tolist()):
            try:
                state = os.stat(self.path(i))
                digest.update(os.fsencode(self.name(i)) + f"\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
                if number in sampled:
                    digest.update(Path(self.path(i)).read_bytes())
            except OSError as error:
                raise _fault(error, self.name(i), self.path(i)) from error
        return digest.hexdigest()

    def check(self, i: int) -> None:
        """Raise BadImage where image i is bad as far as its first and last bytes tell, without decoding all of it.

        Finds missing and empty files, files that are no image, and truncated JPEG and PNG files. A file without its
        format's end mark may only have something appended: it is decoded to be sure.
        """
        try:
            with open(self.path(i), "rb") as file, Image.open(file) as image:
                end = {"JPEG": JPEG_END, "PNG": PNG_END}.get(image.format or "", b"")
                file.seek(-len(end), os.SEEK_END)
                is_whole = file.read() == end
        except Exception as error:
            raise _fault(error, self.name(i), self.path(i)) from error
        if not is_whole:
            self.load(i)


def as_picture(decoded: Image.Image | Tensor) -> Image.Image:
    """What :meth:`Images.decoded` gives, as a Pillow image."""
    return Image.fromarray(decoded.numpy()) if isinstance(decoded, Tensor) else decoded


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode fully and convert to RGB or L: palettes resolved, alpha dropped, 16-bit greyscale scaled to 8 bits.

    Colour becomes greyscale by the usual luma weights (0.299, 0.587, 0.114).
    """
    image.load()
    if image.mode.startswith("I"):  # Pillow would clip values over 255 instead
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the way to RGB that Pillow asks for
    return image if image.mode == mode else image.convert(mode)


def check_images(
    images: Images,
    indices: npt.NDArray[np.int64],
    *,
    decode: bool,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[int, str]]:
    """The bad ones among these images, as (index, reason) in the order given.

    decode=False looks at the first and last bytes (see :meth:`FileImages.check`); decode=True decodes every image, and
    so finds all that training would find. ``threads`` defaults to the CPUs granted. ``progress`` is called with the
    number of images done, now and then.
    """
    look: Callable[[int], object]
    if decode:
        look = images.load
    elif isinstance(images, FileImages):
        look = images.check
    else:
        return []

    def reason(i: int) -> str | None:
        try:
            look(i)
        except BadImage as error:
            return error.reason
        return None

    bad: list[tuple[int, str]] = []
    with ThreadPoolExecutor(threads or granted_cpus()) as pool:  # decoders release the interpreter lock
        for start in range(0, len(indices), 1024):
            chunk = [int(i) for i in indices[start : start + 1024]]
            bad += [(i, why) for i, why in zip(chunk, pool.map(reason, chunk), strict=True) if why is not None]
            progress(start + len(chunk))
    return bad


def _fault(error: Exception, name: str, path: str) -> RunFailed:
    """What to raise for a file that could not be read: BadImage, or RunFailed where the machine is to blame."""
    number = error.errno if isinstance(error, OSError) else None  # Pillow's own OSErrors have none
    if isinstance(error, MemoryError) or (number is not None and number not in _FILE_FAULTS):
        return RunFailed(f"{path} could not be read: {error or type(error).__name__}")
    if number in _FILE_FAULTS:
        return BadImage(name, _FILE_FAULTS[number])
    if os.path.getsize(path) == 0:
        return BadImage(name, "an empty file")
    if isinstance(error, UnidentifiedImageError):
        return BadImage(name, "not an image of a known format")
    return BadImage(name, f"damaged ({str(error) or type(error).__name__})")
