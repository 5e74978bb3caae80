"""Number of CPUs available to this process (affinity, cgroup quota, SLURM)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def available_cpus(local_processes: int = 1, system: Path = Path("/")) -> int:
    """Return the number of CPUs that each training process on this machine may use, at least 1.

    The minimum of CPU affinity, SLURM's allocation for the task and the cgroup's quota, divided among the processes
    that share it (os.cpu_count() ignores all of these). ``system``: root of the file system.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = [float(affinity), *_cgroup_quotas(system)]
    sharing = local_processes
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        granted.append(float(os.environ["SLURM_CPUS_PER_TASK"]))
        # If SLURM itself started the processes, each has its own allocation.
        tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
        sharing = max(1, local_processes // max(1, int(tasks))) if tasks.isdigit() else local_processes
    return max(1, int(min(granted)) // sharing)


def _cgroup_quotas(system: Path) -> list[float]:
    """Return the CPU quotas of this process's cgroup and its ancestors (cgroup v2), or of the root (v1)."""
    quotas = []
    for folder in cgroups(system):
        quotas += _quota(folder / "cpu.max", None)
    version_1 = system / "sys/fs/cgroup/cpu"
    return quotas + _quota(version_1 / "cpu.cfs_quota_us", version_1 / "cpu.cfs_period_us")


def cgroups(system: Path = Path("/"), controller: str = "") -> list[Path]:
    """Return the directories of this process's cgroup and its ancestors; they may not exist.

    ``controller``: "" for cgroup v2, or the name of a v1 controller, such as "memory".
    """
    base, own = system / "sys/fs/cgroup" / controller, ""
    with contextlib.suppress(OSError, ValueError):
        for line in (system / "proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                own = path.strip("/")
    group = base / own
    return [folder for folder in [group, *group.parents] if folder.is_relative_to(base)]


def _quota(quota_file: Path, period_file: Path | None) -> list[float]:
    """Return a quota as [number of CPUs]; [] if there is none.

    cgroup v2 has "quota period" in one file, with "max" for no limit.
    """
    try:
        fields = quota_file.read_text(encoding="ascii").split()
        period = float(period_file.read_text(encoding="ascii") if period_file else fields[1])
        quota = float(fields[0])
    except (OSError, ValueError, IndexError):
        return []
    return [max(1.0, quota / period)] if quota > 0 else []
