"""Evaluations of a run's model on other data sets, stored in its run directory. Does not import torch.

RUN/evaluations/<name>/
  evaluation.json   the data set, and the model's metrics on it
  predictions.csv   label and prediction of each image, as in RUN/predictions.csv
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from toolkit.errors import UserError
from toolkit.reading import Shape, read_json
from toolkit.recipe.base import NAME_LENGTH, NAME_PATTERN
from toolkit.runs import Run
from toolkit.writing import csv_text, write_atomically

Metrics = dict[str, float]


class _Evaluation(Shape):
    """Schema of evaluation.json."""

    data: str
    split: str | None
    images: int = Field(ge=1)
    metrics: Metrics
    missing_classes: list[str]
    unknown_classes: dict[str, int]
    epoch: int | None


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a run's best model on another data set."""

    name: str
    data: str
    """The data set as given on the command line: a recipe, folder or table."""
    split: str | None
    """Evaluated split of the data set; None: all images."""
    images: int
    metrics: Metrics
    """Value of each of :data:`toolkit.metrics.MEASURES`, by name without a split prefix."""
    missing_classes: list[str]
    """Classes of the model that have no images in the data set."""
    unknown_classes: dict[str, int]
    """Number of images, which were left out, for each class that the model does not have."""
    epoch: int | None
    """Epoch of the evaluated model; None if the run had not finished."""

    @property
    def folder(self) -> Path:
        """Folder of the evaluation, relative to the run directory."""
        return Path("evaluations", self.name)


def check_name(run: Run, name: str, data: str, split: str | None) -> None:
    """Raise UserError if ``name`` is not a valid folder name or belongs to an evaluation on other data."""
    if not re.match(NAME_PATTERN, name) or len(name) > NAME_LENGTH:
        raise UserError(
            f"{name!r} cannot be the name of a folder for the evaluation: choose a name of letters, digits and _+=,@- "
            f"with --name, with at most {NAME_LENGTH} characters"
        )
    path = run.path / "evaluations" / name / "evaluation.json"
    if not path.exists():
        return
    found = read_json(path, _Evaluation)
    if (found["data"], found["split"]) != (data, split):
        other = found["data"] + (f" --split {found['split']}" if found["split"] else "")
        raise UserError(f"{path.parent} contains the evaluation on --data {other}; choose another name with --name")


def write_evaluation(
    run: Run, found: Evaluation, columns: Sequence[str], predictions: Iterable[Sequence[object]]
) -> None:
    """Write the files of an evaluation. ``predictions``: rows with the given columns. Raises UserError on failure."""
    folder = run.path / found.folder
    record: dict[str, Any] = asdict(found)
    del record["name"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "predictions.csv", csv_text(columns, predictions).encode())
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "evaluation.json", text.encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}") from None


def evaluation_names(run: Run) -> list[str]:
    """Return the names of all evaluations of a run, sorted."""
    return sorted(path.parent.name for path in (run.path / "evaluations").glob("*/evaluation.json"))


def read_evaluation(run: Run, name: str) -> Evaluation:
    """Read an evaluation. Raises UserError if it is damaged."""
    found = read_json(run.path / "evaluations" / name / "evaluation.json", _Evaluation)
    return Evaluation(name, **{key: found[key] for key in _Evaluation.model_fields})
