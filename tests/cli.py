"""The command line within the test's process: fast, with exit status, stdout and stderr."""

from __future__ import annotations

from dataclasses import dataclass

from typer.testing import CliRunner

from toolkit.cli.main import app


@dataclass
class Outcome:
    """What a command left."""

    status: int
    stdout: str
    stderr: str


def toolkit(*arguments: str) -> Outcome:
    """`toolkit ARGUMENTS`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)
