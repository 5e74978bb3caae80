"""`toolkit evaluate` reproduces the metrics of summary.json bit for bit on any number of processes; damaged runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from cli import Outcome, toolkit
from distributed import launch
from finished import CONVNET, train, train_on_files
from trainers import STATEFUL, Trainers, only_run, write_recipe

from toolkit.metrics import measures_of
from toolkit.runs import Run

pytestmark = pytest.mark.long

MEASURES = measures_of("single_label")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run with batch norm, averaged weights, and a rising learning rate, whose last epoch is not the best."""
    rising = 'scheduler={ name = "one_cycle", pct_start = 0.9, start_factor = 0.05 }'
    settings = ("train.ema=0.5", "optimizer.lr=5.0", rising)
    return train_on_files(tmp_path_factory.mktemp("evaluate"), CONVNET, *settings, epochs=5)


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    """Return a copy of the run to damage."""
    return Run(shutil.copytree(run.path, tmp_path / "copy"))


def metrics(outcome: Outcome) -> dict[str, Any]:
    assert outcome.status == 0, outcome.stderr
    content = json.loads(outcome.stdout)
    assert {each["verdict"] for model in content["metrics"].values() for each in model.values()} == {"equal"}
    return {
        model: {name: each["evaluated"] for name, each in each_model.items()}
        for model, each_model in content["metrics"].items()
    }


@pytest.mark.parametrize(("split", "prefix"), [("test", "test_"), ("validation", "val_")])
def test_the_metrics_equal_those_of_the_summary(run: Run, split: str, prefix: str) -> None:
    summary = run.summary
    assert summary["best"]["epoch"] < summary["last"]["epoch"] == 5, "the two models must differ"
    found = metrics(toolkit("evaluate", run.path, "--split", split, "--json"))
    for model in ("best", "last"):
        assert found[model] == {prefix + name: summary[model][prefix + name] for name in MEASURES}


def test_without_json_the_result_is_stated_and_the_predictions_are_compared(run: Run) -> None:
    outcome = toolkit("evaluate", run.path)
    assert outcome.status == 0
    assert "predictions.csv: 50 of 50 rows are the same" in outcome.stdout
    assert outcome.stdout.splitlines()[-1] == f"all {2 * len(MEASURES)} metrics equal those of summary.json"


def test_several_processes_give_the_same_metrics_bit_for_bit(run: Run) -> None:
    first, *others = launch(3, toolkit, "evaluate", str(run.path), "--json")
    assert metrics(first)["best"]["test_loss"] == run.summary["best"]["test_loss"]
    assert [other.stdout for other in others] == ["", ""], "only one process prints"


def test_a_run_of_two_processes_is_reproduced_on_one_and_on_three(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, STATEFUL)
    trainers = Trainers(2, tmp_path, recipe, "--set", "train.epochs=2", "--set", "train.eval_batch_size=10")
    assert trainers.wait() == [0, 0], trainers.text()
    path = str(only_run(tmp_path).path)
    metrics(toolkit("evaluate", path, "--json"))
    metrics(launch(3, toolkit, "evaluate", path, "--json")[0])


def test_a_run_of_virtual_processes_is_evaluated_in_their_batches(tmp_path: Path) -> None:
    """The float32 logits of an image depend on the size of its batch by rounding."""
    settings = ("train.virtual_processes=4", "model.head.hidden=[64]", "optimizer.lr=0.2")
    run = train_on_files(tmp_path, CONVNET, *settings, epochs=3)
    metrics(toolkit("evaluate", run.path, "--json"))


def test_training_images_are_evaluated_though_no_metrics_were_recorded(run: Run) -> None:
    outcome = toolkit("evaluate", run.path, "--split", "train")
    assert outcome.status == 0
    assert "train: 72 images" in outcome.stdout
    assert "the run has no recorded metrics of this split" in outcome.stdout


def test_weights_of_another_run_are_detected(copy: Run) -> None:
    state = safetensors.torch.load_file(copy.best_weights)
    state["head.bias"] += 1.0 * (state["head.bias"] > 0)
    safetensors.torch.save_file(state, copy.best_weights)
    outcome = toolkit("evaluate", copy.path)
    assert outcome.status == 2
    assert "best.safetensors is not the file that this run ended with" in outcome.stderr
    for path in copy.checkpoints.glob("0*"):  # without a checkpoint only the metrics differ
        path.unlink()
    outcome = toolkit("evaluate", copy.path)
    assert outcome.status == 1
    assert "metrics differ from summary.json: best test_loss" in outcome.stdout


@pytest.mark.parametrize("damage", [Path.unlink, Path.touch])
def test_without_the_last_checkpoint_only_the_best_model_is_evaluated(copy: Run, damage: Any) -> None:
    for path in copy.checkpoints.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
        damage(path)
    outcome = toolkit("evaluate", copy.path)
    assert outcome.status == 0
    assert "the last model was not evaluated: no intact checkpoint of epoch 5 is left" in outcome.stdout
    assert outcome.stderr == ""
    assert f"all {len(MEASURES)} metrics equal" in outcome.stdout


def test_a_killed_run_is_evaluated_without_a_comparison(copy: Run) -> None:
    for name in ("summary.json", "predictions.csv", "checkpoints/best.safetensors"):
        (copy.path / name).unlink()
    outcome = toolkit("evaluate", copy.path)
    assert outcome.status == 0, outcome.stderr
    assert "the run has not finished: best-000" in outcome.stdout
    assert "nothing to compare with" in outcome.stdout


def test_moved_images_are_found_with_data_root(run: Run, tmp_path: Path) -> None:
    data = Path(run.recipe.data.root)
    moved = tmp_path / "moved"
    data.rename(moved)
    try:
        refused = toolkit("evaluate", run.path)
        metrics(toolkit("evaluate", run.path, "--data-root", moved, "--json"))
    finally:
        moved.rename(data)
    assert refused.status == 2
    assert f"the images of {run.path} are not available" in refused.stderr
    assert "--data-root FOLDER" in refused.stderr


def test_missing_images_and_different_classes_are_named(run: Run, tmp_path: Path) -> None:
    data = shutil.copytree(run.recipe.data.root, tmp_path / "data")
    lost = min((data / "test" / "3").iterdir())
    lost.unlink()
    outcome = toolkit("evaluate", run.path, "--data-root", data)
    assert outcome.status == 2
    assert "1 of the 50 test images" in outcome.stderr
    assert f"test/3/{lost.name}" in outcome.stderr
    metrics(toolkit("evaluate", run.path, "--split", "validation", "--data-root", data, "--json"))
    (data / "train" / "extra").mkdir()
    shutil.copy(min((data / "test" / "4").iterdir()), data / "train" / "extra")
    outcome = toolkit("evaluate", run.path, "--data-root", data)
    assert outcome.status == 2
    assert "now has different classes (11)" in outcome.stderr
    assert "new: extra" in outcome.stderr


def test_an_unknown_split_is_refused_with_the_nearest_name(run: Run) -> None:
    outcome = toolkit("evaluate", run.path, "--split", "val")
    assert outcome.status == 2
    assert outcome.stderr == "there is no split 'val': a run has train, validation, test; did you mean validation?\n"


def test_runs_on_data_sets_in_memory_are_reproduced(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, STATEFUL)
    run = train(recipe, "train.epochs=2", "train.eval_batch_size=13")
    found = metrics(toolkit("evaluate", run.path, "--json"))
    assert set(found["best"]) == {f"test_{name}" for name in MEASURES}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "recipe.toml").unlink(), "is not a run directory: it has no recipe.toml"),
        (lambda path: (path / "summary.json").write_text("{"), "summary.json is damaged"),
        (
            lambda path: (path / "summary.json").write_text('{"best": 1}'),
            "summary.json is damaged: best is not a JSON object",
        ),
        (lambda path: (path / "split.json").unlink(), "split.json is missing"),
        (lambda path: (path / "split.json").write_text("{}"), "split.json is damaged"),
        (lambda path: (path / "checkpoints" / "model.json").write_text("[]"), "model.json is damaged"),
        (lambda path: (path / "checkpoints" / "best.safetensors").write_bytes(b"no"), "best.safetensors is damaged"),
        (lambda path: shutil.rmtree(path / "checkpoints"), "the run has not finished an epoch yet"),
    ],
)
def test_a_damaged_run_gives_one_clear_message(copy: Run, damage: Any, message: str) -> None:
    damage(copy.path)
    outcome = toolkit("evaluate", copy.path)
    assert outcome.status == 2
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
