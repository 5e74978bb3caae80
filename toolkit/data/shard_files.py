"""Reading bytes from shards: in a folder, or copied to a folder of limited size, from a URL or from Parquet files.

fsspec's own caches (``filecache``, ``simplecache``) neither limit their size nor use locks between processes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from toolkit.data.shard_index import Shard
from toolkit.data.table_files import read_encoded
from toolkit.errors import UserError, first_line
from toolkit.locks import held, is_held

KEPT_OPEN = 256
"""Number of local shards that each process keeps open; others are opened again for every image."""

KEPT = ("*.tar", "*.parquet", "*.images")
"""Patterns for the files in the cache folder: downloaded shards, and images copied from Parquet shards."""

PAUSES_S = (1.0, 5.0)
"""Seconds to wait before the second and the third attempt to download a shard."""


class LocalShards:
    """Shards in a folder; data workers and threads may read at the same time."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Raises UserError if a shard is missing or its size differs from the one in ``shards``."""
        self.folder, self.shards = folder, shards
        self._open: dict[int, BinaryIO] = {}
        for shard in shards:
            try:
                size = os.stat(folder / shard.name).st_size
            except OSError as error:
                raise UserError(f"the shard {folder / shard.name} cannot be read: {error.strerror}") from None
            if size != shard.size:
                raise UserError(
                    f"the shard {folder / shard.name} has {size:,} bytes instead of {shard.size:,}: it was truncated "
                    "or replaced; copy it again"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the open files, which cannot be pickled."""
        return {**self.__dict__, "_open": {}}

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a shard from ``offset``; fewer if the shard ends before. Raises OSError."""
        file = self._open.get(number)
        if file is None:
            file = self.open(number)
            if len(self._open) < KEPT_OPEN:
                file = self._open.setdefault(number, file)  # another thread may have opened it as well
        return os.pread(file.fileno(), size, offset)

    def open(self, number: int) -> BinaryIO:
        """Open a shard for reading. Raises OSError."""
        return open(self.folder / self.shards[number].name, "rb", buffering=0)

    def location(self, number: int) -> str:
        """Return the path of a shard, for messages."""
        return str(self.folder / self.shards[number].name)


class FetchedShards:
    """Shards at a URL: each is downloaded whole when it is first needed, and kept in a folder.

    All processes of a machine share the folder. One of them downloads a shard, under a lock, and gives the file its
    final name only after its size and checksum have been verified. The least recently used shards are removed to make
    room for others; a process that is reading a removed shard still has it open.
    """

    def __init__(self, url: str, shards: Sequence[Shard], folder: Path, limit: int | None) -> None:
        """``limit``: maximum size of the folder in bytes; None: half of the disk space that its shards leave free."""
        self.url, self.shards, self.folder, self._limit = url.rstrip("/"), shards, folder, limit

    @property
    def limit(self) -> int:
        """Maximum size in bytes of all shards in the folder."""
        if self._limit is not None:
            return self._limit
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = sum(state.st_size for _, state in _files(self.folder, *KEPT))
        return (shutil.disk_usage(self.folder).free + kept) // 2

    def path(self, number: int) -> Path:
        """Return the local path of a shard; its name changes if the content changes."""
        shard = self.shards[number]
        return self.folder / f"{shard.sha256[:16] or shard.size}-{shard.name}"

    def location(self, number: int) -> str:
        """Return the URL of a shard, for messages."""
        return f"{self.url}/{self.shards[number].name}"

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a shard from ``offset``; fewer if the shard ends before.

        Raises OSError, with EIO if the shard cannot be downloaded.
        """
        with self.open(number) as file:
            os.utime(file.fileno())  # the time of last use
            return os.pread(file.fileno(), size, offset)

    def open(self, number: int) -> BinaryIO:
        """Open a shard, downloading it if necessary. Raises OSError, with EIO if it cannot be downloaded."""
        path = self.path(number)
        with contextlib.suppress(FileNotFoundError):
            return open(path, "rb", buffering=0)
        self.folder.mkdir(parents=True, exist_ok=True)
        with held(_lock(path)):
            with contextlib.suppress(FileNotFoundError):  # another process may have downloaded it in the meantime
                return open(path, "rb", buffering=0)
            partial = path.with_name(f".{path.name}.part")
            with held(self.folder / "room.lock"):
                self._make_room(self.shards[number].size)
                partial.touch()
            try:
                self._fetch(number, partial)
                # Opened before it is renamed, because another process may remove it right after that.
                file = open(partial, "rb", buffering=0)  # noqa: SIM115
                os.replace(partial, path)
                return file
            finally:
                partial.unlink(missing_ok=True)

    def _fetch(self, number: int, path: Path) -> None:
        """Download a shard to ``path`` and verify it. Raises OSError with EIO after three failed attempts."""
        for pause in (*PAUSES_S, None):
            try:
                filesystem, source = open_url(self.location(number))
                filesystem.get_file(source, str(path))
                fault = _difference(path, self.shards[number])
            except Exception as error:  # every fsspec file system raises its own exceptions
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                fault = first_line(error)
            if not fault:
                return
            if pause is None:
                raise OSError(errno.EIO, fault)
            time.sleep(pause)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used shards until ``size`` more bytes fit. The caller holds the folder's lock.

        Shards that are still being downloaded count with their full size.
        """
        sizes = {f".{self.path(number).name}.part": shard.size for number, shard in enumerate(self.shards)}
        limit, used = self.limit, 0
        for path, state in _files(self.folder, ".*.part"):
            if is_held(_lock(self.folder / path.name[1:-5])):
                used += sizes.get(path.name, state.st_size)
            else:
                path.unlink(missing_ok=True)  # left by a process that was killed
        kept = sorted(_files(self.folder, *KEPT), key=lambda item: item[1].st_mtime_ns)
        used += sum(state.st_size for _, state in kept)
        for path, state in kept:
            if used + size <= limit:
                return
            path.unlink(missing_ok=True)
            used -= state.st_size


class ParquetShards(FetchedShards):
    """Parquet shards: when a shard is first needed, its images are copied end to end to a file in the cache folder.

    Parquet compresses many images together, so that reading one from it means reading hundreds.
    """

    def __init__(
        self, stored: LocalShards | FetchedShards, column: str, copies: Sequence[Shard], folder: Path, limit: int | None
    ) -> None:
        """``stored``: the Parquet files. ``copies``: size and checksum of the copied images of each file."""
        url = stored.url if isinstance(stored, FetchedShards) else str(stored.folder)
        super().__init__(url, copies, folder, limit)
        self.stored, self.column = stored, column

    def path(self, number: int) -> Path:
        """Return the path of the file with the copied images of a shard."""
        return super().path(number).with_suffix(".images")

    def _fetch(self, number: int, path: Path) -> None:
        """Copy the images of a shard to ``path`` and verify the copy. Raises OSError with EIO."""
        try:
            with self.stored.open(number) as file, open(path, "wb") as copy:
                for images in read_encoded(file, self.column, self.location(number)):
                    copy.write(b"".join(image or b"" for image in images))
        except UserError as error:
            raise OSError(errno.EIO, str(error)) from None
        finally:
            if isinstance(self.stored, FetchedShards):  # the downloaded file is no longer needed
                self.stored.path(number).unlink(missing_ok=True)
        if fault := _difference(path, self.shards[number]):
            raise OSError(errno.EIO, fault)


ShardFiles = LocalShards | FetchedShards


def open_url(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it.

    Called again in each process and for each shard, because asyncio-based file systems must not be used after a fork.
    """
    import fsspec

    filesystem, path = fsspec.url_to_fs(url)
    return filesystem, str(path)


@contextlib.contextmanager
def url_errors(url: str) -> Iterator[None]:
    """Convert the exceptions of any fsspec file system to UserError."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"data.root = {url!r} needs a package that is not installed: {first_line(error)}; "
            "the toolkit's extra `remote` includes the packages for s3://, gs:// and https://"
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data.root = {url!r} cannot be reached: {first_line(error)}") from error


def _difference(path: Path, shard: Shard) -> str:
    """Return how a downloaded file differs from its shard in the index; "" if size and checksum match."""
    size = path.stat().st_size
    if size != shard.size:
        return f"received {size:,} bytes instead of {shard.size:,}: the shard was truncated or replaced"
    if shard.sha256:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return "its checksum differs from the one in the index: the shard is damaged, or was replaced"
    return ""


def _files(folder: Path, *patterns: str) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):  # removed in the meantime
            found.append((path, path.stat()))
    return found


def _lock(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
