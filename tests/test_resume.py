"""Resuming after a change of the recipe, data, best weights or clock, and after values that are not finite."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cli import toolkit
from image_folders import CLASSES, EACH, STEPS, write_images, write_recipe
from test_checkpoint import flip
from trainers import Trainers, at_call, kill_self, only_run, outcome

import toolkit.training.checkpoint as checkpoint_module
from toolkit.cli.train import process_start
from toolkit.data.splits import SPLITS
from toolkit.errors import Interrupted, RunFailed, UserError
from toolkit.models.pretrained import pack_state
from toolkit.recipe import Recipe, load_recipe, recipe_hash
from toolkit.recipe.resolve import content_hash, resolved_content
from toolkit.recipe.toml_writer import toml_document
from toolkit.runs import Run, runs_of
from toolkit.training.checkpoint import (
    checkpoint_step,
    find_latest,
    first_not_finite,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from toolkit.training.fit import fit
from toolkit.training.train_step import TrainStep
from toolkit.training.trainer import Trainer

pytestmark = pytest.mark.long


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Write a recipe on 60 image files in four classes, c0 to c3."""
    write_images(tmp_path / "data")
    return load_recipe(write_recipe(tmp_path))


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    """Return the recipe with changed values, given as ``table__key=value``."""
    content = resolved_content(recipe)
    for key, value in settings.items():
        table, _, name = key.partition("__")
        content[table][name] = value
    return Recipe.model_validate(content)


def paused(recipe: Recipe, epochs: int = 2) -> Run:
    return fit(recipe, until=epochs, quiet=True)


def resumed(run: Run, recipe: Recipe | None = None, **arguments: Any) -> Run:
    return fit(recipe or run.recipe, resume=run.path, quiet=True, **arguments)


def checkpoint_names(run: Run) -> list[str]:
    return sorted(path.stem for path in run.checkpoints.glob("0*.json"))


def content(run: Run) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != "log.txt"}


def image_bytes(recipe: Recipe, names: list[str]) -> set[bytes]:
    return {Path(recipe.data.root, name).read_bytes() for name in names}


# -- data -------------------------------------------------------------------------------------------------------------


def add(data: Path) -> None:
    for number in range(3):
        path = data / "c0" / f"{number:02d}-new.bmp"
        shutil.copy(data / "c1" / f"{number:02d}.bmp", path)
        flip(path)


def remove(data: Path) -> None:
    for number in range(3):
        (data / "c2" / f"{number:02d}.bmp").unlink()


def relabel(data: Path) -> None:
    for number in range(4):
        (data / "c0" / f"{number:02d}.bmp").rename(data / "c3" / f"1{number:02d}.bmp")


def relabel_under_the_same_name(data: Path) -> None:
    for number in (13, 14):
        (data / "c1" / f"{number}.bmp").unlink()
        (data / "c0" / f"{number}.bmp").rename(data / "c1" / f"{number}.bmp")


def swap(data: Path) -> None:
    """Swap two images of different classes; both file names stay."""
    (data / "c0" / "03.bmp").rename(data / "aside")
    (data / "c1" / "03.bmp").rename(data / "c0" / "03.bmp")
    (data / "aside").rename(data / "c1" / "03.bmp")


def rename_class(data: Path) -> None:
    (data / "c3").rename(data / "c4")


def replace_one(data: Path) -> None:
    path = data / "c2" / "07.bmp"
    path.write_bytes(path.read_bytes() + b"\0\0\0")
    os.utime(path, ns=(0, 10**18))


def replace_one_of_equal_size(data: Path) -> None:
    flip(data / "c2" / "07.bmp")


def copy_and_replace(data: Path) -> None:
    """Change all file times, as copying does, and replace a whole class with other images of the same sizes."""
    for path in data.rglob("*.bmp"):
        os.utime(path)
    for path in data.glob("c0/*.bmp"):
        flip(path)


CHANGES = {
    add: "3 image(s) added: c0/00-new.bmp, c0/01-new.bmp, c0/02-new.bmp",
    remove: "3 image(s) removed: c2/0",
    relabel: "4 image(s) moved: c0/00.bmp -> c3/100.bmp, c0/01.bmp -> c3/101.bmp, c0/02.bmp -> c3/102.bmp and 1 more",
    relabel_under_the_same_name: "2 image(s) moved: c0/13.bmp -> c1/13.bmp, c0/14.bmp -> c1/14.bmp",
    swap: "2 image(s) moved: c1/03.bmp -> c0/03.bmp, c0/03.bmp -> c1/03.bmp",
    rename_class: "1 class(es) gone: c3; 1 new class(es): c4; 15 image(s) moved: c3/00.bmp -> c4/00.bmp",
    replace_one: "1 file(s) replaced: c2/07.bmp",
    replace_one_of_equal_size: "1 file(s) replaced: c2/07.bmp",
    copy_and_replace: "file(s) replaced: c0/0",
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_on_changed_data_is_refused_with_the_differences_and_writes_nothing(
    recipe: Recipe, change: Callable[[Path], None]
) -> None:
    run = paused(recipe)
    before = content(run)
    change(Path(recipe.data.root))
    with pytest.raises(UserError, match=r"the data of .* have changed since it was trained: ") as refused:
        resumed(run)
    assert CHANGES[change] in str(refused.value)
    assert "--allow-changes" in str(refused.value)
    assert content(run) == before


def test_resuming_on_unchanged_or_copied_data_is_bit_identical(recipe: Recipe) -> None:
    plain = outcome(fit(recipe, quiet=True))
    run = paused(recipe)
    assert outcome(resumed(run)) == plain
    run = paused(recipe)
    for path in Path(recipe.data.root).rglob("*.bmp"):
        os.utime(path)  # as in a copy on another disk
    assert outcome(resumed(run)) == plain
    assert not list(run.path.glob("split-*.json"))


@pytest.mark.parametrize("change", [c for c in CHANGES if c is not copy_and_replace])
def test_with_allowed_changes_trained_images_stay_out_of_validation_and_test(
    recipe: Recipe, change: Callable[[Path], None]
) -> None:
    run = paused(recipe)
    before = run.split
    trained, aside = image_bytes(recipe, before["train"]), image_bytes(recipe, before["validation"] + before["test"])
    change(Path(recipe.data.root))
    resumed(run, until=3, allow_changes=True)
    now = run.split
    assert not trained & image_bytes(recipe, now["validation"] + now["test"])
    assert json.loads((run.path / "split-1.json").read_text()) == before
    there = image_bytes(recipe, [name for split in SPLITS for name in now[split]])
    if change not in (swap, relabel_under_the_same_name):  # in that case name and content belong to different splits
        assert there & aside <= image_bytes(recipe, now["validation"] + now["test"]), (
            "untrained images keep their split"
        )
    split = (run.path / "split.json").read_bytes()
    resumed(run)  # from now on these are the run's data
    assert (run.path / "split.json").read_bytes() == split
    assert run.is_finished
    assert len(run.prediction_records()) == len(now["test"])
    assert [path.name for path in run.path.glob("split-*.json")] == ["split-1.json"]


def test_trained_images_that_return_after_deletion_do_not_enter_test(recipe: Recipe) -> None:
    run = paused(recipe, 1)
    trained = run.split["train"]
    data, aside = Path(recipe.data.root), Path(recipe.data.root).parent / "aside"
    aside.mkdir()
    gone = [name for name in trained if name.startswith("c1/")][:6]
    for name in gone:
        (data / name).rename(aside / Path(name).name)
    resumed(run, until=2, allow_changes=True)
    assert not set(gone) & set(run.split["train"])
    for name in gone:
        (aside / Path(name).name).rename(data / name)
    resumed(run, until=3, allow_changes=True)
    assert set(trained) <= set(run.split["train"])
    assert sorted(path.name for path in run.path.glob("split-*.json")) == ["split-1.json", "split-2.json"]


def test_resuming_ignores_an_edited_split_file(recipe: Recipe) -> None:
    """The checkpoint's hash shows that the data are unchanged, so the split file is rewritten."""
    plain = fit(recipe, quiet=True)
    run = paused(recipe)
    split = run.split
    split["test"].append(split["train"].pop())
    run.write_json("split.json", split)
    assert outcome(resumed(run)) == outcome(plain)
    assert run.split == plain.split


def test_a_changed_class_order_is_refused_even_if_changes_are_allowed(recipe: Recipe) -> None:
    run = paused(recipe)
    (Path(recipe.data.root) / "c0").rename(Path(recipe.data.root) / "d")
    with pytest.raises(UserError, match="the model's 4 outputs are the classes in the order of their names"):
        resumed(run, allow_changes=True)


def test_changing_the_split_in_the_recipe_keeps_trained_images_out_too(recipe: Recipe) -> None:
    run = paused(recipe)
    trained = set(run.split["train"])
    other = {**resolved_content(recipe)["data"]["split"], "seed": 5, "test": 0.4}
    resumed(run, changed(recipe, data__split=other), allow_changes=True)
    assert not trained & {*run.split["validation"], *run.split["test"]}
    assert run.is_finished


def test_changed_data_are_refused_if_the_trained_images_are_unknown(recipe: Recipe) -> None:
    run = paused(recipe)
    remove(Path(recipe.data.root))
    (run.path / "split.json").write_text("{}")
    with pytest.raises(UserError, match=r"split\.json, which lists the training images, is missing or damaged"):
        resumed(run, allow_changes=True)


def kill_in_epoch_2(rank: int) -> None:
    at_call(TrainStep, "_update", STEPS + 2, kill_self)


def test_two_processes_refuse_changed_data_together(tmp_path: Path, recipe: Recipe) -> None:
    arguments, folder = (tmp_path / "recipe.toml", "--resume", "auto"), tmp_path / "two"
    trainers = Trainers(2, folder, *arguments, prepare=kill_in_epoch_2)
    trainers.wait_until_first_ends()
    trainers.signal(signal.SIGKILL)
    trainers.wait()
    add(Path(recipe.data.root))
    refused = Trainers(2, folder, *arguments)
    assert refused.wait() == [2, 2], refused.text()
    assert refused.text().count("3 image(s) added") == 1
    allowed = Trainers(2, folder, *arguments, "--allow-changes")
    assert allowed.wait() == [0, 0], allowed.text()
    run = only_run(tmp_path)
    before = json.loads((run.path / "split-1.json").read_text())
    assert not image_bytes(recipe, before["train"]) & image_bytes(recipe, run.split["validation"] + run.split["test"])


# -- the recipe -------------------------------------------------------------------------------------------------------


def edit(run: Run, *replacements: tuple[str, str]) -> None:
    path = run.path / "recipe.toml"
    text = path.read_text()
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)


def newest(run: Run) -> Path:
    path = find_latest(run.checkpoints, pytest.fail)
    assert path is not None
    return path


def rewrite_checkpoint(run: Run, change: Callable[[dict[str, Any]], None]) -> None:
    """Replace the content of the newest checkpoint."""
    path = newest(run)
    checkpoint = load_checkpoint(path)
    change(checkpoint)
    place = checkpoint_step(path)
    assert place is not None
    save_checkpoint(run.checkpoints, place, checkpoint, keep=1)


def test_a_recipe_edited_inside_the_run_is_refused_with_its_differences(recipe: Recipe) -> None:
    run = paused(recipe)
    edit(run, ("lr = 0.05", "lr = 0.01"), ("epochs = 4", "epochs = 3"))
    before = content(run)
    refused = toolkit("train", "--resume", run.path)
    assert refused.status == 2
    message = refused.stderr.splitlines()[-1]
    assert "was written with another recipe (optimizer.lr: 0.05 -> 0.01; train.epochs: 4 -> 3)" in message
    assert "--allow-changes" in message
    assert content(run) == before
    resumed(run, until=2, allow_changes=True)
    resumed(run)  # the checkpoint now has the edited recipe
    assert [(record["epoch"], record["lr"]) for record in run.epoch_records()] == [(1, 0.05), (2, 0.05), (3, 0.01)]


def test_with_allowed_changes_fewer_epochs_than_trained_end_the_run(recipe: Recipe) -> None:
    last = changed(recipe, train__best_metric="last")
    run = paused(last, 3)
    resumed(run, changed(last, train__epochs=2), allow_changes=True)
    assert run.summary["best"]["epoch"] == run.summary["epochs_run"] == 3


def test_a_run_can_be_resumed_without_validation_and_test(recipe: Recipe) -> None:
    """The resumed run trains on all images."""
    run = paused(recipe)
    none = {**resolved_content(recipe)["data"]["split"], "validation": 0, "test": 0}
    resumed(run, changed(recipe, data__split=none, train__best_metric="last"), allow_changes=True)
    assert len(run.split["train"]) == CLASSES * EACH
    assert run.summary["best"]["epoch"] == 4


def test_an_edit_that_does_not_change_the_experiment_is_accepted(recipe: Recipe) -> None:
    run = paused(recipe)
    edit(run, ("keep = 2", "keep = 1"))
    assert resumed(run).is_finished
    assert len(checkpoint_names(run)) == 1


def test_a_checkpoint_of_another_run_is_refused(recipe: Recipe) -> None:
    run, other = paused(recipe), paused(changed(recipe, recipe__seed=7), 3)
    for path in other.checkpoints.glob("*"):
        shutil.copy(path, run.checkpoints)
    with pytest.raises(UserError, match=r"was written with another recipe \(recipe.seed: 0 -> 7\)|: 7 -> 0\)"):
        resumed(run)


def test_a_recipe_key_added_by_a_later_version_is_not_a_difference(recipe: Recipe) -> None:
    plain = outcome(fit(recipe, quiet=True))

    def without_key(checkpoint: dict[str, Any]) -> None:
        stored = json.loads(checkpoint["recipe"])
        del stored["train"]["drop_last"]
        checkpoint.update(recipe=json.dumps(stored), recipe_hash="0" * 64)

    run = paused(recipe)
    rewrite_checkpoint(run, without_key)
    assert outcome(resumed(run)) == plain


def of_an_earlier_version(run: Run) -> None:
    """Reduce the checkpoint's recipe to a hash that lacks a key of a later version."""
    stored = resolved_content(run.recipe)
    del stored["train"]["drop_last"]
    (run.path / "recipe.toml").write_text(toml_document(stored))

    def strip(checkpoint: dict[str, Any]) -> None:
        for key in ("recipe", "drawn", "classes", "best_weights"):
            del checkpoint[key]
        checkpoint["recipe_hash"] = content_hash(stored)

    rewrite_checkpoint(run, strip)
    (run.checkpoints / "files.safetensors").unlink()
    assert content_hash(stored) != recipe_hash(run.recipe)


def test_a_run_of_an_earlier_version_resumes_unless_its_recipe_was_edited(recipe: Recipe) -> None:
    plain = outcome(fit(recipe, quiet=True))
    run = paused(recipe)
    of_an_earlier_version(run)
    text = (run.path / "recipe.toml").read_text()
    edit(run, ("lr = 0.05", "lr = 0.01"))
    with pytest.raises(UserError, match="only the hash of its recipe was stored"):
        resumed(run)
    (run.path / "recipe.toml").write_text(text)
    resumed(run, until=2)
    assert (run.path / "recipe.toml").read_text() == text, "a kill before the next checkpoint does not lose the hash"
    assert outcome(resumed(run)) == plain


def test_resuming_adamw_with_gradual_unfreezing_is_bit_identical(recipe: Recipe) -> None:
    """The choice of PyTorch's fused kernel must not depend on which layers were trainable when the run stopped."""
    blocks = [{"channels": 4, "pool": 2}, {"channels": 6, "pool": 2}]
    recipe = changed(recipe, data__channels=3, model__convnet={"blocks": blocks})
    weights = fit(recipe, quiet=True).best_weights
    recipe = changed(
        recipe,
        model__weights=f"file:{weights}",
        transfer__mode="gradual",
        transfer__unfreeze_at=[2, 3],
        optimizer__name="adamw",
        optimizer__momentum=None,
    )
    assert outcome(resumed(paused(recipe))) == outcome(fit(recipe, quiet=True))


@pytest.mark.extended
@pytest.mark.parametrize("key", ["augment__repeats", "augment__alternating_flip"])
def test_resuming_with_repeated_or_alternating_augmentation_is_bit_identical(recipe: Recipe, key: str) -> None:
    recipe = changed(recipe, **{key: 2 if key == "augment__repeats" else True})
    assert outcome(resumed(paused(recipe, epochs=1))) == outcome(fit(recipe, quiet=True))


def test_unkeyed_random_numbers_are_a_warning_and_repeat_on_the_same_number_of_processes(recipe: Recipe) -> None:
    """timm's DropBlock uses the global random generator."""
    model = {"source": "timm", "name": "test_resnet", "args": {"drop_block_rate": 0.5}}
    recipe = Recipe.model_validate({**resolved_content(changed(recipe, data__image_size=32)), "model": model})
    run = resumed(paused(recipe))
    assert outcome(run) == outcome(fit(recipe, quiet=True))
    assert (
        "warning: test_resnet draws random numbers that do not depend on the example alone"
        in (run.path / "log.txt").read_text()
    )


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "fault"), [
    (Path.unlink, "missing"), (lambda path: os.truncate(path, 99), "99 of"),
    (lambda path: path.write_text(path.read_text().replace('"lr": 0.05', '"lr": 0.06', 1)), "its checksum differs"),
])  # fmt: skip
def test_lost_or_edited_lines_of_metrics_are_refused(
    recipe: Recipe, damage: Callable[[Path], None], fault: str
) -> None:
    plain = outcome(fit(recipe, quiet=True))
    run = paused(recipe)
    damage(run.metrics_file)
    before = content(run)
    with pytest.raises(UserError, match=rf"metrics\.jsonl is damaged \({fault}.*--allow-changes"):
        resumed(run)
    assert content(run) == before
    found = outcome(resumed(run, allow_changes=True))
    assert (found["weights"], found["predictions"]) == (plain["weights"], plain["predictions"])
    assert [record["epoch"] for record in run.epoch_records()][-2:] == [3, 4]
    assert f"warning: metrics.jsonl is damaged ({fault}" in run.log_file.read_text()


def test_lines_after_the_checkpoint_are_not_damage(recipe: Recipe) -> None:
    plain = outcome(fit(recipe, quiet=True))
    run = paused(recipe)
    with run.metrics_file.open("a") as file:
        file.write('{"epoch": 3, "train/lo')
    assert outcome(resumed(run)) == plain


# -- the best weights -------------------------------------------------------------------------------------------------


def flip_weights(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def best_file(run: Run) -> Path:
    return run.checkpoints / f"best-{run.epoch_records()[-1]['epoch']:04d}.safetensors"


def improving(recipe: Recipe) -> Recipe:
    """Return a recipe whose best metric, the validation loss, improves in every epoch; assert that it does."""
    better = changed(recipe, train__best_metric="val/loss", optimizer__lr=0.02)
    losses = [record["val/loss"] for record in fit(better, quiet=True).epoch_records()]
    assert losses == sorted(losses, reverse=True)
    return better


@pytest.mark.parametrize("damage", [flip_weights, Path.unlink, lambda path: os.truncate(path, 99)])
def test_damaged_best_weights_are_detected_and_the_previous_checkpoint_is_used(
    recipe: Recipe, damage: Callable[[Path], None]
) -> None:
    recipe = improving(recipe)
    plain = outcome(fit(recipe, quiet=True))
    run = paused(recipe)
    damage(best_file(run))
    assert outcome(resumed(run)) == plain
    log = run.log_file.read_text()
    assert "checkpoint 0002-000000 is skipped, because best-0002.safetensors is " in log
    assert "resuming after epoch 1, step 0" in log


def test_if_all_checkpoints_need_lost_weights_training_does_not_restart_unasked(recipe: Recipe) -> None:
    recipe = improving(recipe)
    run = paused(changed(recipe, checkpoint__keep=1))
    path = best_file(run)
    lost = path.read_bytes()
    flip_weights(path)
    before = content(run)
    with pytest.raises(
        UserError, match=r"best-0002.safetensors is lost \(its checksum differs\), and every remaining checkpoint"
    ):
        resumed(run)
    assert content(run) == before
    resumed(run, until=2, allow_changes=True)
    assert path.read_bytes() == lost, "the best weights are those of the last epoch, which the checkpoint contains"
    assert resumed(run).summary["best"]["epoch"] == 4


def test_best_weights_missing_at_the_end_are_one_message_and_the_run_can_be_resumed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = improving(recipe)
    plain = outcome(fit(recipe, quiet=True))
    finish_writing = Trainer.finish_writing

    def then_lose_it(training: Trainer) -> None:
        finish_writing(training)
        assert training.run is not None
        best_file(training.run).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish_writing", then_lose_it)
        with pytest.raises(RunFailed, match=r"best-0004.safetensors is damaged \(missing\)") as failed:
            fit(recipe, quiet=True)
    run = Run(Path(re.findall(r"--resume (\S+)\. ", str(failed.value))[0]))
    assert not run.best_weights.exists()
    assert outcome(resumed(run)) == plain


@pytest.mark.parametrize("command", [
    ("predict", "RUN", "IMAGE"), ("evaluate", "RUN"), ("export", "RUN", "--format", "safetensors", "--out", "OUT"),
    ("publish", "RUN", "lab/small", "--no-push"),
])  # fmt: skip
def test_every_command_detects_a_flipped_bit_in_a_finished_runs_weights(
    recipe: Recipe, tmp_path: Path, command: tuple[str, ...]
) -> None:
    run = fit(recipe, quiet=True)
    there = {
        "RUN": str(run.path),
        "IMAGE": str(next(Path(recipe.data.root).rglob("*.bmp"))),
        "OUT": str(tmp_path / "o"),
    }
    arguments = [there.get(argument, argument) for argument in command]
    whole = run.best_weights.read_bytes()
    flip_weights(run.best_weights)
    outcome = toolkit(*arguments)
    assert outcome.status == 2
    assert "best.safetensors is damaged: its checksum differs" in outcome.stderr
    run.best_weights.write_bytes(whole)
    assert toolkit(*arguments).status == 0


def use(run: Run, folder: Path) -> dict[str, Any]:
    """Run every command that needs a finished run's model; return the outcomes."""
    image = next(Path(run.recipe.data.root).rglob("*.bmp"))
    return {
        "predict": toolkit("predict", run.path, image),
        "evaluate": toolkit("evaluate", run.path),
        "export": toolkit("export", run.path, "--format", "safetensors", "--out", folder / "exported"),
        "publish": toolkit("publish", run.path, "lab/small", "--no-push", "--out", folder / "published"),
    }


def test_every_command_refuses_best_weights_or_classes_of_another_run(recipe: Recipe, tmp_path: Path) -> None:
    run, other = fit(recipe, quiet=True), fit(changed(recipe, recipe__seed=7), quiet=True)
    whole = run.best_weights.read_bytes()
    shutil.copy(other.best_weights, run.best_weights)
    for name, found in use(run, tmp_path).items():
        assert found.status == 2, name
        assert "best.safetensors is not the file that this run ended with" in found.stderr
    run.best_weights.unlink()  # it is a hard link to the best epoch's file
    run.best_weights.write_bytes(whole)
    card = run.model_card
    run.write_json("checkpoints/model.json", {**card, "classes": card["classes"][::-1]})
    for name, found in use(run, tmp_path).items():
        assert found.status == 2, name
        assert "the classes in model.json, or their order, differ" in found.stderr
    run.write_json("checkpoints/model.json", card)
    assert {found.status for found in use(run, tmp_path).values()} == {0}


def test_a_recipe_that_was_edited_after_the_end_is_not_published(recipe: Recipe, tmp_path: Path) -> None:
    run = fit(recipe, quiet=True)
    edit(run, ('description = ""', 'description = "mine"'))
    assert {found.status for found in use(run, tmp_path / "1").values()} == {0}
    edit(run, ("lr = 0.05", "lr = 0.01"))
    found = use(run, tmp_path / "2")
    for name in ("publish", "evaluate"):
        assert found[name].status == 2
        assert (
            "recipe.toml is not the recipe that this run was trained with (optimizer.lr: 0.05 -> 0.01)"
            in found[name].stderr
        )
    assert not (tmp_path / "2/published").exists()
    for path in run.checkpoints.glob("0*"):  # without a checkpoint there is nothing to compare with
        path.unlink()
    assert {each.status for each in use(run, tmp_path / "3").values()} == {0}


@pytest.mark.parametrize("bit", [0, 5])
def test_any_flipped_bit_of_weights_is_detected_or_harmless(tmp_path: Path, bit: int) -> None:
    state = {"a": torch.arange(4.0), "b": torch.tensor(3), "c": torch.ones(2, 2, dtype=torch.bfloat16)}
    path = tmp_path / "w.safetensors"
    whole = pack_state(state, epoch=3)
    harmless = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
        with contextlib.suppress(UserError):
            found = load_weights(path)
            harmless += 1
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], value) for name, value in state.items())
    assert harmless < 40, "only bits in the metadata keys of the digest and the epoch"


def test_exported_and_initial_weights_are_checked_too(recipe: Recipe, tmp_path: Path) -> None:
    run, exported = fit(recipe, quiet=True), tmp_path / "exported"
    assert toolkit("export", run.path, "--format", "safetensors", "--out", exported).status == 0
    flip_weights(exported / "model.safetensors")
    image = next(Path(recipe.data.root).rglob("*.bmp"))
    assert "is damaged: its checksum differs" in toolkit("predict", exported, image).stderr
    with pytest.raises(UserError, match="is damaged: its checksum differs"):
        fit(changed(recipe, model__weights=f"file:{exported / 'model.safetensors'}"), quiet=True)


# -- values that are not finite ---------------------------------------------------------------------------------------


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    good = {"a": torch.ones(3), "b": torch.tensor(2.0), "none": torch.empty(0), "count": torch.tensor(7),
            "largest": torch.full((2,), torch.finfo(torch.float32).max), "half": torch.ones(2).bfloat16()}  # fmt: skip
    assert first_not_finite(good) is None
    for name, bad in itertools.product(("a", "b", "half", "largest"), (float("inf"), float("-inf"), float("nan"))):
        tensors = {key: value.clone() for key, value in good.items()}
        tensors[name].view(-1)[-1] = bad
        assert first_not_finite(tensors) == name


def exploding(recipe: Recipe, **settings: Any) -> Recipe:
    """Set a learning rate so that after one step weights near 1e24 are finite and the next loss is not."""
    return changed(recipe, optimizer__lr=1e25, checkpoint__every_steps=1, train__log_every=1, **settings)


def without_batch_norm(recipe: Recipe) -> Recipe:
    return changed(recipe, model__convnet={"blocks": [{"channels": 4, "pool": 2}]})


def test_a_checkpoint_followed_by_a_non_finite_loss_is_not_marked_good(recipe: Recipe) -> None:
    with pytest.raises(RunFailed, match=r"not finite at epoch 1, step 2 of 4.*; there is no checkpoint to resume from"):
        fit(exploding(without_batch_norm(recipe)), quiet=True)
    (run,) = runs_of(recipe.recipe.run_root, "small")
    assert checkpoint_names(run) == ["0000-000001"]
    assert find_latest(run.checkpoints, lambda _: None) is None
    assert torch.isfinite(load_checkpoint(next(run.checkpoints.glob("*.pt")))["model"]["head.weight"]).all()


@pytest.mark.parametrize("keep", [1, 2])
def test_resuming_from_the_last_good_checkpoint_is_bit_identical(recipe: Recipe, keep: int) -> None:
    recipe = changed(without_batch_norm(recipe), checkpoint__keep=keep, checkpoint__every_steps=1, train__log_every=1)
    plain = outcome(fit(recipe, quiet=True))
    run = paused(recipe, 1)
    with pytest.raises(RunFailed, match=r"epoch 2, step 2 of 4.*; the checkpoint of the end of epoch 1 is kept"):
        resumed(run, exploding(recipe), allow_changes=True)
    path = newest_good(run)
    assert path.name.startswith("0001-000000-")
    model = load_checkpoint(path)["model"]
    assert max(value.abs().max() for value in model.values()) < 100
    assert outcome(resumed(run, recipe, allow_changes=True)) == plain


def newest_good(run: Run) -> Path:
    path = find_latest(run.checkpoints, lambda _: None)
    assert path is not None
    return path


@pytest.mark.parametrize(("kind", "name"), [("optimizer", "exp_avg_sq of "), ("weights", "head.weight")])
def test_a_state_that_is_not_finite_is_not_checkpointed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    """The state becomes non-finite in epoch 2 while all losses are still finite."""
    recipe = changed(recipe, optimizer__name="adamw", optimizer__momentum=None, checkpoint__every_steps=2)
    update, count = TrainStep._update, itertools.count(1)

    def spoil(trainer: TrainStep, number: int) -> None:
        update(trainer, number)
        if next(count) == STEPS + 2:
            parameter = dict(trainer.network.named_parameters())["head.weight"]
            state = trainer.optimizer.state[parameter]
            (state["exp_avg_sq"] if kind == "optimizer" else parameter.data).view(-1)[0] = float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "_update", spoil)
        with pytest.raises(RunFailed, match="the checkpoint of the end of epoch 1 is kept") as failed:
            fit(recipe, quiet=True)
    assert f"{name}" in str(failed.value)
    assert "is not finite after epoch 2, step 2, so no checkpoint is written" in str(failed.value)
    (run,) = runs_of(recipe.recipe.run_root, "small")
    assert newest(run).name.startswith("0001-000000-")
    assert outcome(resumed(run)) == outcome(fit(recipe, quiet=True))


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "kept"), [
    (1, "there is no checkpoint to resume from"), (STEPS + 1, "the checkpoint of the end of epoch 1 is kept"),
])  # fmt: skip
def test_stopping_with_a_full_disk_names_the_last_checkpoint(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, first: int, kept: str
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def stop() -> None:
        monkeypatch.setattr(checkpoint_module, "write_atomically", full)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainStep, "_update", TrainStep._update)  # undone at the end
    at_call(TrainStep, "_update", first, stop, after=True)
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM without a new checkpoint; {kept}; resume with"):
        fit(recipe, quiet=True)


# -- the clock --------------------------------------------------------------------------------------------------------


def test_the_process_start_time_is_on_the_monotonic_clock() -> None:
    age = time.monotonic() - process_start()
    assert age == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)  # psutil has whole seconds


def test_a_clock_set_back_changes_no_duration(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    began, clock = process_start(), itertools.count(time.time(), -1000.0)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    run = fit(recipe, quiet=True, began=began)
    age = time.monotonic() - began
    assert 0 < run.summary["startup_seconds"] < age
    assert 0 < run.summary["seconds"] < age
    assert run.summary["images_per_s"] > 0
    durations = re.findall(
        r"ready for the first step after (\S+) s, including (\S+) s of imports", run.log_file.read_text()
    )
    assert [float(value) >= 0 for value in durations[0]] == [True, True]
