"""The wheel: it has every file of the package, and works without the source tree in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from toolkit import open_run, open_study

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the source, without a network, and return the folder it is unpacked in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("toolkit", "recipes", "launch"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=LEFT_OUT)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    subprocess.run(build, cwd=source, check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    shutil.rmtree(source)  # nothing may be read from there
    return folder / "unpacked"


def run_in(folder: Path, unpacked: Path, *arguments: str) -> str:
    """Run `python ARGUMENTS` in ``folder`` with the unpacked wheel, and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_the_package(unpacked: Path) -> None:
    files = {
        os.path.relpath(os.path.join(folder, name), ROOT)
        for folder, _, names in os.walk(ROOT / "toolkit", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }
    assert "toolkit/files/recipes/papers/mereu/table08.toml" in files
    assert sorted(file for file in files if not (unpacked / file).is_file()) == []


COMMANDS = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
import toolkit
from toolkit.cli.main import app

def run(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, (arguments, result.exit_code, result.output)
    return result.stdout

assert Path(toolkit.__file__).parent.parent == Path(sys.argv[1])
assert run("recipes", "copy", "quickstart") == "recipes/quickstart.toml\\n"
short = ["--set", "train.epochs=1", "--set", "data.images_per_class=20", "--set", "train.batch_size=32"]
run("validate", "recipes/quickstart.toml")
assert run("new", "digits").endswith("next: toolkit train digits.toml\\n")
run("train", "digits.toml", *short, "--no-report")
path = run("train", "recipes/quickstart.toml", *short, "--no-report").splitlines()[-1]
run("report", path)
assert (Path(path) / "report.html").is_file()
assert "#SBATCH" in run("submit", "recipes/quickstart.toml", "--dry-run", "--time", "1:00:00")
run("study", "digits_seeds", "--plan")
run("models", "resnet")
checks = CliRunner().invoke(app, ["doctor", "--json"])
assert checks.exit_code in (0, 1), checks.output
print(path)
"""


def test_a_first_hour_in_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    path = run_in(tmp_path, unpacked, "-c", COMMANDS, str(unpacked)).split()[-1]
    summary = json.loads((tmp_path / path / "summary.json").read_text())
    assert summary["epochs_run"] == 1


def test_a_ready_recipe_is_trained_by_name_on_two_processes(unpacked: Path, tmp_path: Path) -> None:
    settings = ("train.epochs=1", "data.images_per_class=20", "train.batch_size=32")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "toolkit.train")
    changes = [part for setting in settings for part in ("--set", setting)]
    printed = run_in(tmp_path, unpacked, *launcher, "quickstart", *changes, "--no-report")
    environment = json.loads((tmp_path / printed.split()[-1] / "environment.json").read_text())
    assert environment["processes"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.extended
def test_the_examples_run_in_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    names = ("train_and_look", "mistakes_of_a_run", "compare_runs")  # the second one uses the run of the first
    assert set(names) == {path.stem for path in (ROOT / "docs" / "examples").iterdir()}
    scripts = [str(ROOT / "docs" / "examples" / f"{name}.py") for name in names]
    run_in(tmp_path, unpacked, "-c", "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]", *scripts)
    assert open_run(tmp_path / "runs" / "quickstart").summary["best"]["test_accuracy"] > 0.9
    assert list((tmp_path / "explained").glob("*.png"))
    study = open_study(tmp_path / "runs" / "learning-rates")
    assert study.table["finished"].tolist() == [2, 2, 2]
    assert "lr 0.004" in study.table.index[study.table["best"]]


def test_every_extra_that_a_message_or_page_names_exists() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    code = " ".join(path.read_text() for path in (ROOT / "toolkit").rglob("*.py"))
    text = " ".join(path.read_text() for path in pages)
    named = set(re.findall(r"image-classification-toolkit\[([a-z-]+)\]", code + text))
    named |= set(re.findall(r'missing_package\([^)]*"([a-z-]+)"\)', code))
    named |= set(re.findall(r"extra(?:\]\([^)]*\))?\s+`([a-z-]+)`", text))
    assert {"explain", "export", "parquet", "huggingface", "pcam", "tiff", "remote", "wandb-report", "pandas"} <= named
    assert named <= set(known)
    assert [page.name for page in pages if re.search(r"-e '\.\[(?!dev)", page.read_text())] == []
