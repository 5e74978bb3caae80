"""Graceful stop: a signal or a file sets a flag, and all processes together save a checkpoint after the next step."""

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
"""Name of a file that requests a stop if it is in the run directory, for batch systems that do not deliver signals."""
LOOK_EVERY_S = 1.0
SAME_PRESS_S = 1.0
"""SIGINTs within this many seconds count as one: Ctrl-C arrives twice, from the terminal and through the launcher."""


ACKNOWLEDGED = "\nstopping: a checkpoint is written after this step (press Ctrl-C again to exit at once without one)\n"
"""Printed when Ctrl-C is pressed, before the current step has ended."""


class GracefulStop:
    """Context manager that records stop requests: SIGTERM, SIGINT, SIGUSR1, or the stop file.

    SIGHUP, sent when a terminal closes, is ignored as with nohup. Under torchrun it is a stop request, because torchrun
    forwards it and kills its processes 30 s later. A second SIGINT ends the process at once. The previous signal
    handlers are restored at the end.
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
            # A Python handler runs only between bytecodes of the main thread, which may block in a collective forever.
            # The numbers of arriving signals are written to this socket immediately, for other threads to read.
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
                # os.write, because a handler may interrupt a print and must not use its buffer
                with contextlib.suppress(OSError):
                    os.write(2, ACKNOWLEDGED.encode())
            self._pressed = self._pressed or now
        self.reason = self.reason or signal.Signals(number).name

    def watch(self, folder: Path) -> None:
        """Also check for the stop file in ``folder``; an existing one is removed."""
        self.folder = folder
        (folder / STOP_FILE).unlink(missing_ok=True)

    def is_wanted(self) -> bool:
        """Return whether a stop was requested, from any thread. Checks for the stop file at most once per second."""
        if not self.reason and self._wakeup is not None:
            with contextlib.suppress(OSError):  # nothing to read, or closed
                arrived = [number for number in self._wakeup[0].recv(1024) if number in self._old]
                self.reason = self.reason or next((signal.Signals(number).name for number in arrived), "")
        if not self.reason and self.folder is not None and time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            if (self.folder / STOP_FILE).exists():
                self.reason = f"the file {STOP_FILE}"
        return bool(self.reason)
