"""`toolkit study`: set up the study's directory, train its runs with workers, and show the progress.

All state is in the directory, so this process and any worker may be killed at any moment; the same command resumes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from toolkit.distributed.signals import GracefulStop
from toolkit.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from toolkit.study.directory import StudyDirectory, clear_failure, open_runs
from toolkit.study.expand import ExpandedStudy, StudySpec
from toolkit.study.init import init_study, study_lock
from toolkit.study.progress import REFRESH_S, StudyProgress
from toolkit.study.worker import trainer, worker_loop
from toolkit.study.worker_pool import WorkerPool, WorkerSlot


def run_study(study: StudySpec, expansion: ExpandedStudy, slots: Sequence[WorkerSlot], *, retry: bool = False) -> int:
    """Train all unfinished runs of a study. Return the exit status: 0, 1 if a run failed, 3 if interrupted."""
    with GracefulStop() as stop, study_lock(study) as folder:
        for note in init_study(study, folder, expansion):
            print(f"note: {note}", file=sys.stderr)
        if retry:
            for run in folder.runs:
                clear_failure(run)
        progress = StudyProgress(folder)
        with progress.shown():
            status = _train(folder, stop, slots, progress)
        progress.log_ended()
        states = progress.read()
        if status == EXIT_INTERRUPTED:
            print(f"stopped; {progress.headline(states)}. Run the same command again to resume it", file=sys.stderr)
            return status
        return EXIT_FAILURE if any(run.state == "failed" for run in states.values()) else EXIT_OK


def _train(folder: StudyDirectory, stop: GracefulStop, slots: Sequence[WorkerSlot], progress: StudyProgress) -> int:
    """Work on the study in this process, or in one process per slot."""
    if len(slots) == 1:
        train = trainer(slots[0].processes, slots[0].devices, slots[0].gpu_share, stop)
        return worker_loop(folder, stop, train, after=lambda run: progress.log_ended())
    if folder.is_complete and not any(open_runs(folder)):
        return EXIT_OK
    logged = time.monotonic()

    def log_ended() -> None:
        nonlocal logged
        if time.monotonic() - logged > REFRESH_S:
            progress.log_ended()
            logged = time.monotonic()

    return WorkerPool(folder, slots).run(stop, progress.log, log_ended)
