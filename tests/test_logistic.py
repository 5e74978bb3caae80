"""transfer.mode = "logistic": agreement with scikit-learn, the choice of C, the run directory and combined keys."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from cli import toolkit
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from trainers import FROZEN, Trainers, only_run, write_recipe

from toolkit.distributed.process import init_accelerator
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import UserError
from toolkit.models.build import build_model
from toolkit.models.frozen_backbone import find_frozen_backbone
from toolkit.models.logistic import fit_logistic
from toolkit.models.transfer import apply_transfer
from toolkit.recipe import load_recipe
from toolkit.recipe.schema import ModelConfig, TransferConfig
from toolkit.report.run_data import load_run_data
from toolkit.report.run_page import _charts
from toolkit.report.run_report import _figures
from toolkit.runs import Run
from toolkit.training import model_checks
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.fit import fit
from toolkit.training.logistic_head import split_features, split_labels
from toolkit.training.trained_model import load_model
from toolkit.training.trainer import Trainer

pytestmark = pytest.mark.long

LOGISTIC = ('transfer.mode="logistic"', "train.epochs=1")
STRENGTHS = [0.001, 0.1, 10.0]


def test_fits_agree_with_scikit_learn() -> None:
    digits = load_digits()
    x, labels = digits.data / 16, digits.target
    features, targets = torch.from_numpy(x[:900]), torch.from_numpy(labels[:900])
    weights, biases, converged = fit_logistic(features, targets, 10, STRENGTHS, tolerance=1e-6)
    assert converged == [True] * len(STRENGTHS)
    for strength, weight, bias in zip(STRENGTHS, weights.numpy(), biases.numpy(), strict=True):
        expected = LogisticRegression(C=strength, tol=1e-7, max_iter=10_000).fit(x[:900], labels[:900])
        np.testing.assert_allclose(weight, expected.coef_, atol=1e-3 * np.abs(expected.coef_).max())
        accuracy = ((x[900:] @ weight.T + bias).argmax(1) == labels[900:]).mean()
        assert accuracy == pytest.approx(expected.score(x[900:], labels[900:]), abs=1e-3)


def test_a_fit_alone_equals_the_same_fit_among_others() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(60, 8, dtype=torch.float64), torch.randint(4, (60,))
    together, *_ = fit_logistic(x, labels, 4, STRENGTHS, tolerance=1e-6)
    for number, strength in enumerate(STRENGTHS):
        alone, *_ = fit_logistic(x, labels, 4, [strength], tolerance=1e-6)
        torch.testing.assert_close(alone[0], together[number], rtol=1e-3, atol=1e-4)


def test_validation_chooses_c_and_the_run_directory_is_an_ordinary_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, FROZEN)

    def run_with(strengths: list[float]) -> Run:
        return fit(load_recipe(recipe, [*LOGISTIC, f"transfer.C={strengths}"]), quiet=True)

    run = run_with(STRENGTHS)
    alone = {strength: run_with([strength]) for strength in STRENGTHS}
    best = max(one.summary["best"]["val_accuracy"] for one in alone.values())
    assert run.summary["best"]["val_accuracy"] == pytest.approx(best)
    chosen = alone[run.summary["C"]]
    assert run.summary["best"] == pytest.approx(chosen.summary["best"], rel=1e-3)
    assert len({one.summary["train_loss"] for one in alone.values()}) == len(STRENGTHS)
    assert (run.path / "predictions.csv").is_file()
    assert load_model(run.path).classes == [str(digit) for digit in range(10)]


def test_the_layer_is_the_same_on_two_processes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "1", FROZEN)
    one = fit(load_recipe(recipe, LOGISTIC), quiet=True)
    recipe = write_recipe(tmp_path / "2", FROZEN)
    settings = [text for setting in LOGISTIC for text in ("--set", setting)]
    prepare = functools.partial(use_cache, tmp_path / "cache")
    trainers = Trainers(2, tmp_path / "2", recipe, *settings, prepare=prepare)
    assert trainers.wait() == [0, 0], trainers.text()
    two = only_run(tmp_path / "2")
    assert two.summary["C"] == one.summary["C"]
    assert two.summary["train_accuracy"] == pytest.approx(one.summary["train_accuracy"])
    for run_metric in ("val_loss", "test_loss"):
        assert two.summary["best"][run_metric] == pytest.approx(one.summary["best"][run_metric], rel=1e-4)
    before, after = (safetensors.torch.load_file(run.best_weights) for run in (one, two))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4)


def use_cache(folder: Path, rank: int) -> None:
    os.environ["TOOLKIT_CACHE"] = str(folder)


def test_a_start_changes_the_way_to_the_optimum_only() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(60, 8, dtype=torch.float64), torch.randint(4, (60,))
    weights, biases, _ = fit_logistic(x, labels, 4, [1.0], tolerance=1e-7)
    elsewhere = torch.randn_like(weights[0]), torch.randn_like(biases[0])
    again, intercepts, _ = fit_logistic(x, labels, 4, [1.0], start=elsewhere, tolerance=1e-7)
    torch.testing.assert_close(again, weights, rtol=1e-3, atol=1e-4)
    centered = [b - b.mean() for b in (intercepts[0], biases[0])]  # a constant in all intercepts has no effect
    torch.testing.assert_close(*centered, rtol=1e-3, atol=1e-4)


def test_refit_fits_the_chosen_c_to_training_and_validation_images(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, FROZEN)
    before = fit(load_recipe(recipe, LOGISTIC), quiet=True)
    run = fit(load_recipe(recipe, [*LOGISTIC, "transfer.refit=true"]), quiet=True)
    assert run.summary["C"] == before.summary["C"]
    for metric in ("val_accuracy", "val_loss"):  # of the model that chose C, which has not seen these images
        assert run.summary["best"][metric] == before.summary["best"][metric]
    trainer = Trainer(
        build_context(load_recipe(recipe, LOGISTIC), init_accelerator(run.recipe.train), Console(is_main=False)),
        None, None, GracefulStop(), None,
    )  # fmt: skip
    splits = ("train", "validation")
    x = torch.cat([split_features(trainer, split) for split in splits]).numpy()
    y = torch.cat([split_labels(trainer, split) for split in splits]).numpy()
    expected = LogisticRegression(C=run.summary["C"], tol=1e-7, max_iter=10_000).fit(x, y)
    weight = load_model(run.path).module.get_submodule("head").weight.detach().numpy()  # type: ignore[union-attr, operator]
    np.testing.assert_allclose(weight, expected.coef_, atol=0.02 * np.abs(expected.coef_).max())


def test_the_optimizers_learning_rate_is_not_shown(tmp_path: Path) -> None:
    run = fit(load_recipe(write_recipe(tmp_path, FROZEN), [*LOGISTIC, "transfer.C=[0.1]"]), quiet=True)
    assert all("lr" not in record for record in run.epoch_records())
    line = next(line for line in run.log_file.read_text().splitlines() if "epoch 1/1" in line)
    assert "lr " not in line
    data = load_run_data(run)
    assert set(_charts(data)) == {"loss", "accuracy"}
    assert "learning-rate" not in _figures(data)


def test_features_that_cannot_be_cached_are_an_error_before_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, FROZEN)
    with monkeypatch.context() as patch:
        patch.setattr(model_checks, "backbone_is_deterministic", lambda *_: False)
        with pytest.raises(UserError, match="always the same"):
            fit(load_recipe(recipe, LOGISTIC), quiet=True)
    monkeypatch.setattr(model_checks, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="of memory for the features"):
        fit(load_recipe(recipe, LOGISTIC), quiet=True)
    assert list((tmp_path / "runs").iterdir()) == []


def test_find_lr_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, FROZEN)
    outcome = toolkit("find-lr", str(recipe), *(text for setting in LOGISTIC for text in ("--set", setting)))
    assert outcome.status == 2
    assert 'transfer.mode = "logistic" has no learning rate: the layer is fitted once' in outcome.stderr


def test_dropout_before_the_last_layer_does_not_change_the_features() -> None:
    table = ModelConfig(source="torchvision", name="mobilenet_v2")
    built = build_model(table, 10, 3, 32)
    for mode, tail in (("linear_probe", "classifier"), ("logistic", "classifier.1")):
        assert find_frozen_backbone(apply_transfer(built, TransferConfig(mode=mode))) == tail
