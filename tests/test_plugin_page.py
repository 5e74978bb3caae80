"""The examples of docs/plugins.md are executed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from cli import toolkit
from distributed import launch
from finished import digit_files
from plugin_modules import unload

from toolkit.runs import open_run

ROOT = Path(__file__).resolve().parent.parent
CPU = str(ROOT / "launch" / "cpu.yaml")
PAGE = (ROOT / "docs" / "plugins.md").read_text()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the files of the page, whose first line is a comment with the name, to the current folder."""
    unload(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(text)
    assert {path.name for path in tmp_path.iterdir()} >= {"my.toml", "my_net.py", "my_train.py"}
    return tmp_path


def shown(command: str) -> str:
    """Return the output that the page shows for a command."""
    found = re.search(rf"^    \$ {re.escape(command)}\n((?:    .*\n)+)", PAGE, re.MULTILINE)
    assert found is not None
    return re.sub("^    ", "", found[1], flags=re.MULTILINE)


@pytest.mark.long
def test_the_examples_give_the_output_that_is_shown(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = toolkit("train", "my.toml", "--plugin", "my_net", "--no-report")
    assert trained.status == 0, trained.stderr
    command = "toolkit validate my.toml --plugin my_net --set model.args.width=1.5"
    found = toolkit(*command.split()[1:])
    assert found.stderr + found.stdout == shown(command)
    assert toolkit("plugins", "--plugin", "my_net").stdout == shown("toolkit plugins --plugin my_net")
    command = "toolkit schema --plugin my_net -o my.schema.json"
    assert toolkit(*command.split()[1:]).stdout == shown(command)
    unload(monkeypatch)
    digit_files(files / "data", 1, 1)
    found = toolkit("predict", "runs/tiny", str(next(files.glob("data/test/0/*.png"))))
    run = re.compile(r"\d{8}-\d{6}-\w{4}")
    assert run.sub("RUN", found.stderr) == run.sub("RUN", shown("toolkit predict runs/tiny image.png"))


def print_of_the_script() -> str:
    """Run the script as a launcher does, in this process, and return what it prints."""
    sys.argv = ["my_train.py", "my.toml"]
    sys.path.insert(0, os.getcwd())
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        runpy.run_path("my_train.py", run_name="__main__")
    return shown.getvalue()


def check(files: Path, printed: str) -> None:
    run = open_run(next((files / "runs" / "tiny").iterdir()))
    assert run.summary["processes"] == 2
    assert run.recipe.model.name == "linear"
    assert f"{run.summary['best']['test_accuracy']}\n" in printed


@pytest.mark.long
def test_the_script_is_short_and_runs_on_two_processes(files: Path) -> None:
    assert len((files / "my_train.py").read_text().splitlines()) <= 15
    check(files, "".join(launch(2, print_of_the_script)))


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], marks=pytest.mark.slow),
        pytest.param(["accelerate.commands.launch", "--config_file", CPU], marks=pytest.mark.extended),
    ],
    ids=["torchrun", "accelerate"],
)
def test_the_script_runs_under_a_launcher(files: Path, launcher: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, "my_train.py", "my.toml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check(files, done.stdout)
