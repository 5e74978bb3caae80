"""Image folders in zip and tar files, and several roots: the same images as from one folder, and clear errors."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.image_sources import EncodedImages, UnreadableImageError, check_images
from toolkit.errors import UserError
from toolkit.inference.evaluate_data import data_config
from toolkit.recipe import RecipeError, load_recipe
from toolkit.recipe.schema import DataConfig
from toolkit.report.run_images import open_run_images

REST = """
[model]
source = "torchvision"
name = "resnet18"

[optimizer]
name = "sgd"
lr = 0.1

[train]
epochs = 1
batch_size = 4
"""
"""The tables of a recipe after [data]."""


def open_(root: Path | list[Path], **values: Any) -> Dataset:
    roots = [str(one) for one in root] if isinstance(root, list) else str(root)
    return open_dataset(DataConfig.model_validate({"dataset": "imagefolder", "root": roots, **values}))


def image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with splits, and what systems and archivers leave beside the images."""
    root = tmp_path / "images"
    for number, name in enumerate(("train/cat/1", "train/cat/deep/2", "train/dog/é", "test/cat/4", "test/dog/5")):
        image(root / f"{name}.png", number)
    for name in ("train/.hidden/1.png", "__MACOSX/train/cat/._1.png", "train/dog/notes.txt", "train/dog/._é.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not an image")
    return root


def zipped(folder: Path, method: int = zipfile.ZIP_DEFLATED, name: str = "images.zip") -> Path:
    with zipfile.ZipFile(folder.parent / name, "w", method) as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(folder))
    return folder.parent / name


def tarred(folder: Path, mode: Any = "w", name: str = "images.tar") -> Path:
    with tarfile.open(folder.parent / name, mode) as archive:
        archive.add(folder, ".")
    return folder.parent / name


def wrapped(folder: Path) -> Path:
    """Write a tar file with a folder around all others, whose folders have no entries of their own."""
    with tarfile.open(folder.parent / "wrapped.tar", "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.add(path, Path("my images", path.relative_to(folder)))
    return folder.parent / "wrapped.tar"


def stored(folder: Path) -> Path:
    return zipped(folder, zipfile.ZIP_STORED)


ARCHIVES: list[Callable[[Path], Path]] = [zipped, stored, tarred, wrapped]


@pytest.mark.parametrize("pack", ARCHIVES)
def test_an_archive_gives_what_the_folder_gives(pack: Callable[[Path], Path], folder: Path) -> None:
    plain, packed = open_(folder), open_(pack(folder))
    assert isinstance(packed.images, EncodedImages)
    assert packed.classes == plain.classes == ["cat", "dog"]
    assert [*map(packed.images.name, range(5))] == [*map(plain.images.name, range(5))]
    assert all(np.array_equal(packed.images.load(i), plain.images.load(i)) for i in range(5))
    np.testing.assert_array_equal(packed.labels, plain.labels)
    assert {split: list(indices) for split, indices in packed.lists.items()} == {"train": [0, 1, 2], "test": [3, 4]}
    assert packed.notes[-1] == plain.notes[-1], "the same files are left out"
    assert not check_images(packed.images, np.arange(5), decode=True).bad


def digest(dataset: Dataset) -> list[bytes]:
    with ThreadPoolExecutor(4) as pool:
        return [pixels.tobytes() for pixels in pool.map(dataset.images.load, [*range(5)] * 20)]


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_forked_processes_and_threads_read_at_once(pack: Callable[[Path], Path], folder: Path) -> None:
    dataset = open_(pack(folder))
    dataset.images.load(0)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=lambda: queue.put(digest(dataset))) for _ in range(3)]
    for worker in workers:
        worker.start()
    expected = [pixels.tobytes() for pixels in map(open_(folder).images.load, [*range(5)] * 20)]
    assert digest(dataset) == expected
    assert all(queue.get() == expected for _ in workers)
    for worker in workers:
        worker.join()


def test_the_last_of_several_members_with_one_name_counts(folder: Path) -> None:
    path = tarred(folder)
    image(folder / "train/cat/1.png", 99)
    with tarfile.open(path, "a") as archive:
        archive.add(folder / "train/cat/1.png", "./train/cat/1.png")
    assert np.array_equal(open_(path).images.load(0), open_(folder).images.load(0))


def test_hard_links_in_a_tar_file_are_images_and_symbolic_ones_are_left_out(folder: Path) -> None:
    os.link(folder / "train/cat/1.png", folder / "train/dog/same.png")
    os.symlink("1.png", folder / "train/cat/link.png")
    data = open_(tarred(folder))
    names = {data.images.name(i): i for i in range(len(data.labels))}
    assert np.array_equal(data.images.load(names["train/dog/same.png"]), data.images.load(names["train/cat/1.png"]))
    assert "train/cat/link.png" not in names
    assert "1 special file (train/cat/link.png)" in data.notes[-1]


@pytest.mark.parametrize("pack", [zipped, stored, tarred])
def test_an_archive_that_is_cut_short_is_refused(pack: Callable[[Path], Path], folder: Path) -> None:
    path = pack(folder)
    content = path.read_bytes()
    if pack is tarred:
        content = content.rstrip(b"\0")
    for length in range(1, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"truncated|neither a folder nor a zip or tar file"):
            open_(path)


@pytest.mark.parametrize("pack", [zipped, stored])
def test_damage_within_a_member_is_reported_for_its_image(pack: Callable[[Path], Path], folder: Path) -> None:
    path = pack(folder)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("train/cat/1.png").header_offset + 60
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    data = open_(path)
    ((index, reason),) = check_images(data.images, np.arange(5), decode=False).bad
    assert (data.images.name(index), reason[:7]) == ("train/cat/1.png", "damaged")
    with pytest.raises(UnreadableImageError, match=r"train/cat/1\.png: damaged"):
        data.images.load(index)


@pytest.mark.parametrize(("mode", "suffix"), [("w:gz", "gz"), ("w:bz2", "bz2"), ("w:xz", "xz")])
def test_a_compressed_tar_file_is_refused(folder: Path, mode: str, suffix: str) -> None:
    with pytest.raises(UserError, match=r"is compressed as a whole .* unpack it, or make a zip file or a tar file"):
        open_(tarred(folder, mode, f"images.tar.{suffix}"))


def test_other_archives_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="compressed with method 14: only zip files that are stored or deflated"):
        open_(zipped(folder, zipfile.ZIP_LZMA))
    other = folder.parent / "images.rar"
    other.write_bytes(b"Rar!\x1a\x07" + bytes(1000))
    with pytest.raises(UserError, match=r"images\.rar is neither a folder nor a zip or tar file"):
        open_(other)
    with pytest.raises(UserError, match=r"there is no folder testing in .*images.zip"):
        open_(zipped(folder) / "testing")
    with pytest.raises(UserError, match="is not a folder"):
        open_(folder / "no such folder")


@pytest.mark.skipif(shutil.which("zip") is None, reason="zip is not installed")
def test_an_encrypted_zip_file_is_refused(folder: Path) -> None:
    subprocess.run(["zip", "-q", "-r", "-P", "secret", "../images.zip", "."], cwd=folder, check=True)
    with pytest.raises(UserError, match="is encrypted"):
        open_(folder.parent / "images.zip")


def test_several_roots_are_joined_and_named(folder: Path, tmp_path: Path) -> None:
    image(tmp_path / "more/bird/1.png", 7)
    image(tmp_path / "more/cat/1.png", 8)
    data = open_([zipped(folder), tmp_path / "more"])
    names = [data.images.name(i) for i in range(7)]
    assert names == [
        *("images.zip/train/cat/1.png", "images.zip/train/cat/deep/2.png", "images.zip/train/dog/é.png"),
        *("images.zip/test/cat/4.png", "images.zip/test/dog/5.png", "more/bird/1.png", "more/cat/1.png"),
    ]
    assert [data.classes[label] for label in data.labels] == ["cat", "cat", "dog", "cat", "dog", "bird", "cat"]
    assert {split: list(indices) for split, indices in data.lists.items()} == {"train": [0, 1, 2, 5, 6], "test": [3, 4]}
    assert np.array_equal(data.images.load(6), np.asarray(Image.open(tmp_path / "more/cat/1.png")))


def test_roots_with_the_same_name_are_told_apart_and_none_is_read_twice(folder: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image(tmp_path / "other/images" / name / "1.png", 7)
    data = open_([folder, tmp_path / "other/images"])
    assert {data.images.name(i).rpartition("images/")[0] for i in range(7)} == {f"{tmp_path.name}/", "other/"}
    with pytest.raises(UserError, match=r"is inside .*, so its images would be used twice"):
        open_([folder, tmp_path / "other/../images/train"])


def test_an_archive_can_be_evaluated(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        f'[recipe]\nname = "x"\n[data]\ndataset = "imagefolder"\nimage_size = 8\n{REST}'
    )
    data = open_dataset(data_config(str(zipped(folder)), load_recipe(tmp_path / "recipe.toml"), None))
    assert (data.classes, len(data.labels)) == (["cat", "dog"], 5)


def test_roots_that_were_moved_are_found_in_the_folder_that_holds_them(folder: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image(tmp_path / "more" / name / "1.png", 7)
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[recipe]\nname = "x"\n[data]\ndataset = "imagefolder"\nroot = ["before/images", "elsewhere/more"]\n'
        f"image_size = 8\n{REST}"
    )
    found = open_run_images(load_recipe(path), None, ["cat", "dog"], tmp_path)
    plain = open_([folder, tmp_path / "more"])
    assert list(found.index) == [plain.images.name(i) for i in range(7)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('dataset = "caltech101"\nroot = ["a", "b"]', 'several folders are only possible with dataset = "imagefolder"'),
        ('dataset = "imagefolder"\nroot = ["a", "a"]', "a folder is listed twice"),
        ('dataset = "imagefolder"\nroot = []', r"data\.root.*at least 1"),
        ('dataset = "imagefolder"\nroot = ["a\\nb"]', "line breaks and control characters are not allowed here"),
    ],
)
def test_roots_are_checked_before_training(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f'[recipe]\nname = "x"\n[data]\nimage_size = 8\n{lines}\n{REST}')
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.toml")
