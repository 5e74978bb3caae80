"""study: a file that tells of many runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from toolkit.train import Debug, Overrides, end, report_errors

StudyPath = Annotated[str, typer.Argument(metavar="STUDY", help="TOML file with a [study] table.")]


def study(
    study: StudyPath,
    set_: Overrides = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed runs again.")] = False,
    debug: Debug = False,
) -> None:
    """Train all runs of a study.

    Example: toolkit study recipes/papers/mereu/table08.toml

    Exit status: 0 all runs finished, 1 some failed, 2 bad input, 3 interrupted; the same command goes on.
    """

    def work() -> int:
        from toolkit.study.expand import expand, read_study

        found = read_study(study, set_ or [])
        expansion = expand(found)
        for warning in expansion.warnings:
            print(warning, file=sys.stderr)
        # torch is imported here, after everything was found good.
        from toolkit.study.controller import run_study

        return run_study(found, expansion, retry=retry)

    end(report_errors(work, debug=debug))
