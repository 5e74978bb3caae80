"""When one process of several fails, the others end too, and its message is the last one shown.

The processes form a ring: a thread in each waits for a word from the next one by rank. A process that fails says why,
passes "failed" on, and exits; one that is killed breaks the connection, which its neighbour passes on as "lost". Then
nobody waits for it, also where a main thread hangs in a call that would never notice (NCCL on a GPU), and nobody covers
its message with consequences of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from toolkit.errors import EXIT_FAILURE

GRACE_S = 6.0
"""A main thread has this long to end in its own way after another process has failed."""
SEND_S = 1.0
"""A word is given this long; its receiver may be gone."""
GOODBYE, FAILED, LOST = range(3)
BROKEN = ("connection closed by peer", "connection reset", "broken pipe", "gloo/transport", "nccl", "socket")
"""In messages of torch.distributed that follow from another process's end."""

current: PeerWatch | None = None
"""That of this process, while it has joined others."""


class PeerWatch:
    """This process's place in the ring, from the moment the processes have joined to :meth:`close`."""

    def __init__(self) -> None:
        """A collective."""
        global current
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.next = (self.rank + 1) % self.world
        self.told = threading.Event()
        """Some process has failed and has said why."""
        self.lost: int | None = None
        """The rank that ended without a word."""
        self.leaving: threading.Timer | None = None
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()
        current = self

    def close(self) -> None:
        """Say goodbye before the end of this process, which all do."""
        global current
        current = None
        self._send(GOODBYE, self.rank)
        self.thread.join(GRACE_S)

    def tell_failure(self) -> None:
        """Let the others know that this process fails and has said why."""
        self.told.set()
        self._send(FAILED, self.rank)

    def _send(self, word: int, rank: int) -> None:
        """A word to the one before, in a thread: sending waits for a receiver."""

        def send() -> None:
            with contextlib.suppress(RuntimeError):  # it is gone: there is nobody to be told
                dist.send(torch.tensor([word, rank]), dst=(self.rank - 1) % self.world, group=self.group)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        sender.join(SEND_S)

    def _listen(self) -> None:
        message = torch.zeros(2, dtype=torch.int64)
        while True:
            try:
                dist.recv(message, src=self.next, group=self.group)
            except RuntimeError:
                if not self.told.is_set() and self.lost is None:
                    self._hear(LOST, self.next)
                return
            word, rank = (int(value) for value in message)
            if word == GOODBYE:
                return
            if rank != self.rank:  # not once around
                self._hear(word, rank)

    def _hear(self, word: int, rank: int) -> None:
        if word == FAILED:
            self.told.set()
        else:
            self.lost = rank
        if self.leaving is None:
            self.leaving = threading.Timer(GRACE_S, self._leave)
            self.leaving.daemon = True
            self.leaving.start()
        self._send(word, rank)

    def _leave(self) -> None:
        if not self.told.is_set():
            print(f"rank {self.rank}: {loss_message()}", file=sys.stderr, flush=True)
            self.tell_failure()
        os._exit(EXIT_FAILURE)


def watch_peers() -> PeerWatch | None:
    """Begin to watch the other processes, if there are any (a collective)."""
    return PeerWatch() if dist.is_initialized() and dist.get_world_size() > 1 else None


def is_loss(error: BaseException) -> bool:
    """Whether an error is but the consequence of another process's end."""
    text = str(error).lower()
    return current is not None and isinstance(error, RuntimeError) and any(word in text for word in BROKEN)


def loss_message() -> str:
    """What to say where a process ended without a word of its own."""
    who = "another process" if current is None or current.lost is None else f"rank {current.lost}"
    lost = f"{who} ended without a word (killed, or out of memory), so this one ends too"
    return f"{lost}; checkpoints written so far are kept"
