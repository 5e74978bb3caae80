"""toolkit train DATA: a recipe is written and trained in one go, the same one on all processes, and kept in the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import toolkit
from distributed import launch
from image_folders import write_images

from toolkit.errors import UserError
from toolkit.new_recipe import training
from toolkit.new_recipe.training import recipe_for_training
from toolkit.recipe import loads_recipe, resolved_toml
from toolkit.runs import Run, create_run, open_run

SETTINGS = ("--set", "train.epochs=1", "--set", "tracking.trackers=[]", "--no-report")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write images of digits in class folders, and make their parent the working directory."""
    write_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return Path("images")


def test_a_folder_is_trained_and_its_recipe_kept(images: Path) -> None:
    done = toolkit("train", str(images), *SETTINGS, "--json")
    assert done.status == 0, done.stderr
    assert "images: 4 classes, 60 images (60 train), 8x8 pixels" in done.stderr
    run = open_run(json.loads(done.stdout)["run"])
    assert run.path.parent == Path("runs/images")
    text = (run.path / "written_recipe.toml").read_text()
    assert "# 60 images, 15 of the smallest class" in text
    given = loads_recipe(text, ["train.epochs=1", "tracking.trackers=[]"])
    assert run.recipe == given
    assert not list(Path().glob("*.toml")), "only the run has it"
    assert run.origins["keys"]["data.root"].startswith("images.toml:")


def unfinished_run(text: str) -> Run:
    run = create_run("runs", "images")
    run.write_text("recipe.toml", text)
    run.write_text("written_recipe.toml", text)
    return run


def test_resuming_uses_the_recipe_of_the_unfinished_run(images: Path) -> None:
    def written(*, resume: bool) -> str:
        return recipe_for_training(str(images), resume="auto" if resume else None, log=lambda line: None).text

    new = written(resume=False)
    assert written(resume=True) == new, "there is no run yet"
    unfinished_run(new.replace("batch_size = 8", "batch_size = 4"))
    assert "batch_size = 4" in written(resume=True)
    assert written(resume=False) == new


@pytest.mark.parametrize("named", [False, True], ids=["auto", "RUN"])
def test_resuming_keeps_the_recipe_of_a_run_in_another_folder(images: Path, named: bool) -> None:
    overrides = ['recipe.run_root="elsewhere"', 'recipe.name="mine"', "train.epochs=1", "tracking.trackers=[]"]
    written = recipe_for_training(str(images), resume=None, log=lambda line: None).text
    written = written.replace("batch_size = 8", "batch_size = 4")
    run = create_run("elsewhere", "mine")
    run.write_text("recipe.toml", resolved_toml(loads_recipe(written, overrides)))
    run.write_text("written_recipe.toml", written)
    before = {path.name: path.read_bytes() for path in run.path.glob("*.toml")}
    options = [part for override in overrides for part in ("--set", override)]
    resume = str(run.path) if named else "auto"
    done = toolkit("train", str(images), *options, "--resume", resume, "--no-report", "--json")
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(run.path)
    assert {path.name: path.read_bytes() for path in run.path.glob("*.toml")} == before
    assert not Path("runs").exists()


def test_all_processes_use_the_recipe_of_the_main_one(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = training.new_recipe

    def only_once(*arguments: object, **options: object) -> object:
        assert os.environ["RANK"] == "0", "only the main process looks at the data"
        return write(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "new_recipe", only_once)
    first, second = launch(2, recipe_for_data, str(images))
    assert first == second
    assert "toolkit new images --goal accuracy --processes 2" in first
    errors = launch(2, recipe_for_data, "missing/")
    assert errors[0] == errors[1]
    assert "missing/ is neither a file or folder" in errors[0]


def recipe_for_data(argument: str) -> str:
    try:
        return recipe_for_training(argument, resume=None, log=lambda line: None).text
    except UserError as error:
        return str(error)


@pytest.mark.long
def test_two_processes_train_a_folder(images: Path) -> None:
    main, other = launch(2, toolkit, "train", str(images), *SETTINGS, "--json")
    assert (main.status, other.status) == (0, 0), main.stderr
    check_two_processes(json.loads(main.stdout)["run"])


def check_two_processes(path: str) -> None:
    run = open_run(path)
    assert run.processes == 2
    assert (run.path / "written_recipe.toml").is_file()
    assert len(list(Path("runs/images").iterdir())) == 1


@pytest.mark.long
@pytest.mark.extended
def test_torchrun_trains_a_folder(images: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "toolkit.train", str(images), *SETTINGS, "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    check_two_processes(json.loads(done.stdout)["run"])


def test_a_recipe_file_without_its_suffix_is_still_a_recipe(images: Path) -> None:
    refused = toolkit("train", "recipes/mistyped")
    assert refused.status == 2
    assert "recipes/mistyped" in refused.stderr
    assert "data set" not in refused.stderr


def test_a_run_directory_is_not_data(images: Path) -> None:
    run = unfinished_run("")
    refused = toolkit("train", str(run.path))
    assert refused.status == 2
    assert f"to resume it: --resume {run.path}" in refused.stderr
