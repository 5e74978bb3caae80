"""The JSON Schema for editors and the reference page are up to date, valid, and consistent with the loader."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli

from toolkit.recipe import RecipeError, loads_recipe, resolved_toml
from toolkit.recipe.docs_generator import FILE as PAGE
from toolkit.recipe.docs_generator import updated
from toolkit.recipe.jsonschema import FILE, schema_text
from toolkit.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
BROKEN = ROOT / "tests" / "broken"
SCHEMA = json.loads(FILE.read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)

FOUND_BY_SCHEMA = (
    "unknown-table", "unknown-key", "key-of-another-table", "wrong-types", "table-is-a-number", "out-of-range",
    "unknown-dataset", "unions-in-one-message", "name-leaves-the-run-root", "unknown-torchvision-model",
    "model-of-another-source", "unknown-timm-model", "timm-tag-in-name", "model-args-that-load-files",
    "unknown-transform", "excluded-transform", "transform-arguments", "unknown-optimizer", "excluded-optimizer",
    "optimizer-arguments", "watching-mixed-accuracy", "unknown-metric", "tracking-names", "extends-is-a-list",
    "wide-characters", "several-faults-at-once",
)  # fmt: skip
"""The broken recipes that an editor underlines; the others break rules between tables or files, or are not TOML."""


def schema_errors(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(tomli.loads(text))]


def test_the_committed_schema_is_up_to_date_and_valid() -> None:
    assert schema_text() == FILE.read_text(encoding="utf-8"), "run python -m toolkit.recipe.jsonschema"
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_every_key_has_a_description_and_none_is_required_outside_lists() -> None:
    def visit(node: dict[str, Any], path: str, in_list: bool) -> None:
        assert in_list or "required" not in node, path
        for key, value in node.get("properties", {}).items():
            assert value.get("description"), f"{path}.{key}"
            assert "$ref" not in json.dumps(value)
            visit(value, f"{path}.{key}", in_list)
        if isinstance(node.get("items"), dict):
            visit(node["items"], f"{path}[]", True)

    visit(SCHEMA, "", False)
    assert set(SCHEMA["properties"]) == {"extends", *Recipe.model_fields}
    assert SCHEMA["properties"]["train"]["properties"]["epochs"]["description"].endswith("Unit: epochs.")
    assert SCHEMA["properties"]["train"]["properties"]["grad_accum_steps"]["default"] == 1


@pytest.mark.parametrize("name", FOUND_BY_SCHEMA)
def test_the_schema_rejects_the_broken_recipes(name: str) -> None:
    (path,) = BROKEN.glob(f"[0-9][0-9]-{name}.toml")
    assert schema_errors(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(BROKEN.glob("*.toml")), ids=lambda path: path.stem)
def test_the_schema_is_never_stricter_than_the_loader(path: Path) -> None:
    """The schema accepts every recipe that the loader accepts, with or without warnings."""
    try:
        recipe = loads_recipe(path.read_text(encoding="utf-8"))
    except RecipeError:
        return
    assert schema_errors(path.read_text(encoding="utf-8")) == []
    assert schema_errors(resolved_toml(recipe)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_match_the_schema_and_refer_to_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert schema_errors(text) == []
    match = re.match(r"#:schema (\S+)\n", text)
    assert match, "the first line is not #:schema PATH"
    assert (path.parent / match[1]).resolve() == FILE


def test_a_partial_recipe_matches_the_schema() -> None:
    assert schema_errors('extends = "base.toml"\n[train]\nepochs = 3\n[model.head]\nhidden = []\n') == []
    assert schema_errors('[recipe]\nname = "Größe 3.5"\n') == []
    assert schema_errors('[recipe]\nname = "../x"\n')
    assert schema_errors("[augment]\ntrain = [{ p = 0.5 }]\n")


def test_the_reference_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert updated(page) == page, "run python -m toolkit.recipe.docs_generator"
    for name, table in Recipe.model_fields.items():
        assert f"### `[{name}" in page
        for key in getattr(table.annotation, "model_fields", {}):
            assert f"| `{key}` |" in page


def test_examples_on_the_reference_page_are_valid_recipes() -> None:
    examples = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    complete, child = examples
    assert schema_errors(complete) == schema_errors(child) == []
    recipe = loads_recipe(complete)
    assert (recipe.model.name, recipe.train.precision) == ("resnet50", "bf16")
    assert tomli.loads(child)["extends"] == "base/caltech101.toml"


def taplo(*paths: Path) -> tuple[int, str]:
    """Return Taplo's exit status and messages; it reads the schema named in each file's first line."""
    program = shutil.which(
        "taplo", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if program is None:
        missing = "taplo is not installed (pip install taplo)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    result = subprocess.run([program, "lint", *map(str, paths)], capture_output=True, text=True, cwd=paths[0].parent)
    return result.returncode, result.stderr


def test_taplo_accepts_the_shipped_recipes() -> None:
    recipes = sorted((ROOT / "recipes").rglob("*.toml"))
    status, messages = taplo(*recipes)
    assert status == 0, messages


def test_taplo_rejects_the_broken_recipes(tmp_path: Path) -> None:
    copies = []
    for name in FOUND_BY_SCHEMA:
        (source,) = BROKEN.glob(f"[0-9][0-9]-{name}.toml")
        copies.append(tmp_path / source.name)
        copies[-1].write_text(f"#:schema {FILE.as_uri()}\n{source.read_text(encoding='utf-8')}", encoding="utf-8")
    status, messages = taplo(*copies)
    assert status != 0
    assert [path.name for path in copies if path.name not in messages] == []
