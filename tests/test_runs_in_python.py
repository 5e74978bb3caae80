"""Runs and studies as objects in Python: data frames, predictions, evaluation, reports, display in notebooks."""

from __future__ import annotations

import sys

import pytest
from finished import CONVNET, train_on_files

from toolkit.errors import UserError
from toolkit.runs import Run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run of two epochs that logs every other step."""
    return train_on_files(tmp_path_factory.mktemp("python"), CONVNET, "train.log_every=2", epochs=2)


def test_metrics_are_data_frames_with_a_row_per_epoch_and_per_logged_step(run: Run) -> None:
    epochs = run.epoch_records()
    assert list(run.metrics.index) == [1, 2]
    assert run.metrics.index.name == "epoch"
    for name in ("step", "lr", "train/loss", "train/accuracy"):
        assert list(run.metrics[name]) == [record[name] for record in epochs]
    assert list(run.steps.index) == [record["step"] for record in run.metric_records() if "train/loss" not in record]
    assert len(run.steps) >= 4
    assert run.steps["train/step_loss"].notna().all()


def test_predictions_are_a_data_frame_with_numbers(run: Run) -> None:
    found, rows = run.predictions, run.prediction_records()
    assert list(found.index) == [row["path"] for row in rows]
    assert list(found["probability"]) == [float(row["probability"]) for row in rows]
    accuracy = (found["label"] == found["prediction"]).mean()
    assert accuracy == pytest.approx(run.summary["best"]["test_accuracy"])


def test_without_pandas_the_message_names_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pip install 'image-classification-toolkit\[pandas\]'"):
        _ = run.metrics
