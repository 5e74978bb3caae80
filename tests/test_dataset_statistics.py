"""toolkit data: formats of files, labels that occur together, groups, and duplicates across groups."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from cli import toolkit
from image_folders import write_recipe
from PIL import Image

from toolkit.data.dataset_statistics import group_statistics, label_statistics, stored_format
from toolkit.data.datasets import Dataset
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages


def test_label_pairs_are_counted() -> None:
    labels = (np.random.default_rng(0).random((200, 7)) < np.linspace(0.02, 0.6, 7)).astype(np.uint8)
    found = label_statistics(labels)
    expected = {(a, b): int((labels[:, a] & labels[:, b]).sum()) for a, b in combinations(range(7), 2)}
    assert {(a, b): count for a, b, count in found.pairs} == {pair: n for pair, n in expected.items() if n}
    counts = [count for _, _, count in found.pairs]
    assert counts == sorted(counts, reverse=True)
    assert found.per_image == {n: int((labels.sum(1) == n).sum()) for n in np.unique(labels.sum(1)).tolist()}
    a, b, count = found.pairs[0]
    names = [f"label {k}" for k in range(7)]
    share = 100 * count / labels[:, a].sum()
    assert f"  {names[a]} and {names[b]}: {count} ({share:.0f} % of {names[a]}, " in "\n".join(found.lines(names, 3))


def test_groups_are_counted_in_each_split_and_across() -> None:
    splits = {"train": np.arange(6), "validation": np.array([6, 7]), "test": np.array([8, 9])}
    found = group_statistics(np.array([0, 0, 0, 1, 1, 2, 3, 2, 4, 0]), splits)
    assert found.by_split == {"train": 3, "validation": 2, "test": 2}
    assert (found.count, found.largest, found.median) == (5, 4, 2.0)
    assert found.across == {"train, validation": 1, "train, test": 1, "validation, test": 0}


@pytest.mark.parametrize(
    ("mode", "file", "expected"),
    [
        ("RGB", "a.jpg", "JPEG, 3 x 8 bits"),
        ("RGBA", "a.png", "PNG, 4 x 8 bits"),
        ("P", "a.png", "PNG, 8-bit palette"),
        ("1", "a.png", "PNG, 1 x 1 bit"),
        ("I;16", "a.png", "PNG, 1 x 16 bits"),
        ("I;16", "a.tif", "TIFF, 1 x 16 bits"),
        ("F", "a.tif", "TIFF, 1 x 32 bits (float)"),
    ],
)
def test_channels_and_bits_of_files_are_named(mode: str, file: str, expected: str, tmp_path: Path) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / file)
    images = EncodedImages(ImageFiles(tmp_path, [file]), 3)
    assert stored_format(Dataset("toy", ["a", "b"], images, np.array([0]), {}, None, 3), 0) == expected


@pytest.mark.parametrize(
    ("file", "dtype", "expected"),
    [("a.npy", np.uint16, "NumPy, 5 x 16 bits"), ("a.tif", np.float32, "TIFF, 5 x 32 bits (float)")],
)
def test_channels_and_bits_of_files_without_pillow(file: str, dtype: Any, expected: str, tmp_path: Path) -> None:
    values = np.zeros((8, 9, 5), dtype=dtype)
    if file == "a.npy":
        np.save(tmp_path / file, values)
    else:
        tifffile.imwrite(tmp_path / file, values, planarconfig="contig", photometric="minisblack")
    images = EncodedImages(ImageFiles(tmp_path, [file]), 5)
    assert stored_format(Dataset("toy", ["a", "b"], images, np.array([0]), {}, None, 5), 0) == expected


def analyzed(folder: Path, rows: list[dict[str, Any]], *more: str) -> dict[str, Any]:
    """Run toolkit data on a table with a column "patient"; its images are "0.png" to "5.png", in two formats."""
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (8, 8, 3) if i else (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ['data.dataset="table"', f"data.table={json.dumps(str(folder / 'own.jsonl'))}",
                'data.columns={ split = "split", group = "patient" }', f"data.root={json.dumps(str(folder))}",
                *more]  # fmt: skip
    given = [part for setting in settings for part in ("--set", setting)]
    outcome = toolkit("data", write_recipe(folder), *given, "--out", folder / "out", "--json")
    assert outcome.status == 0, outcome.stderr
    text = toolkit("data", write_recipe(folder), *given, "--out", folder / "out")
    return {**json.loads(outcome.stdout), "text": text.stdout}


def row(i: int, label: Any, split: str, patient: str) -> dict[str, Any]:
    return {"image": f"{i}.png", "label": label, "split": split, "patient": patient}


def test_divided_groups_and_duplicates_across_groups_are_reported(tmp_path: Path) -> None:
    """Images 1 and 5 are equal; they are in two groups and two splits, and group x is in two splits."""
    rows = [row(0, "a", "train", "x"), row(1, "b", "train", "y"), row(2, "a", "val", "z"), row(3, "b", "val", "z"),
            row(4, "a", "test", "x"), row(5, "b", "test", "w")]  # fmt: skip
    found = analyzed(tmp_path, rows)
    assert found["stored"] == {"PNG, 3 x 8 bits": 5, "PNG, 1 x 8 bits": 1}
    assert found["groups"]["across"] == {"train, validation": 0, "train, test": 1, "validation, test": 0}
    assert found["duplicates"]["across_groups"] == [["1.png", "5.png"]]
    assert "leakage    1 groups have images in both train and test" in found["text"]
    assert "groups     1 images are in more than one group\n  1.png = 5.png" in found["text"]
    assert "stored as  PNG, 3 x 8 bits (5); PNG, 1 x 8 bits (1)" in found["text"]


def test_labels_and_pairs_of_labels_are_reported(tmp_path: Path) -> None:
    """Images 1 and 5 are equal, with other labels."""
    labels = [["a", "b"], ["b"], ["a", "b", "c"], ["a"], [], ["c"]]
    splits = ["train", "train", "train", "val", "test", "test"]
    rows = [row(i, found, splits[i], f"p{i}") for i, found in enumerate(labels)]
    found = analyzed(tmp_path, rows, 'task.kind="multi_label"')
    assert found["images_per_class"]["b"] == {"train": 3, "validation": 0, "test": 0}
    assert found["labels_per_image"] == {"0": 1, "1": 3, "2": 1, "3": 1}
    pairs = [(pair["labels"], pair["images"]) for pair in found["label_pairs"]]
    assert pairs == [(["a", "b"], 2), (["a", "c"], 1), (["b", "c"], 1)]
    assert found["duplicates"]["of_more_than_one_class"] == [["1.png", "5.png"]]
    assert "  a and b: 2 (67 % of a, 67 % of b)" in found["text"]
