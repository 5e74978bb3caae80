"""Training of a study's run on several GPUs: torchrun starts the training processes, and the worker waits for them.

python -m toolkit.study.torchrun RUN [EPOCH]        command of each training process
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from toolkit.distributed.signals import STOP_FILE, GracefulStop
from toolkit.errors import EXIT_FAILURE, EXIT_OK, Interrupted
from toolkit.runs import Run, open_run
from toolkit.startup import prepare_process
from toolkit.study.directory import clear_failure, failure_of, record_failure, target_epoch

OUTPUT = "launcher.txt"
"""File in the run directory with the output of the launcher and its processes."""

POLL_S = 0.2


def train_with_torchrun(run: Run, processes: int, devices: Sequence[str], stop: GracefulStop) -> bool:
    """Train a claimed run on ``processes`` processes, one per device (on the CPU if ``devices`` is empty).

    Return False if it failed. Raises Interrupted if ``stop`` was requested and the run has paused.
    """
    clear_failure(run)
    until = target_epoch(run)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", "toolkit.study.torchrun", str(run.path), *([] if until is None else [str(until)])]  # fmt: skip
    environment = dict(os.environ)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    with open(run.path / OUTPUT, "ab") as output:
        launcher = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True, preexec_fn=_die_with_parent
        )
        status = _wait(launcher, run, stop)
    if stop.is_wanted() and not run.is_finished:
        raise Interrupted(f"stopped; {run.path} resumes with the study")
    if status != EXIT_OK and failure_of(run) is None:
        record_failure(run, f"its processes exited with status {status}; see {run.path / OUTPUT}")
    return failure_of(run) is None


def _wait(launcher: subprocess.Popen[bytes], run: Run, stop: GracefulStop) -> int:
    """Wait for the launcher and return its exit status; forward a stop request by creating the stop file."""
    while launcher.poll() is None:
        if stop.is_wanted():
            (run.path / STOP_FILE).touch()
        time.sleep(POLL_S)
    return launcher.returncode


def _die_with_parent() -> None:
    """In the launcher, request SIGTERM when the worker dies, so that the training processes end too (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def train_worker_main(path: Path, until: int | None) -> int:
    """Run one training process and return its exit status; errors are recorded in the run directory."""
    from toolkit.error_handling import is_first_process
    from toolkit.training.fit import fit

    run = open_run(path)
    try:
        fit(run.recipe, resume=run.path, until=until, quiet=True)
    except Interrupted:
        raise
    except Exception as error:
        if is_first_process() or failure_of(run) is None:
            record_failure(run, str(error) or type(error).__name__)
        raise
    return EXIT_OK


def main() -> None:
    """Entry point of `python -m toolkit.study.torchrun RUN [EPOCH]`."""
    from toolkit.error_handling import run_with_error_handling

    prepare_process()
    until = int(sys.argv[2]) if len(sys.argv) > 2 else None
    status = run_with_error_handling(lambda: train_worker_main(Path(sys.argv[1]), until))
    sys.stdout.flush()
    sys.stderr.flush()
    # The launcher treats any other status as a failure, kills the other processes and prints stack traces.
    os._exit(EXIT_OK if status in (EXIT_OK, Interrupted.exit_status) else EXIT_FAILURE)


if __name__ == "__main__":
    main()
