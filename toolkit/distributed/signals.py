"""Stopping on request: a signal or a file sets a flag; the loop saves at the next step, all processes agreed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

STOP_FILE = "stop"
"""A file of this name in the run directory asks the run to stop, where signals do not arrive (batch systems)."""
LOOK_EVERY_S = 1.0
SAME_PRESS_S = 1.0
"""Ctrl-C reaches a trainer twice, from the terminal and through the launcher; what comes so soon is one press."""


ACKNOWLEDGED = "\nstopping: a checkpoint is written after this step (Ctrl-C again ends at once, without one)\n"
"""Shown when Ctrl-C is pressed, before the step that is under way has ended."""


class GracefulStop:
    """Whether somebody wants the run to stop: SIGTERM, SIGINT, SIGUSR1, or the stop file.

    SIGHUP, from a terminal that hangs up, is ignored as with nohup; but torchrun passes on its own and kills its
    processes 30 s later, so there it is a request to stop. A second SIGINT ends the process at once. Used as a context
    manager; the handlers from before come back after it.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.folder: Path | None = None
        self._looked = 0.0
        self._pressed: float | None = None
        self._old: dict[int, Any] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._old_wakeup = -1

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._old[number] = signal.signal(number, self._handle)
            is_under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
            hangup = self._handle if is_under_torchrun else signal.SIG_IGN
            self._old[signal.SIGHUP] = signal.signal(signal.SIGHUP, hangup)
            # A handler runs only between two steps of the main thread's Python code, which may wait in a collective for
            # ever; the numbers of signals that arrive are written here at once, for other threads to read.
            self._wakeup = socket.socketpair()
            for end in self._wakeup:
                end.setblocking(False)
            self._old_wakeup = signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._old_wakeup)
            for end in self._wakeup:
                end.close()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._pressed is not None and now - self._pressed > SAME_PRESS_S:
                os._exit(128 + number)
            if self._pressed is None and os.environ.get("RANK", "0") == "0":
                # os.write, since a handler may interrupt a print and must not touch its buffer.
                with contextlib.suppress(OSError):
                    os.write(2, ACKNOWLEDGED.encode())
            self._pressed = self._pressed or now
        self.reason = self.reason or signal.Signals(number).name

    def watch(self, folder: Path) -> None:
        """Also look for the stop file in ``folder``; one left there earlier is taken away."""
        self.folder = folder
        (folder / STOP_FILE).unlink(missing_ok=True)

    def is_wanted(self) -> bool:
        """Whether to stop, in any thread. Looks at the file system once a second at most."""
        if not self.reason and self._wakeup is not None:
            with contextlib.suppress(OSError):  # nothing to read, or closed
                arrived = [number for number in self._wakeup[0].recv(1024) if number in self._old]
                self.reason = self.reason or next((signal.Signals(number).name for number in arrived), "")
        if not self.reason and self.folder is not None and time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            if (self.folder / STOP_FILE).exists():
                self.reason = f"the file {STOP_FILE}"
        return bool(self.reason)
