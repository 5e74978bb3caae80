"""The run directory: its layout, and how its files are written and read. Only this module knows the file names.

    <run_root>/<recipe name>/<run id>/
      recipe.toml        resolved, complete; written_recipe.toml: as toolkit train DATA wrote it
      environment.json   versions, devices, processes, command, git state
      split.json         image names of each split, and a hash; split-1.json, ...: splits from before the data changed
      metrics.jsonl      one object per logging step and epoch
      summary.json       final metrics (written at the end)
      throughput.csv     training images per second of each epoch
      predictions.csv    test: path, label, prediction, probability (best model); absent without a test split
      class_metrics.csv  test: metrics of each class; curves.csv: precision-recall and ROC curves
      origins.json       for each recipe key, where its value came from
      figures/           SVG and PDF, for print; report.html: everything in one file
      checkpoints/       best.safetensors, model.json, and what is needed to resume
      evaluations/       metrics and predictions on other data sets (toolkit/evaluations.py)
      log.txt            console output
      wandb/ tensorboard/ mlflow.db

Every file is written under a temporary name, synced to disk and renamed (metrics.jsonl and log.txt are appended to).
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout
from pydantic import ConfigDict, Field

from toolkit.errors import EXIT_FAILURE, UserError
from toolkit.locks import Lock, acquire
from toolkit.reading import Shape, UnreadableFile, check_shape, read_bytes, read_csv, read_json, read_json_lines
from toolkit.recipe import Recipe, load_recipe
from toolkit.recipe.earlier_versions import update_metrics, update_summary
from toolkit.writing import csv_text, write_atomically

PREDICTION_COLUMNS = ("path", "label", "prediction", "probability")
LABEL_COLUMNS = ("path", "labels", "predictions")
"""First columns of a multi-label predictions.csv, before one column for the probability of each label."""
LABEL_SEPARATOR = ";"
"""Separator between labels in predictions.csv and in the output of `toolkit predict`."""

Number = float | None


class RunInUse(UserError):
    """Raised if another trainer is using the run directory."""


class _ModelMetrics(Shape):
    """Entry of summary.json for one model: its epoch and metrics."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, float]
    epoch: int = Field(ge=0)


class _Wise(Shape):
    """Entry of summary.json with transfer.wise: the chosen alpha, and size and SHA-256 of best.safetensors."""

    alpha: float = Field(ge=0, le=1)
    bytes: int = Field(ge=0)
    sha256: str


class _Summary(Shape):
    """Schema of summary.json. Only the metrics of the two models are required; earlier versions wrote fewer keys."""

    best: _ModelMetrics
    last: _ModelMetrics
    train_loss: Number = None
    train_accuracy: Number = None
    last_thresholds: list[float] | None = None
    C: float | None = None
    wise: _Wise | None = None
    epochs_run: int = Field(0, ge=0)
    stopped_early: bool = False
    parameters: int = Field(0, ge=0)
    trainable_parameters: int = Field(0, ge=0)
    seconds: float = Field(0, ge=0, allow_inf_nan=False)
    startup_seconds: Number = None
    images_per_s: float = Field(0, ge=0, allow_inf_nan=False)
    images: dict[str, int] = Field({})
    processes: int = Field(1, ge=1)
    device: str = ""
    precision: Literal["no", "bf16", "fp16"] | None = None
    seed: int = 0


class _Environment(Shape):
    """Schema of environment.json: the keys that the toolkit reads."""

    processes: int = Field(1, ge=1)
    slurm_job: str | None = None


class _Split(Shape):
    """Schema of split.json: image names of each split."""

    hash: str
    train: list[str]
    validation: list[str]
    test: list[str]


class _ModelCard(Shape):
    """Schema of model.json: the keys that are read without building the model."""

    classes: list[str] = Field(min_length=1)


class _Record(Shape):
    """Schema of a line of metrics.jsonl."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, float]
    epoch: float = Field(ge=0, allow_inf_nan=False)


class _Origins(Shape):
    """Schema of origins.json."""

    file: str
    keys: dict[str, str]


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run directory. Reading raises a UserError that names a missing or damaged file.

    :class:`toolkit.runs.Run` adds the values computed from them.
    """

    path: Path

    @property
    def id(self) -> str:
        """Name of the folder, unique among the runs of a recipe."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the weights and of everything needed to resume."""
        return self.path / "checkpoints"

    @property
    def best_weights(self) -> Path:
        """State dict of the best epoch's model."""
        return self.checkpoints / "best.safetensors"

    @property
    def first_layer(self) -> Path:
        """Weights of the first convolution before training, under their own name; absent if the model has none."""
        return self.checkpoints / "first_layer.safetensors"

    @property
    def starting_weights(self) -> Path:
        """Pretrained parameters before training; only written with transfer.l2_sp."""
        return self.checkpoints / "starting_weights.safetensors"

    @property
    def probed_weights(self) -> Path:
        """State dict of the model after the probe of lp_ft; only written with transfer.wise."""
        return self.checkpoints / "probed.safetensors"

    @property
    def figures(self) -> Path:
        """Folder of figures for print."""
        return self.path / "figures"

    @property
    def report_file(self) -> Path:
        """The report, a single HTML file."""
        return self.path / "report.html"

    @property
    def log_file(self) -> Path:
        """Console output of the run."""
        return self.path / "log.txt"

    @property
    def written_recipe(self) -> Path:
        """The recipe that `toolkit train DATA` wrote for this run, with its comments; absent from other runs."""
        return self.path / "written_recipe.toml"

    @property
    def metrics_file(self) -> Path:
        """Metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def throughput_file(self) -> Path:
        """Epoch and training images per second, without a header; if an epoch occurs twice, the last line counts."""
        return self.path / "throughput.csv"

    def throughput(self) -> dict[int, float]:
        """Return the training images per second of each epoch; earlier versions did not record them."""
        if not self.throughput_file.exists():
            return {}
        lines = read_bytes(self.throughput_file).decode(errors="replace").splitlines()
        pairs = (re.fullmatch(r"(\d+),(\d+\.\d\d)", line) for line in lines)
        return {int(pair[1]): float(pair[2]) for pair in pairs if pair}

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe that the run was started with."""
        return load_recipe(self.path / "recipe.toml", with_plugins=False)

    @property
    def summary_file(self) -> Path:
        """Final metrics; exists if the run has finished."""
        return self.path / "summary.json"

    @property
    def summary(self) -> dict[str, Any]:
        """Final metrics. Raises UserError if the run has not finished."""
        path = self.summary_file
        return check_shape(path, update_summary(read_json(path)), _Summary)

    @property
    def model_card(self) -> dict[str, Any]:
        """Content of model.json, which is needed to rebuild a model: architecture, classes, preprocessing."""
        return read_json(self.checkpoints / "model.json")

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the model's outputs."""
        return list(read_json(self.checkpoints / "model.json", _ModelCard)["classes"])

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, devices and command of the run."""
        return read_json(self.path / "environment.json", _Environment)

    @property
    def processes(self) -> int:
        """Number of processes that trained the run; 1 if not recorded."""
        return int(self.environment.get("processes", 1))

    @property
    def images_per_process(self) -> int:
        """Number of images that each process of the run evaluated at once."""
        return max(1, self.images_per_evaluation // self.processes)

    @property
    def images_per_evaluation(self) -> int:
        """Number of images that all processes of the run together evaluated at once."""
        train = self.recipe.train
        return train.images_per_evaluation(int(self.environment.get("grad_accum_steps", train.min_accum_steps)))

    @property
    def split(self) -> dict[str, Any]:
        """Image names of each split, and their hash."""
        return read_json(self.path / "split.json", _Split)

    def splits(self) -> Iterator[dict[str, Any]]:
        """Yield split.json, then the splits from before the data changed.

        Raises UserError if one is missing or damaged.
        """
        yield self.split
        for path in self._earlier_splits():
            yield read_json(path, _Split)

    def keep_split(self) -> None:
        """Copy split.json to split-1.json, split-2.json, ...; call before overwriting it."""
        path = self.path / "split.json"
        if path.exists():
            write_atomically(self.path / f"split-{len(self._earlier_splits()) + 1}.json", read_bytes(path))

    def _earlier_splits(self) -> list[Path]:
        return sorted(self.path.glob("split-*.json"))

    @property
    def file_facts(self) -> Path:
        """Path of the file with size and modification time of each image file when training began."""
        return self.checkpoints / "files.safetensors"

    @property
    def origins(self) -> dict[str, Any]:
        """``file``: the recipe file; ``keys``: the origin of each dotted key, ``file:line``, --set or default.

        Empty if the run did not record them.
        """
        path = self.path / "origins.json"
        return read_json(path, _Origins) if path.exists() else {}

    @property
    def is_finished(self) -> bool:
        """Whether the run has finished, that is, whether summary.json exists."""
        return (self.path / "summary.json").exists()

    @property
    def has_test(self) -> bool:
        """Whether the run has test images; also true if split.json cannot be read."""
        try:
            return self.split.get("test") != []
        except UserError:
            return True

    def metric_records(self) -> list[dict[str, Any]]:
        """Return all lines of metrics.jsonl, without an incomplete last line left by a killed run."""
        records = []
        for number, record in enumerate(self.metric_lines(), 1):
            if isinstance(record, ValueError):
                raise UserError(f"{self.metrics_file}:{number}: damaged line ({record})")
            records.append(record)
        return records

    def metric_lines(self) -> Iterator[dict[str, Any] | ValueError]:
        """Yield each line of metrics.jsonl, or the error found in it; nothing if the file does not exist."""
        lines = read_json_lines(self.metrics_file, _Record) if os.path.lexists(self.metrics_file) else ()
        return (update_metrics(line) if isinstance(line, dict) else line for line in lines)

    def epoch_records(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl written at the end of an epoch."""
        return [record for record in self.metric_records() if "train/loss" in record]

    def planned_epochs(self) -> int | None:
        """Return the number of epochs of the whole run; None for a run by steps until its first epoch has ended."""
        train = self.recipe.train
        if train.epochs is not None:
            return math.ceil(train.epochs)
        first = next(iter(self.epoch_records()), None)
        return None if first is None or train.steps is None else math.ceil(train.steps / first["step"])

    def prediction_records(self) -> list[dict[str, str]]:
        """Return the rows of predictions.csv, in the order of the data set.

        The columns are :data:`PREDICTION_COLUMNS` or, for a multi-label run, :func:`label_columns`; then those of
        data.columns.keep.
        """
        path = self.path / "predictions.csv"
        if not path.exists() and not self.has_test:
            raise UserError(f"{self.path} has no test images, so it has no predictions.csv (data.split.test)")
        header = read_bytes(path).partition(b"\n")[0].decode(errors="replace")
        is_known = header.startswith((",".join(LABEL_COLUMNS), ",".join(PREDICTION_COLUMNS)))
        columns = next(csv.reader([header])) if is_known else PREDICTION_COLUMNS
        rows = read_csv(path, columns)
        numbers = [column for column in columns if column.startswith("probability")]
        for number, row in enumerate(rows, 1):
            for column in numbers:
                if not _is_fraction(row[column]):
                    raise UnreadableFile(path, f"row {number} has the probability {row[column][:20]!r}")
        return rows

    def correct_predictions(self) -> dict[str, bool]:
        """Return whether each test image was classified correctly (multi-label: all its labels), by image name."""
        rows = self.prediction_records()
        truth, found = ("label", "prediction") if rows and "label" in rows[0] else ("labels", "predictions")
        return {row["path"]: row[truth] == row[found] for row in rows}

    def lock(self, log: Callable[[str], None] = lambda line: None) -> Lock:
        """Acquire the run's write lock, held by one trainer at a time; see :mod:`toolkit.locks`.

        Raises RunInUse if another trainer holds it, and UserError if the folder is not writable. A trainer that loses
        the lock (its machine was suspended for so long that another one took over) exits at once, since two trainers
        must never write to the same run.
        """

        def end() -> None:
            print(f"{self.path}: another trainer may have taken over this run, so this one exits", file=sys.stderr)
            os._exit(EXIT_FAILURE)

        try:
            return acquire(self.path / ".lock", on_loss=end, log=log)
        except Timeout:
            raise RunInUse(f"{self.path} is in use by another trainer, which is still running") from None
        except OSError as error:
            raise UserError(f"cannot write in {self.path}: {error.strerror}") from None

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file of the run. Bytes that are not UTF-8 (in a path or command) are written as JSON escapes."""
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.path / name, text.encode(errors="backslashreplace"))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run."""
        write_atomically(self.path / name, text.encode())

    def write_predictions(self, rows: Iterable[Sequence[object]], columns: Sequence[str] = PREDICTION_COLUMNS) -> None:
        """Write predictions.csv. ``columns``: for a multi-label run, those of :func:`label_columns`."""
        self.write_text("predictions.csv", csv_text(columns, rows))

    def write_metrics(self, length: int, lines: bytes) -> int:
        """Truncate metrics.jsonl to ``length`` bytes, append ``lines``, and return its new length."""
        self.metrics_file.touch()
        with open(self.metrics_file, "r+b") as file:
            file.truncate(length)
            file.seek(length)
            file.write(lines)
        return length + len(lines)

    def sync_metrics(self) -> None:
        """Sync metrics.jsonl to disk; call before a checkpoint records its length."""
        if self.metrics_file.exists():
            with open(self.metrics_file, "rb") as file:
                os.fsync(file.fileno())

    def remove_temporary_files(self) -> None:
        """Delete incomplete files left by a killed trainer; call with the lock held."""
        for path in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
            path.unlink(missing_ok=True)


def label_columns(classes: Sequence[str]) -> list[str]:
    """Return the column names of predictions.csv for a multi-label run."""
    return [*LABEL_COLUMNS, *(f"probability of {name}" for name in classes)]


def _is_fraction(text: str) -> bool:
    """Return whether ``text`` is a number from 0 to 1."""
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
