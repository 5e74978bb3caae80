"""Golden files: every recipe of tests/broken gives exactly the messages in the text file of the same name.

After an intended change of messages, rewrite the text files with ``TOOLKIT_WRITE_GOLDEN=1 pytest
tests/test_recipe_broken.py`` and read the difference. Leading lines ``# set: ARGUMENT`` are ``--set`` arguments.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from toolkit.recipe import RecipeError, load

FOLDER = Path(__file__).parent / "broken"
RECIPES = sorted(path.name for path in FOLDER.glob("*.toml"))


def messages(name: str) -> str:
    lines = Path(name).read_text(encoding="utf-8").splitlines()
    arguments = [line.removeprefix("# set: ") for line in lines if line.startswith("# set: ")]
    try:
        loaded = load(name, arguments)
    except RecipeError as error:
        return f"{error}\n"
    return "".join(f"{warning}\n" for warning in loaded.warnings)


@pytest.mark.parametrize("name", RECIPES)
def test_messages_are_as_expected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    found = messages(name)
    golden = Path(name).with_suffix(".txt")
    if os.environ.get("TOOLKIT_WRITE_GOLDEN"):
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text(encoding="utf-8")
    assert found, "a broken recipe without a message"


def test_there_are_at_least_forty_and_no_stray_files() -> None:
    assert len(RECIPES) >= 40
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == [name.removesuffix(".toml") for name in RECIPES]
