"""transfer.mode = "logistic": agreement with scikit-learn, the choice of C, the run directory and combined keys."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from trainers import FROZEN, Trainers, only_run, write_recipe

from toolkit.models.logistic import fit_logistic
from toolkit.recipe import load_recipe
from toolkit.runs import Run
from toolkit.training.fit import fit
from toolkit.training.trained_model import load_model

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
