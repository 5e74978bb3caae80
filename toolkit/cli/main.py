"""The `toolkit` command. Subcommands import their dependencies only when called, so that help and checks are fast.

Results go to stdout, messages to stderr. Exit status: 0 done, 2 bad input, 3 interrupted but resumable, 1 other errors.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from toolkit.cli.bench import bench
from toolkit.cli.cache import cache
from toolkit.cli.calibrate import calibrate
from toolkit.cli.embed import embed
from toolkit.cli.errors import command
from toolkit.cli.estimate import data, doctor, pack, plan
from toolkit.cli.export import export, publish, sync
from toolkit.cli.find_lr import find_lr
from toolkit.cli.inference import evaluate, explain, predict
from toolkit.cli.list_names import datasets, models, optimizers, plugins, transforms
from toolkit.cli.new import new
from toolkit.cli.options import AsJson, RunPath
from toolkit.cli.probe import probe
from toolkit.cli.ready_recipes import recipes
from toolkit.cli.recipe import diff, schema, show, validate
from toolkit.cli.report import report
from toolkit.cli.results import table
from toolkit.cli.slurm import cancel, logs, status, submit
from toolkit.cli.soup import soup
from toolkit.cli.study import study
from toolkit.cli.sweep import sweep
from toolkit.cli.train import train
from toolkit.errors import EXIT_FAILURE, EXIT_OK
from toolkit.startup import prepare_process


def _print_version(is_given: bool) -> None:
    if is_given:
        from toolkit import __version__

        print(f"toolkit {__version__}")
        raise typer.Exit


app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
COMMANDS = (
    new, probe, train, recipes, validate, show, diff, schema, plan, data, pack, models, transforms, optimizers,
    datasets, plugins, doctor, bench, find_lr, cache, submit, status, logs, cancel, study, sweep, soup, table, report,
    evaluate, predict, embed, explain, calibrate, export, publish, sync,
)  # fmt: skip
for function in COMMANDS:
    app.command()(function)


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train image classifiers from TOML recipes."""


@app.command()
@command
def check(run: RunPath, as_json: AsJson = False) -> int:
    """Compare a run's metrics with those that its recipe expects.

    Each metric is met, missed or not comparable. Exit status 1 if one is missed.

    Example: toolkit check runs/quickstart
    """
    from dataclasses import asdict

    from toolkit.expectations import check_expectations
    from toolkit.runs import open_run

    opened = open_run(run)
    verdicts = check_expectations(opened.recipe, opened.summary)
    if as_json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    else:
        for verdict in verdicts:
            print(verdict.line())
        if not verdicts:
            print("the recipe has no [expected_metrics] table: nothing to check")
    return EXIT_FAILURE if any(verdict.verdict == "missed" for verdict in verdicts) else EXIT_OK


def main() -> None:
    """Run the `toolkit` command."""
    prepare_process()
    app()


if __name__ == "__main__":
    main()
