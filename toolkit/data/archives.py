"""Zip and tar files that are read in place: listed like folders, and read at the offsets of their members.

Nothing is unpacked. Only zip files whose members are stored or deflated and tar files that are not compressed can be
read at any place; others are refused.
"""

from __future__ import annotations

import io
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np

from toolkit.data.encoded_sources import PackedStrings
from toolkit.errors import UserError
from toolkit.filenames import encode_name

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Header before each member of a zip file: signature, and the lengths of the name and of the extra field after it."""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    kind: str
    """file, folder or special (links, devices)."""
    offset: int
    """Where its bytes begin; in a zip file, where the header before them begins."""
    stored: int
    """Number of bytes in the archive."""
    size: int
    """Number of bytes after decompression."""
    crc: int
    """CRC-32 of the decompressed bytes; 0 in a tar file, which has none."""
    is_deflated: bool = False


class Archive:
    """The index of a zip or tar file."""

    def __init__(self, path: str) -> None:
        """Read the index. Raises UserError if the file is no archive, cut short, or cannot be read at any place."""
        self.path, self.is_zip = path, False
        self.folders: dict[str, dict[str, str]] = {"": {}}
        """The entries of each folder: the kind of each name. The folder "" is the archive itself."""
        self.numbers: dict[str, int] = {"": 0}
        """Number of each folder."""
        self.rows: dict[str, int] = {}
        """Row of each file in the arrays below."""
        self.offsets, self.stored, self.sizes, self.checksums = array("q"), array("q"), array("q"), array("q")
        self.deflated = bytearray()
        try:
            for member in self._members():
                self._add(member)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
            raise UserError(f"the archive {path} is damaged or cut short: {error}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        length = os.path.getsize(path)
        if any(offset + stored > length for offset, stored in zip(self.offsets, self.stored, strict=True)):
            raise UserError(f"the archive {path} is cut short: some of its files lie beyond its end")

    def _members(self) -> Iterator[Member]:
        with open(self.path, "rb") as file:
            head = file.read(512)
        for magic, method in _COMPRESSED.items():
            if head.startswith(magic):
                raise UserError(
                    f"{self.path} is compressed as a whole ({method}), so that single images cannot be read from it: "
                    "unpack it, or make a zip file or a tar file without compression"
                )
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            self.is_zip = True
            return _zip_members(self.path)
        try:
            archive = tarfile.open(self.path, "r:")  # noqa: SIM115 (closed by the generator)
        except tarfile.ReadError:
            raise UserError(f"{self.path} is neither a folder nor a zip or tar file") from None
        return _tar_members(archive, self.path)

    def _add(self, member: Member) -> None:
        name = posixpath.normpath(member.name.lstrip("/"))
        if name == "." or name.startswith("../"):
            return
        folder, _, last = name.rpartition("/")
        if member.kind == "folder":
            self._add_folder(name)
            return
        self._add_folder(folder)
        self.folders[folder][last] = member.kind
        if member.kind == "file":  # of several members with one name the last one counts, as when unpacking
            self.rows[name] = len(self.offsets)
            self.offsets.append(member.offset)
            self.stored.append(member.stored)
            self.sizes.append(member.size)
            self.checksums.append(member.crc)
            self.deflated.append(member.is_deflated)

    def _add_folder(self, folder: str) -> None:
        if folder not in self.folders:
            parent, _, last = folder.rpartition("/")
            self._add_folder(parent)
            self.folders[parent][last] = "folder"
            self.folders[folder], self.numbers[folder] = {}, len(self.numbers)


def _zip_members(path: str) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = "folder" if info.is_dir() else "special" if (info.external_attr >> 28) == 0xA else "file"
            if kind == "file" and (info.flag_bits & 1 or info.compress_type not in (0, zipfile.ZIP_DEFLATED)):
                how = "encrypted" if info.flag_bits & 1 else f"compressed with method {info.compress_type}"
                raise UserError(
                    f"{info.filename} in {path} is {how}: only zip files that are stored or deflated, without a "
                    "password, can be read"
                )
            is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
            place = info.header_offset, info.compress_size, info.file_size, info.CRC
            yield Member(info.filename, kind, *place, is_deflated)


def _tar_members(archive: tarfile.TarFile, path: str) -> Iterator[Member]:
    with archive:
        places: dict[str, tuple[int, int]] = {}
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else all stay in memory
            is_link = info.islnk() and info.linkname in places
            if info.isreg() and not info.issparse():
                places[info.name] = info.offset_data, info.size
            offset, size = places[info.linkname] if is_link else (info.offset_data, info.size)
            kind = "folder" if info.isdir() else "file" if info.name in places or is_link else "special"
            yield Member(info.name, kind, offset, size, size, 0)
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(f"the archive {path} is damaged or cut short: it has no end mark after its last file")


@lru_cache
def _open_archive(path: str, size: int, changed: int) -> Archive:
    return Archive(path)


def find_archive(path: str | os.PathLike[str]) -> tuple[Archive, str] | None:
    """Return the archive that a path leads into, and the folder in it; None if no part of the path is a file.

    Raises UserError for a file that is no archive, and for a folder that is not in it. An index is kept until
    :func:`forget_archives` is called.
    """
    archive, inner = os.fspath(path), ""
    while archive and not os.path.isfile(archive):
        archive, _, last = archive.rpartition(os.sep)
        inner = posixpath.join(last, inner) if inner else last
    if not archive:
        return None
    state = os.stat(archive)
    found = _open_archive(archive, state.st_size, state.st_mtime_ns)
    if inner not in found.folders:
        raise UserError(f"there is no folder {inner} in {archive}")
    return found, inner


def forget_archives() -> None:
    """Free the memory of all indices."""
    _open_archive.cache_clear()


class ArchiveImages:
    """Images in a zip or tar file; an :class:`toolkit.data.encoded_sources.EncodedSource`.

    Reads have their own position in the file, so that processes and threads can share it.
    """

    def __init__(self, archive: Archive, folder: str, paths: Iterable[str]) -> None:
        """``paths`` are relative to ``folder`` in the archive."""
        self._names = PackedStrings(paths)
        prefix = f"{folder}/" if folder else ""
        rows = np.array([archive.rows[prefix + self._names[i]] for i in range(len(self._names))], dtype=np.int64)
        self._folder, self._is_zip = f"{archive.path}/{prefix}", archive.is_zip
        self._offsets, self._stored, self._sizes, self._checksums = (
            np.frombuffer(values, dtype=np.int64)[rows]
            for values in (archive.offsets, archive.stored, archive.sizes, archive.checksums)
        )
        self._deflated = np.frombuffer(archive.deflated, dtype=np.uint8)[rows]
        self._changed = os.stat(archive.path).st_mtime_ns
        self._file = open(archive.path, "rb", buffering=0)  # noqa: SIM115 (open as long as the images are used)

    def __len__(self) -> int:
        return len(self._names)

    def open(self, i: int) -> BinaryIO:
        """Return the bytes of image i as a file in memory. Raises ValueError if they are damaged."""
        start, stored = int(self._offsets[i]), int(self._stored[i])
        if self._is_zip:
            signature, name, extra = _LOCAL_HEADER.unpack(self._read(start, _LOCAL_HEADER.size))
            if signature != b"PK\x03\x04":
                raise ValueError("not at its place in the archive")
            start += _LOCAL_HEADER.size + name + extra
        data = self._read(start, stored)
        if self._deflated[i]:
            data = zlib.decompress(data, -zlib.MAX_WBITS, int(self._sizes[i]))
        if self._is_zip and zlib.crc32(data) != self._checksums[i]:
            raise ValueError("its checksum in the archive differs")
        return io.BytesIO(data)

    def _read(self, start: int, count: int) -> bytes:
        data = os.pread(self._file.fileno(), count, start)
        if len(data) < count:
            raise ValueError("the archive is cut short")
        return data

    def name(self, i: int) -> str:
        """Return the path of image i relative to the folder, encoded."""
        return encode_name(self._names[i])

    def location(self, i: int) -> str:
        """Return the path of the archive and of image i in it, encoded."""
        return encode_name(self._folder + self._names[i])

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the size of image i in bytes, and its checksum; in a tar file, when the archive was changed."""
        return int(self._sizes[i]), int(self._checksums[i]) if self._is_zip else self._changed
