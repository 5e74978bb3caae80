"""How data sets are opened, and the messages if they are missing or damaged."""

from __future__ import annotations

import pickle
import struct
import threading
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from toolkit.data.datasets import Dataset, open_dataset
from toolkit.errors import UserError
from toolkit.recipe.schema import DataConfig


def open_(dataset: str, root: Path, **values: Any) -> Dataset:
    return open_dataset(DataConfig.model_validate({"dataset": dataset, "root": str(root), **values}))


def make(root: Path, *paths: str) -> Path:
    """Write small images, each with a different gray value."""
    for shade, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (shade, shade, shade)).save(root / path)
    return root


def shades(data: Dataset, indices: Any) -> list[int]:
    """Return which of the images of :func:`make` these are."""
    return [int(data.images.load(int(i))[0, 0, 0]) for i in indices]


def test_digits_are_those_of_scikit_learn_scaled_to_eight_bits() -> None:
    from sklearn.datasets import load_digits

    data = open_("digits", Path("nowhere"))
    assert (len(data.images), data.classes, data.native_size, data.native_channels) == (1797, list("0123456789"), 8, 1)
    original = load_digits()
    assert np.array_equal(data.labels, original.target)
    for i in range(1797):
        assert np.abs(data.images.load(i)[..., 0] / 255 - original.images[i] / 16).max() < 1 / 255
    assert open_("digits", Path("nowhere"), channels=3).images.load(0).shape == (8, 8, 3)


# -- imagefolder -------------------------------------------------------------------------------------------------------


def test_imagefolder_reads_splits_from_folders_and_sorts_classes(tmp_path: Path) -> None:
    paths = ("train/b/1.png", "train/a/2.JPG", "train/a/1.png", "val/a/x.png", "test/b/y.png")
    data = open_("imagefolder", make(tmp_path, *paths))
    assert data.classes == ["a", "b"]
    assert {name: shades(data, indices) for name, indices in data.lists.items()} == {
        "train": [2, 1, 0],
        "validation": [3],
        "test": [4],
    }
    assert data.labels.tolist() == [0, 0, 1, 0, 1]
    assert [data.images.name(i) for i in range(3)] == ["train/a/1.png", "train/a/2.JPG", "train/b/1.png"]


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_imagefolder_accepts_three_names_for_validation(tmp_path: Path, name: str) -> None:
    data = open_("imagefolder", make(tmp_path, "train/a/1.png", f"{name}/a/2.png", "train/b/1.png"))
    assert shades(data, data.lists["validation"]) == [1]


def test_imagefolder_without_a_train_folder_is_one_list(tmp_path: Path) -> None:
    data = open_("imagefolder", make(tmp_path, "ant/1.png", "ant/deep/er/2.png", "Bee/3.png", "Ähre/4.png"))
    assert data.classes == ["Bee", "ant", "Ähre"]
    assert list(data.lists) == ["train"]
    assert data.labels.tolist() == [0, 1, 1, 2]


def test_imagefolder_skips_and_reports_files_that_are_not_images(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png", "train/b/1.png", "train/a/._1.png", "train/.git/2.png")
    (tmp_path / "train/a/Thumbs.db").touch()
    (tmp_path / "train/readme.txt").touch()
    data = open_("imagefolder", tmp_path)
    assert (data.classes, len(data.images)) == (["a", "b"], 2)
    assert data.notes[-1] == (
        "left out of the images: 1 .db file (train/a/Thumbs.db), 1 .txt file (train/readme.txt), "
        "1 hidden file (train/a/._1.png), 1 hidden folder (train/.git)"
    )


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("train/a/1.png", "val/b/1.png"), "class folders that the training images do not have: b"),
        (("train/a/1.png", "test/a b/1.png"), "class folders that the training images do not have: a b"),
        (("val/a/1.png",), "has val/ but no train/"),
        (("train/a/1.png", "val/a/1.png", "valid/a/1.png"), "has both val/ and valid/"),
        (("train/1.png",), "has no class folders"),
        (("train/a/1.png", "test/1.png"), "test has no class folders"),
    ],
)
def test_wrong_layouts_of_imagefolder_are_refused(tmp_path: Path, paths: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_("imagefolder", make(tmp_path, *paths))


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png")
    (tmp_path / "train/b").mkdir()
    with pytest.raises(UserError, match=r"train/b holds no image \(.jpg"):
        open_("imagefolder", tmp_path)


@pytest.mark.parametrize("dataset", ["imagefolder", "caltech101"])
def test_missing_root_is_named_with_its_key(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UserError, match=r"data.root = '.*nowhere'"):
        open_(dataset, tmp_path / "nowhere")


# -- caltech101 --------------------------------------------------------------------------------------------------------


def caltech(root: Path, train: str, test: str) -> Path:
    make(root / "caltech101/101_ObjectCategories", "ant/1.png", "ant/2.png", "Bee/1.png", "Bee/2.png")
    (root / "caltech101/train.txt").write_text(train)
    (root / "caltech101/test.txt").write_text(test)
    return root


LISTS = ("ant/2.png\nBee/1.png\nBACKGROUND_Google/1.png\n", "Bee/2.png\r\nant/1.png\r\n\r\n")


def test_caltech_keeps_the_order_of_its_lists_and_drops_the_background(tmp_path: Path) -> None:
    caltech(tmp_path, *LISTS)
    for root in (tmp_path, tmp_path / "caltech101"):
        data = open_("caltech101", root)
        assert data.classes == ["Bee", "ant"]
        assert [data.images.name(i) for i in data.lists["train"]] == ["ant/2.png", "Bee/1.png"]
        assert [data.images.name(i) for i in data.lists["test"]] == ["Bee/2.png", "ant/1.png"]
        assert data.labels.tolist() == [1, 0, 0, 1]


def test_caltech_background_is_a_class_if_requested(tmp_path: Path) -> None:
    caltech(tmp_path, *LISTS)
    with pytest.raises(UserError, match="BACKGROUND_Google is missing"):
        open_("caltech101", tmp_path, background_class=True)
    make(tmp_path / "caltech101/101_ObjectCategories", "BACKGROUND_Google/1.png")
    assert open_("caltech101", tmp_path).classes == ["Bee", "ant"]
    data = open_("caltech101", tmp_path, background_class=True)
    assert data.classes == ["BACKGROUND_Google", "Bee", "ant"]
    assert data.labels.tolist() == [2, 1, 0, 1, 2]


def test_caltech_without_split_files_is_one_list(tmp_path: Path) -> None:
    caltech(tmp_path, "", "")
    for name in ("train.txt", "test.txt"):
        (tmp_path / "caltech101" / name).unlink()
    data = open_("caltech101", tmp_path)
    assert (list(data.lists), len(data.images)) == (["train"], 4)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("ant/1.png\nant/9.png\n", "Bee/1.png", r"train.txt lists 1 image\(s\) that are not in .*: ant/9.png"),
        ("ant/1.png\n", "../../secret.png", "test.txt lists 1 image"),
        ("ant/1.png\nBee/1.png", "ant/1.png", "list ant/1.png more than once"),
    ],
)
def test_caltech_split_files_that_do_not_fit_the_images_are_refused(
    tmp_path: Path, train: str, test: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_("caltech101", caltech(tmp_path, train, test))


def test_caltech_with_only_one_split_file_is_refused(tmp_path: Path) -> None:
    caltech(tmp_path, *LISTS)
    (tmp_path / "caltech101/train.txt").unlink()
    with pytest.raises(UserError, match=r"has test.txt but not train.txt"):
        open_("caltech101", tmp_path)


def test_missing_caltech_images_are_refused_with_their_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"10.22002/D1.20086, file caltech-101.zip"):
        open_("caltech101", tmp_path)


def test_the_real_caltech_subset_is_read(caltech_subset: Path) -> None:
    data = open_("caltech101", caltech_subset)
    assert (len(data.classes), len(data.lists["train"]), len(data.lists["test"])) == (10, 80, 40)
    files = caltech_subset / "caltech101/101_ObjectCategories"
    modes = {Image.open(files / data.images.name(i)).mode for i in range(len(data.images))}
    assert modes == {"L", "RGB"}
    assert {data.images.load(i).shape[2] for i in range(len(data.images))} == {3}


# -- torchvision's classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "fashion_mnist", "kmnist"])
def test_missing_data_without_download_says_what_to_do(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UserError, match=rf"{dataset} is not in data.root = .*data.download is false.*download=true"):
        open_(dataset, tmp_path, download=False)


def test_failing_download_gives_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    with pytest.raises(UserError, match=r"could not be downloaded: .*no route to host"):
        open_("cifar10", tmp_path / "new")


def test_damaged_data_are_reported(tmp_path: Path) -> None:
    """torchvision verifies CIFAR by checksum, but FashionMNIST only by the names of its files."""
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"\0\0\x08\x01")
    with pytest.raises(UserError, match=r"fashion_mnist is not in .*, or is damaged"):
        open_("fashion_mnist", tmp_path)


@pytest.mark.parametrize(("dataset", "folder"), [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_files_of_the_mnist_family_are_read(tmp_path: Path, dataset: str, folder: str) -> None:
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 20, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 20) + labels.tobytes())
    data = open_(dataset, tmp_path)
    assert {name: len(members) for name, members in data.lists.items()} == {"train": 20, "test": 20}
    assert len(data.classes) == 10
    assert data.native_channels == 1
    np.testing.assert_array_equal(data.labels, np.tile(labels, 2))
    np.testing.assert_array_equal(np.asarray(data.images.load(7)).reshape(28, 28), pixels[7])


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, shared_data: Path) -> list[Path]:
    """Replace the server by one with real images in torchvision's file formats; return the list of downloads."""
    kind = torchvision.datasets.CIFAR10
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(kind, name, [[file, None] for file, _ in getattr(kind, name)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    real = np.load(shared_data / "cifar10-original-subset.npz")
    made: list[Path] = []

    def fetch(_: str, root: str, **__: object) -> None:
        made.append(Path(root))
        folder = Path(root) / kind.base_folder
        folder.mkdir()
        for batch, (file, _) in enumerate([*kind.test_list, *kind.train_list]):
            own = real["batch"] == batch
            rows = real["images"][own].transpose(0, 3, 1, 2).reshape(own.sum(), -1)
            (folder / file).write_bytes(pickle.dumps({"data": rows, "labels": real["labels"][own].tolist()}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": real["class_names"].tolist()}))

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fetch)
    return made


def test_cifar10_has_its_images_in_the_original_order(tmp_path: Path, downloads: list[Path], shared_data: Path) -> None:
    data = open_("cifar10", tmp_path)
    real = np.load(shared_data / "cifar10-original-subset.npz")
    assert data.classes == real["class_names"].tolist()
    assert (len(data.lists["train"]), len(data.lists["test"]), data.native_size, data.native_channels) == (
        5085,
        1017,
        32,
        3,
    )
    for name, part in (("train", real["batch"] > 0), ("test", real["batch"] == 0)):
        assert np.array_equal(data.labels[data.lists[name]], real["labels"][part])
        first = int(data.lists[name][0])
        assert np.array_equal(data.images.load(first), real["images"][part][0])
    assert len(downloads) == 1
    open_("cifar10", tmp_path, download=False)


def test_only_one_of_many_processes_downloads(tmp_path: Path, downloads: list[Path]) -> None:
    """Threads replace processes here, since each takes the lock file separately."""
    threads = [threading.Thread(target=open_, args=("cifar10", tmp_path / "data")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
