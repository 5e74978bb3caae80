"""torchvision's data sets: the images and labels of its own classes, from files in the formats of the real ones."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from torchvision_files import ARGUMENTS, WRITERS, images, text

from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.image_sources import EncodedImages, check_images
from toolkit.data.splits import split_dataset
from toolkit.data.torchvision_info import TORCHVISION_SETS
from toolkit.errors import UserError
from toolkit.locks import held
from toolkit.recipe import RecipeError, catalog, load
from toolkit.recipe.schema import DataConfig

ARRAYS = ("CIFAR10", "CIFAR100", "EMNIST", "FER2013", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "SEMEION", "STL10")
ARRAYS = (*ARRAYS, "SVHN", "USPS")
"""Data sets whose images are not files."""


def table(name: str, root: Path, **values: Any) -> DataConfig:
    given = {
        "dataset": "torchvision",
        "name": name,
        "root": str(root),
        "download": False,
        "args": ARGUMENTS.get(name, {}),
    }
    return DataConfig.model_validate({**given, **values})


def open_(name: str, root: Path, **values: Any) -> Dataset:
    return open_dataset(table(name, root, **values))


def needs(name: str) -> None:
    if name == "PCAM" and not os.environ.get("CI"):
        pytest.importorskip("h5py")


def of_torchvision(name: str, root: Path, selected: dict[str, Any]) -> list[tuple[bytes, Any]]:
    """Return the pixels in color and the label of each image as torchvision itself reads it, sorted."""
    found = getattr(torchvision.datasets, name)(str(root), **{**ARGUMENTS.get(name, {}), **selected})
    pairs = (found[i] for i in range(len(found)))
    return sorted((np.asarray(image.convert("RGB")).tobytes(), int(label)) for image, label in pairs)


@pytest.mark.parametrize("name", [name for name in TORCHVISION_SETS if name != "CelebA"])
def test_images_and_labels_are_those_of_torchvision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(name)
    WRITERS[name](tmp_path, monkeypatch.setattr)
    facts = TORCHVISION_SETS[name]
    data = open_(name, tmp_path, channels=3)
    chosen = facts.lists_for(ARGUMENTS.get(name, {}).get(facts.selector) if facts.selector != "train" else None)
    lists = dict(zip(("train", "validation", "test"), chosen or (None, None, None), strict=True)) if facts.lists else {}
    official = {split: {facts.selector: value} for split, value in lists.items() if value is not None} or {"train": {}}
    assert set(data.lists) == set(official)
    numbers: dict[str, int] = {}
    for split, selected in official.items():
        ours = sorted((data.images.load(int(i)).tobytes(), int(data.labels[i])) for i in data.lists[split])
        theirs = of_torchvision(name, tmp_path, selected)
        assert [pixels for pixels, _ in ours] == [pixels for pixels, _ in theirs]
        for (_, own), (_, other) in zip(ours, theirs, strict=True):
            assert numbers.setdefault(data.classes[own], other) == other, "a class has one number in torchvision"
    assert len(numbers) == len(set(numbers.values())) == len(data.classes)
    assert isinstance(data.images, EncodedImages) == (name not in ARRAYS)
    first = data.images.load(0).shape
    assert facts.size is None or name == "RenderedSST2" or first[:2] == (facts.size, facts.size)
    assert data.native_channels == facts.channels
    assert len({data.images.name(i) for i in range(len(data.images))}) == len(data.labels)
    split_dataset(data, table(name, tmp_path))
    assert open_(name, tmp_path).images.load(0).shape[2] == facts.channels
    assert not check_images(data.images, np.arange(len(data.images)), decode=True).bad


def test_the_archives_of_imagenet_are_unpacked_by_one_of_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads replace processes here, since each takes the lock file separately."""
    WRITERS["ImageNet"](tmp_path, monkeypatch.setattr)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_("ImageNet", tmp_path), range(4)))
    assert {len(data.labels) for data in found} == {18}
    assert not any(check_images(data.images, np.arange(18), decode=True).bad for data in found)


def test_data_that_another_process_is_downloading_are_not_read_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS["Country211"](tmp_path, monkeypatch.setattr)
    complete = len(open_("Country211", tmp_path).labels)
    late = tmp_path / "country211/train/AD/1.jpg"
    late.rename(tmp_path / "late.jpg")
    with ThreadPoolExecutor(1) as pool:
        with held(tmp_path / ".Country211.lock"):
            found = pool.submit(open_, "Country211", tmp_path)
            time.sleep(0.2)
            assert not found.done()
            (tmp_path / "late.jpg").rename(late)
        assert len(found.result().labels) == complete


def test_attributes_of_faces_are_several_labels_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["CelebA"](tmp_path, monkeypatch.setattr)
    data = open_("CelebA", tmp_path)
    assert data.classes == ["Bald", "Smiling"]
    assert {split: len(indices) for split, indices in data.lists.items()} == {"train": 6, "validation": 3, "test": 3}
    theirs = torchvision.datasets.CelebA(str(tmp_path), split="train")
    for i in range(6):
        image, attributes = theirs[i]
        np.testing.assert_array_equal(data.images.load(i), np.asarray(image))
        np.testing.assert_array_equal(data.labels[i], attributes.numpy())


def classes_of(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> list[str]:
    WRITERS[name](root, monkeypatch.setattr)
    return open_(name, root, **values).classes


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("ImageNet", ["tench", "crane (n02012849)", "crane (n03126707)"]),
        ("Imagenette", ["tench", "French horn"]),
        ("Places365", ["airfield", "stadium/soccer"]),
        ("SUN397", ["abbey", "stadium/soccer"]),
        ("Caltech256", ["ak47", "american-flag"]),
        ("Omniglot", ["Greek/character01", "Latin/character01", "Latin/character02"]),
        ("OxfordIIITPet", ["Abyssinian", "American Bulldog", "Bengal"]),
        ("GTSRB", ["0", "1", "2"]),
        ("CLEVRClassification", ["3", "4"]),
        ("Flowers102", ["pink primrose", "blackberry lily"]),
    ],
)
def test_classes_have_readable_names(
    name: str, classes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert classes_of(name, tmp_path, monkeypatch) == classes


def test_arguments_select_labels_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    species = classes_of("OxfordIIITPet", tmp_path, monkeypatch, args={"target_types": "binary-category"})
    assert species == ["Cat", "Dog"]
    makers = {"split": "trainval", "annotation_level": "manufacturer"}
    WRITERS["FGVCAircraft"](tmp_path, monkeypatch.setattr)
    data = open_("FGVCAircraft", tmp_path, args=makers)
    assert (data.classes, set(data.lists)) == (["Boeing", "Airbus"], {"train", "test"})
    genus = {"version": "2021_train_mini", "target_type": "genus"}
    assert classes_of("INaturalist", tmp_path, monkeypatch, args=genus) == ["Vanessa", "Pica"]


def test_a_split_that_is_0_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["FER2013"](tmp_path, monkeypatch.setattr)
    (tmp_path / "fer2013/fer2013.csv").rename(tmp_path / "fer2013/train.csv")
    (tmp_path / "fer2013/test.csv").write_text("pixels\n" + " ".join(["0"] * 48 * 48) + "\n")
    with pytest.raises(UserError, match=r"test list of FER2013 has images without labels; set data\.split\.test = 0"):
        open_("FER2013", tmp_path)
    assert set(open_("FER2013", tmp_path, split={"test": 0}).lists) == {"train"}


def test_a_class_without_images_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["EMNIST"](tmp_path, monkeypatch.setattr)
    data = open_("EMNIST", tmp_path)
    assert data.classes[:2] == ["a", "b"]
    assert data.notes == ("classes that are left out, because they have no images: N/A",)


def test_missing_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"DTD is not in data.root = .*data.download is false.*download=true"):
        open_("DTD", tmp_path)
    with pytest.raises(UserError, match=r"ImageNet is not in .*ILSVRC2012_devkit.*torchvision cannot download it"):
        open_("ImageNet", tmp_path, download=True)
    WRITERS["DTD"](tmp_path, monkeypatch.setattr)
    (tmp_path / "dtd/dtd/images/banded/banded_0002.jpg").unlink()
    with pytest.raises(UserError, match=r"DTD is not in .*or is incomplete.*banded_0002.jpg does not exist"):
        open_("DTD", tmp_path)


def test_an_image_in_two_lists_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["DTD"](tmp_path, monkeypatch.setattr)
    (tmp_path / "dtd/dtd/labels/test1.txt").write_bytes((tmp_path / "dtd/dtd/labels/val1.txt").read_bytes())
    with pytest.raises(UserError, match="DTD: two of its lists contain the same image"):
        open_("DTD", tmp_path)


def test_lists_with_different_classes_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["DTD"](tmp_path, monkeypatch.setattr)
    images(tmp_path / "dtd/dtd/images", ["woven/woven_1.jpg"])
    text(tmp_path / "dtd/dtd/labels/val1.txt", "woven/woven_1.jpg")
    with pytest.raises(UserError, match="validation list of DTD does not have the same classes as the training list"):
        open_("DTD", tmp_path)


def test_pcam_without_h5py_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.data.torchvision_sets.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs h5py.*pip install .*\[pcam\]"):
        open_("PCAM", tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", 'data.name: must be given with dataset = "torchvision"'),
        ('name = "OxfordPets"', "unknown data set .*did you mean OxfordIIITPet"),
        ('name = "CocoDetection"', "CocoDetection has boxes, not classes of images"),
        ('name = "Caltech101"', 'Caltech101 is data.dataset = "caltech101" here'),
        ('name = "DTD"\nargs = { partitoin = 2 }', "DTD takes no argument .*did you mean partition"),
        ('name = "DTD"\nargs = { partition = "2" }', "args.partition: expected a whole number"),
        ('name = "EMNIST"', "EMNIST needs split"),
        ('name = "Imagenette"\nargs = { size = "161px" }', 'expected "full" or "320px" or "160px".*mean 160px'),
        ('name = "FGVCAircraft"\nargs = { split = "val" }', 'expected "train" or "trainval"'),
    ],
)
def test_names_and_arguments_are_checked_before_training(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        f'[recipe]\nname = "x"\n[data]\ndataset = "torchvision"\nimage_size = 32\n{lines}\n'
        '[model]\nsource = "torchvision"\nname = "resnet18"\n[optimizer]\nname = "sgd"\nlr = 0.1\n'
        "[train]\nepochs = 1\nbatch_size = 4\n"
    )
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        load(tmp_path / "recipe.toml")


def test_every_data_set_is_known_or_excluded_with_a_reason() -> None:
    assert set(catalog.datasets()) == set(TORCHVISION_SETS) == set(WRITERS)
    assert set(catalog.datasets()) | set(catalog.excluded_datasets()) == set(torchvision.datasets.__all__)
