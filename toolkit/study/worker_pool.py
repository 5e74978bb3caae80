"""Worker processes on this machine, each with its share of CPUs and GPUs; a worker that dies is replaced.

They are forked from a server process that has only imported PyTorch, so that a worker starts at once and inherits
neither threads nor a CUDA context.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import EXIT_INTERRUPTED, EXIT_OK, RunFailed
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory, claim, epochs_done, record_failure

LOGS = "workers"
"""Subdirectory of the study with the output of each worker."""

DEATHS = 3
"""A run fails after its worker has died this many times in a row without progress."""

GRACE_S = 60.0
"""Seconds that a worker has to write its checkpoint after its controller is gone."""

STOP_AGAIN_S = 2.0
"""Seconds after which a worker that has not exited is asked again."""

SHARING = "TOOLKIT_RUNS_AT_ONCE"
"""Environment variable with the number of runs that share this machine, see
:func:`toolkit.distributed.process.local_processes`."""


@dataclass(frozen=True)
class WorkerSlot:
    """Resources of one worker."""

    number: int
    devices: tuple[str, ...] = ()
    """As in CUDA_VISIBLE_DEVICES; if empty, all GPUs of the machine, if any."""
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
    """Receives the names of the runs it claims; when this end closes, the worker knows that the controller is gone."""
    run: str | None = None


@dataclass
class WorkerPool:
    """The workers of a study on this machine."""

    folder: StudyDirectory
    slots: Sequence[WorkerSlot]
    workers: dict[int, Worker] = field(default_factory=dict)
    deaths: dict[str, tuple[int, Any]] = field(default_factory=dict)
    """Per run: how many times in a row its worker has died, and the run's progress then."""
    idle_deaths: int = 0

    def start(self) -> None:
        """Start a worker for each unused slot."""
        for slot in self.slots:
            if slot.number not in self.workers:
                self.workers[slot.number] = self._started(slot)

    def _started(self, slot: WorkerSlot) -> Worker:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["toolkit.study.worker"])
        link, other = context.Pipe()
        (self.folder.path / LOGS).mkdir(exist_ok=True)
        arguments = (str(self.folder.path), slot, len(self.slots), other)
        process = context.Process(target=_worker, args=arguments, name=f"worker-{slot.number}")
        process.start()
        other.close()
        return Worker(slot, process, link)

    def look(self) -> list[str]:
        """Reap workers that have exited and return messages about them. Raises RunFailed if they die on every start."""
        said = []
        for number, worker in list(self.workers.items()):
            with contextlib.suppress(EOFError, OSError):
                while worker.link.poll():
                    worker.run = worker.link.recv()
            status = worker.process.exitcode
            if status is None:
                continue
            del self.workers[number]
            worker.link.close()
            if status not in (EXIT_OK, EXIT_INTERRUPTED):
                said.append(self._note_death(worker, status))
        return said

    def _note_death(self, worker: Worker, status: int) -> str:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        told = f"worker {worker.slot.number} has died ({how})"
        if worker.run is None:
            self.idle_deaths += 1
            if self.idle_deaths >= DEATHS:
                raise RunFailed(f"{told} before it claimed a run; see {self.folder.path / LOGS}")
            return told
        self.idle_deaths = 0
        run = Run(self.folder.path / worker.run)
        place = _place(run)
        count, before = self.deaths.get(worker.run, (0, None))
        count = count + 1 if place == before else 1
        self.deaths[worker.run] = (count, place)
        if count < DEATHS:
            return f"{told}; its run {worker.run} resumes from its last checkpoint"
        lock = claim(run)
        if lock is not None:
            record_failure(run, f"its worker has died {count} times without making progress ({how}; out of memory?)")
            lock.release()
        return f"{told}, the {count}rd time in run {worker.run}, which is given up"

    def stop(self) -> None:
        """Ask all workers to write a checkpoint and exit, and wait until they have."""
        while alive := [worker.process for worker in self.workers.values() if worker.process.exitcode is None]:
            for process in alive:
                process.terminate()
            # A worker that has only just started may have missed the signal.
            multiprocessing.connection.wait([process.sentinel for process in alive], STOP_AGAIN_S)

    def wait(self, seconds: float) -> None:
        """Wait until a worker exits, for at most ``seconds``."""
        multiprocessing.connection.wait([worker.process.sentinel for worker in self.workers.values()], seconds)


def _place(run: Run) -> Any:
    """Return a run's progress, for comparison."""
    return epochs_done(run), sorted(path.name for path in run.checkpoints.glob("*.json"))


def _worker(path: str, slot: WorkerSlot, sharing: int, link: multiprocessing.connection.Connection) -> None:
    """Entry point of a worker process."""
    _show_in(Path(path) / LOGS / f"{slot.number}.txt")
    os.environ[SHARING] = str(sharing)
    if slot.devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(slot.devices)
    from toolkit.distributed.signals import GracefulStop
    from toolkit.study.worker import trainer, worker_loop

    def before(run: Run) -> None:
        _say(f"claimed {run.id}")
        link.send(run.id)

    _say(f"worker {slot.number}, process {os.getpid()} on {os.uname().nodename}, GPUs {', '.join(slot.devices) or '-'}")
    with GracefulStop() as stop:
        threading.Thread(target=_watch_controller, args=(link,), daemon=True).start()
        train = trainer(slot.processes, slot.devices, slot.gpu_share, stop)
        status = worker_loop(StudyDirectory(Path(path)), stop, train, waits=True, before=before)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _show_in(path: Path) -> None:
    """Redirect the output of this process to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _watch_controller(link: multiprocessing.connection.Connection) -> None:
    """When the controller is gone, request a stop; exit at once if that takes longer than the grace period."""
    with contextlib.suppress(EOFError, OSError):
        link.recv()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(EXIT_INTERRUPTED)


def slots_for(parallel: int | None, gpus_per_run: int, runs_per_gpu: int, devices: Sequence[str]) -> list[WorkerSlot]:
    """Return the worker slots of this machine: ``parallel`` of them, or as many as its GPUs have room for.

    ``devices`` are the GPUs, as in CUDA_VISIBLE_DEVICES; without any, the default is one worker. Runs on several GPUs
    never share one.
    """
    if not devices:
        return [WorkerSlot(number) for number in range(parallel or 1)]
    size = min(gpus_per_run, len(devices))
    groups = [tuple(devices[i : i + size]) for i in range(0, len(devices) - size + 1, size)]
    places = groups if size > 1 else [group for group in groups for _ in range(runs_per_gpu)]
    count = parallel or len(places)
    if size > 1:
        count = min(count, len(groups))
    chosen = [groups[number % len(groups)] for number in range(count)] if parallel else places
    return [WorkerSlot(n, group, size, 1 / chosen.count(group)) for n, group in enumerate(chosen)]


def gpus() -> list[str]:
    """Return the GPUs of this process as named in CUDA_VISIBLE_DEVICES, without initializing CUDA."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return []
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]
