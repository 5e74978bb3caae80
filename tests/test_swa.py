"""Stochastic weight averaging: train.swa_start and train.swa_lr."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import toolkit
from distributed import launch
from finished import train
from test_exact import RECIPE
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from trainers import FROZEN, GRADUAL, PRETRAINED, STATEFUL, write_recipe

from toolkit.data.sampling import RunLength
from toolkit.distributed.context import distributed_context
from toolkit.distributed.signals import GracefulStop
from toolkit.recipe import load_recipe, loads_recipe
from toolkit.recipe.load import RecipeError
from toolkit.runs import Run
from toolkit.training.checkpoint import find_latest, load_checkpoint, load_weights
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.fit import fit
from toolkit.training.lr_schedule import scheduled_rate
from toolkit.training.trained_model import load_model
from toolkit.training.trainer import Trainer

pytestmark = pytest.mark.long

SWA = ("train.swa_start=3", "train.swa_lr=0.03", 'train.best_metric="last"', "checkpoint.keep=99")
PLAIN = STATEFUL.replace("mixup = 0.4", "mixup = 0.0").replace('name = "plateau"\npatience = 0\ngamma = 0.5', "")
"""Random augmentation, batch norm and dropout."""


def checkpoint_of(run: Run, epoch: int) -> dict[str, Any]:
    (path,) = run.checkpoints.glob(f"{epoch:04d}-000000-*.pt")
    return load_checkpoint(path)


def batches_of(recipe: Path, settings: tuple[str, ...], epoch: int) -> list[torch.Tensor]:
    """Return the images of each training batch of an epoch, counted from 0."""
    loaded = load_recipe(recipe, list(settings))
    with distributed_context(loaded.train) as accelerator:
        setup = build_context(loaded, accelerator, Console(is_main=True, shows=False))
        trainer = Trainer(setup, None, None, GracefulStop(), None, "none")
        batches = [batch.images for _, batch in trainer.loaders.train.epoch(epoch)]
        trainer.loaders.close()
    return batches


def test_the_average_equals_torch_s_averaged_model_and_update_bn(tmp_path: Path) -> None:
    """torch's update_bn leaves dropout on; here it is off, so the model has none."""
    recipe = write_recipe(tmp_path, PLAIN.replace(", dropout = 0.1", "").replace("dropout = 0.2", ""))
    run = train(recipe, *SWA)
    last = checkpoint_of(run, 5)
    assert last["averaged_models"] == 3
    assert checkpoint_of(run, 2)["ema"] == {}
    module = load_model(run.path).module
    averaged = AveragedModel(module)
    for epoch in (3, 4, 5):
        module.load_state_dict(checkpoint_of(run, epoch)["model"])
        averaged.update_parameters(module)
    update_bn(batches_of(recipe, SWA, 4), averaged)
    expected = averaged.module.state_dict()
    saved = load_weights(run.best_weights)
    trained = last["model"]
    changed = [name for name, value in saved.items() if not torch.equal(value, trained[name])]
    assert sum(name.endswith("running_var") for name in changed) == 2
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, msg=lambda text, name=name: f"{name}: {text}")
    for name, value in last["ema"].items():
        assert torch.equal(saved[name], value), name


LENGTH = RunLength(10, 60)
"""Six epochs of ten steps."""


def test_the_learning_rate_is_constant_from_swa_start_on_as_with_swalr() -> None:
    """torch's SWALR without annealing."""
    text = """
        recipe = { name = "swa" }
        data = { dataset = "digits" }
        model = { source = "toolkit", convnet.blocks = [{ channels = 4 }] }
        optimizer = { lr = 0.1 }
        scheduler = { name = "cosine" }
        train = { epochs = 6, batch_size = 8, swa_start = 4, swa_lr = 0.02 }
    """
    recipe = loads_recipe(text)
    plain = loads_recipe(text.replace(", swa_start = 4, swa_lr = 0.02", ""))
    rates = [scheduled_rate(recipe, epoch / 2, LENGTH) for epoch in range(12)]
    assert rates[:6] == [scheduled_rate(plain, epoch / 2, LENGTH) for epoch in range(6)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=0)
    for rate in rates[6:]:
        assert rate == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert scheduled_rate(recipe, 5, LENGTH, scale=0.1) == pytest.approx(0.002), "a layer group with its own rate"
    kept = loads_recipe(text.replace(", swa_lr = 0.02", ""))
    assert scheduled_rate(kept, 5, LENGTH) == scheduled_rate(plain, 5, LENGTH)


def test_an_average_is_validated_tested_and_evaluated_again(tmp_path: Path) -> None:
    """The default metric chooses the best epoch; the last model is an average as well, and so are its test metrics."""
    run = train(write_recipe(tmp_path, PLAIN), *SWA[:2], "optimizer.lr=0.2")
    evaluated = toolkit("evaluate", run.path)
    assert "metrics equal those of summary.json" in evaluated.stdout, evaluated.stderr
    exported = toolkit("export", run.path, "--format", "safetensors", "--epoch", "last")
    assert exported.status == 0, exported.stderr
    last = load_model(run.path / "export" / "safetensors-last").module.state_dict()
    average = load_checkpoint(find_latest(run.checkpoints, lambda line: None))["ema"]
    assert {name for name in average if name.endswith("running_mean")}
    assert all(torch.equal(last[name], value) for name, value in average.items())


def test_frozen_batch_norm_keeps_its_statistics_and_cached_features_are_averaged(tmp_path: Path) -> None:
    run = train(write_recipe(tmp_path, FROZEN), *SWA)
    assert "inputs of head computed once" in " ".join(run.summary["cached"])
    content = checkpoint_of(run, 5)
    assert content["ema"].keys() == {name for name in content["model"] if name.startswith("head")}
    heads = [checkpoint_of(run, epoch)["model"] for epoch in (3, 4, 5)]
    for name, value in content["ema"].items():
        torch.testing.assert_close(value, torch.stack([head[name] for head in heads]).mean(0))


def test_the_end_of_a_run_within_an_epoch_is_averaged_too(tmp_path: Path) -> None:
    """7 steps per epoch; the third epoch ends after 3 steps."""
    run = train(write_recipe(tmp_path, PRETRAINED), "train.epochs=2.4", "train.swa_start=2", *SWA[2:])
    content = checkpoint_of(run, 3)
    assert run.epoch_records()[-1]["step"] == 17
    assert content["averaged_models"] == 2
    states = [checkpoint_of(run, epoch)["model"] for epoch in (2, 3)]
    for name in (name for name, _ in load_model(run.path).module.named_parameters()):
        torch.testing.assert_close(content["ema"][name], torch.stack([state[name] for state in states]).mean(0))


def test_swa_start_beyond_the_steps_of_a_run_is_refused_before_training(tmp_path: Path) -> None:
    text = write_recipe(tmp_path, PRETRAINED)
    text.write_text(text.read_text().replace("epochs = 5", "steps = 12"))
    outcome = toolkit("train", text, "--set", "train.swa_start=4")
    assert outcome.status == 2
    assert "train.swa_start = 4 is beyond the run's 2 epochs, so that nothing would be averaged" in outcome.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.ema=0.9"], "train.swa_start: cannot be combined with train.ema: each determines the weights that are"),
        (["optimizer.lookahead=5"], "train.swa_start: cannot be combined with optimizer.lookahead"),
        (["train.swa_start=9"], "train.swa_start: epoch 9 is beyond the run's 5 epochs"),
        (["train.virtual_processes=2"], "train.swa_start: cannot be combined with virtual_processes"),
        (
            ['transfer.mode="gradual"', "transfer.unfreeze_at=[2,4]"],
            "train.swa_start: epoch 3 is before epoch 4, in which the last layer group is unfrozen",
        ),
        (
            ['transfer.mode="lp_ft"', "transfer.probe_epochs=3"],
            "train.swa_start: epoch 3 is in the probe of 3 epochs, in which only the head is trained",
        ),
        (
            ['transfer.mode="logistic"', "train.epochs=1", "train.swa_start=1"],
            'train.swa_start: with transfer.mode = "logistic", there are no steps to average over',
        ),
    ],
)
def test_impossible_combinations_are_errors_of_the_recipe(tmp_path: Path, settings: list[str], message: str) -> None:
    recipe = write_recipe(tmp_path, PRETRAINED)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["train.swa_start=3", *settings])
    assert message in str(caught.value)


def trained_on_processes(root: Path) -> dict[str, Any]:
    """Return metrics and averaged weights of a run of test_exact.py's recipe, the same on each process."""
    text = RECIPE.format(root=root, batch_norm="true").split("[early_stopping]")[0]
    text = text.replace("ema = 0.9", "swa_start = 2\nswa_lr = 0.02").replace('"val/loss"', '"last"')
    with contextlib.redirect_stderr(io.StringIO()):
        run = fit(loads_recipe(text, ["train.epochs=3", "tracking.trackers=[]"]))
    return {"epochs": run.epoch_records(), "weights": {n: t.numpy() for n, t in load_weights(run.best_weights).items()}}


@pytest.mark.extended
def test_the_number_of_processes_does_not_change_the_average(tmp_path: Path) -> None:
    one, two = (launch(world, trained_on_processes, tmp_path / str(world))[0] for world in (1, 2))
    for found, expected in zip(two["epochs"], one["epochs"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for name, value in one["weights"].items():
        np.testing.assert_allclose(two["weights"][name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_swa_lr_without_swa_start_gives_a_warning(tmp_path: Path) -> None:
    outcome = toolkit("validate", write_recipe(tmp_path, PRETRAINED), "--set", "train.swa_lr=0.01")
    assert "train.swa_lr: has no effect without train.swa_start" in outcome.stdout + outcome.stderr


def test_layers_that_are_unfrozen_before_swa_start_are_averaged(tmp_path: Path) -> None:
    run = train(write_recipe(tmp_path, GRADUAL), "train.swa_start=4", "checkpoint.keep=99")
    content = checkpoint_of(run, 5)
    names = {name for name, _ in load_model(run.path).module.named_parameters()}
    assert names <= content["ema"].keys()
    states = [checkpoint_of(run, epoch)["model"] for epoch in (4, 5)]
    for name in names:
        torch.testing.assert_close(content["ema"][name], torch.stack([state[name] for state in states]).mean(0))
