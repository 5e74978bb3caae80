"""Run the command line in the test's process, which is fast, and capture exit status, stdout and stderr."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import typer.testing

from toolkit.cli.main import app

# Building the commands takes 14 ms, most of the time of a fast command; a process of the program does it once too.
typer.testing._get_command = functools.cache(typer.testing._get_command)


@dataclass
class Outcome:
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str


def toolkit(*arguments: str) -> Outcome:
    """Run `toolkit ARGUMENTS`."""
    result = typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)
