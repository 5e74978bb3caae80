"""Test-time augmentation in evaluate, predict and export, in model.json and in the report."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from cli import toolkit
from finished import TIMM, digit_files, train_on_files
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from toolkit.errors import UserError
from toolkit.inference.tta import with_tta
from toolkit.report.run_data import load_run_data
from toolkit.report.run_page import write_run_page
from toolkit.runs import Run, open_run
from toolkit.training.trained_model import TrainedModel, load_model
from toolkit.tta import parse_tta

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run whose images are resized to 40 pixels and cropped to 32."""
    folder = tmp_path_factory.mktemp("tta")
    digit_files(folder / "data", train=20, test=10)
    settings = ("data.resize=40", "data.crop='center'", "data.split.validation=0.5")
    return train_on_files(folder, TIMM, *settings, size=32, epochs=3)


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """Copy the run, so that a test can change it."""
    return Run(shutil.copytree(finished.path, tmp_path / "run"))


@pytest.fixture(scope="module")
def trained(finished: Run) -> TrainedModel:
    """Load the run's model."""
    return load_model(finished.path)


def images_of(run: Run) -> Path:
    return Path(run.recipe.data.root) / "test"


def inputs_of(run: Run, trained: TrainedModel) -> Tensor:
    paths = sorted(map(str, images_of(run).rglob("*.png")))
    files = trained.files(paths)
    return torch.stack([trained.transform(files.load(i)) for i in range(len(paths))])


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# -- views ------------------------------------------------------------------------------------------------------------


def mirrored(module: nn.Module, images: Tensor) -> Tensor:
    """Return the logits that airbench94 calls mirror."""
    return 0.5 * module(images) + 0.5 * module(images.flip(-1))


@torch.no_grad()
def test_flip_is_the_mean_of_the_logits_of_the_image_and_its_mirror_image(trained: TrainedModel) -> None:
    images = torch.randn(5, 3, 32, 32)
    assert torch.allclose(with_tta(trained, ["flip"]).module(images), mirrored(trained.module, images), atol=1e-6)


@torch.no_grad()
def test_flip_and_translate_are_those_of_airbench94(trained: TrainedModel) -> None:
    """Jordan 2024, arXiv:2404.00498: half the weight for the image, a quarter for each of two translations."""
    images = torch.randn(5, 3, 32, 32)
    padded = F.pad(images, (1,) * 4, "reflect")
    moved = [mirrored(trained.module, padded[:, :, i : i + 32, i : i + 32]) for i in (0, 2)]
    expected = 0.5 * mirrored(trained.module, images) + 0.5 * torch.stack(moved).mean(0)
    found = with_tta(trained, ["flip", "translate"])
    assert torch.allclose(found.module(images), expected, atol=1e-6)
    assert found.preprocessing == trained.preprocessing


@torch.no_grad()
def test_five_crops_and_flip_are_torchvisions_ten_crops_of_the_larger_image(run: Run, trained: TrainedModel) -> None:
    found = with_tta(trained, ["flip", "five_crop"])
    images = inputs_of(run, found)[:6]
    assert images.shape == (6, 3, 40, 40)
    assert torch.equal(tv.center_crop(images, [32, 32]), inputs_of(run, trained)[:6]), "the same center crop"
    expected = torch.stack([trained.module(crop) for crop in tv.ten_crop(images, [32, 32])]).mean(0)
    assert torch.allclose(found.module(images), expected, atol=1e-6)


@torch.no_grad()
def test_scales_are_the_mean_over_resized_images(trained: TrainedModel) -> None:
    images = torch.randn(3, 3, 32, 32)
    larger = F.interpolate(images, (40, 40), mode="bilinear", align_corners=False)
    expected = (trained.module(images) + trained.module(larger)) / 2
    assert torch.allclose(with_tta(trained, ["scales=1,1.25"]).module(images), expected, atol=1e-6)


def test_bad_augmentation_is_one_message(run: Run, trained: TrainedModel) -> None:
    assert list(parse_tta(["flip", "scales=1,2", "five_crop"])) == ["five_crop", "scales", "flip"]
    cases = {
        "flipp": "expected flip, five_crop, translate or scales=1,1.15; did you mean flip",
        "scales": "expected flip",
        "flip=2": "expected flip",
        "scales=1,x": "scales are numbers from 0.25 to 4",
        "scales=9": "scales are numbers from 0.25 to 4",
    }
    for name, message in cases.items():
        for command in (("predict", run.path, images_of(run)), ("evaluate", run.path)):
            outcome = toolkit(*command, "--tta", name)
            assert outcome.status == 2
            assert message in outcome.stderr
    whole = replace(trained, preprocessing=replace(trained.preprocessing, resize=(32, 32), crop=False))
    with pytest.raises(UserError, match="five_crop needs images that are resized to more than the model's input"):
        with_tta(whole, ["five_crop"])
    fixed = replace(trained, module=nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))
    with pytest.raises(UserError, match="does not accept images of 64x64 pixels"):
        with_tta(fixed, ["scales=1,2"])
    assert "--store needs --tta" in toolkit("evaluate", run.path, "--store").stderr
    outcome = toolkit("export", run.path, "--format", "timm", "--tta", "flip")
    assert outcome.status == 2
    assert "--format timm cannot contain test-time augmentation" in outcome.stderr


# -- commands ---------------------------------------------------------------------------------------------------------


def test_evaluate_compares_and_stores_and_predict_uses_what_is_stored(run: Run, tmp_path: Path) -> None:
    original, card = toolkit("predict", run.path, images_of(run)).stdout, run.model_card
    with torch.no_grad():
        module = with_tta(load_model(run.path), ["flip"]).module
        probabilities = module(inputs_of(run, load_model(run.path))).softmax(1)
    outcome = toolkit("evaluate", run.path, "--tta", "flip", "--store", "--json")
    assert outcome.status == 0, outcome.stderr
    found = json.loads(outcome.stdout)["metrics"]
    assert {each["verdict"] for each in found["best"].values()} == {"equal"}
    labels = torch.tensor([int(path.parent.name) for path in sorted(images_of(run).rglob("*.png"))])
    loss = F.nll_loss(probabilities.log(), labels).item()
    assert found["TTA"]["test_loss"]["evaluated"] == pytest.approx(loss, rel=1e-5)
    accuracy = (probabilities.argmax(1) == labels).float().mean().item()
    assert found["TTA"]["test_accuracy"]["evaluated"] == pytest.approx(accuracy)
    (result,) = json.loads((run.path / "tta.json").read_text())["results"]
    assert (result["tta"], result["split"], result["images"]) == (["flip"], "test", 100)
    assert result["accuracy"] == run.summary["best"]["test_accuracy"]
    assert result["accuracy_with_tta"] == pytest.approx(accuracy)
    difference = (result["only_with"] - result["only_without"]) / 100
    assert difference == pytest.approx(result["accuracy_with_tta"] - result["accuracy"])

    assert run.model_card == card | {"tta": ["flip"]}
    stored = toolkit("predict", run.path, images_of(run)).stdout
    assert [float(row["probability"]) for row in rows(stored)] == pytest.approx(
        probabilities.amax(1).tolist(), abs=1e-5
    )
    assert [each.prediction for each in open_run(run.path).predict(images_of(run))] == [
        row["prediction"] for row in rows(stored)
    ]
    assert open_run(run.path).evaluate() == {
        name.removeprefix("test_"): each["evaluated"] for name, each in found["TTA"].items()
    }
    assert open_run(run.path).evaluate(data=images_of(run))["accuracy"] == pytest.approx(accuracy)
    assert toolkit("predict", run.path, images_of(run), "--tta", "none").stdout == original
    assert toolkit("evaluate", run.path, "--tta", "none", "--store").status == 0
    assert run.model_card == card
    page = write_run_page(tmp_path / "page.html", load_run_data(run), {}, []).read_text()
    assert f"{100 * difference:+.2f} (" in page


def test_calibration_and_augmentation_combine(run: Run) -> None:
    run.write_json("checkpoints/model.json", run.model_card | {"tta": ["flip", "five_crop"]})
    assert toolkit("calibrate", run.path).status == 0
    found = json.loads((run.path / "calibration.json").read_text())
    evaluated = json.loads(toolkit("evaluate", run.path, "--json").stdout)["metrics"]
    after = found["splits"]["test"]["after"]["nll"]
    assert evaluated["TTA, calibrated"]["test_loss"]["evaluated"] == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize(
    ("style", "tta"),
    [
        pytest.param("onnx", ["five_crop", "flip"], marks=pytest.mark.extended),
        pytest.param("torch-export", ["five_crop", "scales=1,1.25"], marks=pytest.mark.extended),
        pytest.param("torch-export", ["flip"], marks=pytest.mark.extended),
        ("safetensors", ["five_crop", "scales=1,1.25", "flip"]),
    ],
)
@torch.no_grad()
def test_exported_models_contain_the_augmentation(run: Run, style: str, tta: list[str], tmp_path: Path) -> None:
    folder = tmp_path / style
    options = [part for name in tta for part in ("--tta", name)]
    assert toolkit("export", run.path, "--format", style, "-o", folder, *options).status == 0
    used = with_tta(load_model(run.path), tta)
    images = inputs_of(run, used)
    card = json.loads((folder / "preprocessing.json").read_text())
    assert card["test_time_augmentation"] == {"views": tta, "in_model": style != "safetensors"}
    side = 40 if "five_crop" in tta and style != "safetensors" else 32
    assert card["input"]["shape"] == ["batch", 3, side, side]
    if style == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        found = session.run(None, {"images": images.numpy()})[0]
        assert np.allclose(found, used.module(images).numpy(), atol=1e-4)
    elif style == "torch-export":
        found = torch.export.load(folder / "model.pt2").module()(images)
        assert torch.allclose(found, used.module(images), atol=1e-5)
    else:
        assert load_model(folder).tta == tuple(tta)
        found = rows(toolkit("predict", folder, images_of(run)).stdout)
        expected = used.module(images).softmax(1).amax(1).tolist()
        assert [float(row["probability"]) for row in found] == pytest.approx(expected, abs=1e-5)
