"""The project's own exceptions and the exit status each one ends a command with."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 3
"""Stopped by a signal or a time limit; running the same command again continues."""


class UserError(Exception):
    """Something the user can mend: shown as one message without a stack trace, exit status 2."""

    exit_status = EXIT_BAD_INPUT


class RunFailed(Exception):
    """Training cannot go on (non-finite loss, bad image, ...): one message, exit status 1."""

    exit_status = EXIT_FAILURE


class Interrupted(Exception):
    """Stopped on request after a checkpoint was written: exit status 3, resumable."""

    exit_status = EXIT_INTERRUPTED

    def __init__(self, message: str, *, agreed: bool = True) -> None:
        """``agreed``: all processes of the run end for the same reason, so that the first one's message is enough."""
        super().__init__(message)
        self.agreed = agreed
