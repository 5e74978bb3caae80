"""Submit a study to SLURM as a job array, and query and cancel it. Files in the study's folder:

slurm/job.json         ids of the array and of the table job, and the time of submission
slurm/train.sbatch     script of the array; slurm/table.sbatch: script of the table job
slurm/log-JOB_TASK.txt output of a task before it has a run (for a search: all output); slurm/table-log.txt
slurm/JOB_TASK/        for a search: files of a task, as in the ``slurm/`` folders of runs

A study with a fixed list of runs (rows, grid, random) gets one task per run; each task trains the next open run. The
runs of a search are created while it is running, so each of its tasks runs workers until the search is complete.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.data.sampling import check_batch_size
from toolkit.errors import UserError
from toolkit.reading import Shape, read_bytes, read_json
from toolkit.recipe.study_schema import BohbSearchConfig
from toolkit.runs import Run
from toolkit.slurm.job_status import QueueEntry, SlurmJob, queue, tasks_of
from toolkit.slurm.sbatch import array_script, search_script, table_script
from toolkit.slurm.settings import JobSettings, check_paths, resolve_settings
from toolkit.slurm.submit import SubmitResult, remove_empty_on_error, require_slurm, sbatch, scancel
from toolkit.study.bohb import bracket_sizes
from toolkit.study.directory import CONTROLLER, FILE, STUDY_COPY, StudyDirectory, is_claimed
from toolkit.study.expand import ExpandedStudy, StudySpec
from toolkit.study.init import init_study, study_lock
from toolkit.writing import write_atomically


def plan_study(study: StudySpec, expansion: ExpandedStudy) -> tuple[JobSettings, list[str]]:
    """Return the settings of every task, and warnings. Raises UserError if the runs cannot be trained with them."""
    settings = resolve_settings(study.base)
    notes = []
    if study.table.bohb is not None:
        if settings.nodes > 1:
            raise UserError(
                f"slurm.nodes = {settings.nodes}: each run of a search is trained on one node; for more workers raise "
                "--parallel or slurm.gpus_per_node"
            )
        bracket_sizes(study.table.bohb)  # raises UserError for settings that do not fit together
    else:
        for run in expansion.runs:
            check_batch_size(run.recipe.train, settings.world)
        ignored = [name for name in ("gpus_per_run", "runs_per_gpu") if getattr(study.table, name) != 1]
        notes = [
            f"study.{name} applies to `toolkit study` only; an array task trains one run on the GPUs set in [slurm]"
            for name in ignored
        ]
    return settings, [*notes, *check_paths(settings, study.base.recipe.run_root, [study.path])]


def preview(study: StudySpec, expansion: ExpandedStudy, settings: JobSettings, parallel: int | None) -> str:
    """Return the script that the first submission would write."""
    return _script(study, settings, study.folder.absolute(), expansion.count, parallel)


def submit_study(
    study: StudySpec, expansion: ExpandedStudy, settings: JobSettings, parallel: int | None
) -> SubmitResult:
    """Submit all unfinished runs of a study, ``parallel`` at a time, and a job that writes the table and report.

    Failed runs of a list are retried. Raises UserError, leaving the folder unchanged, if an array of this study is
    still active, if no runs are left, or if SLURM rejects the job.
    """
    require_slurm()
    refuse_if_active(study.folder)
    path = study.folder.absolute()
    search, folder = study.table.bohb, StudyDirectory(path)
    script = path / "slurm" / "train.sbatch"
    with remove_empty_on_error(path), study_lock(study):
        with _restore_on_error(path):
            refuse_if_active(path)  # another process may have submitted it meanwhile
            if search is not None:
                _refuse_if_done(search, folder)
            init_study(study, folder, expansion)
            left = [] if search is not None else _left(folder)
            (path / "slurm").mkdir(exist_ok=True)
            tasks = len(left) or parallel or 1
            write_atomically(script, _script(study, settings, path, tasks, parallel).encode())
            number = sbatch(script)
        for run in left:
            SlurmJob(run).write_record(number, array=path)
        table_job = _submit_table(settings, path, study.name, number)
        record = {"job": number, "table_job": table_job, "submitted": time.time()}
        Run(path).write_json("slurm/job.json", record)
    return SubmitResult(number, script, path, path, is_array=True, tasks=tasks, table_job=table_job)


def _script(study: StudySpec, settings: JobSettings, path: Path, tasks: int, parallel: int | None) -> str:
    if study.table.bohb is not None:
        return search_script(settings, path, study.name, parallel or 1)
    return array_script(settings, path, study.name, tasks, parallel)


def _left(folder: StudyDirectory) -> list[Run]:
    """Return the unfinished runs of a study with a fixed list of runs. Raises UserError if there are none."""
    runs = folder.runs
    left = [run for run in runs if not run.is_finished]
    if not left:
        raise UserError(f"all {len(runs)} runs are finished: toolkit table {folder.path}")
    return left


def _refuse_if_done(search: BohbSearchConfig, folder: StudyDirectory) -> None:
    if folder.exists and folder.is_complete and len(folder.members) >= search.trials:
        raise UserError(
            f"the search has tried all {search.trials} configurations: toolkit table {folder.path}; to continue it, "
            "raise study.bohb.trials"
        )


@contextlib.contextmanager
def _restore_on_error(path: Path) -> Iterator[None]:
    """On an error, remove new files from the study's folder and restore the others. The caller holds its lock."""
    before = {file: read_bytes(file) for file in (path / FILE, path / STUDY_COPY) if file.exists()}
    known = set(path.iterdir()) - (set() if before else {path / CONTROLLER})
    try:
        yield
    except BaseException:
        for new in set(path.iterdir()) - known:
            shutil.rmtree(new) if new.is_dir() else new.unlink()
        for file, content in before.items():
            write_atomically(file, content)
        raise


def _submit_table(settings: JobSettings, path: Path, name: str, array_job: str) -> str | None:
    """Submit the job for table and report; return None if SLURM rejects it, so that the user has to create them."""
    script = path / "slurm" / "table.sbatch"
    write_atomically(script, table_script(settings, path, name, array_job).encode())
    try:
        return sbatch(script)
    except UserError:
        return None


# -- status -----------------------------------------------------------------------------------------------------------


class _ArrayRecord(Shape):
    """Schema of slurm/job.json in a study's folder."""

    job: str
    table_job: str | None = None


def array_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a study's submission; None if it was not submitted."""
    file = path / "slurm" / "job.json"
    return read_json(file, _ArrayRecord) if file.exists() and (path / FILE).exists() else None


def refuse_if_active(path: Path) -> None:
    """Raise UserError if tasks of the study's last submission are queued or running."""
    record = array_record(path)
    if record is None:
        return
    jobs = queue()
    if jobs is None:
        raise UserError("SLURM does not answer (squeue), so active tasks cannot be ruled out; try again")
    alive = [entry for entry in tasks_of(record["job"], jobs) if entry.is_active]
    if alive:
        raise UserError(
            f"{len(alive)} task(s) of array job {record['job']} are still active: toolkit status {path} shows them; "
            f"submit again when they have ended, or cancel them: toolkit cancel {path}"
        )


def cancel_array(path: Path) -> str:
    """Cancel all tasks of a study's array and return its id. The table job then starts. Raises UserError."""
    number = str((array_record(path) or {})["job"])
    marked = [run for run in StudyDirectory(path).runs if not run.is_finished and SlurmJob(run).is_part_of(number)]
    for run in marked:
        run.write_text("slurm/cancelled", "")
    scancel(number)
    return number


def headline(path: Path, jobs: Mapping[str, QueueEntry] | None) -> str | None:
    """Summarize the states of a study's jobs in one line; None if the study was not submitted."""
    record = array_record(path)
    if record is None:
        return None
    parts = [f"array job {record['job']}: {_counts(tasks_of(record['job'], jobs or {}))}"]
    follower = record.get("table_job")
    if follower is not None:
        parts.append(f"table job {follower}: {_counts(tasks_of(follower, jobs or {}))}")
    return "; ".join(parts)


def _counts(tasks: Sequence[QueueEntry]) -> str:
    if not tasks:
        return "no longer known to SLURM"
    reasons = {e.state: e.reason for e in tasks if e.state == "PENDING" and e.reason != "None"}
    counts = Counter(entry.state for entry in tasks)
    return ", ".join(
        f"{count} {s.lower()}" + (f" ({reasons[s]})" if s in reasons else "") for s, count in counts.items()
    )


def take_run(folder: StudyDirectory, array_job: str, task: str) -> Run | None:
    """Return the run that the task had before it was requeued, else claim the first open run; None if none is left."""
    runs = folder.runs
    name = f"{array_job}_{task}"
    for run in runs:
        if SlurmJob(run).claimed_by(array_job) == name:
            return run
    untaken = (run for run in runs if not run.is_finished and not is_claimed(run))
    return next((run for run in untaken if SlurmJob(run).claim(array_job, name)), None)
