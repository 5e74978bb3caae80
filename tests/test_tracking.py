"""W&B's modes without a prompt; a server that is absent or hangs; trackers that fail or hang. W&B's client is the real
one; metrics.jsonl is complete whatever happens."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli
import pytest
import wandb  # noqa: F401  (imported once before processes are forked, not in each)
from accelerate.tracking import TensorBoardTracker
from distributed import free_port
from mlflow import MlflowClient
from test_train import wandb_records
from trainers import EMA, STATEFUL, Trainers, at_call, kill_self, only_run, write_recipe
from wandb_server import KEY, WandbServer, logged_in_here, without_login

import toolkit.trackers
from toolkit.mlflow_tracker import MLflowRun
from toolkit.recipe import load_recipe
from toolkit.runs import Run
from toolkit.trackers import BACKLOG, FINISH_SECONDS, LEAVE_SECONDS, TrackerThread, wandb_mode
from toolkit.training.fit import fit
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

LIMIT_S = 10
"""A run asked to stop is gone within this time."""


@pytest.fixture(autouse=True)
def _a_machine_without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    without_login(monkeypatch, tmp_path)


@pytest.fixture(autouse=True)
def _long_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the time-outs for slow machines; tests of an absent server set their own."""
    for name, seconds in (("CONNECT_SECONDS", 30), ("INIT_SECONDS", 60), ("FINISH_SECONDS", 60), ("LEAVE_SECONDS", 61)):
        monkeypatch.setattr(toolkit.trackers, name, seconds)


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits at the end, which leaves the rest of the time limit to a slow machine."""
    monkeypatch.setattr(toolkit.trackers, "FINISH_SECONDS", 1)
    monkeypatch.setattr(toolkit.trackers, "LEAVE_SECONDS", 1.5)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """Start a local server in place of W&B's, with a login."""
    with logged_in_here(monkeypatch) as server:
        yield server


def tracked(*names: str) -> tuple[str, ...]:
    """Return settings for trackers that get the metrics only; what W&B gets besides is in test_wandb_results.py."""
    return (*EMA, "--set", f"tracking.trackers={json.dumps(names)}", "--set", "tracking.upload=[]")


def begin(folder: Path, *settings: str, world: int = 1, prepare: Callable[[int], None] | None = None) -> Trainers:
    return Trainers(world, folder, write_recipe(folder, STATEFUL), "--resume", "auto", *settings, prepare=prepare)


def train(folder: Path, *settings: str, world: int = 1, prepare: Callable[[int], None] | None = None) -> str:
    """Train a run to its end; return its output."""
    trainers = begin(folder, *(settings or tracked("wandb")), world=world, prepare=prepare)
    assert trainers.wait() == [0] * world, trainers.text()
    return trainers.text()


def history(run: Run, fragment: str) -> list[dict[str, Any]]:
    """Return the history lines of a W&B run folder."""
    records = (record for record in wandb_records(run.path, fragment) if record.WhichOneof("record_type") == "history")
    lines = ({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records)
    return [{key: value for key, value in line.items() if not key.startswith("_")} for line in lines]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return metrics.jsonl of the same run without trackers."""
    folder = tmp_path_factory.mktemp("plain")
    train(folder, *EMA)
    return only_run(folder).metrics_file.read_bytes()


# -- online, offline --------------------------------------------------------------------------------------------------


def test_a_mode_set_by_the_user_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode("offline") == ("offline", "")
    assert wandb_mode("disabled") == ("disabled", "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == ("disabled", "")


def test_without_a_login_wandb_is_offline_and_the_log_says_how_to_upload(tmp_path: Path) -> None:
    output = train(tmp_path)
    assert "W&B is offline: there is no W&B login" in output
    assert f"To upload later: toolkit sync {only_run(tmp_path).path}" in output
    assert history(only_run(tmp_path), "offline-run-*") == only_run(tmp_path).metric_records()


def test_an_absent_server_leads_to_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    assert "cannot be reached" in train(tmp_path)
    assert history(only_run(tmp_path), "offline-run-*") == only_run(tmp_path).metric_records()


def test_an_unresponsive_server_leads_to_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit.trackers, "CONNECT_SECONDS", 1)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        output = train(tmp_path)
    assert "W&B is offline: its server 127.0.0.1 did not answer within 1 s" in output
    assert "warning" not in output
    assert history(only_run(tmp_path), "offline-run-*") == only_run(tmp_path).metric_records()


def test_a_server_that_does_not_answer_the_client_leads_to_an_offline_run(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolkit.trackers, "INIT_SECONDS", 2)
    server.hanging.add("graphql")
    output = train(tmp_path)
    assert server.hung
    assert "W&B did not respond (" in output
    assert "logging offline instead" in output
    assert "warning" not in output
    assert history(only_run(tmp_path), "offline-run-*") == only_run(tmp_path).metric_records()


def test_only_the_main_process_tracks_and_the_config_is_the_recipe(tmp_path: Path) -> None:
    train(tmp_path, *tracked("wandb"), world=2)
    run = only_run(tmp_path)
    (fragment,) = run.path.glob("wandb/offline-run-*")
    records = list(wandb_records(run.path, fragment.name))
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {one.run_id for one in runs} == {f"small-{run.id}"}
    assert history(run, fragment.name) == run.metric_records()
    updates = [item for record in records for item in (*record.run.config.update, *record.config.update)]
    config = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}
    assert config["optimizer.lr"] == run.recipe.optimizer.lr
    assert config["train.batch_size"] == 16, "the batch size of all processes, not of one"


def test_a_tracker_whose_package_is_missing_is_an_error_that_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    outcome = cli.toolkit("train", write_recipe(tmp_path, STATEFUL), *tracked("tensorboard"))
    assert (outcome.status, outcome.stdout) == (2, "")
    assert outcome.stderr.endswith('tracking.trackers: "tensorboard" is not installed: pip install tensorboard\n')
    assert list((tmp_path / "runs").iterdir()) == [], "before a run directory is created"


# -- MLflow ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train one epoch on two processes, into a database in the run directory."""
    folder = tmp_path_factory.mktemp("mlflow")
    settings = ("train.epochs=1", "train.ema=0.5", "train.ema_steps=1", "scheduler.warmup_epochs=0.5",
                'tracking.project="digits"', 'tracking.tags=["a", "b"]', 'tracking.notes="a note"')  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        output = train(folder, *tracked("mlflow"), *(part for one in settings for part in ("--set", one)), world=2)
    assert "warning" not in output
    return only_run(folder)


def mlflow_runs(client: MlflowClient, project: str) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(project).experiment_id]))


def mlflow_lines(client: MlflowClient, run_id: str) -> list[dict[str, float]]:
    """Return what was logged, in the form of metrics.jsonl: what has the same step and time was one line."""
    lines: dict[tuple[int, int], dict[str, float]] = {}
    for key in client.get_run(run_id).data.metrics:
        for one in client.get_metric_history(run_id, key):
            if one.step:  # 0: the values of summary.json
                lines.setdefault((one.step, one.timestamp), {})[key] = one.value
    return [lines[key] for key in sorted(lines)]


def test_mlflow_gets_params_metrics_and_summary_from_the_main_process(mlflow_run: Run) -> None:
    client = MlflowClient(f"sqlite:///{mlflow_run.path}/mlflow.db")
    (run,) = mlflow_runs(client, "digits")
    assert mlflow_lines(client, run.info.run_id) == mlflow_run.metric_records(), (
        "each line once, though two processes trained"
    )
    assert run.data.metrics["best.test_accuracy"] == mlflow_run.summary["best"]["test_accuracy"]
    assert run.data.params["optimizer.lr"] == "0.05"
    assert run.data.params["train.batch_size"] == "16", "the batch size of all processes, not of one"
    assert (run.info.run_name, run.info.status) == (f"small-{mlflow_run.id}", "FINISHED")
    tags = {"toolkit.run": f"small-{mlflow_run.id}", "group": "small", "tags": "a, b", "mlflow.note.content": "a note"}
    assert tags.items() <= run.data.tags.items()


def test_sync_ends_a_run_whose_process_was_killed_before_it_closed_the_tracker(
    mlflow_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = MlflowClient(f"sqlite:///{mlflow_run.path}/mlflow.db")
    experiment = client.get_experiment_by_name("digits").experiment_id
    left_open = client.create_run(experiment, tags={"toolkit.run": f"small-{mlflow_run.id}"}).info.run_id
    other = client.create_run(experiment, tags={"toolkit.run": "small-other"}).info.run_id
    said = "its MLflow run was still RUNNING, and is FINISHED now"
    for is_open in (True, False):
        found = cli.toolkit("sync", str(mlflow_run.path))
        assert (found.status, said in found.stderr) == (0, is_open), found.stderr
    ended = client.get_run(left_open)
    assert ended.info.status == "FINISHED"
    assert ended.data.metrics["best.test_accuracy"] == mlflow_run.summary["best"]["test_accuracy"]
    assert client.get_run(other).info.status == "RUNNING"
    for run_id in (left_open, other):
        client.delete_run(run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    found = cli.toolkit("sync", str(mlflow_run.path))
    assert (found.status, found.stdout) == (0, f"{mlflow_run.path}: was not tracked by W&B; nothing to upload\n")
    assert f"warning: {mlflow_run.path}: MLflow could not be asked whether its run is open: " in found.stderr


def kill_after_a_line_that_is_logged_again(rank: int) -> None:
    """Kill the process at step 13, when MLflow has the sixth line, of step 11; the last checkpoint is of step 10."""
    logged = threading.Event()
    at_call(MLflowRun, "log", 6, logged.set, after=True)
    at_call(TrainStep, "_update", 13, lambda: kill_self() if logged.wait(60) else None)


def test_a_resumed_run_is_one_mlflow_run(
    tmp_path: Path, mlflow_run: Run, metrics: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{mlflow_run.path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client, wanted = MlflowClient(uri), tracked("mlflow")
    trainers = begin(tmp_path, *wanted, prepare=kill_after_a_line_that_is_logged_again)
    assert trainers.wait() == [-signal.SIGKILL], trainers.text()
    (run,) = mlflow_runs(client, "toolkit")
    assert run.info.status == "RUNNING"
    assert run.data.metrics["step"] == 11
    stopped_at_step(tmp_path, 9, *wanted)
    assert client.get_run(run.info.run_id).info.status == "KILLED"
    assert "warning" not in train(tmp_path, *wanted)
    (run,) = mlflow_runs(client, "toolkit")
    assert run.info.status == "FINISHED"
    assert only_run(tmp_path).metrics_file.read_bytes() == metrics
    assert mlflow_lines(client, run.info.run_id) == only_run(tmp_path).metric_records(), "each line once"
    assert not (only_run(tmp_path).path / "mlflow.db").exists()


def test_runs_of_one_process_have_their_own_databases(
    tmp_path: Path, mlflow_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, exit_code in (("one", 0), ("two", 3), ("two", 1)):  # the second is resumed, and fails
        (tmp_path / name).mkdir(exist_ok=True)
        if not (tmp_path / name / "mlflow.db").exists():
            shutil.copy(mlflow_run.path / "mlflow.db", tmp_path / name)  # MLflow needs seconds to create one
        tracker = MLflowRun(mlflow_run.recipe, tmp_path / name, name)
        tracker.start()
        tracker.end(exit_code)
    for name, status in (("one", "FINISHED"), ("two", "FAILED")):
        runs = mlflow_runs(MlflowClient(f"sqlite:///{tmp_path / name}/mlflow.db"), "digits")
        found = {run.data.tags["toolkit.run"]: run.info.status for run in runs}
        assert found == {name: status, f"small-{mlflow_run.id}": "FINISHED"}


def test_an_absent_mlflow_server_is_one_warning_and_other_trackers_log(
    tmp_path: Path, metrics: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    output = train(tmp_path, *tracked("mlflow", "wandb"))
    assert output.count("warning: mlflow logging has stopped") == 1
    run = only_run(tmp_path)
    assert run.metrics_file.read_bytes() == metrics
    assert history(run, "offline-run-*") == run.metric_records()


# -- during training --------------------------------------------------------------------------------------------------


def stopped_at_step(
    folder: Path,
    count: int,
    *settings: str,
    prepare: Callable[[int], None] = lambda rank: None,
    condition: Callable[[], bool] = lambda: True,
) -> tuple[Trainers, float]:
    """Stop trainers by SIGTERM in a step, once ``condition`` holds; return them and the seconds they took to end."""
    there = folder / "there"

    def stay() -> None:
        there.touch()
        deadline = time.monotonic() + 60
        while there.exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def prepare_all(rank: int) -> None:
        prepare(rank)
        at_call(TrainStep, "_update", count, stay)

    trainers = begin(folder, *settings, prepare=prepare_all)
    trainers.wait_until(lambda: there.exists() and condition())
    trainers.signal(signal.SIGTERM)
    began = time.monotonic()
    there.unlink()
    assert trainers.wait(60) == [3], trainers.text()
    return trainers, time.monotonic() - began


def test_a_resumed_run_is_one_run_on_the_server(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")  # the client sends at once, then every 15 s
    wanted = (*tracked("wandb"), "--set", 'tracking.upload=["results"]')

    def has_console_output() -> bool:
        return any(run.console for run in server.runs.values())

    stopped_at_step(tmp_path, 9, *wanted, condition=has_console_output)
    run = only_run(tmp_path)
    (name,) = server.runs
    assert name == f"small-{run.id}"
    assert server.runs[name].exit_code == 3
    assert server.runs[name].console[-1].startswith("stopped"), "the reason is shown too"
    train(tmp_path, *wanted)
    assert list(server.runs) == [name]
    *lines, results = server.runs[name].lines()
    assert lines == run.metric_records(), "each line once"
    assert "predictions" in results
    assert server.runs[name].console == run.log_file.read_text().splitlines(), "each message once"
    assert server.runs[name].exit_code == 0
    assert server.runs[name].summary["best.test_accuracy"] == run.summary["best"]["test_accuracy"]


@pytest.mark.usefixtures("short_timeouts")
def test_a_server_that_stops_answering_is_one_warning(tmp_path: Path, server: WandbServer, metrics: bytes) -> None:
    server.hanging.add("history")
    trainers, seconds = stopped_at_step(tmp_path, 9, *tracked("wandb"))
    assert seconds < LIMIT_S
    path = only_run(tmp_path).path
    assert f"its server has not received everything; to upload the rest: toolkit sync {path}" in trainers.text()
    output = train(tmp_path, *tracked("wandb"))
    assert output.count("warning") == 1
    run = only_run(tmp_path)
    assert run.metrics_file.read_bytes() == metrics
    fragments = sorted(path.name for path in run.path.glob("wandb/run-*"))
    assert [line for fragment in fragments for line in history(run, fragment)] == run.metric_records(), (
        "all lines are on disk"
    )


def test_the_waits_of_trackers_leave_time_to_stop_within_the_limit() -> None:
    assert FINISH_SECONDS < LEAVE_SECONDS <= LIMIT_S - 2


def failing_log(count: int, rank: int) -> None:
    def fail() -> None:
        raise OSError("the tracker's disk is full")

    at_call(TensorBoardTracker, "log", count, fail)


def test_a_failing_tracker_is_one_warning_and_the_others_continue(tmp_path: Path, metrics: bytes) -> None:
    output = train(tmp_path, *tracked("tensorboard", "wandb"), prepare=functools.partial(failing_log, 3))
    assert (
        output.count("warning: tensorboard logging has stopped (the tracker's disk is full); metrics.jsonl is complete")
        == 1
    )
    run = only_run(tmp_path)
    assert run.metrics_file.read_bytes() == metrics
    assert history(run, "offline-run-*") == run.metric_records()


def hanging_log(rank: int) -> None:
    at_call(TensorBoardTracker, "log", 1, functools.partial(time.sleep, 10_000))


@pytest.mark.usefixtures("short_timeouts")
def test_a_hanging_tracker_blocks_neither_training_nor_its_end(tmp_path: Path, metrics: bytes) -> None:
    trainers, seconds = stopped_at_step(tmp_path, 9, *tracked("tensorboard"), prepare=hanging_log)
    assert seconds < LIMIT_S
    assert "warning: tensorboard logging has stopped (it did not close in time)" in trainers.text()
    train(tmp_path, *tracked("tensorboard"), prepare=hanging_log)
    assert only_run(tmp_path).metrics_file.read_bytes() == metrics


class Recorder:
    """A tracker that records its lines; it waits before the first line until it is released."""

    name = "recorder"

    def __init__(self) -> None:
        self.go = threading.Event()
        self.lines: list[int] = []

    def log(self, line: int) -> None:
        self.go.wait(60)
        self.lines.append(line)


def test_a_tracker_thread_keeps_the_order_and_does_not_block_on_a_slow_tracker() -> None:
    tracker, output = Recorder(), []
    thread = TrackerThread(tracker, output.append)
    for line in range(100):
        thread.submit(functools.partial(Recorder.log, line=line))
    assert tracker.lines == []
    tracker.go.set()
    thread.close(lambda tracker: tracker.lines.append(-1))
    thread.wait(60)
    assert tracker.lines == [*range(100), -1]
    assert output == []


def test_the_backlog_of_a_slow_tracker_is_bounded() -> None:
    tracker, output = Recorder(), []
    thread = TrackerThread(tracker, output.append)
    for line in range(BACKLOG + 10):
        thread.submit(functools.partial(Recorder.log, line=line))
    assert output == [f"warning: recorder logging has stopped ({BACKLOG} lines are waiting); metrics.jsonl is complete"]
    assert thread.calls.qsize() <= BACKLOG
    tracker.go.set()
    thread.close(lambda tracker: tracker.lines.append(-1))
    thread.wait(60)
    assert tracker.lines[-1] == -1
    assert len(tracker.lines) < 3, "after a failure only the end is passed on"


def test_a_program_may_change_its_working_directory_between_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's service keeps the directory in which it was started, so that a relative path would lead elsewhere."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = ["train.epochs=2", 'recipe.run_root="runs"', 'tracking.trackers=["wandb"]', "tracking.upload=[]"]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run = fit(load_recipe(write_recipe(tmp_path / name, STATEFUL), settings), quiet=True)
        assert list((tmp_path / name / run.path).glob("wandb/*run-*/run-*.wandb"))
