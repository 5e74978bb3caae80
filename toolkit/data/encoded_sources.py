"""Where the bytes of encoded images come from: files below a folder, or another place that gives them by number."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from toolkit.filenames import encode_name


class EncodedSource(Protocol):
    """A numbered collection of encoded images (JPEG, PNG, ...), shared with data workers when they are forked.

    :class:`toolkit.data.image_sources.EncodedImages` decodes them. ``open``, and reading what it returns, may raise any
    exception: an OSError with the errno of a missing or forbidden file means a fault of the image, one with another
    errno a fault of the system, and every other exception a damaged image.
    """

    def __len__(self) -> int: ...

    def open(self, i: int) -> BinaryIO:
        """Open the bytes of image i, seekable. Data workers and threads call this at the same time."""
        ...

    def name(self, i: int) -> str:
        """Return the name of image i for messages and files, encoded by :func:`toolkit.filenames.encode_name`.

        No two images have the same name.
        """
        ...

    def location(self, i: int) -> str:
        """Return where image i is stored, for messages about faults of the system; encoded like the name."""
        ...

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the size of image i in bytes and an int64 that changes with its content.

        The version is a modification time in nanoseconds or a digest. Raises OSError.
        """
        ...


def read_bytes(source: EncodedSource, i: int) -> bytes:
    """Return all bytes of image i."""
    with source.open(i) as file:
        return file.read()


class PackedStrings:
    """Strings stored end to end in one byte buffer.

    A list of a million str would be copied into every worker process, page by page, as its reference counts change.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        buffer, ends = bytearray(), [0]
        for string in strings:
            buffer += os.fsencode(string)
            ends.append(len(buffer))
        self._buffer = np.frombuffer(bytes(buffer), dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(self._buffer[self._ends[i] : self._ends[i + 1]].tobytes())


class ImageFiles:
    """Image files below one folder; an :class:`EncodedSource`."""

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        """``paths`` are relative to ``root``."""
        self.root, self._paths = str(root), PackedStrings(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, i: int) -> str:
        """Return the path of image i for the file system."""
        return os.path.join(self.root, self._paths[i])

    def open(self, i: int) -> BinaryIO:
        """Open the file. Raises OSError for pipes, sockets and devices: opening a pipe would block until a write."""
        path = self.path(i)
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), path)
        return open(path, "rb")

    def name(self, i: int) -> str:
        """Return the path of image i relative to the folder, encoded."""
        return encode_name(self._paths[i])

    def location(self, i: int) -> str:
        """Return the path of image i, encoded."""
        return encode_name(self.path(i))

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the file's size in bytes and its modification time in nanoseconds. Raises OSError."""
        state = os.stat(self.path(i))
        return state.st_size, state.st_mtime_ns
