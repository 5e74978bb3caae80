"""Submit a run to SLURM. A rejected submission leaves no files. For studies, see :mod:`toolkit.slurm.array`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.data.sampling import check_batch_size
from toolkit.errors import UserError
from toolkit.recipe import Recipe, resolved_toml
from toolkit.runs import Run, create_run, new_run_id
from toolkit.slurm.job_status import SlurmJob, queue
from toolkit.slurm.sbatch import run_script
from toolkit.slurm.settings import JobSettings, check_paths, resolve_settings

OPTIONS = {
    "partition": "slurm.partition",
    "node count": "slurm.nodes",
    "cpu count": "slurm.cpus_per_task",
    "memory": "slurm.memory",
    "generic resource": "slurm.gpus_per_node, slurm.gpu_type",
    "feature": "slurm.constraint",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "time limit": "slurm.time",
    "configuration is not available": "slurm.gpus_per_node, slurm.gpu_type, slurm.constraint, slurm.nodes",
    "option": "slurm.options",
}
"""Substrings of sbatch's error messages, and the recipe keys they refer to."""


@dataclass(frozen=True)
class SubmitResult:
    """A submitted job."""

    job: str
    script: Path
    log: Path
    path: Path
    """The run directory or the study's folder."""
    is_array: bool = False
    tasks: int = 1
    table_job: str | None = None


def plan(path: str, recipe: Recipe) -> tuple[JobSettings, list[str]]:
    """Return the job's settings, and warnings. Raises UserError if the recipe cannot run with them."""
    settings = resolve_settings(recipe)
    check_batch_size(recipe.train, settings.world)
    return settings, check_paths(settings, recipe.recipe.run_root, [path])


def preview(recipe: Recipe, settings: JobSettings) -> str:
    """Return the script of one run as it would be written."""
    path = Path(recipe.recipe.run_root) / recipe.recipe.name / new_run_id()
    return run_script(settings, path.absolute(), recipe.recipe.name)


def submit_run(recipe: Recipe, settings: JobSettings, origins: dict[str, Any]) -> SubmitResult:
    """Create a run directory and submit its training to SLURM. ``origins`` holds the origins of the recipe's values.

    Raises UserError, leaving no files, if SLURM is not installed or rejects the job.
    """
    require_slurm()
    with remove_empty_on_error(Path(recipe.recipe.run_root).absolute() / recipe.recipe.name):
        run = _new_run(recipe)
        try:
            job = SlurmJob(run)
            run.write_json("origins.json", origins)
            run.write_text("slurm/train.sbatch", run_script(settings, run.path, recipe.recipe.name))
            number = sbatch(job.script)
        except BaseException:
            shutil.rmtree(run.path)
            raise
    job.write_record(number)
    return SubmitResult(number, job.script, job.log, run.path)


@contextlib.contextmanager
def remove_empty_on_error(folder: Path) -> Iterator[None]:
    """On an error, remove the folder and its parents if they did not exist before and are empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _new_run(recipe: Recipe) -> Run:
    run = create_run(str(Path(recipe.recipe.run_root).absolute()), recipe.recipe.name)
    (run.path / "slurm").mkdir()
    run.write_text("recipe.toml", resolved_toml(recipe))
    return run


def require_slurm() -> None:
    """Raise UserError if this machine has no SLURM."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no SLURM on this machine (no sbatch). To train here: toolkit train RECIPE, or with several GPUs "
            "torchrun --standalone --nproc-per-node GPUS -m toolkit.train RECIPE. To print the script only: --dry-run. "
            "To try SLURM on one machine: slurm/local-cluster.sh of the source"
        )


def sbatch(script: Path) -> str:
    """Submit a script and return the job's id. Raises UserError with sbatch's message."""
    # A shell within another job has SLURM_ variables that would be mistaken for this job's.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    answer = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, env=kept)
    if answer.returncode != 0:
        raise UserError(_refusal(answer.stderr))
    return answer.stdout.strip().splitlines()[-1].split(";")[0]


def _refusal(stderr: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in stderr.splitlines()]
    message = "; ".join(line for line in lines if line) or "no reason given"
    keys = next((keys for word, keys in OPTIONS.items() if word in message.lower()), None)
    return f"sbatch rejected the job: {message}" + (f"\ncheck {keys}" if keys else "") + "\nnothing was submitted"


def cancel(run: Run) -> str:
    """Cancel the job of a run, preventing requeueing, and return its id. Raises UserError if it has no active job."""
    job = SlurmJob(run)
    record: dict[str, Any] | None = job.record
    if record is None:
        raise UserError(f"{run.path} was not submitted to SLURM")
    if run.is_finished:
        raise UserError(f"{run.path} is finished")
    if record["array"] is not None and job.claim(str(record["job"]), "cancelled"):
        run.write_text("slurm/cancelled", "")
        return f"{record['job']}, which had not claimed this run yet"
    number = job.current or str(record["job"])
    entry = (queue() or {}).get(number)
    if entry is not None and not entry.is_active:
        raise UserError(f"job {number} of {run.path} has already ended ({entry.state})")
    run.write_text("slurm/cancelled", "")
    try:
        scancel(number)
    except UserError:
        (job.folder / "cancelled").unlink()
        raise
    return number


def scancel(job: str) -> None:
    """Cancel a job or an array. Raises UserError with scancel's message."""
    answer = subprocess.run(["scancel", job], capture_output=True, text=True)
    if answer.returncode != 0:
        raise UserError(f"scancel: {answer.stderr.strip()}")
