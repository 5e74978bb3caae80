"""What every training process of a job runs: `python -m toolkit.slurm.job_worker RUN`, under the launcher.

It trains into a run directory that was made at submission, or goes on there, and leaves exit status and message in the
directory, because launchers replace the status by one of their own.
"""

from __future__ import annotations

import functools
import os
import sys
import time

import typer

from toolkit.distributed.launcher import is_distributed
from toolkit.errors import EXIT_FAILURE, EXIT_OK, Interrupted, RunFailed, UserError
from toolkit.locks import Lock
from toolkit.runs import Run, open_run
from toolkit.slurm.job_status import SlurmJob
from toolkit.study.directory import claim, clear_failure, is_of_study, record_failure
from toolkit.terminal import open_closed_streams, outliving_terminal
from toolkit.train import exit_with_status, is_first_process, report_at_end, run_with_error_handling, show_outcome

LOCK_WAIT_S = 180
"""A job whose node failed may start again while its old processes are still ending elsewhere."""


def work(run: Run) -> int:
    """Train or go on, and note the outcome."""
    claims = []
    try:
        if is_first_process():
            claims = wait_for_run(run, LOCK_WAIT_S)
            _note_epochs(run)
            clear_failure(run)
        recipe = run.recipe
        # torch is imported here, after the recipe was found good.
        from toolkit.distributed import failure_detection
        from toolkit.distributed.rendezvous import SEVERAL_MACHINES_S, TIMEOUT_VARIABLE
        from toolkit.training import fit

        check_gpus()
        # The first process may have waited for its lock.
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
        for lock in claims:
            lock.release()
    note(run, EXIT_OK, "")
    if is_first_process():
        if not is_of_study(run):  # that has a table and figures of all its runs
            report_at_end(run)
        show_outcome(run, as_json=False)
    return EXIT_OK


def note(run: Run, status: int, message: str) -> None:
    """Leave the outcome: the first process's, or what made another one fail before it."""
    job = SlurmJob(run)
    if is_first_process() or (status not in (EXIT_OK, Interrupted.exit_status) and job.outcome is None):
        job.record_exit(status, message)
        if is_of_study(run) and status not in (EXIT_OK, Interrupted.exit_status):
            record_failure(run, message)


def wait_for_run(run: Run, seconds: float) -> list[Lock]:
    """Wait until nobody trains in the run directory any more. Raises UserError after ``seconds``.

    Returns what is to be held while training: a study's run must not be taken by workers of the study either.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            run.lock().release()
            claims = [claim(run)] if is_of_study(run) else []
            if None not in claims:
                return [lock for lock in claims if lock is not None]
            raise UserError(f"{run.path} is trained by a worker of its study elsewhere")
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(2)


def check_gpus() -> None:
    """Hold the GPUs that PyTorch sees against those that were asked for. Raises UserError.

    TOOLKIT_PRETENDED_GPUS is set on the local cluster, whose GPUs are names only.
    """
    import torch

    asked = int(os.environ.get("TOOLKIT_GPUS", "0"))
    seen = torch.cuda.device_count()
    if asked and seen != asked and not os.environ.get("TOOLKIT_PRETENDED_GPUS"):
        raise UserError(
            f"SLURM granted {asked} GPU(s) on {os.uname().nodename}, PyTorch {torch.__version__} sees {seen}: the "
            "driver, or the kind of PyTorch, does not fit; `toolkit doctor` on that node says more"
        )


def _note_epochs(run: Run) -> None:
    """Epochs done before this start, for the estimate of the time to go."""
    job = SlurmJob(run)
    run.write_text(f"slurm/epochs-{max(1, len(job.starts))}", f"{len(run.epochs())}\n")


def train_run(run: str) -> None:
    """Train into the run directory RUN, or go on there."""
    opened = open_run(run)
    with outliving_terminal():
        status = run_with_error_handling(lambda: work(opened), debug=False)
    if status == Interrupted.exit_status and is_distributed():
        # The outcome is noted; to the launcher any other status is a failure, with a page of stack traces.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_OK)
    exit_with_status(status)


def main() -> None:
    """Entry of `python -m toolkit.slurm.job_worker RUN`."""
    open_closed_streams()
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(train_run)
    app()


if __name__ == "__main__":
    main()
