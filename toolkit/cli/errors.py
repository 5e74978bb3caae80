"""Error handling of all commands: one decorator, which also adds ``--debug``."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from toolkit.distributed.launcher import is_distributed
from toolkit.error_handling import run_with_error_handling
from toolkit.errors import EXIT_OK

Debug = Annotated[bool, typer.Option("--debug", help="Show the stack trace of every error.")]


def command(work: Callable[..., int | None]) -> Callable[..., None]:
    """Turn a function into a command with the option ``--debug``, whose errors are shown as one message.

    The process exits with the status that the function returns (None: success), or with that of the error it raises.
    """

    @functools.wraps(work)
    def run(*arguments: Any, debug: bool = False, **options: Any) -> None:
        exit_with_status(run_with_error_handling(lambda: work(*arguments, **options), debug=debug))

    signature = inspect.signature(work, eval_str=True)  # typer reads the annotations from here
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    run.__annotations__ = {**work.__annotations__, "debug": Debug}
    return run


def exit_with_status(status: int) -> NoReturn:
    """Exit with ``status``; after a failure of a distributed run, skip the interpreter's shutdown.

    A collective may never return, and shutting down while a thread is in one may abort the process (status -6).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status != EXIT_OK and is_distributed():
        os._exit(status)
    raise typer.Exit(status)
