"""Rendezvous of a run's processes with a time limit; messages name the missing ranks.

Everything that may block happens in a thread, so that the main thread can handle signals and the time limit.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from toolkit.distributed.failure_detection import start_failure_detector
from toolkit.distributed.launcher import ProcessInfo
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import Interrupted, RunFailed, UserError, first_line

TIMEOUT_VARIABLE = "TOOLKIT_JOIN_TIMEOUT"
ONE_MACHINE_S = 30.0
"""Time limit in seconds on one machine, where one launcher starts all processes at once."""
SEVERAL_MACHINES_S = 600.0
"""Time limit in seconds on several machines, which may start minutes apart (boot, container download, slow imports)."""
NOTICE_S = 10.0
"""Seconds after which a message names the missing ranks; waiting continues."""
POLL_S = 0.1
STORE_TIMEOUT = timedelta(minutes=30)
"""Time limit of requests to the store after joining; torch's default."""

_stores: dict[tuple[str, int], Any] = {}
"""Connected stores by address and port: another run in this Python process (a notebook) joins through the same one."""
_joins = itertools.count()
"""Counts the runs of this Python process, so that each uses its own keys in the store; equal on every rank."""


@dataclass(frozen=True)
class Peer:
    """A process that has joined."""

    host: str
    pid: int
    namespace: str
    """Identifies machine and container; process ids are comparable only within the same one."""

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended; False if it is not visible from here."""
        if self.namespace != _namespace():
            return False
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def join(info: ProcessInfo, backend: str, stop: GracefulStop | None = None) -> None:
    """Create the process group and the failure detector (a collective).

    Raises UserError if a RANK is taken or the processes disagree about WORLD_SIZE, RunFailed if one does not join
    within the time limit (see :func:`time_limit`), and Interrupted as soon as ``stop`` is requested.
    """
    limit = time_limit(info)
    joining = _Joining(info, backend, limit, stop)
    began, noticed = time.monotonic(), False
    joining.start()
    while not joining.finished.wait(POLL_S):
        waited = time.monotonic() - began
        if stop is not None and stop.reason:
            raise Interrupted(
                f"stopped by {stop.reason} while the processes were joining ({joining.state()}); nothing was trained",
                agreed=False,
            )
        if ended := joining.ended():
            raise RunFailed(f"{ended} ended while the processes were joining, so this one exits too")
        if waited > limit:
            raise RunFailed(f"gave up after {limit:g} s: {joining.state()}. {_advice(info)}")
        if not noticed and waited > min(NOTICE_S, limit / 2):
            noticed = True
            if joining.prints_notice():
                rest = f"waiting up to {limit:g} s ({TIMEOUT_VARIABLE})"
                print(f"rank {info.rank}: {joining.state()}; {rest}", file=sys.stderr, flush=True)
    if joining.error is not None:
        raise joining.error


def time_limit(info: ProcessInfo) -> float:
    """Return the seconds that processes have to join: TOOLKIT_JOIN_TIMEOUT, or 30 on one machine and 600 on several."""
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    if not text:
        return ONE_MACHINE_S if info.is_on_one_machine else SEVERAL_MACHINES_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(
            f"{TIMEOUT_VARIABLE} = {text!r}: set it to the seconds that processes may take to join, e.g. 600"
        )
    return seconds


def _advice(info: ProcessInfo) -> str:
    return (
        f"Check that exactly WORLD_SIZE = {info.world} processes were started, each with a RANK of its own, and that "
        f"all of them reach MASTER_ADDR:MASTER_PORT = {info.address}:{info.port}; if processes need longer to "
        f"start, set {TIMEOUT_VARIABLE} to more seconds"
    )


class _Joining(threading.Thread):
    """Thread that connects to the store, waits for all ranks, and creates the process groups."""

    def __init__(self, info: ProcessInfo, backend: str, limit: float, stop: GracefulStop | None) -> None:
        super().__init__(daemon=True)
        self.info, self.backend, self.stop = info, backend, stop
        self.limit = timedelta(seconds=limit)
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self.connection_error = "no answer yet"
        """Why the store cannot be reached."""
        self.is_connected = False
        self.members: dict[int, Peer] = {}
        """The ranks known to have joined."""

    def run(self) -> None:
        """Join the other processes; if that fails, store the exception in ``error``."""
        try:
            self._join()
        except (UserError, RunFailed) as error:
            self.error = error
        except Exception as error:
            time.sleep(5 * POLL_S)  # meanwhile the main thread may find the cause, the end of another process
            self.error = RunFailed(
                f"the processes could not join: {first_line(error):.300} ({self.state()}). {_advice(self.info)}"
            )
        self.finished.set()

    def _join(self) -> None:
        store, number = self._connect(), next(_joins)
        self.is_connected = True
        start = self._register_newest(store, number) if _has_agent_store() else self._register_once(store, number)
        store.set_timeout(STORE_TIMEOUT)
        group_store = PrefixStore(f"toolkit/group/{number}/{start}", store)
        info = self.info
        dist.init_process_group(self.backend, store=group_store, rank=info.rank, world_size=info.world)
        start_failure_detector(self.stop, {rank: str(member) for rank, member in self.members.items()})

    def _register_once(self, store: Any, number: int) -> int:
        self._register(PrefixStore(f"toolkit/join/{number}/0", store), lambda: False)
        return 0

    def _register_newest(self, store: Any, number: int) -> int:
        """Register for the most recent start of all processes, and return its number, from 1.

        torchrun starts all processes again after a failure or a change of the nodes (--max-restarts, --nnodes MIN:MAX),
        and the store of its agent still has the keys of earlier starts, so each start needs separate keys.
        Rank 0 counts the starts. Other ranks may read the count before rank 0 increases it; they detect this and wait.
        """
        starts = PrefixStore(f"toolkit/starts/{number}", store)
        start = starts.add("count", 1 if self.info.rank == 0 else 0)
        while True:

            def is_outdated(known: int = start) -> bool:
                return bool(starts.add("count", 0) != known)

            if start and self._register(PrefixStore(f"toolkit/join/{number}/{start}", store), is_outdated):
                return int(start)
            while not is_outdated():
                time.sleep(POLL_S)
            start = starts.add("count", 0)

    # -- the store ----------------------------------------------------------------------------------------------------

    def _connect(self) -> Any:
        info = self.info
        where = info.address, info.port
        if where not in _stores:
            serves = info.rank == 0 and not _has_agent_store()
            if not serves:
                self._wait_for_server()
            try:
                _stores[where] = TCPStore(
                    *where, info.world, serves, timeout=self.limit, wait_for_workers=False, multi_tenant=True
                )
            except dist.DistError as error:
                if "EADDRINUSE" not in str(error) and "in use" not in str(error):
                    raise
                raise UserError(
                    f"port {info.port} of this machine ({socket.gethostname()}) is in use, by another program or by "
                    "a second process with RANK=0: choose another one (MASTER_PORT; torchrun --master-port; accelerate "
                    "launch --main_process_port)"
                ) from None
        return _stores[where]

    def _wait_for_server(self) -> None:
        """Wait until rank 0 or torchrun's agent accepts connections, because TCPStore does not report why it fails."""
        while True:
            try:
                socket.create_connection((self.info.address, self.info.port), timeout=5).close()
                return
            except OSError as error:
                self.connection_error = (
                    f"{self.info.address} is not a known host"
                    if isinstance(error, socket.gaierror)
                    else str(error.strerror or error)
                )
                time.sleep(POLL_S)

    # -- the ranks ----------------------------------------------------------------------------------------------------

    def _register(self, registry: Any, is_outdated: Callable[[], bool]) -> bool:
        """Register this rank and wait for all others; return False if the registry is that of an earlier start.

        If ranks disagree, the error is stored and all raise it.
        """
        info = self.info
        self.members = {info.rank: Peer(socket.gethostname(), os.getpid(), _namespace())}
        entry = json.dumps(vars(self.members[info.rank]))
        stated = f"{info.world} for rank {info.rank} on {socket.gethostname()}"
        first = registry.compare_set("world", "", stated).decode()
        if int(first.split()[0]) != info.world:
            if _has_agent_store():
                return False
            self._refuse(registry, f"WORLD_SIZE is {stated}, but {first}")
        if registry.add(f"entries/{info.rank}", 1) > 1:
            if _has_agent_store():
                return False
            other = Peer(**json.loads(registry.get(f"rank/{info.rank}")))
            self._refuse(registry, f"RANK={info.rank} was given to two processes: {other}; {self.members[info.rank]}")
        registry.set(f"rank/{info.rank}", entry)
        registry.add("count", 1)
        read_every, read_at = max(1.0, info.world / 50), time.monotonic()
        while (count := registry.add("count", 0)) < info.world:
            if registry.check(["fault"]):
                if info.rank == 0:
                    time.sleep(1)  # rank 0 may serve the store: let the others read the error first
                raise UserError(registry.get("fault").decode())
            if is_outdated():
                return False
            if time.monotonic() - read_at > read_every:  # not each time, because it takes one request per rank
                self._read_members(registry)
                read_at = time.monotonic()
            time.sleep(POLL_S if count else 2 * POLL_S)
        self._read_members(registry)
        return True

    def _read_members(self, registry: Any) -> None:
        for rank in range(self.info.world):
            key = f"rank/{rank}"
            if rank not in self.members and registry.check([key]):
                self.members = {**self.members, rank: Peer(**json.loads(registry.get(key)))}

    def _refuse(self, registry: Any, fault: str) -> None:
        fault += ". Each process needs a RANK of its own, and all need the same WORLD_SIZE; torchrun sets both"
        registry.set("fault", fault)
        raise UserError(fault)

    # -- called by the main thread ------------------------------------------------------------------------------------

    def state(self) -> str:
        """Describe what this process is waiting for."""
        info, members = self.info, self.members
        if not self.is_connected:
            return (
                f"rank {info.rank} of {info.world} cannot reach rank 0 at MASTER_ADDR:MASTER_PORT = "
                f"{info.address}:{info.port} ({self.connection_error})"
            )
        missing = [rank for rank in range(info.world) if rank not in members]
        joined = "; ".join(f"rank {rank} ({members[rank]})" for rank in sorted(members)[:8])
        more = f" and {len(members) - 8} more" if len(members) > 8 else ""
        if missing:
            have = "has" if len(missing) == 1 else "have"
            return f"{_ranks(missing)} of {info.world} {have} not joined; joined: {joined}{more}"
        return f"all {info.world} ranks have joined ({joined}{more}), but their connections are not complete"

    def ended(self) -> str | None:
        """Describe a process on this machine that has joined and has ended since; None if there is none."""
        gone = next((rank for rank, member in self.members.items() if member.has_ended()), None)
        return None if gone is None else f"rank {gone} ({self.members[gone]})"

    def prints_notice(self) -> bool:
        """Return whether this process prints the notice for all: the lowest rank that has joined does."""
        return self.info.rank == min(self.members, default=self.info.rank)


def _has_agent_store() -> bool:
    """Return whether torchrun's agent holds the store, so that it survives a restart of the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _ranks(ranks: list[int]) -> str:
    """Format ranks: "rank 3", "ranks 1-3, 7"."""
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        numbers = [rank for _, rank in run]
        parts.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"
