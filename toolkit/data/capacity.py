"""How much room there is: in memory, on a disk, on a device. Nothing is kept where it does not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

MEMORY_SHARE = 0.4
"""What is kept may take this share of the memory that is free on the machine, over all its processes."""
DISK_SHARE = 0.5
"""The same of a disk's free space."""
DEVICE_SHARE = 0.3
"""The same of a GPU's free memory, before training has taken its own."""


def available_memory() -> int:
    """Bytes that can be taken without pushing anything out: the system's word, within this process's cgroup."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError, StopIteration):
        pass  # no such files here, or "max": no limit
    return free


def free_disk(folder: Path) -> int:
    """Bytes free for this user on the disk of a folder, or of the nearest folder above it that there is."""
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            return shutil.disk_usage(place).free
    return 0


def device_memory(device: torch.device, local_processes: int) -> int:
    """Bytes free on a device for one of the machine's processes: a GPU's own, else its part of the memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // local_processes


def gib(size: float) -> str:
    """A size in words, in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
