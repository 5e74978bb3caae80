"""A worker of a study: takes one open run after the other from the study's folder and trains it, in one process.

It knows nothing of a search: what to train, and to which epoch, stands in the run directory, and so does what came out.
Any number of workers, on any nodes that share the folder, take runs by claiming them; one that is killed leaves its
run to the next, which continues from the last checkpoint.

    python -m toolkit.study.worker FOLDER
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from toolkit.engine.fit import fit
from toolkit.engine.signals import StopRequest
from toolkit.errors import EXIT_INTERRUPTED, EXIT_OK, Interrupted, RunFailed, UserError
from toolkit.runs import Run
from toolkit.study.folder import (
    StudyFolder,
    assigned_epoch,
    claim,
    forget_failure,
    is_held,
    is_open,
    note_failure,
    open_runs,
)
from toolkit.study.prepare import CONTROLLER, study_folder
from toolkit.train import explain

POLL_S = 0.5
ALONE_S = 60.0
"""A search without a controller for so long is given up by its workers."""


@dataclass
class Claimed:
    """A run that this worker alone may train."""

    run: Run
    lock: FileLock

    def release(self) -> None:
        """Leave it to others."""
        self.lock.release()


def take_run(folder: StudyFolder) -> Claimed | None:
    """The first run that has something to train and that nobody trains; None where there is none at the moment."""
    for run in open_runs(folder):
        lock = claim(run)
        if lock is None:
            continue
        # Between looking and claiming another worker may have done it; or somebody trains it without a claim.
        if is_open(run) and not is_held(run.path / ".lock"):
            return Claimed(run, lock)
        lock.release()
    return None


def work(folder: StudyFolder, stop: StopRequest, *, after: Callable[[Run], None] = lambda run: None) -> int:
    """Train until nothing is left that this worker could take. Exit status: 0, or 3 where it was stopped.

    ``after`` is called after each run, however it ended.
    """
    alone_since: float | None = None
    while not stop.is_wanted():
        claimed = take_run(folder)
        if claimed is not None:
            alone_since = None
            try:
                train(claimed.run)
            except Interrupted:
                return EXIT_INTERRUPTED
            finally:
                claimed.release()
            after(claimed.run)
            continue
        if folder.is_complete:
            return EXIT_OK
        if is_held(folder.path / CONTROLLER):
            alone_since = None
        elif time.monotonic() - (alone_since := alone_since or time.monotonic()) > ALONE_S:
            return EXIT_OK
        time.sleep(POLL_S)
    return EXIT_INTERRUPTED


def train(run: Run) -> bool:
    """Train a claimed run in this process, to its end or as far as it is assigned. False where it failed.

    Whatever goes wrong with it is left in its directory; only Interrupted is raised.
    """
    forget_failure(run)
    try:
        fit(run.recipe, resume=run.path, until=assigned_epoch(run), quiet=True)
    except Interrupted:
        raise
    except (UserError, RunFailed) as error:
        note_failure(run, str(error))
        return False
    except Exception as error:  # of the run, whatever it is; the others go on
        note_failure(run, explain(error) or traceback.format_exc())
        return False
    finally:
        release_memory()
    return True


def release_memory() -> None:
    """Give back what a run has held in this process, so that the next starts as in a fresh one."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:  # compiled code is kept by function, and but for a few models of one class
        dynamo.reset()


def main(path: Path) -> int:
    """Work on the study in ``path`` until nothing is left."""
    folder = study_folder(path)
    with StopRequest() as stop:
        return work(folder, stop)


if __name__ == "__main__":
    from toolkit.train import end, report_errors

    end(report_errors(lambda: main(Path(sys.argv[1])), debug=False))
