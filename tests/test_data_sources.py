"""The same images from every source give the same run as from folders: trained, killed and resumed, and used."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from cli import toolkit
from finished import CONVNET, digit_files
from PIL import Image
from pyarrow import parquet
from trainers import Trainers, at_call, kill_self, outcome

from toolkit.cache.store import cache_root
from toolkit.data.dataset_report import analyze_dataset
from toolkit.data.shard_pack import pack
from toolkit.errors import UserError
from toolkit.plugins import register
from toolkit.recipe import load_recipe
from toolkit.recipe.schema import DataConfig
from toolkit.report.run_data import load_run_data
from toolkit.report.run_images import open_run_images
from toolkit.runs import Run, open_run
from toolkit.training.fit import fit
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

RECIPE = """
[recipe]
name = "small"
run_root = {runs}

[data]
{data}
image_size = 8
workers = 0
split = {{ validation = 0.2 }}

[augment]
train = [{{ name = "RandomAffine", degrees = 20 }}]

[optimizer]
name = "sgd"
lr = 0.05

[train]
epochs = 2
batch_size = 16
precision = "no"

[checkpoint]
every_steps = 3

[tracking]
trackers = []
"""

Row = tuple[str, str, str]
"""Path, class and split of an image."""


def rows_of(images: Path) -> list[Row]:
    """List images in the order in which folders are read."""
    found = [(path.relative_to(images).as_posix(), path.parent.name) for path in sorted(images.rglob("*.png"))]
    return sorted(((path, label, path.partition("/")[0]) for path, label in found), key=lambda row: row[2] != "train")


def from_folder(images: Path, folder: Path) -> str:
    return f'dataset = "imagefolder"\nroot = {json.dumps(str(images))}'


def csv_table(rows: list[Row], folder: Path) -> str:
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return f'dataset = "table"\ntable = {json.dumps(str(folder / "labels.csv"))}\ncolumns = {{ split = "split" }}'


def from_csv(images: Path, folder: Path) -> str:
    return csv_table(rows_of(images), images)


def from_json_lines(images: Path, folder: Path) -> str:
    """Write labels as numbers, and the table outside of the folder of the images."""
    lines = [json.dumps({"file": path, "digit": int(label), "part": part}) for path, label, part in rows_of(images)]
    (folder / "labels.jsonl").write_text("\n".join(lines))
    names = {"root": str(images), "table": str(folder / "labels.jsonl")}
    keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in names.items())
    return f'dataset = "table"\n{keys}\ncolumns = {{ label = "digit", split = "part" }}'


def parquet_table(rows: list[Row], images: Path, folder: Path) -> str:
    """Write the images into the table, with their paths as names."""
    table = pa.table({
        "image": [{"bytes": (images / path).read_bytes(), "path": path} for path, _, _ in rows],
        "label": [label for _, label, _ in rows],
        "split": [split for _, _, split in rows],
    })  # fmt: skip
    parquet.write_table(table, folder / "images.parquet", row_group_size=50)
    return f'dataset = "table"\ntable = {json.dumps(str(folder / "images.parquet"))}\ncolumns = {{ split = "split" }}'


def from_parquet(images: Path, folder: Path) -> str:
    return parquet_table(rows_of(images), images, folder)


def from_torchvision(images: Path, folder: Path) -> str:
    """Write the images as those of Food-101."""
    (folder / "food-101/meta").mkdir(parents=True)
    for part in ("train", "test"):
        names: dict[str, list[str]] = {}
        for path, label, _ in (row for row in rows_of(images) if row[2] == part):
            names.setdefault(label, []).append(path.removesuffix(".png"))
            copy = folder / "food-101/images" / f"{names[label][-1]}.jpg"  # PNG, as the decoder will find
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((images / path).read_bytes())
        (folder / f"food-101/meta/{part}.json").write_text(json.dumps(names))
    return f'dataset = "torchvision"\nname = "Food101"\nroot = {json.dumps(str(folder))}'


def from_zip(images: Path, folder: Path) -> str:
    archive = shutil.make_archive(str(folder / "images"), "zip", images)
    return f'dataset = "imagefolder"\nroot = {json.dumps(archive)}'


def from_roots(images: Path, folder: Path) -> str:
    """Write half of the classes to a tar file and half to a folder, whose images have the same order when joined."""
    for path, label, _ in rows_of(images):
        copy = folder / ("low" if int(label) < 5 else "high") / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((images / path).read_bytes())
    roots = [shutil.make_archive(str(folder / "low"), "tar", folder / "low"), str(folder / "high")]
    return f'dataset = "imagefolder"\nroot = {json.dumps(roots)}'


def saved_data_set(rows: list[Row], images: Path, folder: Path) -> str:
    """Save images with their bytes as a data set of Hugging Face; their names are then numbers."""
    classes = datasets.ClassLabel(names=sorted({label for _, label, _ in rows}))
    parts = datasets.DatasetDict()
    for part in ("train", "test"):
        found = [{"image": str(images / path), "label": label} for path, label, split in rows if split == part]
        parts[part] = datasets.Dataset.from_list(found, datasets.Features(image=datasets.Image(), label=classes))
    parts.save_to_disk(folder / "saved")
    return f'dataset = "huggingface"\nname = {json.dumps(str(folder / "saved"))}'


def from_hugging_face(images: Path, folder: Path) -> str:
    return saved_data_set(rows_of(images), images, folder)


def from_shards(images: Path, folder: Path) -> str:
    return shards_of(images, folder, str(folder / "shards"))


def parquet_shards(rows: list[Row], images: Path, folder: Path) -> str:
    """Write the images into several Parquet files, in the order of the rows."""
    (folder / "rows").mkdir()
    for number, start in enumerate(range(0, len(rows), 40)):
        table = pa.table({
            "picture": [(images / path).read_bytes() for path, _, _ in rows[start : start + 40]],
            "label": [label for _, label, _ in rows[start : start + 40]],
            "part": [split for _, _, split in rows[start : start + 40]],
        })  # fmt: skip
        parquet.write_table(table, folder / "rows" / f"{number:05d}.parquet", row_group_size=16)
    columns = 'columns = { image = "picture", split = "part" }'
    return f'dataset = "shards"\nroot = {json.dumps(str(folder / "rows"))}\n{columns}'


def from_parquet_shards(images: Path, folder: Path) -> str:
    return parquet_shards(rows_of(images), images, folder)


def from_url(images: Path, folder: Path) -> str:
    return shards_of(images, folder, f"file://{folder}/shards")


def shards_of(images: Path, folder: Path, root: str) -> str:
    data = DataConfig(dataset="imagefolder", root=str(images))
    pack(data, folder / "shards", 40_000, lambda text: None)
    return f'dataset = "shards"\nroot = {json.dumps(root)}'


class Files:
    """A data set as users write them: names are the files', an item is a Pillow image and the name of its class."""

    version = "1"

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        self.folder, self.names, self.targets = folder, [path for path, _, _ in rows], [label for _, label, _ in rows]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        return Image.open(self.folder / self.names[i]), self.targets[i]


@register("dataset")
def files(folder: str) -> dict[str, Files]:
    rows = rows_of(Path(folder))
    return {split: Files(Path(folder), [row for row in rows if row[2] == split]) for split in ("train", "test")}


def from_plugin(images: Path, folder: Path) -> str:
    return f'dataset = "plugin"\nname = "files"\nargs = {{ folder = {json.dumps(str(images))} }}'


SOURCES: dict[str, Callable[[Path, Path], str]] = {
    "csv": from_csv,
    "json_lines": from_json_lines,
    "parquet": from_parquet,
    "shards": from_shards,
    "parquet_shards": from_parquet_shards,
    "url": from_url,
    "torchvision": from_torchvision,
    "zip": from_zip,
    "roots": from_roots,
    "hugging_face": from_hugging_face,
    "plugin": from_plugin,
}
"""Functions of the folder of the images and one for other files, which return the recipe's lines in [data]."""


def write_recipe(write_data: Callable[[Path, Path], str], images: Path, folder: Path) -> Path:
    data, path = write_data(images, folder), folder / "recipe.toml"
    path.write_text(RECIPE.format(runs=json.dumps(str(folder / "runs")), data=data) + CONVNET)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_files(tmp_path_factory.mktemp("digits") / "images")


def train(processes: int, folder: Path, recipe: Path, *arguments: str, status: int = 0, **named: Any) -> Run:
    trainers = Trainers(processes, folder, recipe, *arguments, **named)
    assert trainers.wait()[0] == status, trainers.text()
    (path,) = (folder / "runs" / "small").iterdir()
    return open_run(path)


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Return the outcome of the run on folders, on one and on two processes."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"folder-{processes}")
        found[processes] = outcome(train(processes, folder, write_recipe(from_folder, images, folder)))
    return found


def same(run: Run, expected: dict[str, Any]) -> None:
    """Compare everything but the recipe's hash, which differs with [data]."""
    found = outcome(run)
    assert found["metrics"] == expected["metrics"]
    assert found["weights"] == expected["weights"]
    prefix = b"(?m)^(food-101/images|low.tar|high)/"
    if re.search(rb"(?m)^(test|\d+\.parquet)/\d+,", found["predictions"]):  # numbers in place of file names
        prefix = b"(?m)^[^,]*,"
    predictions = [re.sub(prefix, b"", one["predictions"]).replace(b".jpg", b".png") for one in (found, expected)]
    assert predictions[0] == predictions[1]


def kill_at_step(step: int, rank: int) -> None:
    at_call(TrainStep, "_update", step, kill_self)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_gives_the_same_run_as_folders(
    source: str, images: Path, expected: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    run = train(1, tmp_path, write_recipe(SOURCES[source], images, tmp_path))
    same(run, expected[1])
    evaluated = toolkit("evaluate", run.path)
    assert "are the same" in evaluated.stdout, evaluated.stderr
    predicted = toolkit("predict", run.path, images / "test")
    rows = list(csv.DictReader(predicted.stdout.splitlines()))
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in run.prediction_records()]
    shown = load_run_data(run)  # a report takes its images from here; figures are the same for all sources
    pictures = open_run_images(run.recipe, shown.preprocessing, shown.classes)
    tests = [images / path for path, _, split in rows_of(images) if split == "test"]
    for row, path in zip(run.prediction_records(), tests, strict=True):
        assert np.array_equal(pictures.load(row["path"])[..., 0], np.asarray(Image.open(path)))


def test_a_report_shows_the_images_of_a_table(images: Path, tmp_path: Path) -> None:
    run = train(1, tmp_path, write_recipe(from_parquet, images, tmp_path))
    reported = toolkit("report", run.path)
    assert reported.status == 0, reported.stderr
    assert "not available" not in reported.stderr


def test_photographs_give_the_same_run_from_every_source(caltech_subset: Path, tmp_path: Path) -> None:
    """Compare Caltech-101 with its official lists, a CSV file, and photographs in Parquet, Arrow and shards."""
    home = caltech_subset / "caltech101"
    photographs = home / "101_ObjectCategories"
    listed = [(path, split) for split in ("train", "test") for path in (home / f"{split}.txt").read_text().split()]
    rows = [(path, path.partition("/")[0], split) for path, split in listed if (photographs / path).is_file()]
    pack(DataConfig(dataset="caltech101", root=str(caltech_subset)), tmp_path / "packed", 2**20, lambda text: None)
    data = {
        "folder": f'dataset = "caltech101"\nroot = {json.dumps(str(caltech_subset))}',
        "csv": f"{csv_table(rows, tmp_path)}\nroot = {json.dumps(str(photographs))}",
        "parquet": parquet_table(rows, photographs, tmp_path),
        "hugging_face": saved_data_set(rows, photographs, tmp_path),
        "shards": f'dataset = "shards"\nroot = {json.dumps(str(tmp_path / "packed"))}',
        "parquet_shards": parquet_shards(rows, photographs, tmp_path),
    }
    found: dict[str, dict[str, Any]] = {}
    for source, lines in data.items():
        (tmp_path / source).mkdir()
        recipe = write_recipe(lambda images, folder, lines=lines: lines, photographs, tmp_path / source)
        settings = ["--set", "data.image_size=16", "--set", "train.epochs=1"]
        run = toolkit("train", recipe, "--no-report", *settings)
        assert run.status == 0, run.stderr
        trained = open_run(run.stdout.splitlines()[-1])
        same(trained, found.setdefault("folder", outcome(trained)))


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, marks=() if source in ("csv", "shards", "url", "plugin") else pytest.mark.extended)
        for source in SOURCES
    ],
)
def test_a_killed_run_continues_as_if_uninterrupted_on_two_processes(
    source: str, images: Path, expected: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = write_recipe(SOURCES[source], images, tmp_path)
    killed = train(2, tmp_path, recipe, status=-9, prepare=partial(kill_at_step, 6))
    same(train(2, tmp_path, recipe, "--resume", str(killed.path)), expected[2])


def test_a_table_whose_rows_changed_is_not_resumed_from(images: Path, tmp_path: Path) -> None:
    """A changed label, and a Parquet file with another image, are found and named."""
    rows = rows_of(images)
    for kind in ("csv", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        data = csv_table(rows, folder) if kind == "csv" else parquet_table(rows, images, folder)
        if kind == "csv":
            data += f"\nroot = {json.dumps(str(images))}"
        recipe = load_recipe(write_recipe(lambda images, folder, data=data: data, images, folder))
        run = fit(recipe, until=1, quiet=True)
        path, _, split = rows[5]
        if kind == "csv":
            csv_table([*rows[:5], (path, "9", split), *rows[6:]], folder)
            expected = "the same images are split differently"
        else:
            changed = tmp_path / "images"
            shutil.copytree(images, changed)
            (changed / path).write_bytes((images / rows[6][0]).read_bytes())
            parquet_table(rows, changed, folder)
            expected = f"1 file(s) replaced: {path}"
        with pytest.raises(UserError, match=re.escape(expected)):
            fit(recipe, resume=run.path, quiet=True)


def test_missing_files_are_named_before_training(tmp_path: Path) -> None:
    """With a wrong folder no file is there, so the message says where the first one should be."""
    rows = [(f"train/{i}.png", str(i % 2), "") for i in range(20)]
    data = csv_table(rows, tmp_path).replace('columns = { split = "split" }', "")
    for recipe_data, expected in ((data, str(tmp_path / "train")), (f'{data}\nroot = "elsewhere"', "elsewhere/train")):
        recipe = load_recipe(write_recipe(lambda images, folder, data=recipe_data: data, tmp_path, tmp_path))
        with pytest.raises(UserError) as caught:
            fit(recipe, quiet=True)
        message = str(caught.value)
        assert message.startswith("20 of 20 images cannot be read: train/")
        assert message.count(".png: no such file (row ") == 10
        assert f"(the first one should be at {expected}/" in message


def test_bad_rows_are_left_out_and_duplicates_found_in_a_table(images: Path, tmp_path: Path) -> None:
    rows = [row for row in rows_of(images) if row[2] == "train"]
    contents = [(images / path).read_bytes() for path, _, _ in rows]
    contents[3], contents[60] = contents[3][:40], contents[12]
    table = pa.table({"image": contents, "label": [label for _, label, _ in rows]})
    parquet.write_table(table, tmp_path / "images.parquet")
    data = f'dataset = "table"\ntable = {json.dumps(str(tmp_path / "images.parquet"))}\non_bad_image = "skip"'
    data += "\nmax_bad_fraction = 0.1"
    recipe = load_recipe(write_recipe(lambda images, folder: data, images, tmp_path))
    run = fit(recipe, quiet=True)
    (left_out,) = run.split["left_out"]
    assert re.fullmatch(r"images\.parquet/4: .*\(row 4 of images\.parquet\)", left_out)
    found = analyze_dataset(recipe, lambda line: None)
    assert found.unreadable[0][0] == "images.parquet/4"
    assert found.duplicates.contradicting == [["images.parquet/13", "images.parquet/61"]]


@pytest.mark.parametrize(
    ("source", "at_once", "limit", "kept"),
    [
        ("url", 2, 4.5 * 30_720, ("*.tar", 4)),  # of 11 shards of this size
        pytest.param(
            *("parquet_shards", 1, 15_700, ("*.images", 3)),  # of 4 shards with 15,855 bytes of images
            marks=pytest.mark.extended,
        ),
    ],
)
def test_a_killed_run_whose_order_needs_few_shards_continues_with_a_cache_for_a_few(
    source: str,
    at_once: int,
    limit: float,
    kept: tuple[str, int],
    images: Path,
    expected: dict[int, dict[str, Any]],
    tmp_path: Path,
) -> None:
    def few_shards(images: Path, folder: Path) -> str:
        keys = f'shuffle_shards = {at_once}\ncache_limit = {limit / 2**30}\ncache = "off"'
        return f"{SOURCES[source](images, folder)}\n{keys}"

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = outcome(train(2, tmp_path / "whole", write_recipe(few_shards, images, tmp_path / "whole")))
    assert whole["weights"] != expected[2]["weights"]
    recipe = write_recipe(few_shards, images, tmp_path / "killed")
    killed = train(2, tmp_path / "killed", recipe, status=-9, prepare=partial(kill_at_step, 6))
    same(train(2, tmp_path / "killed", recipe, "--resume", str(killed.path)), whole)
    caches = [list(entry.glob(kept[0])) for entry in cache_root().iterdir() if entry.name.startswith("shards-")]
    assert [len(shards) for shards in caches if shards] == [kept[1]] * 2
