"""The controller of a study: sets up its directory, has its runs trained, and reports results to the search.

Only the controller writes study.json. Workers, here or on other nodes, read what to train from the run directories, so
any of them, and the controller itself, may die at any moment; when restarted, it resumes from the directory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.distributed.signals import GracefulStop
from toolkit.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from toolkit.study.directory import StudyDirectory, clear_failure, open_runs
from toolkit.study.expand import ExpandedStudy, StudySpec
from toolkit.study.init import init_study, study_lock
from toolkit.study.progress import REFRESH_S, StudyProgress
from toolkit.study.search_driver import SearchDriver
from toolkit.study.worker import run_pending, trainer
from toolkit.study.worker_pool import WorkerPool, WorkerSlot

TICK_S = 0.1


@dataclass
class StudySession:
    """One invocation of a study's controller, with the study lock held."""

    folder: StudyDirectory
    stop: GracefulStop
    board: StudyProgress
    search: SearchDriver | None
    slots: Sequence[WorkerSlot]

    def run(self) -> int:
        """Train the open runs. Return the exit status: 0, 1 if runs have failed, 3 if interrupted."""
        with self.board.shown():
            status = self._by_crew() if len(self.slots) > 1 else self._alone(self.slots[0])
        self.board.tell()
        if status == EXIT_INTERRUPTED:
            print(f"stopped; {self.board.headline(self.board.look())}. The same command resumes it", file=sys.stderr)
            return status
        return EXIT_FAILURE if any(seen.state == "failed" for seen in self.board.look().values()) else EXIT_OK

    def _alone(self, slot: WorkerSlot) -> int:
        """Train one run after another in this process."""
        train = trainer(slot.processes, slot.devices, slot.gpu_share, self.stop)
        while True:
            goes_on = self.search is not None and self.search.step(workers=1)
            status = run_pending(self.folder, self.stop, train, after=lambda run: self.board.tell())
            if status == EXIT_INTERRUPTED or not (goes_on or any(open_runs(self.folder))):
                return status
            if not goes_on:  # workers elsewhere are still training
                time.sleep(REFRESH_S)

    def _by_crew(self) -> int:
        """Train the runs in worker processes."""
        crew = WorkerPool(self.folder, self.slots)
        looked = 0.0
        try:
            while not self.stop.is_wanted():
                goes_on = self.search is not None and self.search.step(len(self.slots))
                for said in crew.look():
                    self.board.log(said)
                if goes_on or any(open_runs(self.folder)):
                    crew.start()
                elif not crew.workers:
                    return EXIT_OK
                if time.monotonic() - looked > REFRESH_S:
                    self.board.tell()
                    looked = time.monotonic()
                crew.wait(TICK_S)
            return EXIT_INTERRUPTED
        finally:
            crew.stop()


def run_study(study: StudySpec, expansion: ExpandedStudy, slots: Sequence[WorkerSlot], *, retry: bool = False) -> int:
    """Train all unfinished runs of a study. Return the exit status: 0, 1 if a run failed, 3 if interrupted."""
    with GracefulStop() as stop, study_lock(study) as folder:
        for remark in init_study(study, folder, expansion):
            print(f"note: {remark}", file=sys.stderr)
        if retry:
            forget_failures(folder)
        search = SearchDriver(study, folder) if study.table.bohb is not None else None
        return StudySession(folder, stop, StudyProgress(folder), search, slots).run()


def forget_failures(folder: StudyDirectory) -> None:
    """Delete all failure records, so that failed runs are tried again."""
    for member in folder.members:
        run = folder.run(member)
        if run is not None:
            clear_failure(run)
