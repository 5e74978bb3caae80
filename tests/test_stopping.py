"""Stopping on request: the step is finished, a checkpoint written, exit status 3 soon; resuming is bit-identical."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_train import wandb_records
from trainers import EMA, FROZEN, STATEFUL, Trainers, at_call, only_run, outcome, uninterrupted, write_recipe

from toolkit.cache import frozen_features
from toolkit.errors import UserError
from toolkit.recipe import load
from toolkit.training.fit import fit
from toolkit.training.task import SingleLabel
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

LIMIT_S = 10


def mark(path: Path) -> None:
    """Touch a file and wait until it is deleted, so that the stop request arrives at this point of the run."""
    path.touch()
    deadline = time.monotonic() + 30
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def mark_at(phase: str, count: int, path: Path, rank: int) -> None:
    """Make rank 0 touch a file at the ``count``-th call of a phase and wait there until it is deleted."""
    owner, name = {
        "step": (TrainStep, "_update"),
        "evaluation": (SingleLabel, "outcomes"),
        "features": (frozen_features, "prefix_features"),
    }[phase]
    if rank == 0:
        at_call(owner, name, count, functools.partial(mark, path))


def stopped(
    folder: Path, world: int, text: str, phase: str, count: int, request: Callable[[Trainers], None], *settings: str
) -> Trainers:
    """Start trainers, request a stop while rank 0 is in a phase, and check their exit statuses."""
    recipe = write_recipe(folder, text)
    there = folder / "there"
    there.unlink(missing_ok=True)
    prepare = functools.partial(mark_at, phase, count, there)
    trainers = Trainers(world, folder, recipe, "--resume", "auto", *settings, prepare=prepare)
    trainers.wait_until(there.exists)
    request(trainers)
    there.unlink()
    began = time.monotonic()
    assert trainers.wait(30) == [3] * world, trainers.text()
    assert time.monotonic() - began < LIMIT_S
    assert "resume with: toolkit train --resume" in trainers.text().strip().splitlines()[-1]
    return trainers


def finished(folder: Path, world: int, *settings: str) -> dict[str, Any]:
    run = only_run(folder)
    trainers = Trainers(world, folder, "--resume", run.path, *settings)
    assert trainers.wait() == [0] * world, trainers.text()
    return outcome(run)


def by_signal(number: int, *ranks: int) -> Callable[[Trainers], None]:
    return lambda trainers: trainers.signal(number, *ranks)


def test_each_signal_and_the_stop_file_stop_steps_and_evaluations(tmp_path: Path) -> None:
    plain = uninterrupted(1, STATEFUL, *EMA)
    folder = tmp_path / "last"

    def stop_file(_: Trainers) -> None:
        (only_run(folder).path / "stop").touch()
        time.sleep(1.1)  # the stop file is polled once per second

    for phase, count, request, reason in (
        ("step", 4, by_signal(signal.SIGTERM), "SIGTERM"),
        ("evaluation", 2, by_signal(signal.SIGINT), "SIGINT"),
        ("evaluation", 1, by_signal(signal.SIGUSR1), "SIGUSR1"),  # twice in the same phase
        ("step", 5, stop_file, "the file stop"),
    ):
        assert f"stopped by {reason}" in stopped(folder, 1, STATEFUL, phase, count, request, *EMA).text()
    assert finished(folder, 1) == plain
    assert not (only_run(folder).path / "stop").exists()


@pytest.mark.parametrize("phase", ["step", pytest.param("evaluation", marks=pytest.mark.extended)])
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path: Path, phase: str) -> None:
    plain = uninterrupted(2, STATEFUL, *EMA)
    stopped(tmp_path / "last", 2, STATEFUL, phase, 4, by_signal(signal.SIGTERM, 1), *EMA)
    assert finished(tmp_path / "last", 2) == plain


def test_a_run_can_be_stopped_while_frozen_features_are_computed(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    trainers = stopped(folder, 1, FROZEN, "features", 3, by_signal(signal.SIGTERM))
    assert "stopped before training" in trainers.text()
    assert finished(folder, 1) == uninterrupted(1, FROZEN)


def test_data_workers_ignore_the_stop_signal(tmp_path: Path) -> None:
    """A terminal or scheduler signals the whole process group, workers included."""
    settings = ("--set", "data.workers=2", "--set", 'data.cache="off"')  # cached images need no workers

    def whole_process_group(trainers: Trainers) -> None:
        pids = [trainers.processes[0].pid, *children(trainers.processes[0].pid)]
        assert len(pids) >= 3
        for pid in pids:
            os.kill(int(pid or 0), signal.SIGTERM)

    stopped(tmp_path / "last", 1, STATEFUL, "step", 4, whole_process_group, *EMA, *settings)
    kept = finished(tmp_path / "last", 1)
    assert kept["weights"] == uninterrupted(1, STATEFUL, *EMA)["weights"]


def children(pid: int | None) -> list[int]:
    """Return the processes whose parent is ``pid``."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return [child for child, parent in parents.items() if parent == pid]


def test_a_second_sigint_ends_a_run_at_once_but_not_a_forwarded_first_one(tmp_path: Path) -> None:
    recipe, there = write_recipe(tmp_path, STATEFUL), tmp_path / "there"

    def slow_step(rank: int) -> None:
        at_call(TrainStep, "_update", 3, lambda: (there.touch(), time.sleep(8)))  # type: ignore[arg-type, func-returns-value]

    trainers = Trainers(1, tmp_path, recipe, prepare=slow_step)
    trainers.wait_until(there.exists)
    trainers.signal(signal.SIGINT)
    time.sleep(0.1)
    trainers.signal(signal.SIGINT)  # the launcher forwards the same key press
    time.sleep(1.5)
    assert trainers.processes[0].is_alive()
    began = time.monotonic()
    trainers.signal(signal.SIGINT)
    assert trainers.wait(5) == [128 + signal.SIGINT]
    assert time.monotonic() - began < 4  # the slowed step would have taken longer
    assert not only_run(tmp_path).is_finished


def wandb_ids(folder: Path) -> Iterator[str]:
    for fragment in sorted(folder.glob("wandb/offline-run-*")):
        for record in wandb_records(folder, fragment.name):
            if record.WhichOneof("record_type") == "run":
                yield record.run.run_id


def test_a_resumed_run_keeps_its_wandb_id(tmp_path: Path) -> None:
    tracked = ("--set", 'tracking.trackers=["wandb"]', "--set", "tracking.upload=[]")
    stopped(tmp_path, 1, STATEFUL, "step", 9, by_signal(signal.SIGTERM), *EMA, *tracked)
    finished(tmp_path, 1)
    run = only_run(tmp_path)
    fragments = sorted(path.name for path in run.path.glob("wandb/offline-run-*"))
    assert len(fragments) == 2
    assert set(wandb_ids(run.path)) == {f"small-{run.id}"}
    logged = [line for name in fragments for line in history(run.path, name)]
    assert logged == run.metric_records(), "both fragments together have each line once"


def history(folder: Path, fragment: str) -> Iterator[dict[str, Any]]:
    for record in wandb_records(folder, fragment):
        if record.WhichOneof("record_type") == "history":
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            yield {key: value for key, value in items.items() if not key.startswith("_")}


def test_ctrl_c_is_acknowledged_at_once(tmp_path: Path) -> None:
    """The message appears before the current step ends; here the step is a busy loop."""
    code = (
        "import os, signal, time\n"
        "from toolkit.distributed.signals import GracefulStop\n"
        "with GracefulStop() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    began = time.monotonic()\n"
        "    while not stop.reason and time.monotonic() - began < 30: pass\n"
        "    os.write(2, b'step ends')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    first, second = done.stderr.strip().splitlines()
    assert first == "stopping: a checkpoint is written after this step (press Ctrl-C again to exit at once without one)"
    assert second == "step ends"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, "RANK": "1"}
    )
    assert other.stderr == "step ends", "only the main process prints"


def test_an_edited_recipe_is_refused_with_the_commands_to_run(tmp_path: Path) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "quickstart.toml"
    few = [f'recipe.run_root="{tmp_path}"', "data.images_per_class=8", "train.batch_size=16", "train.epochs=2"]
    run = fit(load(recipe, few).recipe, until=1, quiet=True)
    with pytest.raises(UserError) as refused:
        fit(load(recipe, [*few, "optimizer.lr=0.5"]).recipe, resume="auto", quiet=True)
    text = str(refused.value)
    assert f"To resume it with its own recipe: toolkit train --resume {run.path}." in text
    assert "add --allow-changes" in text
    assert "leave out --resume" in text
