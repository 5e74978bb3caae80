"""transfer.wise: the weights of the formula, the choice on validation, batch norm statistics and the run directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_lp_ft import lp_ft

from toolkit.errors import UserError
from toolkit.inference.evaluate import evaluate_run
from toolkit.models.pretrained import StateDict
from toolkit.runs import Run
from toolkit.training.checkpoint import best_path, load_weights
from toolkit.training.fit import fit
from toolkit.training.trained_model import load_model
from toolkit.training.wise import interpolated

NORM = "blocks.0.norm"


def test_weights_are_interpolated_by_the_formula_and_its_ends_are_exact() -> None:
    torch.manual_seed(0)
    start, end = ({"w": torch.randn(50, 3), "count": torch.tensor(number)} for number in (3, 8))
    for alpha in (0.25, 0.5, 0.9):
        found = interpolated(start, end, alpha)
        torch.testing.assert_close(found["w"], (1 - alpha) * start["w"] + alpha * end["w"])
        assert found["count"] == 8
    for alpha, expected in ((0.0, start), (1.0, end)):
        assert all(torch.equal(value, expected[name]) for name, value in interpolated(start, end, alpha).items())


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train with one batch per epoch and without augmentation, and keep the weights in the middle."""
    settings = ("transfer.wise=[0.5]", "train.batch_size=110", "augment.train=[]", "train.ema=0.5")
    return fit(lp_ft(tmp_path_factory.mktemp("wise"), *settings), quiet=True)


def ends(run: Run) -> tuple[StateDict, StateDict]:
    """Return the weights of the probe, and of the best epoch of fine-tuning."""
    epoch = run.summary["best"]["epoch"]
    return load_weights(run.probed_weights), load_weights(best_path(run.checkpoints, epoch))


def test_the_best_weights_and_batch_norm_statistics_are_in_the_middle(run: Run) -> None:
    start, end = ends(run)
    best, trained = load_weights(run.best_weights), load_model(run.path)
    parameters = dict(trained.module.named_parameters())
    for name in parameters:
        torch.testing.assert_close(best[name], (start[name] + end[name]) / 2)
    assert not torch.equal(start["blocks.1.conv.weight"], end["blocks.1.conv.weight"])
    for name in (f"{NORM}.running_mean", f"{NORM}.running_var"):
        torch.testing.assert_close(best[name], (start[name] + end[name]) / 2)
        assert not torch.equal(start[name], end[name])
    assert run.summary["wise"]["alpha"] == run.model_card["wise"] == 0.5
    assert run.summary["best"]["val_loss"] == run.summary["wise"]["tried"][0]["val_loss"]
    assert run.summary["best"]["test_loss"] != run.summary["last"]["test_loss"]


def test_a_finished_run_is_evaluated_again_with_the_same_result(run: Run) -> None:
    report = evaluate_run(run, "test", Accelerator(cpu=True))
    assert {metric.model for metric in report.metrics} == {"best", "last"}
    assert {metric.verdict for metric in report.metrics} <= {"equal", "rounding"}
    assert report.predictions_equal == report.images


def test_the_weights_of_an_epoch_in_place_of_the_interpolated_ones_are_refused(run: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(run.path, tmp_path / "copy")))
    shutil.copy(best_path(copy.checkpoints, copy.summary["best"]["epoch"]), copy.best_weights)
    with pytest.raises(UserError, match=r"best\.safetensors is not the file that this run ended with"):
        load_model(copy.path)


def test_validation_chooses_and_the_ends_are_the_probe_and_the_best_epoch_of_fine_tuning(tmp_path: Path) -> None:
    settings = ('train.best_metric="val/loss"', "transfer.wise=[0.0, 0.5, 1.0]", "optimizer.lr=0.2")
    run = fit(lp_ft(tmp_path, *settings), quiet=True)
    records = {record["epoch"]: record for record in run.epoch_records()}
    tried = {entry["alpha"]: entry for entry in run.summary["wise"]["tried"]}
    assert tried[0.0]["val_loss"] == pytest.approx(records[2]["val/loss"], rel=1e-5)
    tuned = min((record for epoch, record in records.items() if epoch > 2), key=lambda record: record["val/loss"])
    assert tried[1.0]["val_loss"] == pytest.approx(tuned["val/loss"], rel=1e-5)
    best: dict[str, Any] = min(tried.values(), key=lambda entry: entry["val_loss"])
    assert run.summary["wise"]["alpha"] == best["alpha"]
    assert run.summary["best"]["val_loss"] == best["val_loss"]


def test_a_run_that_ends_in_the_probe_has_nothing_to_interpolate(tmp_path: Path) -> None:
    run = fit(lp_ft(tmp_path), quiet=True, callbacks=[lambda run, record: True])
    assert run.summary["epochs_run"] == 1
    assert "wise" not in run.summary
