"""The submit, status, logs and cancel commands: runs on a SLURM or Ray cluster. They do not import torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, Overrides, RunPath, chosen_run, load_recipe
from toolkit.errors import EXIT_FAILURE, EXIT_OK, UserError

if TYPE_CHECKING:
    from toolkit.recipe.diagnostics import Diagnostic
    from toolkit.slurm.job_status import JobStatus
    from toolkit.slurm.submit import SubmitResult

POLL_S = 1.0


@command
def submit(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|STUDY", help="TOML file; one with a [study] table becomes a job array.")
    ],
    set_: Overrides = None,
    to: Annotated[
        Literal["slurm", "ray"],
        typer.Option(metavar="CLUSTER", help="slurm, or ray: a Ray cluster, or Ray on this machine."),
    ] = "slurm",
    processes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ray: processes. Default: one per GPU of the cluster, or one."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Ray: run to resume, or auto: the newest unfinished one, or a new one."),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Study: concurrent runs. Default: all; for bohb, one.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Submit even if there are more than study.max_runs runs.")] = False,
    profile: Annotated[str | None, typer.Option(metavar="NAME", help="Cluster profile.")] = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", help="Number of nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(metavar="N", help="GPUs per node, one process each.")] = None,
    gpu_type: Annotated[str | None, typer.Option(metavar="TYPE", help="GPU type.")] = None,
    processes_per_node: Annotated[
        int | None, typer.Option(metavar="N", help="Without GPUs: processes per node.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(metavar="N", help="CPUs per node.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory per node, e.g. 64G.")] = None,
    limit: Annotated[
        str | None, typer.Option("--time", metavar="TIME", help="Time limit per start, e.g. 4:00:00.")
    ] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="Account.")] = None,
    qos: Annotated[str | None, typer.Option(metavar="NAME", help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(metavar="FEATURES", help="Required node features.")] = None,
    max_restarts: Annotated[
        int | None, typer.Option(metavar="N", help="Maximum number of requeues; Ray: of restarts.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit and write nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log until the job has ended.")] = False,
    as_json: AsJson = False,
) -> int:
    """Train a recipe or a study on a SLURM cluster or on Ray.

    A recipe becomes one job; a study becomes a job array and a final job that writes its table and report.

    Example: toolkit submit recipes/resnet50_caltech.toml --nodes 2 --gpus-per-node 4 --time 4:00:00 --profile lab

    A job that reaches its time limit, is preempted or loses a node is requeued and resumes. Submitting a study again
    continues its unfinished runs. With --to ray the command waits for the end, and prints the results; exit statuses
    are those of toolkit train.
    """
    requested = {
        "profile": profile, "nodes": nodes, "gpus_per_node": gpus_per_node, "gpu_type": gpu_type,
        "processes_per_node": processes_per_node, "cpus_per_task": cpus_per_task, "memory": memory, "time": limit,
        "partition": partition, "account": account, "qos": qos, "constraint": constraint, "max_restarts": max_restarts,
    }  # fmt: skip
    from toolkit.recipe.toml_writer import toml_value
    from toolkit.study.expand import is_study

    options = [f"slurm.{key}={toml_value(value)}" for key, value in requested.items() if value is not None]
    overrides = [*(set_ or []), *options]
    if to == "ray":
        for_slurm = {**requested, "parallel": parallel, "yes": yes or None, "dry_run": dry_run or None}
        _refuse_options(for_slurm, {"max_restarts"}, "SLURM; leave it out with --to ray")
        _train_with_ray(recipe, overrides, processes, resume, as_json=as_json)
        return EXIT_OK
    _refuse_options({"processes": processes, "resume": resume}, set(), "--to ray")
    if is_study(recipe, overrides):
        done = _submit_study(recipe, overrides, parallel, yes=yes, dry_run=dry_run)
    elif parallel is not None:
        raise UserError(f"--parallel is for studies; {recipe} has no [study] table, so it is one run")
    else:
        done = _submit_run(recipe, overrides, dry_run=dry_run)
    if done is None:
        return EXIT_OK
    _show_submission(done, as_json=as_json)
    return _wait(done) if wait else EXIT_OK


def _refuse_options(given: dict[str, Any], allowed: set[str], cluster: str) -> None:
    for key, value in given.items():
        if value is not None and key not in allowed:
            raise UserError(f"--{key.replace('_', '-')} is for {cluster}")


def _train_with_ray(
    path: str, overrides: list[str], processes: int | None, resume: str | None, *, as_json: bool
) -> None:
    from toolkit import ray_trainer
    from toolkit.cli.train import report_at_end, show_outcome

    loaded = load_recipe(path, overrides)
    if loaded.recipe.study is not None:
        raise UserError(f"{path} is a study of many runs, which --to ray does not train: toolkit study {path}")
    run_to_resume = resume if resume in (None, "auto") else str(chosen_run(resume))
    run = ray_trainer.train(loaded.recipe, loaded.origins_dict(path), processes=processes, resume=run_to_resume)
    report_at_end(run)
    show_outcome(run, as_json=as_json)


def _submit_run(path: str, overrides: list[str], *, dry_run: bool) -> SubmitResult | None:
    from toolkit.recipe import load
    from toolkit.slurm import submit as slurm

    loaded = load(path, overrides)
    settings, warnings = slurm.plan(path, loaded.recipe)
    _warn(loaded.warnings, warnings)
    if dry_run:
        print(slurm.preview(loaded.recipe, settings), end="")
        return None
    return slurm.submit_run(loaded.recipe, settings, loaded.origins_dict(path))


def _submit_study(
    path: str, overrides: list[str], parallel: int | None, *, yes: bool, dry_run: bool
) -> SubmitResult | None:
    from toolkit.cli.study import check_size
    from toolkit.slurm import array
    from toolkit.slurm.submit import require_slurm
    from toolkit.study.expand import expand, read_study

    study = read_study(path, overrides)
    expansion = expand(study)
    settings, warnings = array.plan_study(study, expansion)
    _warn(expansion.warnings, [*expansion.notes, *warnings])
    if dry_run:
        print(array.preview(study, expansion, settings, parallel), end="")
        return None
    check_size(study, expansion, yes=yes)
    require_slurm()
    # Imports torch to verify that every varied key has an effect, before many GPU hours are spent.
    from toolkit.study.effect_check import check_parameters_have_effect

    _warn([], check_parameters_have_effect(study, expansion))
    return array.submit_study(study, expansion, settings, parallel)


def _warn(findings: Sequence[Diagnostic], notes: Sequence[str]) -> None:
    for finding in findings:
        print(finding, file=sys.stderr)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)


def _show_submission(done: SubmitResult, *, as_json: bool) -> None:
    if as_json:
        record = {**asdict(done), "path": str(done.path), "script": str(done.script), "log": str(done.log)}
        print(json.dumps(record, indent=2), flush=True)
        return
    if done.is_array:
        table = (
            f"table and report by job {done.table_job} at the end" if done.table_job else f"toolkit table {done.path}"
        )
        lines = [f"array job {done.job}, {done.tasks} task(s)", f"study   {done.path}", f"script  {done.script}",
                 f"table   {table}", f"follow  toolkit status {done.path}"]  # fmt: skip
    else:
        lines = [f"job {done.job}", f"run     {done.path}", f"script  {done.script}", f"log     {done.log}",
                 f"follow  toolkit logs -f {done.path}"]  # fmt: skip
    print("\n  ".join([f"submitted {lines[0]}", *lines[1:], f"cancel  toolkit cancel {done.path}"]), flush=True)


def _wait(done: SubmitResult) -> int:
    """Wait for the job to end and return its exit status; for an array, 0 if all its runs are finished."""
    from toolkit.runs import open_run
    from toolkit.slurm.job_status import SlurmJob, find_runs, queue
    from toolkit.study.directory import StudyDirectory, failure_of

    if not done.is_array:
        _follow(done.log, lambda: _is_over([done.job]))
        run = open_run(done.path)
        outcome = SlurmJob(run).outcome
        return EXIT_OK if run.is_finished else outcome[0] if outcome and outcome[0] else EXIT_FAILURE
    while not _is_over([done.job, *([done.table_job] if done.table_job else [])]):
        time.sleep(2 * POLL_S)
    runs, folder = find_runs(done.path), StudyDirectory(done.path)
    _show_states(runs, queue())
    _print_from(done.path / "slurm" / "table-log.txt", 0)
    if folder.has_search:
        return EXIT_OK if folder.is_complete and not any(map(failure_of, runs)) else EXIT_FAILURE
    return EXIT_OK if all(run.is_finished for run in runs) else EXIT_FAILURE


def _is_over(jobs: list[str]) -> bool:
    """Return whether all of these jobs have ended, including all tasks of job arrays."""
    from toolkit.slurm.job_status import queue, tasks_of

    known = queue()
    if known is None:
        return False  # SLURM does not answer, so the jobs may still be running
    return not any(entry.is_active for job in jobs for entry in tasks_of(job, known))


def _follow(log: Path, is_over: Callable[[], bool]) -> None:
    """Print a growing file until ``is_over()``, which is polled at increasing intervals of up to 10 s."""
    position, pause, last_poll = 0, POLL_S, 0.0
    while True:
        over = False
        if time.monotonic() - last_poll > pause:
            over, last_poll, pause = is_over(), time.monotonic(), min(10.0, pause * 1.2)
        position = _print_from(log, position)
        if over:
            return
        time.sleep(POLL_S / 2)


def _print_from(log: Path, position: int) -> int:
    if not log.exists():
        return position
    from toolkit.reading import require_file

    require_file(log)
    with open(log, "rb") as file:
        file.seek(position)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(text)


@command
def status(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Run, study, folder of runs, or latest.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List runs and their states.

    The states are pending and failed (with the reason), running (with epoch and remaining time), finished, interrupted
    and cancelled, read from the run directories and, if available, from SLURM.

    Example: toolkit status runs
    """
    from toolkit.slurm.array import headline
    from toolkit.slurm.job_status import find_runs, queue, states

    runs = find_runs(path)
    jobs = queue()
    if as_json:
        print(json.dumps([asdict(state) for state in states(runs, jobs)], indent=2))
    elif runs:
        try:
            line = headline(path, jobs)
        except UserError as error:
            line = str(error)
        if line is not None:
            print(line)
        _show_states(runs, jobs)
    else:
        print(f"no runs in {path}")


def _show_states(runs: list[Any], jobs: Any) -> None:
    from toolkit.recipe.diagnostics import printable
    from toolkit.slurm.job_status import states
    from toolkit.study.text_table import width

    found = states(runs, jobs)
    lines = [["run", "job", "state", "epoch", "requeued", ""], *(_state_row(state) for state in found)]
    if any(state.row is not None for state in found):  # runs of a study are identified by row and seed
        named = [("row", "seed"), *((s.row or "-", "-" if s.seed is None else str(s.seed)) for s in found)]
        for line, (row, seed) in zip(lines, named, strict=True):
            line[1:1] = [printable(row), seed]
    widths = [max(width(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    for line in lines:
        cells = [cell + " " * (room - width(cell)) for cell, room in zip(line, widths, strict=False)]
        print(printable("  ".join([*cells, line[-1]]).rstrip()))


def _state_row(state: JobStatus) -> list[str]:
    path = Path(state.run)
    times = f"{state.requeued} times" if state.requeued != 1 else "once"
    return [
        f"{path.parent.name}/{path.name}",
        state.job or "-",
        state.state,
        f"{state.epoch}/{state.epochs or '?'}" if state.state != "damaged" else "-",
        times if state.requeued else "-",
        state.detail,
    ]


@command
def logs(
    run: RunPath,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow the log until the job has ended.")] = False,
) -> None:
    """Print the log of a run's job.

    Example: toolkit logs -f runs/quickstart/20260102-030405-abcd
    """
    from toolkit.runs import open_run
    from toolkit.slurm.job_status import SlurmJob

    opened = open_run(run)
    record = SlurmJob(opened).record
    log = opened.log_file if record is None else Path(record["log"])
    if not log.exists() and not follow:
        raise UserError(f"{log} does not exist yet: the job has not started (toolkit status {run})")
    if follow:
        _follow(log, lambda: _has_ended(run))
    else:
        _print_from(log, 0)


def _has_ended(path: Path) -> bool:
    from toolkit.runs import open_run
    from toolkit.slurm.job_status import queue, state_of

    jobs = queue()
    return state_of(open_run(path), jobs).state not in ("pending", "running", "unknown", "new")


@command
def cancel(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|STUDY", parser=chosen_run, help="Runs (as for toolkit evaluate) or studies."),
    ],
    as_json: AsJson = False,
) -> None:
    """Cancel the jobs of runs, or of whole studies.

    Cancelled jobs are not requeued. Checkpoints are kept: `toolkit train --resume RUN` resumes.

    Example: toolkit cancel runs/quickstart/20260102-030405-abcd
    """
    from toolkit.runs import open_run
    from toolkit.slurm.array import array_record, cancel_array
    from toolkit.slurm.submit import cancel as cancel_job

    cancelled = []
    for run in runs:
        number = cancel_array(run) if array_record(run) is not None else cancel_job(open_run(run))
        cancelled.append({"path": str(run), "job": str(number)})
        if not as_json:
            print(f"cancelled job {number}: {run}")
    if as_json:
        print(json.dumps(cancelled, indent=2))
