"""Leader election for a search on which several processes, on different nodes, work together.

All of them train. The one that holds the lock of the study's directory also controls the search; when it exits, for
example at its time limit, another takes the lock and resumes from the directory, as a restarted controller does. So no
process has to outlive the others, and none has to wait for a controller that is still queued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from toolkit.distributed.signals import GracefulStop
from toolkit.errors import EXIT_INTERRUPTED, EXIT_OK
from toolkit.locks import Lock
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory, claim, open_runs
from toolkit.study.expand import StudySpec
from toolkit.study.init import CONTROLLER
from toolkit.study.search_driver import SearchDriver
from toolkit.study.worker_pool import WorkerPool, WorkerSlot

LEAD_S = 0.5
"""Seconds between two updates of the controller."""
HELP_S = 2.0
"""Seconds between two checks of the other processes."""


def run_worker(
    study: StudySpec,
    folder: StudyDirectory,
    slots: Sequence[WorkerSlot],
    stop: GracefulStop,
    *,
    workers: int,
    log: Callable[[str], None],
) -> int:
    """Train the trials that the search assigns until it is finished. Return the exit status: 0, or 3 if interrupted.

    ``slots`` are the worker slots of this process, ``workers`` the maximum number of workers in all. Raises RunFailed
    if the workers of this process keep dying.
    """
    crew = WorkerPool(folder, slots)
    lock: Lock | None = None
    search: SearchDriver | None = None
    try:
        while not stop.is_wanted():
            if search is None and not folder.is_complete:
                lock, search = _try_become_leader(study, folder)
                if search is not None:
                    log(f"leads the search, {len(folder.members)} configurations so far")
            goes_on = not folder.is_complete if search is None else search.step(len(slots), workers)
            for said in crew.look():
                log(said)
            if goes_on or any(open_runs(folder)):
                crew.start()
            elif not crew.workers:
                return EXIT_OK
            crew.wait(HELP_S if search is None else LEAD_S)
        return EXIT_INTERRUPTED
    finally:
        crew.stop()
        if lock is not None:
            lock.release()


def _try_become_leader(study: StudySpec, folder: StudyDirectory) -> tuple[Lock | None, SearchDriver | None]:
    """Return the lock and the search if no other process controls it, else (None, None)."""
    lock = claim(Run(folder.path), CONTROLLER)
    return (None, None) if lock is None else (lock, SearchDriver(study, folder))
