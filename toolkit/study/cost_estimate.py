"""Cost estimate of a study: its runs, how many are finished, and the cost of the unfinished ones.

The cost of a run is epochs x training images x FLOPs per image. It is converted to time if a finished run provides the
speed of this machine, with the same model and batch size or, scaled by the FLOPs, with different ones.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.data.sampling import run_length
from toolkit.errors import UserError
from toolkit.estimate.resources import ResourceEstimate
from toolkit.estimate.resources import plan as plan_run
from toolkit.formatting import duration, plural
from toolkit.recipe.schema import Recipe
from toolkit.recipe.study_schema import BohbSearchConfig
from toolkit.recipe.toml_writer import toml_value
from toolkit.study.bohb import search_epochs
from toolkit.study.directory import RunState, StudyDirectory, epochs_done, state_of
from toolkit.study.expand import ExpandedStudy, PlannedRun, StudySpec
from toolkit.study.init import RunIndex
from toolkit.training.console import table

MAX_CHANGES_LENGTH = 60
"""Maximum number of characters of a row's changes in the text; --json prints them in full."""


@dataclass(frozen=True)
class RunCost:
    """Remaining cost of a run."""

    epochs: int
    """Maximum number of epochs left to train."""
    images: int | None
    """Number of training images per epoch; None if the data are not on this machine."""
    flops: float
    """Floating-point operations per image, forward and backward."""
    seconds_per_image: float | None
    """Training time per image, measured on runs with the same model and batch size; None if there are none."""

    @property
    def remaining_flops(self) -> float | None:
        """Remaining floating-point operations; None if the number of images is unknown."""
        return None if self.images is None else self.epochs * self.images * self.flops


@dataclass(frozen=True)
class EstimateRow:
    """A run with its state and its remaining cost."""

    run: PlannedRun
    state: RunState
    cost: RunCost


@dataclass
class StudyEstimate:
    """Everything shown by `toolkit study FILE --plan`."""

    study: StudySpec
    lines: list[EstimateRow]
    search: RunCost | None = None
    """Remaining cost of a search, whose runs do not exist yet; based on one configuration of its space."""
    notes: list[str] = field(default_factory=list)

    @property
    def unfinished(self) -> list[EstimateRow]:
        """The distinct runs that are not finished."""
        lines = {line.run.member.hash: line for line in self.lines if line.state != "finished"}
        return list(lines.values())

    @property
    def costs(self) -> list[RunCost]:
        """Costs of the unfinished runs, or of the rest of a search."""
        return [line.cost for line in self.unfinished] if self.search is None else [self.search]

    @property
    def count(self) -> int:
        """Number of distinct runs."""
        return len({line.run.member.hash for line in self.lines})

    @property
    def remaining_flops(self) -> float | None:
        """Remaining floating-point operations of all runs; None if the number of images is unknown."""
        each = [cost.remaining_flops for cost in self.costs]
        return None if None in each else sum(each)  # type: ignore[arg-type]

    @property
    def seconds(self) -> float | None:
        """Training time left in seconds, one run after another; None without a finished run that provides the speed."""
        costs = [line.cost for line in self.lines] if self.search is None else [self.search]
        measured = [cost for cost in costs if cost.seconds_per_image is not None]
        if not measured or self.remaining_flops is None:
            return None
        per_flop = sum(c.seconds_per_image or 0.0 for c in measured) / sum(c.flops for c in measured)
        return sum(_seconds(cost, per_flop) for cost in self.costs)

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as JSON values; times are in seconds."""
        return {
            "study": self.study.name,
            "folder": str(self.study.folder),
            "runs": self.count,
            "finished": self.count - len(self.unfinished),
            "epochs_left": sum(cost.epochs for cost in self.costs),
            "flops_left": self.remaining_flops,
            "seconds_left": self.seconds,
            "members": [_line_json(line) for line in self.lines],
            "notes": self.notes,
        }


def _seconds(cost: RunCost, per_flop: float) -> float:
    each = cost.seconds_per_image if cost.seconds_per_image is not None else cost.flops * per_flop
    return cost.epochs * (cost.images or 0) * each


def _line_json(line: EstimateRow) -> dict[str, Any]:
    member = line.run.member
    return {
        "row": member.row,
        "seed": member.seed,
        "changes": member.changes,
        "hash": member.hash,
        "state": line.state,
        "epochs_left": line.cost.epochs if line.state != "finished" else 0,
        "images_per_epoch": line.cost.images,
        "training_flops_per_image": line.cost.flops,
    }


def plan_study(study: StudySpec, expansion: ExpandedStudy, notes: Sequence[str] = ()) -> StudyEstimate:
    """Estimate the cost of a study. Raises UserError for anything that training would reject."""
    costs = _CostModel()
    known = RunIndex(StudyDirectory(study.folder)).by_hash
    lines = []
    for run in expansion.runs:
        existing = known.get(run.member.hash)
        state = state_of(existing) if existing is not None else "missing"
        done = epochs_done(existing) if existing is not None else 0
        lines.append(EstimateRow(run, state, costs.of(run.recipe, done)))
    found = StudyEstimate(study, lines, notes=[*expansion.notes, *notes])
    if study.table.bohb is not None:
        found.search = _cost_of_search(study, study.table.bohb, costs)
    found.notes += costs.notes
    return found


def _cost_of_search(study: StudySpec, table: BohbSearchConfig, costs: _CostModel) -> RunCost:
    """Return the remaining cost, assuming that all configurations cost as much as the first value of each range."""
    one = study.configuration_run(study.space.configuration(lambda parameter: parameter.values[0]))
    folder = StudyDirectory(study.folder)
    runs = [run for member in folder.members if (run := folder.run(member))] if folder.exists else []
    left = search_epochs(table) - sum(epochs_done(run) for run in runs)
    complete = folder.exists and folder.is_complete and len(runs) >= table.trials
    return replace(costs.of(one.recipe, 0), epochs=0 if complete else max(0, left))


class _CostModel:
    """Estimates the cost of runs; each combination of model and batch size is estimated once."""

    def __init__(self) -> None:
        self.known: dict[str, ResourceEstimate] = {}
        self.notes: list[str] = []

    def of(self, recipe: Recipe, done: int) -> RunCost:
        found = self._plan(recipe)
        images = found.contents.images["train"] if found.contents.images else None
        if found.contents.absent:
            self._note(f"the number of images is not known: {found.contents.absent}")
        speed = 1 / found.speed.images_per_s if found.speed and found.speed.images_per_s else None
        epochs = math.ceil(recipe.train.epochs or 1)
        if images:
            length = run_length(recipe.train, images)  # the last epoch may end early
            epochs, images = length.epochs, round(images * length.exact_epochs / length.epochs)
        elif recipe.train.epochs is None:
            self._note("the number of epochs of runs with train.steps is not known: each is counted as one epoch")
        return RunCost(max(0, epochs - done), images, found.step.training_flops, speed)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _plan(self, recipe: Recipe) -> ResourceEstimate:
        train = recipe.train.model_dump(include={"batch_size", "grad_accum_steps", "precision", "drop_last", "compile"})
        key = json.dumps([recipe.model.model_dump(), recipe.transfer.model_dump(), recipe.data.model_dump(), train])
        if key not in self.known:
            try:
                self.known[key] = plan_run(recipe)
            except UserError as error:
                raise UserError(f"{error} (in a run of the study)") from None
        return self.known[key]


def plan_text(found: StudyEstimate) -> str:
    """Format the estimate as text."""
    study = found.study
    lines = [f"study {study.name} in {study.folder}"]
    if study.table.source:
        lines.append(f"reproduces {study.table.source}")
    if found.lines:
        lines += ["", _rows_text(found), ""]
    lines.append(_count_text(found))
    lines.append(_cost_text(found))
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _rows_text(found: StudyEstimate) -> str:
    rows: dict[str, list[EstimateRow]] = {}
    for line in found.lines:
        rows.setdefault(line.run.member.row, []).append(line)
    cells = [_row_cells(name, lines) for name, lines in rows.items()]
    return table(cells, ("row", "runs", "finished", "epochs", "GFLOP", "changes"), frozenset((1, 2, 3, 4)))


def _row_cells(name: str, lines: Sequence[EstimateRow]) -> tuple[str, ...]:
    first = lines[0]
    values = {key: dict.fromkeys(toml_value(line.run.member.changes.get(key)) for line in lines)
              for key in first.run.member.changes}  # fmt: skip
    changes = ", ".join(f"{key} = {' | '.join(found)}" for key, found in values.items())
    if len(changes) > MAX_CHANGES_LENGTH:
        changes = changes[: MAX_CHANGES_LENGTH - 3] + "..."
    finished = sum(line.state == "finished" for line in lines)
    train = first.run.recipe.train
    epochs = str(train.epochs) if train.epochs is not None else train.length_text
    return name, str(len(lines)), str(finished), epochs, f"{first.cost.flops / 1e9:.3g}", changes


def _count_text(found: StudyEstimate) -> str:
    table = found.study.table.bohb
    if table is not None:
        return f"up to {table.trials} configurations, {search_epochs(table):,} epochs in all"
    states = Counter(line.state for line in {line.run.member.hash: line for line in found.lines}.values())
    counts = [f"{states[state]} {state}" for state in ("finished", "running", "paused", "failed") if states[state]]
    return plural(found.count, "run") + (f", of which {', '.join(counts)}" if counts else "")


def _cost_text(found: StudyEstimate) -> str:
    costs = found.costs
    epochs = sum(cost.epochs for cost in costs)
    if not epochs and not found.unfinished:
        return "nothing is left to train"
    work = found.remaining_flops
    text = f"to train: {epochs:,} epochs" if found.search else f"to train: {len(costs)} runs, {epochs:,} epochs"
    if work is not None:
        images = sum(cost.epochs * (cost.images or 0) for cost in costs)
        text += f", {images:,} images, {_flops(work)}"
    seconds = found.seconds
    if seconds is None:
        return f"{text}; no time estimate until a run of this study is finished"
    return f"{text}; about {duration(seconds)} one after another, at the speed of the finished runs"


def _flops(count: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e9:.3g} GFLOP"
