"""Near-duplicates: detecting rescaled, recompressed and cropped copies in images with known copies."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cli import toolkit
from PIL import Image

from toolkit.data.near_duplicates import groups, near_pairs, thumbnail
from toolkit.study.expand import expand, read_study

RECIPES = Path(__file__).parent.parent / "recipes"


def scene(seed: int) -> Image.Image:
    """Return a smooth pattern with detail of 240 x 160 pixels; each seed gives a different scene."""
    draw = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(draw.integers(0, 256, (n, n), dtype=np.uint8)).resize((240, 160)), dtype=np.float32)
        for n in (4, 8, 14)
    ]
    return Image.fromarray((layers[0] * 0.6 + layers[1] * 0.25 + layers[2] * 0.15).astype(np.uint8)).convert("RGB")


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


COPIES = {
    "smaller": lambda image: image.resize((120, 80)),
    "squashed": lambda image: image.resize((150, 150)),
    "recompressed": lambda image: recompressed(image, 20),
    "half": lambda image: image.crop((60, 20, 204, 124)),
    "crop-rescaled": lambda image: image.crop((10, 5, 178, 120)).resize((300, 205)),
}


def pairs_of(images: list[Image.Image]) -> list[tuple[int, int]]:
    aspects = np.array([image.width / image.height for image in images], dtype=np.float32)
    return near_pairs(np.stack([thumbnail(image) for image in images]), aspects)


@pytest.mark.parametrize("kind", COPIES)
def test_all_copies_and_only_copies_are_found(kind: str) -> None:
    originals = [scene(seed) for seed in range(8)]
    assert pairs_of(originals) == []
    found = pairs_of([*originals, *(COPIES[kind](image) for image in originals)])
    assert set(found) <= {(n, n + 8) for n in range(8)}, "nothing else"
    # A crop may fall between two compared windows; copies of whole images are always found.
    assert len(found) >= (4 if kind in ("half", "crop-rescaled") else 8)


def test_blank_images_are_not_duplicates_of_each_other() -> None:
    assert pairs_of([Image.new("RGB", (64, 64), (level, level, level)) for level in (0, 10, 255)]) == []
    assert near_pairs(np.zeros((0, 64, 64), np.uint8), np.zeros(0, np.float32)) == []


def test_groups_are_the_connected_components_of_pairs() -> None:
    assert groups([(0, 1), (4, 5), (1, 2), (5, 7), (2, 0)]) == [[0, 1, 2], [4, 5, 7]]


def test_the_command_counts_across_and_within_splits_with_and_without_the_same_class(tmp_path: Path) -> None:
    out, tmp_path = tmp_path / "out", tmp_path / "images"
    where = [("train", "a"), ("train", "b"), ("val", "a"), ("val", "b"), ("test", "a"), ("test", "b")]
    for number, (split, name) in enumerate(where):
        (tmp_path / split / name).mkdir(parents=True)
        scene(number).save(tmp_path / split / name / "0.png")
    COPIES["half"](scene(0)).save(tmp_path / "test" / "b" / "crop.png")
    COPIES["smaller"](scene(1)).save(tmp_path / "train" / "b" / "small.png")
    scene(2).save(tmp_path / "val" / "a" / "equal.bmp")
    given = ['data.dataset="imagefolder"', f"data.root={json.dumps(str(tmp_path))}", "data.image_size=32"]
    arguments = [part for setting in given for part in ("--set", setting)]
    command = ("data", str(RECIPES / "quickstart.toml"), *arguments, "--out", str(out))
    found = json.loads(toolkit(*command, "--json").stdout)
    leaked, small = ["train/a/0.png", "test/b/crop.png"], ["train/b/0.png", "train/b/small.png"]
    assert found["near_duplicates"] == {
        "across_splits": {"train, validation": [], "train, test": [leaked], "validation, test": []},
        "within_splits": {"train": [small], "validation": [], "test": []},
        "of_more_than_one_class": [leaked],
        "across_groups": [],
    }
    assert found["duplicates"]["within_splits"]["validation"] == [["val/a/0.png", "val/a/equal.bmp"]]
    outcome = toolkit(*command)
    assert outcome.status == 0, outcome.stderr
    shown = outcome.stdout
    assert (
        "leakage    1 groups of near-duplicates are in both train and test\n  train/a/0.png ~ test/b/crop.png" in shown
    )
    assert "labels     1 groups of near-duplicates are of more than one class" in shown
    assert "repeated   1 groups of near-duplicates are within train" in shown


def test_caltech_has_31_images_in_its_smallest_class(shared_data: Path) -> None:
    """The report states 45; the official lists contradict it."""
    lists = Path(shared_data) / "caltech101-a.tar"
    with tarfile.open(lists) as archive:
        files = [archive.extractfile(f"caltech101/{name}.txt") for name in ("train", "test")]
        lines = [line for file in files if file is not None for line in file.read().decode().split("\n")]
    counts = Counter(line.split("/")[0] for line in lines if "/" in line and not line.startswith("BACKGROUND"))
    assert (len(counts), counts.most_common()[-1]) == (101, ("inline_skate", 31))


def test_the_grid_of_giunta_has_144_points() -> None:
    path = next(Path(__file__).parent.parent.glob("recipes/papers/giunta/grid*.toml"))
    assert expand(read_study(str(path), [])).count == 144
