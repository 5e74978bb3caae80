"""Entry point of an array task that works on a search: `python -m toolkit.slurm.search_task STUDY/slurm/JOB_TASK`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from toolkit.distributed.signals import GracefulStop
from toolkit.error_handling import run_with_error_handling
from toolkit.slurm.job_worker import check_gpus
from toolkit.study.directory import StudyDirectory
from toolkit.study.worker_pool import WorkerPool, gpus, slots_for


def work(task_folder: Path) -> int:
    """Train runs of the search until it is complete. ``task_folder``: this task's folder in the study's ``slurm/``."""
    folder = StudyDirectory(task_folder.parent.parent)
    check_gpus()
    task, tasks = int(os.environ["SLURM_ARRAY_TASK_ID"]), int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    slots = slots_for(None, folder.table.gpus_per_run, folder.table.runs_per_gpu, gpus())
    # Numbered over all tasks, because the numbers name the workers' logs.
    slots = [replace(slot, number=task * len(slots) + slot.number) for slot in slots]
    _log(f"task {task + 1} of {tasks} on {os.uname().nodename}, {len(slots)} worker(s)")
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ.get("OMP_NUM_THREADS", "1")) // len(slots)))
    # The job script makes this process and the fork server of its workers ignore signals, so watch for a stop file.
    stop = GracefulStop()
    stop.watch(task_folder)
    return WorkerPool(folder, slots).run(stop, _log)


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(run_with_error_handling(lambda: work(Path(sys.argv[1]))))
