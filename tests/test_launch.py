"""Training gives the same metrics with every launcher as in one process; each is a real command with two processes.

test_wheel.py also starts two processes by torchrun. test_cli.py and the README's first command, which CI executes,
start `python -m toolkit.train` as a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from cli import toolkit

from toolkit.runs import open_run

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CONFIGURATIONS = [
    path
    for path in sorted((REPOSITORY / "launch").iterdir())
    if path.name not in ("skypilot.yaml", "kubeflow_trainjob.yaml")
]
LAUNCHERS = {
    "accelerate": [
        str(BIN / "accelerate"), "launch", "--config_file", str(REPOSITORY / "launch" / "cpu.yaml"), "-m",
        "toolkit.train",
    ],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--no-python", str(BIN / "toolkit"), "train"],
}  # fmt: skip


def arguments_for(tmp_path: Path) -> list[str]:
    """Return a short training of the quickstart recipe."""
    settings = {
        "recipe.run_root": str(tmp_path),
        "train.epochs": 1,
        "train.precision": "no",
        "data.images_per_class": 8,
        "data.test_images_per_class": 5,
        "train.batch_size": 16,
        "tracking.trackers": [],
        # AdamW would amplify rounding errors.
        "optimizer.name": "sgd",
    }
    recipe = str(REPOSITORY / "recipes" / "quickstart.toml")
    return [
        recipe,
        "--no-report",
        *(p for key, value in settings.items() for p in ("--set", f"{key}={json.dumps(value)}")),
    ]


def started(command: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    command = [*command, *arguments_for(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)


@pytest.mark.parametrize("name", ["accelerate", pytest.param("torchrun", marks=pytest.mark.extended)])
def test_every_launcher_gives_the_same_metrics(tmp_path: Path, name: str) -> None:
    alone = toolkit("train", *arguments_for(tmp_path))
    assert alone.status == 0, alone.stderr
    assert "rank 0 of 1 on " in alone.stderr
    expected = open_run(alone.stdout.strip().splitlines()[-1])
    assert expected.environment["processes"] == 1
    done = started(LAUNCHERS[name], tmp_path)
    assert done.returncode == 0, done.stderr
    run = open_run(done.stdout.strip().splitlines()[-1])
    for rank in range(2):
        assert f"rank {rank} of 2 on " in done.stderr, "start-up names every process"
    assert run.environment["processes"] == 2
    assert run.epoch_records()[0] == pytest.approx(expected.epoch_records()[0], rel=1e-5)


def test_accelerate_reads_the_shipped_configurations() -> None:
    assert [path.stem for path in CONFIGURATIONS] == ["cpu", "gpu", "node", "nodes"]
    for path in CONFIGURATIONS:
        configuration = load_config_from_file(str(path))
        assert configuration.mixed_precision in (None, "no"), "the recipe sets the precision"
        assert path.read_text().startswith("# "), "each starts with a comment"
