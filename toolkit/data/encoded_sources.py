"""Sources of encoded images: files in a folder, or other storage that returns the bytes of an image by its number."""

from __future__ import annotations

import errno
import io
import os
import stat
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from toolkit.filenames import encode_name


class EncodedSource(Protocol):
    """A numbered collection of encoded images (JPEG, PNG, ...), shared with data workers when they are forked.

    :class:`toolkit.data.image_sources.EncodedImages` decodes them. ``open``, and reading from the file it returns, may
    raise any exception: an OSError whose errno means a missing or forbidden file is a fault of the image, an OSError
    with another errno a fault of the system, and every other exception means a damaged image.
    """

    def __len__(self) -> int: ...

    def open(self, i: int) -> BinaryIO:
        """Return the bytes of image i as a seekable file. Data workers and threads may call this at the same time."""
        ...

    def name(self, i: int) -> str:
        """Return the name of image i for messages and files, encoded by :func:`toolkit.filenames.encode_name`.

        No two images have the same name.
        """
        ...

    def location(self, i: int) -> str:
        """Return where image i is stored, for messages about system errors; encoded like the name."""
        ...

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the size of image i in bytes, and a version: an int64 that changes if its content changes.

        The version is a modification time in nanoseconds or a digest. Raises OSError.
        """
        ...


def read_bytes(source: EncodedSource, i: int) -> bytes:
    """Return the encoded bytes of image i."""
    with source.open(i) as file:
        return file.read()


class PackedStrings:
    """A list of strings stored end to end in one byte buffer.

    Worker processes share its memory. Of a list of str each worker would get its own copy, page by page, because
    reference counts are written even when an element is only read.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._buffer: bytearray | npt.NDArray[np.uint8] = bytearray()
        self._ends: array[int] | npt.NDArray[np.int64] = array("q", [0])
        for string in strings:
            self.append(string)

    @classmethod
    def from_arrays(cls, buffer: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> PackedStrings:
        """Return the strings of arrays returned by :meth:`arrays`, without a copy; nothing can be appended to it."""
        strings = cls()
        strings._buffer, strings._ends = buffer, ends
        return strings

    def arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return the bytes of all strings, uint8, and the offset of each string and of the end, int64 [N + 1]."""
        return np.frombuffer(self._buffer, dtype=np.uint8), np.frombuffer(self._ends, dtype=np.int64)

    def append(self, string: str) -> None:
        """Append a string."""
        assert isinstance(self._buffer, bytearray)
        assert isinstance(self._ends, array)
        self._buffer += os.fsencode(string)
        self._ends.append(len(self._buffer))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(bytes(self._buffer[self._ends[i] : self._ends[i + 1]]))


class ImageFiles:
    """Image files below one folder; implements :class:`EncodedSource`."""

    def __init__(self, root: Path, paths: Iterable[str] | PackedStrings) -> None:
        """``paths`` are relative to ``root``."""
        self.root = str(root)
        self._paths = paths if isinstance(paths, PackedStrings) else PackedStrings(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, i: int) -> str:
        """Return the path of image i, not encoded, for opening it."""
        return os.path.join(self.root, self._paths[i])

    def open(self, i: int) -> BinaryIO:
        """Open the file. Raises OSError for pipes, sockets and devices, because opening a pipe may block forever."""
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


class PackedImages:
    """Encoded images stored end to end in one byte array, such as a memory-mapped file; an EncodedSource."""

    def __init__(
        self,
        data: npt.NDArray[np.uint8],
        ends: npt.NDArray[np.int64],
        names: PackedStrings,
        versions: npt.NDArray[np.int64],
        *,
        location: str,
    ) -> None:
        """``data``: uint8 [bytes]. ``ends``: end offset of each image in it, int64 [N]; image 0 starts at 0.

        ``names``: see :meth:`EncodedSource.name`, but not encoded. ``versions``: see
        :meth:`EncodedSource.size_and_version`, int64 [N]. ``location``: the file that contains all images.
        """
        self._data, self._ends, self._names = data, ends, names
        self._versions, self._location = versions, location

    def __len__(self) -> int:
        return len(self._ends)

    def _range(self, i: int) -> tuple[int, int]:
        return int(self._ends[i - 1]) if i else 0, int(self._ends[i])

    def open(self, i: int) -> BinaryIO:
        """Return the bytes of image i as an in-memory file."""
        start, end = self._range(i)
        return io.BytesIO(self._data[start:end].tobytes())

    def name(self, i: int) -> str:
        """Return the name of image i, encoded."""
        return encode_name(self._names[i])

    def location(self, i: int) -> str:
        """Return the path of the file that contains all images."""
        return encode_name(self._location)

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the size of image i in bytes, and its version."""
        start, end = self._range(i)
        return end - start, int(self._versions[i])


class PartIndex:
    """Numbers that run through several parts, one after the other, as those of torch's ConcatDataset."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """``sizes``: number of elements of each part."""
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """Return the number of the part that contains element i, and the element's index in it."""
        part = int(np.searchsorted(self._ends, i, side="right"))
        return part, i - (int(self._ends[part - 1]) if part else 0)


class JoinedImages:
    """The concatenated images of several sources; an EncodedSource."""

    def __init__(self, sources: Mapping[str, EncodedSource]) -> None:
        """``sources``: by the prefix that is added to the names of their images."""
        self._prefixes, self._sources = [encode_name(prefix) for prefix in sources], list(sources.values())
        self._index = PartIndex([len(source) for source in self._sources])

    def __len__(self) -> int:
        return len(self._index)

    def open(self, i: int) -> BinaryIO:
        """Open image i in its source."""
        at, own = self._index.locate(i)
        return self._sources[at].open(own)

    def name(self, i: int) -> str:
        """Return the name of image i in its source, after the source's prefix."""
        at, own = self._index.locate(i)
        return f"{self._prefixes[at]}/{self._sources[at].name(own)}"

    def location(self, i: int) -> str:
        """Return where the source stores image i."""
        at, own = self._index.locate(i)
        return self._sources[at].location(own)

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the size in bytes and the version of image i, from its source."""
        at, own = self._index.locate(i)
        return self._sources[at].size_and_version(own)
