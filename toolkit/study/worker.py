"""The worker loop, which trains the runs of a study wherever it is executed.

The study's directory defines what to train and receives the results. Any number of workers, on any machines that share
the directory, can therefore work on a study. A worker may be killed at any moment; another one resumes its run from the
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
"""Interval in seconds at which an idle worker checks for a run to train."""


@dataclass
class LockedRun:
    """A run that only this worker may train."""

    run: Run
    lock: Lock

    def release(self) -> None:
        """Release the claim."""
        self.lock.release()


def acquire_run(folder: StudyDirectory) -> LockedRun | None:
    """Claim the first run that needs training and is not being trained. Return None if there is none at the moment."""
    for run in open_runs(folder):
        # is_claimed() comes first, since claim() may wait to find out whether a lease is still alive.
        lock = None if is_claimed(run) else claim(run)
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


def _no_callback(_: Run) -> None:
    pass


def worker_loop(
    folder: StudyDirectory,
    stop: GracefulStop,
    train: TrainFunction,
    *,
    wait_for_others: bool = True,
    before: RunCallback = _no_callback,
    after: RunCallback = _no_callback,
) -> int:
    """Train runs until the study is complete. Return the exit status: 0, or 3 if interrupted.

    A worker of a search that finds no run to train assigns itself a new one. ``wait_for_others``: keep waiting while
    other workers train the remaining runs, in case they die. ``before`` and ``after`` are called with each run;
    ``after`` also if the run failed, but not if it was interrupted.
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
            if not (wait_for_others and any(open_runs(folder))):
                return EXIT_OK
            time.sleep(POLL_S)
        elif not search.assign():
            time.sleep(POLL_S)
    return EXIT_INTERRUPTED


def train_run(run: Run) -> bool:
    """Train a claimed run in this process, up to its last epoch or the assigned epoch. Return False if it failed.

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
    except Exception as error:  # one failed run must not stop the others
        record_failure(run, environment_error_message(error) or traceback.format_exc())
        return False
    finally:
        release_memory()
    return True


def trainer(processes: int, devices: Sequence[str], gpu_share: float, stop: GracefulStop) -> TrainFunction:
    """Return a function that trains a run on these GPUs: in this process, or in ``processes`` processes it starts."""
    if processes > 1:
        return lambda run: train_with_torchrun(run, processes, devices, stop)
    if gpu_share < 1:
        import torch

        # Without a limit, the memory that a run can allocate would depend on which run started first.
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
        return worker_loop(folder, stop, train_run, wait_for_others=False)
