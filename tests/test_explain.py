"""`toolkit explain`: Grad-CAM follows its formula, at a layer with feature maps, on the requested images."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import toolkit
from finished import CONVNET, train_on_files
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from toolkit.data.preprocessing import Preprocessing
from toolkit.errors import UserError
from toolkit.inference.explain import CamInput, CamLayer, explain, find_layer, heat_maps
from toolkit.models.build import build_model
from toolkit.recipe.schema import ModelConfig
from toolkit.runs import Run
from toolkit.training.task import SingleLabel
from toolkit.training.trained_model import TrainedModel

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("pdf_figures")]

CLASSES = ["a", "b", "c"]


def trained(module: nn.Module, table: ModelConfig, size: int) -> TrainedModel:
    plain = Preprocessing(3, (size, size), size, True, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return TrainedModel(
        module.eval(), plain, (), CLASSES, SingleLabel(len(CLASSES)), table, "none", Path("model.safetensors")
    )


def built(source: str, name: str, size: int = 64) -> TrainedModel:
    torch.manual_seed(0)
    table = ModelConfig.model_validate({"source": source, "name": name})
    return trained(build_model(table, len(CLASSES), 3, size).module, table, size)


def images(count: int, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def enlarged(maps: Tensor, size: int) -> Tensor:
    return functional.interpolate(maps[:, None], (size, size), mode="bilinear")[:, 0]


# -- the formula ------------------------------------------------------------------------------------------------------


def test_before_a_mean_and_a_linear_layer_grad_cam_is_the_class_activation_map() -> None:
    """The gradient is then the linear layer's weight divided by the number of positions (Selvaraju et al. 2017).

    See section 3.1 of the paper.
    """
    model = built("torchvision", "resnet18")
    kept: list[Tensor] = []
    model.module.layer4.register_forward_hook(lambda module, arguments, output: kept.append(output.detach()))
    inputs, classes = images(3), torch.tensor([0, 2, 1])
    heat = heat_maps(model, find_layer(model, inputs[0]), inputs, classes)
    maps = kept[-1]
    by_hand = torch.einsum("nkhw,nk->nhw", maps, model.module.fc.weight[classes].detach()) / maps[0, 0].numel()
    assert heat.shape == (3, 64, 64)
    assert torch.allclose(heat, enlarged(by_hand.clamp_min(0), 64), rtol=1e-4, atol=1e-7)
    assert heat.amax((1, 2)).min() > 0


def test_for_a_transformer_grad_cam_uses_the_patches_gradients_and_values() -> None:
    model = built("timm", "test_vit")
    inputs = images(2)
    layer = find_layer(model, inputs[0])
    norm = model.module.get_submodule(layer.name)
    kept: list[Tensor] = []
    handle = norm.register_forward_hook(lambda module, arguments, output: kept.append(output))
    logits = model.module(inputs)
    (gradient,) = torch.autograd.grad(logits[0, 1] + logits[1, 0], kept)
    handle.remove()
    patches, slopes = kept[0][:, 1:].detach(), gradient[:, 1:]
    by_hand = torch.einsum("npk,nk->np", patches, slopes.mean(1)).clamp_min(0).unflatten(1, (4, 4))
    heat = heat_maps(model, layer, inputs, torch.tensor([1, 0]))
    assert torch.allclose(heat, enlarged(by_hand, 64), rtol=1e-4, atol=1e-7)
    assert heat.amax((1, 2)).min() > 0


def test_tokens_are_arranged_row_by_row_and_non_spatial_ones_are_kept() -> None:
    tokens = torch.arange(2 * 11 * 3.0).reshape(2, 11, 3)
    layer = CamLayer("any", "tokens", prefix=2, grid=(3, 3))
    maps = layer.to_maps(tokens)
    assert maps.shape == (2, 3, 3, 3)
    assert torch.equal(maps[1, :, 2, 0], tokens[1, 2 + 2 * 3 + 0])
    assert torch.equal(layer.from_maps(maps, tokens), tokens)


class Corner(nn.Module):
    """The logit of class 1 is the brightness of the upper left quarter, and that of class 0 of the lower right one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 1, bias=False)
        nn.init.ones_(self.features.weight)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.features(images)
        half = maps.shape[2] // 2
        lower, upper = maps[:, 0, half:, half:].mean((1, 2)), maps[:, 1, :half, :half].mean((1, 2))
        return torch.stack([lower, upper, torch.full_like(lower, -9.0)], 1)


def test_the_heatmap_covers_the_evidence_and_a_wrong_prediction_has_one_for_the_label() -> None:
    model = trained(Corner(), ModelConfig(source="timm", name="corner"), 8)
    bright = torch.zeros(3, 8, 8)
    bright[:, :4, :4] = 2
    dim = bright.clone()
    dim[:, 4:, 4:] = 1
    layer = find_layer(model, bright)
    assert layer == CamLayer("features", "channels_first")
    right, wrong = explain(model, [CamInput("right", bright, 1), CamInput("wrong", dim, 0)], layer)
    assert (right.prediction, wrong.prediction) == (1, 1)
    assert right.heat_of_label is None
    assert wrong.heat_of_label is not None
    assert right.heat[:4, :4].min() == 1.0
    assert right.heat[4:].max() == right.heat[:, 4:].max() == 0.0
    assert right.probability == pytest.approx(model.module(bright[None]).softmax(1)[0, 1].item())


# -- choice of the layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "kind", "expected"),
    [
        ("torchvision", "resnet18", "channels_first", "layer4"),
        ("torchvision", "squeezenet1_1", "channels_first", None),
        ("timm", "test_vit", "tokens", "blocks.5.norm1"),
        ("timm", "test_convnext", "channels_first", None),
        ("timm", "test_efficientnet", "channels_first", None),
        ("timm", "swin_tiny_patch4_window7_224", "channels_last", None),
        ("timm", "crossvit_tiny_240", "tokens", "blocks.2.fusion.1.norm1"),
        ("timm", "pit_ti_distilled_224", "tokens", "transformers.2.blocks.3.norm1"),
        ("timm", "volo_d1_224", "tokens", "norm"),
    ],
)
def test_the_last_layer_with_relevant_maps_is_found(source: str, name: str, kind: str, expected: str | None) -> None:
    size = 240 if "crossvit" in name else 224 if "swin" in name else 64
    model = built(source, name, size)
    inputs = images(1, size)
    layer = find_layer(model, inputs[0])
    assert layer.kind == kind
    assert expected in (None, layer.name)
    heat = heat_maps(model, layer, inputs, torch.tensor([0]))
    assert heat.shape == (1, size, size)
    assert torch.isfinite(heat).all()


def test_a_layer_can_be_named_and_similar_names_are_suggested() -> None:
    model = built("torchvision", "resnet18")
    sample = images(1)[0]
    assert find_layer(model, sample, "layer3") == CamLayer("layer3", "channels_first")
    with pytest.raises(UserError, match="has no layer of this name that is called exactly once; did you mean layer3"):
        find_layer(model, sample, "layr3")
    with pytest.raises(UserError, match=r"--layer fc returns \[1, 3\] for one image; Grad-CAM needs maps"):
        find_layer(model, sample, "fc")


def test_a_model_without_maps_is_refused_in_one_message() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 3))
    model = trained(module, ModelConfig(source="timm", name="perceptron"), 64)
    with pytest.raises(UserError, match="perceptron has no layer with maps larger than 1x1"):
        find_layer(model, images(1)[0])


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_on_files(tmp_path_factory.mktemp("explain"), CONVNET)


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    return Run(shutil.copytree(run.path, tmp_path / "copy"))


def test_the_worst_mistakes_are_those_of_predictions_csv(run: Run) -> None:
    outcome = toolkit("explain", run.path, "--worst", "3", "--json")
    assert outcome.status == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    wrong = [row for row in run.prediction_records() if row["label"] != row["prediction"]]
    worst = sorted(wrong, key=lambda row: -float(row["probability"]))[:3]
    assert [(one["path"], one["label"], one["prediction"]) for one in found] == [
        (row["path"], row["label"], row["prediction"]) for row in worst
    ]
    for one, row in zip(found, worst, strict=True):
        assert one["probability"] == pytest.approx(float(row["probability"]), abs=1e-5)
        with Image.open(one["figure"]) as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image))) > 10
    assert {Path(one["figure"]).parent for one in found} == {run.figures / "explain"}


def test_named_images_are_explained_and_bad_files_are_named(run: Run, tmp_path: Path) -> None:
    chosen = sorted((Path(run.recipe.data.root) / "test" / "4").iterdir())[:2]
    outcome = toolkit("explain", run.path, *chosen, tmp_path / "none.png", "-o", tmp_path / "out")
    assert outcome.status == 1
    assert f"{tmp_path / 'none.png'}: no such file" in outcome.stderr
    files = sorted(str(path) for path in (tmp_path / "out").iterdir())
    assert outcome.stdout.splitlines() == files
    assert len(files) == 2


def test_a_user_s_mistake_gives_one_message(run: Run, copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(*arguments: object) -> str:
        outcome = toolkit("explain", *(str(argument) for argument in arguments))
        assert (outcome.status, len(outcome.stderr.splitlines())) == (2, 1), outcome.stderr
        return outcome.stderr

    assert "give either images or --worst, not both" in message(run.path, "x.png", "--worst", "2")
    assert "the images of" in message(run.path, "--data-root", copy.path / "nowhere")
    table = copy.path / "predictions.csv"
    header, first, *rest = table.read_text().splitlines()
    table.write_text("\n".join([header, "elsewhere.png,0,1,0.999999", first, *rest]) + "\n")
    assert "predictions.csv is damaged: elsewhere.png is not a test image" in message(copy.path)
    table.write_text(f"{header}\n{first.split(',')[0]},0,1,likely\n")
    assert "predictions.csv is damaged: row 1 has the probability 'likely'" in message(copy.path)
    right = [f"{row['path']},{row['label']},{row['label']},0.5" for row in run.prediction_records()]
    table.write_text("\n".join([header, *right]) + "\n")
    assert "misclassified none of its test images: specify images to explain" in message(copy.path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "captum" else find(name))
    assert "needs captum, which is not installed: pip install 'image-classification-toolkit[explain]'" in message(
        run.path
    )
