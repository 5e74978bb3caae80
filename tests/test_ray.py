"""Training with Ray: `toolkit submit RECIPE --to ray`, on a Ray cluster that it starts on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli import toolkit
from trainers import STATEFUL, only_run, outcome, uninterrupted, write_recipe

from toolkit import ray_trainer
from toolkit.errors import Interrupted, RunFailed, UserError
from toolkit.recipe import load_recipe, resolved_toml
from toolkit.runs import Run

SETTINGS = ("--set", "train.epochs=40")


@pytest.fixture(scope="module")
def ray_installed() -> None:
    """Skip if Ray is not installed; fail on CI, which installs it with the extra dev."""
    if importlib.util.find_spec("ray") is None:
        if os.environ.get("CI"):
            pytest.fail("CI is set, and Ray is not installed")
        pytest.skip("Ray is not installed (pip install 'ray[train]')")


class Submission:
    """A process of `toolkit submit RECIPE --to ray --processes 2`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.shown = folder / "shown.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        environment.pop("RAY_ADDRESS", None)
        command = ["-m", "toolkit", "submit", str(folder / "recipe.toml"), "--to", "ray", "--processes", "2", *options]
        with open(self.shown, "w") as shown:
            self.process = subprocess.Popen([sys.executable, *command], env=environment, stdout=shown, stderr=shown)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 200) -> None:
        """Wait until a condition holds while the command runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.shown.read_text()
            assert time.monotonic() < deadline, self.shown.read_text()
            time.sleep(0.05)

    def wait(self) -> int:
        """Return the exit status; end the command if it takes too long."""
        try:
            return self.process.wait(200)
        finally:
            self.process.kill()


@pytest.mark.extended
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_installed")
def test_after_a_lost_process_and_a_stop_request_the_results_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    write_recipe(tmp_path, STATEFUL)
    runs, first = tmp_path / "runs" / "small", Submission(tmp_path, *SETTINGS)

    def starts() -> list[str]:
        return [line for file in runs.glob("*/ray/starts") for line in file.read_text().splitlines()]

    def epochs() -> int:
        return sum(len(file.read_text().splitlines()) for file in runs.glob("*/metrics.jsonl"))

    first.wait_until(lambda: epochs() >= 2)
    os.kill(int(starts()[0].split()[1]), signal.SIGKILL)
    first.wait_until(lambda: len(starts()) == 2)
    trained = epochs()
    first.wait_until(lambda: epochs() > trained)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 3, first.shown.read_text()
    run = only_run(tmp_path)
    assert trained < len(run.epoch_records()) < 40
    assert f"toolkit submit RECIPE --to ray --resume {run.path}" in first.shown.read_text()

    second = Submission(tmp_path, *SETTINGS, "--resume", "auto")
    assert second.wait() == 0, second.shown.read_text()
    assert second.shown.read_text().splitlines()[-1] == str(run.path)
    assert only_run(tmp_path).environment["processes"] == 2
    assert outcome(only_run(tmp_path)) == uninterrupted(2, STATEFUL, *SETTINGS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "ray", "--nodes", "2"], "--nodes is for SLURM; leave it out with --to ray"),
        (["--to", "ray", "--dry-run"], "--dry-run is for SLURM; leave it out with --to ray"),
        (["--processes", "2"], "--processes is for --to ray"),
        (["--resume", "auto"], "--resume is for --to ray"),
    ],
)
def test_options_of_the_other_cluster_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    done = toolkit("submit", str(write_recipe(tmp_path, STATEFUL)), *options)
    assert (done.status, done.stderr) == (2, f"{message}\n")


def test_a_study_is_refused(tmp_path: Path) -> None:
    study = write_recipe(tmp_path, STATEFUL + "[study]\nseeds = [0, 1]\n")
    done = toolkit("submit", str(study), "--to", "ray")
    assert done.status == 2
    assert f"which --to ray does not train: toolkit study {study}" in done.stderr


def test_without_ray_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = toolkit("submit", str(write_recipe(tmp_path, STATEFUL)), "--to", "ray")
    assert (done.status, "pip install 'image-classification-toolkit[ray]'" in done.stderr) == (2, True)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, dict[str, Any]]:
    """Return a new run, of a recipe whose images do not exist, and what its processes on Ray are given."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    images = ['data.dataset="imagefolder"', "data.image_size=8", f'data.root="{tmp_path}/none"']
    recipe = load_recipe(write_recipe(tmp_path, STATEFUL), images)
    run = ray_trainer._run_to_train(recipe, {}, None)
    settings = {"run": str(run.path), "recipe": resolved_toml(recipe), "folder": str(tmp_path), "environment": {}}
    return run, settings


def test_bad_input_is_not_tried_again_and_leaves_no_run(submitted: tuple[Run, dict[str, Any]]) -> None:
    run, settings = submitted
    ray_trainer.train_on_worker(settings)
    ray_trainer.train_on_worker(settings)  # as Ray does if another process ended with an error
    assert len((run.path / ray_trainer.STARTS).read_text().splitlines()) == 1
    with pytest.raises(UserError, match="none"):
        ray_trainer._wait_for(run, lambda: None)
    assert not run.path.exists()


def test_a_worker_that_does_not_see_the_run_directory_says_so(submitted: tuple[Run, dict[str, Any]]) -> None:
    run, settings = submitted
    shutil.rmtree(run.path)
    with pytest.raises(RuntimeError, match="must be on a file system that all nodes share"):
        ray_trainer.train_on_worker(settings)


def test_a_stop_request_before_the_processes_have_started_ends_the_wait(submitted: tuple[Run, dict[str, Any]]) -> None:
    run, _ = submitted
    ended = threading.Event()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted, match="stopped by SIGTERM before Ray had started the processes"):
        ray_trainer._wait_for(run, ended.wait)
    ended.set()


def test_if_ray_gives_up_the_message_has_the_cause_on_each_rank(submitted: tuple[Run, dict[str, Any]]) -> None:
    run, _ = submitted

    def work() -> None:
        error = RuntimeError("training failed")
        error.worker_failures = {1: RuntimeError("the node was lost")}  # type: ignore[attr-defined]
        raise error

    with pytest.raises(RunFailed, match=f"Ray gave up: rank 1: the node was lost\n.* --resume {run.path}"):
        ray_trainer._wait_for(run, work)
