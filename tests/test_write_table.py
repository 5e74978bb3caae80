"""`toolkit data RECIPE --write-table`: the table gives back the same classes, images, splits and run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli import Outcome, toolkit
from image_folders import write_images, write_recipe
from PIL import Image
from trainers import outcome

from toolkit.data.datasets import open_dataset
from toolkit.data.encoded_sources import read_bytes
from toolkit.data.image_sources import EncodedImages
from toolkit.data.splits import split_dataset, split_hash
from toolkit.data.table_writer import write_table
from toolkit.recipe import Recipe, load_recipe, loads_recipe
from toolkit.recipe.toml_writer import toml_document
from toolkit.runs import Run, open_run

FORMATS = ("csv", "tsv", "jsonl", "parquet")
RECIPE = {
    "recipe": {"name": "small"}, "model": {"source": "timm", "name": "resnet18"},
    "optimizer": {"name": "sgd", "lr": 0.1}, "train": {"epochs": 1, "batch_size": 2, "best_metric": "last"},
}  # fmt: skip
DIGITS = Path(__file__).parent.parent / "recipes" / "quickstart.toml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe on 60 digits in the folders c0 to c3, whose splits are drawn."""
    folder = tmp_path_factory.mktemp("folders")
    write_images(folder / "data")
    return write_recipe(folder)


def reading(outcome: Outcome, recipe: Path, folder: Path) -> Path:
    """Return a copy of a recipe with the printed [data] table."""
    assert outcome.status == 0, outcome.stderr
    lines = recipe.read_text().splitlines()
    start = lines.index("[data]")
    end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith("["))
    path = folder / "table.toml"
    path.write_text("\n".join([*lines[:start], outcome.stdout, *lines[end:]]))
    return path


def contents(recipe: Recipe) -> tuple[list[str], str]:
    dataset = open_dataset(recipe.data)
    return dataset.classes, split_hash(dataset, split_dataset(dataset, recipe.data))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_table_gives_back_classes_images_and_drawn_splits(kind: str, recipe: Path, tmp_path: Path) -> None:
    outcome = toolkit("data", recipe, "--write-table", tmp_path / f"new.{kind}")
    table = reading(outcome, recipe, tmp_path)
    assert contents(load_recipe(table)) == contents(load_recipe(recipe))
    assert load_recipe(table).data.image_size == 8, "other keys of [data] stay"


def trained(recipe: Path, *settings: str) -> Run:
    outcome = toolkit("train", recipe, "--no-report", "--set", "train.epochs=1", *settings)
    assert outcome.status == 0, outcome.stderr
    return open_run(outcome.stdout.splitlines()[-1])


@pytest.mark.long
def test_training_on_the_table_is_bit_identical(recipe: Path, tmp_path: Path) -> None:
    augment = ("--set", 'augment.train=[{ name = "RandomAffine", degrees = 20 }]')
    table = reading(toolkit("data", recipe, "--write-table", tmp_path / "new.csv"), recipe, tmp_path)
    expected, found = outcome(trained(recipe, *augment)), outcome(trained(table, *augment))
    for part in ("metrics", "weights", "predictions"):
        assert found[part] == expected[part]


@pytest.mark.long
def test_images_in_memory_are_stored_in_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    refused = toolkit("data", DIGITS, "--write-table", tmp_path / "digits.csv")
    assert refused.status == 2
    assert "choose a name that ends in .parquet" in refused.stderr
    table = reading(toolkit("data", DIGITS, "--write-table", tmp_path / "digits.parquet"), DIGITS, tmp_path)
    run_root = ("--set", f"recipe.run_root={json.dumps(str(tmp_path / 'runs'))}")
    expected, found = outcome(trained(DIGITS, *run_root)), outcome(trained(table, *run_root))
    assert found["metrics"] == expected["metrics"]


def test_images_in_a_zip_file_are_stored_in_parquet_unchanged(recipe: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", load_recipe(recipe).data.root)
    root = [f"data.root={json.dumps(archive)}"]
    refused = toolkit("data", recipe, "--set", *root, "--write-table", tmp_path / "new.csv")
    assert refused.status == 2
    assert "are not separate files" in refused.stderr
    outcome = toolkit("data", recipe, "--set", *root, "--write-table", tmp_path / "new.parquet")
    found = load_recipe(reading(outcome, recipe, tmp_path))
    assert contents(found) == contents(load_recipe(recipe, root))
    stored, files = (open_dataset(each.data).images for each in (found, load_recipe(recipe)))
    assert isinstance(stored, EncodedImages)
    assert isinstance(files, EncodedImages)
    by_name = {files.name(i): read_bytes(files.source, i) for i in range(len(files))}
    assert all(read_bytes(stored.source, i) == by_name[stored.name(i)] for i in range(len(stored)))


def test_a_table_is_written_again_with_its_groups_and_weights(tmp_path: Path) -> None:
    """The rows are in another order than the splits, and the classes are not sorted."""
    rng = np.random.default_rng(0)
    rows = []
    for i, label in enumerate("baba"):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        split = "test" if i < 2 else "train"
        rows.append(
            {"image": f"{i}.png", "label": label, "split": split, "patient": f"p{i // 2}", "w": 0.1 * i, "age": i}
        )
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_recipe(tmp_path)
    columns = '{ split = "split", group = "patient", weight = "w", keep = ["patient", "age"] }'
    settings = ['data.dataset="table"', f"data.table={json.dumps(str(tmp_path / 'own.jsonl'))}",
                f"data.columns={columns}", f"data.root={json.dumps(str(tmp_path))}", "data.split.validation=0",
                "train.best_metric='last'", 'data.class_names=["b", "a"]']  # fmt: skip
    given = [part for setting in settings for part in ("--set", setting)]
    for kind in FORMATS:
        outcome = toolkit("data", path, *given, "--write-table", tmp_path / kind / f"new.{kind}")
        found = load_recipe(reading(outcome, path, tmp_path), ["train.best_metric='last'"])
        dataset = open_dataset(found.data)
        assert dataset.classes == ["b", "a"]
        assert [dataset.images.name(i) for i in range(4)] == ["2.png", "3.png", "0.png", "1.png"]
        assert dataset.labels.tolist() == [0, 1, 0, 1]
        assert dataset.weights is not None
        assert dataset.weights.tolist() == [0.1 * i for i in (2, 3, 0, 1)]
        assert {name: [values[i] for i in range(4)] for name, values in dataset.kept.items()} == {
            "patient": ["p1", "p1", "p0", "p0"], "age": ["2", "3", "0", "1"]
        }  # fmt: skip
        assert dataset.groups is not None
        assert dataset.groups[0] == dataset.groups[1] != dataset.groups[2] == dataset.groups[3]
        assert {split: x.tolist() for split, x in split_dataset(dataset, found.data).items()} == {
            "train": [0, 1], "validation": [], "test": [2, 3]
        }  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_several_labels_per_image_or_none_are_written(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i, labels in enumerate((["b", "a;c"], [], ["b"], ["z", "a;c"], [], ["z"])):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": labels, "split": "train" if i < 4 else "test"})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset": "table", "table": str(tmp_path / "own.jsonl"), "columns": {"split": "split"},
        "class_names": ["z", "b", "a;c"], "image_size": 64, "split": {"validation": 0},
    }  # fmt: skip
    recipe = loads_recipe(toml_document({**RECIPE, "data": data}))
    found = loads_recipe(toml_document(RECIPE) + write_table(recipe, tmp_path / f"new.{kind}"))
    assert contents(found) == contents(recipe)
    assert open_dataset(found.data).labels.tolist() == [
        [0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 0, 0]
    ]  # fmt: skip


def test_names_that_a_table_cannot_hold_are_refused(recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(load_recipe(recipe).data.root, data)
    (data / "c3").rename(data / "c3 ")
    own = write_recipe(tmp_path)
    outcome = toolkit("data", own, "--write-table", tmp_path / "new.csv")
    assert outcome.status == 2
    assert "does not give the same classes" in outcome.stderr
    (data / "c3 ").rename(data / "caf\udce9")
    for kind in ("csv", "jsonl"):
        found = load_recipe(reading(toolkit("data", own, "--write-table", tmp_path / f"new.{kind}"), own, tmp_path))
        assert contents(found) == contents(load_recipe(own))
    outcome = toolkit("data", own, "--write-table", tmp_path / "new.parquet")
    assert outcome.status == 2
    assert "a Parquet file cannot contain names that are not UTF-8" in outcome.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [("new.xlsx", "the name must end in .csv, .tsv"), ("file/x.csv", "x.csv cannot be written")],
)
def test_files_that_cannot_be_written_are_refused(name: str, message: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = toolkit("data", recipe, "--write-table", tmp_path / name)
    assert outcome.status == 2
    assert message in outcome.stderr
