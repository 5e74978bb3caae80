"""submit, status, logs, cancel: runs on a SLURM cluster. None of them imports torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.errors import EXIT_FAILURE, EXIT_OK, UserError
from toolkit.train import AsJson, Debug, Overrides, end, report_errors

if TYPE_CHECKING:
    from toolkit.recipe import Recipe
    from toolkit.slurm.job import State
    from toolkit.slurm.submit import Submitted

POLL_S = 1.0
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]


def submit(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="TOML files; several make an array.")],
    set_: Overrides = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds by comma; each recipe is trained with each.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Array: at most so many runs at a time.")] = None,
    name: Annotated[str | None, typer.Option(help="Array: its name. Default: from the recipes.")] = None,
    profile: Annotated[str | None, typer.Option(help="Cluster profile.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each node; one process each.")] = None,
    gpu_type: Annotated[str | None, typer.Option(help="Kind of GPU.")] = None,
    processes_per_node: Annotated[int | None, typer.Option(help="Without GPUs: processes on each node.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPUs of each node.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each node, e.g. 64G.")] = None,
    limit: Annotated[str | None, typer.Option("--time", help="Time limit of one start, e.g. 4:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features of the nodes.")] = None,
    max_restarts: Annotated[int | None, typer.Option(help="How often the job may be requeued.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit and write nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show the log and stay until the job has ended.")] = False,
    debug: Debug = False,
) -> None:
    """Train recipes on a SLURM cluster.

    One recipe is a job, several (or several seeds) are an array.

    Example: toolkit submit recipes/resnet50_caltech.toml --nodes 2 --gpus-per-node 4 --time 4:00:00 --profile lab

    A job that meets its time limit, is pre-empted or loses a node goes on by itself. An array that is submitted again
    goes on with its runs that are not finished.
    """
    asked = {
        "profile": profile, "nodes": nodes, "gpus_per_node": gpus_per_node, "gpu_type": gpu_type,
        "processes_per_node": processes_per_node, "cpus_per_task": cpus_per_task, "memory": memory, "time": limit,
        "partition": partition, "account": account, "qos": qos, "constraint": constraint, "max_restarts": max_restarts,
    }  # fmt: skip

    def work() -> int:
        from toolkit.recipe.writing import toml_value
        from toolkit.slurm import submit as slurm

        options = [f"slurm.{key}={toml_value(value)}" for key, value in asked.items() if value is not None]
        chosen = _load(recipes, [*(set_ or []), *options], _seeds(seeds))
        settings, warnings = slurm.plan(chosen)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if dry_run:
            _preview(chosen, settings, name, parallel)
            return EXIT_OK
        if len(chosen) == 1:
            done = slurm.submit_run(chosen[0][1], settings)
        else:
            done = slurm.submit_array(chosen, settings, name=_checked_name(name), parallel=parallel)
        _tell(done, is_array=len(chosen) > 1)
        return _wait(done) if wait else EXIT_OK

    end(report_errors(work, debug=debug))


def _load(paths: list[str], overrides: list[str], seeds: list[int] | None) -> list[tuple[str, Recipe]]:
    """Every recipe with every seed, checked as `toolkit validate` does; all that is wrong is said at once."""
    from toolkit.recipe import RecipeError, load

    faults, found = [], []
    chosen: list[int | None] = [*seeds] if seeds else [None]
    for path in paths:
        for seed in chosen:
            try:
                loaded = load(path, [*overrides, *([] if seed is None else [f"recipe.seed={seed}"])])
            except RecipeError as error:
                faults += error.diagnostics
                break
            for warning in loaded.warnings if seed == chosen[0] else ():
                print(warning, file=sys.stderr)
            found.append((path, loaded.recipe))
    if faults:
        raise RecipeError(faults)
    return found


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--seeds {text!r}: give whole numbers by comma, such as 0,1,2")
    if len(set(parts)) != len(parts):
        raise UserError(f"--seeds {text!r}: the same seed twice")
    return [int(part) for part in parts]


def _checked_name(name: str | None) -> str | None:
    import re

    from toolkit.recipe.table import NAME_LENGTH, NAME_PATTERN

    if name is not None and (not re.match(NAME_PATTERN, name) or len(name) > NAME_LENGTH or "\n" in name):
        raise UserError(f"--name {name!r}: give letters, digits and _+=,@- ; it becomes a folder")
    return name


def _preview(chosen: list[tuple[str, Recipe]], settings: Any, name: str | None, parallel: int | None) -> None:
    from toolkit.slurm import script
    from toolkit.slurm import submit as slurm

    if len(chosen) == 1:
        print(slurm.preview(chosen[0][1], settings), end="")
    else:
        folder = slurm.array_folder(chosen, _checked_name(name))
        print(script.array_script(settings, folder, folder.name, len(chosen), parallel), end="")


def _tell(done: Submitted, *, is_array: bool) -> None:
    what = f"array job {done.job}, {done.tasks} run(s)" if is_array else f"job {done.job}"
    print(f"submitted {what}")
    print(f"  {'folder' if is_array else 'run   '}  {done.path}")
    print(f"  script  {done.script}")
    if is_array:
        print(f"  table   {done.path / 'table.md'}, " + (
            f"by job {done.table_job} at the end" if done.table_job
            else f"to be made by hand: python -m toolkit.slurm.inside table {done.path}"))  # fmt: skip
    else:
        print(f"  log     {done.log}")
    print(f"  follow  toolkit status {done.path}" if is_array else f"  follow  toolkit logs -f {done.path}")
    print(f"  cancel  scancel {done.job}" if is_array else f"  cancel  toolkit cancel {done.path}", flush=True)


def _wait(done: Submitted) -> int:
    """Follow to the end. Exit status: the job's; for an array 0 where all its runs are finished."""
    from toolkit.slurm.job import Job, find_runs, queue
    from toolkit.slurm.table import write_table

    runs = find_runs(done.path)
    if len(runs) == 1 and done.log != done.path:
        _follow(done.log, lambda: _is_over([done.job]))
        outcome = Job(runs[0]).outcome
        return EXIT_OK if runs[0].is_finished else outcome[0] if outcome and outcome[0] else EXIT_FAILURE
    while not _is_over([done.job, *([done.table_job] if done.table_job else [])]):
        time.sleep(2 * POLL_S)
    _show_states(runs, queue())
    print(write_table(done.path))
    return EXIT_OK if all(run.is_finished for run in runs) else EXIT_FAILURE


def _is_over(jobs: list[str]) -> bool:
    """Whether SLURM has done with all these jobs and the tasks of these arrays."""
    from toolkit.slurm.job import queue

    known = queue()
    if known is None:
        return False  # SLURM is busy or restarts; the jobs go on
    return not any(entry.is_active and name.split("_")[0] in jobs for name, entry in known.items())


def _follow(log: Path, is_over: Callable[[], bool]) -> None:
    """Print a growing file until ``is_over``, which is asked less and less often, up to every 10 s."""
    position, pause, asked = 0, POLL_S, 0.0
    while True:
        over = False
        if time.monotonic() - asked > pause:
            over, asked, pause = is_over(), time.monotonic(), min(10.0, pause * 1.2)
        position = _print_from(log, position)
        if over:
            return
        time.sleep(POLL_S / 2)


def _print_from(log: Path, position: int) -> int:
    if not log.exists():
        return position
    with open(log, "rb") as file:
        file.seek(position)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(text)


def status(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Run, array, recipe's folder or run root.")] = Path(
        "runs"
    ),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List runs with their state.

    Pending and why, running with epoch and time to go, finished, interrupted, cancelled, or failed and why; from the
    run directories, and from SLURM where there is one.

    Example: toolkit status runs
    """

    def work() -> int:
        from toolkit.slurm.job import find_runs, queue, state_of

        runs = find_runs(path)
        jobs = queue()
        if as_json:
            print(json.dumps([state_of(run, jobs).to_json() for run in runs], indent=2))
        elif runs:
            _show_states(runs, jobs)
        else:
            print(f"no runs in {path}")
        return EXIT_OK

    end(report_errors(work, debug=debug))


def _show_states(runs: list[Any], jobs: Any) -> None:
    from toolkit.recipe.diagnostics import printable
    from toolkit.slurm.job import state_of

    rows = [("run", "job", "state", "epoch", "requeued", "")]
    rows += [_state_row(state_of(run, jobs)) for run in runs]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print(printable("  ".join([*cells, row[5]]).rstrip()))


def _state_row(state: State) -> tuple[str, str, str, str, str, str]:
    path = Path(state.run)
    times = f"{state.requeued} times" if state.requeued != 1 else "once"
    return (
        f"{path.parent.name}/{path.name}",
        state.job or "-",
        state.state,
        f"{state.epoch}/{state.epochs}",
        times if state.requeued else "-",
        state.detail,
    )


def logs(
    run: RunPath,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    debug: Debug = False,
) -> None:
    """Print what a run's job has printed.

    Example: toolkit logs -f runs/quickstart/20260102-030405-abcd
    """

    def work() -> int:
        from toolkit.runs import open_run
        from toolkit.slurm.job import Job

        opened = open_run(run)
        record = Job(opened).record
        log = opened.log_file if record is None else Path(record["log"])
        if not log.exists() and not follow:
            raise UserError(f"{log} does not exist yet: the job has not started (toolkit status {run})")
        if follow:
            _follow(log, lambda: _has_ended(run))
        else:
            _print_from(log, 0)
        return EXIT_OK

    end(report_errors(work, debug=debug))


def _has_ended(path: Path) -> bool:
    from toolkit.runs import open_run
    from toolkit.slurm.job import queue, state_of

    jobs = queue()
    return state_of(open_run(path), jobs).state not in ("pending", "running", "unknown", "new")


def cancel(runs: Annotated[list[Path], typer.Argument(metavar="RUN...")], debug: Debug = False) -> None:
    """Cancel the jobs of runs.

    They are not requeued. What is trained so far stays: `toolkit train --resume RUN` goes on.

    Example: toolkit cancel runs/quickstart/20260102-030405-abcd
    """

    def work() -> int:
        from toolkit.runs import open_run
        from toolkit.slurm.submit import cancel as cancel_job

        for run in runs:
            print(f"cancelled job {cancel_job(open_run(run))}: {run}")
        return EXIT_OK

    end(report_errors(work, debug=debug))
