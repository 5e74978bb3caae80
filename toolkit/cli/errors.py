"""Error handling of all commands: one decorator, which also adds ``--plugin`` and ``--debug``."""

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

Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="Load plugins from a module: its name, or a Python file. Can be repeated.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the stack trace of every error.")]


def command(work: Callable[..., int | None]) -> Callable[..., None]:
    """Turn a function into a command with the options ``--plugin`` and ``--debug``; errors are shown as one message.

    The process exits with the status that the function returns (None: success), or with that of the error it raises.
    """

    @functools.wraps(work)
    def run(*arguments: Any, plugin: list[str] | None = None, debug: bool = False, **options: Any) -> None:
        exit_with_status(
            run_with_error_handling(lambda: _with_plugins(plugin, work, *arguments, **options), debug=debug)
        )

    signature = inspect.signature(work, eval_str=True)  # typer reads the annotations from here
    added = [
        inspect.Parameter("plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Plugins),
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug),
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    run.__annotations__ = {**work.__annotations__, "plugin": Plugins, "debug": Debug}
    return run


def _with_plugins(
    modules: list[str] | None, work: Callable[..., int | None], *arguments: Any, **options: Any
) -> int | None:
    if modules:
        from toolkit.plugins import use_modules

        use_modules(modules)
    return work(*arguments, **options)


def exit_with_status(status: int) -> NoReturn:
    """Exit with ``status``; after a failure of a distributed run, skip the interpreter's shutdown.

    A collective may never return, and shutting down while a thread is in one may abort the process (status -6).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status != EXIT_OK and is_distributed():
        os._exit(status)
    raise typer.Exit(status)
