"""Locks between processes, on one machine or several that share a file system.

The system's own lock (flock) is used where the file system has it: it ends with its holder. Where it has none (Lustre
mounted without ``flock``, NFS without its lock daemon), a lease is used instead: a file beside the lock file that names
its holder by host, process id and start of the process, and that the holder touches every LEASE_S / 3 seconds. On the
holder's own host a holder that has ended is recognized at once; on other hosts, because its file has not been touched
for LEASE_S seconds. The clocks of the hosts need not agree.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

LEASE_S = 60.0
"""All processes that use a lock must agree on it."""
POLL_S = 0.02
"""Between two tries."""
NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems answer that have no flock."""

Lock = BaseFileLock


def acquire(
    path: Path,
    timeout: float | None = 0,
    *,
    on_loss: Callable[[], None] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Lock:
    """Acquire a lock, to be released with its ``release()``. Raises Timeout where another process has it.

    ``timeout``: seconds to wait for it; None: as long as it takes. Where there is no flock, it can take LEASE_S longer
    to find out whether the holder is alive, which is then announced through ``say``. ``on_loss`` is called, in another
    thread, when this process could not touch its lease for so long that another may have taken it. Raises OSError where
    nothing can be written.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=-1 if timeout is None else timeout, poll_interval=POLL_S)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return _acquire_lease(path, timeout, on_loss, log)
    if lease_is_held(path):  # by a host that has no flock there
        lock.release()
        raise Timeout(str(path))
    return lock


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock as long as this lasts; wait for it as long as it takes."""
    lock = acquire(path, None)
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether some process holds the lock. Nothing is changed, and nothing is waited for."""
    if lease_is_held(path):
        return True
    if not path.exists():
        return False
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False  # no flock, or a folder that only others may write in
    lock.release()
    return False


def lease_is_held(path: Path) -> bool:
    """Whether the lock's lease, if there is one, has a living holder, as far as can be told without waiting.

    A holder on another host counts as alive for 2 LEASE_S after its last touch, since the clocks may differ.
    """
    lease = _lease(path)
    try:
        age = time.time() - os.stat(lease.lock_file).st_mtime
        lease.acquire(timeout=0)
    except FileNotFoundError:
        return False
    except OSError:  # also Timeout
        return age < 2 * LEASE_S
    lease.release()  # its holder was a process of this host that has ended
    return False


def _lease(path: Path, on_loss: Callable[[], None] | None = None) -> SoftFileLease:
    on_compromise = None if on_loss is None else lambda _: on_loss()
    return SoftFileLease(path.with_name(f"{path.name}.lease"), lease_duration=LEASE_S, on_compromise=on_compromise)


def _acquire_lease(
    path: Path, timeout: float | None, on_loss: Callable[[], None] | None, log: Callable[[str], None]
) -> SoftFileLease:
    """Acquire the lease; raise Timeout once its holder is seen to be alive and ``timeout`` is over."""
    lease, began = _lease(path, on_loss), time.monotonic()
    first: tuple[int, int] | None = None
    is_announced = False
    while True:
        with contextlib.suppress(Timeout):
            return _acquired(lease)
        waited, seen = time.monotonic() - began, _touched(lease)
        if first is None or seen is None or seen[0] != first[0]:
            first = seen  # another holder than before
        is_alive = seen != first
        if timeout is not None and waited >= timeout and is_alive:
            raise Timeout(lease.lock_file)
        if waited > LEASE_S / 60 and not is_announced and not is_alive:
            log(f"{lease.lock_file} is there: waiting up to {LEASE_S:g} s to see whether its holder is alive")
            is_announced = True
        time.sleep(min(0.25, LEASE_S / 20))


def _acquired(lease: SoftFileLease) -> SoftFileLease:
    lease.acquire(timeout=0)
    return lease


def _touched(lease: SoftFileLease) -> tuple[int, int] | None:
    """Which file the lease is, and when its holder touched it last; opened, so that NFS asks its server."""
    try:
        with open(lease.lock_file, "rb") as file:
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
