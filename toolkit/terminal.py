"""Standard streams that are closed, or whose other end is gone, and a terminal that hangs up.

Training must not end because nobody reads what it prints: log.txt has all of it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO


def open_closed_streams() -> None:
    """Open the null device in place of closed standard streams (``2>&-``, a daemon).

    To be called before any file is opened: one that got the number 1 or 2 would receive whatever libraries print.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextlib.contextmanager
def outliving_terminal() -> Iterator[None]:
    """While this lasts, the process goes on when its terminal hangs up or nobody reads its output any more.

    SIGHUP is ignored, as with nohup, and what cannot be written to stdout or stderr is dropped.
    """
    streams = sys.stdout, sys.stderr
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if is_main else None
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
        if is_main:
            signal.signal(signal.SIGHUP, before)


class _LossyFile(io.FileIO):
    """A file descriptor that takes everything, whether it can be written or not."""

    def write(self, data: Any) -> int:
        """All of ``data`` counts as written."""
        try:
            return super().write(data) or 0
        except OSError:  # the reader is gone, the terminal hung up, the disk full
            return len(data)


def _lasting(stream: TextIO) -> TextIO:
    """The stream without errors of writing; as it is where there is no file behind it."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    file = io.BufferedWriter(_LossyFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)
