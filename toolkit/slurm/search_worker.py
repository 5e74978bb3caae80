"""Entry point of an array task that works on a search: `python -m toolkit.slurm.search_worker STUDY/slurm/JOB_TASK`.

It reads the copy of the study's file made at submission; later edits take effect at the next submission.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from toolkit.cli.errors import run_with_error_handling
from toolkit.distributed.signals import GracefulStop
from toolkit.slurm.array import STUDY
from toolkit.slurm.job_worker import check_gpus
from toolkit.study.directory import StudyDirectory
from toolkit.study.expand import StudySpec, read_study
from toolkit.study.leader_election import run_worker
from toolkit.study.worker_pool import WorkerSlot, gpus, slots_for


def work(place: Path) -> int:
    """Work on the search until it is complete. ``place`` is this task's folder in the study's ``slurm/``."""
    folder = StudyDirectory(place.parent.parent)
    study = replace(read_study(folder.path / STUDY), path=folder.record["file"])
    check_gpus()
    task, tasks = int(os.environ["SLURM_ARRAY_TASK_ID"]), int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    slots = slots_of(study, task)
    _say(f"task {task + 1} of {tasks} on {os.uname().nodename}, {len(slots)} worker(s)")
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ.get("OMP_NUM_THREADS", "1")) // len(slots)))
    # The job script makes this process ignore signals, because of the server process from which workers are forked.
    stop = GracefulStop()
    stop.watch(place)
    return run_worker(study, folder, slots, stop, workers=tasks * len(slots), log=_say)


def slots_of(study: StudySpec, task: int) -> list[WorkerSlot]:
    """Return the worker slots of a task, numbered consecutively over all tasks; the numbers name the logs."""
    slots = slots_for(None, study.table.gpus_per_run, study.table.runs_per_gpu, gpus())
    return [replace(slot, number=task * len(slots) + slot.number) for slot in slots]


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(run_with_error_handling(lambda: work(Path(sys.argv[1]))))
