"""Recipes of published results (recipes/published) pass a dry run and are listed in the documentation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli import toolkit
from PIL import Image

from toolkit.recipe import load

ROOT = Path(__file__).parent.parent
PUBLISHED = sorted(path.name for path in (ROOT / "recipes" / "published").glob("*.toml"))
IN_DEFAULT_LANE = {"airbench94_cifar10.toml", "kuangliu_cifar10.toml"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight training and two validation images of four classes, random pixels of different sizes."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("a", "b", "c", "d"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (40 + number, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_valid_and_states_its_source(name: str) -> None:
    path = ROOT / "recipes" / "published" / name
    loaded = load(path)
    assert loaded.warnings == []
    assert loaded.recipe.expected_metrics, "the published accuracy"
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    assert "Published" in " ".join(comments)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_DEFAULT_LANE else pytest.mark.extended) for name in PUBLISHED]
)
def test_a_published_recipe_passes_a_dry_run(
    name: str, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / "recipes" / "published" / name
    settings = ['data.dataset="imagefolder"', f"data.root={json.dumps(str(images))}",
                "data.background_class=false", "train.batch_size=4", "train.drop_last=false"]  # fmt: skip
    recipe = load(path).recipe
    split = recipe.data.split
    if recipe.data.dataset.startswith("cifar") and recipe.data.image_size is None:
        settings += ["data.image_size=32"]
    elif "base" in recipe.model.name:  # 86 million parameters
        settings += ["data.image_size=64", "data.resize=64"]
    if split.train_images_per_class:
        settings += ["data.split.train_images_per_class=4", "data.split.validation=4"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    outcome = toolkit("train", path, "--dry-run", "--random-weights", *arguments)
    assert outcome.status == 0, outcome.stderr
    assert "one batch forward and backward, loss" in outcome.stderr
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_the_documentation_lists_every_published_recipe() -> None:
    page = (ROOT / "docs" / "published-recipes.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == [
        name.removesuffix(".toml") for name in PUBLISHED
    ]
