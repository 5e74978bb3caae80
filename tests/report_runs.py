"""Run directories with known metrics, written without training, for tests of plots and pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image
from study_folders import FakeRun, write_study

from toolkit.recipe import loads_recipe, resolved_toml
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory

HOSTILE = ["<img src=x onerror=alert(1)>", "a'\"&amp; $x_1$", "plain"]
"""Folder names that are valid but hard to display, in sorted order."""
SCRIPT = ["</script><script>alert(1)</script>", "{{ 7 * 7 }}", "plain"]
"""File names that are valid but hard to display."""

TRAIN, VALIDATION = 3, 2
"""Images per class."""
VAL_ACCURACY = (0.4, 0.6, 0.9, 0.8, 0.7)
"""Accuracy after each epoch: the third is the best epoch, the fifth the last."""
PREDICTIONS = ((0, 0, 0.95), (0, 0, 0.7), (0, 1, 0.9), (1, 1, 0.8), (1, 2, 0.55), (2, 2, 0.99), (2, 2, 0.65))
"""Class, prediction and probability of the prediction for each test image: 5 of 7 are correct."""

RECIPE = """
[recipe]
name = "known"
description = "A run whose metrics are known"

[data]
dataset = "imagefolder"
root = {root}
image_size = 24
split = {{ method = "alternate" }}

[model]
source = "toolkit"
convnet = {{ blocks = [{{ channels = 4, pool = 2 }}] }}

[optimizer]
name = "sgd"
lr = 0.1

[train]
epochs = 9
batch_size = 4

[early_stopping]
metric = "val/accuracy"
patience = 2

[expected_metrics]
test_accuracy = {{ at_least = 0.7, source = "made up" }}
"""


def write_run(
    folder: Path, classes: Sequence[str] = HOSTILE, *, images: bool = True, test: Sequence[Any] = PREDICTIONS
) -> Run:
    """Write a finished run to ``folder``/run, with its images in ``folder``/data."""
    data, run = folder / "data", Run(folder / "run")
    (run.path / "checkpoints").mkdir(parents=True)
    names = _names(classes, test)
    if images:
        for number, name in enumerate(sorted(set().union(*names.values()))):
            _write_image(data / name, number)
    recipe = loads_recipe(RECIPE.format(root=json.dumps(str(data))))
    run.write_text("recipe.toml", resolved_toml(recipe))
    run.write_json("environment.json", {"python": "3.11.7", "packages": {"torch": "2.15.0", "timm": None}})
    counts = {split: [sum(f"/{c}/" in name for name in members) for c in classes] for split, members in names.items()}
    run.write_json("split.json", {"hash": "0" * 64, "left_out": [], "images_per_class": counts, **names})
    run.write_metrics(0, b"".join((json.dumps(record) + "\n").encode() for record in _epochs()))
    run.write_json("summary.json", _summary(test))
    run.write_predictions(
        (name, classes[label], classes[prediction], probability)
        for name, (label, prediction, probability) in zip(names["test"], test, strict=True)
    )
    preprocessing = {"channels": 3, "image_size": 24, "resize": 24, "crop": True, "interpolation": "bilinear",
                     "mean": [0.5] * 3, "std": [0.5] * 3}  # fmt: skip
    run.write_json("checkpoints/model.json", {"format": 1, "classes": list(classes), "preprocessing": preprocessing})
    before, after = first_layer()
    safetensors.numpy.save_file({"blocks.0.conv.weight": before}, run.first_layer)
    safetensors.numpy.save_file({"blocks.0.conv.weight": after, "head.weight": np.ones(3)}, run.best_weights)
    return run


def first_layer() -> tuple[np.ndarray, np.ndarray]:
    """Return four filters of 3 channels and 3x3 weights, before and after training: only the third has changed."""
    before = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    after = before.copy()
    after[2] *= -0.5
    return before, after


def _names(classes: Sequence[str], test: Sequence[Any]) -> dict[str, list[str]]:
    train = [[f"train/{name}/{number}.png" for number in range(TRAIN + VALIDATION)] for name in classes]
    return {
        "train": [name for members in train for name in members[:TRAIN]],
        "validation": [name for members in train for name in members[TRAIN:]],
        "test": [f"test/{classes[label]}/{number}.png" for number, (label, _, _) in enumerate(test)],
    }


def _write_image(path: Path, number: int) -> None:
    """Write 96 x 72 pixels of noise around a color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(number)
    pixels = random.integers(0, 200, 3) + random.integers(0, 55, (72, 96, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def _epochs() -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "step": 3 * epoch,
            "lr": 0.1 / epoch,
            "train/loss": 1.5 / epoch,
            "train/accuracy": min(1.0, accuracy + 0.1),
            "val/loss": 1 - accuracy,
            "val/accuracy": accuracy,
            "val/top5_accuracy": 1.0,
            "val/balanced_accuracy": accuracy - 0.05,
        }
        for epoch, accuracy in enumerate(VAL_ACCURACY, 1)
    ]


def _summary(test: Sequence[Any]) -> dict[str, Any]:
    right = sum(label == prediction for label, prediction, _ in test) / len(test)
    metrics = {"test_loss": 0.6, "test_accuracy": right, "test_top5_accuracy": 1.0, "test_balanced_accuracy": 13 / 18}
    validation = [{key.replace("/", "_"): v for key, v in e.items() if key.startswith("val/")} for e in _epochs()]
    return {
        "best": {"epoch": 3, **validation[2], **metrics},
        "last": {"epoch": 5, **validation[4], **metrics},
        "epochs_run": 5,
        "stopped_early": True,
        "parameters": 1234,
        "trainable_parameters": 1234,
        "seconds": 2.5,
        "images_per_s": 400.0,
        "peak_memory_gib": 0.5,
        "images": {"train": 9, "validation": 6, "test": len(test)},
        "processes": 1,
        "device": "cpu",
        "precision": "no",
        "seed": 0,
    }


# A study

TABLE: dict[str, Any] = {
    "description": "Two <b>rates</b>",
    "source": "mereu, table 14",
    "grid": {"optimizer.lr": [0.1, 0.01]},
}
FIRST: dict[str, Any] = {"changes": {"optimizer.lr": 0.1}, "published": {"test_accuracy": 0.74}}
SECOND: dict[str, Any] = {"changes": {"optimizer.lr": 0.01}, "published": {"test_accuracy": 0.30}}
RUNS = [
    FakeRun("lr 0.1", 0, val_accuracy=(0.3, 0.6, 0.8), test_accuracy=0.75, **FIRST),
    FakeRun("lr 0.1", 1, val_accuracy=(0.3, 0.5, 0.7), test_accuracy=0.65, **FIRST),
    FakeRun("lr 0.01", 0, val_accuracy=(0.2, 0.3, 0.4), test_accuracy=0.35, **SECOND),
    FakeRun("lr 0.01", 1, val_accuracy=(0.2,), state="failed", failure="the loss is <nan>", **SECOND),
]


def small_study(path: Path) -> StudyDirectory:
    """Write a study of two learning rates and two seeds, in which one run failed."""
    folder = write_study(path, TABLE, RUNS, name="rates")
    for number, member in enumerate(folder.members):
        run = folder.run(member)
        assert run is not None
        recipe = loads_recipe(RECIPE.format(root=json.dumps("data")))
        run.write_text("recipe.toml", resolved_toml(recipe))
        run.write_json(
            "environment.json", {"python": "3.11.7", "host": f"node{number % 2}", "packages": {"torch": "2.15.0"}}
        )
    return folder
