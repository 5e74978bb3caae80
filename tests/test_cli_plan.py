"""toolkit plan: its estimates equal formulas, and exist for every shipped recipe without data, weights or network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from cli import toolkit
from torch import Tensor, nn

from toolkit import bench
from toolkit.estimate import step_cost
from toolkit.estimate.step_cost import BY_IMAGES, BY_SHAPES, measure_step, optimizer_bytes
from toolkit.recipe import load, load_recipe, resolved_toml
from toolkit.recipe.schema import OptimizerConfig
from toolkit.training.optimizer import build_optimizer

pytestmark = pytest.mark.long

RECIPES = Path(__file__).parent.parent / "recipes"
QUICKSTART = RECIPES / "quickstart.toml"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the plan used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def plan(recipe: Path, *arguments: str) -> dict[str, Any]:
    outcome = toolkit("plan", str(recipe), "--json", *arguments)
    assert outcome.status == 0, outcome.stderr
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def test_estimates_of_the_quickstart_equal_formulas() -> None:
    found = plan(QUICKSTART, "--processes", "4")
    assert found["images"] == {"train": 1294, "validation": 144, "test": 359}
    assert (found["steps_per_epoch"], found["steps"]) == (21, 420), "1294 images in batches of 64, the last one smaller"
    assert found["images_per_process"] == 16
    convolutions = sum(9 * i * o for i, o in ((1, 32), (32, 64), (64, 128)))  # batch norm follows: no bias
    parameters = convolutions + 2 * (32 + 64 + 128) + 512 * 10 + 10
    assert found["parameters"] == found["trainable_parameters"] == parameters == 98_026
    memory = found["memory"]
    assert memory["weights"] == 4 * parameters + 2 * 4 * (32 + 64 + 128) + 3 * 8, (
        "including the batch norms' statistics"
    )
    assert memory["gradients"] == 4 * parameters
    assert memory["optimizer"] == 2 * 4 * parameters + 11 * 4, (
        "AdamW: two moments, and a step count for each of 11 tensors"
    )
    assert memory["images"] == 4 * 16 * 8 * 8
    assert memory["total"] == sum(value for key, value in memory.items() if key != "total")
    multiplications = 64 * 9 * 32 + 64 * 9 * 32 * 64 + 16 * 9 * 64 * 128 + 512 * 10
    assert found["forward_flops_per_image"] == 2 * multiplications
    assert found["measured_by"] == BY_SHAPES


def test_estimates_of_known_models_equal_published_values() -> None:
    """Published values: ResNet50 has 25.6 million parameters (here with another head) and 4.09 GMAC at 224 pixels."""
    found = plan(RECIPES / "resnet50_caltech.toml", "--processes", "8")
    assert found["parameters"] == 25_557_032 - (2048 * 1000 + 1000) + (2048 * 101 + 101)
    assert found["forward_flops_per_image"] / 2e9 == pytest.approx(4.09, rel=0.01)
    assert found["memory"]["optimizer"] == found["memory"]["gradients"], "one momentum buffer"
    frozen = plan(RECIPES / "alexnet_caltech_feature_extractor.toml")
    assert frozen["parameters"] > frozen["trainable_parameters"] > 0
    assert frozen["memory"]["gradients"] == 4 * frozen["trainable_parameters"]
    assert any("are frozen and deterministic" in note for note in frozen["notes"])


def shipped() -> list[Path]:
    return sorted(RECIPES.glob("*.toml"))


def test_the_shipped_recipes_are_found() -> None:
    assert len(shipped()) >= 20


LARGE = ("vit_small_caltech", "efficientnet_lite0_caltech_finetune", "resnet50_caltech", "efficientnet_lite0_caltech")


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, id=path.stem, marks=pytest.mark.extended if path.stem in LARGE else ()) for path in shipped()],
)
def test_every_shipped_recipe_is_estimated_without_its_data(recipe: Path, tmp_path: Path) -> None:
    data = load_recipe(recipe).data
    classes = ["--classes", "10"] if data.dataset == "table" else []  # only the table says which there are
    found = plan(recipe, "--set", f"data.root={json.dumps(str(tmp_path))}", *classes)
    if data.dataset != "digits":
        assert found["images"] is None
        assert found["steps"] is None
        assert "images and steps are left out" in found["notes"][0]
    assert found["parameters"] >= found["trainable_parameters"] > 0
    assert found["training_flops_per_image"] > found["forward_flops_per_image"] > 0
    assert found["memory"]["activations"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_classes_is_required_if_only_the_data_determine_it(tmp_path: Path) -> None:
    settings = ["--set", 'data.dataset="imagefolder"', "--set", f"data.root={json.dumps(str(tmp_path / 'no'))}",
                "--set", "data.image_size=16"]  # fmt: skip
    outcome = toolkit("plan", str(QUICKSTART), *settings)
    assert outcome.status == 2
    assert "--classes" in outcome.stderr
    assert plan(QUICKSTART, *settings, "--classes", "7")["classes"] == 7


def test_a_batch_that_the_processes_do_not_divide_is_bad_input() -> None:
    outcome = toolkit("plan", str(QUICKSTART), "--processes", "3")
    assert outcome.status == 2
    assert "the nearest are 63 or 66" in outcome.stderr


def test_text_has_the_estimates_and_how_they_were_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no runs here to estimate the time from
    text = toolkit("plan", str(QUICKSTART)).stdout
    assert "1,294 train, 144 validation, 359 test" in text
    assert "98,026, of which 98,026 are trained" in text
    assert BY_SHAPES in text
    assert "no estimate: no finished run" in text


def test_half_precision_halves_the_activations() -> None:
    plain = plan(QUICKSTART, "--set", 'train.precision="no"')["memory"]
    mixed = plan(QUICKSTART, "--set", 'train.precision="bf16"')["memory"]
    assert 0.4 * plain["activations"] < mixed["activations"] < 0.7 * plain["activations"]
    assert mixed["weights"] == plain["weights"]
    averaged = plan(QUICKSTART, "--set", "train.ema=0.99")["memory"]
    assert averaged["average"] == averaged["gradients"]


def test_sam_takes_two_passes_and_a_copy_of_the_weights() -> None:
    plain, sam = plan(QUICKSTART), plan(QUICKSTART, "--set", "optimizer.sam=0.05")
    assert sam["training_flops_per_image"] == 2 * plain["training_flops_per_image"]
    assert sam["memory"]["total"] == plain["memory"]["total"] + plain["memory"]["gradients"]


# The measurement itself


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


class ReadsValues(nn.Module):
    """A module that reads values, which fake tensors do not have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        assert float(images.sum()) == 0
        output: Tensor = self.inner(images)
        return output


@pytest.mark.parametrize("images", [2, 64])
def test_activations_and_operations_by_formula(images: int) -> None:
    step, by = measure_step(two_layers(), (images, 3, 4, 4), None)
    assert by == BY_SHAPES
    kept = images * (4 * 32 + 4 * 10 + 8) + 4  # the hidden layer, log-probabilities, labels; the loss's total weight
    assert step.activations == kept
    assert step.forward_flops == 2 * (48 * 32 + 32 * 10)
    assert step.training_flops == step.forward_flops + 2 * (48 * 32 + 2 * 32 * 10), "no gradient for the images"


def test_frozen_layers_have_no_backward_cost() -> None:
    module = two_layers()
    for parameter in module[1].parameters():
        parameter.requires_grad_(False)
    step, _ = measure_step(module, (8, 3, 4, 4), None)
    assert step.training_flops == step.forward_flops + 2 * 32 * 10


def test_a_model_that_reads_values_is_measured_with_two_images() -> None:
    module = two_layers()
    expected, _ = measure_step(module, (64, 3, 4, 4), None)
    step, by = measure_step(ReadsValues(module), (64, 3, 4, 4), None)
    assert by == BY_IMAGES
    assert step.activations == pytest.approx(expected.activations, rel=0.02)
    assert step.forward_flops == expected.forward_flops


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion", "lamb", "adafactor", "novograd", "sgdp"])
def test_optimizer_state_is_what_a_real_step_allocates(name: str) -> None:
    table = OptimizerConfig(name=name, lr=0.1, momentum=0.9 if name == "sgd" else None)

    def groups() -> list[dict[str, Any]]:
        module = two_layers()
        return [{"params": list(module.parameters()), "lr": 0.1, "weight_decay": 0.0}]

    real = groups()
    optimizer = build_optimizer(table, real)
    for parameter in real[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert optimizer_bytes(table, groups()) == sum(t.numel() * t.element_size() for t in tensors)


def test_measuring_does_not_change_the_module() -> None:
    module = two_layers()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    step_cost.measure_step(module, (4, 3, 4, 4), torch.bfloat16)
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


# Time


def finished(root: Path, run_id: str, images_per_s: float, *settings: str) -> None:
    """Write the parts of a finished quickstart run that the plan reads."""
    folder = root / "quickstart" / run_id
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(resolved_toml(load_recipe(QUICKSTART, settings)))
    models = {"best": {"epoch": 20}, "last": {"epoch": 20}}
    summary = {**models, "images_per_s": images_per_s, "processes": 2, "device": "cpu"}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu"}))


def test_time_is_estimated_from_the_most_recent_similar_run(tmp_path: Path) -> None:
    here = ("--set", f"recipe.run_root={json.dumps(str(tmp_path))}")
    finished(tmp_path, "20260101-000000-0000", 5000.0)
    finished(tmp_path, "20260102-000000-0000", 1294.0)
    finished(tmp_path, "20260103-000000-0000", 9999.0, "train.batch_size=32")
    (tmp_path / "quickstart" / "20260104-000000-0000").mkdir()
    (tmp_path / "quickstart" / "20260104-000000-0000" / "recipe.toml").write_text("damaged = [")
    (tmp_path / "quickstart" / "20260104-000000-0000" / "summary.json").write_text("{}")
    found = plan(QUICKSTART, "--processes", "4", *here)
    assert found["throughput"]["images_per_s"] == 1294.0
    assert found["throughput"]["run"].endswith("20260102-000000-0000")
    assert found["seconds"] == pytest.approx(20 * 2 / 4), "20 epochs of 1 s on 2 processes, in proportion to 4"
    text = toolkit("plan", str(QUICKSTART), "--processes", "4", *here).stdout
    assert "10 s of training (1,294 images/s measured on 2 x cpu" in text
    assert "scaled to 4 processes" in text
    assert plan(QUICKSTART, *here, "--set", "model.head.dropout=0.3")["throughput"] is None


@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "resnet18", "resnext50_32x4d", "vgg11_bn", "mobilenet_v3_small"),
        *(
            pytest.param(name, marks=pytest.mark.extended)
            for name in ("resnet50", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x1_0", "convnext_tiny")
        ),
    ],
)
def test_operation_counts_of_known_architectures_equal_torchvision_s(name: str) -> None:
    """torchvision states multiply-adds per image; backward costs twice the forward pass, less the input's gradient."""
    weights = next(iter(torchvision.models.get_model_weights(name)))
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    step, measured_by = measure_step(model, (2, 3, 224, 224), None)
    assert measured_by == BY_SHAPES
    # torchvision rounds to three decimals of a GMAC.
    assert step.forward_flops / 2e9 == pytest.approx(weights.meta["_ops"], abs=6e-4)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    side = (224 + 2 * first.padding[0] - first.kernel_size[0]) // first.stride[0] + 1
    first_layer = 2 * first.weight.numel() * side**2
    assert step.training_flops == pytest.approx(3 * step.forward_flops - first_layer, rel=1e-9)


def test_plan_and_bench_count_the_same_operations() -> None:
    recipe, few = RECIPES / "quickstart.toml", ["train.batch_size=16", "data.images_per_class=8"]
    measured = bench.bench(load(recipe, few).recipe, steps=1, repeats=1)
    planned = plan(recipe, *(part for setting in few for part in ("--set", setting)))
    assert planned["training_flops_per_image"] / 1e9 == pytest.approx(measured.gflop_per_image, rel=1e-9)
