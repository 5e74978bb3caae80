"""Damaged images that only decoding detects: whenever it happens, the message names the file and the key to skip it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import Outcome, toolkit
from finished import CONVNET, ON_FILES
from PIL import Image

from toolkit.data.dataloader import SplitDataset
from toolkit.data.datasets import open_dataset
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages, check_images
from toolkit.data.sampling import IntArray
from toolkit.data.splits import split_dataset
from toolkit.recipe import load_recipe
from toolkit.runs import Run, open_run

pytestmark = pytest.mark.long

SKIP = 'data.on_bad_image = "skip"'
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def damaged(kind: str) -> bytes:
    """Return a file whose header and, for PNG, end are intact, and whose pixels are damaged."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind)
    data = file.getvalue()
    if kind == "PNG":
        middle = data.index(b"IDAT") + 20
        return data[:middle] + bytes(40) + data[middle + 40 :]
    return data[: len(data) * 9 // 10]


KINDS = {"png": "PNG", "bmp": "BMP", "gif": "GIF", "tiff": "TIFF", "ppm": "PPM"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with two classes of 12 images of 16 x 16 pixels."""
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
    return root


def arguments(tmp_path: Path, *settings: str) -> list[str]:
    path = tmp_path / "recipe.toml"
    folders = {"runs": json.dumps(str(tmp_path / "runs")), "data": json.dumps(str(tmp_path / "data"))}
    path.write_text(ON_FILES.format(**folders, size=16, epochs=2) + CONVNET)
    given = ("data.split={ validation = 0.25, test = 0.25 }", "train.batch_size=4", *settings)
    return ["train", str(path), "--no-report", *(part for setting in given for part in ("--set", setting))]


def last_error_line(outcome: Outcome, name: str) -> str:
    """Return the last line of a failed command, which must name the image and the key."""
    assert outcome.status in (1, 2), outcome.stderr
    last = outcome.stderr.strip().splitlines()[-1]
    assert f"{name}: damaged (" in last
    assert SKIP in last
    assert "Traceback" not in outcome.stderr
    return last


def trained(tmp_path: Path, *settings: str) -> Run:
    outcome = toolkit(*arguments(tmp_path, *settings))
    assert outcome.status == 0, outcome.stderr
    return open_run(outcome.stdout.splitlines()[-1])


def in_split(tmp_path: Path, split: str) -> list[str]:
    """Return the names of the images in a split of the recipe."""
    _, path, _, *settings = arguments(tmp_path)
    table = load_recipe(path, settings[1::2]).data
    dataset = open_dataset(table)
    return [dataset.images.name(int(i)) for i in split_dataset(dataset, table)[split]]


@pytest.mark.parametrize("suffix", KINDS)
def test_damaged_pixels_are_detected_in_formats_that_open_without_an_error(
    data: Path, tmp_path: Path, suffix: str
) -> None:
    bad = data / "a" / f"broken.{suffix}"
    bad.write_bytes(damaged(KINDS[suffix]))
    images = EncodedImages(ImageFiles(data, [f"a/broken.{suffix}"]), 3)
    assert check_images(images, np.arange(1), decode=False).bad == []
    assert len(check_images(images, np.arange(1), decode=True).bad) == 1
    last_error_line(toolkit(*arguments(tmp_path, 'data.cache="off"')), f"a/broken.{suffix}")
    run = trained(tmp_path, 'data.on_bad_image="skip"', "data.max_bad_fraction=0.1")
    assert run.summary["images_left_out"] == 1
    assert [line.partition(":")[0] for line in run.split["left_out"]] == [f"a/broken.{suffix}"]


@pytest.mark.parametrize("cache", ["off", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_damaged_image_is_named_with_workers_and_cache_in_every_split(
    data: Path, tmp_path: Path, split: str, workers: int, cache: str
) -> None:
    name = in_split(tmp_path, split)[-1]  # the first image of a split is checked before training
    (data / name).write_bytes(damaged("PNG"))
    last_error_line(toolkit(*arguments(tmp_path, f"data.cache={json.dumps(cache)}", f"data.workers={workers}")), name)


@pytest.mark.parametrize("settings", [('data.normalize="dataset"',), ()])
def test_a_damaged_image_is_named_before_the_first_step(data: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """The channel statistics of the training images detect it, or the check of each split's first image."""
    names = in_split(tmp_path, "train")
    name = names[-1] if settings else names[0]
    (data / name).write_bytes(damaged("PNG"))
    last_error_line(toolkit(*arguments(tmp_path, *settings), "--dry-run"), name)


def test_a_damaged_image_is_named_after_training(data: Path, tmp_path: Path) -> None:
    """evaluate names it; predict and explain skip it, report this, and exit with status 1."""
    run = trained(tmp_path)
    name = run.split["test"][1]
    (data / name).write_bytes(damaged("PNG"))
    last_error_line(toolkit("evaluate", str(run.path)), name)
    outcome = toolkit("predict", str(run.path), str(data / name), str(data / run.split["test"][0]))
    assert outcome.status == 1
    assert f"{data / name}: damaged (" in outcome.stderr
    assert len(outcome.stdout.splitlines()) == 2
    assert "cannot be read" not in toolkit("report", str(run.path)).stderr


def call_before_batch(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], count: int) -> None:
    """Call ``act`` before the ``count``-th batch is made."""
    original, calls = SplitDataset.__getitems__, [0]

    def called(self: SplitDataset, request: tuple[IntArray, ...]) -> object:
        calls[0] += 1
        if calls[0] == count:
            act()
        return original(self, request)  # type: ignore[arg-type]

    monkeypatch.setattr(SplitDataset, "__getitems__", called)


def test_with_skip_an_image_that_is_damaged_during_training_is_not_skipped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that becomes unreadable ends the run; once it is restored, the resumed run gives the same result."""
    settings = ('data.on_bad_image="skip"', 'data.cache="off"', "checkpoint.every_steps=1")
    wanted = trained(tmp_path, *settings)
    name = wanted.split["train"][3]
    whole, kept = (data / name).read_bytes(), (data / name).stat()
    with monkeypatch.context() as patched:
        call_before_batch(
            patched, lambda: (data / name).write_bytes(damaged("PNG")) and None, 4
        )  # after an epoch's first step
        last = last_error_line(toolkit(*arguments(tmp_path, *settings)), name)
    assert "could be read then" in last
    (path,) = (p for p in wanted.path.parent.iterdir() if p != wanted.path)
    (data / name).write_bytes(whole)
    os.utime(data / name, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    outcome = toolkit("train", "--resume", str(path), "--no-report")
    assert outcome.status == 0, outcome.stderr
    found = open_run(path)
    assert found.best_weights.read_bytes() == wanted.best_weights.read_bytes()
    assert found.split == wanted.split
