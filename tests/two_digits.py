"""The data set of recipes/two_digits.toml, as its script writes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def write_two_digits(folder: Path, train: int, validation: int, test: int) -> Path:
    """Write the given numbers of images; return the path of the table."""
    spec = importlib.util.spec_from_file_location("two_digits_recipe", RECIPES / "two_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path: Path = module.write(folder, {"train": train, "validation": validation, "test": test})
    return path
