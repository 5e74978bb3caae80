"""What TensorBoard gets of a finished run, read back with TensorBoard's own library."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from test_train import SMALL, train
from torch.utils.tensorboard.summary import compute_curve

from toolkit.runs import Run
from toolkit.tensorboard_results import THRESHOLDS, _curves
from toolkit.training.classification_metrics import CURVE_COLUMNS, curve_rows, ranking_curves
from toolkit.writing import csv_text


def test_the_curves_are_those_that_tensorboard_computes_from_the_scores(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 2, (60, 2)).astype(np.uint8), random.random((60, 2))
    classes = ["cat", "dog, brown"]
    (tmp_path / "curves.csv").write_text(csv_text(CURVE_COLUMNS, curve_rows(ranking_curves(labels, scores), classes)))
    support = [(name, f"{labels[:, k].sum()}") for k, name in enumerate(classes)]
    (tmp_path / "class_metrics.csv").write_text(csv_text(("class", "support"), support))
    run = SimpleNamespace(path=tmp_path, summary={"images": {"test": 60}})
    found = list(_curves(cast(Run, run)))
    assert [name for name, _ in found] == classes
    for k, (_, columns) in enumerate(found):
        expected = compute_curve(labels[:, k], scores[:, k], num_thresholds=THRESHOLDS)
        np.testing.assert_allclose(np.stack(columns), expected, atol=1e-5)


def events(folder: Path) -> Any:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0}).Reload()


@pytest.mark.long
def test_tensorboard_gets_hyperparameters_with_metrics_training_images_and_curves(tmp_path: Path) -> None:
    settings = ["train.epochs=1", 'tracking.trackers=["tensorboard"]', 'tracking.project="digits"']
    run = train(tmp_path, *SMALL, *(part for setting in settings for part in ("--set", setting)))
    assert "warning" not in run.log_file.read_text()

    results = events(run.path / "tensorboard" / "digits" / "results")
    best = run.summary["best"]
    (accuracy,) = results.Scalars("best/test_accuracy")
    assert accuracy.value == pytest.approx(best["test_accuracy"], rel=1e-6)
    content = results.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hyperparameters = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hyperparameters["optimizer.lr"].number_value == run.recipe.optimizer.lr
    assert hyperparameters["optimizer.name"].string_value == run.recipe.optimizer.name

    logged = events(run.path / "tensorboard" / "digits")
    classes = run.model_card["classes"]
    assert {f"training_samples/{name}" for name in classes} <= set(logged.Tags()["images"])
    (image,) = logged.Images(f"training_samples/{classes[0]}")
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (image.width, image.height)
    assert {f"precision_recall/{name}" for name in classes} <= set(logged.PluginTagToContent("pr_curves"))
