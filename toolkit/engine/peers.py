"""When one process of several fails, the others end too, and its message is the last one shown.

The processes form a ring, over gloo: each listens to both of its neighbors by rank, and tells them every second that it
lives. What one process has to say to all (it fails, a neighbor is lost, a stop was requested) is passed on in both
directions, so that no single process that is gone or silent can keep it from the others. A process that fails says
why, passes "failed" on, and exits; one that is killed breaks the connections, which its neighbors pass on as "lost";
one that is stopped or whose machine hangs is noticed by its silence. Nobody waits for a lost process, also where a main
thread hangs in a call that would never notice (NCCL on a GPU). A silent one is waited for, as it may come back, until a
stop is requested.
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

from toolkit.engine.signals import StopRequest
from toolkit.errors import EXIT_FAILURE, EXIT_INTERRUPTED

GRACE_S = 6.0
"""A main thread has this long to end in its own way after another process has failed."""
SEND_S = 1.0
"""A word is given this long; its receiver may be gone."""
BEAT_S = 1.0
"""Each process tells its neighbors this often that it lives."""
SILENT_S = 15.0
"""After a stop was requested, a process that has said nothing for so long is not waited for."""
NOTICE_S = 30.0
"""Without such a request, a silence of this length is reported, and the process is waited for."""
GOODBYE, FAILED, LOST, ALIVE, STOP, SILENT = range(6)
BROKEN = ("connection closed by peer", "connection reset", "broken pipe", "gloo/transport", "nccl", "socket")
"""In messages of torch.distributed that follow from another process's end."""

current: PeerWatch | None = None
"""That of this process, while it has joined others."""
on_leave: Callable[[int, str], None] | None = None
"""Called with exit status and message where this process ends because of a lost or silent one, unless that is told."""


class PeerWatch:
    """This process's place in the ring, from the moment the processes have joined to :meth:`close`."""

    def __init__(self, stop: StopRequest | None = None, names: dict[int, str] | None = None) -> None:
        """A collective. ``names``: host and process number of each rank, for messages."""
        global current
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.neighbors = sorted({(self.rank + 1) % self.world, (self.rank - 1) % self.world})
        self.stop, self.names = stop, names or {}
        self.told = threading.Event()
        """Some process has failed and has said why."""
        self.lost: int | None = None
        """The rank that ended without a word, or is silent after a stop was requested."""
        self.is_silent = False
        """Whether the lost rank has not ended, but is silent."""
        self.is_stopping = False
        """A stop was requested, of this or another process."""
        self.leaving: threading.Timer | None = None
        self.closing = threading.Event()
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self.heard = dict.fromkeys(self.neighbors, time.monotonic())
        """When each neighbor was last heard; without those that have said goodbye."""
        self.listeners = [threading.Thread(target=self._listen, args=(rank,), daemon=True) for rank in self.neighbors]
        self.beating = threading.Thread(target=self._beat, daemon=True)
        for thread in (*self.listeners, self.beating):
            thread.start()
        current = self

    def close(self) -> None:
        """Say goodbye before the end of this process, which all do."""
        global current
        current = None
        self.closing.set()
        self.beating.join(GRACE_S)
        self._send(GOODBYE, self.rank)
        deadline = time.monotonic() + GRACE_S
        for listener in self.listeners:
            listener.join(max(0.0, deadline - time.monotonic()))

    def tell_failure(self) -> None:
        """Let the others know that this process fails and has said why."""
        self.told.set()
        self._send(FAILED, self.rank)

    def _send(self, word: int, rank: int) -> None:
        """A word to both neighbors, in threads: sending waits for a receiver."""
        senders = [self._sender(word, rank, neighbor) for neighbor in self.neighbors]
        deadline = time.monotonic() + SEND_S
        for sender in senders:
            sender.join(max(0.0, deadline - time.monotonic()))

    def _sender(self, word: int, rank: int, neighbor: int) -> threading.Thread:
        def send() -> None:
            with contextlib.suppress(RuntimeError):  # it is gone: there is nobody to be told
                dist.send(torch.tensor([word, rank]), dst=neighbor, group=self.group)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        return sender

    def _listen(self, neighbor: int) -> None:
        message = torch.zeros(2, dtype=torch.int64)
        while True:
            try:
                dist.recv(message, src=neighbor, group=self.group)
            except RuntimeError:
                if not self.told.is_set():
                    self._hear(LOST, neighbor)
                return
            self.heard[neighbor] = time.monotonic()
            word, rank = (int(value) for value in message)
            if word == GOODBYE:
                del self.heard[neighbor]
                return
            if word != ALIVE:
                self._hear(word, rank)

    def _hear(self, word: int, rank: int) -> None:
        """Act on a word and pass it on, once: it comes from both sides."""
        if word == STOP:
            if not self.is_stopping:
                self.is_stopping = True
                self._send(word, rank)
            return
        if word == FAILED:
            if self.told.is_set():
                return
            self.told.set()
        else:
            if self.lost is not None:
                return
            self.lost, self.is_silent = rank, word == SILENT
        if self.leaving is None:
            # One neighbor of a lost process ends first, so that its message is the only one.
            is_first = word == FAILED or self.rank == (rank - 1) % self.world
            self.leaving = threading.Timer(GRACE_S if is_first else GRACE_S + SEND_S, self._leave)
            self.leaving.daemon = True
            self.leaving.start()
        self._send(word, rank)

    def _beat(self) -> None:
        """Tell the neighbors every second that this process lives, and look whether they do."""
        beats: dict[int, threading.Thread] = {}
        noticed: dict[int, float] = {}
        last = time.monotonic()
        while not self.closing.wait(BEAT_S):
            now = time.monotonic()
            if now - last > SILENT_S / 2:  # this process itself was stopped, and heard nobody meanwhile
                self.heard.update(dict.fromkeys(list(self.heard), now))
            last = now
            for neighbor in list(self.heard):
                if neighbor not in beats or not beats[neighbor].is_alive():  # it blocks while the neighbor is stopped
                    beats[neighbor] = self._sender(ALIVE, self.rank, neighbor)
            if self.stop is not None and not self.is_stopping and self.stop.is_wanted():
                self._hear(STOP, self.rank)
            for neighbor, heard in list(self.heard.items()):
                self._judge(neighbor, now - heard, noticed)
        for beat in beats.values():
            beat.join(SEND_S)

    def _judge(self, neighbor: int, silence: float, noticed: dict[int, float]) -> None:
        """Act on a neighbor's silence in seconds. ``noticed``: the silences that were reported, by rank."""
        if silence > SILENT_S and self.is_stopping:
            self._hear(SILENT, neighbor)
        elif silence > NOTICE_S and self.rank == (neighbor - 1) % self.world:  # one of its two neighbors reports
            if neighbor not in noticed:
                print(
                    f"warning: {self._name(neighbor)} has not answered for {silence:.0f} s: it is stopped, or its "
                    "machine swaps or is cut off; the other processes wait for it",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            noticed[neighbor] = silence
        elif neighbor in noticed and silence < NOTICE_S:
            print(
                f"{self._name(neighbor)} answers again after {noticed.pop(neighbor):.0f} s", file=sys.stderr, flush=True
            )

    def _name(self, rank: int) -> str:
        return f"rank {rank}" + (f" ({self.names[rank]})" if rank in self.names else "")

    def _leave(self) -> None:
        status = EXIT_INTERRUPTED if self.is_silent else EXIT_FAILURE
        message = loss_message()
        if not self.told.is_set():
            print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)
            if on_leave is not None:
                with contextlib.suppress(Exception):
                    on_leave(status, message)
            self.tell_failure()
        os._exit(status)


def watch_peers(stop: StopRequest | None = None, names: dict[int, str] | None = None) -> PeerWatch | None:
    """The watch over the other processes, if there are any; the first call makes it (a collective).

    ``stop``: after a request, silent processes are not waited for.
    """
    if current is not None or not dist.is_initialized() or dist.get_world_size() == 1:
        return current
    return PeerWatch(stop, names)


def is_loss(error: BaseException) -> bool:
    """Whether an error is but the consequence of another process's end."""
    text = str(error).lower()
    return current is not None and isinstance(error, RuntimeError) and any(word in text for word in BROKEN)


def loss_message() -> str:
    """What to say where a process ended without a word of its own, or is silent."""
    if current is not None and current.is_silent and current.lost is not None:
        return (
            f"{current._name(current.lost)} has not answered for {SILENT_S:.0f} s and a stop was requested "
            "(it is stopped, or its machine hangs), so this one ends without it; the last checkpoint is kept, and "
            "--resume continues it"
        )
    who = "another process" if current is None or current.lost is None else f"rank {current.lost}"
    lost = f"{who} ended without a word (killed, or out of memory), so this one ends too"
    return f"{lost}; checkpoints written so far are kept"
