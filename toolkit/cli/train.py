"""The train command, also the entry of `python -m toolkit.train RECIPE` under any launcher."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import RECIPE_HELP, AsJson, Overrides, chosen_recipe, chosen_run, load_recipe
from toolkit.distributed.launcher import check_launch, read_process_info
from toolkit.error_handling import is_first_process
from toolkit.errors import UserError, first_line
from toolkit.terminal import outliving_terminal

if TYPE_CHECKING:
    from toolkit.runs import Run


@outliving_terminal()
@command
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|DATA",
            parser=chosen_recipe,
            help=f"{RECIPE_HELP} Not needed with --resume RUN. Or data as for toolkit new, whose recipe is then used.",
        ),
    ] = None,
    set_: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Run to resume (as for toolkit evaluate), or auto: the newest unfinished one."
        ),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even if the recipe or the data changed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build everything, try one batch, write nothing.")] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="With --dry-run: do not load pretrained weights.")
    ] = False,
    show_module: Annotated[bool, typer.Option("--show-module", help="Print the whole module before training.")] = False,
    report: Annotated[bool, typer.Option(help="Write figures and report.html at the end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train a recipe on the processes started by the launcher.

    Example: accelerate launch -m toolkit.train recipes/resnet50_caltech.toml --set train.epochs=5

    Exit status: 0 done, 2 bad input, 3 interrupted but resumable, 1 other errors.
    """

    read_process_info()  # rejects invalid launcher variables before anything else reads them
    run_to_resume = resume if resume in (None, "auto") else str(chosen_run(resume))
    path, written = _recipe_or_data(_recipe_path(recipe, run_to_resume), run_to_resume, set_ or [])
    loaded = load_recipe(path, set_, text=written)
    if loaded.recipe.study is not None:
        raise UserError(f"{recipe} is a study of many runs: toolkit study {recipe}")
    check_launch(loaded.recipe.train)
    # torch is imported only here, once the recipe is known to be valid.
    from toolkit.training import fit

    if dry_run:
        fit.dry_run(loaded.recipe, load_weights=not random_weights, show_module=show_module)
        return
    run = fit.fit(
        loaded.recipe,
        resume=run_to_resume,
        allow_changes=allow_changes,
        show_module=show_module,
        origins=loaded.origins_dict(path),
        written_recipe=written,
        began=process_start(),
    )
    if is_first_process():
        if report:
            report_at_end(run)
        show_outcome(run, as_json=as_json)


def process_start() -> float:
    """Return the start time of this process on the time.monotonic() clock, since the wall clock may be adjusted."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # since boot, see proc(5)
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        import psutil

        age = time.time() - psutil.Process().create_time()
    return time.monotonic() - max(age, 0.0)


def report_at_end(run: Run) -> None:
    """Write the figures and report of a finished run; any error becomes a one-line warning."""
    try:
        from toolkit.report.run_report import write_report

        written = write_report(run, log=lambda line: print(line, file=sys.stderr))
        for line in written.missing:
            print(f"not shown in the report: {line}", file=sys.stderr)
        print(f"report: {run.report_file}", file=sys.stderr)
    except (Exception, KeyboardInterrupt) as error:
        print(f"warning: no report ({first_line(error)}); to try again: toolkit report {run.path}", file=sys.stderr)


def _recipe_path(recipe: str | None, resume: str | None) -> str:
    """Return the given recipe, or that of the run to resume."""
    if recipe is not None:
        return recipe
    if resume in (None, "auto"):
        raise UserError("no recipe given: specify a TOML file or a ready-made recipe, as in toolkit train quickstart")
    return os.path.join(resume, "recipe.toml")


def _recipe_or_data(path: str, resume: str | None, overrides: list[str]) -> tuple[str, str | None]:
    """Return the path of a recipe and None; for data, the name and the text of the recipe written for them."""
    if path.lower().endswith(".toml"):
        return path, None
    from toolkit.new_recipe.source import is_data  # imports pydantic, which slows down `toolkit --help`

    if not is_data(path):
        return path, None
    from toolkit.new_recipe.training import recipe_for_training

    def log(line: str) -> None:
        print(line, file=sys.stderr)

    name, text = recipe_for_training(path, overrides, resume=resume, log=log)
    return f"{name}.toml", text


def show_outcome(run: Run, *, as_json: bool) -> None:
    """Print the result to stdout: as JSON, on a terminal as a card, else as a table and the path of the run."""
    from toolkit.expectations import check_expectations
    from toolkit.training.console import final_card
    from toolkit.training.fit import closing_text

    if as_json:
        print(json.dumps({"run": str(run.path), **run.summary}, indent=2))
    elif sys.stdout.isatty():
        expected = [verdict.line() for verdict in check_expectations(run.recipe, run.summary)]
        print(f"\n{final_card(run.summary, run.path, expected)}")
    else:
        print(closing_text(run.recipe, run.summary))
        print(run.path)
