"""toolkit data: its numbers on images for which they are known, and its plots."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import toolkit
from conftest import SUBSET_TEST, SUBSET_TRAIN
from PIL import Image

from toolkit.data.dataset_plots import contact_sheet, histogram
from toolkit.data.dataset_report import analyze_dataset
from toolkit.data.image_sources import as_image
from toolkit.recipe import load_recipe
from toolkit.report.data_plots import CAPTION, GAP, TILE, class_totals
from toolkit.report.plot_style import SPLIT_COLORS

pytestmark = pytest.mark.usefixtures("pdf_figures")

RECIPES = Path(__file__).parent.parent / "recipes"
CLASSES = ["$x_1$ & <b>", "ñandú", "日本"]
"""In the data set's order; matplotlib would read one as a formula, and one has characters that are two columns wide."""
COUNTS = {"train": 4, "val": 2, "test": 3}


def write_image(path: Path, seed: int, size: tuple[int, int] = (24, 16)) -> None:
    """Write an image that is half black, half white (so mean and standard deviation are 1/2), drawn by ``seed``."""
    pixels = np.zeros(size[0] * size[1], dtype=np.uint8)
    pixels[np.random.default_rng(seed).permutation(len(pixels))[: len(pixels) // 2]] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.reshape(size[1], size[0])).convert("RGB").save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three classes in three splits: one file is unreadable, one image is in two splits, one in two classes."""
    root = tmp_path_factory.mktemp("images")
    seed = 0
    for split, count in COUNTS.items():
        for name in CLASSES:
            for number in range(count):
                write_image(root / split / name / f"{number}.png", seed := seed + 1)
    Image.open(root / "train" / "日本" / "0.png").save(root / "test" / "日本" / "0.bmp")
    (root / "test" / "日本" / "0.png").unlink()
    Image.open(root / "train" / "ñandú" / "1.png").save(root / "train" / "日本" / "1.png")
    write_image(root / "test" / "ñandú" / "2.png", 1000, (32, 8))
    (root / "val" / "ñandú" / "1.png").write_bytes(b"no image")
    return root


def settings(root: Path) -> list[str]:
    given = ('data.dataset="imagefolder"', f"data.root={json.dumps(str(root))}", "data.image_size=16",
             'data.resize="none"', "data.channels=3")  # fmt: skip
    return [part for setting in given for part in ("--set", setting)]


@pytest.fixture(scope="module")
def report(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out") / "deep" / "er"
    outcome = toolkit("data", str(RECIPES / "quickstart.toml"), *settings(images), "--out", str(out), "--json")
    assert outcome.status == 0, outcome.stderr
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def test_images_are_counted_by_class_and_split(report: dict[str, Any]) -> None:
    assert report["images"] == {"train": 12, "validation": 6, "test": 9}
    assert report["images_per_class"] == {name: {"train": 4, "validation": 2, "test": 3} for name in CLASSES}


def test_sizes_are_counted_for_readable_images(report: dict[str, Any]) -> None:
    assert report["sizes"] == {"24x16": 25, "32x8": 1}, "26 of 27 can be read"
    assert report["width"] == {"min": 24, "median": 24.0, "mean": round((25 * 24 + 32) / 26, 2), "max": 32}
    assert report["height"] == {"min": 8, "median": 16.0, "mean": round((25 * 16 + 8) / 26, 2), "max": 16}


def test_unreadable_and_repeated_images_are_listed(report: dict[str, Any]) -> None:
    assert report["unreadable"] == [{"name": "val/ñandú/1.png", "reason": "not an image of a known format"}]
    duplicates = report["duplicates"]
    leaked = ["train/日本/0.png", "test/日本/0.bmp"]
    assert duplicates["across_splits"] == {"train, validation": [], "train, test": [leaked], "validation, test": []}
    twice = ["train/ñandú/1.png", "train/日本/1.png"]
    assert duplicates["within_splits"] == {"train": [twice], "validation": [], "test": []}
    assert duplicates["of_more_than_one_class"] == [twice]


def test_channel_statistics_of_half_black_half_white(images: Path, tmp_path: Path) -> None:
    """Over whole images, mean and standard deviation are exactly one half."""
    for split in COUNTS:
        for seed, name in enumerate(CLASSES):
            write_image(tmp_path / "d" / split / name / "0.png", seed, (16, 16))
    arguments = [*settings(tmp_path / "d"), "--out", str(tmp_path / "out"), "--json"]
    found = json.loads(toolkit("data", str(RECIPES / "quickstart.toml"), *arguments).stdout)
    assert found["mean"] == pytest.approx([0.5] * 3)
    assert found["std"] == pytest.approx([0.5] * 3)


def test_text_shows_names_unchanged_in_aligned_columns(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = toolkit("data", str(RECIPES / "quickstart.toml"), *settings(images))
    assert outcome.status == 0
    rows = [line for line in outcome.stdout.splitlines() if line.startswith("  ") and line.split()[-1] == "3"]
    assert [row.rsplit(maxsplit=3)[0].strip() for row in rows] == CLASSES
    assert rows[2].index("4") + len("日本") == rows[1].index("4"), "each of two characters is two columns wide"
    assert "leakage    1 images are in both train and test" in outcome.stdout
    assert "note       splits by folders: train is train/, validation is val/, test is test/\n" in outcome.stdout
    assert "train/日本/0.png = test/日本/0.bmp" in outcome.stdout
    paths = [Path(line) for line in outcome.stdout.splitlines()[-5:]]
    assert [str(path) for path in paths] == [
        f"data-report/quickstart/{name}"
        for name in (
            "class-histogram.png",
            "class-histogram.svg",
            "class-totals.png",
            "class-totals.svg",
            "contact-sheet.png",
        )
    ]
    for path in paths:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in path.read_bytes()


def test_control_characters_in_names_are_not_sent_to_the_terminal(tmp_path: Path) -> None:
    for split in COUNTS:
        for seed, name in enumerate(("a\x1b[2Jb", "c")):
            write_image(tmp_path / "d" / split / name / "0.png", seed, (16, 16))
    outcome = toolkit("data", str(RECIPES / "quickstart.toml"), *settings(tmp_path / "d"), "--out", str(tmp_path / "o"))
    assert outcome.status == 0, outcome.stderr
    assert "\x1b" not in outcome.stdout + outcome.stderr
    assert "a%1B[2Jb" in outcome.stdout


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    outcome = toolkit("data", str(RECIPES / "quickstart.toml"), "--out", str(file / "x"))
    assert outcome.status == 2
    assert f"{file / 'x'} cannot be written: Not a directory; choose another path" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_missing_data_is_bad_input(tmp_path: Path) -> None:
    outcome = toolkit("data", str(RECIPES / "resnet50_caltech.toml"), "--set", f"data.root={json.dumps(str(tmp_path))}")
    assert outcome.status == 2
    assert "101_ObjectCategories" in outcome.stderr


# Plots


def test_histogram_has_a_bar_for_each_class_and_split() -> None:
    report = analyze_dataset(load_recipe(RECIPES / "quickstart.toml"), lambda text: None)
    upper, lower = histogram(report).axes
    heights = [bar.get_height() for bar in upper.patches]
    assert heights == [*report.counts["train"], *report.counts["validation"]]
    assert [bar.get_y() for bar in upper.patches[10:]] == list(report.counts["train"]), "stacked"
    assert [bar.get_height() for bar in lower.patches] == list(report.counts["test"])
    assert [label.get_text() for label in lower.get_xticklabels()] == [str(digit) for digit in range(10)]
    legend = upper.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["train (1,294)", "validation (144)"]
    assert len(set(SPLIT_COLORS.values())) == 3


def test_all_splits_together_are_one_panel() -> None:
    """Mereu's plot of the data: images per class over all splits together."""
    report = analyze_dataset(load_recipe(RECIPES / "quickstart.toml"), lambda text: None)
    (axes,) = class_totals("title", report.classes, sum(report.counts.values())).axes
    assert [bar.get_height() for bar in axes.patches] == np.bincount(report.dataset.labels).tolist()
    assert axes.get_legend().get_texts()[0].get_text() == "all splits (1,797)"


def test_contact_sheet_shows_raw_and_normalized_images() -> None:
    settings = ["data.normalize = { mean = [0.0], std = [0.5] }"]
    report = analyze_dataset(load_recipe(RECIPES / "quickstart.toml", settings), lambda text: None)
    figure = contact_sheet(report)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [str(digit) for digit in range(10)]
    (shown,) = axes.images
    sheet = np.asarray(shown.get_array())
    raw = np.asarray(
        as_image(report.dataset.images.load(report.examples[0])).resize((TILE, TILE), Image.Resampling.NEAREST)
    )
    left = sheet[CAPTION : CAPTION + TILE, GAP : GAP + TILE, 0]
    assert np.array_equal(left, raw)
    right = sheet[CAPTION : CAPTION + TILE, GAP + TILE + GAP // 2 :][:, :TILE, 0]
    assert np.abs(right.astype(int) - raw).max() <= 1, "0..1 divided by 0.5 is 0..2, shown from black to white"
    assert any(re.search(r"0\.00 black, 2\.00 white", text.get_text()) for text in figure.texts)


def test_the_plots_have_a_bounded_size_for_any_number_of_classes(tmp_path: Path) -> None:
    """The contact sheet shows 200 of 600 classes, evenly spaced; the histogram shows all, as one outline per split."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 3, 8, 8), dtype=np.uint8)
    for label, images in enumerate(pixels):
        for number, image in enumerate(images):
            path = tmp_path / "d" / ("train", "val", "test")[number] / f"{label:03d}" / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(image).save(path)
    given = ['data.dataset="imagefolder"', f"data.root={json.dumps(str(tmp_path / 'd'))}", "data.image_size=8"]
    report = analyze_dataset(load_recipe(RECIPES / "quickstart.toml", given), lambda text: None)
    figure = contact_sheet(report)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [f"{label:03d}" for label in range(0, 600, 3)]
    assert any("200 of 600 classes" in text.get_text() for text in figure.texts)
    upper, lower = histogram(report).axes
    assert [len(axes.patches) for axes in (upper, lower)] == [2, 1]
    train, validation = (patch.get_data() for patch in upper.patches)
    assert train.values.tolist() == validation.baseline.tolist() == [1] * 600
    assert validation.values.tolist() == [2] * 600
    assert (validation.edges[0], validation.edges[-1]) == (-0.5, 599.5)


def test_the_report_on_real_images(caltech_subset: Path, tmp_path: Path) -> None:
    arguments = ["--set", f"data.root={json.dumps(str(caltech_subset))}", "--out", str(tmp_path / "o"), "--json"]
    found = json.loads(toolkit("data", str(RECIPES / "resnet50_caltech.toml"), *arguments).stdout)
    assert found["images"] == {"train": 5 * SUBSET_TRAIN, "validation": 5 * SUBSET_TRAIN, "test": 10 * SUBSET_TEST}
    assert found["unreadable"] == []
    assert len(found["mean"]) == 3
    assert 200 < found["width"]["median"] <= 400
