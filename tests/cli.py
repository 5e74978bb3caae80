"""Run the command line in the test's process, which is fast, and capture exit status, stdout and stderr."""

from __future__ import annotations

from dataclasses import dataclass

from typer.testing import CliRunner

from toolkit.cli.main import app


@dataclass
class Outcome:
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str


def toolkit(*arguments: str) -> Outcome:
    """Run `toolkit ARGUMENTS`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)
