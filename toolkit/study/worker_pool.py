"""Worker processes on this machine, each with its share of CPUs and GPUs; a worker that dies is replaced.

Workers are forked from a server process that has already imported PyTorch, so that they start quickly, without
inheriting threads or a CUDA context.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.distributed.signals import GracefulStop
from toolkit.errors import EXIT_INTERRUPTED, EXIT_OK, RunFailed, UserError
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory, claim, epochs_done, record_failure

LOGS = "workers"
"""Subdirectory of the study with the output of each worker."""

DEATHS = 3
"""A run fails after its worker has died this many times in a row without progress."""

GRACE_S = 60.0
"""Seconds that a worker has to write its checkpoint after the pool's process has exited."""

STOP_AGAIN_S = 2.0
"""Seconds after which SIGTERM is sent again to a worker that has not exited."""

TICK_S = 0.1
"""Interval in seconds at which the pool checks its workers."""

SHARING = "TOOLKIT_RUNS_AT_ONCE"
"""Environment variable with the number of runs that share this machine; see
:func:`toolkit.distributed.process.local_processes`."""


@dataclass(frozen=True)
class WorkerSlot:
    """Resources of one worker."""

    number: int
    devices: tuple[str, ...] = ()
    """GPUs, named as in CUDA_VISIBLE_DEVICES; if empty, all GPUs of the machine, if any."""
    processes: int = 1
    """Number of processes per run."""
    gpu_share: float = 1.0
    """Share of each GPU's memory, if several runs share it."""


@dataclass
class Worker:
    """A worker process and the run it is training."""

    slot: WorkerSlot
    process: multiprocessing.process.BaseProcess
    link: multiprocessing.connection.Connection
    """Receives the names of the runs that the worker claims, or a UserError. Closing this end tells the worker that the
    pool's process has exited."""
    run: str | None = None


@dataclass
class WorkerPool:
    """The workers of a study on this machine."""

    folder: StudyDirectory
    slots: Sequence[WorkerSlot]
    workers: dict[int, Worker] = field(default_factory=dict)
    deaths: dict[str, tuple[int, Any]] = field(default_factory=dict)
    """By run: how many times in a row its worker died, and the run's progress at the last death."""
    idle_deaths: int = 0

    def run(self, stop: GracefulStop, log: Callable[[str], None], on_tick: Callable[[], None] = lambda: None) -> int:
        """Keep a worker in each slot until no runs are left. Return the exit status: 0, or 3 if interrupted.

        Raises RunFailed if workers keep dying at startup, and UserError if a worker reports an error of the study.
        """
        try:
            self.workers = {slot.number: self._start(slot) for slot in self.slots}
            while self.workers and not stop.is_wanted():
                multiprocessing.connection.wait([worker.process.sentinel for worker in self.workers.values()], TICK_S)
                self._replace_dead(log)
                on_tick()
            return EXIT_INTERRUPTED if stop.is_wanted() else EXIT_OK
        finally:
            self._stop()

    def _start(self, slot: WorkerSlot) -> Worker:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["toolkit.study.worker", *(["optuna"] if not self.folder.is_complete else [])])
        link, other = context.Pipe()
        (self.folder.path / LOGS).mkdir(exist_ok=True)
        arguments = (str(self.folder.path), slot, len(self.slots), other)
        process = context.Process(target=_worker, args=arguments, name=f"worker-{slot.number}")
        process.start()
        other.close()
        return Worker(slot, process, link)

    def _replace_dead(self, log: Callable[[str], None]) -> None:
        """Replace workers that have died, but not those that exited because no runs are left."""
        for number, worker in list(self.workers.items()):
            while (message := _received(worker.link)) is not None:
                if isinstance(message, UserError):
                    raise message
                worker.run = message
            status = worker.process.exitcode
            if status is None:
                continue
            del self.workers[number]
            worker.link.close()
            if status not in (EXIT_OK, EXIT_INTERRUPTED):
                log(self._note_death(worker, status))
            if status != EXIT_OK:
                self.workers[number] = self._start(worker.slot)

    def _note_death(self, worker: Worker, status: int) -> str:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        death = f"worker {worker.slot.number} has died ({how})"
        if worker.run is None:
            self.idle_deaths += 1
            if self.idle_deaths >= DEATHS:
                raise RunFailed(f"{death} before it claimed a run; see {self.folder.path / LOGS}")
            return death
        self.idle_deaths = 0
        run = Run(self.folder.path / worker.run)
        progress = _progress(run)
        count, before = self.deaths.get(worker.run, (0, None))
        count = count + 1 if progress == before else 1
        self.deaths[worker.run] = (count, progress)
        if count < DEATHS:
            return f"{death}; its run {worker.run} resumes from its last checkpoint"
        lock = claim(run)
        if lock is not None:
            record_failure(run, f"its worker has died {count} times without making progress ({how}; out of memory?)")
            lock.release()
        return f"{death}, the {count}rd time in run {worker.run}, which is recorded as failed"

    def _stop(self) -> None:
        """Ask all workers to write a checkpoint and exit, and wait until they have."""
        while alive := [worker.process for worker in self.workers.values() if worker.process.exitcode is None]:
            for process in alive:
                process.terminate()
            # A worker that was just starting may have missed the signal.
            multiprocessing.connection.wait([process.sentinel for process in alive], STOP_AGAIN_S)


def _received(link: multiprocessing.connection.Connection) -> str | UserError | None:
    """Return the next message of a worker: the name of a run that it has claimed, or the error that ended it."""
    with contextlib.suppress(EOFError, OSError):
        if link.poll():
            message: str | UserError = link.recv()
            return message
    return None


def _progress(run: Run) -> Any:
    """Return a value that changes whenever the run makes progress."""
    return epochs_done(run), sorted(path.name for path in run.checkpoints.glob("*.json"))


def _worker(path: str, slot: WorkerSlot, sharing: int, link: multiprocessing.connection.Connection) -> None:
    """Entry point of a worker process."""
    _redirect_output(Path(path) / LOGS / f"{slot.number}.txt")
    os.environ[SHARING] = str(sharing)
    if slot.devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(slot.devices)
    from toolkit.study.worker import trainer, worker_loop

    def before(run: Run) -> None:
        _log(f"claimed {run.id}")
        link.send(run.id)

    _log(f"worker {slot.number}, process {os.getpid()} on {os.uname().nodename}, GPUs {', '.join(slot.devices) or '-'}")
    with GracefulStop() as stop:
        threading.Thread(target=_watch_pool, args=(link,), daemon=True).start()
        train = trainer(slot.processes, slot.devices, slot.gpu_share, stop)
        try:
            status = worker_loop(StudyDirectory(Path(path)), stop, train, before=before)
        except UserError as error:  # an error of the study; a run's errors are recorded in its directory
            link.send(UserError(str(error)))
            status = error.exit_status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _redirect_output(path: Path) -> None:
    """Redirect the output of this process to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _watch_pool(link: multiprocessing.connection.Connection) -> None:
    """When the pool's process exits, request a stop; if stopping exceeds the grace period, exit immediately."""
    with contextlib.suppress(EOFError, OSError):
        link.recv()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(EXIT_INTERRUPTED)


def slots_for(parallel: int | None, gpus_per_run: int, runs_per_gpu: int, devices: Sequence[str]) -> list[WorkerSlot]:
    """Return ``parallel`` worker slots for this machine, or by default as many as its GPUs allow.

    ``devices`` are the GPUs, as in CUDA_VISIBLE_DEVICES; without GPUs the default is one worker. Runs on several GPUs
    do not share them.
    """
    if not devices:
        return [WorkerSlot(number) for number in range(parallel or 1)]
    size = min(gpus_per_run, len(devices))
    groups = [tuple(devices[i : i + size]) for i in range(0, len(devices) - size + 1, size)]
    shares = groups if size > 1 else [group for group in groups for _ in range(runs_per_gpu)]
    count = parallel or len(shares)
    if size > 1:
        count = min(count, len(groups))
    chosen = [groups[number % len(groups)] for number in range(count)] if parallel else shares
    return [WorkerSlot(n, group, size, 1 / chosen.count(group)) for n, group in enumerate(chosen)]


def gpus() -> list[str]:
    """Return the GPUs of this process as named in CUDA_VISIBLE_DEVICES, without initializing CUDA."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return []
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]
