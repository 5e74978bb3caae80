"""Available host memory, disk space and device memory, which limit what is cached."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from toolkit.distributed.cpu_count import cgroups

MEMORY_SHARE = 0.4
"""Maximum share of the machine's free memory used for caching by all its processes together."""
DISK_SHARE = 0.5
"""Maximum share of a disk's free space used for caching."""
DEVICE_SHARE = 0.3
"""Maximum share of a GPU's free memory used for caching, before training allocates its own."""


def available_memory(system: Path = Path("/")) -> int:
    """Return the bytes that can be allocated by evicting only file pages: the minimum over the machine and its cgroups.

    ``system`` is the root of the file system.
    """
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, KeyError):
        free = [_numbers(system / "proc/meminfo")["MemAvailable:"] * 1024]
    for group in cgroups(system):
        free += _left_in(group, "memory.max", "memory.current", "")
    for group in cgroups(system, "memory"):
        free += _left_in(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    return min(free)


def _left_in(group: Path, limit: str, used: str, prefix: str) -> list[int]:
    """Return [bytes left] of a cgroup's limit, counting file pages as free; [] if it sets no limit."""
    try:
        left = int((group / limit).read_text(encoding="ascii")) - int((group / used).read_text(encoding="ascii"))
        pages = _numbers(group / "memory.stat")
    except (OSError, ValueError):  # no such files, or "max"
        return []
    return [left + pages.get(f"{prefix}inactive_file", 0) + pages.get(f"{prefix}active_file", 0)]


def _numbers(file: Path) -> dict[str, int]:
    """Parse a file whose lines hold a name and a number."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1}


def free_disk(folder: Path) -> int:
    """Return the bytes free for this user on the disk of a folder, or of its nearest existing parent."""
    for ancestor in (folder, *folder.absolute().parents):
        if ancestor.is_dir():
            return shutil.disk_usage(ancestor).free
    return 0


def device_memory(device: torch.device, local_processes: int) -> int:
    """Return the free bytes that one process may use: a GPU's free memory, or an equal share of free host memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // local_processes


def copy_to_device(tensor: Tensor, device: torch.device, local_processes: int) -> Tensor | str:
    """Return a copy on the device if it takes at most DEVICE_SHARE of its free memory, else the reason why not."""
    free = device_memory(device, local_processes)
    if tensor.nbytes > free * DEVICE_SHARE:
        return f"{gib(tensor.nbytes)} needed, {gib(free)} free"
    try:
        return tensor.to(device, copy=True)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return "it ran out of memory"


def gib(size: float) -> str:
    """Format a size in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
