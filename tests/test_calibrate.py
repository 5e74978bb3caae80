"""`toolkit calibrate`: temperature scaling on validation, and everything that applies it."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from cli import toolkit
from finished import CONVNET, TIMM, digit_files, train, train_on_files
from scipy.special import expit, softmax
from torch import Tensor
from torch.nn import functional as F
from two_digits import write_two_digits

from toolkit.errors import UserError
from toolkit.inference.calibrate import best_temperature, negative_log_likelihood, reliability
from toolkit.report.run_data import load_run_data
from toolkit.report.run_page import write_run_page
from toolkit.report.test_plots import temperature_figure
from toolkit.runs import Run, open_run
from toolkit.training.task import MultiLabel
from toolkit.training.trained_model import load_model

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run that fits wrong labels of a third of its training images, so that it is overconfident on others."""
    folder = tmp_path_factory.mktemp("calibrate")
    files = sorted(digit_files(folder / "data", train=30, test=20).rglob("*.png"))
    for file in files[::3]:
        wrong = (int(file.parent.name) + 1) % 10
        file.rename(file.parent.parent / str(wrong) / f"wrong-{file.name}")
    settings = ("data.split.validation=0.5", "model.head.hidden=[32]", "train.best_metric='last'", "optimizer.lr=0.1")
    return train_on_files(folder, CONVNET, *settings, epochs=25)


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """Copy the run, so that a test can calibrate it."""
    return Run(shutil.copytree(finished.path, tmp_path / "run"))


def images_of(run: Run, split: str = "test") -> Path:
    return Path(run.recipe.data.root) / split


def inputs_of(run: Run) -> Tensor:
    trained = load_model(run.path)
    paths = sorted(map(str, images_of(run).rglob("*.png")))
    files = trained.files(paths)
    return torch.stack([trained.transform(files.load(i)) for i in range(len(paths))])


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# -- the temperature --------------------------------------------------------------------------------------------------


def sample(factor: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Return logits that are ``factor`` times too large for labels drawn from their softmax, and the labels."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(count, 5)) * 2
    labels = (softmax(logits, axis=1).cumsum(1) < random.random((count, 1))).sum(1).clip(max=4)
    return logits * factor, labels


def test_the_temperature_undoes_a_factor_of_the_logits() -> None:
    logits, labels = sample(3.0)
    temperature = best_temperature(logits, labels)
    assert temperature == pytest.approx(3.0, rel=0.03)
    assert best_temperature(logits * 2, labels) == pytest.approx(2 * temperature, rel=1e-4)
    assert reliability(logits, labels, 1.0).ece > 0.1
    assert reliability(logits, labels, temperature).ece < 0.02
    assert reliability(logits, labels, 1.0).counts != reliability(logits, labels, temperature).counts


def test_the_temperature_is_that_of_l_bfgs_in_torch() -> None:
    logits, labels = sample(1.7, 500)
    temperature = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.from_numpy(logits) / temperature, torch.from_numpy(labels))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    found = best_temperature(logits, labels)
    assert found == pytest.approx(temperature.item(), rel=1e-4)
    assert negative_log_likelihood(logits, labels, 1.0) == pytest.approx(loss.item(), abs=1e-12)


def test_the_temperature_of_several_labels_is_where_the_derivative_is_zero() -> None:
    """The derivative of the binary cross-entropy by 1/T is the mean of (p - y) z."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(500, 4)) * 3
    labels = (random.random((500, 4)) < expit(logits / 2)).astype(np.uint8)
    temperature = best_temperature(logits, labels)
    assert ((expit(logits / temperature) - labels) * logits).mean() == pytest.approx(0, abs=1e-5)
    assert 1.7 < temperature < 2.3
    expected = F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels).double())
    assert negative_log_likelihood(logits, labels, 1.0) == pytest.approx(expected.item(), abs=1e-12)


def test_without_a_best_temperature_the_message_says_why() -> None:
    logits, _ = sample(1.0, 200)
    with pytest.raises(UserError, match="on 200 validation images: all predictions are correct"):
        best_temperature(logits, logits.argmax(1))
    for factor in (5.0, 1000.0):  # with which the likelihood is 1 in float64 at low temperatures, or at all of them
        with pytest.raises(UserError, match="all predictions are correct"):
            best_temperature(logits * factor, logits.argmax(1))
        with pytest.raises(UserError, match="all predictions are correct"):
            best_temperature(logits * factor, (logits > 0).astype(np.uint8))
    with pytest.raises(UserError, match="no better than chance"):
        best_temperature(logits, logits.argmin(1))


# -- the command, and what applies the temperature --------------------------------------------------------------------


def test_an_overconfident_run_is_calibrated_and_every_command_applies_it(run: Run) -> None:
    before = rows(toolkit("predict", run.path, images_of(run)).stdout)
    outcome = toolkit("calibrate", run.path, "--json")
    assert outcome.status == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    temperature, splits = found["temperature"], found["splits"]
    assert temperature > 1
    assert splits["validation"]["after"]["nll"] < splits["validation"]["before"]["nll"]
    assert splits["validation"]["after"]["ece"] < splits["validation"]["before"]["ece"]
    assert json.loads((run.path / "calibration.json").read_text()) == found
    assert splits["test"]["after"]["ece"] < splits["test"]["before"]["ece"]
    best = run.summary["best"]
    assert splits["validation"]["before"]["nll"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert splits["test"]["before"]["nll"] == pytest.approx(best["test_loss"], rel=1e-6)

    after = rows(toolkit("predict", run.path, images_of(run)).stdout)
    assert [row["prediction"] for row in after] == [row["prediction"] for row in before]
    with torch.no_grad():
        logits = load_model(run.path).module(inputs_of(run))
    expected = (logits / temperature).softmax(1).amax(1).tolist()
    assert [float(row["probability"]) for row in after] == pytest.approx(expected, abs=1e-5)

    evaluated = json.loads(toolkit("evaluate", run.path, "--json").stdout)["metrics"]
    assert {each["verdict"] for each in evaluated["best"].values()} == {"equal"}
    assert evaluated["calibrated"]["test_accuracy"]["evaluated"] == best["test_accuracy"]
    assert evaluated["calibrated"]["test_loss"]["evaluated"] == pytest.approx(splits["test"]["after"]["nll"], rel=1e-5)
    assert open_run(run.path).evaluate()["loss"] == evaluated["calibrated"]["test_loss"]["evaluated"]
    other = open_run(run.path).evaluate(data=images_of(run))
    assert other["loss"] == pytest.approx(splits["test"]["after"]["nll"], rel=1e-5)


def test_removing_the_temperature_restores_the_model_and_calibrating_again_gives_the_same(run: Run) -> None:
    card = run.checkpoints / "model.json"
    original = card.read_bytes()
    first = toolkit("calibrate", run.path).stdout
    calibrated = card.read_bytes()
    assert "ECE before" in first
    assert toolkit("calibrate", run.path).stdout == first
    assert card.read_bytes() == calibrated != original
    assert toolkit("calibrate", run.path, "--remove").status == 0
    assert card.read_bytes() == original
    assert not (run.path / "calibration.json").exists()


@pytest.mark.parametrize(
    "style", [*(pytest.param(name, marks=pytest.mark.extended) for name in ("onnx", "torch-export")), "safetensors"]
)
def test_exported_models_contain_the_division(run: Run, style: str, tmp_path: Path) -> None:
    toolkit("calibrate", run.path)
    images, trained, folder = inputs_of(run), load_model(run.path), tmp_path / style
    with torch.no_grad():
        expected = trained.module(images) / trained.task.temperature
    assert toolkit("export", run.path, "--format", style, "-o", folder).status == 0
    card = json.loads((folder / "preprocessing.json").read_text())
    assert card["task"] == {"kind": "single_label"}
    assert card["calibration"].startswith("divide" if style == "safetensors" else "the logits are already divided")
    if style == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        assert np.allclose(session.run(None, {"images": images.numpy()})[0], expected.numpy(), atol=1e-5)
    elif style == "torch-export":
        assert torch.allclose(torch.export.load(folder / "model.pt2").module()(images), expected)
    else:
        assert load_model(folder).task.temperature == trained.task.temperature
        found = toolkit("predict", folder, images_of(run)).stdout
        assert rows(found) == rows(toolkit("predict", run.path, images_of(run)).stdout)


def test_timms_format_has_the_temperature_in_the_last_layer(tmp_path: Path) -> None:
    run = train_on_files(tmp_path, TIMM, "data.split.validation=0.5", size=32)
    card = run.model_card
    run.write_json("checkpoints/model.json", card | {"task": {"kind": "single_label", "temperature": 2.5}})
    assert toolkit("export", run.path, "--format", "timm", "-o", tmp_path / "timm").status == 0
    images = inputs_of(run)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(model(images), load_model(run.path).module(images) / 2.5, atol=1e-5)


def test_the_published_card_states_the_temperature(run: Run) -> None:
    toolkit("calibrate", run.path)
    assert toolkit("publish", run.path, "lab/digits", "--no-push").status == 0
    folder = run.path / "publish"
    temperature = load_model(run.path).task.temperature
    assert load_model(folder).task.temperature == temperature
    assert f"the logits are divided by {temperature:.4g}." in (folder / "README.md").read_text()


def test_the_report_shows_both_reliability_diagrams(run: Run, tmp_path: Path) -> None:
    assert load_run_data(run).scaling is None
    toolkit("calibrate", run.path)
    data = load_run_data(run)
    page = write_run_page(tmp_path / "page.html", data, {}, []).read_text()
    found = json.loads((run.path / "calibration.json").read_text())
    for each in (found["splits"]["test"]["before"], found["splits"]["test"]["after"]):
        assert f"{each['nll']:.4f}" in page
        assert f"{100 * each['ece']:.2f} %" in page
    assert data.scaling is not None
    left, right, *_ = temperature_figure("run", data.scaling, multi_label=False).axes
    heights = [bar.get_height() for bar in left.containers[0]]
    expected = [value for value in found["splits"]["test"]["before"]["accuracy"] if value is not None]
    assert heights == pytest.approx(expected)
    assert f"temperature {found['temperature']:.3f}" in right.get_title()


def test_a_run_that_cannot_be_calibrated_is_one_message(run: Run, tmp_path: Path) -> None:
    without = train_on_files(tmp_path, CONVNET, "data.split.validation=0", "train.best_metric='last'")
    outcome = toolkit("calibrate", without.path)
    assert outcome.status == 2
    assert "has no validation images to choose the temperature on" in outcome.stderr
    (run.path / "summary.json").unlink()
    outcome = toolkit("calibrate", run.path)
    assert outcome.status == 2
    assert "has not finished: its model can be calibrated after the training" in outcome.stderr


def test_several_labels_keep_their_predictions_and_thresholds(tmp_path: Path) -> None:
    table = write_two_digits(tmp_path / "data", 60, 60, 60)
    recipe = tmp_path / "labels.toml"
    recipe.write_text(f"""
[recipe]
name = "labels"
run_root = {json.dumps(str(tmp_path / "runs"))}
[task]
kind = "multi_label"
[data]
dataset = "table"
table = {json.dumps(str(table))}
channels = 1
label_separator = ";"
image_size = [8, 16]
workers = 0
[data.columns]
split = "split"
[optimizer]
name = "adamw"
lr = 0.01
[train]
epochs = 8
batch_size = 20
precision = "no"
[tracking]
trackers = []
{CONVNET}""")
    run = train(recipe)
    before = run.predict(tmp_path / "data")
    assert toolkit("calibrate", run.path).status == 0
    task = load_model(run.path).task
    assert isinstance(task, MultiLabel)
    assert task.temperature != 1
    after = open_run(run.path).predict(tmp_path / "data")
    assert [{name for name, _ in each.top} for each in after] == [{name for name, _ in each.top} for each in before]
    evaluated = json.loads(toolkit("evaluate", run.path, "--json").stdout)["metrics"]
    assert {each["verdict"] for each in evaluated["best"].values()} == {"equal"}
    for name in ("test_accuracy", "test_micro_f1", "test_map"):
        assert evaluated["calibrated"][name]["evaluated"] == pytest.approx(evaluated["best"][name]["evaluated"])
    found = json.loads((run.path / "calibration.json").read_text())
    assert found["splits"]["validation"]["after"]["nll"] < found["splits"]["validation"]["before"]["nll"]
    data = load_run_data(run)
    assert data.thresholds == task.thresholds.tolist()
    assert data.scaling is not None
    assert data.scaling.splits["test"].images == 60
