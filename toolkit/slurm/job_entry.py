"""Commands called by job scripts: `python -m toolkit.slurm.job_entry begin|claim`. They print the run directory."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import Overrides, load_recipe
from toolkit.runs import create_run, runs_of
from toolkit.slurm.array import take_run
from toolkit.slurm.job_status import SlurmJob
from toolkit.study.directory import StudyDirectory

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command("begin")
@command
def create_run_in_job(recipe: str, set_: Overrides = None) -> None:
    """Print the run directory of this job: the one it had before it was requeued, or a new one."""
    from toolkit.recipe import resolved_toml

    loaded = load_recipe(recipe, set_)
    table = loaded.recipe.recipe
    job = os.environ["SLURM_JOB_ID"]
    run = next((run for run in runs_of(table.run_root, table.name) if SlurmJob(run).current == job), None)
    if run is None or not os.environ.get("SLURM_RESTART_COUNT"):
        run = create_run(table.run_root, table.name)
        run.write_text("recipe.toml", resolved_toml(loaded.recipe))
        run.write_json("origins.json", loaded.origins_dict(recipe))
        SlurmJob(run).write_record(job, log=Path(f"slurm-{job}.txt").resolve())
    print(run.path.resolve())


@app.command("claim")
@command
def take_run_in_job(folder: Path) -> None:
    """Print the run of a study that this array task has claimed, or claims now; print nothing if none is left."""
    run = take_run(StudyDirectory(folder), os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"])
    print("" if run is None else run.path)


if __name__ == "__main__":
    app()
