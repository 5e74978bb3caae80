"""The directory of a study: its runs and their states. File access only; does not import torch.

<run_root>/<recipe name>/         (the recipe name is the study's)
  study.json                      the [study] table and the runs known so far (a search adds more)
  study.toml                      for a search: the study's file when it was started, from which runs are created
  <run id>/                       run directories, as for single runs, with additional files:
    assignment.json               epoch to which a search wants the run trained
    failed.json                   why the run failed; removed when it is retried
    .claim                        lock of the worker that trains the run; released by the system if it dies
  .controller                     lock of the running `toolkit study`
  .writing                        lock of the process that changes study.json or assignments
  table.csv table.md table.tex figures/
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from toolkit.errors import UserError
from toolkit.locks import Lock, is_held, try_acquire
from toolkit.metrics import set_direction
from toolkit.reading import Shape, UnreadableFile, check_shape, read_json
from toolkit.recipe.earlier_versions import update_study
from toolkit.recipe.study_schema import StudyConfig
from toolkit.runs import RUN_ID, Run
from toolkit.writing import write_atomically

RunState = Literal["missing", "paused", "running", "finished", "failed"]
"""missing: no run directory yet. paused: it has one, no worker is training it, and it has not finished."""

FORMAT = 1
"""Version of the format of study.json."""

FOLD = "data.split.fold"
"""Key that, if it is in [study.grid] or [study.zip], varies within a table row, like the seed."""

FILE = "study.json"
STUDY_COPY = "study.toml"
CLAIM = ".claim"
CONTROLLER = ".controller"
WRITING = ".writing"
ASSIGNMENT = "assignment.json"
FAILURE = "failed.json"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: an entry of study.json's members."""

    __pydantic_config__ = ConfigDict(strict=False)

    row: str
    """Name of the table row, set in the file or made from the varied values; runs that differ only in seed
    and fold share it."""
    seed: int
    changes: dict[str, Any]
    """Dotted keys that vary, with their values; the seed is not included."""
    hash: str
    """Hash of its resolved recipe (:func:`toolkit.recipe.recipe_hash`); members with the same hash share one run."""
    run: Annotated[str | None, Field(pattern=f"^{RUN_ID.pattern}$")] = None
    """Name of the run directory in the study's directory; None before it is created."""
    published: dict[str, float] = field(default_factory=dict)
    """Published metrics of this run, or their means over several runs."""
    published_spread: dict[str, dict[str, float]] = field(default_factory=dict)
    """``std`` and ``n`` of the published metrics that are means over several runs."""
    published_epochs: dict[str, list[float]] = field(default_factory=dict)
    source: str = ""
    note: str = ""
    not_comparable: str = ""
    """Why the run's metrics cannot be compared with the published ones; empty if they can."""

    @property
    def fold(self) -> int | None:
        """Fold of the run; None if the study does not vary it."""
        return self.changes.get(FOLD)

    @property
    def title(self) -> str:
        """Row name, seed and fold."""
        return f"{self.row}, seed {self.seed}" + ("" if self.fold is None else f", fold {self.fold}")


class _Study(Shape):
    """Schema of study.json."""

    name: str
    file: str
    study: dict[str, Any]
    lower_is_better: list[str] = Field([])
    assumptions: dict[str, str] = Field({})
    search: dict[str, Any] | None
    complete: bool
    members: list[StudyRun]


class RunFailure(Shape):
    """Why a run failed; schema of failed.json."""

    message: str
    """The whole error message; the last line is the cause."""
    when: str = ""

    @property
    def line(self) -> str:
        """The cause in one line."""
        lines = self.message.strip().splitlines()
        return lines[-1] if lines else "no reason is known"


class _Assignment(Shape):
    """Schema of assignment.json."""

    until: int | None


@dataclass(frozen=True)
class StudyDirectory:
    """Access to the directory of a study."""

    path: Path

    @property
    def exists(self) -> bool:
        """Whether the directory contains a study."""
        return (self.path / FILE).is_file()

    @property
    def record(self) -> dict[str, Any]:
        """The content of study.json. Raises UserError if it is missing or has another version."""
        if not self.exists:
            raise UserError(f"{self.path} is not a study directory: it has no {FILE} (toolkit study FILE creates one)")
        record = update_study(read_json(self.path / FILE))
        if record.get("format") != FORMAT:
            raise UserError(f"{self.path / FILE} was written by another version of this toolkit")
        return check_shape(self.path / FILE, record, _Study)

    @property
    def name(self) -> str:
        """Name of the study and of its recipe."""
        return str(self.record["name"])

    @property
    def table(self) -> StudyConfig:
        """The [study] table of its file. Reading it sets the direction of plugins' metrics, which may not be loaded."""
        record = self.record
        for name in record.get("lower_is_better", []):
            set_direction(name, higher_is_better=False)
        try:
            return StudyConfig.model_validate(record["study"])
        except ValueError as error:
            raise UnreadableFile(self.path / FILE, error) from None

    @property
    def assumptions(self) -> dict[str, str]:
        """The [assumptions] of the study's file: the sources of values that the publication does not state."""
        return dict(self.record.get("assumptions", {}))

    @property
    def members(self) -> list[StudyRun]:
        """All runs known so far, in table order."""
        known = {entry.name for entry in fields(StudyRun)}
        return [StudyRun(**{key: item[key] for key in item if key in known}) for item in self.record["members"]]

    @property
    def runs(self) -> list[Run]:
        """The distinct run directories, in table order; rows with the same recipe share one."""
        names = dict.fromkeys(member.run for member in self.members if member.run is not None)
        return [Run(self.path / name) for name in names]

    @property
    def has_search(self) -> bool:
        """Whether the study is a search (with bohb, members are added while it runs)."""
        return self.record["search"] is not None

    @property
    def is_complete(self) -> bool:
        """Whether no more members will be added and no assignment will change."""
        return bool(self.record["complete"])

    def run(self, member: StudyRun) -> Run | None:
        """Return the member's run directory, or None if it has none."""
        return None if member.run is None else Run(self.path / member.run)

    def state(self, member: StudyRun) -> RunState:
        """Return the state of the member's run."""
        run = self.run(member)
        return "missing" if run is None or not run.path.is_dir() else state_of(run)

    def write(self, record: dict[str, Any], members: list[StudyRun]) -> None:
        """Write study.json; in a search, the caller holds :data:`WRITING`. Raises UserError if it cannot be written."""
        content = {"format": FORMAT, **record, "members": [asdict(member) for member in members]}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / FILE, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise UserError(f"recipe.run_root: cannot write in {self.path}: {error.strerror}") from None


def state_of(run: Run) -> RunState:
    """Return the state of a run directory; ``running`` if a worker has claimed it."""
    if run.is_finished:
        return "finished"
    if is_claimed(run):
        return "running"
    return "failed" if failure_of(run) is not None else "paused"


def is_of_study(run: Run) -> bool:
    """Return whether the run directory belongs to a study."""
    return (run.path.parent / FILE).is_file()


def failure_of(run: Run) -> RunFailure | None:
    """Return why a run failed, or None if it did not."""
    if not (run.path / FAILURE).exists():
        return None
    try:
        return RunFailure(**read_json(run.path / FAILURE, RunFailure))
    except UserError as error:
        return RunFailure(message=str(error))


def record_failure(run: Run, message: str) -> None:
    """Write the reason for a failure to the run directory; a write error is ignored."""
    with contextlib.suppress(OSError):
        run.write_json(FAILURE, {"message": message, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def clear_failure(run: Run) -> None:
    """Delete the failure record, so that the run is retried."""
    (run.path / FAILURE).unlink(missing_ok=True)


def target_epoch(run: Run) -> int | None:
    """Return the epoch to which a search wants the run trained; None: the recipe's last epoch."""
    if not (run.path / ASSIGNMENT).exists():
        return None
    until: int | None = read_json(run.path / ASSIGNMENT, _Assignment)["until"]
    return until


def set_target_epoch(run: Run, until: int | None) -> None:
    """Set the epoch to which the run is to be trained (None: the last). The caller holds :data:`WRITING`."""
    run.write_json(ASSIGNMENT, {"until": until})


def epochs_done(run: Run) -> int:
    """Return the number of epochs in the run's log."""
    records = run.epoch_records()
    return int(records[-1]["epoch"]) if records else 0


def is_open(run: Run) -> bool:
    """Return whether the run still needs training according to its files; a worker may be training it already."""
    if run.is_finished or failure_of(run) is not None:
        return False
    until = target_epoch(run)
    return until is None or epochs_done(run) < until


def claim(run: Run) -> Lock | None:
    """Claim the run for training; return None if another worker has claimed it.

    Separate from the trainer's own lock, which the training processes hold; those may be others than the worker.
    """
    return try_acquire(run.path / CLAIM)


def is_claimed(run: Run) -> bool:
    """Return whether a worker has claimed the run."""
    return is_held(run.path / CLAIM)


def member_of(run: Run) -> StudyRun | None:
    """Return a run's entry in its study; None for a run that belongs to none, or if study.json is damaged."""
    folder = StudyDirectory(run.path.absolute().parent)
    with contextlib.suppress(UserError):
        if folder.exists:
            return next((member for member in folder.members if member.run == run.id), None)
    return None


def open_runs(folder: StudyDirectory) -> Iterator[Run]:
    """Yield the runs that still need training, each once, in table order.

    A run with damaged files is recorded as failed, so that the others are still trained.
    """
    for run in folder.runs:
        try:
            is_wanted = is_open(run)
        except UserError as error:
            record_failure(run, str(error))
            continue
        if is_wanted:
            yield run
