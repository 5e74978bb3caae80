"""Checkpoints: damage, code and an edited recipe are detected, and another number of processes can resume."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exact import assert_same_experiment
from trainers import (
    EMA,
    STATEFUL,
    Trainers,
    at_call,
    kill_self,
    only_run,
    outcome,
    uninterrupted,
    uninterrupted_run,
    write_recipe,
)

from toolkit.errors import UserError
from toolkit.models.build import build_model
from toolkit.training.checkpoint import (
    find_latest,
    link_best,
    load_checkpoint,
    load_weights,
    save_best,
    save_checkpoint,
)
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long


def saved(folder: Path, *positions: tuple[int, int], keep: int = 9) -> list[Path]:
    return [save_checkpoint(folder, position, {"value": torch.tensor(position)}, keep) for position in positions]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_manifest(path: Path) -> None:
    path.with_name(path.name[:11] + ".json").unlink()


def empty_manifest(path: Path) -> None:
    path.with_name(path.name[:11] + ".json").write_text("")


def half_written(path: Path) -> None:
    lose_manifest(path)
    path.rename(path.with_name(f".{path.name}.123.tmp"))


DAMAGES = [truncate, flip, Path.unlink, lose_manifest, empty_manifest, half_written]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    first, second = saved(tmp_path, (1, 0), (1, 3))
    damage(second)
    messages: list[str] = []
    assert find_latest(tmp_path, messages.append) == first
    (line,) = messages
    assert line.startswith("checkpoint 0001-000003 is damaged (")
    assert load_checkpoint(first)["value"].tolist() == [1, 0]


@pytest.mark.parametrize("bits", range(8))
def test_any_flipped_bit_is_detected(tmp_path: Path, bits: int) -> None:
    (path,) = saved(tmp_path, (1, 0))
    data = path.read_bytes()
    for position in range(bits, len(data), 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bits]) + data[position + 1 :])
        assert find_latest(tmp_path, lambda _: None) is None
    path.write_bytes(data)
    assert find_latest(tmp_path, lambda _: None) == path


def test_without_an_undamaged_checkpoint_the_run_starts_over(tmp_path: Path) -> None:
    messages: list[str] = []
    assert find_latest(tmp_path, messages.append) is None
    assert messages == []
    for path in saved(tmp_path, (1, 0), (2, 0)):
        truncate(path)
    assert find_latest(tmp_path, messages.append) is None
    assert len(messages) == 3
    assert "the run starts over" in messages[-1]


def test_the_last_checkpoints_are_kept_with_the_best_weights_that_they_name(tmp_path: Path) -> None:
    for epoch in range(1, 6):
        best = 2 if epoch < 5 else 5
        if best == epoch:
            save_best(tmp_path, epoch, {"w": torch.tensor([float(epoch)])})
        save_checkpoint(tmp_path, (epoch, 0), {"best_epoch": best if epoch > 1 else None}, keep=2)
        assert len(list(tmp_path.glob("*.pt"))) == len(list(tmp_path.glob("0*.json"))) == min(epoch, 2)
    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-0002.safetensors", "best-0005.safetensors"]
    link_best(tmp_path, 5)
    assert load_weights(tmp_path / "best.safetensors")["w"].item() == 5


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_written_after_falling_back_count_as_the_last(tmp_path: Path, keep: int) -> None:
    _, *damaged = saved(tmp_path, (3, 0), (4, 0), (5, 0))
    for path in damaged:
        flip(path)
    for step in (1, 2):
        (new,) = saved(tmp_path, (3, step), keep=keep)
        assert find_latest(tmp_path, pytest.fail) == new


def test_rewriting_a_checkpoint_of_the_same_step_always_leaves_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stopped twice in one evaluation rewrites its checkpoint; if killed then, the first one must remain."""
    first = save_checkpoint(tmp_path, (1, 0), {"value": 1}, keep=1)
    replace = os.replace

    def killed_before_the_manifest(source: Path, target: Path) -> None:
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_before_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, (1, 0), {"value": 2}, keep=1)
    assert find_latest(tmp_path, pytest.fail) == first
    monkeypatch.undo()
    second = save_checkpoint(tmp_path, (1, 0), {"value": 3}, keep=1)
    assert find_latest(tmp_path, pytest.fail) == second
    assert len(list(tmp_path.glob("*.pt"))) == 1, "files that no manifest names are removed"


class Bomb:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_contains_code_is_refused_without_running_it(tmp_path: Path) -> None:
    bomb = {"format": 2, "model": Bomb(tmp_path / "exploded")}
    torch.save(bomb, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(bomb, protocol=2))
    for name in ("torch.pt", "plain.pt"):
        with pytest.raises(UserError, match="more than tensors and plain values"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


# -- whole runs -------------------------------------------------------------------------------------------------------


def killed_run(folder: Path, world: int, count: int, *settings: str) -> Path:
    """Kill a run after ``count`` steps, seven per epoch; return its recipe."""
    recipe = write_recipe(folder, STATEFUL)

    def prepare(rank: int) -> None:
        at_call(TrainStep, "_update", count, kill_self)

    Trainers(world, folder, recipe, *settings, prepare=prepare).wait()
    return recipe


def resume_run(folder: Path, world: int, *arguments: object) -> tuple[list[int], str]:
    trainers = Trainers(world, folder, *arguments)
    return trainers.wait(), trainers.text()


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one_or_starts_over(tmp_path: Path) -> None:
    plain = uninterrupted(1, STATEFUL, *EMA)
    for damaged, line in ((1, "is damaged (its checksum differs)"), (2, "the run starts over")):
        folder = tmp_path / str(damaged)
        killed_run(folder, 1, 14, *EMA)
        files = sorted(only_run(folder).checkpoints.glob("*.pt"))
        assert len(files) == 2
        for path in files[-damaged:]:
            flip(path)
        statuses, text = resume_run(folder, 1, "--resume", only_run(folder).path)
        assert statuses == [0], text
        assert line in text
        assert outcome(only_run(folder)) == plain


def test_an_edited_recipe_is_refused_with_its_differences_unless_allowed(tmp_path: Path) -> None:
    recipe = killed_run(tmp_path, 1, 14, *EMA)
    edited = ("--set", "optimizer.lr=0.01", "--set", "train.epochs=4")
    for resume in ("auto", only_run(tmp_path).path):
        statuses, text = resume_run(tmp_path, 1, recipe, *EMA, *edited, "--resume", resume)
        assert statuses == [2]
        assert "optimizer.lr: 0.05 -> 0.01" in text
        assert "train.epochs: 5 -> 4" in text
        assert "--allow-changes" in text
    statuses, text = resume_run(tmp_path, 1, recipe, *EMA, *edited, "--resume", "auto", "--allow-changes")
    assert statuses == [0], text
    assert [record["epoch"] for record in only_run(tmp_path).epoch_records()] == [1, 2, 3, 4]
    assert only_run(tmp_path).recipe.optimizer.lr == 0.01


@pytest.mark.parametrize(
    ("setting", "status", "message"),
    [
        ('optimizer.name="nag"', 2, "its state does not fit 'nag'"),
        ("model.head.hidden=[13]", 2, "the checkpoint's model does not match the recipe"),
        ("train.batch_size=20", 0, "the batches have changed: epoch 3 starts over"),
    ],
)
def test_allowed_changes_that_do_not_fit_the_checkpoint_are_reported(
    tmp_path: Path, setting: str, status: int, message: str
) -> None:
    recipe = killed_run(tmp_path, 1, 19, *EMA)
    statuses, text = resume_run(tmp_path, 1, recipe, *EMA, "--set", setting, "--resume", "auto", "--allow-changes")
    assert statuses == [status], text
    assert message in text


def test_resuming_a_finished_or_missing_run_is_refused(tmp_path: Path) -> None:
    finished, recipe = uninterrupted_run(1, STATEFUL, *EMA), write_recipe(tmp_path, STATEFUL)
    assert "is finished" in resume_run(tmp_path, 1, "--resume", finished.path)[1]
    assert "no-such" in resume_run(tmp_path, 1, recipe, "--resume", tmp_path / "no-such")[1]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_another_number_of_processes_resumes_exactly_from_the_end_of_an_epoch(
    tmp_path: Path, before: int, after: int
) -> None:
    settings = (*EMA, "--set", "checkpoint.every_steps=0", "--set", "train.batch_size=18")
    plain = uninterrupted_run(1, STATEFUL, *settings)
    killed_run(tmp_path / "killed", before, 16, *settings)
    statuses, text = resume_run(tmp_path / "killed", after, "--resume", only_run(tmp_path / "killed").path)
    assert statuses == [0] * after, text
    assert "resuming after epoch 2, step 0" in text
    assert_same_experiment(parts_of(plain), parts_of(only_run(tmp_path / "killed")))
    assert plain.summary["best"]["epoch"] == only_run(tmp_path / "killed").summary["best"]["epoch"]


def compile_without_a_compiler(rank: int) -> None:
    """Let Dynamo run its graphs uncompiled, and print that it was used."""
    original = torch.nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        print("a graph was compiled", flush=True)
        return graph.forward

    torch.nn.Module.compile = lambda module, **_: original(module, backend=backend)  # type: ignore[method-assign]


@pytest.mark.parametrize(("compiled", "world"), [(True, 1), pytest.param(True, 2, marks=pytest.mark.slow), (False, 2)])
def test_compiled_and_distributed_weights_have_the_names_of_plain_ones(
    tmp_path: Path, compiled: bool, world: int
) -> None:
    """Weights are always loaded into the bare module, so equal names make all combinations compatible."""
    settings = (*EMA, "--set", f"train.compile={str(compiled).lower()}", "--set", "train.epochs=2")
    recipe = write_recipe(tmp_path, STATEFUL)
    trainers = Trainers(world, tmp_path, recipe, *settings, prepare=compile_without_a_compiler)
    assert trainers.wait(250) == [0] * world, trainers.text()
    assert ("a graph was compiled" in trainers.text()) == compiled
    run = only_run(tmp_path)
    names = list(build_model(run.recipe.model, 10, 3, 8).module.state_dict())
    path = find_latest(run.checkpoints, print)
    assert path is not None
    assert sorted(load_weights(run.best_weights)) == sorted(names)
    assert list(load_checkpoint(path)["model"]) == names


def parts_of(run: Any) -> dict[str, Any]:
    """Return the parts of a run that test_exact compares."""
    weights = {name: tensor.numpy() for name, tensor in load_weights(run.best_weights).items()}
    return {
        "epochs": run.epoch_records(),
        "summary": run.summary,
        "predictions": run.prediction_records(),
        "weights": weights,
    }


def test_batch_norm_statistics_that_differ_between_processes_are_kept(tmp_path: Path) -> None:
    """Without synchronized batch norm, each process has its own statistics until an evaluation averages them."""
    settings = (*EMA, "--set", "train.sync_batch_norm=false")
    plain = uninterrupted(2, STATEFUL, *settings)
    killed_run(tmp_path / "killed", 2, 8, *settings)
    statuses, text = resume_run(tmp_path / "killed", 2, "--resume", only_run(tmp_path / "killed").path)
    assert statuses == [0, 0], text
    assert outcome(only_run(tmp_path / "killed")) == plain


def test_checkpoints_contain_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "5ec12e7" * 5 + "abcde"
    monkeypatch.setenv("HF_TOKEN", "hf_" + token)
    monkeypatch.setenv("WANDB_API_KEY", token)
    killed_run(tmp_path, 1, 10, *EMA, "--set", 'tracking.trackers=["wandb"]')
    files = [path for path in only_run(tmp_path).path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pt" for path in files)
    assert not [path for path in files if token.encode() in path.read_bytes()]
    assert json.loads(next(only_run(tmp_path).checkpoints.glob("0*.json")).read_text())["sha256"]


def test_weights_in_a_folder_whose_name_is_not_utf8_are_not_reported_as_damaged(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff")
    folder.mkdir()
    (folder / "best.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"best\.safetensors: .* rename the folder"):
        load_weights(folder / "best.safetensors")
