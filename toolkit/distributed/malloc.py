"""Configuration of glibc's allocator to keep freed memory for reuse.

A step on a CPU allocates and frees the same large tensors again and again. By default, glibc returns each of them to
the kernel, which has to zero every page again when it is next touched; this can take most of the time of inference.
With these settings the process keeps its peak memory, which the next step needs anyway. Speedups: benchmarks/README.md.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt (malloc.h)."""

KEPT = 2**31 - 1
"""Free memory at the end of the heap that is not returned to the kernel, in bytes: mallopt's maximum, 2 GiB."""

FROM_HEAP = 2**30
"""Size in bytes above which blocks are still mapped and unmapped individually."""

GROWTH = 64 * 2**20
"""Minimum number of bytes by which the heap grows."""


def tune_malloc() -> bool:
    """Set glibc's thresholds for this process and those it forks; return whether this was done.

    Does nothing if another C library or allocator is in use, or if the user has set a MALLOC_ variable or malloc
    tunables, which take precedence.
    """
    if platform.libc_ver()[0] != "glibc" or is_configured_by_user(os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((MMAP_THRESHOLD, FROM_HEAP), (TRIM_THRESHOLD, KEPT), (TOP_PAD, GROWTH))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


def is_configured_by_user(environment: Mapping[str, str]) -> bool:
    """Return whether the user has configured memory allocation through environment variables."""
    preloaded = environment.get("LD_PRELOAD", "")
    return (
        any(name.startswith("MALLOC_") for name in environment)
        or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
        or any(allocator in preloaded for allocator in ("jemalloc", "tcmalloc", "mimalloc"))
    )
