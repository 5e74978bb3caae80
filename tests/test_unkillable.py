"""Killed anywhere, a run goes on as if nothing had happened: the same bytes come out.

Every sitting but the last is ended by SIGKILL, on one process or all, at a moment drawn at random: after some optimiser
step, within an evaluation, before some rename or sync, with a checkpoint half written, or after some time.
"""

from __future__ import annotations

import functools
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from trainers import EMA, FROZEN, GRADUAL, MUCH, Trainers, after_seconds, at_call, kill_self, only_run, write_recipe

import toolkit.engine.checkpoint
import toolkit.engine.evaluate
import toolkit.engine.finish
from toolkit.engine.loop import Trainer
from toolkit.runs import Run

KINDS = ("step", "evaluation", "file", "half", "time")


def kill_at(kind: str, moment: float, rank: int) -> None:
    """Prepare this process to end at a moment in 0..1 of what a sitting may last."""
    match kind:
        case "step":
            at_call(Trainer, "_update", 1 + int(moment * 12), kill_self, after=True)
        case "evaluation":
            at_call(toolkit.engine.evaluate, "outcomes", 1 + int(moment * 8), kill_self)
        case "file":
            at_call(os, ["fsync", "replace"][int(moment * 100) % 2], 1 + int(moment * 25), kill_self)
        case "half":
            original, calls = toolkit.engine.checkpoint.write_atomically, [0]

            def write_half(path: Path, data: bytes) -> None:
                calls[0] += 1
                if calls[0] == 1 + int(moment * 8):
                    path.with_name(f".{path.name}.0.tmp").write_bytes(bytes(data)[: len(data) // 2])
                    kill_self()
                original(path, data)

            toolkit.engine.checkpoint.write_atomically = write_half  # type: ignore[assignment]
        case "time":
            at_call(Trainer, "train_epoch", 1, lambda: after_seconds(0.05 + moment * 0.25, kill_self))


def outcome(run: Run) -> dict[str, Any]:
    """All that must come out the same; what tells times is left out."""
    unlike = {"seconds", "images_per_s", "peak_memory_gib"}
    return {
        "weights": run.best_weights.read_bytes(),
        "metrics": run.metrics_file.read_bytes(),
        "predictions": (run.path / "predictions.csv").read_bytes(),
        "summary": {key: value for key, value in run.summary.items() if key not in unlike},
    }


def undisturbed(folder: Path, world: int, text: str, *settings: str) -> dict[str, Any]:
    recipe = write_recipe(folder, text)
    trainers = Trainers(world, folder, recipe, *settings)
    assert trainers.wait() == [0] * world, trainers.text()
    return outcome(only_run(folder))


def survive(folder: Path, world: int, text: str, kills: int, seed: int, *settings: str) -> dict[str, Any]:
    """Run to the end with so many kills on the way, counting only sittings that were really ended by one."""
    recipe, draw, killed = write_recipe(folder, text), random.Random(seed), 0
    while killed < kills:
        kind, moment = KINDS[killed % len(KINDS)], draw.random() / (1 + killed / 8)
        victim = draw.randrange(world) if kind in ("step", "time") else 0
        prepare = functools.partial(_prepare, kind, moment, victim)
        trainers = Trainers(world, folder, recipe, "--resume", "auto", *settings, prepare=prepare)
        trainers.wait_until_first_ends()
        trainers.signal(signal.SIGKILL)  # as when a machine goes down
        statuses = trainers.wait()
        assert statuses[victim] == -signal.SIGKILL, trainers.text()
        if kind != "file":  # some files are written before training, at each resumption
            assert "run directory" in trainers.text(), "killed before training began"
        killed += 1
        print(f"{world} process(es): kill {killed}, {kind}, after: {trainers.text().strip().splitlines()[-1]}")
    trainers = Trainers(world, folder, recipe, "--resume", "auto", *settings)
    assert trainers.wait() == [0] * world, trainers.text()
    assert "going on after epoch" in trainers.text()
    return outcome(only_run(folder))


def epochs(kills: int) -> tuple[str, str]:
    """Enough of them that no sitting gets to the end before it is killed."""
    return "--set", f"train.epochs={4 + 2 * kills}"


def _prepare(kind: str, moment: float, victim: int, rank: int) -> None:
    if rank == victim:
        kill_at(kind, moment, rank)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_again_and_again_comes_out_the_same(tmp_path: Path, world: int) -> None:
    plain = undisturbed(tmp_path / "plain", world, MUCH, *EMA, *epochs(5))
    assert survive(tmp_path / "killed", world, MUCH, 5, world, *EMA, *epochs(5)) == plain


@pytest.mark.parametrize("text", [FROZEN, GRADUAL], ids=["frozen features", "gradual"])
def test_other_ways_of_training_come_out_the_same(tmp_path: Path, text: str) -> None:
    settings = ("--set", "train.ema=0.9", *epochs(3))
    plain = undisturbed(tmp_path / "plain", 1, text, *settings)
    assert bool(plain["summary"]["shortcuts"]) == (text is FROZEN)
    assert survive(tmp_path / "killed", 1, text, 3, 5, *settings) == plain


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_the_very_end_comes_out_the_same(tmp_path: Path, world: int) -> None:
    plain = undisturbed(tmp_path / "plain", world, MUCH, *EMA)
    recipe = write_recipe(tmp_path / "killed", MUCH)
    for owner, name in ((toolkit.engine.finish, "publish_best"), (Run, "write_predictions")):
        prepare = functools.partial(_kill_after, owner, name)
        trainers = Trainers(world, tmp_path / "killed", recipe, "--resume", "auto", *EMA, prepare=prepare)
        trainers.wait_until_first_ends()
        trainers.signal(signal.SIGKILL)
        assert trainers.wait()[0] == -signal.SIGKILL, trainers.text()
    trainers = Trainers(world, tmp_path / "killed", recipe, "--resume", "auto", *EMA)
    assert trainers.wait() == [0] * world, trainers.text()
    assert outcome(only_run(tmp_path / "killed")) == plain


def _kill_after(owner: Any, name: str, rank: int) -> None:
    at_call(owner, name, 1, kill_self, after=True)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_twenty_times_comes_out_the_same(tmp_path: Path, world: int) -> None:
    plain = undisturbed(tmp_path / "plain", world, MUCH, *EMA, *epochs(20))
    assert survive(tmp_path / "killed", world, MUCH, 20, 7 + world, *EMA, *epochs(20)) == plain
