"""W&B's mode without a prompt, and a server that cannot be reached, or takes no notice. The client is the real one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import free_port

from toolkit.tracking import wandb_mode

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.toml"
KEY = "a" * 40


@pytest.fixture(autouse=True)
def _a_machine_without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def train(tmp_path: Path) -> str:
    """What a short run says; in a process of its own, since W&B's client keeps its settings for the whole process."""
    settings = [f"recipe.run_root={json.dumps(str(tmp_path))}", "train.epochs=1", "data.images_per_class=8",
                "data.test_images_per_class=5", "train.batch_size=16"]  # fmt: skip
    impatient = "import toolkit.tracking, toolkit.train; toolkit.tracking.INIT_SECONDS = 2; toolkit.train.main()"
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-c", impatient, str(QUICKSTART), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_modes_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode("offline") == ("offline", "")
    assert wandb_mode("disabled") == ("disabled", "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == ("disabled", "")


def test_without_a_login_it_is_offline_and_says_how_to_upload(tmp_path: Path) -> None:
    said = train(tmp_path)
    assert "W&B is offline: there is no W&B login" in said
    assert "wandb sync" in said
    assert list(tmp_path.glob("quickstart/*/wandb/offline-run-*/*.wandb"))


def test_a_server_that_is_not_there_leads_to_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    said = train(tmp_path)
    assert "cannot be reached" in said


def test_a_server_that_takes_no_notice_leads_to_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        said = train(tmp_path)
    assert "W&B is offline: its server 127.0.0.1 did not answer within 3 s" in said
    assert "the trackers stopped" not in said
    assert list(tmp_path.glob("quickstart/*/wandb/offline-run-*/*.wandb"))
