"""Runs: the object that Python users have of a run directory, and how run directories are created and found."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.data_frames import data_frame
from toolkit.errors import UserError
from toolkit.run_directory import RunDirectory

if TYPE_CHECKING:
    from pandas import DataFrame

RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")


class Run(RunDirectory):
    """A run, as :func:`fit` and :func:`open_run` return it: its run directory, and what is computed from the files.

    Reading imports neither torch nor pandas; properties and methods that need them import them.
    """

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def metrics(self) -> DataFrame:
        """The metrics of each epoch: one row per epoch, indexed by ``epoch``.

        The columns are those of metrics.jsonl, such as ``lr``, ``train/loss`` and ``val/accuracy``. Needs pandas.
        """
        return data_frame(self.epoch_records(), "epoch")

    @property
    def steps(self) -> DataFrame:
        """The metrics logged within epochs: one row per ``train.log_every`` optimizer steps, indexed by ``step``.

        The column ``epoch`` counts epochs with a fraction. Needs pandas.
        """
        return data_frame([record for record in self.metric_records() if "train/loss" not in record], "step")

    @property
    def predictions(self) -> DataFrame:
        """The best model's predictions of the test images: one row per image, indexed by its name, ``path``.

        The columns are those of predictions.csv: ``label``, ``prediction`` and ``probability``, or of a multi-label
        run ``labels``, ``predictions`` and the probability of each label. Needs pandas.
        """
        return data_frame(
            [
                {column: float(text) if column.startswith("probability") else text for column, text in row.items()}
                for row in self.prediction_records()
            ],
            "path",
        )


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open the run directory at ``path``. Raises UserError if it is not one."""
    folder = Path(path)
    try:
        is_run = (folder / "recipe.toml").is_file()
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    if not is_run:
        raise UserError(f"{folder} is not a run directory: it has no recipe.toml")
    return Run(folder)


def new_run_id() -> str:
    """Return a run id: the start time, so that ids sort by time, and four random hex digits against collisions."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def create_run(run_root: str, name: str) -> Run:
    """Create a new, empty run directory; an existing one is never reused."""
    parent = Path(run_root) / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            path = parent / new_run_id()
            try:
                path.mkdir()
                break
            except FileExistsError:
                continue
        (path / "checkpoints").mkdir()
    except OSError as error:
        raise UserError(f"recipe.run_root: cannot create a run directory under {parent}: {error.strerror}") from None
    return Run(path)


def newest_run(path: str | os.PathLike[str]) -> Path:
    """Resolve a command's argument to a run directory.

    A recipe's folder (``runs/quickstart``) means its newest run; ``latest`` means the newest run of all recipes in
    ``runs/``. Any other path is returned unchanged.
    """
    folder = Path(path)
    if str(path) == "latest" and not folder.exists():
        root = Path("runs")
        found = [run for child in root.iterdir() for run in runs_of(str(root), child.name)] if root.is_dir() else []
        return max(found, key=lambda run: run.id).path if found else folder
    if any(os.path.exists(folder / name) for name in ("recipe.toml", "study.json")) or not os.path.isdir(folder):
        return folder
    with contextlib.suppress(OSError):  # unreadable folders are reported when they are opened
        found = runs_of(str(folder.parent), folder.name)
        return found[0].path if found else folder
    return folder


def runs_of(run_root: str, name: str) -> list[Run]:
    """Return the runs of a recipe, most recent first."""
    parent = Path(run_root) / name
    if not parent.is_dir():
        return []
    folders = sorted((p for p in parent.iterdir() if RUN_ID.fullmatch(p.name)), reverse=True)
    return [Run(p) for p in folders if (p / "recipe.toml").exists()]
