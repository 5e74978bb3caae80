"""What a task of an array runs that works on a search: `python -m toolkit.slurm.search STUDY/slurm/JOB_TASK`.

The study's file is the one that was kept at submission: what is edited afterwards is for the next submission.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from toolkit.engine.signals import StopRequest
from toolkit.slurm.array import STUDY
from toolkit.slurm.task import check_gpus
from toolkit.study.crew import Slot, gpus, slots_for
from toolkit.study.expand import StudyFile, read_study
from toolkit.study.folder import StudyFolder
from toolkit.study.pool import work_together
from toolkit.train import report_errors


def work(place: Path) -> int:
    """Work on the search until it is done. ``place`` is this task's folder in the study's ``slurm/``."""
    folder = StudyFolder(place.parent.parent)
    study = replace(read_study(folder.path / STUDY), path=folder.record["file"])
    check_gpus()
    task, tasks = int(os.environ["SLURM_ARRAY_TASK_ID"]), int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    slots = slots_of(study, task)
    _say(f"task {task + 1} of {tasks} on {os.uname().nodename}, {len(slots)} worker(s)")
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ.get("OMP_NUM_THREADS", "1")) // len(slots)))
    # The job's script has made this process deaf to signals, for the sake of the server that it forks workers from.
    stop = StopRequest()
    stop.watch(place)
    return work_together(study, folder, slots, stop, workers=tasks * len(slots), say=_say)


def slots_of(study: StudyFile, task: int) -> list[Slot]:
    """The places of a task, numbered through all tasks: they name the logs."""
    slots = slots_for(None, study.table.gpus_per_run, study.table.runs_per_gpu, gpus())
    return [replace(slot, number=task * len(slots) + slot.number) for slot in slots]


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(report_errors(lambda: work(Path(sys.argv[1])), debug=False))
