"""`toolkit sync` with W&B's real client and a local server in place of W&B's. Each line arrives once despite
interruptions, and nothing is uploaded twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import Outcome, toolkit
from distributed import free_port, launch
from test_tracking import stopped_at_step, tracked, train
from trainers import only_run
from wandb_server import KEY, WandbServer, logged_in_here, without_login

import toolkit.wandb_sync as syncing
from toolkit.runs import Run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Train a run, and one that was stopped and resumed; both tracked offline without a login."""
    whole, twice = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("twice")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        train(whole, *tracked("wandb"))
        stopped_at_step(twice, 9, *tracked("wandb"))
        train(twice, *tracked("wandb"))
    return {"whole": only_run(whole), "twice": only_run(twice)}


@pytest.fixture
def run(runs: dict[str, Run], tmp_path: Path) -> Run:
    return copy(runs["whole"], tmp_path)


@pytest.fixture(autouse=True)
def _a_machine_without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_login(monkeypatch, tmp_path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with logged_in_here(monkeypatch) as server:
        yield server


def copy(run: Run, folder: Path) -> Run:
    return Run(shutil.copytree(run.path, folder / "runs" / run.path.parent.name / run.id, symlinks=True))


def sync(*arguments: Any) -> Outcome:
    """Run `toolkit sync` in a process of its own, because W&B's client leaves threads behind."""
    (outcome,) = launch(1, toolkit, "sync", *(str(argument) for argument in arguments))
    assert isinstance(outcome, Outcome)
    return outcome


def id_of(run: Run) -> str:
    return f"small-{run.id}"


@pytest.mark.parametrize("which", ["whole", "twice"])
def test_a_run_is_uploaded_completely_and_once(
    runs: dict[str, Run], which: str, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(runs[which], tmp_path)
    assert len(list(run.path.glob("wandb/offline-run-*"))) == {"whole": 1, "twice": 2}[which]
    outcome = sync(run.path)
    assert outcome.status == 0, outcome.stderr
    (sent,) = server.runs.items()
    assert sent[0] == id_of(run)
    assert sent[1].lines() == run.metric_records(), "each line once, in order"
    assert sent[1].exit_code == 0
    assert sent[1].summary["best.test_accuracy"] == run.summary["best"]["test_accuracy"]
    url = f"{server.url}/me/p/runs/{id_of(run)}"
    assert outcome.stdout == f"{run.path}: {len(run.metric_records())} lines uploaded, {url}\n"
    asked = server.asked
    monkeypatch.delenv("WANDB_API_KEY")
    outcome = sync(run.path)
    assert (outcome.status, outcome.stderr) == (0, "")
    assert outcome.stdout == f"{run.path}: already uploaded, {url}\n"
    assert server.asked == asked, "this needs neither login nor server"


def test_syncing_a_resumed_run_uploads_the_new_part(run: Run, server: WandbServer) -> None:
    lines, summary = run.metrics_file.read_bytes().splitlines(keepends=True), (run.path / "summary.json").read_bytes()
    run.metrics_file.write_bytes(b"".join(lines[:7]))
    (run.path / "summary.json").unlink()
    assert "7 lines uploaded" in sync(run.path).stdout
    assert server.runs[id_of(run)].lines() == run.metric_records()
    assert server.runs[id_of(run)].exit_code == 3, "not at its end"
    run.metrics_file.write_bytes(b"".join(lines))
    (run.path / "summary.json").write_bytes(summary)
    assert f"{len(lines) - 7} lines uploaded" in sync(run.path).stdout
    assert server.runs[id_of(run)].lines() == run.metric_records()
    assert server.runs[id_of(run)].exit_code == 0


def test_a_run_in_training_is_not_synced(run: Run, server: WandbServer) -> None:
    with run.lock():
        outcome = sync(run.path)
    assert (outcome.status, outcome.stdout) == (0, f"{run.path}: is still training; skipped\n")
    assert server.runs == {}
    assert "lines uploaded" in sync(run.path).stdout


def test_syncing_without_a_login_or_a_server_is_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = sync(run.path)
    assert (outcome.status, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("cannot upload: there is no W&B login. Log in with: wandb login (or set")
    assert len(outcome.stderr.splitlines()) == 1
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    outcome = sync(run.path)
    assert outcome.status == 2
    assert "its server 127.0.0.1 cannot be reached" in outcome.stderr


@pytest.mark.parametrize("how", ["hanging", "refusing"])
def test_an_incomplete_upload_is_reported_and_retried(
    run: Run, server: WandbServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    getattr(server, how).add("history")
    with monkeypatch.context() as patch:
        patch.setattr(syncing, "FINISH_SECONDS", 2)
        patch.setattr(syncing, "SHOWN_SECONDS", 0.1)
        outcome = sync(run.path)
    assert (outcome.status, outcome.stdout) == (1, "")
    assert f"{run.path}: the upload is incomplete (" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert not (run.path / "wandb" / "synced.json").exists()
    getattr(server, how).clear()
    outcome = sync(run.path)
    assert outcome.status == 0, outcome.stderr
    assert server.runs[id_of(run)].lines() == run.metric_records()


def test_all_runs_of_a_folder_are_synced_and_a_damaged_one_is_named(run: Run, server: WandbServer) -> None:
    untracked, damaged = (Run(shutil.copytree(run.path, run.path.with_name(name))) for name in ("untracked", "damaged"))
    shutil.rmtree(untracked.path / "wandb")
    damaged.metrics_file.write_text("half a li\n" + damaged.metrics_file.read_text())
    outcome = sync(run.path.parents[1], "--json")
    assert outcome.status == 1
    assert outcome.stderr == f"{damaged.metrics_file}:1: damaged line (Expecting value: line 1 column 1 (char 0))\n"
    found = {Path(one["run"]).name: one for one in json.loads(outcome.stdout)}
    assert {name: one["state"] for name, one in found.items()} == {run.id: "uploaded", "untracked": "untracked"}
    assert found[run.id]["lines"] == len(run.metric_records())
