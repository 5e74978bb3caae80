"""Handling of closed or broken standard streams and of a terminal that hangs up.

Training must not stop because its output cannot be written: log.txt has the complete output.
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

    Call before any file is opened: one that was given descriptor 1 or 2 would receive whatever libraries print.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free descriptor: this one
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def escape_unknown_characters() -> None:
    """Make stdout and stderr escape characters that the terminal's encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def outliving_terminal() -> Iterator[None]:
    """Keep the process running inside the context even if its terminal hangs up or its output cannot be written.

    SIGHUP is ignored, as with nohup, and output that cannot be written to stdout or stderr is dropped.
    """
    streams = sys.stdout, sys.stderr
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if is_main else None
    sys.stdout, sys.stderr = _ignoring_write_errors(sys.stdout), _ignoring_write_errors(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
        if is_main:
            signal.signal(signal.SIGHUP, before)


class _LossyFile(io.FileIO):
    """File descriptor that drops output it cannot write."""

    def write(self, data: Any) -> int:
        """Write ``data``; report it as written even if that fails."""
        try:
            return super().write(data) or 0
        except OSError:  # the reader has exited, the terminal has hung up or the disk is full
            return len(data)


def _ignoring_write_errors(stream: TextIO) -> TextIO:
    """Wrap a stream so that failed writes are dropped; return it unchanged if it has no file descriptor."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    file = io.BufferedWriter(_LossyFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)
