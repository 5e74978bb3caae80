"""Study directories written as files, without training, for tests of tables and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.recipe.study_schema import StudyConfig
from toolkit.study.directory import StudyDirectory, StudyRun

RECIPE = """
recipe = { name = "small" }
data = { dataset = "digits" }
model = { source = "torchvision", name = "resnet18" }
optimizer = { lr = 0.1 }
train = { epochs = 1, batch_size = 8 }
"""


@dataclass
class FakeRun:
    """One run: the metrics of its epochs, and its state."""

    row: str
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    val_accuracy: Sequence[float] = (0.5,)
    """The value after each epoch. Losses are 1 minus this value, and training metrics are 0.05 better."""
    test_accuracy: float = 0.5
    state: str = "finished"
    published: dict[str, float] = field(default_factory=dict)
    published_spread: dict[str, dict[str, float]] = field(default_factory=dict)
    published_epochs: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    failure: str = "the loss is nan"
    not_comparable: str = ""
    right: Sequence[bool] = ()
    """Whether the prediction of each test image is correct; if empty, there is no predictions.csv."""
    images: dict[str, int] = field(default_factory=lambda: {"train": 2892})


def write_study(path: Path, study: Mapping[str, Any], runs: Sequence[FakeRun], name: str = "small") -> StudyDirectory:
    """Write a folder with study.json and run directories in which nothing was trained."""
    members = [_write_run(path, number, run) for number, run in enumerate(runs)]
    table = StudyConfig.model_validate(dict(study))
    folder = StudyDirectory(path)
    record = {"name": name, "file": "study.toml", "study": table.model_dump(), "search": None, "complete": True}
    folder.write(record, members)
    return folder


def _write_run(path: Path, number: int, run: FakeRun) -> StudyRun:
    name = None if run.state == "missing" else f"20260101-000000-{number:04x}"
    if name is not None:
        (path / name).mkdir(parents=True)
        records = [_epoch(epoch, value) for epoch, value in enumerate(run.val_accuracy, 1)]
        (path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if run.state == "finished":
            summary = _summary(records, run.test_accuracy) | {"images": run.images}
            (path / name / "summary.json").write_text(json.dumps(summary))
        if run.right:
            lines = [f"{number}.jpg,cat,{'cat' if right else 'dog'},0.5" for number, right in enumerate(run.right)]
            (path / name / "recipe.toml").write_text(RECIPE)
            (path / name / "predictions.csv").write_text("\n".join(["path,label,prediction,probability", *lines, ""]))
        if run.state == "failed":
            (path / name / "failed.json").write_text(json.dumps({"message": run.failure, "when": ""}))
    return StudyRun(
        run.row, run.seed, run.changes, f"{number:064x}", name, run.published, run.published_spread,
        run.published_epochs, "", run.note, run.not_comparable,
    )  # fmt: skip


def _epoch(epoch: int, value: float) -> dict[str, float]:
    return {
        "epoch": epoch,
        "train/loss": round(0.95 - value, 6),
        "train/accuracy": round(value + 0.05, 6),
        "val/loss": round(1 - value, 6),
        "val/accuracy": value,
        "val/top5_accuracy": min(1.0, value + 0.1),
        "val/balanced_accuracy": value,
    }


def _summary(records: Sequence[Mapping[str, float]], test_accuracy: float) -> dict[str, Any]:
    best = max(records, key=lambda record: record["val/accuracy"])
    return {
        "best": _model(best, test_accuracy),
        "last": _model(records[-1], test_accuracy - 0.01),
        "epochs_run": len(records),
        "stopped_early": False,
        "parameters": 1234,
        "images_per_epoch": 2560,
        "seconds": 2.5 * len(records),
        "images_per_s": 400.0,
    }


def _model(record: Mapping[str, float], test: float) -> dict[str, float]:
    validation = {key.replace("/", "_"): value for key, value in record.items() if key.startswith("val/")}
    return {"epoch": record["epoch"], **validation, "test_loss": 1 - test, "test_accuracy": test}
