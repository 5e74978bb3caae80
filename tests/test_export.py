"""`toolkit export`: each format, read by its own library, computes the same outputs as the run's model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from cli import toolkit
from finished import CONVNET, RESNET18, TIMM, train_on_files
from PIL import Image
from torch import Tensor

from toolkit.data.image_sources import as_pixels, to_pixels
from toolkit.inference import export as exporting
from toolkit.inference.timm_config import crop_share
from toolkit.runs import Run
from toolkit.training.checkpoint import find_latest, load_checkpoint
from toolkit.training.trained_model import TrainedModel, load_model

pytestmark = pytest.mark.long

VIT = """
[model]
source = "timm"
name = "test_vit"
"""
RUNS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "convnet": (CONVNET, 16, ("data.channels=1",)),
    "resnet18": (RESNET18, 32, ()),
    "timm": (TIMM, 32, ("data.channels=1", "model.head.dropout=0.2")),
    "vit": (VIT, 64, ()),
}
"""Model, image size, settings: color and grayscale, and an image size that is built into the model."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Return a function that gives a run of each model, trained when it is first requested."""
    folder, made = tmp_path_factory.mktemp("export"), dict[str, Run]()

    def get(name: str) -> Run:
        if name not in made:
            model, size, settings = RUNS[name]
            made[name] = train_on_files(folder, model, *settings, size=size)
        return made[name]

    return get


def by_onnxruntime(folder: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(found)


def by_torch(folder: Path, images: Tensor) -> Tensor:
    found: Tensor = torch.export.load(folder / "model.pt2").module()(images)
    return found


def by_toolkit(folder: Path, images: Tensor) -> Tensor:
    found: Tensor = load_model(folder).module(images)
    return found


def by_timm(folder: Path, images: Tensor) -> Tensor:
    found: Tensor = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    return found


READERS = {"onnx": by_onnxruntime, "torch-export": by_torch, "safetensors": by_toolkit, "timm": by_timm}
FORMATS_OF = {"convnet": ("onnx", "torch-export", "safetensors"), "resnet18": ("onnx", "torch-export", "safetensors"),
              "timm": tuple(READERS), "vit": ("timm",)}  # fmt: skip


LANES = {
    ("timm", "onnx"): pytest.mark.slow,
    ("timm", "torch-export"): pytest.mark.slow,
    ("resnet18", "safetensors"): pytest.mark.extended,
    ("resnet18", "onnx"): pytest.mark.extended,
    ("resnet18", "torch-export"): pytest.mark.extended,
}
"""Markers of tests of formats that convnet covers too."""


@pytest.mark.parametrize(("model", "name"), [
    pytest.param(model, name, marks=LANES.get((model, name), ()))
    for model, names in FORMATS_OF.items() for name in names
])  # fmt: skip
def test_an_exported_model_computes_the_same_for_any_number_of_images(
    runs: Callable[[str], Run], tmp_path: Path, model: str, name: str
) -> None:
    run = runs(model)
    outcome = toolkit("export", run.path, "--format", name, "-o", tmp_path / "out", "--json")
    assert outcome.status == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result["images"] == "64 images of the run's data"
    assert result["files"] == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert "preprocessing.json" in result["files"]
    trained = load_model(run.path)
    for count in (1, 5):
        size, channels = trained.preprocessing.image_size, trained.preprocessing.channels
        images = torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            difference = float((READERS[name](tmp_path / "out", images) - trained.module(images)).abs().max())
        assert difference <= 1e-4
    assert result["max_abs_difference"] <= 1e-4


def test_without_json_files_sizes_and_the_difference_are_printed(runs: Callable[[str], Run]) -> None:
    run = runs("convnet")
    outcome = toolkit("export", run.path, "--format", "safetensors")
    folder = run.path / "export" / "safetensors"
    assert f"{folder / 'model.safetensors'}  {(folder / 'model.safetensors').stat().st_size:,} bytes" in outcome.stdout
    last = "checked on 64 images of the run's data: logits differ by at most 0.0e+00 (limit 0.0001)"
    assert outcome.stdout.splitlines()[-1] == last


def test_an_exported_model_predicts_the_same_as_its_run(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs("resnet18")
    assert toolkit("export", run.path, "--format", "safetensors", "-o", tmp_path / "out").status == 0
    images = Path(run.recipe.data.root) / "test"
    expected = [(row["prediction"], float(row["probability"])) for row in run.prediction_records()]
    rows = [line.split(",") for line in toolkit("predict", tmp_path / "out", images).stdout.splitlines()[1:]]
    assert [row[1] for row in rows] == [prediction for prediction, _ in expected]
    assert [float(row[2]) for row in rows] == pytest.approx([probability for _, probability in expected], rel=1e-4)


def test_the_example_in_a_torch_export_is_two_images(runs: Callable[[str], Run], tmp_path: Path) -> None:
    assert toolkit("export", runs("convnet").path, "--format", "torch-export", "-o", tmp_path / "out").status == 0
    ((example,), _) = torch.export.load(tmp_path / "out" / "model.pt2").example_inputs
    assert example.untyped_storage().nbytes() == 2 * 1 * 16 * 16 * 4


def test_all_exported_files_have_the_same_permissions(runs: Callable[[str], Run], tmp_path: Path) -> None:
    assert toolkit("export", runs("timm").path, "--format", "timm", "-o", tmp_path / "out").status == 0
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def photo(width: int = 90, height: int = 61) -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def by_hand(card: dict[str, Any], image: Image.Image) -> np.ndarray:
    """Preprocess an image by preprocessing.json with only Pillow and numpy; return [C, H, W]."""
    image = image.convert("RGB" if card["channels"] == 3 else "L")
    short, size = card["resize"], card["image_size"]
    width, height = image.size
    scaled = (int(short * width / height), short) if height <= width else (short, int(short * height / width))
    image = image.resize(scaled, getattr(Image.Resampling, card["interpolation"].upper()))
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    pixels = pixels.reshape(size, size, card["channels"])
    normalised = (pixels - np.float32(card["mean"])) / np.float32(card["std"])
    return normalised.transpose(2, 0, 1)


def test_preprocessing_json_is_sufficient_for_other_programs(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = train_on_files(tmp_path, CONVNET, "data.resize=20", 'data.interpolation="bicubic"', "data.image_size=16")
    assert toolkit("export", run.path, "--format", "onnx", "-o", tmp_path / "out").status == 0
    card = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    preprocessed = load_model(run.path).transform(to_pixels(photo(), 3))
    difference = np.abs(by_hand(card, photo()) - preprocessed.numpy()) * np.max(card["std"]) * 255
    assert difference.max() < 3  # of 255: Pillow's cubic filter differs slightly from the kernel's
    assert difference.mean() < 0.5
    assert card["steps"][1:4] == [
        "turn the image upright by its EXIF orientation",
        "resize the shorter side to 20 pixels, bicubic, antialiased",
        "crop the center, 16 x 16 pixels",
    ]
    assert card["input"]["shape"] == ["batch", 3, 16, 16]
    logits = by_onnxruntime(tmp_path / "out", preprocessed[None])
    path = tmp_path / "photo.png"
    photo().save(path)
    predicted = toolkit("predict", run.path, path).stdout.splitlines()[1].split(",")[1]
    assert card["classes"][int(logits.argmax())] == predicted


@pytest.mark.parametrize("model", ["timm", "vit"])
def test_timm_s_own_transform_equals_the_run_s(runs: Callable[[str], Run], tmp_path: Path, model: str) -> None:
    run = runs(model)
    assert toolkit("export", run.path, "--format", "timm", "-o", tmp_path / "out").status == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    timm_transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    trained = load_model(run.path)
    image = photo().convert("RGB" if trained.preprocessing.channels == 3 else "L")
    assert torch.allclose(timm_transform(image), trained.transform(as_pixels(image)), atol=1e-6)


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (224, 257), (299, 342), (16, 18), (7, 9), (160, 183)])
def test_the_resize_is_recovered_from_timm_s_crop_share(size: int, resize: int) -> None:
    assert int(np.floor(size / crop_share(size, resize))) == resize


def test_timm_s_transform_of_color_images_equals_the_run_s_except_for_the_last_bit(tmp_path: Path) -> None:
    run = train_on_files(tmp_path, TIMM, "data.resize=36", size=32)
    outcome = toolkit("export", run.path, "--format", "timm", "-o", tmp_path / "out")
    assert outcome.status == 0
    assert "differs from the run's" not in outcome.stderr


def test_transforms_that_timm_s_config_cannot_express_are_reported(tmp_path: Path) -> None:
    negative = 'augment.test=[{ name = "RandomInvert", p = 1.0 }]'
    run = train_on_files(tmp_path, TIMM, negative, size=32)
    outcome = toolkit("export", run.path, "--format", "timm", "-o", tmp_path / "out")
    assert outcome.status == 0
    assert "timm's own transform, created from config.json, differs from the run's" in outcome.stderr
    card = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert "RandomInvert {'p': 1.0} (the recipe's own)" in card["steps"]


def test_without_the_data_synthetic_images_are_compared_and_reported(
    runs: Callable[[str], Run], tmp_path: Path
) -> None:
    run = runs("convnet")
    data = Path(run.recipe.data.root)
    data.rename(tmp_path / "moved")
    try:
        outcome = toolkit("export", run.path, "--format", "safetensors", "-o", tmp_path / "out")
    finally:
        (tmp_path / "moved").rename(data)
    assert outcome.status == 0
    assert "checked on 64 synthetic images (the run's data set is not available)" in outcome.stdout


def test_a_run_with_fewer_images_is_compared_on_synthetic_ones(
    runs: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "IMAGES", 131)
    path = runs("convnet").path
    images, description = exporting.images_to_compare(path, load_model(path))
    assert len(images) == 131
    assert description == "131 synthetic images (only 130 images of the run are available)"


@pytest.mark.parametrize("error", [1.1e-4, float("nan")])
def test_an_export_with_different_outputs_is_deleted(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    honest = exporting.FORMATS["safetensors"]

    def read(folder: Path) -> exporting.Compute:
        compute = honest.read(folder)
        return lambda images: compute(images) + error * (torch.arange(10) == 3)

    monkeypatch.setitem(exporting.FORMATS, "safetensors", exporting.ExportFormat(honest.write, read))
    run = runs("convnet")
    outcome = toolkit("export", run.path, "--format", "safetensors", "-o", tmp_path / "out")
    assert outcome.status == 1
    assert "computes different outputs: logits differ by up to" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failing_exporter_leaves_no_files_and_is_reported_in_one_line(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(trained: TrainedModel, folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("an operator is not known\nand more")

    monkeypatch.setitem(exporting.FORMATS, "onnx", exporting.ExportFormat(write, exporting.FORMATS["onnx"].read))
    outcome = toolkit("export", runs("convnet").path, "--format", "onnx", "-o", tmp_path / "out")
    assert outcome.status == 1
    assert outcome.stderr == "convnet cannot be exported as onnx: an operator is not known\n"
    assert list(tmp_path.iterdir()) == []


def test_the_initial_weights_file_is_named_without_its_folder(runs: Callable[[str], Run], tmp_path: Path) -> None:
    begin = tmp_path / "begin.safetensors"
    state = load_model(runs("resnet18").path).module.state_dict()
    safetensors.torch.save_file({name: tensor for name, tensor in state.items() if "fc." not in name}, begin)
    run = train_on_files(tmp_path, RESNET18, f'model.weights="file:{begin}"', 'transfer.mode="finetune"', size=32)
    assert toolkit("export", run.path, "--format", "safetensors", "-o", tmp_path / "out").status == 0
    card = (tmp_path / "out" / "model.json").read_text()
    assert json.loads(card)["model"]["weights"] == "file:begin.safetensors"
    assert str(tmp_path) not in card
    assert load_model(tmp_path / "out").classes == load_model(run.path).classes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onxx", "--format onxx: expected onnx, torch-export, safetensors, timm, lora; did you mean onnx?"),
        ("timm", "--format timm is for unmodified timm models; toolkit's convnet is not one"),
    ],
)
def test_an_unknown_or_unsuitable_format_is_refused(
    runs: Callable[[str], Run], tmp_path: Path, name: str, message: str
) -> None:
    outcome = toolkit("export", runs("convnet").path, "--format", name, "-o", tmp_path / "out")
    assert outcome.status == 2
    assert message in outcome.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_timm_cannot_build_is_refused_for_timm(tmp_path: Path) -> None:
    run = train_on_files(tmp_path, TIMM, "model.head.hidden=[12]", size=32)
    outcome = toolkit("export", run.path, "--format", "timm", "-o", tmp_path / "out")
    assert outcome.status == 2
    assert "test_resnet with a head or stem of its own is not one" in outcome.stderr


def test_missing_packages_are_named_with_the_command_to_install_them(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = exporting.importlib.util.find_spec
    absent = ("onnxscript", "onnxruntime")
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    outcome = toolkit("export", runs("convnet").path, "--format", "onnx", "-o", tmp_path / "out")
    assert outcome.status == 2
    assert outcome.stderr == (
        "--format onnx needs onnxscript and onnxruntime, which are not installed: "
        "pip install 'image-classification-toolkit[export]'\n"
    )


def test_an_earlier_export_in_the_run_directory_is_replaced(runs: Callable[[str], Run]) -> None:
    """As in toolkit publish, only a folder that the user names must be new."""
    run = runs("convnet")
    for _ in range(2):
        assert toolkit("export", run.path, "--format", "safetensors").status == 0
        assert (run.path / "export" / "safetensors" / "model.safetensors").is_file()
        (run.path / "export" / "safetensors" / "model.safetensors").write_bytes(b"old")


def test_the_last_model_can_be_exported_too(runs: Callable[[str], Run], tmp_path: Path) -> None:
    """As in Colbertaldo's C5: the state dict after the last epoch, which is in the last checkpoint."""
    run = runs("convnet")
    outcome = toolkit("export", run.path, "--format", "safetensors", "--epoch", "last")
    assert outcome.status == 0, outcome.stderr
    exported = load_model(run.path / "export" / "safetensors-last").module.state_dict()
    newest = find_latest(run.checkpoints, lambda line: None)
    assert newest is not None
    content = load_checkpoint(newest)
    expected = {**content["model"], **content["ema"]}
    assert content["position"]["epoch"] == run.epoch_records()[-1]["epoch"]
    assert all(torch.equal(exported[name], expected[name]) for name in exported)
    copy = Run(shutil.copytree(run.path, tmp_path / "copy"))
    for path in copy.checkpoints.glob("*.pt"):
        path.unlink()
    refused = toolkit("export", copy.path, "--format", "safetensors", "--epoch", "last", "-o", tmp_path / "out")
    assert (refused.status, (tmp_path / "out").exists()) == (2, False)
    assert "has no intact checkpoint of epoch" in refused.stderr
    assert "--epoch 3: expected best or last" in toolkit("export", run.path, "--format", "onnx", "--epoch", "3").stderr


def test_an_existing_folder_and_one_that_cannot_be_written_are_refused(
    runs: Callable[[str], Run], tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    run = runs("convnet")
    outcome = toolkit("export", run.path, "--format", "safetensors", "-o", tmp_path / "used")
    assert outcome.status == 2
    assert "already exists; choose a new folder with --out, or remove that one" in outcome.stderr
    outcome = toolkit("export", run.path, "--format", "safetensors", "-o", tmp_path / "used" / "file" / "out")
    assert outcome.status == 2
    assert "cannot be written: Not a directory" in outcome.stderr


def test_a_run_without_a_finished_epoch_has_nothing_to_export(runs: Callable[[str], Run], tmp_path: Path) -> None:
    copy = Run(shutil.copytree(runs("convnet").path, tmp_path / "copy"))
    for path in copy.checkpoints.glob("*.safetensors"):
        path.unlink()
    outcome = toolkit("export", copy.path, "--format", "safetensors", "-o", tmp_path / "out")
    assert outcome.status == 2
    assert "the run has not finished an epoch yet, so it has no model" in outcome.stderr
    assert not (tmp_path / "out").exists()
