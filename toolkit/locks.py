"""Locks between processes, on one machine or several that share a file system.

The operating system's lock (flock), which is released when its holder exits, is used if the file system supports it.
Otherwise (Lustre mounted without ``flock``, NFS without its lock daemon) a lease is used: a file next to the lock file
that identifies its holder by host, process id and process start time, and that the holder touches every LEASE_S / 3
seconds. A holder that has exited is detected immediately on its own host, and on other hosts once its file has not been
touched for LEASE_S seconds. The clocks of the hosts need not agree.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

LEASE_S = 60.0
"""Seconds after which an untouched lease counts as abandoned; must be equal in all processes that use a lock."""
POLL_S = 0.02
"""Seconds between attempts to acquire a lock."""
NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems that do not support flock."""
HELD = {errno.EAGAIN, errno.EACCES}
"""Errors of flock if another process holds the lock."""

Lock = BaseFileLock


def acquire(
    path: Path,
    timeout: float | None = 0,
    *,
    on_loss: Callable[[], None] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Lock:
    """Acquire a lock, to be released with its ``release()``. Raises Timeout if another process holds it.

    ``timeout``: seconds to wait for it; None waits indefinitely. A process that only checks the lock (:func:`is_held`)
    does not count as its holder. Without flock, it can take LEASE_S longer to determine whether the holder is alive;
    this is logged through ``log``. ``on_loss`` is called, in another thread, if this process could not touch its
    lease for so long that another may have taken it. Raises OSError if the lock file cannot be written.
    """
    lock = FileLock(path, fallback_to_soft=False)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=-1 if timeout is None else timeout, poll_interval=POLL_S)
        except Timeout:
            if is_held(path):
                raise
            time.sleep(POLL_S)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            return _acquire_lease(path, timeout, on_loss, log)
    if lease_is_held(path):  # by a host whose mount has no flock
        lock.release()
        raise Timeout(str(path))
    return lock


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock inside the context; wait for it indefinitely."""
    lock = acquire(path, None)
    try:
        yield
    finally:
        lock.release()


def try_acquire(path: Path, *, log: Callable[[str], None] = lambda line: None) -> Lock | None:
    """Acquire a lock, or return None if another process holds it. Raises OSError as :func:`acquire` does."""
    try:
        return acquire(path, log=log)
    except Timeout:
        return None


def is_held(path: Path) -> bool:
    """Return whether any process holds the lock, without waiting or changing anything."""
    if lease_is_held(path):
        return True
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:  # it does not exist, or may not be read
        return False
    try:
        # A shared lock, so that two concurrent checks do not mistake each other for the holder.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)  # not left to close(): a child process forked meanwhile has the file open
    except OSError as error:
        return error.errno in HELD
    finally:
        os.close(file)
    return False


def lease_is_held(path: Path) -> bool:
    """Return whether the lock has a lease whose holder is alive, as far as this can be known without waiting.

    A holder on another host counts as alive for 2 LEASE_S after it last touched the lease, since the clocks may differ.
    """
    lease = _lease(path)
    try:
        age = time.time() - os.stat(lease.lock_file).st_mtime
        lease.acquire(timeout=0)
    except FileNotFoundError:
        return False
    except OSError:  # also Timeout
        return age < 2 * LEASE_S
    lease.release()  # its holder was a process of this host that has exited
    return False


def _lease(path: Path, on_loss: Callable[[], None] | None = None) -> SoftFileLease:
    on_compromise = None if on_loss is None else lambda _: on_loss()
    return SoftFileLease(path.with_name(f"{path.name}.lease"), lease_duration=LEASE_S, on_compromise=on_compromise)


def _acquire_lease(
    path: Path, timeout: float | None, on_loss: Callable[[], None] | None, log: Callable[[str], None]
) -> SoftFileLease:
    """Acquire the lease; raise Timeout once its holder is known to be alive and ``timeout`` has passed."""
    lease, began = _lease(path, on_loss), time.monotonic()
    first: tuple[int, int] | None = None
    is_announced = False
    while True:
        with contextlib.suppress(Timeout):
            return _acquired(lease)
        waited, seen = time.monotonic() - began, _touched(lease)
        if first is None or seen is None or seen[0] != first[0]:
            first = seen  # the holder has changed
        is_alive = seen != first
        if timeout is not None and waited >= timeout and is_alive:
            raise Timeout(lease.lock_file)
        if waited > LEASE_S / 60 and not is_announced and not is_alive:
            log(f"{lease.lock_file} exists: waiting up to {LEASE_S:g} s to see whether its holder is alive")
            is_announced = True
        time.sleep(min(0.25, LEASE_S / 20))


def _acquired(lease: SoftFileLease) -> SoftFileLease:
    lease.acquire(timeout=0)
    return lease


def _touched(lease: SoftFileLease) -> tuple[int, int] | None:
    """Return the lease's inode and modification time (ns). Opening the file makes NFS ask its server."""
    try:
        with open(lease.lock_file, "rb") as file:
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
