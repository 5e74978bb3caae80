"""transfer.mode = "knn": agreement with scikit-learn, the choice of k, and a run that works like any other."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cli import toolkit
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from trainers import FROZEN, Trainers, only_run, outcome, write_recipe

from toolkit.errors import UserError
from toolkit.models import neighbors
from toolkit.models.neighbors import TEMPERATURE, NearestNeighbors
from toolkit.recipe import load_recipe
from toolkit.runs import Run
from toolkit.training import fit as fit_module
from toolkit.training.fit import fit
from toolkit.training.knn_head import knn_scores
from toolkit.training.trained_model import load_model

pytestmark = pytest.mark.long

KNN = ('transfer.mode="knn"', "train.epochs=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(load_recipe(write_recipe(tmp_path_factory.mktemp("knn"), FROZEN), KNN), quiet=True)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    return torch.from_numpy(found.data).float(), torch.from_numpy(found.target)


def test_votes_agree_with_scikit_learn() -> None:
    x, labels = digits()
    head = NearestNeighbors(64, 10)
    head.use(x[:900], labels[:900], 1)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    ks = [1, 7, 50, 900]
    scores = knn_scores(head, x[900:], labels[900:], ks)
    for k, (accuracy, _) in zip(ks, scores, strict=True):
        expected = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / TEMPERATURE), algorithm="brute")
        expected.fit(unit[:900], labels[:900])
        head.k = k
        with torch.no_grad():
            shares = head(x[900:]).softmax(1).numpy()
        np.testing.assert_allclose(shares, expected.predict_proba(unit[900:]), atol=1e-3)
        assert accuracy == pytest.approx(expected.score(unit[900:], labels[900:]), abs=1e-3)


def test_images_in_chunks_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = digits()
    head = NearestNeighbors(64, 10)
    head.use(x[:100], labels[:100], 5)
    whole = head(x[100:200])
    monkeypatch.setattr(neighbors, "CHUNK", 700)
    torch.testing.assert_close(head(x[100:200]), whole)


def test_a_state_dict_brings_the_training_images_and_k() -> None:
    x, labels = digits()
    head, other = NearestNeighbors(64, 10), NearestNeighbors(64, 10)
    head.use(x[:100], labels[:100], 5)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(x[100:]), head(x[100:]))


def test_validation_chooses_k(run: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, FROZEN)
    values = [1, 5, 10, 20]
    alone = {k: fit(load_recipe(recipe, [*KNN, f"transfer.k=[{k}]"]), quiet=True).summary["best"] for k in values}
    chosen = fit(load_recipe(recipe, [*KNN, f"transfer.k={values}"]), quiet=True).summary
    assert chosen["best"] == alone[chosen["k"]]
    assert chosen["best"]["val_accuracy"] == max(one["val_accuracy"] for one in alone.values())
    assert run.summary["k"] in (1, 5, 10, 20, 50, run.summary["images"]["train"])


def test_refit_adds_the_validation_images(run: Run, tmp_path: Path) -> None:
    refitted = fit(load_recipe(write_recipe(tmp_path, FROZEN), [*KNN, "transfer.refit=true"]), quiet=True)
    head = load_model(refitted.path).module.get_submodule("head")
    assert isinstance(head, NearestNeighbors)
    images = run.summary["images"]
    assert len(head.features) == images["train"] + images["validation"]
    assert (head.k, refitted.summary["best"]["val_loss"]) == (run.summary["k"], run.summary["best"]["val_loss"])


def test_evaluate_reproduces_metrics_and_predictions(run: Run) -> None:
    evaluated = toolkit("evaluate", str(run.path))
    assert "predictions.csv: 70 of 70 rows are the same\nall 5 metrics equal" in evaluated.stdout


@pytest.mark.parametrize(
    "form", ["safetensors", *(pytest.param(form, marks=pytest.mark.extended) for form in ("torch-export", "onnx"))]
)
def test_exported_models_compute_the_same_for_any_number_of_images(run: Run, tmp_path: Path, form: str) -> None:
    exported = toolkit("export", str(run.path), "--format", form, "-o", str(tmp_path / form))
    assert exported.status == 0, exported.stderr
    images = torch.rand(7, 3, 8, 8)
    with torch.no_grad():
        expected = load_model(run.path).module(images)
        if form == "onnx":
            session = onnxruntime.InferenceSession(tmp_path / form / "model.onnx", providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        elif form == "torch-export":
            found = torch.export.load(tmp_path / form / "model.pt2").module()(images)
        else:
            found = load_model(tmp_path / form).module(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_run_stopped_before_the_test_images_is_resumed_with_equal_results(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, FROZEN), KNN)

    def stop(*_: Any) -> None:
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "finish", stop)
        with pytest.raises(UserError, match="stopped"):
            fit(recipe, quiet=True)
    resumed = fit(recipe, resume="auto", quiet=True)
    assert outcome(resumed) == outcome(run)


def test_two_processes_have_the_same_neighbors(run: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, FROZEN)
    settings = [text for setting in KNN for text in ("--set", setting)]
    trainers = Trainers(2, tmp_path, recipe, *settings, prepare=functools.partial(use_cache, tmp_path / "cache"))
    assert trainers.wait() == [0, 0], trainers.text()
    two = only_run(tmp_path)
    assert two.summary["k"] == run.summary["k"]
    assert two.summary["best"] == pytest.approx(run.summary["best"], rel=1e-4)


def use_cache(folder: Path, rank: int) -> None:
    os.environ["TOOLKIT_CACHE"] = str(folder)
