"""The study command: train all runs of a study."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, Overrides, chosen_recipe
from toolkit.distributed.launcher import is_distributed
from toolkit.errors import EXIT_OK, UserError
from toolkit.terminal import outliving_terminal

if TYPE_CHECKING:
    from toolkit.study.expand import ExpandedStudy, StudySpec

StudyPath = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        parser=chosen_recipe,
        help="TOML file with a [study] table, or the name of a ready-made study (toolkit recipes).",
    ),
]


@outliving_terminal()
@command
def study(
    study: StudyPath,
    set_: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the runs and their cost; train nothing.")] = False,
    parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Concurrent runs. Default: one per GPU; without GPUs, one.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Retry failed runs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Start even if there are more than study.max_runs runs.")] = False,
    worker: Annotated[
        bool, typer.Option("--worker", help="Train runs of a study that another `toolkit study` has started.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Train all runs of a study and print their table.

    Run the same command again to continue: finished runs are skipped, interrupted ones are resumed.

    Example: toolkit study recipes/papers/mereu/table08.toml --plan

    Exit status: 0 all runs finished, 1 some failed, 2 bad input, 3 interrupted.
    """
    from toolkit.study.expand import expand, read_study

    if is_distributed():
        raise UserError("toolkit study starts its own processes: run it without a launcher")
    found = read_study(study, set_ or [])
    if worker:
        from toolkit.study.worker import join_study

        return join_study(found.folder)
    expansion = expand(found)
    for warning in expansion.warnings:
        print(warning, file=sys.stderr)
    # torch is imported only here, once all recipes are known to be valid.
    notes = _check_effects(found, expansion)
    if plan:
        _show_plan(found, expansion, notes, as_json=as_json)
        return EXIT_OK
    for note in [*expansion.notes, *notes]:
        print(f"note: {note}", file=sys.stderr)
    check_size(found, expansion, yes=yes)
    return _run(found, expansion, parallel, retry=retry, as_json=as_json)


def _check_effects(study: StudySpec, expansion: ExpandedStudy) -> list[str]:
    from toolkit.study.effect_check import check_parameters_have_effect

    return check_parameters_have_effect(study, expansion)


def _show_plan(study: StudySpec, expansion: ExpandedStudy, notes: list[str], *, as_json: bool) -> None:
    from toolkit.study.cost_estimate import plan_study, plan_text

    planned = plan_study(study, expansion, notes)
    print(json.dumps(planned.to_json(), indent=2) if as_json else plan_text(planned))


def check_size(study: StudySpec, expansion: ExpandedStudy, *, yes: bool) -> None:
    """Raise UserError if a study has more runs than study.max_runs allows and ``yes`` is not set."""
    limit = study.table.max_runs
    count = study.table.bohb.trials if study.table.bohb else expansion.count
    if count > limit and not yes:
        raise UserError(
            f"{study.path} has {count} runs, more than study.max_runs = {limit}; check them with --plan, then start "
            "them with --yes, or raise study.max_runs"
        )


def _run(study: StudySpec, expansion: ExpandedStudy, parallel: int | None, *, retry: bool, as_json: bool) -> int:
    from toolkit.study.directory import StudyDirectory
    from toolkit.study.export_tables import terminal_text, to_json, write_tables
    from toolkit.study.runner import run_study
    from toolkit.study.study_results import TableOptions, read_outcomes
    from toolkit.study.worker_pool import gpus, slots_for

    slots = slots_for(parallel, study.table.gpus_per_run, study.table.runs_per_gpu, gpus())
    status = run_study(study, expansion, slots, retry=retry)
    outcomes = read_outcomes(StudyDirectory(study.folder), TableOptions())
    write_tables(outcomes, study.folder)
    print(json.dumps(to_json(outcomes), indent=2) if as_json else terminal_text(outcomes))
    return status
