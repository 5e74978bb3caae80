"""The worker loop: the one way in which the runs of a study are trained.

The study's directory states what to train and receives the results, so any number of workers, on any machines that
share the directory, can work on a study, and each may be killed at any moment: another one resumes its run from the
last checkpoint. `toolkit study` runs the loop itself, or in a pool of processes (:mod:`toolkit.study.worker_pool`), as
do SLURM tasks; `toolkit study FILE --worker` runs it on a further machine.
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
from toolkit.error_handling import environment_error_message
from toolkit.errors import EXIT_INTERRUPTED, EXIT_OK, Interrupted, RunFailed, UserError
from toolkit.locks import Lock, is_held
from toolkit.runs import Run
from toolkit.study.assign import SearchAssigner
from toolkit.study.directory import (
    StudyDirectory,
    claim,
    clear_failure,
    is_claimed,
    is_open,
    open_runs,
    record_failure,
    target_epoch,
)
from toolkit.study.init import study_folder
from toolkit.study.torchrun import train_with_torchrun
from toolkit.training.fit import fit

POLL_S = 0.5
"""Interval at which a worker without a run looks for one."""


@dataclass
class LockedRun:
    """A run that only this worker may train."""

    run: Run
    lock: Lock

    def release(self) -> None:
        """Release the claim."""
        self.lock.release()


def acquire_run(folder: StudyDirectory) -> LockedRun | None:
    """Claim the first run that needs training and is not being trained; None if there is none at the moment."""
    for run in open_runs(folder):
        lock = None if is_claimed(run) else claim(run)  # claim() alone would wait to learn whether a lease is alive
        if lock is None:
            continue
        # Another worker may have finished it before the claim, or a process without a claim may be training it.
        if is_open(run) and not is_held(run.path / ".lock"):
            return LockedRun(run, lock)
        lock.release()
    return None


TrainFunction = Callable[[Run], bool]
"""Trains a claimed run and returns False if it failed. Raises Interrupted."""

RunCallback = Callable[[Run], None]


def _nothing(_: Run) -> None:
    pass


def worker_loop(
    folder: StudyDirectory,
    stop: GracefulStop,
    train: TrainFunction,
    *,
    stays: bool = True,
    before: RunCallback = _nothing,
    after: RunCallback = _nothing,
) -> int:
    """Train runs until no more can come. Return the exit status: 0, or 3 if interrupted.

    A worker that finds no run in a search asks the search for one. ``stays``: also wait for runs that other workers are
    training, in case those die. ``before`` and ``after`` are called with each run; ``after`` also if it failed, but not
    if it was interrupted.
    """
    search = SearchAssigner(folder)
    while not stop.is_wanted():
        claimed = acquire_run(folder)
        if claimed is not None:
            before(claimed.run)
            try:
                train(claimed.run)
            except Interrupted:
                return EXIT_INTERRUPTED
            finally:
                claimed.release()
            after(claimed.run)
        elif folder.is_complete:
            if not (stays and any(open_runs(folder))):
                return EXIT_OK
            time.sleep(POLL_S)
        elif not search.assign():
            time.sleep(POLL_S)
    return EXIT_INTERRUPTED


def train_run(run: Run) -> bool:
    """Train a claimed run in this process, to its end or its assigned epoch. Return False if it failed.

    Errors are recorded in the run directory; only Interrupted is raised.
    """
    clear_failure(run)
    try:
        fit(run.recipe, resume=run.path, until=target_epoch(run), quiet=True)
    except Interrupted:
        raise
    except (UserError, RunFailed) as error:
        record_failure(run, str(error))
        return False
    except Exception as error:  # any error of this run; the others continue
        record_failure(run, environment_error_message(error) or traceback.format_exc())
        return False
    finally:
        release_memory()
    return True


def trainer(processes: int, devices: Sequence[str], gpu_share: float, stop: GracefulStop) -> TrainFunction:
    """Return the function that trains a run on these GPUs: in this process, or in processes that it starts."""
    if processes > 1:
        return lambda run: train_with_torchrun(run, processes, devices, stop)
    if gpu_share < 1:
        import torch

        # Limit the memory, so that what a run can allocate does not depend on which run started first.
        torch.cuda.set_per_process_memory_fraction(gpu_share)
    return train_run


def release_memory() -> None:
    """Free the memory of a run in this process, so that the next one starts as in a fresh process."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:  # compiled code is cached per function, up to a small limit per model class
        dynamo.reset()


def join_study(path: Path) -> int:
    """Work on the study in ``path``, which was started elsewhere, until no runs are left."""
    folder = study_folder(path)
    with GracefulStop() as stop:
        return worker_loop(folder, stop, train_run, stays=False)
