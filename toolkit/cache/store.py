"""The cache folder: what can be computed once and for all, under names that say what it was computed from.

An entry is a folder that appears whole, by renaming, and is never changed afterwards:

    <root>/images-<key>/data.bin      the bytes, to be mapped into memory
    <root>/images-<key>/tables.npz    where in them is what, and a checksum of each block
    <root>/images-<key>/entry.json    what it is, sizes, checksums; its time of change is that of the last use
    <root>/images-<key>.lock          held by the process that builds it

The key is a hash of everything that the content depends on, so that an entry is right wherever it is found, and
nothing needs to be invalidated. Concurrent runs, and all processes of a machine, share entries.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from toolkit.locks import Lock, acquire

ByteArray = npt.NDArray[np.uint8]
BlockRange = tuple[int, int, int]
"""Offset and length in bytes, checksum."""

FORMAT = 1
"""Version of the layout of an entry."""
ABANDONED_S = 600
"""A half-written entry that nobody has written to for so long, in seconds, is what a killed process left."""

_PAGE = 4096
_ENTRY = re.compile("(images|features)-[0-9a-f]{32}")
_LEFTOVER = re.compile(rf"\.{_ENTRY.pattern}-\d+-[0-9a-f]{{8}}")
_verified: dict[Path, tuple[int, int, int]] = {}
"""Data files that this process has checked, as they were then."""


class CorruptCacheEntry(Exception):
    """An entry that is not what was written; the message says how it differs."""


def cache_root() -> Path:
    """TOOLKIT_CACHE, else toolkit below XDG_CACHE_HOME, else ~/.cache/toolkit. It may not exist yet."""
    if os.environ.get("TOOLKIT_CACHE"):
        return Path(os.environ["TOOLKIT_CACHE"]).expanduser().absolute()
    above = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(above).absolute() / "toolkit"


def content_key(parts: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that stand for JSON-ready values."""
    return hashlib.sha256(_canonical(parts)).hexdigest()[:32]


@dataclass(frozen=True)
class CacheEntry:
    """A whole entry."""

    folder: Path
    facts: dict[str, Any]
    """entry.json: at least kind, what (in words), bytes, tables (their SHA-256)."""

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return int(self.facts["bytes"])

    def tables(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays beside the data."""
        with np.load(self.folder / "tables.npz", allow_pickle=False) as tables:
            return {name: tables[name] for name in tables.files}

    def data(self) -> ByteArray:
        """The data, mapped into memory read-only: uint8 [bytes]. The mapping ends with the array."""
        return np.memmap(self.folder / "data.bin", dtype=np.uint8, mode="r").view(np.ndarray)


def find_entry(root: Path, name: str) -> CacheEntry | None:
    """The entry of that name, or None; its time of last use becomes now. Raises DamagedEntry.

    Looks at the header, its hash, the tables' hash and the size of the data; :func:`verify` looks at the data itself.
    """
    entry = _header(root / name)
    if entry is None:
        return None
    folder = entry.folder
    try:
        size = (folder / "data.bin").stat().st_size
        tables = hashlib.sha256((folder / "tables.npz").read_bytes()).hexdigest()
    except OSError as error:
        raise CorruptCacheEntry(f"{Path(error.filename).name}: {error.strerror}") from None
    if size != entry.size:
        raise CorruptCacheEntry(f"data.bin has {size} bytes instead of {entry.size}")
    if tables != entry.facts["tables"]:
        raise CorruptCacheEntry("the checksum of tables.npz differs")
    with contextlib.suppress(OSError):  # a cache that can only be read is of use too
        os.utime(folder / "entry.json")
    return entry


def _header(folder: Path) -> CacheEntry | None:
    """What entry.json says; None where there is none. Raises DamagedEntry."""
    try:
        facts = json.loads((folder / "entry.json").read_bytes())
    except FileNotFoundError:
        if folder.is_dir():
            raise CorruptCacheEntry("entry.json is missing") from None
        return None
    except (OSError, ValueError) as error:
        raise CorruptCacheEntry(f"entry.json cannot be read: {error}") from None
    if not isinstance(facts, dict) or facts.pop("sha256", None) != _digest(facts):
        raise CorruptCacheEntry("the checksum of entry.json differs")
    if facts.get("format") != FORMAT:
        raise CorruptCacheEntry("it was written by another version")
    return CacheEntry(folder, facts)


def verify(entry: CacheEntry) -> Iterator[int]:
    """Compare every block with its checksum, once in a process, by reading all of the data. Raises DamagedEntry.

    Gives the bytes of each block as it is done. The pages read stay in the system's page cache, where there is room,
    for all processes.
    """
    path = entry.folder / "data.bin"
    if _verified.get(path) == _signature(path):
        return
    signature, data, blocks = _signature(path), entry.data(), entry.tables()["blocks"]

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
    """32 bits over all bytes, at the speed of memory: CRC-32 of the sums, modulo 2^64, of each page of 4 KiB."""
    whole = len(data) // _PAGE * _PAGE
    sums = data[:whole].view(np.uint64).reshape(-1, _PAGE // 8).sum(1, dtype=np.uint64)
    return zlib.crc32(data[whole:].tobytes(), zlib.crc32(sums.tobytes()))


class CacheEntryWriter:
    """An entry on its way. Several processes, forked after this was made, may add blocks at the same time."""

    def __init__(self, root: Path, name: str) -> None:
        """Raises OSError where the root cannot be written."""
        self.target = root / name
        self.folder = root / f".{name}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder.mkdir(parents=True)
        (self.folder / "data.bin").touch()
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self._end = context.Value("q", 0)

    def add(self, data: ByteArray) -> BlockRange:
        """Write bytes [n] behind those that are there. Raises OSError (disk full, ...)."""
        with self._end.get_lock():
            start = self._end.value
            self._end.value += len(data)
        # Closed each time: that is when a network file system says that it has no room.
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
        """Make the entry appear; where another process has been faster, its entry is taken. Raises OSError."""
        arrays: dict[str, Any] = {"blocks": np.array(blocks, dtype=np.int64), **tables}
        np.savez(self.folder / "tables.npz", **arrays)
        digest = hashlib.sha256((self.folder / "tables.npz").read_bytes()).hexdigest()
        size = (self.folder / "data.bin").stat().st_size
        whole = {"format": FORMAT, "bytes": size, "tables": digest, "made": time.time(), **facts}
        (self.folder / "entry.json").write_text(json.dumps({**whole, "sha256": _digest(whole)}, indent=1))
        try:
            os.rename(self.folder, self.target)
        except OSError:
            if not (self.target / "entry.json").exists():
                raise
            self.discard()
        _verified[self.target / "data.bin"] = _signature(self.target / "data.bin")
        return CacheEntry(self.target, whole)

    def discard(self) -> None:
        """Remove what was written, unless it was published."""
        shutil.rmtree(self.folder, ignore_errors=True)


def try_lock(root: Path, name: str) -> Lock | None:
    """The right to build an entry, to be released; None where another process has it. It ends with its process.

    Raises OSError where the root cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        return acquire(root / f"{name}.lock")
    except Timeout:
        return None


def remove_entry(folder: Path) -> None:
    """Remove an entry; processes that have mapped it keep what they have. First it loses its name, all at once."""
    doomed = folder.with_name(f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    _verified.pop(folder / "data.bin", None)


def remove_leftovers(root: Path, name: str = "") -> int:
    """Remove what killed processes left half-written (of one entry, or all); bytes that this made free."""
    freed = 0
    for folder in root.glob(f".{name or '*'}-*"):
        if not _LEFTOVER.fullmatch(folder.name):
            continue
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:
            continue  # gone, or not a folder
        if time.time() - newest > ABANDONED_S:
            freed += folder_size(folder)
            shutil.rmtree(folder, ignore_errors=True)
    return freed


@dataclass(frozen=True)
class CacheEntryInfo:
    """An entry as `toolkit cache` shows it, whole or not."""

    name: str
    kind: str
    """images or features."""
    data: str
    """Name of the data set."""
    images: int
    what: str
    """What was done once, in words; what is wrong with an entry that is damaged."""
    bytes: int
    used: float
    """Time of last use, seconds since 1970."""


def list_entries(root: Path) -> list[CacheEntryInfo]:
    """All entries, the one used last first; looking at them is no use."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if not _ENTRY.fullmatch(folder.name) or not folder.is_dir():
            continue
        try:
            entry = _header(folder)
            if entry is None:  # removed a moment ago
                continue
            facts = entry.facts
        except CorruptCacheEntry as error:
            facts = {"what": f"damaged: {error}"}
        told = str(facts.get("data", "")), int(facts.get("images", 0)), str(facts["what"])
        used = next((p.stat().st_mtime for p in (folder / "entry.json", folder) if p.exists()), 0.0)
        found.append(CacheEntryInfo(folder.name, folder.name.split("-")[0], *told, folder_size(folder), used))
    return sorted(found, key=lambda one: one.used, reverse=True)


def clean(root: Path, unused_s: float = 0) -> tuple[int, int]:
    """Remove entries not used for so long, in seconds, and what killed processes left; entries and bytes removed.

    Nothing else in the folder is touched, and nothing that a process is building. Processes that read an entry keep it.
    Raises OSError where an entry cannot be removed.
    """
    doomed = [one for one in list_entries(root) if time.time() - one.used >= unused_s]
    for one in doomed:
        remove_entry(root / one.name)
        lock = try_lock(root, one.name)
        if lock is not None:
            (root / f"{one.name}.lock").unlink(missing_ok=True)
            lock.release()
    return len(doomed), sum(one.bytes for one in doomed) + remove_leftovers(root)


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(facts)).hexdigest()
