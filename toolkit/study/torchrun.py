"""A run on several GPUs: its processes are started by torchrun, as by hand, and the worker waits for them.

python -m toolkit.study.torchrun RUN [EPOCH]        what each process does
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
from toolkit.study.directory import clear_failure, failure_of, record_failure, target_epoch
from toolkit.terminal import open_closed_streams

OUTPUT = "launcher.txt"
"""In the run directory: what the launcher and its processes have shown."""

LOOK_EVERY_S = 0.2


def train_with_torchrun(run: Run, processes: int, devices: Sequence[str], stop: GracefulStop) -> bool:
    """Train a claimed run on ``processes`` processes, one on each of ``devices`` (none: on the CPU). False: it failed.

    Raises Interrupted where ``stop`` was asked for and the run has paused.
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
        raise Interrupted(f"stopped; {run.path} goes on with the study")
    if status != EXIT_OK and failure_of(run) is None:
        record_failure(run, f"its processes ended with status {status}; {run.path / OUTPUT} has what they said")
    return failure_of(run) is None


def _wait(launcher: subprocess.Popen[bytes], run: Run, stop: GracefulStop) -> int:
    """The launcher's exit status; a request to stop is passed on by the stop file, which all launchers let through."""
    while launcher.poll() is None:
        if stop.is_wanted():
            (run.path / STOP_FILE).touch()
        time.sleep(LOOK_EVERY_S)
    return launcher.returncode


def _die_with_parent() -> None:
    """The launcher is told to end its processes when the worker is killed (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def train_worker_main(path: Path, until: int | None) -> int:
    """One of the processes: train, and leave the reason in the run directory where it fails. Exit status."""
    from toolkit.train import is_first_process
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
    """Entry of `python -m toolkit.study.torchrun RUN [EPOCH]`."""
    from toolkit.train import run_with_error_handling

    open_closed_streams()
    until = int(sys.argv[2]) if len(sys.argv) > 2 else None
    status = run_with_error_handling(lambda: train_worker_main(Path(sys.argv[1]), until), debug=False)
    sys.stdout.flush()
    sys.stderr.flush()
    # To the launcher any other status is a failure: it kills the other processes and shows a page of stack traces.
    os._exit(EXIT_OK if status in (EXIT_OK, Interrupted.exit_status) else EXIT_FAILURE)


if __name__ == "__main__":
    main()
