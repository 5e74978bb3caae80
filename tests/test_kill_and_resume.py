"""A run that is killed at any moment and resumed ends with the same bytes as an uninterrupted one.

A run is started repeatedly, and each time but the last one process or all are ended by SIGKILL. The run is
divided into equal parts with a kill in each: at a random step, at a random moment of a given kind. A kill
counts only if training had begun since the last start.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_lp_ft import LP_FT
from trainers import (
    EMA,
    FROZEN,
    GRADUAL,
    LORA,
    STATEFUL,
    Trainers,
    after_seconds,
    at_call,
    kill_self,
    only_run,
    outcome,
    uninterrupted,
    write_recipe,
)

import toolkit.training.checkpoint
import toolkit.training.finalize
import toolkit.training.fit
from toolkit.runs import Run
from toolkit.trackers import Tracking
from toolkit.training.task import SingleLabel
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

KINDS = ("step", "evaluation", "file", "half", "time")
"""In a step (before it, between its gradient and its update, after it), before a batch of the next evaluation is
counted, before one of the next syncs or renames, with the next checkpoint half written, after some milliseconds."""
ON_MAIN = ("file", "half")
"""Kinds that only the main process reaches."""
STEPS = 7
"""Of an epoch of the recipe."""


def epochs(count: int) -> tuple[str, str]:
    return "--set", f"train.epochs={count}"


# -- kills over the whole run -----------------------------------------------------------------------------------------


class Killer:
    """Kills this process by SIGKILL at the first moment of a kind after a given step of the run."""

    def __init__(self, kind: str, target: int, chance: float, note: Path) -> None:
        self.kind, self.target, self.chance, self.note = kind, target, chance, note
        self.steps = 0
        """Begun since this process started."""
        self.is_armed = False
        forward_backward = TrainStep._forward_backward

        def watched(trainer: TrainStep, micro: Any, batch: Any, epoch: int) -> Any:
            self.place = epoch * STEPS + micro.step
            self.steps += 1
            if self.place >= self.target and not self.is_armed:
                self.is_armed = True
                self._arm()
            return forward_backward(trainer, micro, batch, epoch)

        TrainStep._forward_backward = watched  # type: ignore[method-assign]

    def _arm(self) -> None:
        match self.kind:
            case "step" if self.chance < 1 / 3:
                self._kill()
            case "step":
                at_call(TrainStep, "_update", 1, self._kill, after=self.chance > 2 / 3)
            case "evaluation":
                at_call(SingleLabel, "outcomes", 1 + int(self.chance * 2), self._kill)
            case "file":
                at_call(os, ["fsync", "replace"][int(self.chance * 100) % 2], 1 + int(self.chance * 6), self._kill)
            case "half":
                write_half_at(1 + int(self.chance * 3), self._kill)
            case "time":
                after_seconds(self.chance * 0.03, self._kill)

    def _kill(self) -> None:
        self.note.write_text(json.dumps([self.kind, self.place, self.steps]))
        kill_self()


def write_half_at(count: int, act: Callable[[], None]) -> None:
    """Write only half of the ``count``-th checkpoint file, and then call ``act``."""
    original, calls = toolkit.training.checkpoint.write_atomically, [0]

    def write(path: Path, data: bytes) -> None:
        calls[0] += 1
        if calls[0] == count:
            path.with_name(f".{path.name}.0.tmp").write_bytes(bytes(data)[: len(data) // 2])
            act()
        original(path, data)

    toolkit.training.checkpoint.write_atomically = write  # type: ignore[assignment]


def prepare_killer(kind: str, target: int, chance: float, note: Path, victim: int, rank: int) -> None:
    if rank == victim:
        Killer(kind, target, chance, note)


def survive(
    folder: Path, world: int, text: str, kills: int, run_epochs: int, seed: int, *settings: str
) -> dict[str, Any]:
    """Train to the end with ``kills`` kills, each in its own part of the run."""
    recipe, note, draw = write_recipe(folder, text), folder / "kill.json", random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    draw.shuffle(kinds)
    for number, kind in enumerate(kinds):
        target = int((number + draw.random()) / kills * run_epochs * STEPS)
        victim = 0 if kind in ON_MAIN else draw.randrange(world)
        prepare = functools.partial(prepare_killer, kind, target, draw.random(), note, victim)
        note.unlink(missing_ok=True)
        trainers = Trainers(world, folder, recipe, "--resume", "auto", *epochs(run_epochs), *settings, prepare=prepare)
        trainers.wait_until_first_ends()
        trainers.signal(signal.SIGKILL)  # as when a machine fails
        statuses = trainers.wait()
        assert statuses[victim] == -signal.SIGKILL, trainers.text()
        kind_noted, place, steps = json.loads(note.read_text())
        assert kind_noted == kind
        assert place >= target
        assert steps >= 1
        print(f"{world} process(es), kill {number + 1} of {kills}: {kind} of rank {victim}, at step {place + 1} of "
              f"{run_epochs * STEPS}, the {steps}th since its start.")  # fmt: skip
    trainers = Trainers(world, folder, recipe, "--resume", "auto", *epochs(run_epochs), *settings)
    assert trainers.wait() == [0] * world, trainers.text()
    assert "resuming after epoch" in trainers.text()
    return outcome(only_run(folder))


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_a_run_killed_ten_times_gives_the_same_bytes(tmp_path: Path, world: int) -> None:
    plain = uninterrupted(world, STATEFUL, *EMA, *epochs(6))
    assert survive(tmp_path / "killed", world, STATEFUL, 2 * len(KINDS), 6, world, *EMA) == plain


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(FROZEN, id="frozen features"),
        pytest.param(GRADUAL, marks=pytest.mark.extended, id="gradual"),
        pytest.param(LORA, marks=pytest.mark.extended, id="lora"),
        pytest.param(LP_FT, marks=pytest.mark.extended, id="lp_ft with l2_sp and wise"),
    ],
)
def test_killed_runs_with_other_transfer_modes_give_the_same_bytes(tmp_path: Path, text: str) -> None:
    ema = ("--set", "train.ema=0.9")
    plain = uninterrupted(1, text, *ema, *epochs(8))
    assert bool(plain["summary"]["cached"]) == (text is FROZEN)
    assert survive(tmp_path / "killed", 1, text, 5, 8, 5, *ema) == plain


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_a_killed_run_with_stochastic_weight_averaging_gives_the_same_bytes(tmp_path: Path, world: int) -> None:
    """Its batch norm statistics are computed again after each averaged epoch."""
    swa = ("--set", "train.swa_start=2", "--set", "train.swa_lr=0.02", "--set", 'train.best_metric="last"')
    plain = uninterrupted(world, STATEFUL, *swa, *epochs(5))
    assert survive(tmp_path / "killed", world, STATEFUL, 5, 5, 3, *swa) == plain


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2)])
def test_a_run_killed_a_hundred_times_gives_the_same_bytes(tmp_path: Path, world: int, workers: int) -> None:
    settings = (*EMA, "--set", f"data.workers={workers}", "--set", f'data.cache="{"off" if workers else "auto"}"')
    plain = uninterrupted(world, STATEFUL, *settings, *epochs(60))
    assert survive(tmp_path / "killed", world, STATEFUL, 100, 60, 10 + world + workers, *settings) == plain


# -- kills at the beginning and at the end ----------------------------------------------------------------------------


def kill_before_file_operation(count: int, begin: tuple[Any, str] | None, rank: int) -> None:
    """Kill the main process before its ``count``-th sync or rename after the first call of ``begin``."""
    if rank != 0:
        return
    left = [count]

    def counted(name: str) -> None:
        original = getattr(os, name)

        def operation(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                kill_self()
            return original(*arguments)

        setattr(os, name, operation)

    def arm() -> None:
        counted("fsync")
        counted("replace")

    if begin is None:
        arm()
    else:
        at_call(*begin, 1, arm)


def killed(world: int, folder: Path, recipe: Path, prepare: Callable[[int], None], *settings: str) -> Trainers:
    """Start trainers, one of which kills itself, and then kill the others."""
    trainers = Trainers(world, folder, recipe, "--resume", "auto", *settings, prepare=prepare)
    trainers.wait_until_first_ends()
    trainers.signal(signal.SIGKILL)
    assert trainers.wait()[0] == -signal.SIGKILL, trainers.text()
    return trainers


def test_killed_before_each_file_operation_at_the_start(tmp_path: Path) -> None:
    plain = uninterrupted(1, STATEFUL, *EMA)
    folder = tmp_path / "killed"
    recipe = write_recipe(folder, STATEFUL)
    for count in range(1, 13):  # four files, each with a sync, a rename and a sync of its folder
        trainers = killed(1, folder, recipe, functools.partial(kill_before_file_operation, count, None), *EMA)
        assert "run directory" not in trainers.text(), "the run has more than its first files"
    trainers = Trainers(1, folder, recipe, "--resume", "auto", *EMA)
    assert trainers.wait() == [0], trainers.text()
    (run,) = (Run(path) for path in (folder / "runs" / "small").iterdir() if (path / "recipe.toml").exists())
    assert outcome(run) == plain


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_before_each_file_operation_at_the_end(tmp_path: Path, world: int) -> None:
    plain = uninterrupted(world, STATEFUL, *EMA)
    folder, begin = tmp_path / "killed", (toolkit.training.finalize, "link_best")
    recipe = write_recipe(folder, STATEFUL)
    for count in itertools.count(1):
        killed(world, folder, recipe, functools.partial(kill_before_file_operation, count, begin), *EMA)
        if only_run(folder).is_finished:
            break
    assert count == 14, "best weights, predictions.csv, class_metrics.csv, curves.csv and finally summary.json"
    assert outcome(only_run(folder)) == plain


def after_the_summary(rank: int) -> None:
    at_call(toolkit.training.fit, "write_summary", 1, kill_self, after=True)


def test_a_run_killed_after_its_summary_is_finished_and_resume_auto_starts_another(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, STATEFUL)
    killed(1, tmp_path, recipe, after_the_summary, *EMA)
    first = only_run(tmp_path)
    log = first.log_file.read_text()
    assert log.splitlines()[-1].startswith("last "), "the table of results is in the log"
    trainers = Trainers(1, tmp_path, recipe, "--resume", "auto", *EMA)
    assert trainers.wait() == [0], trainers.text()
    assert f"{first.path} is finished, so this is a new run" in trainers.text()
    second, _ = sorted((tmp_path / "runs" / "small").iterdir(), key=lambda path: path == first.path)
    assert outcome(Run(second)) == outcome(first)
    assert first.log_file.read_text() == log


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_requeued_job_with_a_finished_run_starts_no_other(
    tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    recipe = write_recipe(tmp_path, STATEFUL)
    killed(world, tmp_path, recipe, after_the_summary, *EMA)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    trainers = Trainers(world, tmp_path, recipe, "--resume", "auto", *EMA)
    assert trainers.wait() == [0] * world, trainers.text()
    first = only_run(tmp_path)
    assert f"{first.path} was finished by this job before it was requeued: nothing is left to do" in trainers.text()
    for variable, value, settings in (
        ("SLURM_JOB_ID", "17", ("--set", "recipe.seed=1")),  # a second training of the same job
        ("SLURM_JOB_ID", "18", ()),
    ):
        monkeypatch.setenv(variable, value)
        trainers = Trainers(world, tmp_path, recipe, "--resume", "auto", *EMA, *settings)
        assert trainers.wait() == [0] * world, trainers.text()
        assert "so this is a new run" in trainers.text()


def test_a_run_killed_after_closing_its_trackers_is_finished(tmp_path: Path) -> None:
    tracked = (*EMA, "--set", 'tracking.trackers=["tensorboard"]')
    plain = uninterrupted(1, STATEFUL, *tracked)
    folder = tmp_path / "killed"
    recipe = write_recipe(folder, STATEFUL)
    killed(1, folder, recipe, functools.partial(_kill_after, Tracking, "finish"), *tracked)
    assert only_run(folder).is_finished
    assert outcome(only_run(folder)) == plain


def _kill_after(owner: Any, name: str, rank: int) -> None:
    at_call(owner, name, 1, kill_self, after=True)
