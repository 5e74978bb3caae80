"""`toolkit sweep`: a study as a W&B sweep, and a run that W&B's agent would start from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from cli import toolkit
from studies import GRID, write_study
from wandb_server import logged_in_here

from toolkit.errors import Interrupted
from toolkit.recipe import load_recipe
from toolkit.runs import Run
from toolkit.trackers import _close

SPACE = """
[study.space]
optimizer.lr = { log_uniform = [1e-5, 0.1] }
optimizer.weight_decay = { uniform = [0, 0.01] }
train.batch_size = { integers = [8, 16] }
train.drop_last = { choice = [true, false] }
optimizer.name = { choice = ["sgd", "adamw"] }
"""

RANDOM = "[study.random]\nruns = 7\n" + SPACE
BOHB = '[study.bohb]\ntrials = 9\nmin_epochs = 1\nmax_epochs = 4\neta = 2\nmetric = "val/loss"\n' + SPACE


def sweep_of(folder: Path, study: str, *arguments: str) -> dict[str, Any]:
    """Write a study and its sweep to ``folder``; return the sweep's configuration."""
    outcome = toolkit("sweep", str(write_study(folder, study)), "-o", str(folder / "sweep.yaml"), *arguments)
    assert outcome.status == 0, outcome.stderr
    return yaml.safe_load((folder / "sweep.yaml").read_text())


def message_of(folder: Path, study: str, *arguments: str) -> str:
    """Return the message of a study that cannot be a sweep."""
    outcome = toolkit("sweep", str(write_study(folder, study)), "-o", str(folder / "sweep.yaml"), *arguments)
    assert outcome.status == 2
    assert not (folder / "sweep.yaml").exists()
    assert not (folder / "sweep.toml").exists()
    return outcome.stderr


def test_a_random_search_has_the_same_distributions(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, RANDOM)
    assert (sweep["method"], sweep["run_cap"]) == ("random", 7)
    assert sweep["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    assert "early_terminate" not in sweep
    assert sweep["parameters"] == {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 0.1},
        "optimizer.weight_decay": {"distribution": "uniform", "min": 0.0, "max": 0.01},
        "train.batch_size": {"distribution": "int_uniform", "min": 8, "max": 16},
        "train.drop_last": {"values": [True, False]},
        "optimizer.name": {"values": ["sgd", "adamw"]},
    }


def test_bohb_becomes_a_bayesian_search_with_hyperband(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, BOHB)
    assert (sweep["method"], sweep["run_cap"]) == ("bayes", 9)
    assert sweep["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert sweep["early_terminate"] == {"type": "hyperband", "min_iter": 1, "eta": 2}
    assert sweep["parameters"]["train.epochs"] == {"value": 4}


def test_a_grid_has_all_values_and_seeds_and_runs_on_several_processes(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, GRID, "--processes", "2")
    assert sweep["method"] == "grid"
    assert sweep["parameters"] == {
        "optimizer.lr": {"values": [0.2, 0.1, 0.05]},
        "optimizer.momentum": {"values": [0.5, 0.9]},
        "recipe.seed": {"values": [0, 1]},
    }
    assert sweep["command"][:5] == ["${env}", "torchrun", "--standalone", "--nproc-per-node=2", "-m"]


def test_the_recipe_is_the_study_without_what_varies_and_logs_to_wandb(tmp_path: Path) -> None:
    sweep_of(tmp_path, GRID)
    recipe = load_recipe(tmp_path / "sweep.toml")
    assert (recipe.recipe.name, recipe.study, recipe.tracking.trackers) == ("small-sweep", None, ["wandb"])
    assert recipe.model == load_recipe(tmp_path / "study.toml").model


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ('[[study.rows]]\nname = "a"\nset.optimizer.lr = 0.1\n', "study.rows changes several keys together"),
        (
            '[study.grid]\noptimizer.name = ["sgd", "adamw"]\n'
            'optimizer.momentum = { values = [0.5, 0.9], when = { optimizer.name = "sgd" } }\n',
            "optimizer.momentum depends on other keys (when)",
        ),
        ("[study]\nseeds = 3\n" + RANDOM, "study.seeds repeats each configuration of study.random"),
    ],
)
def test_what_a_sweep_cannot_express_is_one_message(tmp_path: Path, study: str, message: str) -> None:
    text = message_of(tmp_path, study)
    assert message in text
    assert "run the study here: toolkit study " in text
    assert len(text.splitlines()) == 1


def test_other_mistakes_are_reported_before_anything_is_written(tmp_path: Path) -> None:
    assert "has no [study] table" in message_of(tmp_path, "")
    assert 'tracking.mode = "offline"' in message_of(tmp_path, RANDOM, "--set", 'tracking.mode="offline"')
    assert "unknown optimizer" in message_of(tmp_path, RANDOM.replace('"adamw"', '"adamww"'))
    sweep_of(tmp_path, RANDOM)
    again = toolkit("sweep", str(tmp_path / "study.toml"), "-o", str(tmp_path / "sweep.yaml"))
    assert "sweep.yaml exists already" in again.stderr


def test_the_paths_and_the_next_command_are_printed_as_json(tmp_path: Path) -> None:
    files = {"sweep": str(tmp_path / "sweep.yaml"), "recipe": str(tmp_path / "sweep.toml")}
    outcome = toolkit("sweep", str(write_study(tmp_path, GRID)), "-o", files["sweep"], "--json")
    assert json.loads(outcome.stdout) == {**files, "next": f"wandb sweep {files['sweep']}"}


def test_set_takes_a_json_object(tmp_path: Path) -> None:
    recipe = write_study(tmp_path, "")
    values = '{"optimizer.lr": 1e-05, "optimizer.name": "adamw", "train.drop_last": true, "tracking": {"trackers": []}}'
    shown = toolkit("show", str(recipe), "--set", values).stdout
    assert "lr = 1e-05" in shown
    assert 'name = "adamw"' in shown
    assert "drop_last = true" in shown
    for wrong in ('{"optimizer.lr": null}', '{"optimizer.lr": ', '{"recipe.description": "\\ud800"}', '{"a b": 1}'):
        outcome = toolkit("show", str(recipe), "--set", wrong)
        assert outcome.status == 2
        assert "error: " in outcome.stderr


def test_w_and_b_does_not_restart_a_run_that_its_sweep_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    for sweep, expected in (("", ["mark_preempting", "finish"]), ("s1", ["finish"])):
        if sweep:
            monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        client = Mock()
        _close(SimpleNamespace(name="wandb", tracker=client), Interrupted.exit_status)
        assert [name for name, _, _ in client.method_calls] == expected


@pytest.mark.extended
@pytest.mark.long
def test_wandbs_agent_trains_with_the_servers_values_as_a_run_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(tmp_path, RANDOM, "--set", "tracking.upload=[]")
    values = {"optimizer.lr": 1e-05, "optimizer.name": "adamw", "train.batch_size": 9, "train.drop_last": True}
    arguments = {key: {"value": value} for key, value in values.items()}
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with logged_in_here(monkeypatch) as server:
        server.agent_commands = [{"type": "run", "run_id": "r1", "program": sweep["program"], "args": arguments}]
        for command in (["sweep", "sweep.yaml"], ["agent", "--count", "1", "me/p/s1"]):
            done = subprocess.run(
                [sys.executable, "-m", "wandb", *command], cwd=tmp_path, capture_output=True, text=True, timeout=200
            )
            assert done.returncode == 0, done.stdout + done.stderr
        assert yaml.safe_load(server.sweep) == sweep
        (logged,) = server.runs.items()

    (path,) = (tmp_path / "runs" / "small-sweep").iterdir()
    recipe = Run(path).recipe
    assert (recipe.optimizer.lr, recipe.optimizer.name, recipe.train.batch_size) == (1e-05, "adamw", 9)
    assert recipe.train.drop_last
    name, received = logged
    assert (name, received.exit_code) == ("r1", 0)
    metrics = [line[sweep["metric"]["name"]] for line in received.lines() if sweep["metric"]["name"] in line]
    assert metrics == [record["val/accuracy"] for record in Run(path).epoch_records()]
