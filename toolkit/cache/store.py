"""Content-addressed cache folder for precomputed data.

An entry is a folder that is published atomically, by renaming, and never changed afterwards:

    <root>/images-<key>/data.bin      the data, to be memory-mapped
    <root>/images-<key>/entry.npz     description (JSON), layout of the data, a checksum of each block, and the SHA-256
                                      of all this; its modification time is the time of last use
    <root>/images-<key>.lock          held by the process that builds the entry

The key is a hash of everything that the content depends on, so entries are never stale and need no invalidation.
Concurrent runs, and all processes of a machine, share entries. No library provides all of this: diskcache and zarr
cannot memory-map the data; safetensors has no checksums and cannot be written in pieces by several processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import Timeout

from toolkit.distributed.cpu_count import available_cpus
from toolkit.hashing import json_hash
from toolkit.locks import Lock, acquire

ByteArray = npt.NDArray[np.uint8]
BlockRange = tuple[int, int, int]
"""One block of an entry's data: offset and length in bytes, checksum."""

FORMAT = 2
"""Version of the layout of entries."""
ABANDONED_S = 600
"""Seconds without a write after which a partial entry is considered left over from a killed process."""

DIGEST = hashlib.sha256().digest_size
_PAGE = 4096
_ENTRY = re.compile("(images|features|encoded|shards)-[0-9a-f]{32}")
_LEFTOVER = re.compile(rf"\.{_ENTRY.pattern}-\d+-[0-9a-f]{{8}}")
_verified: dict[Path, tuple[int, int, int]] = {}
"""Data files verified by this process: inode, modification time in ns and size at that time."""


class CorruptCacheEntry(Exception):
    """Raised for an entry that differs from what was written; the message says how."""


def cache_root() -> Path:
    """Return TOOLKIT_CACHE, else $XDG_CACHE_HOME/toolkit, else ~/.cache/toolkit. The folder may not exist yet."""
    if os.environ.get("TOOLKIT_CACHE"):
        return Path(os.environ["TOOLKIT_CACHE"]).expanduser().absolute()
    above = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(above).absolute() / "toolkit"


def content_key(parts: Mapping[str, Any]) -> str:
    """Return a hash of JSON-serializable values, 32 hexadecimal digits."""
    return json_hash(parts)[:32]


@dataclass(frozen=True, eq=False)
class CacheEntry:
    """A complete entry."""

    folder: Path
    facts: dict[str, Any]
    """Description: at least kind, what (the precomputed steps) and bytes."""
    tables: dict[str, npt.NDArray[Any]]
    """Arrays stored with the data; "blocks", int64 [n, 3], holds offset, length and checksum of each block."""

    @property
    def size(self) -> int:
        """Size of the data in bytes."""
        return int(self.facts["bytes"])

    def data(self) -> ByteArray:
        """Return the data as a read-only memory map, uint8 [bytes]. The mapping ends with the array."""
        return np.memmap(self.folder / "data.bin", dtype=np.uint8, mode="r").view(np.ndarray)


def find_entry(root: Path, name: str) -> CacheEntry | None:
    """Return the entry of that name, or None, and update its time of last use. Raises CorruptCacheEntry.

    Checks everything except the content of the data, which :func:`verify` checks; the data's size is checked here.
    """
    entry = _read(root / name)
    if entry is None:
        return None
    try:
        size = (entry.folder / "data.bin").stat().st_size
    except OSError as error:
        raise CorruptCacheEntry(f"data.bin: {error.strerror}") from None
    if size != entry.size:
        raise CorruptCacheEntry(f"data.bin has {size} bytes instead of {entry.size}")
    with contextlib.suppress(OSError):  # the cache may be read-only
        os.utime(entry.folder / "entry.npz")
    return entry


def _read(folder: Path) -> CacheEntry | None:
    """Read entry.npz; return None if there is no entry. Raises CorruptCacheEntry."""
    try:
        content = (folder / "entry.npz").read_bytes()
    except FileNotFoundError:
        if folder.is_dir():
            raise CorruptCacheEntry("entry.npz is missing, or it was written by another version") from None
        return None
    except OSError as error:
        raise CorruptCacheEntry(f"entry.npz cannot be read: {error.strerror}") from None
    if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
        raise CorruptCacheEntry("the checksum of entry.npz differs")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        tables = {name: file[name] for name in file.files}
    facts = json.loads(str(tables.pop("facts")))
    if facts["format"] != FORMAT:
        raise CorruptCacheEntry("it was written by another version")
    return CacheEntry(folder, facts, tables)


def verify(entry: CacheEntry) -> Iterator[int]:
    """Compare every block with its checksum, once per process, by reading all the data. Raises CorruptCacheEntry.

    Yields the size in bytes of each verified block. If memory allows, the pages read stay in the system's page cache
    for all processes.
    """
    path = entry.folder / "data.bin"
    if _verified.get(path) == _signature(path):
        return
    signature, data, blocks = _signature(path), entry.data(), entry.tables["blocks"]

    def is_right(block: npt.NDArray[np.int64]) -> bool:
        start, length, expected = (int(value) for value in block)
        return checksum(data[start : start + length]) == expected

    with ThreadPoolExecutor(available_cpus()) as pool:
        for right, block in zip(pool.map(is_right, blocks), blocks, strict=True):
            if not right:
                pool.shutdown(cancel_futures=True)
                raise CorruptCacheEntry(
                    f"the checksum of bytes {block[0]} to {block[0] + block[1]} of data.bin differs"
                )
            yield int(block[1])
    _verified[path] = signature


def _signature(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


def checksum(data: ByteArray) -> int:
    """Return a 32-bit checksum at memory speed: the CRC-32 of the sums, modulo 2^64, of each 4 KiB page."""
    whole = len(data) // _PAGE * _PAGE
    sums = data[:whole].view(np.uint64).reshape(-1, _PAGE // 8).sum(1, dtype=np.uint64)
    return zlib.crc32(data[whole:].tobytes(), zlib.crc32(sums.tobytes()))


class CacheEntryWriter:
    """Writes a new entry. Several processes forked after its creation may add blocks concurrently."""

    def __init__(self, root: Path, name: str) -> None:
        """Create the temporary folder. Raises OSError if the root cannot be written."""
        self.target = root / name
        self.folder = root / f".{name}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder.mkdir(parents=True)
        (self.folder / "data.bin").touch()
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self._end = context.Value("q", 0)

    def add(self, data: ByteArray) -> BlockRange:
        """Append bytes, uint8 [n]. Raises OSError (disk full, ...)."""
        with self._end.get_lock():
            start = self._end.value
            self._end.value += len(data)
        # Closed each time, because a network file system reports a full disk on close.
        descriptor = os.open(self.folder / "data.bin", os.O_WRONLY)
        try:
            view, done = data.data, 0
            while done < len(data):
                done += os.pwrite(descriptor, view[done:], start + done)
        finally:
            os.close(descriptor)
        return start, len(data), checksum(data)

    def publish(
        self, facts: Mapping[str, Any], tables: Mapping[str, npt.NDArray[Any]], blocks: list[BlockRange]
    ) -> CacheEntry:
        """Publish the entry; if another process has already done so, use that entry instead. Raises OSError."""
        arrays: dict[str, Any] = {"blocks": np.array(blocks, dtype=np.int64), **tables}
        size = (self.folder / "data.bin").stat().st_size
        whole = {"format": FORMAT, "bytes": size, "made": time.time(), **facts}
        (self.folder / "entry.npz").write_bytes(_content(whole, arrays))
        try:
            os.rename(self.folder, self.target)
        except OSError:
            if not (self.target / "entry.npz").exists():
                raise
            self.discard()
        _verified[self.target / "data.bin"] = _signature(self.target / "data.bin")
        return CacheEntry(self.target, whole, arrays)

    def discard(self) -> None:
        """Remove the temporary folder, unless the entry was published."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _content(facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> bytes:
    """Return the content of entry.npz."""
    content = io.BytesIO()
    np.savez(content, facts=np.array(json.dumps(facts)), **arrays)
    return content.getvalue() + hashlib.sha256(content.getvalue()).digest()


def describe_folder(folder: Path, facts: Mapping[str, Any]) -> None:
    """Register a folder of other files as an entry, last used now. Raises OSError.

    ``facts``: kind, data, images, what.
    """
    partial = folder / f".entry-{os.getpid()}.tmp"
    partial.write_bytes(_content({"format": FORMAT, "bytes": 0, "made": time.time(), **facts}, {}))
    os.replace(partial, folder / "entry.npz")


def try_lock(root: Path, name: str) -> Lock | None:
    """Acquire the build lock of an entry; None if another process holds it. Released on process exit at the latest.

    Raises OSError if the root cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        return acquire(root / f"{name}.lock")
    except Timeout:
        return None


def remove_entry(folder: Path) -> None:
    """Remove an entry, renaming it first so that it disappears atomically. Existing memory maps stay valid."""
    moved = folder.with_name(f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, moved)
        shutil.rmtree(moved, ignore_errors=True)
    _verified.pop(folder / "data.bin", None)


def remove_leftovers(root: Path, name: str = "") -> int:
    """Remove partial entries left by killed processes (of one entry, or all); return the bytes freed."""
    freed = 0
    for folder in root.glob(f".{name or '*'}-*"):
        if not _LEFTOVER.fullmatch(folder.name):
            continue
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:
            continue  # removed meanwhile, or not a folder
        if time.time() - newest > ABANDONED_S:
            freed += folder_size(folder)
            shutil.rmtree(folder, ignore_errors=True)
    return freed


@dataclass(frozen=True)
class CacheEntryInfo:
    """An entry as listed by `toolkit cache`; it may be damaged."""

    name: str
    kind: str
    """``images``, ``features``, ``encoded`` (copied from a Parquet file) or ``shards`` (downloads, copies, indexes)."""
    data: str
    """Name of the data set."""
    images: int
    what: str
    """Description of the precomputed steps; for a damaged entry, the damage."""
    bytes: int
    used: float
    """Time of last use, in seconds since 1970."""


def list_entries(root: Path) -> list[CacheEntryInfo]:
    """List all entries, most recently used first. Listing does not update the time of last use."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if not _ENTRY.fullmatch(folder.name) or not folder.is_dir():
            continue
        try:
            entry = _read(folder)
            if entry is None:  # removed meanwhile
                continue
            facts = entry.facts
        except CorruptCacheEntry as error:
            facts = {"what": f"damaged: {error}"}
        found.append(
            CacheEntryInfo(
                name=folder.name,
                kind=folder.name.split("-")[0],
                data=str(facts.get("data", "")),
                images=int(facts.get("images", 0)),
                what=str(facts["what"]),
                bytes=folder_size(folder),
                used=next((p.stat().st_mtime for p in (folder / "entry.npz", folder) if p.exists()), 0.0),
            )
        )
    return sorted(found, key=lambda one: one.used, reverse=True)


def clean(root: Path, unused_s: float = 0) -> tuple[int, int]:
    """Remove entries unused for ``unused_s`` seconds and leftovers of killed processes; return their number and bytes.

    Entries that are being built, and all other files in the folder, are kept. Processes that are reading an entry keep
    their map. Raises OSError if an entry cannot be removed.
    """
    unused = [one for one in list_entries(root) if time.time() - one.used >= unused_s]
    for one in unused:
        remove_entry(root / one.name)
        lock = try_lock(root, one.name)
        if lock is not None:
            (root / f"{one.name}.lock").unlink(missing_ok=True)
            lock.release()
    return len(unused), sum(one.bytes for one in unused) + remove_leftovers(root)


def folder_size(folder: Path) -> int:
    """Return the total size in bytes of the files in a folder."""
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0
