"""The length of a run in steps (train.steps) or in epochs with a fraction, whose last epoch ends early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import toolkit
from trainers import (
    EMA,
    PRETRAINED,
    STATEFUL,
    Trainers,
    at_call,
    kill_self,
    only_run,
    outcome,
    uninterrupted,
    write_recipe,
)

from toolkit.data.sampling import RunLength, SamplingPlan, run_length
from toolkit.recipe import RecipeError, load_recipe, loads_recipe
from toolkit.recipe.schema import TrainConfig
from toolkit.training.checkpoint import find_latest, load_checkpoint, load_weights
from toolkit.training.train_step import TrainStep

STEPS = 7
"""Of a whole epoch of the recipe."""

CONVNET = """
[model]
source = "toolkit"
[model.convnet]
blocks = [{{ channels = 4, pool = 2 }}]
"""


# -- computed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "epochs", "steps", "last"),
    [
        ({"epochs": 3}, 3, 30, 10),
        ({"epochs": 3.0}, 3, 30, 10),
        ({"epochs": 2.5}, 3, 25, 5),
        ({"epochs": 1.1}, 2, 11, 1),  # 1.1 * 10 is more than 11 in floating point
        ({"epochs": 2.41}, 3, 25, 5),
        ({"epochs": 0.01}, 1, 1, 1),
        ({"steps": 30}, 3, 30, 10),
        ({"steps": 31}, 4, 31, 1),
        ({"steps": 4}, 1, 4, 4),
    ],
)
def test_the_last_epoch_has_the_remaining_steps(given: dict[str, Any], epochs: int, steps: int, last: int) -> None:
    length = run_length(TrainConfig(batch_size=10, **given), 95)
    assert (length.epochs, length.steps, length.steps_in(epochs - 1)) == (epochs, steps, last)
    assert sum(length.steps_in(epoch) for epoch in range(epochs)) == steps == length.steps_until(epochs)
    assert length.exact_epochs == steps / 10


def test_the_last_epoch_begins_as_a_whole_one() -> None:
    for world in (1, 2):
        whole = SamplingPlan(size=95, seed=3, batch_size=10, world=world, rank=world - 1, mixing=True)
        plans = [whole, SamplingPlan(**vars(whole) | {"length": RunLength(10, 24)})]
        for epoch, expected in enumerate([10, 10, 4, 10]):  # there is no fourth epoch, except for `toolkit bench`
            epochs = [list(plan.epoch(epoch)) for plan in plans]
            assert len(epochs[1]) == expected
            assert all(np.array_equal(a[1], b[1]) for a, b in zip(epochs[0], epochs[1], strict=False))
        assert [micro.step for micro, *_ in plans[1].epoch(2, 3)] == [3]


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_steps_set_later_replace_epochs_and_the_other_way_round(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, CONVNET)
    train = load_recipe(path, ["train.steps=20"]).train
    assert (train.epochs, train.steps) == (None, 20)
    child = path.with_name("child.toml")
    child.write_text('extends = "recipe.toml"\n[train]\nsteps = 30\n')
    assert load_recipe(child).train.steps == 30
    train = load_recipe(child, ["train.epochs=1.5"]).train
    assert (train.epochs, train.steps) == (1.5, None)
    assert "epochs = 3  #" in toolkit("show", str(path), "--set", "train.epochs=3.0").stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 5", "epochs = 5\nsteps = 20", "steps and epochs exclude each other"),
        ("epochs = 5", "", "epochs or steps must be given"),
    ],
)
def test_a_recipe_gives_its_length_once(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = write_recipe(tmp_path, CONVNET).read_text()
    with pytest.raises(RecipeError, match=message):
        loads_recipe(text.replace(old, new))


# -- training ---------------------------------------------------------------------------------------------------------


def train(folder: Path, text: str, *settings: str) -> Any:
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = toolkit("train", "--no-report", str(write_recipe(folder, text)), *arguments)
    assert result.status == 0, result.stderr
    return only_run(folder), result.stderr


@pytest.mark.long
def test_a_run_by_steps_is_the_beginning_of_a_longer_one(tmp_path: Path) -> None:
    """After 17 steps the weights are those of a run of three epochs at that step; also with 17 / 7 epochs."""
    whole, _ = train(tmp_path / "whole", CONVNET, "train.epochs=3", "checkpoint.every_steps=1", "checkpoint.keep=99")
    (at_step,) = whole.checkpoints.glob("0002-000003-*.pt")
    expected = load_checkpoint(at_step)["model"]
    for length in ("train.steps=17", "train.epochs=2.428"):
        run, shown = train(tmp_path / length, CONVNET, length, 'train.best_metric="last"')
        assert "17 steps in all = 2.429 epochs" in shown
        assert "epoch 3/3" in shown
        records = run.epoch_records()
        assert [record["step"] for record in records] == [7, 14, 17]
        assert records[:2] == whole.epoch_records()[:2]
        latest = find_latest(run.checkpoints, print)
        assert latest is not None
        weights = load_checkpoint(latest)["model"]
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
        assert run.summary["epochs_run"] == 3
        assert run.summary["best"]["epoch"] == 3
        assert run.planned_epochs() == 3


@pytest.mark.long
def test_a_run_by_as_many_steps_as_some_epochs_have_gives_the_same_bytes(tmp_path: Path) -> None:
    cosine = CONVNET + '[scheduler]\nname = "cosine"\nwarmup_epochs = 0.5\n'
    by_epochs, _ = train(tmp_path / "epochs", cosine, "train.epochs=2")
    by_steps, _ = train(tmp_path / "steps", cosine, "train.steps=14")
    assert outcome(by_epochs) == outcome(by_steps)


@pytest.mark.long
def test_the_schedule_ends_with_the_last_step(tmp_path: Path) -> None:
    run, _ = train(
        tmp_path, CONVNET + '[scheduler]\nname = "linear"\nend_factor = 0.0\n', "train.steps=10", "train.log_every=1"
    )
    rates = [record["lr"] for record in run.metric_records() if "train/step_loss" in record]
    assert rates == pytest.approx([0.05 * (1 - step / 10) for step in range(10)])


@pytest.mark.long
def test_a_warm_up_in_steps(tmp_path: Path) -> None:
    schedule = '[scheduler]\nname = "linear"\nend_factor = 0.0\nwarmup_epochs = 1\nwarmup_start_factor = 0.0\n'
    settings = ("train.steps=12", "train.log_every=1", "scheduler.warmup_steps=4")
    run, _ = train(tmp_path, CONVNET + schedule, *settings)
    rates = [record["lr"] for record in run.metric_records() if "train/step_loss" in record]
    expected = [step / 4 for step in range(4)] + [1 - step / 8 for step in range(8)]
    assert rates == pytest.approx([0.05 * factor for factor in expected])
    assert "warmup_epochs = 0.0\nwarmup_steps = 4\n" in (run.path / "recipe.toml").read_text()


@pytest.mark.long
def test_the_schedule_of_lp_ft_covers_the_steps_after_the_probe(tmp_path: Path) -> None:
    modes = '[transfer]\nmode = "lp_ft"\nprobe_epochs = 1\n[scheduler]\nname = "linear"\nend_factor = 0.0\n'
    run, _ = train(tmp_path, PRETRAINED + modes, "train.steps=17")
    rates = [record["lr"] for record in run.epoch_records()]
    assert rates == pytest.approx([0.05, 0.05, 0.05 * 3 / 10])


@pytest.mark.long
def test_after_one_step_biases_with_a_rate_of_their_own_have_moved_so_many_times_as_far(tmp_path: Path) -> None:
    own = 'optimizer.groups=[{ pattern = "*.bias", lr_scale = 64.0 }]'
    settings = ("train.steps=1", "optimizer.momentum=0.0", 'train.best_metric="last"')
    weights = []
    for name, more in (("start", ["optimizer.lr=1e-30"]), ("plain", []), ("own", [own])):
        run, shown = train(tmp_path / name, CONVNET, *settings, *more)
        weights.append(load_weights(run.best_weights))
    assert "*.bias: 14 trainable parameters, learning rate x 64" in shown
    for name, start in weights[0].items():
        factor = 64.0 if name.endswith(".bias") else 1.0
        torch.testing.assert_close(weights[2][name] - start, factor * (weights[1][name] - start), rtol=1e-4, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_a_run_killed_in_its_last_partial_epoch_gives_the_same_bytes(tmp_path: Path, world: int) -> None:
    groups = 'optimizer.groups=[{ pattern = "*.bias", lr_scale = 4.0, weight_decay = 0.0 }]'
    settings = (*EMA, "--set", "train.steps=17", "--set", "checkpoint.every_steps=1", "--set", groups)
    plain = uninterrupted(world, STATEFUL, *settings)
    recipe = write_recipe(tmp_path, STATEFUL)

    def prepare(rank: int) -> None:
        if rank == world - 1:
            at_call(TrainStep, "_update", 17, kill_self)

    killed = Trainers(world, tmp_path, recipe, *settings, prepare=prepare)
    killed.wait_until_first_ends()
    killed.signal(9)
    killed.wait()
    assert only_run(tmp_path).planned_epochs() == 3
    resumed = Trainers(world, tmp_path, recipe, "--resume", "auto", *settings)
    assert resumed.wait() == [0] * world, resumed.text()
    assert "resuming after epoch 2, step" in resumed.text()
    assert outcome(only_run(tmp_path)) == plain


@pytest.mark.long
def test_the_number_of_epochs_of_a_run_by_steps_is_known_after_its_first_epoch(tmp_path: Path) -> None:
    run, _ = train(tmp_path, CONVNET, "train.steps=10")
    lines = run.metrics_file.read_text()
    assert "2/2" in toolkit("status", str(run.path)).stdout
    run.metrics_file.write_text("")
    assert run.planned_epochs() is None
    assert "0/?" in toolkit("status", str(run.path)).stdout
    (first,) = (line for line in lines.splitlines() if '"train/loss"' in line and '"epoch": 1,' in line)
    run.metrics_file.write_text(first + "\n")
    assert "1/2" in toolkit("status", str(run.path)).stdout


@pytest.mark.long
def test_a_length_that_the_trained_steps_do_not_allow_is_refused(tmp_path: Path) -> None:
    run, _ = train(tmp_path, CONVNET, "train.steps=10")
    (run.path / "summary.json").unlink()
    recipe = run.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("steps = 10\n", "steps = 20\n"))
    resumed = toolkit("train", "--no-report", "--resume", str(run.path), "--allow-changes")
    assert resumed.status != 0
    assert "the run has ended after 10 steps, within an epoch" in resumed.stderr


def test_a_warm_up_longer_than_a_run_by_steps_is_refused_before_training(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, CONVNET)
    result = toolkit("train", str(recipe), "--set", "train.epochs=1", "--set", "scheduler.warmup_steps=7")
    assert "scheduler.warmup_steps = 7 is not shorter than the run, which has 7 steps, 7 per epoch" in result.stderr
    result = toolkit("train", str(recipe), "--set", "train.steps=7", "--set", "scheduler.warmup_steps=7")
    assert "scheduler.warmup_steps: a warm-up of 7 steps is not shorter than the run of 7" in result.stderr
    result = toolkit("train", str(recipe), "--set", "train.steps=10", "--set", "scheduler.warmup_epochs=1.5")
    assert result.status == 2
    assert "scheduler.warmup_epochs = 1.5 is not shorter than the run, which has 10 steps, 7 per epoch" in result.stderr


# -- before training --------------------------------------------------------------------------------------------------


def test_the_plan_has_the_steps_of_the_run(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, CONVNET))
    for length, epochs, steps in (("steps=17", 3, 17), ("epochs=2.5", 3, 18), ("epochs=2", 2, 14)):
        found = json.loads(toolkit("plan", recipe, "--set", f"train.{length}", "--json").stdout)
        assert (found["epochs"], found["steps_per_epoch"], found["steps"]) == (epochs, STEPS, steps)
    assert "7 per epoch, 17 in 2.429 epochs" in toolkit("plan", recipe, "--set", "train.steps=17").stdout


def test_the_plan_of_a_study_has_the_epochs_of_each_run(tmp_path: Path) -> None:
    study = write_recipe(tmp_path, CONVNET + "[study]\ngrid.train.steps = [7, 17]\n")
    found = json.loads(toolkit("study", str(study), "--plan", "--json").stdout)
    assert [line["epochs_left"] for line in found["members"]] == [1, 3]
    images = [line["epochs_left"] * line["images_per_epoch"] for line in found["members"]]
    assert images[1] == pytest.approx(images[0] * 17 / 7, abs=3)
    assert found["members"][0]["changes"] == {"train.steps": 7}


def test_a_search_sets_the_epochs_of_runs_whatever_the_base_says(tmp_path: Path) -> None:
    table = "[study]\nbohb = {{ trials = 3, min_epochs = 1, max_epochs = 3 }}\n"
    table += "space.optimizer.lr = {{ choice = [0.01, 0.1] }}\n"
    study = write_recipe(tmp_path, CONVNET + table)
    study.write_text(study.read_text().replace("epochs = 5", "steps = 10"))
    assert toolkit("study", str(study), "--plan").status == 0
