"""Commands on recipes, runs and studies with plugins: with the module, and without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli import toolkit
from finished import digit_files
from plugin_modules import TRAINING, unload

from toolkit import load_model, plugins
from toolkit.errors import UserError
from toolkit.metrics import set_direction
from toolkit.runs import Run, open_run

RECIPE = """
[recipe]
name = "small"
run_root = "{root}/runs"

[data]
dataset = "imagefolder"
root = "{root}/data"
image_size = 32
workers = 0

[model]
source = "plugin"
name = "net"

[optimizer]
name = "plugin:own_sgd"
lr = 0.02
momentum = 0.9

[scheduler]
name = "plugin:own_cosine"

[train]
epochs = 1
batch_size = 16
loss = "plugin:own_ce"
metrics = ["plugin:own_error"]
best_metric = "val/own_error"
precision = "no"

[tracking]
trackers = []
"""
STUDY = """
extends = "recipe.toml"

[recipe]
name = "sizes"

[study.grid]
"scheduler.warmup_epochs" = [0.0, 0.5]
"model.args.architecture" = ["test_resnet", "test_convnext"]

[study.output]
columns = ["val_accuracy", "val_own_error", "test_own_error"]
best_by = "val/own_error"

[[study.claims]]
statement = "The ResNet has the lower error."
metric = "test_own_error"
better.model.args.architecture = "test_resnet"
than.model.args.architecture = "test_convnext"
"""

NETWORKS = ("test_resnet", "test_convnext")

METRIC = """

@register("metric", higher_is_better=False)
def own_error():
    return lambda labels, probabilities: (probabilities.argmax(1) != labels).mean()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run with plugins, in a folder that also has its recipe, a study and the module own.py."""
    folder = tmp_path_factory.mktemp("plugins")
    digit_files(folder / "data", 6, 3)
    (folder / "own.py").write_text(TRAINING + METRIC)
    (folder / "recipe.toml").write_text(RECIPE.format(root=folder))
    (folder / "study.toml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as monkeypatch:
        unload(monkeypatch)
        monkeypatch.chdir(folder)
        trained = toolkit("train", "recipe.toml", "--plugin", "own.py", "--no-report")
        assert trained.status == 0, trained.stderr
    return open_run(trained.stdout.split()[-1])


@pytest.fixture(autouse=True)
def in_folder_without_plugins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    unload(monkeypatch)
    monkeypatch.chdir(run.path.parents[2])


def images(run: Run) -> list[str]:
    return [str(path) for path in sorted(run.path.parents[2].glob("data/test/*/*.png"))[:2]]


def test_what_needs_the_model_says_which_plugin_to_load(run: Run) -> None:
    commands = (
        ("predict", str(run.path), *images(run)),
        ("evaluate", str(run.path)),
        ("export", str(run.path), "--format", "safetensors"),
    )
    for command in commands:
        found = toolkit(*command)
        assert found.status == 2
        assert found.stderr.strip().endswith(
            "is the plugin 'net' of own.py: load it with --plugin own.py, or give the function that builds it to "
            "open_run or load_model with model=..."
        )
    with pytest.raises(UserError, match=r"load it with --plugin own\.py"):
        load_model(run.path)
    for command in commands:
        found = toolkit(*command, "--plugin", "own.py")
        assert found.status == 0, found.stderr


@pytest.mark.long
def test_what_reads_results_only_needs_no_plugin(run: Run) -> None:
    for command in ("check", "report"):
        found = toolkit(command, str(run.path))
        assert found.status == 0, found.stderr
    assert toolkit("diff", str(run.path), "recipe.toml").status == 0
    assert run.recipe.train.loss == "plugin:own_ce"


@pytest.mark.long
def test_commands_that_build_the_recipe_take_plugins(run: Run) -> None:
    for command in (("validate",), ("show",), ("plan",), ("train", "--dry-run")):
        found = toolkit(*command, "recipe.toml")
        assert found.status == 2
        assert "model.name: no model plugin 'net' is loaded" in found.stderr
    for command in (("show",), ("plan",), ("train", "--dry-run"), ("bench", "--steps", "2")):
        found = toolkit(*command, "recipe.toml", "--plugin", "own.py")
        assert found.status == 0, found.stderr
    assert toolkit("explain", str(run.path), *images(run), "--plugin", "own.py").status == 0


def test_a_changed_file_is_noted_when_the_model_is_used(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(TRAINING + METRIC + "# changed\n")
    found = toolkit("predict", str(run.path), *images(run), "--plugin", str(tmp_path / "own.py"))
    assert found.status == 0
    assert "own.py has changed since the model net was trained" in found.stderr


@pytest.mark.long
def test_a_study_varies_arguments_of_plugins(run: Run) -> None:
    found = toolkit("study", "study.toml")
    assert found.status == 2
    assert "no model plugin 'net' is loaded" in found.stderr
    found = toolkit("study", "study.toml", "--plugin", "own")
    assert found.status == 0, found.stderr
    plugins.os.environ[plugins.VARIABLE] = ""
    plugins._registered.clear()
    set_direction("own_error", higher_is_better=True)  # as in a process that has not loaded the plugin
    table = toolkit("table", "runs/sizes", "--json", "--sort", "test_own_error")
    assert table.status == 0, table.stderr
    content = json.loads(table.stdout)
    errors = [row["test_own_error"] for row in content["rows"]]
    assert len(errors) == 4
    assert errors == sorted(errors)
    (best,) = [row for row in content["rows"] if row["best"]]
    assert best["val_own_error"] == min(row["val_own_error"] for row in content["rows"])
    of_networks = [[row["test_own_error"] for row in content["rows"] if name in row["row"]] for name in NETWORKS]
    (claim,) = content["claims"]
    assert claim["effect"] == pytest.approx(np.mean(of_networks[1]) - np.mean(of_networks[0]))
    found = toolkit("table", "runs/sizes", "--sort", "test_own_eror")
    assert "--sort test_own_eror: there is no such column; did you mean test_own_error" in found.stderr


def test_an_argument_without_effect_is_found(run: Run) -> None:
    Path("useless.toml").write_text(
        STUDY.partition("[study.output]")[0].replace('"model.args.architecture"', '"scheduler.args.unused"')
    )
    text = (TRAINING + METRIC).replace("def own_cosine(epochs: int,", "def own_cosine(unused: str, epochs: int,")
    Path("unused.py").write_text(text)
    found = toolkit("study", "useless.toml", "--plugin", "unused.py")
    assert found.status == 2
    assert "scheduler.args.unused" in found.stderr


def test_jobs_get_the_modules(run: Run) -> None:
    found = toolkit("submit", "recipe.toml", "--dry-run", "--plugin", "own.py")
    assert found.status == 0, found.stderr
    assert f"export TOOLKIT_PLUGINS={Path('own.py').resolve()}" in found.stdout


def test_plugins_are_listed_with_their_arguments(run: Run) -> None:
    found = toolkit("plugins")
    assert found.status == 2
    assert "no plugins are loaded: name a module with --plugin MODULE" in found.stderr
    found = toolkit("transforms", "--plugins", "--plugin", "own")
    assert (found.status, "no transform plugins are loaded" in found.stderr) == (2, True)
    for command in ("models", "optimizers"):
        listed, everything = (toolkit(*one, "--plugin", "own").stdout for one in ((command, "--plugins"), ("plugins",)))
        of_kind = [line.split() for line in everything.splitlines() if line.startswith(command[:-1])]
        assert [line.split() for line in listed.splitlines()] == of_kind != []
    found = toolkit("models", "--plugins", "--weights", "--plugin", "own")
    assert (found.status, "neither --source nor --weights" in found.stderr) == (2, True)
    lines = toolkit("plugins", "--plugin", "own").stdout.splitlines()
    assert lines[0].split() == ["model", "net", "own", "architecture", "=", '"test_resnet"']
    assert [line.split()[0] for line in lines] == ["model", "loss", "metric", "optimizer", "schedule"]
    assert json.loads(toolkit("plugins", "cosine", "--json", "--plugin", "own").stdout)[0]["file"] == "own.py"
