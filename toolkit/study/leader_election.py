"""A search that several processes, on nodes of their own, work on together: one of them is its controller.

All of them train. Whoever holds the lock of the study's folder also leads the search; when that one ends, by its time
limit say, another takes the lock and goes on with what lies in the folder, as a controller that is started again does.
So no process has to outlive the others, and none has to wait for a controller that is still in a queue.
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
"""Between two looks of the controller at its runs."""
HELP_S = 2.0
"""Between two looks of the others at the folder."""


def run_worker(
    study: StudySpec,
    folder: StudyDirectory,
    slots: Sequence[WorkerSlot],
    stop: GracefulStop,
    *,
    workers: int,
    log: Callable[[str], None],
) -> int:
    """Train what the search assigns until it has come to its end. Exit status: 0, or 3 where it was stopped.

    ``slots`` are the places of this process, ``workers`` how many there are, at most, in all. Raises RunFailed where no
    worker of this process can live.
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
    """The lock and the search where nobody else leads it."""
    lock = claim(Run(folder.path), CONTROLLER)
    return (None, None) if lock is None else (lock, SearchDriver(study, folder))
