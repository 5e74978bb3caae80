"""Recipes that come with the package: toolkit recipes, and their names in other commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from cli import toolkit

from toolkit import ready_recipes
from toolkit.recipe.layers import read_chain

ROOT = Path(__file__).parent.parent
COMPLETE = [path for path in (ROOT / "recipes").rglob("*.toml") if path.parent.name != "base"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_has_every_recipe_with_its_kind_and_description() -> None:
    listed = json.loads(toolkit("recipes", "--json").stdout)
    assert len(listed["recipes"]) == len(COMPLETE) > 70
    for entry in listed["recipes"]:
        data = tomli.loads((ROOT / "recipes" / f"{entry['name']}.toml").read_text())
        assert entry["kind"] == ("study" if "study" in data else "recipe")
        assert entry["description"] in (data["recipe"]["description"], data.get("study", {}).get("description"))
    assert listed["launch"] == [f"launch/{file.name}" for file in sorted((ROOT / "launch").iterdir())]
    assert {"launch/cpu.yaml", "launch/skypilot.yaml", "launch/kubeflow_trainjob.yaml"} <= set(listed["launch"])
    text = toolkit("recipes").stdout
    assert [line.split()[0] for line in text.splitlines()] == [e["name"] for e in listed["recipes"]] + listed["launch"]


@pytest.mark.parametrize("name", ["quickstart", "recipes/quickstart.toml", "quickstart.toml"])
def test_show_prints_the_recipe_as_it_is_written(name: str) -> None:
    assert toolkit("recipes", "show", name).stdout == (ROOT / "recipes" / "quickstart.toml").read_text()
    assert toolkit("recipes", "show", "launch/cpu.yaml").stdout == (ROOT / "launch" / "cpu.yaml").read_text()


def test_copies_of_all_recipes_are_equal_to_the_originals_and_load_without_them(tmp_path: Path) -> None:
    for name in ready_recipes.names():
        files = ready_recipes.copy_files(name, tmp_path / "own")
        assert files[0] == tmp_path / "own" / f"{name}.toml"
        copied, original = (read_chain(folder / f"{name}.toml") for folder in (tmp_path / "own", ROOT / "recipes"))
        assert [layer.data for layer in copied] == [layer.data for layer in original]
    written = [path for path in (tmp_path / "own").rglob("*") if path.is_file()]
    assert len(written) == sum(path.suffix in (".toml", ".py") for path in (ROOT / "recipes").rglob("*"))
    for path in written:
        copy, original = path.read_text(), (ROOT / "recipes" / path.relative_to(tmp_path / "own")).read_text()
        if path.suffix == ".toml":
            (first, *copy_lines), (_, *lines) = copy.splitlines(), original.splitlines()
            assert copy_lines == lines, "comments are kept"
            assert Path(first.removeprefix("#:schema file://")).is_file()
        else:
            assert copy == original


def test_copy_takes_along_what_a_recipe_needs_and_says_what_to_do_next() -> None:
    study = toolkit("recipes", "copy", "digits_bohb")
    assert study.stdout.splitlines() == [
        "recipes/studies/digits_bohb.toml",
        "recipes/studies/digits_search_base.toml",
        "recipes/studies/digits_base.toml",
        "recipes/quickstart.toml",
    ]
    assert study.stderr == "next: toolkit study recipes/studies/digits_bohb.toml\n"
    script = toolkit("recipes", "copy", "two_digits").stdout.split()
    assert script == ["recipes/two_digits.toml", "recipes/two_digits.py"]
    assert toolkit("recipes", "copy", "quickstart", "mine.toml").stdout == "mine.toml\n"
    assert toolkit("recipes", "copy", "launch/cpu.yaml").stdout == "launch/cpu.yaml\n"
    assert Path("launch/cpu.yaml").read_text() == (ROOT / "launch" / "cpu.yaml").read_text()


def test_a_changed_file_is_kept_unless_it_may_be_overwritten() -> None:
    toolkit("recipes", "copy", "convnet_cifar10_dropout")
    changed, base = Path("recipes/convnet_cifar10.toml"), Path("recipes/base/cifar10.toml")
    original = changed.read_text()
    changed.write_text("mine")
    base.unlink()
    refused = toolkit("recipes", "copy", "convnet_cifar10_dropout")
    assert refused.status == 2
    assert refused.stderr == f"{changed}: exists with different content; --overwrite replaces it\n"
    assert changed.read_text() == "mine"
    assert not base.exists(), "nothing is written after a refusal"
    assert toolkit("recipes", "copy", "convnet_cifar10_dropout", "--overwrite").status == 0
    assert changed.read_text() == original
    assert base.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["copy", "quickstrat"], "there is no ready-made recipe 'quickstrat'; did you mean quickstart?"),
        (["show", "digits_seed"], "there is no ready-made recipe 'digits_seed'; did you mean digits_seeds or "),
        (["show", "augmentation"], "did you mean papers/giunta/augmentation or papers/yildiz/augmentation?"),
        (["show", "qqqqq"], "there is no ready-made recipe 'qqqqq'; toolkit recipes lists them"),
        (["copy"], "toolkit recipes copy needs the name of a recipe"),
        (
            ["show", "quickstart", "here"],
            "DEST and --overwrite are only possible with toolkit recipes copy NAME [DEST]",
        ),
        (["list", "quickstart"], "toolkit recipes show quickstart prints a recipe"),
        (
            ["copy", "vgg16_caltech", "x.toml"],
            "also needs papers/mereu/vgg16.toml, base/caltech101.toml",
        ),
    ],
)
def test_wrong_arguments_get_a_message_that_says_what_to_do(arguments: list[str], message: str) -> None:
    outcome = toolkit("recipes", *arguments)
    assert outcome.status == 2
    assert message in outcome.stderr
    assert list(Path().iterdir()) == []


def test_commands_take_the_name_of_a_ready_recipe_where_no_file_has_it() -> None:
    by_name = toolkit("show", "quickstart")
    assert by_name.status == 0
    assert by_name.stderr == f"recipe {ready_recipes.RECIPES / 'quickstart.toml'}\n"
    assert toolkit("validate", "quickstart", "studies/digits_seeds").stdout.count(": ok\n") == 2
    Path("quickstart").write_text('[recipe]\nname = "mine"\n')
    assert "quickstart.toml" not in toolkit("validate", "quickstart").stdout, "an existing file is meant"


def test_a_missing_recipe_that_comes_with_the_package_can_be_copied() -> None:
    outcome = toolkit("train", "recipes/quickstart.toml")
    assert outcome.status == 2
    assert "there is no recipe recipes/quickstart.toml" in outcome.stderr
    assert "toolkit recipes copy quickstart writes recipes/quickstart.toml" in outcome.stderr
    assert "did you mean quickstart?" in toolkit("validate", "quickstrat").stderr


def test_names_are_completed() -> None:
    assert ready_recipes.completions("launch/n") == ["launch/node.yaml", "launch/nodes.yaml"]
    assert ready_recipes.completions("studies/digits_s") == ["studies/digits_search_base", "studies/digits_seeds"]


def test_the_list_needs_neither_torch_nor_the_schema() -> None:
    code = "import sys; from toolkit.cli.main import app; app(['recipes'], standalone_mode=False)"
    code += "; assert not {'torch', 'toolkit.recipe'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
