"""Folder layouts of public data sets and users: each is read correctly or refused with a clear message."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from cli import toolkit
from PIL import Image

from toolkit.data import folder_walk
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.folder_layout import split_of
from toolkit.data.folder_walk import IMAGE_SUFFIXES
from toolkit.data.image_sources import EncodedImages, UnreadableImageError, check_images
from toolkit.data.splits import split_dataset
from toolkit.errors import UserError
from toolkit.inference.predict import collect
from toolkit.recipe.schema import DataConfig

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.toml"


def make(root: Path, *paths: str) -> Path:
    """Create files with these names; layouts are read without opening the files."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def table(root: Path, **values: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": "imagefolder", "root": str(root), **values})


def read(root: Path, **values: Any) -> dict[str, dict[str, list[str]]]:
    """Return the names of the images by split and class."""
    data = open_dataset(table(root, **values))
    found: dict[str, dict[str, list[str]]] = {}
    for split, indices in data.lists.items():
        found[split] = {}
        for i in indices.tolist():
            found[split].setdefault(data.classes[data.labels[i]], []).append(data.images.name(i))
    return found


def open_(root: Path, **values: Any) -> Dataset:
    return open_dataset(table(root, **values))


def refusal(root: Path, **values: Any) -> str:
    with pytest.raises(UserError) as raised:
        open_(root, **values)
    return str(raised.value)


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["Train", "Val", "Test"], ["train", "validation", "test"]),
        (["TRAINING", "TESTING"], ["train", "test"]),
        (["training_set", "test_set"], ["train", "test"]),
        (["train", "dev", "test"], ["train", "validation", "test"]),
        (["train", "eval"], ["train", "validation"]),
        (["trainset", "valset", "testset"], ["train", "validation", "test"]),
        (["Train Data", "Validation-Dataset", "test images"], ["train", "validation", "test"]),
        (["train_images", "Valid"], ["train", "validation"]),
        (["Training"], ["train"]),
    ],
)
def test_usual_names_of_split_folders_are_recognized(tmp_path: Path, folders: list[str], splits: list[str]) -> None:
    for folder in folders:
        make(tmp_path, f"{folder}/a/1.jpg", f"{folder}/b/1.jpg")
    assert read(tmp_path) == {
        split: {name: [f"{folder}/{name}/1.jpg"] for name in "ab"}
        for folder, split in zip(folders, splits, strict=True)
    }
    messages = ", ".join(f"{split} is {folder}/" for folder, split in zip(folders, splits, strict=True))
    assert f"splits by folders: {messages}" in open_(tmp_path).notes


@pytest.mark.parametrize("name", ["trainer", "trains", "image", "data", "dataset", "set", "value", "device", "contest"])
def test_other_folder_names_are_not_splits(name: str) -> None:
    assert split_of(name) is None


def test_with_train_and_val_folders_no_training_image_is_used_for_testing(tmp_path: Path) -> None:
    """As in ImageNet, Imagenette and Places365."""
    for name in ("n01440764", "n02102040"):
        make(tmp_path, *(f"train/{name}/{i}.JPEG" for i in range(10)), f"val/{name}/0.JPEG")
    data = open_(tmp_path)
    splits = split_dataset(data, table(tmp_path))
    assert {name: len(indices) for name, indices in splits.items()} == {"train": 20, "validation": 2, "test": 0}
    assert all(data.images.name(int(i)).startswith("val/") for i in splits["validation"])


@pytest.mark.parametrize(
    ("paths", "parts"),
    [
        (["train/a/1.jpg", "Train/b/1.jpg"], ["has both Train/ and train/"]),
        (["train/a/1.jpg", "val/a/1.jpg", "dev/a/1.jpg"], ["has both dev/ and val/"]),
        (["val/a/1.jpg", "Testing/a/1.jpg"], ["has val/, Testing/ but no train/"]),
        (["train/a/1.jpg", "val/a/1.jpg", "cat/1.jpg"], ["splits (train/, val/)", "(cat/)", "train/<class>/"]),
        (["test/cat/1.jpg", "cat/1.jpg", "dog/1.jpg"], ["splits (test/)", "(cat/, dog/)"]),
        (["train/1.jpg", "cat/1.jpg"], ["splits (train/)", "(cat/)"]),
        (["train/1.jpg", "test/1.jpg", "cat/1.jpg", "dog/1.jpg"], ["splits (test/, train/)", "(cat/, dog/)"]),
        (["train/cat.0.jpg", "train/dog.0.jpg", "test/1.jpg"], ["train has no class folders", "2 images directly"]),
        (["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg"],
         ["test has no class folders", "1 image directly", "set data.split.test = 0: then test/ is not read"]),
        (["seg_train/seg_train/a/1.jpg", "seg_test/seg_test/a/1.jpg", "seg_pred/seg_pred/1.jpg"],
         ["seg_test/, seg_train/ may be splits", "rename them to train/, val/ and test/"]),
        (["train2017/1.jpg", "val2017/1.jpg"], ["train2017/, val2017/ may be splits"]),
        (["cats_train/1.jpg", "cats_test/1.jpg"], ["cats_test/, cats_train/ may be splits"]),
        (["train/a/1.jpg", "train/b/1.jpg", "val/A/1.jpg", "val/b/1.jpg"],
         ["class folders that the training images do not have: A;"]),
    ],
)  # fmt: skip
def test_inconsistent_split_folders_are_refused(tmp_path: Path, paths: list[str], parts: list[str]) -> None:
    message = refusal(make(tmp_path, *paths))
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_class_may_be_named_like_a_split(tmp_path: Path, name: str) -> None:
    make(tmp_path, "bus/1.jpg", "car/1.jpg", f"{name}/1.jpg")
    assert read(tmp_path) == {"train": {each: [f"{each}/1.jpg"] for each in sorted(["bus", "car", name])}}
    assert open_(tmp_path).notes == (
        f"{name}/ holds images directly and is next to bus/, car/: it is a class, not a split",
    )


def test_a_class_name_may_contain_the_name_of_a_split(tmp_path: Path) -> None:
    make(tmp_path, "bullet_train/1.jpg", "test tube/1.jpg", "bus/1.jpg")
    assert sorted(read(tmp_path)["train"]) == ["bullet_train", "bus", "test tube"]


def test_folders_without_images_next_to_splits_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "annotations/1.xml", "labels.csv")
    data = open_(tmp_path)
    assert data.classes == ["a", "b"]
    assert data.notes[1:] == (
        "not read, because they hold no images: annotations/",
        "left out of the images: 1 .csv file (labels.csv)",
    )


def test_classes_that_a_split_lacks_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "test/a/1.jpg")
    assert "test/ has no images of 2 of 3 classes: b, c" in open_(tmp_path).notes


# -- wrapper folders, depth -------------------------------------------------------------------------------------------


def test_a_single_folder_around_the_data_is_skipped(tmp_path: Path) -> None:
    """A zip file from Kaggle, unpacked on a Mac; image names are the same as if data.root were the inner folder."""
    inner = make(tmp_path / "archive/pets", "Train/cat/1.jpg", "Train/dog/1.jpg", "Test/cat/2.jpg")
    make(tmp_path, "__MACOSX/archive/._1.jpg", "__MACOSX/archive/Train/cat/1.jpg", ".cache/x/1.jpg", "readme.txt")
    assert (
        read(tmp_path)
        == read(inner)
        == {
            "train": {"cat": ["Train/cat/1.jpg"], "dog": ["Train/dog/1.jpg"]},
            "test": {"cat": ["Test/cat/2.jpg"]},
        }
    )
    data = open_(tmp_path)
    assert data.images.source.path(0) == str(inner / "Train/cat/1.jpg")  # type: ignore[attr-defined]
    assert data.notes[0].endswith(f"the images are read from {tmp_path / 'archive'} (not read: readme.txt)")


def test_single_folders_within_splits_are_skipped(tmp_path: Path) -> None:
    """As in Kaggle's cats and dogs: training_set/training_set/cats."""
    make(
        tmp_path, *(f"{part}_set/{part}_set/{name}/1.jpg" for part in ("training", "test") for name in ("cats", "dogs"))
    )
    assert read(tmp_path) == {
        split: {name: [f"{part}_set/{part}_set/{name}/1.jpg"] for name in ("cats", "dogs")}
        for split, part in (("train", "training"), ("test", "test"))
    }


def test_a_split_with_only_one_of_the_classes_is_not_skipped(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    assert read(tmp_path)["validation"] == {"a": ["val/a/1.jpg"]}


def test_a_single_folder_of_classes_is_read(tmp_path: Path) -> None:
    """As in Food-101 without its split files."""
    make(tmp_path, "images/apple_pie/1.jpg", "images/waffles/1.jpg")
    assert read(tmp_path) == {"train": {"apple_pie": ["apple_pie/1.jpg"], "waffles": ["waffles/1.jpg"]}}


@pytest.mark.parametrize(
    ("paths", "parts"),
    [
        (["images/1.jpg", "images/2.jpg"], ["has only the class 'images' (2 images)", "not sorted into classes"]),
        (["train/cat/1.jpg", "test/cat/1.jpg"], ["has only the class 'cat' (2 images); a classifier needs two"]),
        (["1.jpg", "2.jpg"], ["has no class folders", "holds 2 images directly"]),
        (["readme.txt"], ["has no class folders", "it is empty"]),
        (["images/a/1.jpg", "images/b/1.jpg", "meta/train.txt"],
         ["only images/ holds images", "Set data.root to", "/images if"]),
        (["Annotations/1.xml", "Data/CLS-LOC/train/a/1.jpg", "ImageSets/1.txt"],
         ["only Data/ holds images", "Annotations/, ImageSets/"]),
        (["a/1.heic", "b/1.jpg"], ["the class folder", "a holds no image (.jpg"]),
        (["a/1.jpg", "b/1.txt", "c/1.txt"], ["2 of 3 folders", "b/, c/"]),
    ],
)  # fmt: skip
def test_fewer_than_two_classes_are_refused(tmp_path: Path, paths: list[str], parts: list[str]) -> None:
    message = refusal(make(tmp_path, *paths))
    assert [part for part in parts if part not in message] == [], message


SUN = ("a/abbey/1.jpg", "a/apartment_building/outdoor/1.jpg", "b/badlands/1.jpg")
PLANTS = ("color/Apple/1.jpg", "color/Corn/1.jpg", "grayscale/Apple/1.jpg", "grayscale/Corn/1.jpg")


def test_nested_folders_are_refused_rather_than_guessed(tmp_path: Path) -> None:
    """SUN397 and Places group classes by letter, PlantVillage by version, iNaturalist by kingdom."""
    message = refusal(make(tmp_path / "sun", *SUN))
    assert "a/, b/ hold no images themselves but folders (a/abbey/, b/badlands/)" in message
    assert 'set data.class_folders = "leaf"' in message
    message = refusal(make(tmp_path / "plants", *PLANTS))
    assert "color/, grayscale/ hold the same folders (Apple/, Corn/)" in message
    assert f"set data.root to one of them, such as {tmp_path / 'plants/color'}" in message
    message = refusal(make(tmp_path / "places", "data_256/a/abbey/1.jpg", "data_256/b/bar/1.jpg", "val_256/1.jpg"))
    assert "data_256/ hold no images themselves but folders (data_256/a/)" in message
    message = refusal(make(tmp_path / "mixed", "train/a/1.jpg", "train/b/x/1.jpg"))
    assert "b/ hold no images themselves but folders (b/x/)" in message


def test_the_recipe_can_state_which_folders_are_classes(tmp_path: Path) -> None:
    make(tmp_path, *(f"train/{path}" for path in SUN), "val/a/abbey/2.jpg")
    assert read(tmp_path, class_folders="leaf") == {
        "train": {path.rpartition("/")[0]: [f"train/{path}"] for path in SUN},
        "validation": {"a/abbey": ["val/a/abbey/2.jpg"]},
    }
    assert read(tmp_path, class_folders="top") == {
        "train": {"a": [f"train/{path}" for path in SUN[:2]], "b": [f"train/{SUN[2]}"]},
        "validation": {"a": ["val/a/abbey/2.jpg"]},
    }
    assert "3 images in folders within class folders" in " ".join(open_(tmp_path, class_folders="top").notes)


def test_the_layout_of_tiny_imagenet(tmp_path: Path) -> None:
    """Training images are in <wnid>/images/; validation and test images are not sorted."""
    make(tmp_path, "train/n1/images/1.JPEG", "train/n2/images/1.JPEG", "train/n1/n1_boxes.txt", "wnids.txt")
    assert read(tmp_path) == {"train": {"n1": ["train/n1/images/1.JPEG"], "n2": ["train/n2/images/1.JPEG"]}}
    make(tmp_path, "val/images/1.JPEG", "val/val_annotations.txt")
    message = refusal(tmp_path)
    assert (
        "val has class folders that the training images do not have: images, and none that they have (n1, n2)"
        in message
    )
    assert "val/<class>/, or set data.split.validation = 0: then it is not read" in message


def test_folders_of_unused_splits_are_not_read(tmp_path: Path) -> None:
    """So unsorted images need not be moved elsewhere."""
    make(tmp_path, *(f"train/{name}/images/{i}.JPEG" for name in ("n1", "n2") for i in range(5)))
    make(tmp_path, "val/images/1.JPEG", "test/1.JPEG")
    recipe = table(tmp_path, split={"validation": 0, "test": 0})
    data = open_dataset(recipe)
    assert {name: len(indices) for name, indices in split_dataset(data, recipe).items()} == {
        "train": 10, "validation": 0, "test": 0}  # fmt: skip
    assert data.notes[1:3] == (
        "val/ is not read: data.split.validation is 0",
        "test/ is not read: data.split.test is 0",
    )
    (tmp_path / "test/1.JPEG").unlink()
    (tmp_path / "test").rmdir()
    recipe = table(tmp_path, split={"validation": 0})
    assert len(split_dataset(open_dataset(recipe), recipe)["train"]) == 10, (
        "no test split is drawn either, since val/ exists"
    )


def test_split_folders_within_class_folders_are_refused(tmp_path: Path) -> None:
    message = refusal(make(tmp_path, "bottle/train/1.jpg", "bottle/test/1.jpg", "cable/train/1.jpg", "cable/2.jpg"))
    assert "named like splits within class folders (bottle/test/, bottle/train/, cable/train/)" in message


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ab(tmp_path: Path) -> Path:
    return make(tmp_path / "data", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/deep/2.jpg")


PLAIN = {"train": {"a": ["a/1.jpg", "a/2.jpg"], "b": ["b/1.jpg", "b/deep/2.jpg"]}}


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_links_to_parent_folders_count_no_image_twice(ab: Path, target: str) -> None:
    for link in ("a/loop", "a/loop2", "b/deep/loop"):
        (ab / link).symlink_to(target)
    if target == ".":  # within its own class even if it is another folder
        (ab / "b/other").symlink_to("deep")
    assert read(ab) == PLAIN
    assert f"{4 if target == '.' else 3} repeated folders (a/loop, ...)" in open_(ab).notes[-1]
    assert sorted(collect([str(ab)], bytes)) == [str(ab / path) for paths in PLAIN["train"].values() for path in paths]


def test_many_links_to_one_folder_are_followed_once(ab: Path) -> None:
    """If every path through them were a separate folder, there would be 12 ** 40."""
    for number in range(12):
        (ab / f"a/{number}").symlink_to(".")
    assert read(ab) == PLAIN


@pytest.mark.parametrize(("link", "target"), [("a/extra", "../b"), ("c", "a"), ("a/extra", "../b/deep")])
def test_links_that_put_images_into_two_classes_are_refused(ab: Path, link: str, target: str) -> None:
    (ab / link).symlink_to(target)
    message = refusal(ab)
    assert "are the same folder, so its images would be both in" in message
    assert str(ab / link) in message


def test_a_class_folder_may_be_a_link(ab: Path, tmp_path: Path) -> None:
    """Users often create a subset of a data set with links to class folders or files."""
    make(tmp_path / "elsewhere", "1.jpg")
    (ab / "c").symlink_to(tmp_path / "elsewhere")
    (ab / "a/3.jpg").symlink_to(tmp_path / "elsewhere/1.jpg")
    assert read(ab)["train"] == {"a": [*PLAIN["train"]["a"], "a/3.jpg"], "b": PLAIN["train"]["b"], "c": ["c/1.jpg"]}


def test_a_link_to_a_parent_folder_within_linked_folders(ab: Path, tmp_path: Path) -> None:
    """It leads to a folder above the class, with images of other classes, by a path outside data.root."""
    make(tmp_path / "elsewhere", "c/1.jpg", "other/1.jpg", "2.jpg")
    (ab / "c").symlink_to(tmp_path / "elsewhere/c")
    (tmp_path / "elsewhere/c/loop").symlink_to("..")
    assert read(ab)["train"] == {**PLAIN["train"], "c": ["c/1.jpg"]}


def test_one_folder_as_two_splits_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg")
    (tmp_path / "test").symlink_to("val")
    assert "test and" in (message := refusal(tmp_path))
    assert "val are the same folder: remove one of them" in message
    (tmp_path / "test").unlink()
    (tmp_path / "test").mkdir()
    (tmp_path / "test/a").symlink_to("../train/a")
    assert "so its images would be both in" in refusal(tmp_path)


def test_a_link_to_the_data_root_as_a_class_is_refused(ab: Path) -> None:
    (ab / "all").symlink_to(".")
    assert f"{ab / 'all'} is a link to {ab}" in refusal(ab)


@pytest.mark.parametrize("link", ["c", "a/more", "a/loop"])
def test_broken_links_are_named(ab: Path, link: str) -> None:
    (ab / link).symlink_to("loop" if link == "a/loop" else "gone")
    message = refusal(ab)
    assert f"the link {ab / link} leads to {'loop' if link == 'a/loop' else 'gone'}" in message
    assert "correct or remove the link" in message
    with pytest.raises(UserError, match="correct or remove the link"):
        collect([str(ab)], bytes)


def test_a_broken_link_to_an_image_is_an_unreadable_image(ab: Path) -> None:
    (ab / "a/3.jpg").symlink_to("gone.jpg")
    data = open_(ab)
    assert [data.images.name(i) for i in range(3)] == ["a/1.jpg", "a/2.jpg", "a/3.jpg"]
    assert (2, "no such file") in check_images(data.images, data.lists["train"], decode=False).bad


# -- files ------------------------------------------------------------------------------------------------------------


def test_pipes_and_sockets_are_skipped_without_hanging(ab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ab)  # the path of a socket must be short
    os.mkfifo("a/pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("a/socket.jpg")
        (ab / "b/pipe.jpg").symlink_to("../a/pipe.png")
        assert read(ab) == PLAIN
        assert "3 special files (a/pipe.png, ...)" in open_(ab).notes[-1]
        images = EncodedImages(ImageFiles(ab, ["a/pipe.png", "a/socket.jpg"]), 3)
        for i in range(2):
            for look in (images.load, images.check):
                with pytest.raises(UnreadableImageError, match="a pipe, socket or device, not a file"):
                    look(i)


def test_hidden_folders_are_skipped_and_counted(ab: Path) -> None:
    make(ab, "a/.trash/3.jpg", "a/.ipynb_checkpoints/1-checkpoint.jpg", "a/@eaDir/1.jpg/THUMB.jpg", "b/._1.jpg")
    assert read(ab) == PLAIN
    assert open_(ab).notes[-1] == (
        "left out of the images: 3 hidden folders (a/.ipynb_checkpoints, ...), 1 hidden file (b/._1.jpg)"
    )
    messages: list[str] = []
    assert len(collect([str(ab)], bytes, messages.append)) == 4
    assert messages == [f"{ab}: {open_(ab).notes[-1]}"]


def test_skipped_files_are_counted_by_kind(ab: Path) -> None:
    make(ab, "a/x.HEIC", "a/y.heic", "b/notes.txt", "b/LICENSE", "top.jpg")
    assert open_(ab).notes[-1] == (
        "left out of the images: 2 .heic files (a/x.HEIC, ...), 1 .txt file (b/notes.txt), 1 file (b/LICENSE), "
        "1 unlabeled image (top.jpg)"
    )


@pytest.fixture
def unreadable(ab: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose listing fails; this is simulated, since the user who runs the tests may read everything."""
    unlistable, scandir = ab / "b/deep", os.scandir

    def refuse(path: str | Path) -> Any:
        if str(path) == str(unlistable):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder_walk.os, "scandir", refuse)
    return unlistable


def test_unreadable_folders_are_named(unreadable: Path) -> None:
    root = unreadable.parent.parent
    expected = f"the folder {unreadable} cannot be read: Permission denied"
    assert refusal(root) == expected
    with pytest.raises(UserError) as raised:
        collect([str(root)], bytes)
    assert str(raised.value) == expected


WRITTEN = {
    "JPEG": (".jpg", ".jpe", ".jfif"), "MPO": (".mpo",), "PNG": (".png", ".apng"), "WEBP": (".webp",),
    "AVIF": (".avif",), "GIF": (".gif",), "BMP": (".bmp",), "DIB": (".dib",), "TIFF": (".tif",), "TGA": (".tga",),
    "JPEG2000": (".jp2", ".j2k"), "QOI": (".qoi",), "PPM": (".ppm",), "PCX": (".pcx",), "SGI": (".sgi", ".rgb"),
    "ICO": (".ico",), "DDS": (".dds",), "ICNS": (".icns",),
}  # fmt: skip
"""Formats that Pillow can write, so that this test can create files of each."""


def test_images_of_all_formats_are_read(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for kind, suffixes in WRITTEN.items():
            for suffix in suffixes:
                Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / name / f"x{suffix.upper()}", kind)
    data = open_(tmp_path)
    assert len(data.images) == 2 * sum(map(len, WRITTEN.values()))
    for i in range(len(data.images)):
        assert data.images.load(i)[16, 16].tolist() == pytest.approx([200, 30, 30], abs=6), data.images.name(i)
    assert collect([str(tmp_path)], bytes) == [str(tmp_path / data.images.name(i)) for i in range(len(data.images))]


def test_the_suffixes_are_arrays_and_those_that_pillow_decodes_without_other_programs() -> None:
    Image.init()
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    videos, programs = {".mpg", ".mpeg"}, {".eps", ".ps"}  # not decoded; PostScript, run by Ghostscript
    without_decoder = {".bufr", ".grib", ".h5", ".hdf", ".emf", ".wmf"}
    by_reader_of_jpeg = {".mpo"}
    pillow = (readable | by_reader_of_jpeg) - videos - programs - without_decoder
    assert set(IMAGE_SUFFIXES) == pillow | {".npy"}
    assert len(IMAGE_SUFFIXES) == len(set(IMAGE_SUFFIXES))


def test_training_on_an_archive_with_train_and_val(tmp_path: Path) -> None:
    """Train on an unpacked archive: the log describes how it was read, and no training image is used for testing."""
    for number in range(24):
        path = tmp_path / "zip/pets" / ("Train" if number < 16 else "Val") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 255 * (number % 2)).save(path)
    (tmp_path / "zip/__MACOSX").mkdir()
    settings = {
        "recipe.run_root": str(tmp_path / "runs"), "data.dataset": "imagefolder", "data.root": str(tmp_path / "zip"),
        "data.split.test": "auto", "data.image_size": 8, "train.epochs": 1, "train.batch_size": 8,
        "tracking.trackers": [],
    }  # fmt: skip
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    outcome = toolkit("train", QUICKSTART, "--no-report", *given)
    assert outcome.status == 0, outcome.stderr
    for line in (
        f"{tmp_path / 'zip'} holds a single folder, pets/: the images are read from {tmp_path / 'zip/pets'}",
        "splits by folders: train is Train/, validation is Val/",
        "splits: validation is the data set's own list; test is none (",
        "images 16 train, 8 validation, 0 test; 2 classes",
    ):
        assert line in outcome.stderr
    (run,) = (tmp_path / "runs/quickstart").iterdir()
    split = json.loads((run / "split.json").read_text())
    assert sorted(split["train"]) == sorted(f"Train/{'ab'[n % 2]}/{n}.png" for n in range(16))
    assert split["test"] == []
    assert not (run / "predictions.csv").exists()
