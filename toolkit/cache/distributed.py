"""Work that some processes do for all of them, and entries of the cache that one process of each machine builds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from toolkit.cache.memory_budget import DISK_SHARE, free_disk, gib
from toolkit.cache.store import (
    CacheEntry,
    CacheEntryWriter,
    CorruptCacheEntry,
    cache_root,
    find_entry,
    remove_entry,
    remove_leftovers,
    try_lock,
    verify,
)
from toolkit.distributed.process import gather_objects
from toolkit.locks import Lock
from toolkit.training.context import TrainingContext

Guard = Callable[[Any, int], Iterator[Any]]
"""Wraps a stream of batches so that all processes can agree to stop; the number is how often they ask."""
Work = Generator[None, None, CacheEntry | None]
"""Work in small steps, and the entry that comes of it."""
EntryBuilder = Callable[[CacheEntryWriter], Work]
"""Writes an entry and publishes it."""

TURN_S = 0.5
"""How long one process works, in seconds, before all ask each other whether to stop."""
POLL_S = 0.2


class DistributedCache:
    """The cache, as the processes of one run use it together. After a first trouble it is left alone."""

    def __init__(self, setup: TrainingContext, guard: Guard) -> None:
        self.setup, self.guard, self.root = setup, guard, cache_root()
        self.is_broken = False

    def obtain(self, name: str, fill: EntryBuilder, size: int) -> CacheEntry | None:
        """An entry from the cache, else built by one process of each machine; None where it can't be (a collective).

        Another run that is building it is waited for. ``size``: about how many bytes it takes.
        """
        work = self._built(name, fill, size) if self._works() and not self.is_broken else None
        return self._shared(name, self._done(work))

    def look(self, name: str) -> CacheEntry | None:
        """An entry, if all processes find it whole (a collective)."""
        work = self._found(name) if self._works() else None
        entry = self._shared(name, self._done(work))
        return entry if all(gather_objects(entry is not None)) else None

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[CacheEntry | None]:
        """An entry that all processes find whole, else, for as long as this lasts, the right to build it.

        Another run that has that right is waited for (a collective).
        """
        locks: list[Lock] = []
        work = self._claimed(name, locks) if self.setup.accelerator.is_main_process and not self.is_broken else None
        try:
            self._done(work)
            yield self.look(name)
        finally:
            for lock in locks:
                lock.release()

    def store(self, name: str, fill: EntryBuilder, size: int) -> CacheEntry | None:
        """An entry of what every process has computed, written on each machine under a claim (a collective)."""
        work = self._stored(name, fill, size) if self._works() and not self.is_broken else None
        return self._shared(name, self._done(work))

    def _works(self) -> bool:
        return bool(self.setup.accelerator.is_local_main_process)

    def _done(self, work: Work | None) -> CacheEntry | None:
        """Do the work of those processes that have some, while the others wait; all can stop (a collective)."""
        entry, is_active = None, work is not None
        try:
            while True:
                for _ in self.guard([work] if is_active else [], 1):
                    assert work is not None
                    is_active, entry = _advance(work)
                if not any(gather_objects(is_active)):
                    return entry
        finally:
            if work is not None:
                work.close()

    def _shared(self, name: str, entry: CacheEntry | None) -> CacheEntry | None:
        """The entry on every process of a machine whose main process has it (a collective)."""
        everyone, accelerator = gather_objects(entry is not None), self.setup.accelerator
        if entry is None and everyone[accelerator.process_index - accelerator.local_process_index]:
            try:
                entry = find_entry(self.root, name)
            except CorruptCacheEntry:
                return None
        return entry

    def _found(self, name: str) -> Work:
        """A whole entry; a damaged one is removed."""
        log = self.setup.display.log
        try:
            entry = find_entry(self.root, name)
            if entry is not None:
                with self.setup.display.bar("checking the cache", entry.size) as bar:
                    for size in verify(entry):
                        bar.advance(size)
                        yield
            return entry
        except CorruptCacheEntry as error:
            log(f"the cache's {name} is damaged ({error}): it is built anew")
            with contextlib.suppress(OSError):
                remove_entry(self.root / name)
        except OSError as error:
            log(f"warning: the cache's {name} cannot be read ({error.strerror or error})")
        return None

    def _built(self, name: str, fill: EntryBuilder, size: int) -> Work:
        """A whole entry, built under its lock where there is none."""
        locks: list[Lock] = []
        try:
            entry = yield from self._claimed(name, locks)
            if entry is None and locks:
                entry = yield from self._stored(name, fill, size)
            return entry
        finally:
            for lock in locks:
                lock.release()

    def _claimed(self, name: str, locks: list[Lock]) -> Work:
        """A whole entry, or None with its lock; without lock where there is none to be had."""
        waits = False
        while True:
            entry = yield from self._found(name)
            if entry is not None or locks:
                return entry
            try:
                lock = try_lock(self.root, name)
            except OSError as error:
                self._complain(error)
                return None
            if lock is not None:
                locks.append(lock)  # and look again: its last owner may have built the entry
                continue
            if not waits:
                self.setup.display.log(f"another run is building the cache's {name}: waiting for it")
                waits = True
            time.sleep(POLL_S)
            yield

    def _stored(self, name: str, fill: EntryBuilder, size: int) -> Work:
        """Build an entry, where there is room."""
        free = free_disk(self.root)
        if size > free * DISK_SHARE:
            where = f"the cache {folder_of(self.root)}, with {gib(free)} free"
            self.setup.display.log(f"{gib(size)} have no room in {where}: they are not kept there")
            return None
        try:
            remove_leftovers(self.root, name)
            writer = CacheEntryWriter(self.root, name)
            try:
                return (yield from fill(writer))
            finally:
                writer.discard()
        except OSError as error:
            self._complain(error)
            return None

    def _complain(self, error: OSError) -> None:
        """Once."""
        self.is_broken = True
        self.setup.display.log(
            f"warning: the cache {self.root} cannot be written ({error.strerror or error}): nothing is kept there; "
            "TOOLKIT_CACHE names another folder"
        )


def _advance(work: Work) -> tuple[bool, CacheEntry | None]:
    """Go on with some work for a while: whether there is more to do, else what has come of it."""
    deadline = time.monotonic() + TURN_S
    while time.monotonic() < deadline:
        try:
            next(work)
        except StopIteration as end:
            return False, end.value
    return True, None


def folder_of(root: Path) -> str:
    """The cache's folder, for people."""
    home = Path.home()
    return f"~/{root.relative_to(home)}" if root.is_relative_to(home) else str(root)
