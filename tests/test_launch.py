"""Training gives the same metrics with every launcher, each a real command with its own processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from toolkit.runs import Run, open_run

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CONFIGURATIONS = sorted((REPOSITORY / "launch").glob("*.yaml"))
LAUNCHERS = {
    "python": ([sys.executable, "-m", "toolkit.train"], 1),
    "accelerate": (
        [str(BIN / "accelerate"), "launch", "--config_file", str(REPOSITORY / "launch" / "cpu.yaml"), "-m",
         "toolkit.train"],
        2,
    ),
    "torchrun": ([str(BIN / "torchrun"), "--nproc-per-node", "2", "--no-python", str(BIN / "toolkit"), "train"], 2),
}  # fmt: skip


def started(command: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
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
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    recipe = str(REPOSITORY / "recipes" / "quickstart.toml")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    return subprocess.run(
        [*command, recipe, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240
    )


def test_every_launcher_gives_the_same_metrics(tmp_path: Path) -> None:
    runs: dict[str, Run] = {}
    for name, (command, processes) in LAUNCHERS.items():
        done = started(command, tmp_path)
        assert done.returncode == 0, done.stderr
        runs[name] = open_run(done.stdout.strip().splitlines()[-1])
        for rank in range(processes):
            assert f"rank {rank} of {processes} on " in done.stderr, "start-up names every process"
        assert runs[name].environment["processes"] == processes
    first_epochs = {name: run.epochs()[0] for name, run in runs.items()}
    for name in ("accelerate", "torchrun"):
        assert first_epochs[name] == pytest.approx(first_epochs["python"], rel=1e-5)


def test_accelerate_reads_the_shipped_configurations() -> None:
    assert [path.stem for path in CONFIGURATIONS] == ["cpu", "gpu", "node", "nodes"]
    for path in CONFIGURATIONS:
        configuration = load_config_from_file(str(path))
        assert configuration.mixed_precision in (None, "no"), "the recipe sets the precision"
        assert path.read_text().startswith("# "), "each starts with a comment"
