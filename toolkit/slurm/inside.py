"""What the scripts of jobs call: `python -m toolkit.slurm.inside begin|claim|table`. Prints what the script needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from toolkit.errors import EXIT_OK
from toolkit.runs import Run, create_run, open_run, read_json, runs_of
from toolkit.slurm.job import Job
from toolkit.train import Overrides, end, report_errors

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def begin(recipe: str, set_: Overrides = None) -> None:
    """Print the run directory of this job: the one that it had before it was requeued, or a new one."""

    def work() -> int:
        from toolkit.recipe import load, resolved_toml

        loaded = load(recipe, set_ or [])
        for warning in loaded.warnings:
            print(warning, file=sys.stderr)
        table = loaded.recipe.recipe
        job = os.environ["SLURM_JOB_ID"]
        run = next((run for run in runs_of(table.run_root, table.name) if Job(run).current == job), None)
        if run is None or not os.environ.get("SLURM_RESTART_COUNT"):
            run = create_run(table.run_root, table.name)
            (run.path / "slurm").mkdir()
            run.write_text("recipe.toml", resolved_toml(loaded.recipe))
            run.write_json("origins.json", loaded.told_origins(recipe))
            Job(run).write_record(job, log=Path(f"slurm-{job}.txt").resolve())
        print(run.path.resolve())
        return EXIT_OK

    end(report_errors(work, debug=False))


@app.command()
def claim(folder: Path) -> None:
    """Print the run of an array that this task has, or takes now; nothing where none is left."""

    def work() -> int:
        run = take_run(folder, os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"])
        print("" if run is None else run.path)
        return EXIT_OK

    end(report_errors(work, debug=False))


def take_run(folder: Path, array_job: str, task: str) -> Run | None:
    """The run that the task had before it was requeued, else the first that is open and that nobody has taken."""
    runs = [open_run(item["run"]) for item in read_json(folder / "runs.json")["runs"]]
    name = f"{array_job}_{task}"
    for run in runs:
        if Job(run).current == name:
            return run
    return next((run for run in runs if not run.is_finished and Job(run).claim(array_job, name)), None)


@app.command()
def table(folder: Path) -> None:
    """Write the table of an array's runs, table.csv and table.md, and print the latter."""

    def work() -> int:
        from toolkit.slurm.table import write_table

        print(write_table(folder).read_text(encoding="utf-8"))
        return EXIT_OK

    end(report_errors(work, debug=False))


if __name__ == "__main__":
    app()
