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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.distributed.signals import GracefulStop
from toolkit.errors import EXIT_INTERRUPTED, EXIT_OK, Interrupted, RunFailed, UserError
from toolkit.locks import Lock, is_held
from toolkit.runs import Run
from toolkit.study.directory import (
    StudyDirectory,
    claim,
    clear_failure,
    external_worker,
    is_claimed,
    is_open,
    open_runs,
    record_failure,
    target_epoch,
)
from toolkit.study.init import CONTROLLER, study_folder
from toolkit.study.torchrun import train_with_torchrun
from toolkit.train import environment_error_message
from toolkit.training.fit import fit

POLL_S = 0.5
ALONE_S = 60.0
"""A study that needs a controller and has had none for so long is left by its workers."""


@dataclass
class LockedRun:
    """A run that this worker alone may train."""

    run: Run
    lock: Lock

    def release(self) -> None:
        """Leave it to others."""
        self.lock.release()


def acquire_run(folder: StudyDirectory) -> LockedRun | None:
    """The first run that has something to train and that nobody trains; None where there is none at the moment."""
    for run in open_runs(folder):
        # Looking costs nothing; claiming waits a little for those who only look.
        lock = None if is_claimed(run) else claim(run)
        if lock is None:
            continue
        # Between looking and claiming another worker may have done it; or somebody trains it without a claim.
        if is_open(run) and not is_held(run.path / ".lock"):
            return LockedRun(run, lock)
        lock.release()
    return None


TrainFunction = Callable[[Run], bool]
"""Trains a claimed run; False where it failed. Raises Interrupted."""

RunCallback = Callable[[Run], None]


def _nothing(_: Run) -> None:
    pass


def run_pending(
    folder: StudyDirectory,
    stop: GracefulStop,
    train: TrainFunction,
    *,
    before: RunCallback = _nothing,
    after: RunCallback = _nothing,
) -> int:
    """Train one run after the other as long as there is one to take. Exit status: 0, or 3 where it was stopped.

    ``before`` and ``after`` are called around each run, however it ends.
    """
    while not stop.is_wanted():
        claimed = acquire_run(folder)
        if claimed is None:
            return EXIT_OK
        before(claimed.run)
        try:
            train(claimed.run)
        except Interrupted:
            return EXIT_INTERRUPTED
        finally:
            claimed.release()
        after(claimed.run)
    return EXIT_INTERRUPTED


def worker_loop(
    folder: StudyDirectory, stop: GracefulStop, train: TrainFunction, *, waits: bool, before: RunCallback = _nothing
) -> int:
    """Train what there is to take, until no more can come. Exit status: 0, or 3 where it was stopped.

    ``waits``: also for runs that others train, in case those die. A search is waited for while it has a controller.
    """
    heard = time.monotonic()
    while run_pending(folder, stop, train, before=before) == EXIT_OK:
        if folder.is_complete and not (waits and any(open_runs(folder))):
            return EXIT_OK
        if is_held(folder.path / CONTROLLER):
            heard = time.monotonic()
        elif time.monotonic() - heard > ALONE_S:
            return EXIT_OK
        time.sleep(POLL_S)
    return EXIT_INTERRUPTED


def train_run(run: Run) -> bool:
    """Train a claimed run in this process, to its end or as far as it is assigned. False where it failed.

    Whatever goes wrong with it is left in its directory; only Interrupted is raised.
    """
    clear_failure(run)
    try:
        fit(run.recipe, resume=run.path, until=target_epoch(run), quiet=True)
    except Interrupted:
        raise
    except (UserError, RunFailed) as error:
        record_failure(run, str(error))
        return False
    except Exception as error:  # of the run, whatever it is; the others go on
        record_failure(run, environment_error_message(error) or traceback.format_exc())
        return False
    finally:
        release_memory()
    return True


def trainer(processes: int, devices: Sequence[str], gpu_share: float, stop: GracefulStop) -> TrainFunction:
    """How a worker with these GPUs trains a run: itself, or by processes that it starts."""
    if processes > 1:
        return lambda run: train_with_torchrun(run, processes, devices, stop)
    if gpu_share < 1:
        import torch

        # What a run may take does not depend on who came first.
        torch.cuda.set_per_process_memory_fraction(gpu_share)
    return train_run


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
    """Help with the study in ``path`` until nothing is left."""
    folder = study_folder(path)
    with GracefulStop() as stop, external_worker(folder):
        return worker_loop(folder, stop, train_run, waits=False)


if __name__ == "__main__":
    from toolkit.train import run_with_error_handling

    sys.exit(run_with_error_handling(lambda: main(Path(sys.argv[1])), debug=False))
