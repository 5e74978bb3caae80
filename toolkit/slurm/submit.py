"""Handing runs to SLURM: one run, or an array of them. What SLURM refuses leaves nothing half-made behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from toolkit.data.order import check_batch_size
from toolkit.errors import UserError
from toolkit.recipe import Recipe, recipe_hash, resolved_toml
from toolkit.runs import Run, create_run, new_run_id, read_json, write_atomically
from toolkit.slurm.job import Job, queue
from toolkit.slurm.script import array_script, run_script, table_script
from toolkit.slurm.settings import Settings, check_places, settle

ARRAYS = "_arrays"
"""Folder beside the recipes' ones in the run root; no recipe's name begins so."""

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
"""Words of sbatch's refusals, and the keys that they are about."""


@dataclass(frozen=True)
class Submitted:
    """A job that SLURM has accepted."""

    job: str
    script: Path
    log: Path
    path: Path
    """The run directory, or the array's folder."""
    tasks: int = 1
    table_job: str | None = None


def plan(recipes: Sequence[tuple[str, Recipe]]) -> tuple[Settings, list[str]]:
    """The settings that all recipes share, and warnings. Raises UserError where they cannot run so."""
    found = [settle(recipe) for _, recipe in recipes]
    for (path, _), settings in zip(recipes, found, strict=True):
        if settings != found[0]:
            raise UserError(
                f"{path} asks for other resources in [slurm] than {recipes[0][0]}; an array has them in common"
            )
    settings = found[0]
    for _, recipe in recipes:
        check_batch_size(recipe.train.batch_size, settings.world, recipe.train.accumulation)
    warnings: list[str] = []
    for root in dict.fromkeys(recipe.recipe.run_root for _, recipe in recipes):
        warnings += check_places(settings, root, [path for path, _ in recipes])
    return settings, list(dict.fromkeys(warnings))


def preview(recipe: Recipe, settings: Settings) -> str:
    """The script of one run, as it would be written."""
    path = Path(recipe.recipe.run_root) / recipe.recipe.name / new_run_id()
    return run_script(settings, path.absolute(), recipe.recipe.name)


def submit_run(recipe: Recipe, settings: Settings) -> Submitted:
    """Make a run directory and hand its training to SLURM."""
    require_slurm()
    with _undone_on_error(recipe):
        run = _new_run(recipe)
        try:
            job = Job(run)
            run.write_text("slurm/train.sbatch", run_script(settings, run.path, recipe.recipe.name))
            number = sbatch(job.script)
        except BaseException:
            shutil.rmtree(run.path)
            raise
    job.write_record(number)
    return Submitted(number, job.script, job.log, run.path)


@contextlib.contextmanager
def _undone_on_error(recipe: Recipe) -> Iterator[None]:
    """Take away the folders around a run directory that were made for it alone."""
    parent = Path(recipe.recipe.run_root).absolute() / recipe.recipe.name
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _new_run(recipe: Recipe) -> Run:
    run = create_run(str(Path(recipe.recipe.run_root).absolute()), recipe.recipe.name)
    (run.path / "slurm").mkdir()
    run.write_text("recipe.toml", resolved_toml(recipe))
    return run


def array_folder(recipes: Sequence[tuple[str, Recipe]], name: str | None) -> Path:
    """The folder of an array: the same for the same recipes, so that submitting again goes on with their runs."""
    first = recipes[0][1].recipe
    digest = sha256(" ".join(recipe_hash(recipe) for _, recipe in recipes).encode()).hexdigest()[:6]
    return Path(first.run_root).absolute() / ARRAYS / (name or f"{first.name}-{digest}")


def submit_array(
    recipes: Sequence[tuple[str, Recipe]], settings: Settings, *, name: str | None = None, parallel: int | None = None
) -> Submitted:
    """Hand to SLURM all runs of an array that are not finished, ``parallel`` at a time, and a job for the table.

    Raises UserError where an array job of this folder is still at work, or SLURM refuses.
    """
    require_slurm()
    folder = array_folder(recipes, name)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        runs, made = _runs_of(folder, recipes)
        try:
            _refuse_if_at_work(folder, runs)
            left = [run for run in runs if not run.is_finished]
            if not left:
                raise UserError(f"all {len(runs)} runs are finished; their table is {folder / 'table.md'}")
            script = folder / "train.sbatch"
            text = array_script(settings, folder, folder.name, len(left), parallel)
            write_atomically(script, text.encode())
            number = sbatch(script)
        except BaseException:
            for run in made:
                shutil.rmtree(run.path)
            if is_new:
                shutil.rmtree(folder)
            raise
        for run in left:
            Job(run).write_record(number, array=folder)
    return Submitted(number, script, folder, folder, len(left), _submit_table(settings, folder, number))


def _runs_of(folder: Path, recipes: Sequence[tuple[str, Recipe]]) -> tuple[list[Run], list[Run]]:
    """The runs of an array, and those of them that are made now."""
    path = folder / "runs.json"
    if path.exists():
        return _known_runs(path, recipes), []
    runs = [_new_run(recipe) for _, recipe in recipes]
    content = {
        "runs": [
            {"recipe": file, "name": recipe.recipe.name, "seed": recipe.recipe.seed, "run": str(run.path)}
            for (file, recipe), run in zip(recipes, runs, strict=True)
        ]
    }
    Run(folder).write_json("runs.json", content)
    return runs, runs


def _known_runs(path: Path, recipes: Sequence[tuple[str, Recipe]]) -> list[Run]:
    """The runs of an earlier submission. Raises UserError where they are of other recipes."""
    runs = [Run(Path(item["run"])) for item in read_json(path)["runs"]]
    if [recipe_hash(run.recipe) for run in runs] != [recipe_hash(recipe) for _, recipe in recipes]:
        raise UserError(f"{path.parent} holds runs of other recipes or seeds: choose another --name")
    return runs


def _refuse_if_at_work(folder: Path, runs: list[Run]) -> None:
    arrays = {str(record["job"]) for run in runs if (record := Job(run).record) is not None}
    if not arrays:
        return
    jobs = queue()
    if jobs is None:
        raise UserError("SLURM does not answer (squeue), so it is not known which runs are still at work; try again")
    alive = sorted(name for name, entry in jobs.items() if entry.is_active and name.split("_")[0] in arrays)
    if alive:
        raise UserError(
            f"{len(alive)} task(s) of array job {alive[0].split('_')[0]} are still at work: "
            f"toolkit status {folder} shows them; submit again when they have ended"
        )


def _submit_table(settings: Settings, folder: Path, array_job: str) -> str | None:
    """The job that makes the table; where SLURM does not want it, the table is left to the user."""
    script = folder / "table.sbatch"
    write_atomically(script, table_script(settings, folder, folder.name, array_job).encode())
    try:
        return sbatch(script)
    except UserError:
        return None


def require_slurm() -> None:
    """Raise a UserError where this machine has no SLURM."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no SLURM on this machine (no sbatch). To train here: toolkit train RECIPE, or with several GPUs "
            "accelerate launch --config_file launch/node.yaml -m toolkit.train RECIPE. "
            "To see the script only: --dry-run. To try SLURM on one machine: slurm/local-cluster.sh"
        )


def sbatch(script: Path) -> str:
    """Submit a script and return the job's id. Raises UserError with sbatch's own words."""
    # A shell within another job has SLURM_ variables that would be taken for this job's.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    answer = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, env=kept)
    if answer.returncode != 0:
        raise UserError(_refusal(answer.stderr))
    return answer.stdout.strip().splitlines()[-1].split(";")[0]


def _refusal(stderr: str) -> str:
    words = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in stderr.splitlines()]
    said = "; ".join(line for line in words if line) or "no reason given"
    keys = next((keys for word, keys in OPTIONS.items() if word in said.lower()), None)
    return f"sbatch refused the job: {said}" + (f"\nlook at {keys}" if keys else "") + "\nnothing was submitted"


def cancel(run: Run) -> str:
    """Cancel the job of a run, so that it is not requeued either, and return its id. Raises UserError without one."""
    job = Job(run)
    record: dict[str, Any] | None = job.record
    if record is None:
        raise UserError(f"{run.path} was not submitted to SLURM")
    if run.is_finished:
        raise UserError(f"{run.path} is finished")
    if record["array"] is not None and job.claim(str(record["job"]), "cancelled"):
        run.write_text("slurm/cancelled", "")
        return f"{record['job']}, which had not yet taken this run"
    number = job.current or str(record["job"])
    entry = (queue() or {}).get(number)
    if entry is not None and not entry.is_active:
        raise UserError(f"job {number} of {run.path} has ended already ({entry.state})")
    run.write_text("slurm/cancelled", "")
    answer = subprocess.run(["scancel", number], capture_output=True, text=True)
    if answer.returncode != 0:
        (job.folder / "cancelled").unlink()
        raise UserError(f"scancel: {answer.stderr.strip()}")
    return number
