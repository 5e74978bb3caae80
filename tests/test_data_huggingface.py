"""Data sets of the library `datasets`: from folders, files and its cache, with splits, classes and other columns."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, Features, List, Value
from finished import digit_files

from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.huggingface_source import ArrowImages
from toolkit.data.image_sources import EncodedImages, check_images
from toolkit.errors import UserError
from toolkit.recipe import RecipeError, load
from toolkit.recipe.schema import DataConfig

NAMES = [*"0123456789"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the library's files in the test's folder, and the library off the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_files(tmp_path_factory.mktemp("digits") / "images", train=3, test=2)


def open_(name: str | Path, **values: Any) -> Dataset:
    return open_dataset(DataConfig.model_validate({"dataset": "huggingface", "name": str(name), **values}))


def rows(digits: Path, split: str, **columns: Any) -> dict[str, list[Any]]:
    paths = sorted((digits / split).rglob("*.png"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    found: dict[str, list[Any]] = {"image": images, "label": [int(path.parent.name) for path in paths]}
    return found | {key: value(paths) for key, value in columns.items()}


def features(**others: Any) -> Features:
    return Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES), **others})


def dataset(digits: Path, split: str, **columns: Any) -> datasets.Dataset:
    kinds = {key: kind for key, (_, kind) in columns.items()}
    values = {key: value for key, (value, _) in columns.items()}
    return datasets.Dataset.from_dict(rows(digits, split, **values), features=features(**kinds))


@pytest.fixture
def both(digits: Path) -> DatasetDict:
    return DatasetDict({split: dataset(digits, split) for split in ("train", "test")})


def same_as_folder(data: Dataset, digits: Path) -> None:
    plain = open_dataset(DataConfig(dataset="imagefolder", root=str(digits)))
    assert data.classes == plain.classes
    assert {split: list(indices) for split, indices in data.lists.items()} == {
        split: list(indices) for split, indices in plain.lists.items()
    }
    np.testing.assert_array_equal(data.labels, plain.labels)
    count = len(plain.labels)
    assert all(np.array_equal(data.images.load(i), plain.images.load(i)) for i in range(count))
    assert isinstance(data.images, EncodedImages)
    assert not check_images(data.images, np.arange(count), decode=True).bad


def test_a_folder_of_images_is_read_file_by_file(digits: Path) -> None:
    data = open_(digits)
    same_as_folder(data, digits)
    assert isinstance(data.images.source, ImageFiles)  # type: ignore[attr-defined]
    assert data.images.name(0).startswith("train/0/")


def test_a_saved_data_set_is_read_in_place(both: DatasetDict, digits: Path, tmp_path: Path) -> None:
    both.save_to_disk(tmp_path / "saved")
    data = open_(tmp_path / "saved")
    same_as_folder(data, digits)
    assert isinstance(data.images.source, ArrowImages)  # type: ignore[attr-defined]
    assert (data.images.name(0), data.images.name(30)) == ("train/0", "test/0")
    assert data.images.identity(np.arange(5)) == open_(tmp_path / "saved").images.identity(np.arange(5))
    with pytest.raises(UserError, match=r"was saved with save_to_disk, which has no arguments: remove data\.args"):
        open_(tmp_path / "saved", args={"revision": "main"})


@pytest.mark.parametrize("has_features", [True, False])
def test_parquet_files_are_read(both: DatasetDict, digits: Path, tmp_path: Path, has_features: bool) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "files/data").mkdir(parents=True)
    for split, part in both.items():
        path = tmp_path / f"files/data/{split}-00000-of-00001.parquet"
        if has_features:
            part.to_parquet(path)
        else:
            parquet.write_table(pa.table(rows(digits, split)), path)
    same_as_folder(open_(tmp_path / "files"), digits)


def test_a_data_set_of_the_hub_is_read_from_the_cache(digits: Path, tmp_path: Path, cache: Path) -> None:
    """A data set that was loaded before lies in the cache under its name, a configuration, a version and a hash."""
    (tmp_path / "files").mkdir()
    for split in ("train", "test"):
        dataset(digits, split).to_parquet(tmp_path / f"files/{split}.parquet")
    datasets.load_dataset(str(tmp_path / "files"))
    (made,) = [path.parent for path in cache.glob("*/*/*/*/*-train.arrow")]
    kept = cache / "lab___tiny_digits/default/0.0.0/1234"
    shutil.copytree(made, kept)
    for file in list(kept.glob("*.arrow")):
        file.rename(kept / f"tiny_digits-{file.name.rpartition('-')[2]}")
    same_as_folder(open_("lab/tiny_digits", download=False), digits)
    with pytest.raises(UserError, match=r"'lab/others' is neither a folder nor .*download is false"):
        open_("lab/others", download=False)


def test_arguments_choose_a_configuration_and_its_files(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for split in ("train", "test"):
        dataset(digits, split).to_parquet(tmp_path / f"files/{split}.parquet")
    (tmp_path / "files/README.md").write_text(
        "---\nconfigs:\n- config_name: large\n  data_files: train.parquet\n"
        "- config_name: small\n  data_files: test.parquet\n---\n"
    )
    with pytest.raises(UserError, match=r"cannot be read: Config name is missing\. .* \['large', 'small'\]"):
        open_(tmp_path / "files")
    assert len(open_(tmp_path / "files", args={"name": "small"}).labels) == 20
    files = {"train": "test.parquet", "test": "train.parquet"}
    data = open_(tmp_path / "files", args={"data_files": files, "name": "large"})
    assert {split: len(indices) for split, indices in data.lists.items()} == {"train": 20, "test": 30}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", 'data.name: must be given with dataset = "huggingface"'),
        ('name = "a"\nargs = { config = "b" }', "load_dataset takes no argument"),
        ('name = "a"\nargs = { revision = 3 }', "args.revision: expected text"),
        ('name = "a"\nroot = "b"', 'data.root: has no effect with dataset = "huggingface"'),
        ('name = "a"\ntable = "b.csv"', 'data.table: has no effect with dataset = "huggingface"'),
    ],
)
def test_names_and_arguments_are_checked_before_training(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        f'[recipe]\nname = "x"\n[data]\ndataset = "huggingface"\nimage_size = 32\n{lines}\n'
        '[model]\nsource = "torchvision"\nname = "resnet18"\n[optimizer]\nname = "sgd"\nlr = 0.1\n'
        "[train]\nepochs = 1\nbatch_size = 4\n"
    )
    try:
        found = "\n".join(map(str, load(tmp_path / "recipe.toml").warnings))
    except RecipeError as error:
        found = str(error)
    assert message in found


def test_metadata_beside_the_images_gives_their_labels(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    lines = ["file_name,species,patient,importance"]
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    for number, path in enumerate(sorted((digits / "train").rglob("*.png"))):
        shutil.copy(path, folder / "train" / path.name)
        lines.append(f"{path.name},{'cat' if number % 2 else 'dog'},p{number // 3},{1 + number % 2}")
    (folder / "train/metadata.csv").write_text("\n".join(lines))
    shutil.rmtree(folder / "test")
    data = open_(folder, columns={"label": "species", "group": "patient", "weight": "importance"})
    assert data.classes == ["cat", "dog"]
    assert [data.classes[label] for label in data.labels[:3]] == ["dog", "cat", "dog"]
    assert data.groups is not None
    assert list(data.groups[:4]) == [0, 0, 0, 1]
    assert data.weights is not None
    assert list(data.weights[:2]) == [1, 2]


def test_several_labels_per_image_are_multi_label(digits: Path, tmp_path: Path) -> None:
    def labels(paths: list[Path]) -> list[list[int]]:
        return [[0] if i % 3 else [0, 1] if i % 2 else [] for i, _ in enumerate(paths)]

    tags = dataset(digits, "train", tags=(labels, List(ClassLabel(names=["round", "dark"]))))
    tags.save_to_disk(tmp_path / "saved")
    data = open_(tmp_path / "saved", columns={"label": "tags"})
    assert data.classes == ["round", "dark"]
    assert data.labels[:4].tolist() == [[0, 0], [1, 0], [1, 0], [1, 1]]


def test_a_test_split_without_labels_is_left_out(digits: Path, tmp_path: Path) -> None:
    unlabeled = dataset(digits, "test").map(lambda row: {"label": -1})
    DatasetDict({"train": dataset(digits, "train"), "test": unlabeled}).save_to_disk(tmp_path / "saved")
    data = open_(tmp_path / "saved")
    assert set(data.lists) == {"train"}
    assert any("the test split of" in note and "has no labels" in note for note in data.notes)


def test_splits_have_any_usual_name_and_those_that_are_0_are_not_used(digits: Path, tmp_path: Path) -> None:
    parts = {name: dataset(digits, "train") for name in ("train", "dev", "test", "unsupervised")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = open_(tmp_path / "saved", split={"test": 0})
    assert {split: len(indices) for split, indices in data.lists.items()} == {"train": 30, "validation": 30}
    assert "splits that are not used, because their names are unknown: unsupervised" in data.notes
    DatasetDict({"test": parts["test"]}).save_to_disk(tmp_path / "only")
    assert set(open_(tmp_path / "only").lists) == {"train"}


@pytest.mark.parametrize(
    ("change", "values", "message"),
    [
        (lambda data: data.remove_columns("image"), {}, "has no image column, only label"),
        (lambda data: data.remove_columns("label"), {}, "has no column 'label', only image: select one with data.c"),
        (lambda data: data.cast_column("label", Value("float32")), {}, "contains float32 numbers, as for regression"),
        (lambda data: data.map(lambda row: {"label": 3}), {}, "without a training image|has only the class"),
        (lambda data: data, {"columns": {"label": "lable"}}, "has no column 'lable', only image, label"),
        (lambda data: data, {"columns": {"image": "label"}}, "the column 'label' contains "),
        (lambda data: data, {"columns": {"image": "c"}}, "the column 'c' is not among image, label"),
        (lambda data: data.rename_columns({"image": "a", "label": "b"}), {}, None),
    ],
)
def test_a_data_set_without_images_or_classes_is_refused(
    change: Any, values: dict[str, Any], message: str | None, digits: Path, tmp_path: Path
) -> None:
    from toolkit.data.splits import split_dataset

    change(dataset(digits, "train")).save_to_disk(tmp_path / "saved")
    if message is None:
        assert len(open_(tmp_path / "saved").classes) == 10, "the only columns of images and classes are found"
        return
    with pytest.raises(UserError, match=message):
        split_dataset(open_(tmp_path / "saved", **values), DataConfig(dataset="huggingface", split={"seed": 0}))


def test_rows_without_image_or_label_are_named(digits: Path, tmp_path: Path) -> None:
    found = rows(digits, "train")
    found["label"][4] = None
    datasets.Dataset.from_dict(found, features=features()).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"1 row of .* cannot be used: row 5: no label"):
        open_(tmp_path / "saved")
    found = rows(digits, "train")
    found["image"][4] = None
    datasets.Dataset.from_dict(found, features=features()).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="1 of 30 rows have no image in column 'image'"):
        open_(tmp_path / "other")


def test_a_folder_that_the_library_cannot_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/train.parquet").write_bytes(b"PAR1, but cut short")
    with pytest.raises(UserError, match=r"the data set in .*broken cannot be read"):
        open_(tmp_path / "broken")


def test_without_the_library_the_message_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install .*\[huggingface\]"):
        open_(tmp_path)


def test_forked_processes_read_the_same_images(both: DatasetDict, tmp_path: Path) -> None:
    both.save_to_disk(tmp_path / "saved")
    data = open_(tmp_path / "saved")
    expected = [data.images.load(i).tobytes() for i in range(50)]
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit([data.images.load(i).tobytes() for i in range(50)] != expected)
        assert os.waitpid(child, 0)[1] == 0
