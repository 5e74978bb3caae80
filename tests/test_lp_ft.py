"""transfer.mode = "lp_ft": each phase is what it would be as a run of its own, however the run is interrupted."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import PRETRAINED, Trainers, only_run, outcome, write_recipe

from toolkit.distributed.process import StopTraining
from toolkit.errors import Interrupted
from toolkit.lr_finder import find_lr
from toolkit.recipe import Recipe, load_recipe
from toolkit.recipe.schema import AugmentConfig, TransformConfig
from toolkit.runs import Run
from toolkit.training import trainer
from toolkit.training.checkpoint import checkpoint_step
from toolkit.training.fit import dry_run, fit
from toolkit.training.loaders import DataLoaders, build_loaders
from toolkit.training.lp_ft import without_randomness
from toolkit.training.trained_model import load_model

BEFORE_TRANSFER = f"""{PRETRAINED}
[augment]
train = [{{{{ name = "RandomAffine", degrees = 20 }}}}]

[scheduler]
name = "cosine"
warmup_epochs = 1.0
"""
LP_FT = f"""{BEFORE_TRANSFER}
[transfer]
mode = "lp_ft"
probe_epochs = 2
probe_lr = 0.2
l2_sp = 0.1
wise = [0.0, 0.5, 1.0]
"""
"""Two epochs of the probe, then three of fine-tuning."""


KEPT = ("checkpoint.keep=100", "train.ema=0.9")


def lp_ft(folder: Path, *settings: str) -> Recipe:
    return load_recipe(write_recipe(folder, LP_FT), settings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train LP_FT without an interruption, with all its checkpoints."""
    return fit(lp_ft(tmp_path_factory.mktemp("plain"), *KEPT), quiet=True)


def use_cache(folder: Path, rank: int) -> None:
    os.environ["TOOLKIT_CACHE"] = str(folder)


def test_random_transforms_are_left_out_of_the_probe() -> None:
    fixed, random = TransformConfig(name="Grayscale"), TransformConfig(name="RandomHorizontalFlip")
    augment = AugmentConfig(
        train=[random, fixed], test=[fixed], auto_augment="rand-m9", random_erasing=0.1, mixup=0.2, cutmix=0.2,
        label_smoothing=0.1,
    )  # fmt: skip
    assert without_randomness(augment) == AugmentConfig(train=[fixed], test=[fixed], label_smoothing=0.1)


pytestmark = pytest.mark.long


def test_the_probe_is_that_of_a_linear_probe(tmp_path: Path, plain: Run) -> None:
    text = f'{PRETRAINED}\n[transfer]\nmode = "linear_probe"\n'
    settings = [*KEPT, "train.epochs=2", "optimizer.lr=0.2"]
    alone = fit(load_recipe(write_recipe(tmp_path, text), settings), quiet=True)
    assert plain.epoch_records()[:2] == alone.epoch_records()
    assert alone.summary["cached"]
    log = plain.log_file.read_text()
    assert "cached: inputs of head computed once" in log
    assert log.index("cached: inputs") < log.index("epoch 3: 7 parameter tensors are trained from now on")


def test_fine_tuning_is_that_of_a_run_that_starts_from_the_probe(tmp_path: Path) -> None:
    """With one batch per epoch, so that the order of images, which depends on the epoch, has no effect."""
    settings = ("train.batch_size=110", "augment.train=[]", "checkpoint.keep=100", "train.ema=0.9")
    run = fit(lp_ft(tmp_path, *settings, "transfer.l2_sp=0", "transfer.wise=[]"), quiet=True)
    (probed,) = (path for path in run.checkpoints.glob("0002-000000-*.pt"))
    model = load_model(run.checkpoints).module
    model.load_state_dict(torch.load(probed)["model"])
    settings = (*settings, 'model.weights="none"', "data.channels=3", "train.epochs=3")
    recipe = load_recipe(write_recipe(tmp_path, BEFORE_TRANSFER), settings)
    alone = fit(recipe, model=model, quiet=True)
    for found, expected in zip(run.epoch_records()[2:], alone.epoch_records(), strict=True):
        for key in ("lr", "train/loss", "val/loss"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4), (key, found["epoch"])


def test_learning_rates_and_early_stopping_begin_with_fine_tuning(tmp_path: Path) -> None:
    settings = ("train.epochs=6", "transfer.probe_epochs=3", "transfer.probe_lr=1e-9", "early_stopping.patience=1")
    settings = (*settings, "transfer.wise=[]")
    run = fit(lp_ft(tmp_path, *settings), quiet=True)
    rates = [record["lr"] for record in run.epoch_records()]
    assert rates[:3] == [1e-9] * 3
    assert rates[4:] == pytest.approx([0.05, 0.025][: len(rates) - 4]), "cosine over two epochs, after the warm-up"
    assert len(rates) > 3, "the loss does not improve in the probe, which does not stop the run"


def killed_at(run: Run, position: tuple[int, int], copy: Path) -> Run:
    """Return a copy of a finished run as it was when a checkpoint had been written."""
    shutil.copytree(run.path, copy)
    (copy / "summary.json").unlink()
    for path in (copy / "checkpoints").iterdir():
        step = checkpoint_step(path)
        if step is not None and step > position:
            path.unlink()
    return Run(copy)


def test_a_run_killed_in_either_phase_or_at_its_end_gives_the_same_bytes(plain: Run) -> None:
    positions = [(1, 3), (2, 0), (4, 3), (5, 0)]
    stored = {checkpoint_step(path) for path in plain.checkpoints.glob("*.json")}
    assert stored >= set(positions)
    for position in positions:
        run = killed_at(plain, position, plain.path.with_name("-".join(map(str, position))))
        assert outcome(fit(plain.recipe, resume=run.path, quiet=True)) == outcome(plain), position
        assert f"resuming after epoch {position[0]}, step {position[1]}" in run.log_file.read_text()


def test_a_stop_while_the_images_of_fine_tuning_are_cached_loses_nothing(
    tmp_path: Path, plain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, calls = lp_ft(tmp_path, *KEPT), []

    def stopped_in_the_second_phase(*arguments: Any) -> DataLoaders:
        calls.append(arguments)
        if len(calls) == 2:
            raise StopTraining
        return build_loaders(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "build_loaders", stopped_in_the_second_phase)
        with pytest.raises(Interrupted, match="after a checkpoint was written; resume with"):
            fit(recipe, quiet=True)
    run = fit(recipe, resume="auto", quiet=True)
    assert {**outcome(run), "summary": None} == {**outcome(plain), "summary": None}


def test_two_processes_take_the_same_steps(tmp_path: Path, plain: Run) -> None:
    prepare = functools.partial(use_cache, tmp_path / "cache")
    settings = [text for setting in KEPT for text in ("--set", setting)]
    trainers = Trainers(2, tmp_path, write_recipe(tmp_path, LP_FT), *settings, prepare=prepare)
    assert trainers.wait() == [0, 0], trainers.text()
    found, expected = only_run(tmp_path).summary["wise"], plain.summary["wise"]
    for one, other in zip(found["tried"], expected["tried"], strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=2e-3)
    for found, expected in zip(only_run(tmp_path).epoch_records(), plain.epoch_records(), strict=True):
        for key in ("train/loss", "val/loss"):
            assert found[key] == pytest.approx(expected[key], rel=2e-3), (key, found["epoch"])


@pytest.mark.parametrize("setting", ['data.cache="off"', "transfer.probe_augment=true"])
def test_features_are_cached_only_without_augmentation_and_change_nothing(
    tmp_path: Path, plain: Run, setting: str
) -> None:
    other = fit(lp_ft(tmp_path, setting, *KEPT, "transfer.wise=[]"), quiet=True)
    assert "cached: inputs of head" not in other.log_file.read_text()
    losses = [
        [record["train/loss"] for record in records] for records in (other.epoch_records(), plain.epoch_records())
    ]
    is_same = losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert is_same == (setting == 'data.cache="off"')


def test_a_dry_run_tries_both_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(lp_ft(tmp_path))
    shown = capsys.readouterr().err
    assert "linear probe for 2 epochs with learning rate 0.2, then fine-tuning for 3 epochs" in shown
    assert shown.count("cached: inputs of head") == 0, "a dry run writes nothing, not even to the cache"


def test_the_learning_rate_finder_is_for_fine_tuning(tmp_path: Path) -> None:
    found, _ = find_lr(lp_ft(tmp_path), steps=40)
    text = f'{BEFORE_TRANSFER}\n[transfer]\nmode = "finetune"\nl2_sp = 0.1\n'
    expected, _ = find_lr(load_recipe(write_recipe(tmp_path, text)), steps=40)
    assert found == expected
