"""Which epoch is kept, and runs that have no validation or no test split, through every command that reads a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from cli import toolkit
from finished import CONVNET, train
from PIL import Image

from toolkit.metrics import measures_of
from toolkit.recipe import loads_recipe
from toolkit.report.run_data import load_run_data
from toolkit.runs import Run, open_run
from toolkit.training.lr_schedule import epoch_rank

pytestmark = pytest.mark.long

DIGITS = """
[recipe]
name = "chosen"
run_root = {runs}

[data]
dataset = "digits"
images_per_class = 20
test_images_per_class = 6

[optimizer]
name = "sgd"
lr = 0.05
momentum = 0.9

[train]
epochs = 3
batch_size = 50
precision = "no"

[tracking]
trackers = []
"""
NONE = ("data.split.validation=0", "data.split.test=0", 'train.best_metric="last"')


def write(folder: Path, more: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text(DIGITS.format(runs=json.dumps(str(folder / "runs"))) + CONVNET + more)
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run on all images, without validation and test."""
    return train(write(tmp_path_factory.mktemp("bare")), *NONE)


# -- ties -------------------------------------------------------------------------------------------------------------


def record(epoch: int, loss: float, accuracy: float) -> dict[str, float]:
    return {"epoch": epoch, "val/loss": loss, "val/accuracy": accuracy, "val/balanced_accuracy": accuracy}


@pytest.mark.parametrize(
    ("best_metric", "best"),
    [("val/accuracy", 3), ("val/balanced_accuracy", 3), ("val/loss", 4), ("last", 5), ("val/top5_accuracy", 1)],
)
def test_equal_accuracies_are_decided_by_loss_and_equal_losses_by_accuracy(best_metric: str, best: int) -> None:
    """Epochs 2, 3 and 5 have the best accuracy, 3 and 5 of them the lower loss; epochs 4 and 1 have the lowest loss.

    None has a top-5 accuracy, so that the loss alone decides and the first of equal epochs is taken.
    """
    epochs = [record(1, 0.01, 0.8), record(2, 0.05, 1.0), record(3, 0.02, 1.0), record(4, 0.01, 0.9),
              record(5, 0.02, 1.0)]  # fmt: skip
    assert max(epochs, key=lambda r: epoch_rank(r, best_metric))["epoch"] == best


def test_a_run_keeps_the_lower_loss_of_equal_accuracies(tmp_path: Path) -> None:
    """With ten validation images many epochs have the same accuracy, and the first of them is not the best."""
    run = train(write(tmp_path), "data.split.validation=10", "train.epochs=20")
    epochs, best = run.epoch_records(), run.summary["best"]
    highest = max(r["val/accuracy"] for r in epochs)
    tied = [r for r in epochs if r["val/accuracy"] == highest]
    assert len(tied) > 1
    lowest = min(tied, key=lambda r: r["val/loss"])
    assert lowest["epoch"] != tied[0]["epoch"], "otherwise taking the first of equal epochs would pass too"
    assert (best["epoch"], best["val_loss"], best["val_accuracy"]) == (
        lowest["epoch"], lowest["val/loss"], highest)  # fmt: skip
    assert load_run_data(run).best_epoch == best["epoch"]
    (run.path / "summary.json").unlink()
    assert load_run_data(run).best_epoch == best["epoch"], "a report on an unfinished run finds the same epoch"


# -- the last epoch ---------------------------------------------------------------------------------------------------


def test_with_best_metric_last_the_last_epoch_is_kept(tmp_path: Path) -> None:
    """The learning rate is raised so that the last epoch is not the best one."""
    settings = ("train.epochs=4", "optimizer.lr=0.3", 'scheduler={name="one_cycle", pct_start=0.9, start_factor=0.05}')
    run = train(write(tmp_path), *settings, 'train.best_metric="last"')
    assert run.summary["best"] == run.summary["last"]
    assert run.summary["best"]["epoch"] == 4
    chosen = train(write(tmp_path), *settings).summary
    assert chosen["best"]["epoch"] != 4
    assert chosen["last"] == run.summary["last"], "both runs train identically"


def test_resuming_a_run_without_validation_is_bit_identical(tmp_path: Path) -> None:
    from toolkit.training.fit import fit

    recipe = loads_recipe(write(tmp_path).read_text(), [*NONE, "train.ema=0.9"])
    whole = fit(recipe, quiet=True)
    paused = fit(recipe, quiet=True, until=2)
    assert not paused.is_finished
    resumed = fit(recipe, quiet=True, resume=paused.path)
    assert resumed.best_weights.read_bytes() == whole.best_weights.read_bytes()
    assert resumed.metrics_file.read_bytes() == whole.metrics_file.read_bytes()


def test_saved_weights_that_differ_from_the_last_epochs_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without validation images the file is compared with the model in memory, tensor by tensor."""
    from toolkit.training import run_writer

    def spoiled(folder: Path, epoch: int, state: dict[str, torch.Tensor]) -> None:
        saved(folder, epoch, {name: value + (name == "head.bias") * 1e-6 for name, value in state.items()})

    saved = run_writer.save_best
    monkeypatch.setattr(run_writer, "save_best", spoiled)
    outcome = toolkit("train", write(tmp_path), "--no-report", *(part for s in NONE for part in ("--set", s)))
    assert outcome.status == 1
    assert "best.safetensors does not hold the weights of the last epoch: head.bias differs" in outcome.stderr


# -- no validation, no test -------------------------------------------------------------------------------------------


def test_without_validation_and_test_all_images_are_trained(bare: Run) -> None:
    split, summary = bare.split, bare.summary
    assert [len(split[name]) for name in ("train", "validation", "test")] == [200, 0, 0]
    assert summary["images"] == {"train": 200, "validation": 0, "test": 0}
    assert summary["best"] == summary["last"] == {"epoch": 3}
    assert not (bare.path / "predictions.csv").exists()
    assert [sorted(r) for r in bare.epoch_records()] == [["epoch", "lr", "step", "train/accuracy", "train/loss"]] * 3
    log = bare.log_file.read_text()
    assert "val loss" not in log
    assert "BEST" not in log
    assert "it holds the weights of the last epoch" in log


def test_validation_or_test_alone_can_be_left_out(tmp_path: Path) -> None:
    no_validation = train(write(tmp_path), "data.split.validation=0", 'train.best_metric="last"').summary
    assert set(no_validation["best"]) == {"epoch", *(f"test_{name}" for name in measures_of("single_label"))}
    no_test = train(write(tmp_path), "data.split.test=0").summary
    assert set(no_test["best"]) == {"epoch", *(f"val_{name}" for name in measures_of("single_label"))}
    assert no_test["images"]["test"] == 0


def test_evaluate_names_the_available_splits(bare: Run) -> None:
    outcome = toolkit("evaluate", bare.path)
    assert outcome.status == 2
    assert outcome.stderr == f"{bare.path} has no test images (data.split.test); choose another split: --split train\n"
    found = json.loads(toolkit("evaluate", bare.path, "--split", "train", "--json").stdout)
    assert found["images"] == 200
    assert found["metrics"]["best"]["train_accuracy"]["evaluated"] > 0.3


def test_predict_works_without_validation_and_test(bare: Run, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    rows = toolkit("predict", bare.path, tmp_path / "a.png").stdout.splitlines()
    assert rows[0] == "path,prediction,probability"
    assert rows[1].split(",")[1] in "0123456789"


def test_the_report_leaves_out_missing_splits(bare: Run) -> None:
    outcome = toolkit("report", bare.path)
    assert outcome.status == 0, outcome.stderr
    assert "not shown in the report" not in outcome.stderr
    page = bare.report_file.read_text()
    charts = json.loads(page.split('<script type="application/json" id="page-data">')[1].split("</script>")[0])[
        "charts"
    ]
    assert [series["name"] for series in charts["loss"]["series"]] == ["train"]
    assert charts["loss"]["markers"][0]["label"] == "last: 3"
    assert "0 validation, 0 test" in page


def test_status_explain_export_and_publish_work_without_validation_and_test(bare: Run, tmp_path: Path) -> None:
    assert "finished  3/3" in toolkit("status", bare.path).stdout
    outcome = toolkit("explain", bare.path)
    assert outcome.status == 2
    assert "no test images, so there are no mistakes to explain: specify images" in outcome.stderr
    exported = toolkit("export", bare.path, "--format", "safetensors", "-o", tmp_path / "exported")
    assert exported.status == 0, exported.stderr
    state = safetensors.torch.load_file(tmp_path / "exported" / "model.safetensors")
    own = safetensors.torch.load_file(bare.best_weights)
    assert all(torch.equal(value, own[name]) for name, value in state.items())
    published = toolkit("publish", bare.path, "lab/digits", "--no-push", "-o", tmp_path / "published")
    assert published.status == 0, published.stderr
    card = (tmp_path / "published" / "README.md").read_text()
    assert "Images: 200 train; no validation images." in card
    assert "It is the last epoch's model; there were no test images." in card


def test_a_model_card_has_a_column_only_for_existing_splits(tmp_path: Path) -> None:
    run = train(write(tmp_path), "data.split.test=0")
    toolkit("publish", run.path, "lab/digits", "--no-push", "-o", tmp_path / "published")
    card = (tmp_path / "published" / "README.md").read_text()
    assert "| | validation |\n|---|---|\n| cross-entropy |" in card
    assert f"| top-1 accuracy | {run.summary['best']['val_accuracy']:.4f} |" in card


def test_data_and_plan_count_all_images_as_training_images_without_other_splits(tmp_path: Path) -> None:
    settings = [part for setting in NONE for part in ("--set", setting)]
    recipe = write(tmp_path)
    assert "images     200 train, 0 validation, 0 test" in toolkit("data", recipe, *settings).stdout
    plan = json.loads(toolkit("plan", recipe, "--json", *settings).stdout)
    assert (plan["images"]["train"], plan["steps_per_epoch"]) == (200, 4)


def test_frozen_features_are_cached_without_validation_too(bare: Run, tmp_path: Path) -> None:
    more = ('transfer.mode="linear_probe"', f'model.weights="file:{bare.best_weights}"', "data.channels=1")
    run = train(write(tmp_path), *NONE, *more)
    assert any("computed once for 200 images" in words for words in run.summary["cached"])
    plain = train(write(tmp_path), *NONE, *more, 'data.cache="off"')
    own, expected = run.epoch_records()[-1]["train/loss"], plain.epoch_records()[-1]["train/loss"]
    assert own == pytest.approx(expected, rel=1e-6)


def test_trackers_get_the_metrics_of_existing_splits(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(write(tmp_path), *NONE, 'tracking.trackers=["tensorboard", "wandb"]', 'tracking.mode="offline"')
    assert list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "warning" not in run.log_file.read_text()
    tags: set[str] = set()
    for file in (run.path / "tensorboard").rglob("events*"):
        events = EventAccumulator(os.fspath(file))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert {"train/loss", "train/accuracy", "lr"} <= tags
    assert not any(tag.startswith("val/") for tag in tags)


def test_expected_metrics_of_a_missing_split_are_not_comparable(tmp_path: Path) -> None:
    recipe = write(tmp_path, '\n[expected_metrics]\ntest_accuracy = { at_least = 0.1, source = "here" }\n')
    settings = [part for setting in NONE for part in ("--set", setting)]
    checked = toolkit("validate", recipe, *settings)
    assert checked.status == 0
    assert (
        "warning: expected_metrics.test_accuracy: is not compared, since data.split.test = 0"
        in checked.stdout + checked.stderr
    )
    run = train(recipe, *NONE)
    assert "measured -: not comparable (the run has no such metric)" in run.log_file.read_text()


# -- studies ----------------------------------------------------------------------------------------------------------


def study(folder: Path, more: str) -> Path:
    """Write a study whose runs have no validation and no test images unless ``more`` sets them."""
    path = write(folder)
    text = path.read_text().replace("precision =", 'best_metric = "last"\nprecision =')
    text = text.replace("test_images_per_class = 6", "split = { validation = 0, test = 0 }")
    path.write_text(text + more)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('grid.optimizer.lr = [0.1, 0.2]\noutput.columns = ["train_loss", "val_loss"]',
         "study.output.columns: no run has val_loss, since data.split.validation = 0"),
        ('grid.optimizer.lr = [0.1, 0.2]\noutput.columns = ["last_test_accuracy"]',
         "study.output.columns: no run has last_test_accuracy, since data.split.test = 0"),
        ('grid.optimizer.lr = [0.1, 0.2]\noutput.per_epoch = "val/loss"',
         "study.output.per_epoch: no run has val/loss, since data.split.validation = 0"),
        ("space.optimizer.lr = { uniform = [0.1, 0.2] }\nbohb = { trials = 3, min_epochs = 1, max_epochs = 3 }",
         "study.bohb.metric: no run has val/accuracy, since data.split.validation = 0"),
    ],
)  # fmt: skip
def test_a_study_with_columns_or_metrics_that_no_run_has_is_refused(tmp_path: Path, text: str, message: str) -> None:
    outcome = toolkit("validate", study(tmp_path, f"\n[study]\n{text}\n"))
    assert outcome.status == 2
    assert message in outcome.stdout + outcome.stderr


def test_a_study_of_which_some_runs_have_the_split_may_have_its_columns(tmp_path: Path) -> None:
    text = '\n[study]\ngrid.data.split.validation = [0, 0.1]\noutput.columns = ["train_loss", "val_loss"]\n'
    outcome = toolkit("validate", study(tmp_path, text))
    assert outcome.status == 0, outcome.stdout + outcome.stderr


def test_a_studys_table_has_the_columns_of_its_runs_splits(tmp_path: Path) -> None:
    recipe = study(tmp_path, "\n[study]\ngrid.optimizer.lr = [0.01, 0.1]\n")
    outcome = toolkit("study", recipe)
    assert outcome.status == 0, outcome.stderr
    table = toolkit("table", tmp_path / "runs" / "chosen").stdout
    heading = next(line for line in table.splitlines() if line.startswith("setting"))
    assert heading.split() == ["setting", "train", "loss", "train", "acc.", "%", "epochs", "seconds", "images/s"]
    report = toolkit("report", tmp_path / "runs" / "chosen")
    assert report.status == 0, report.stderr
    assert open_run(next((tmp_path / "runs" / "chosen").glob("*/recipe.toml")).parent).is_finished


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["true", "false"])
def test_two_processes_train_on_all_images(tmp_path: Path, sync: str) -> None:
    """Without synchronized batch norm the statistics differ between processes; they are averaged all the same."""
    from trainers import Trainers

    settings = [part for one in (*NONE, f"train.sync_batch_norm={sync}", "train.ema=0.9") for part in ("--set", one)]
    trainers = Trainers(2, tmp_path, write(tmp_path), *settings)
    assert trainers.wait() == [0, 0], trainers.text()
    (folder,) = (tmp_path / "runs" / "chosen").iterdir()
    run = open_run(folder)
    assert run.summary["best"] == {"epoch": 3}
    assert "it holds the weights of the last epoch" in run.log_file.read_text()
    if sync == "true":
        alone = train(write(tmp_path / "alone"), *NONE, "train.ema=0.9")
        losses = [[r["train/loss"] for r in each.epoch_records()] for each in (run, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
