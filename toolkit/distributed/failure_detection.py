"""Failure detection: when one of several processes fails, the others end too, and its message is the last one shown.

The processes form a ring over gloo: each receives messages from both of its neighbors by rank and sends them a
heartbeat every second. Messages that concern all processes (this one has failed, a neighbor is lost, a stop was
requested) are forwarded in both directions, so that a single process that is gone or silent cannot block them. A
process that fails prints why, sends "failed", and exits; one that is killed breaks the connections, which its
neighbors report as "lost"; one that is stopped or whose machine hangs is noticed because its heartbeats stop. No
process waits for a lost one, even if its main thread is blocked in a call that would never notice (NCCL on a GPU).
A silent process is waited for, because it may recover, until a stop is requested.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from toolkit.distributed.signals import GracefulStop
from toolkit.errors import EXIT_FAILURE, EXIT_INTERRUPTED

GRACE_S = 6.0
"""Seconds that the main thread has to end by itself after another process has failed; then the process is ended."""
SEND_S = 1.0
"""Seconds to wait for a message to be sent; its receiver may be gone."""
HEARTBEAT_S = 1.0
"""Seconds between heartbeats to the neighbors."""
SILENT_S = 15.0
"""Seconds of silence after which a process is not waited for, once a stop was requested."""
NOTICE_S = 30.0
"""Seconds of silence after which a process is reported; without a stop request it is waited for."""
CLOSED, FAILED, LOST, HEARTBEAT, STOP, SILENT = range(6)
"""Kinds of messages."""
BROKEN = ("connection closed by peer", "connection reset", "broken pipe", "gloo/transport", "nccl", "socket")
"""Parts of torch.distributed's error messages when another process has ended."""

current: FailureDetector | None = None
"""This process's failure detector, while it is in a group with other processes."""
on_leave: Callable[[int, str], None] | None = None
"""Called with exit status and message when this process ends because of a lost or silent one."""


class FailureDetector:
    """Detector of failed, lost and silent processes: this process's connections in the ring, until :meth:`close`."""

    def __init__(self, stop: GracefulStop | None = None, names: dict[int, str] | None = None) -> None:
        """Start the threads (a collective). ``names``: host and process id of each rank, for messages."""
        global current
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.neighbors = sorted({(self.rank + 1) % self.world, (self.rank - 1) % self.world})
        self.stop, self.names = stop, names or {}
        self.failure_reported = threading.Event()
        """Set once any process has failed and has printed why."""
        self.lost: int | None = None
        """The rank that ended without reporting a failure, or is silent after a stop was requested."""
        self.is_silent = False
        """Whether the lost rank has not ended but is silent."""
        self.is_stopping = False
        """Whether a stop was requested from this or another process."""
        self.leaving: threading.Timer | None = None
        self.closing = threading.Event()
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self.last_received = dict.fromkeys(self.neighbors, time.monotonic())
        """Time of the last message from each neighbor whose detector is not closed."""
        self.silences: dict[int, float] = {}
        """Silences, in seconds, that were reported and have not ended, by neighbor."""
        self.receivers = [threading.Thread(target=self._receive, args=(rank,), daemon=True) for rank in self.neighbors]
        self.heartbeats = threading.Thread(target=self._send_heartbeats, daemon=True)
        for thread in (*self.receivers, self.heartbeats):
            thread.start()
        current = self

    def close(self) -> None:
        """Stop the detector; all processes call this before they end."""
        global current
        current = None
        self.closing.set()
        self.heartbeats.join(GRACE_S)
        self._send(CLOSED, self.rank)
        deadline = time.monotonic() + GRACE_S
        for receiver in self.receivers:
            receiver.join(max(0.0, deadline - time.monotonic()))
        for neighbor in list(self.silences):
            if neighbor not in self.last_received:  # it closed its detector before its heartbeat was checked again
                self._print_answer(neighbor)

    def report_failure(self) -> None:
        """Notify the others that this process has failed and has printed why."""
        self.failure_reported.set()
        self._send(FAILED, self.rank)

    def _send(self, kind: int, rank: int) -> None:
        """Send a message about ``rank`` to both neighbors, in threads because sending waits for the receiver."""
        senders = [self._sender(kind, rank, neighbor) for neighbor in self.neighbors]
        deadline = time.monotonic() + SEND_S
        for sender in senders:
            sender.join(max(0.0, deadline - time.monotonic()))

    def _sender(self, kind: int, rank: int, neighbor: int) -> threading.Thread:
        def send() -> None:
            with contextlib.suppress(RuntimeError):  # the neighbor has ended
                dist.send(torch.tensor([kind, rank]), dst=neighbor, group=self.group)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        return sender

    def _receive(self, neighbor: int) -> None:
        message = torch.zeros(2, dtype=torch.int64)
        while True:
            try:
                dist.recv(message, src=neighbor, group=self.group)
            except RuntimeError:
                if not self.failure_reported.is_set():
                    self._handle(LOST, neighbor)
                return
            self.last_received[neighbor] = time.monotonic()
            kind, rank = (int(value) for value in message)
            if kind == CLOSED:
                del self.last_received[neighbor]
                return
            if kind != HEARTBEAT:
                self._handle(kind, rank)

    def _handle(self, kind: int, rank: int) -> None:
        """Handle a message and forward it, unless it is a repetition: each arrives from both neighbors in the ring."""
        if kind == STOP:
            if not self.is_stopping:
                self.is_stopping = True
                self._send(kind, rank)
            return
        if kind == FAILED:
            if self.failure_reported.is_set():
                return
            self.failure_reported.set()
        else:
            if self.lost is not None:
                return
            self.lost, self.is_silent = rank, kind == SILENT
        if self.leaving is None:
            # One neighbor of a lost process ends first, so that its message is the only one.
            is_first = kind == FAILED or self.rank == (rank - 1) % self.world
            self.leaving = threading.Timer(GRACE_S if is_first else GRACE_S + SEND_S, self._leave)
            self.leaving.daemon = True
            self.leaving.start()
        self._send(kind, rank)

    def _send_heartbeats(self) -> None:
        """Send a heartbeat to the neighbors every second, and check that their heartbeats arrive."""
        senders: dict[int, threading.Thread] = {}
        last = time.monotonic()
        while not self.closing.wait(HEARTBEAT_S):
            now = time.monotonic()
            if now - last > SILENT_S / 2:  # this process itself was stopped, and received nothing meanwhile
                self.last_received.update(dict.fromkeys(list(self.last_received), now))
            last = now
            for neighbor in list(self.last_received):
                if neighbor not in senders or not senders[neighbor].is_alive():  # blocked while the neighbor is stopped
                    senders[neighbor] = self._sender(HEARTBEAT, self.rank, neighbor)
            if self.stop is not None and not self.is_stopping and self.stop.is_wanted():
                self._handle(STOP, self.rank)
            for neighbor, received in list(self.last_received.items()):
                self._check_silence(neighbor, now - received)
        for sender in senders.values():
            sender.join(SEND_S)

    def _check_silence(self, neighbor: int, silence: float) -> None:
        """Report a neighbor that has been silent for ``silence`` seconds; treat it as lost if a stop was requested."""
        if silence > SILENT_S and self.is_stopping:
            self._handle(SILENT, neighbor)
        elif silence > NOTICE_S and self.rank == (neighbor - 1) % self.world:  # one of its two neighbors reports
            if neighbor not in self.silences:
                print(
                    f"warning: {self._name(neighbor)} has not answered for {silence:.0f} s: it is stopped, or its "
                    "machine is swapping or disconnected; the other processes wait for it",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            self.silences[neighbor] = silence
        elif neighbor in self.silences and silence < NOTICE_S:
            self._print_answer(neighbor)

    def _print_answer(self, neighbor: int) -> None:
        silence = self.silences.pop(neighbor)
        print(f"{self._name(neighbor)} responds again after {silence:.0f} s", file=sys.stderr, flush=True)

    def _name(self, rank: int) -> str:
        return f"rank {rank}" + (f" ({self.names[rank]})" if rank in self.names else "")

    def _leave(self) -> None:
        status = EXIT_INTERRUPTED if self.is_silent else EXIT_FAILURE
        message = peer_lost_message()
        if not self.failure_reported.is_set():
            print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)
            if on_leave is not None:
                with contextlib.suppress(Exception):
                    on_leave(status, message)
            self.report_failure()
        os._exit(status)


def start_failure_detector(
    stop: GracefulStop | None = None, names: dict[int, str] | None = None
) -> FailureDetector | None:
    """Return this process's failure detector, or None for a single process; the first call creates it (a collective).

    ``stop``: once a stop is requested, silent processes are not waited for.
    """
    if current is not None or not dist.is_initialized() or dist.get_world_size() == 1:
        return current
    return FailureDetector(stop, names)


def close_failure_detector() -> None:
    """Close this process's failure detector, if it has one; all processes call this before they end."""
    if current is not None:
        current.close()


def is_peer_lost_error(error: BaseException) -> bool:
    """Return whether an error is only a consequence of the end of another process."""
    text = str(error).lower()
    return current is not None and isinstance(error, RuntimeError) and any(word in text for word in BROKEN)


def peer_lost_message() -> str:
    """Return the message about a process that is silent or ended without reporting a failure."""
    if current is not None and current.is_silent and current.lost is not None:
        return (
            f"{current._name(current.lost)} has not answered for {SILENT_S:.0f} s and a stop was requested "
            "(it is stopped, or its machine hangs), so this one exits without waiting; the last checkpoint is "
            "kept, and --resume continues from it"
        )
    who = "another process" if current is None or current.lost is None else f"rank {current.lost}"
    lost = f"{who} ended without an error message (killed, or out of memory), so this one exits too"
    return f"{lost}; checkpoints written so far are kept"
