"""Orientation and value range are the same in training, evaluation, prediction, report and export."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import toolkit
from finished import CONVNET, ON_FILES, train
from PIL import Image

from toolkit.data.image_sources import to_shown
from toolkit.report.run_data import load_run_data
from toolkit.report.run_images import open_run_images
from toolkit.runs import Run
from toolkit.training.trained_model import load_model

SIZE = 16
IMAGES = 10


def shape(label: int, number: int) -> np.ndarray:
    """Return an image in 0..1, [16, 16]: class 0 is bright at the top, class 1 on the left, 90 degrees apart."""
    values = np.full((SIZE, SIZE), 0.2)
    values[: SIZE // 2] = 0.95
    values += np.random.default_rng(number).uniform(-0.05, 0.05, values.shape)
    return values if label == 0 else values.T


def recipe(folder: Path, channels: int) -> Path:
    folders = {"runs": json.dumps(str(folder / "runs")), "data": json.dumps(str(folder / "data"))}
    text = ON_FILES.format(**folders, size=SIZE, epochs=3).replace("workers = 0", f"workers = 0\nchannels = {channels}")
    (folder / "recipe.toml").write_text(text + CONVNET)
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images as a phone stores them, rotated with a tag, so that the classes look alike without the tags."""
    folder = tmp_path_factory.mktemp("turned")
    for label in (0, 1):
        (folder / "data" / str(label)).mkdir(parents=True)
        for number in range(IMAGES):
            pixels = (shape(label, number) * 255).astype(np.uint8)[..., None].repeat(3, 2)
            exif = Image.Exif()
            exif[0x0112] = (1, 6, 3, 8)[number % 4]
            stored = np.ascontiguousarray(np.rot90(pixels, number % 4))
            suffix = ("jpg", "png", "tiff", "webp")[number // 2 % 4]
            Image.fromarray(stored).save(folder / "data" / str(label) / f"{number}.{suffix}", exif=exif)
    return folder


@pytest.fixture(scope="module")
def run(turned: Path) -> Run:
    return train(recipe(turned, 3))


def test_model_card_recipe_and_export_state_the_orientation_rule(run: Run, turned: Path, tmp_path: Path) -> None:
    assert run.model_card["preprocessing"]["exif"] == "apply"
    assert run.recipe.data.exif == "apply"
    assert "exif = " in (run.path / "recipe.toml").read_text()
    outcome = toolkit("export", run.path, "--format", "safetensors", "-o", tmp_path / "out")
    assert outcome.status == 0, outcome.stderr
    steps = json.loads((tmp_path / "out" / "preprocessing.json").read_text())["steps"]
    assert steps[1] == "turn the image upright by its EXIF orientation"
    ignoring = train(recipe(turned, 3), 'data.exif="ignore"')
    assert ignoring.model_card["preprocessing"]["exif"] == "ignore"
    assert toolkit("export", ignoring.path, "--format", "safetensors", "-o", tmp_path / "other").status == 0
    assert "EXIF" not in (tmp_path / "other" / "preprocessing.json").read_text()
    assert "are the same" in toolkit("evaluate", ignoring.path).stdout


@pytest.mark.parametrize("cache", ["off", "disk"])
@pytest.mark.parametrize("rule", ["apply", "ignore"])
def test_training_and_prediction_use_the_same_pixels(turned: Path, cache: str, rule: str, tmp_path: Path) -> None:
    """Compare predictions.csv, with or without cached images, with predictions from the files by `toolkit predict`."""
    trained = train(recipe(turned, 3), f"data.cache={json.dumps(cache)}", f"data.exif={json.dumps(rule)}")
    rows = trained.prediction_records()
    files = [turned / "data" / row["path"] for row in rows]
    outcome = toolkit("predict", trained.path, *files)
    found = list(csv.DictReader(outcome.stdout.splitlines()))
    assert [row["prediction"] for row in found] == [row["prediction"] for row in rows]
    for one, other in zip(found, rows, strict=True):
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=2e-6)
    if rule == "apply":  # without the tags the classes cannot be distinguished
        assert trained.summary["best"]["val_accuracy"] == 1


def test_the_report_shows_images_upright(run: Run, turned: Path) -> None:
    data = load_run_data(run)
    pictures = open_run_images(run.recipe, data.preprocessing, data.classes)
    for label in ("0", "1"):
        names = [name for name in run.split["train"] if name.startswith(f"{label}/")]
        for name in names:
            pixels = pictures.load(name)
            assert pixels is not None
            image = to_shown(pixels)
            expected = shape(int(label), int(Path(name).stem)) * 255
            assert np.abs(np.asarray(image.convert("L")).astype(float) - expected).mean() < 8, name


def test_a_model_card_without_the_key_means_the_earlier_behavior(run: Run, tmp_path: Path) -> None:
    card: dict[str, Any] = run.model_card
    del card["preprocessing"]["exif"], card["preprocessing"]["value_range"]
    (tmp_path / "model.json").write_text(json.dumps(card))
    (tmp_path / "best.safetensors").write_bytes(run.best_weights.read_bytes())
    expected = load_model(tmp_path).preprocessing
    assert (expected.exif, expected.value_range) == ("ignore", (0, 65535))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of a 12-bit sensor as 16-bit PNG and int32 TIFF; `>> 8` would make them black."""
    folder = tmp_path_factory.mktemp("deep")
    for label in (0, 1):
        (folder / "data" / str(label)).mkdir(parents=True)
        for number in range(IMAGES):
            values = np.rint(shape(label, number) * 4095)
            path = folder / "data" / str(label) / str(number)
            if number % 2:
                Image.fromarray(values.astype(np.uint16)).save(f"{path}.png")
            else:
                Image.fromarray(values.astype(np.int32)).save(f"{path}.tiff")
    return folder


def test_twelve_bit_images_are_trained_on_and_a_single_image_is_read_the_same(deep: Path) -> None:
    outcome = toolkit("train", recipe(deep, 1), "--no-report", "--set", 'data.normalize="dataset"')
    assert outcome.status == 0, outcome.stderr
    assert "20 images have more than 8 bits per sample, with values from" in outcome.stderr
    assert "0 is black and 4095 is white in all of them" in outcome.stderr
    run = Run(Path(outcome.stdout.splitlines()[-1]))
    card = run.model_card["preprocessing"]
    assert card["value_range"] == [0, 4095]
    assert card["mean"][0] == pytest.approx((0.2 + 0.95) / 2, abs=0.02)
    assert run.summary["best"]["val_accuracy"] == 1
    assert "equal those of summary.json" in toolkit("evaluate", run.path).stdout
    rows = run.prediction_records()
    for row in rows:
        (line,) = csv.DictReader(toolkit("predict", run.path, deep / "data" / row["path"]).stdout.splitlines())
        assert line["prediction"] == row["prediction"]
        assert float(line["probability"]) == pytest.approx(float(row["probability"]), abs=2e-6)
    found = json.loads(toolkit("data", recipe(deep, 1), "--json").stdout)
    assert found["mean"][0] == pytest.approx(card["mean"][0], abs=0.01)  # over the training images only
    assert found["unreadable"] == []


def test_an_ambiguous_value_range_is_refused_before_training_unless_stated(deep: Path, tmp_path: Path) -> None:
    for path in (deep / "data").glob("*/*.png"):
        values = np.asarray(Image.open(path)).astype(np.float32) / 100
        Image.fromarray(values).save(tmp_path / f"{path.parent.name}{path.stem}.tiff")
    other = tmp_path / "float"
    for file in tmp_path.glob("*.tiff"):
        (other / "data" / file.name[0]).mkdir(parents=True, exist_ok=True)
        file.rename(other / "data" / file.name[0] / file.name)
    path = recipe(other, 1)
    outcome = toolkit("train", path, "--no-report", "--set", "train.batch_size=4")
    assert outcome.status == 2
    assert "10 images have float samples of more than 8 bits" in outcome.stderr
    assert "set data.value_range = [BLACK, WHITE]" in outcome.stderr
    assert not (other / "runs").exists()
    run = train(path, "data.value_range=[0, 40.95]", "train.batch_size=4")
    assert run.model_card["preprocessing"]["value_range"] == [0, 40.95]
    outcome = toolkit("train", path, "--set", "data.value_range=[1, 1]")
    assert outcome.status == 2
    assert "value_range: the first value, of black, must be smaller than the second" in outcome.stderr
