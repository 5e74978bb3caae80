"""Reading images from zip and tar files in place: members are listed like folders and read at their offsets.

Nothing is unpacked. Only zip files with stored or deflated members and uncompressed tar files allow random access;
others are refused.
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
"""Local header before each member of a zip file: signature, then the lengths of the name and the extra field."""


FOLDER, SPECIAL = -1, -2
"""Entries of folders that are not files; special: links and devices."""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    kind: str
    """"file", "folder" or "special" (links, devices)."""
    offset: int
    """Offset of its first byte; in a zip file, of its local header."""
    stored: int
    """Size in the archive, in bytes."""
    size: int
    """Size after decompression, in bytes."""
    crc: int
    """CRC-32 of the decompressed bytes; 0 for tar files, which have none."""
    is_deflated: bool = False


class Archive:
    """The index of a zip or tar file."""

    def __init__(self, path: str) -> None:
        """Read the index. Raises UserError if the file is not an archive, is truncated, or lacks random access."""
        self.path, self.is_zip = path, False
        self.folders: dict[str, dict[str, int]] = {"": {}}
        """Entries of each folder by name: the row of a file in the arrays below, FOLDER or SPECIAL.

        The folder "" is the top of the archive.
        """
        self.numbers: dict[str, int] = {"": 0}
        """Number of each folder by path."""
        self.offsets, self.stored, self.sizes, self.checksums = array("q"), array("q"), array("q"), array("q")
        self.deflated = bytearray()
        try:
            for member in self._members():
                self._add(member)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
            raise UserError(f"the archive {path} is damaged or truncated: {error}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        length = os.path.getsize(path)
        if any(offset + stored > length for offset, stored in zip(self.offsets, self.stored, strict=True)):
            raise UserError(f"the archive {path} is truncated: some of its files lie beyond its end")

    def row(self, path: str) -> int:
        """Return the row of a file in the arrays."""
        folder, _, name = path.rpartition("/")
        return self.folders[folder][name]

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
        self.folders[folder][last] = SPECIAL
        if member.kind == "file":  # if several members have the same path, the last one is used, as when unpacking
            self.folders[folder][last] = len(self.offsets)
            self.offsets.append(member.offset)
            self.stored.append(member.stored)
            self.sizes.append(member.size)
            self.checksums.append(member.crc)
            self.deflated.append(member.is_deflated)

    def _add_folder(self, folder: str) -> None:
        if folder not in self.folders:
            parent, _, last = folder.rpartition("/")
            self._add_folder(parent)
            self.folders[parent][last] = FOLDER
            self.folders[folder], self.numbers[folder] = {}, len(self.numbers)


def _zip_members(path: str) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        archive.NameToInfo.clear()
        infos = archive.filelist[::-1]
        archive.filelist.clear()
        while infos:  # each one is freed when it was read: those of a million files take 700 MB
            info = infos.pop()
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
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them in memory
            is_link = info.islnk() and info.linkname in places
            if info.isreg() and not info.issparse():
                places[info.name] = info.offset_data, info.size
            offset, size = places[info.linkname] if is_link else (info.offset_data, info.size)
            kind = "folder" if info.isdir() else "file" if info.name in places or is_link else "special"
            yield Member(info.name, kind, offset, size, size, 0)
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(f"the archive {path} is damaged or truncated: it has no end marker after its last file")


@lru_cache
def _open_archive(path: str, size: int, changed: int) -> Archive:
    return Archive(path)


def find_archive(path: str | os.PathLike[str]) -> tuple[Archive, str] | None:
    """Return the archive that contains a path, and the folder inside it; None if no parent of the path is a file.

    Raises UserError if that file is not an archive or does not contain the folder. The index of an archive stays in
    memory until :func:`forget_archives` is called.
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
    """Free the memory of the indices of all archives."""
    _open_archive.cache_clear()


class ArchiveImages:
    """Images in a zip or tar file; implements :class:`toolkit.data.encoded_sources.EncodedSource`.

    Each read states its own file position, so that processes and threads can share the open file.
    """

    def __init__(self, archive: Archive, folder: str, paths: Iterable[str]) -> None:
        """``paths`` are relative to ``folder`` in the archive."""
        self._names = PackedStrings(paths)
        prefix = f"{folder}/" if folder else ""
        rows = np.array([archive.row(prefix + self._names[i]) for i in range(len(self._names))], dtype=np.int64)
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
        """Return the bytes of image i as an in-memory file. Raises ValueError if they are damaged."""
        start, stored = int(self._offsets[i]), int(self._stored[i])
        if self._is_zip:
            signature, name, extra = _LOCAL_HEADER.unpack(self._read(start, _LOCAL_HEADER.size))
            if signature != b"PK\x03\x04":
                raise ValueError("not at its expected position in the archive")
            start += _LOCAL_HEADER.size + name + extra
        data = self._read(start, stored)
        if self._deflated[i]:
            data = zlib.decompress(data, -zlib.MAX_WBITS, int(self._sizes[i]))
        if self._is_zip and zlib.crc32(data) != self._checksums[i]:
            raise ValueError("its checksum does not match the one in the archive")
        return io.BytesIO(data)

    def _read(self, start: int, count: int) -> bytes:
        data = os.pread(self._file.fileno(), count, start)
        if len(data) < count:
            raise ValueError("the archive is truncated")
        return data

    def name(self, i: int) -> str:
        """Return the path of image i relative to the folder, encoded (:mod:`toolkit.filenames`)."""
        return encode_name(self._names[i])

    def location(self, i: int) -> str:
        """Return the path of the archive followed by that of image i in it, encoded."""
        return encode_name(self._folder + self._names[i])

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the size of image i in bytes, and its checksum or, for a tar file, the archive's modification time."""
        return int(self._sizes[i]), int(self._checksums[i]) if self._is_zip else self._changed
