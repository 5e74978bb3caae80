"""State of a run submitted to SLURM, derived from the files in its ``slurm/`` folder and from SLURM's queue.

slurm/job.json       job id, log, time of submission, and for an array task the study's folder
slurm/train.sbatch   the job script (that of a job array is in the study's folder)
slurm/log.txt        output of the job, all starts appended
slurm/starts         one line per start: job id, number of restarts, time, nodes
slurm/outcome        exit status and message of the last start
slurm/cancelled      exists if `toolkit cancel` was called
slurm/claim-JOB      id of the task of array JOB that has claimed this run
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.formatting import duration
from toolkit.locks import is_held
from toolkit.metrics import headline, metric_of
from toolkit.reading import Shape, read_bytes, read_json, read_text, require_file
from toolkit.runs import RUN_ID, Run, newest_run
from toolkit.study.directory import StudyDirectory, StudyRun, failure_of, is_claimed, is_of_study, target_epoch

GONE = "the job disappeared without an exit record: its node failed, or it was killed externally"
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD",
          "SPECIAL_EXIT", "RESIZING", "SIGNALING", "STAGE_OUT")  # fmt: skip
"""SLURM states of jobs that have not ended."""
QUERY = "%i|%T|%r|%L"
ANSWER_S = 60


@dataclass(frozen=True)
class QueueEntry:
    """A job or array task as listed by squeue."""

    job: str
    state: str
    reason: str
    time_left: str

    @property
    def is_active(self) -> bool:
        """Whether the job has not ended."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class JobStart:
    """One start of a job; a requeued job has several."""

    job: str
    restarts: int
    time: float
    nodes: str


@dataclass(frozen=True)
class JobStatus:
    """State of a run as shown by `toolkit status`."""

    run: str
    state: str
    """finished, running, pending, interrupted, paused, failed, cancelled, unknown, new (never started), or damaged."""
    detail: str
    job: str | None
    requeued: int
    epoch: int
    epochs: int | None
    """Number of epochs of the whole run; None for a run by steps until its first epoch has ended."""
    row: str | None = None
    """Name of the run's row in its study's table (several, joined by "; ", if rows share the run); else None."""
    seed: int | None = None
    """Seed of the run in its study; else None."""


class _Record(Shape):
    """Schema of slurm/job.json."""

    job: str
    log: str
    array: str | None


class SlurmJob:
    """The SLURM files of a run directory."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = run.path / "slurm"
        self.script = self.folder / "train.sbatch"
        self.log = self.folder / "log.txt"

    @property
    def record(self) -> dict[str, Any] | None:
        """Record of the submission; None for runs that were never submitted."""
        path = self.folder / "job.json"
        return read_json(path, _Record) if path.exists() else None

    def write_record(self, job: str, *, log: Path | None = None, array: Path | None = None) -> None:
        """Record a submission."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "cancelled").unlink(missing_ok=True)
        content = {
            "job": job,
            "submitted": time.time(),
            "log": str(log or self.log),
            "array": None if array is None else str(array),
        }
        self.run.write_json("slurm/job.json", content)

    @property
    def starts(self) -> list[JobStart]:
        """All starts, oldest first; incomplete lines are skipped."""
        path = self.folder / "starts"
        lines = read_text(path).splitlines() if path.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                job, restarts, when, nodes = line.split(" ", 3)
                found.append(JobStart(job, int(restarts), float(when), nodes))
        return found

    @property
    def current(self) -> str | None:
        """Id of the job that has, or last had, this run: ``17``, or ``14_3`` for an array task; None if unclaimed."""
        record = self.record
        if record is None:
            return None
        return str(record["job"]) if record["array"] is None else self.claimed_by(str(record["job"]))

    def claimed_by(self, array_job: str) -> str | None:
        """Return the array task that has claimed this run, or None."""
        claim = self.folder / f"claim-{array_job}"
        return read_text(claim).strip() or None if claim.exists() else None

    def is_part_of(self, array_job: str) -> bool:
        """Return whether the run was last submitted with this array and has not failed in it."""
        record = self.record
        return record is not None and str(record["job"]) == array_job and failure_of(self.run) is None

    @property
    def outcome(self) -> tuple[int, str] | None:
        """Exit status and message of the last start; None if it has not recorded them."""
        path = self.folder / "outcome"
        if not path.exists():
            return None
        status, _, message = read_bytes(path).decode(errors="replace").partition("\n")
        return (int(status), message.strip()) if re.fullmatch(r"[0-9]{1,3}", status.strip()) else None

    def record_exit(self, status: int, message: str) -> None:
        """Record the exit status and message of a start."""
        self.folder.mkdir(exist_ok=True)
        self.run.write_text("slurm/outcome", f"{status}\n{message}\n")

    def claim(self, array_job: str, task: str) -> bool:
        """Claim this run for an array task; return False if another task has claimed it."""
        self.folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(self.folder / f"claim-{array_job}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{task}\n")
            file.flush()
            os.fsync(file.fileno())
        return True

    def last_log_line(self) -> str:
        """Return the last non-empty line of the job's log."""
        path = Path((self.record or {}).get("log") or self.log)
        if not path.exists():
            return ""
        require_file(path)
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = file.read().decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def queue() -> dict[str, QueueEntry] | None:
    """Return this user's jobs that SLURM still lists, by id; None if SLURM does not answer or is not installed."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--array", "--me", "--states=all", f"--format={QUERY}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    entries = [QueueEntry(*line.split("|", 3)) for line in answer.stdout.splitlines() if line.count("|") >= 3]
    return {entry.job: entry for entry in entries}


def tasks_of(job: str, jobs: Mapping[str, QueueEntry]) -> list[QueueEntry]:
    """Return the entries of a job, or of all tasks of an array, that SLURM still lists."""
    return [entry for name, entry in jobs.items() if name.split("_")[0] == job]


def accounted_state(job: str) -> str | None:
    """Return sacct's state of a job that squeue no longer lists; None if it is unknown or accounting is disabled."""
    if shutil.which("sacct") is None:
        return None
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=state"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except (subprocess.SubprocessError, OSError):
        return None
    states = answer.stdout.split()
    return states[0] if answer.returncode == 0 and states else None


def state_or_damage(run: Run, jobs: dict[str, QueueEntry] | None) -> JobStatus:
    """Call :func:`state_of`; an unreadable run directory gives the state ``damaged``, with the problem as detail."""
    try:
        return state_of(run, jobs)
    except UserError as error:
        return JobStatus(str(run.path), "damaged", str(error).strip().splitlines()[0], None, 0, 0, 0)
    except OSError as error:
        problem = f"{error.filename or run.path} cannot be read: {error.strerror}"
        return JobStatus(str(run.path), "damaged", problem, None, 0, 0, 0)


def states(runs: Sequence[Run], jobs: dict[str, QueueEntry] | None) -> list[JobStatus]:
    """Return :func:`state_or_damage` of all ``runs``, with row names and seeds from their study's study.json."""
    members: dict[Path, list[StudyRun]] = {}
    for parent in {run.path.parent for run in runs}:
        folder = StudyDirectory(parent)
        with contextlib.suppress(UserError):  # damaged study.json: the states of the runs do not depend on it
            for member in folder.members if folder.exists else ():
                if member.run is not None:
                    members.setdefault(parent / member.run, []).append(member)
    found = []
    for run in runs:
        of_run = members.get(run.path, [])
        row = "; ".join(dict.fromkeys(member.row for member in of_run)) if of_run else None
        seed = of_run[0].seed if of_run else None
        found.append(replace(state_or_damage(run, jobs), row=row, seed=seed))
    return found


def state_of(run: Run, jobs: dict[str, QueueEntry] | None) -> JobStatus:
    """Return the state of a run, from its directory and the result of :func:`queue`."""
    job = SlurmJob(run)
    record, current = job.record, job.current
    entry = _entry(jobs or {}, record, current)
    epochs = run.epoch_records()
    starts = [start for start in job.starts if start.job == current]
    state, detail = _verdict(job, entry, jobs is not None)
    if state == "running":
        detail = _progress(run, starts, entry)
    if state == "finished":
        best = run.summary["best"]
        metrics = [headline(best, prefix) for prefix in ("test_", "val_")]
        detail = next((f"{metric_of(key).label} {best[key]:.4f}" for key in metrics if key in best), "")
    number = current or (str(record["job"]) if record else None)
    requeued = max((start.restarts for start in starts), default=0)
    if state == "pending" and starts:
        requeued = starts[-1].restarts + 1
    return JobStatus(str(run.path), state, detail, number, requeued, len(epochs), run.planned_epochs())


def _entry(jobs: dict[str, QueueEntry], record: dict[str, Any] | None, current: str | None) -> QueueEntry | None:
    """Return the queue entry of the run's job; for an unclaimed run, that of an active task of its array."""
    if current is not None:
        return jobs.get(current)
    if record is None:
        return None
    tasks = [entry for entry in tasks_of(str(record["job"]), jobs) if entry.is_active]
    return next((entry for entry in tasks if entry.state == "PENDING"), tasks[0] if tasks else None)


def _verdict(job: SlurmJob, entry: QueueEntry | None, slurm_answered: bool) -> tuple[str, str]:
    if job.run.is_finished:
        return "finished", ""
    outcome = job.outcome
    if entry is not None and entry.is_active:
        if entry.state == "PENDING" or job.current is None:
            return "pending", "" if entry.reason == "None" else entry.reason
        return "running", ""
    if (job.folder / "cancelled").exists():
        return "cancelled", "toolkit cancel"
    if job.record is None:
        return _without_slurm(job.run)
    if outcome is not None and outcome[0] == 3:
        return "interrupted", outcome[1].splitlines()[0] if outcome[1] else ""
    if outcome is not None:
        lines = outcome[1].splitlines()
        return "failed", lines[-1] if lines else f"exit status {outcome[0]}"
    if not slurm_answered:
        return "unknown", "SLURM does not answer"
    if job.current is None:
        return "new", "no array task has claimed it: submit again"
    ended = entry.state if entry else accounted_state(job.current) or ""
    if ended.startswith("CANCELLED"):
        return "cancelled", "scancel"
    line = job.last_log_line()
    return "failed", f"{ended}: {line}" if ended else line or GONE


def _without_slurm(run: Run) -> tuple[str, str]:
    if is_held(run.path / ".lock") or is_claimed(run):
        return "running", ""
    failure = failure_of(run)
    if failure is not None:
        return "failed", failure.line
    if is_of_study(run):
        until = target_epoch(run)
        return ("paused", f"trained to epoch {until} by the search") if until else ("new", "of a study")
    has_checkpoint = any(run.checkpoints.glob("*.pt"))
    return ("interrupted", f"toolkit train --resume {run.path}") if has_checkpoint else ("failed", "no checkpoint")


def _progress(run: Run, starts: list[JobStart], entry: QueueEntry | None) -> str:
    """Describe the training time left (at the speed since the last start) and the time left until the time limit."""
    parts = []
    # environment.json is written when training begins, after all imports.
    environment = run.path / "environment.json"
    begun = max(starts[-1].time, environment.stat().st_mtime) if starts and environment.exists() else None
    done, total = len(run.epoch_records()), run.planned_epochs()
    if begun is not None and done and run.metrics_file.stat().st_mtime > begun:
        at_start = _epochs_at(run, len(starts))
        if done > at_start and total is not None:
            pace = (run.metrics_file.stat().st_mtime - begun) / (done - at_start)
            parts.append(f"about {duration(pace * (total - done))} to go")
    if entry is not None and entry.time_left not in ("", "UNLIMITED", "INVALID", "NOT_SET"):
        parts.append(f"time limit in {entry.time_left}")
    return ", ".join(parts)


def _epochs_at(run: Run, start: int) -> int:
    """Return the number of epochs completed when start number ``start`` began, as recorded by the job."""
    path = run.path / "slurm" / f"epochs-{start}"
    text = read_text(path).strip() if path.exists() else ""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def find_runs(path: Path) -> list[Run]:
    """Find the runs at or below a run directory, a recipe's or study's folder, or a run root; oldest first.

    ``latest`` is the newest run below ``runs/``, as in the commands for one run. Raises UserError if ``path`` does not
    exist.
    """
    if (path / "recipe.toml").is_file():
        return [Run(path)]
    if not path.exists() and (newest := newest_run(path)) != path:
        return [Run(newest)]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: specify a run directory, or a folder of runs (recipe.run_root)")
    found = {file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/recipe.toml")}
    # `toolkit publish` also writes a recipe, next to the weights: to the run's folder or any other.
    found = {folder for folder in found if RUN_ID.fullmatch(folder.name) or (folder / "checkpoints").is_dir()}
    # A run whose recipe.toml is missing is still listed.
    found |= {folder.parent for depth in ("*", "*/*") for folder in path.glob(f"{depth}/checkpoints")
              if RUN_ID.fullmatch(folder.parent.name)}  # fmt: skip
    return [Run(folder) for folder in sorted(found, key=lambda folder: folder.name)]
