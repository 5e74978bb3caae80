"""The C library's allocator, told to keep what training frees and asks for again a moment later.

A step on a CPU allocates and frees the same large tensors over and over. By default glibc hands each of them back to
the kernel, which clears every page anew when it is next touched: most of an inference's time can go there. Keeping the
memory costs what it was at its peak, which the next step needs again anyhow. What it brings: benchmarks/README.md.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt (malloc.h)."""

KEPT = 2**31 - 1
"""Free memory at the heap's end that is not handed back, in bytes: as much as mallopt takes, 2 GiB."""

FROM_HEAP = 2**30
"""Only blocks above this size, in bytes, are still mapped and unmapped one by one."""

GROWTH = 64 * 2**20
"""The heap grows by at least so many bytes."""


def tune_malloc() -> bool:
    """Set glibc's thresholds for this process and those it forks; whether that was done.

    Nothing is done where another C library or allocator is in use, or where the user has set a MALLOC_ variable or
    tunables of malloc: these say more about the machine than we know.
    """
    if platform.libc_ver()[0] != "glibc" or is_settled_by_user(os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((MMAP_THRESHOLD, FROM_HEAP), (TRIM_THRESHOLD, KEPT), (TOP_PAD, GROWTH))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


def is_settled_by_user(environment: Mapping[str, str]) -> bool:
    """Whether the environment already says how memory is to be allocated."""
    preloaded = environment.get("LD_PRELOAD", "")
    return (
        any(name.startswith("MALLOC_") for name in environment)
        or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
        or any(allocator in preloaded for allocator in ("jemalloc", "tcmalloc", "mimalloc"))
    )
