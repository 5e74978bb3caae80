"""Multi-process access to the cache: entries are built by one process per machine and shared with the others."""

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
"""Wraps an iterable of batches so that all processes can agree to stop; the integer is the number of such checks."""
Work = Generator[None, None, CacheEntry | None]
"""Generator that works in small steps and returns the resulting entry."""
EntryBuilder = Callable[[CacheEntryWriter], Work]
"""Function that writes an entry and publishes it."""

TURN_S = 0.5
"""Seconds between the checks by which all processes agree whether to stop."""
POLL_S = 0.2


class DistributedCache:
    """Multi-process access to the cache for one run. Building entries is disabled after the first I/O error."""

    def __init__(self, setup: TrainingContext, guard: Guard) -> None:
        self.setup, self.guard, self.root = setup, guard, cache_root()
        self.is_broken = False
        self.lock: Lock | None = None
        """Lock on building an entry, if this process holds one."""

    def find(self, name: str) -> CacheEntry | None:
        """Return an entry if every process finds it intact, else None. Collective."""
        entry = self._run_work(name, self._find(name) if self._is_first_of_machine else None)
        return entry if all(gather_objects(entry is not None)) else None

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[CacheEntry | None]:
        """Yield an entry if every process finds it intact; otherwise hold its build lock in the context and yield None.

        Waits for another run that holds the lock. Collective.
        """
        is_main = self.setup.accelerator.is_main_process
        try:
            self._run_work(name, self._claim(name) if is_main and not self.is_broken else None)
            yield self.find(name)
        finally:
            self._unlock()

    def store(self, name: str, fill: EntryBuilder, size: int) -> CacheEntry | None:
        """Build an entry in one process per machine or shared folder, within :meth:`claim`; return None if that fails.

        ``size`` is its approximate size in bytes. Collective.
        """
        builds = self._is_first_of_machine and not self.is_broken
        return self._run_work(name, self._store(name, fill, size) if builds else None)

    @property
    def _is_first_of_machine(self) -> bool:
        return bool(self.setup.accelerator.is_local_main_process)

    def _run_work(self, name: str, work: Work | None) -> CacheEntry | None:
        """Run ``work`` on the processes that have any while the others wait; a stop request ends it on all. Collective.

        Returns the resulting entry on every process of a machine whose main process has it.
        """
        entry, is_active = None, work is not None
        try:
            while True:
                for _ in self.guard([work] if is_active else [], 1):
                    assert work is not None
                    is_active, entry = _advance(work)
                if not any(gather_objects(is_active)):
                    break
        finally:
            if work is not None:
                work.close()
        everyone, accelerator = gather_objects(entry is not None), self.setup.accelerator
        if entry is None and everyone[accelerator.process_index - accelerator.local_process_index]:
            with contextlib.suppress(CorruptCacheEntry):
                entry = find_entry(self.root, name)
        return entry

    def _find(self, name: str) -> Work:
        """Return a verified entry; remove a damaged one."""
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
            log(f"cache entry {name} is damaged ({error}): rebuilding it")
            with contextlib.suppress(OSError):
                remove_entry(self.root / name)
        except OSError as error:
            log(f"warning: cache entry {name} cannot be read ({error.strerror or error})")
        return None

    def _claim(self, name: str) -> Work:
        """Return a verified entry, or None with its lock held; without the lock if the cache cannot be written."""
        waits = False
        while True:
            entry = yield from self._find(name)
            if entry is not None or self.lock is not None:
                return entry
            try:
                self.lock = try_lock(self.root, name)
            except OSError as error:
                self._disable(error)
                return None
            if self.lock is not None:
                continue  # check again: the lock's last owner may have built the entry
            if not waits:
                self.setup.display.log(f"another run is building cache entry {name}: waiting for it")
                waits = True
            time.sleep(POLL_S)
            yield

    def _store(self, name: str, fill: EntryBuilder, size: int) -> Work:
        """Return a verified entry, built under its lock if it does not exist and there is enough disk space."""
        try:
            entry = yield from self._claim(name)
            if entry is not None or self.lock is None:
                return entry
            free = free_disk(self.root)
            if size > free * DISK_SHARE:
                where = f"the cache {folder_of(self.root)}, with {gib(free)} free"
                self.setup.display.log(f"{gib(size)} do not fit into {where}, so they are not cached")
                return None
            remove_leftovers(self.root, name)
            writer = CacheEntryWriter(self.root, name)
            try:
                return (yield from fill(writer))
            finally:
                writer.discard()
        except OSError as error:
            self._disable(error)
            return None
        finally:
            self._unlock()  # other machines may wait for this lock, and claim() waits for them

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def _disable(self, error: OSError) -> None:
        """Disable the cache after an I/O error, and log a warning."""
        self.is_broken = True
        self.setup.display.log(
            f"warning: the cache {self.root} cannot be written ({error.strerror or error}): nothing is cached; "
            "set TOOLKIT_CACHE to use another folder"
        )


def _advance(work: Work) -> tuple[bool, CacheEntry | None]:
    """Advance the work for up to TURN_S seconds; return whether it is unfinished, and its result if finished."""
    deadline = time.monotonic() + TURN_S
    while time.monotonic() < deadline:
        try:
            next(work)
        except StopIteration as end:
            return False, end.value
    return True, None


def folder_of(root: Path) -> str:
    """Format the cache's folder for messages, with ~ for the home directory."""
    home = Path.home()
    return f"~/{root.relative_to(home)}" if root.is_relative_to(home) else str(root)
