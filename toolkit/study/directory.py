"""The folder of a study: which runs it consists of, and how far each has come. Files only; needs no torch.

    <run_root>/<recipe name>/         (the recipe name is the study's)
      study.json                      what varies, and the members known so far (a search adds to them)
      <run id>/                       run directories, as everywhere
        assignment.json               the epoch to train to, where a search has set one
        failed.json                   why it failed, until it is tried again
        .claim                        held by the worker that trains it, freed by the system if that one dies
      table.csv table.md table.tex figures/

Only the controller writes study.json and assignment.json; workers write in run directories alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout
from pydantic import Field

from toolkit.errors import UserError
from toolkit.locks import Lock, acquire, held, is_held
from toolkit.reading import DamagedFile, Shape, check_shape, read_json
from toolkit.recipe.earlier_versions import update_metrics
from toolkit.recipe.study_schema import StudyConfig
from toolkit.runs import RUN_ID, Run, write_atomically

RunState = Literal["missing", "paused", "running", "finished", "failed"]
"""missing: no run directory yet. paused: it has one, nobody trains in it, it is not at its end."""

FORMAT = 1
"""Version of study.json."""

FILE = "study.json"
CLAIM = ".claim"
ASSIGNMENT = "assignment.json"
FAILURE = "failed.json"
HELPERS = ".helpers"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    row: str
    """Name of its row in the table: the row's own name, or the varied values; seeds of a row share it."""
    seed: int
    changes: dict[str, Any]
    """Varied keys, dotted, with their values; without the seed."""
    hash: str
    """Of its resolved recipe (:func:`toolkit.recipe.recipe_hash`); members of one hash share one run."""
    run: str | None = None
    """Name of its run directory in the study's folder, once there is one."""
    published: dict[str, float] = field(default_factory=dict)
    """Published figures of this run, or means over several runs."""
    published_spread: dict[str, dict[str, float]] = field(default_factory=dict)
    """``std`` and ``n`` of those that are means over several runs."""
    published_epochs: dict[str, list[float]] = field(default_factory=dict)
    source: str = ""
    note: str = ""
    not_comparable: str = ""
    """Why the run's figures do not compare with the published ones; empty where they do."""


class _Member(Shape):
    """An entry of study.json's members."""

    row: str
    seed: int
    changes: dict[str, Any]
    hash: str
    run: str | None = Field(None, pattern=f"^{RUN_ID.pattern}$")
    published: dict[str, float] = Field({})
    published_epochs: dict[str, list[float]] = Field({})
    source: str = ""
    note: str = ""
    not_comparable: str = ""


class _Study(Shape):
    """study.json."""

    name: str
    file: str
    study: dict[str, Any]
    assumptions: dict[str, str] = Field({})
    search: dict[str, Any] | None
    complete: bool
    members: list[_Member]


class _Failure(Shape):
    """failed.json."""

    message: str
    when: str


class _Assignment(Shape):
    """assignment.json."""

    until: int | None


@dataclass(frozen=True)
class RunFailure:
    """Why a run failed."""

    message: str
    """The last line is the cause."""
    when: str = ""

    @property
    def line(self) -> str:
        """The cause in one line."""
        lines = self.message.strip().splitlines()
        return lines[-1] if lines else "no reason is known"


@dataclass(frozen=True)
class StudyDirectory:
    """A study on disk, as the table, the figures and the report read it."""

    path: Path

    @property
    def exists(self) -> bool:
        """Whether a study was begun here."""
        return (self.path / FILE).is_file()

    @property
    def record(self) -> dict[str, Any]:
        """The content of study.json; a UserError where there is none, or of another version."""
        if not self.exists:
            raise UserError(f"{self.path} is no study's folder: it has no {FILE} (toolkit study FILE makes one)")
        record = update_metrics(read_json(self.path / FILE))
        if record.get("format") != FORMAT:
            raise UserError(f"{self.path / FILE} was written by another version of this toolkit")
        return check_shape(self.path / FILE, record, _Study)

    @property
    def name(self) -> str:
        """The study's name, which is its recipe's."""
        return str(self.record["name"])

    @property
    def table(self) -> StudyConfig:
        """What varies, what was published, which columns: the [study] table of its file."""
        try:
            return StudyConfig.model_validate(self.record["study"])
        except ValueError as error:
            raise DamagedFile(self.path / FILE, error) from None

    @property
    def assumptions(self) -> dict[str, str]:
        """Where the values of keys come from: the [assumptions] of the study's file."""
        return dict(self.record.get("assumptions", {}))

    @property
    def members(self) -> list[StudyRun]:
        """All runs known so far, in the order of the table."""
        known = {entry.name for entry in fields(StudyRun)}
        return [StudyRun(**{key: item[key] for key in item if key in known}) for item in self.record["members"]]

    @property
    def has_search(self) -> bool:
        """Whether members are added while it goes on."""
        return self.record["search"] is not None

    @property
    def is_complete(self) -> bool:
        """Whether no members will be added and no assignment changed any more."""
        return bool(self.record["complete"])

    def run(self, member: StudyRun) -> Run | None:
        """The member's run directory, if it has one."""
        return None if member.run is None else Run(self.path / member.run)

    def state(self, member: StudyRun) -> RunState:
        """How far the member has come."""
        run = self.run(member)
        return "missing" if run is None or not run.path.is_dir() else state_of(run)

    def write(self, record: dict[str, Any], members: list[StudyRun]) -> None:
        """Write study.json (the controller alone does). Raises UserError where the folder cannot be written."""
        content = {"format": FORMAT, **record, "members": [asdict(member) for member in members]}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / FILE, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise UserError(f"recipe.run_root: cannot write in {self.path}: {error.strerror}") from None


def state_of(run: Run) -> RunState:
    """How far a run has come; ``running`` where a worker of a study holds it."""
    if run.is_finished:
        return "finished"
    if is_claimed(run):
        return "running"
    return "failed" if failure_of(run) is not None else "paused"


def is_of_study(run: Run) -> bool:
    """Whether the run directory lies in a study's folder."""
    return (run.path.parent / FILE).is_file()


def failure_of(run: Run) -> RunFailure | None:
    """Why a run failed, if it did."""
    if not (run.path / FAILURE).exists():
        return None
    try:
        found = read_json(run.path / FAILURE, _Failure)
        return RunFailure(found["message"], found["when"])
    except UserError as error:
        return RunFailure(str(error))


def record_failure(run: Run, message: str) -> None:
    """Leave the reason of a failure in the run directory, where the disk takes it."""
    with contextlib.suppress(OSError):
        run.write_json(FAILURE, {"message": message, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def clear_failure(run: Run) -> None:
    """Let a failed run be taken again."""
    (run.path / FAILURE).unlink(missing_ok=True)


def target_epoch(run: Run) -> int | None:
    """The epoch that a search wants the run trained to; None: to its end."""
    if not (run.path / ASSIGNMENT).exists():
        return None
    until: int | None = read_json(run.path / ASSIGNMENT, _Assignment)["until"]
    return until


def set_target_epoch(run: Run, until: int | None) -> None:
    """Say to which epoch the run is to be trained (the controller alone does)."""
    run.write_json(ASSIGNMENT, {"until": until})


def epochs_done(run: Run) -> int:
    """Epochs that the run's log has."""
    records = run.epochs()
    return int(records[-1]["epoch"]) if records else 0


def is_open(run: Run) -> bool:
    """Whether there is something to train, by the files alone; somebody may be at it."""
    if run.is_finished or failure_of(run) is not None:
        return False
    until = target_epoch(run)
    return until is None or epochs_done(run) < until


def claim(run: Run, name: str = CLAIM) -> Lock | None:
    """The right to train the run; None where another worker has it.

    Held beside the trainer's own lock, which the processes of the run take and which may be others than the worker.
    """
    try:
        # Whoever only looks holds it for an instant.
        return acquire(run.path / name, LOOK_S)
    except Timeout:
        return None


LOOK_S = 0.1
"""Longer than looking whether a run is claimed takes."""


def is_claimed(run: Run) -> bool:
    """Whether a worker has the run at the moment."""
    return is_held(run.path / CLAIM)


@contextlib.contextmanager
def external_worker(folder: StudyDirectory) -> Iterator[None]:
    """As long as this lasts, the controller of a search has work for one more worker: one that it did not start."""
    place = folder.path / HELPERS / f"{socket.gethostname()}-{os.getpid()}"
    place.parent.mkdir(exist_ok=True)
    with held(place):
        yield
    place.unlink(missing_ok=True)


def count_external_workers(folder: StudyDirectory) -> int:
    """How many help at the moment; those that were killed do not count."""
    return sum(is_held(place) for place in (folder.path / HELPERS).glob("*"))


def open_runs(folder: StudyDirectory) -> Iterator[Run]:
    """The runs that have something to train, each once, in the order of the table.

    One whose files are damaged is noted as failed: it must not keep the others from being trained.
    """
    seen: set[str] = set()
    for member in folder.members:
        if member.run is not None and member.run not in seen:
            seen.add(member.run)
            run = Run(folder.path / member.run)
            try:
                is_wanted = is_open(run)
            except UserError as error:
                record_failure(run, str(error))
                continue
            if is_wanted:
                yield run
