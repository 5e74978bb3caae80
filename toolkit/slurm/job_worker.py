"""Entry point of a job's training processes: `python -m toolkit.slurm.job_worker RUN`, run by the launcher.

It starts or resumes training in a run directory created at submission. It records the exit status and message there,
because launchers replace the exit status with their own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys

import typer
from filelock import Timeout

from toolkit.cli.errors import exit_with_status
from toolkit.cli.train import report_at_end, show_outcome
from toolkit.distributed.launcher import is_distributed
from toolkit.error_handling import is_first_process, run_with_error_handling
from toolkit.errors import EXIT_FAILURE, EXIT_OK, Interrupted, RunFailed, UserError
from toolkit.locks import Lock, acquire
from toolkit.runs import Run, open_run
from toolkit.slurm.job_status import SlurmJob
from toolkit.startup import prepare_process
from toolkit.study.directory import CLAIM, clear_failure, is_of_study, record_failure
from toolkit.terminal import outliving_terminal

LOCK_WAIT_S = 180
"""Seconds to wait for the run's lock: a job restarted after a node failure may overlap with its old processes."""


def work(run: Run) -> int:
    """Train or resume the run, and record its exit status and message."""
    claim = None
    try:
        if is_first_process():
            claim = wait_for_run(run)
            _note_epochs(run)
            clear_failure(run)
        recipe = run.recipe
        # torch is imported here, after the recipe has been validated.
        from toolkit.distributed import failure_detection
        from toolkit.distributed.rendezvous import SEVERAL_MACHINES_S, TIMEOUT_VARIABLE
        from toolkit.training import fit

        check_gpus()
        # The other processes may have to wait while the first one waits for the run's lock.
        os.environ.setdefault(TIMEOUT_VARIABLE, str(SEVERAL_MACHINES_S))
        failure_detection.on_leave = functools.partial(note, run)
        fit.fit(recipe, resume=run.path)
    except (UserError, RunFailed, Interrupted) as error:
        note(run, error.exit_status, str(error))
        raise
    except BaseException as error:
        note(run, EXIT_FAILURE, f"{type(error).__name__}: {error}")
        raise
    finally:
        if claim is not None:
            claim.release()
    note(run, EXIT_OK, "")
    if is_first_process():
        if not is_of_study(run):  # a study has a table and plots of all its runs
            report_at_end(run)
        show_outcome(run, as_json=False)
    return EXIT_OK


def note(run: Run, status: int, message: str) -> None:
    """Record exit status and message of rank 0, or of another rank that failed before it."""
    job = SlurmJob(run)
    if is_first_process() or (status not in (EXIT_OK, Interrupted.exit_status) and job.outcome is None):
        job.record_exit(status, message)
        if is_of_study(run) and status not in (EXIT_OK, Interrupted.exit_status):
            record_failure(run, message)


def wait_for_run(run: Run) -> Lock | None:
    """Wait until no other process trains in the run directory. Raises UserError after :data:`LOCK_WAIT_S`.

    Returns the claim of a study's run, which must be held while training, so that no worker of the study takes the run.
    """
    with contextlib.suppress(Timeout, OSError):
        acquire(run.path / ".lock", LOCK_WAIT_S).release()
    run.lock().release()  # raises UserError if it is still in use, or cannot be written
    if not is_of_study(run):
        return None
    try:
        return acquire(run.path / CLAIM, LOCK_WAIT_S)
    except Timeout:
        raise UserError(f"{run.path} is being trained by another worker of its study") from None


def check_gpus() -> None:
    """Raise UserError if PyTorch does not see the number of GPUs that the job requested.

    TOOLKIT_PRETENDED_GPUS disables the check on the local test cluster, whose GPUs are not real.
    """
    import torch

    asked = int(os.environ.get("TOOLKIT_GPUS", "0"))
    seen = torch.cuda.device_count()
    if asked and seen != asked and not os.environ.get("TOOLKIT_PRETENDED_GPUS"):
        raise UserError(
            f"SLURM granted {asked} GPU(s) on {os.uname().nodename}, but PyTorch {torch.__version__} sees {seen}: the "
            "driver and the PyTorch build may not match; run `toolkit doctor` on that node"
        )


def _note_epochs(run: Run) -> None:
    """Record the number of epochs completed before this start, used to estimate the remaining time."""
    job = SlurmJob(run)
    run.write_text(f"slurm/epochs-{max(1, len(job.starts))}", f"{len(run.epoch_records())}\n")


def train_run(run: str) -> None:
    """Start or resume training in the run directory RUN."""
    opened = open_run(run)
    with outliving_terminal():
        status = run_with_error_handling(lambda: work(opened))
    if status == Interrupted.exit_status and is_distributed():
        # The outcome is recorded; the launcher treats any other status as a failure and prints stack traces.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_OK)
    exit_with_status(status)


def main() -> None:
    """Run `python -m toolkit.slurm.job_worker RUN`."""
    prepare_process()
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(train_run)
    app()


if __name__ == "__main__":
    main()
