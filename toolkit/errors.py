"""The project's exceptions and the exit status of each."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 3
"""Stopped by a signal or a time limit; running the same command again resumes."""


class UserError(Exception):
    """An error that the user can fix: shown as one message without a stack trace, exit status 2."""

    exit_status = EXIT_BAD_INPUT


def missing_package(what: str, packages: str, extra: str) -> UserError:
    """Return the error that ``what`` needs optional packages ("a", or "a and b"), with the command to install them.

    They are in ``extra`` of this project's optional dependencies. The command is right for a wheel and for a checkout.
    """
    verb = "are" if " and " in packages else "is"
    return UserError(
        f"{what} needs {packages}, which {verb} not installed: pip install 'image-classification-toolkit[{extra}]'"
    )


class RunFailed(Exception):
    """Training cannot continue (non-finite loss, bad image, ...): shown as one message, exit status 1."""

    exit_status = EXIT_FAILURE


class Interrupted(Exception):
    """Stopped on request after a checkpoint was written: exit status 3, resumable."""

    exit_status = EXIT_INTERRUPTED

    def __init__(self, message: str, *, agreed: bool = True) -> None:
        """If ``agreed``, all processes stop for the same reason, so that only rank 0 prints the message."""
        super().__init__(message)
        self.agreed = agreed


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
