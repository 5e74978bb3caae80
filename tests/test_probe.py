"""toolkit probe: which backbones, the heads, what chooses, and that the written recipe gives the row's accuracy."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from cli import toolkit
from trainers import RECIPE

from toolkit.cache.frozen_features import Features
from toolkit.distributed.process import init_accelerator
from toolkit.errors import UserError
from toolkit.probe import compare as compare_module
from toolkit.probe.backbones import DEFAULT, Backbone, find_backbones, is_non_commercial, license_of
from toolkit.probe.compare import _Candidate, _choose, _trainer, compare
from toolkit.probe.heads import train_heads
from toolkit.probe.recipes import EPOCHS, Head, probed_data, recipe_of
from toolkit.report.prediction_metrics import wilson_interval
from toolkit.runs import open_run

pytestmark = pytest.mark.long

ARCHITECTURE = "test_resnet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe for small digits and the weights of a small network."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "recipe.toml").write_text(RECIPE.format(root=folder / "runs") + '[model]\nsource = "toolkit"\n'
                                        "[model.convnet]\nblocks = [{ channels = 4 }]\n")  # fmt: skip
    torch.manual_seed(0)
    module = timm.create_model(ARCHITECTURE, num_classes=1000)
    safetensors.torch.save_file(module.state_dict(), folder / "weights.safetensors")
    return folder


def pattern(folder: Path) -> str:
    return f"{ARCHITECTURE}=file:{folder / 'weights.safetensors'}"


def test_patterns_name_backbones() -> None:
    assert find_backbones(["resnet50"]) == [Backbone("timm", "resnet50", "a1_in1k")]
    assert find_backbones(["torchvision/resnet50"]) == [Backbone("torchvision", "resnet50", "IMAGENET1K_V2")]
    assert find_backbones(["resnet50.tv_in1k"]) == [Backbone("timm", "resnet50", "tv_in1k")]
    assert Backbone("timm", "resnet50", "tv_in1k") in find_backbones(["resnet50.*"])
    assert {one.name for one in find_backbones(["vit_small_patch1?_224"])} >= {"vit_small_patch16_224"}
    assert find_backbones(["plugin/mine=file:a.pth"]) == [Backbone("plugin", "mine", "file:a.pth")]
    assert find_backbones(["resnet18", "resnet1[8]", "timm/resnet18"]) == find_backbones(["resnet18"])
    assert len(find_backbones()) == len(DEFAULT)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("resnet5", "no pretrained architecture matches"),
        ("resnet50.tv_in2k", "no pretrained architecture matches"),
        ("*", "name fewer"),
        ("plugin/mine", "add the weights"),
        ("keras/resnet50", "expected timm/, torchvision/ or plugin/"),
    ],
)
def test_a_pattern_without_a_backbone_is_an_error(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_backbones([given])


def test_licenses_are_those_that_timm_and_torchvision_state() -> None:
    stated = {backbone: license_of(backbone) for backbone in find_backbones()}
    assert not any(map(is_non_commercial, stated.values()))
    assert "not stated" not in stated.values()
    assert is_non_commercial(license_of(Backbone("timm", "convnextv2_tiny", "fcmae_ft_in22k_in1k")))
    assert is_non_commercial(license_of(Backbone("torchvision", "vit_l_16", "IMAGENET1K_SWAG_E2E_V1")))
    assert license_of(Backbone("timm", "resnet50", "file:x.pth")) == "not stated"


def test_heads_trained_together_equal_linear_probes(folder: Path) -> None:
    data = probed_data(str(folder / "recipe.toml"), {}, print)
    (backbone,) = find_backbones([pattern(folder)])
    heads = [Head("linear_probe", 0.1, 1e-3), Head("linear_probe", 0.02, 0.0)]
    with contextlib.ExitStack() as stack:
        accelerator = init_accelerator(recipe_of(data, backbone, heads[0])[1].train)
        first = _trainer(recipe_of(data, backbone, Head("logistic"))[1], accelerator, stack)
        layer = first.setup.built.module.get_submodule(first.setup.built.head)
        weights, biases = train_heads(first, layer, heads, EPOCHS)  # type: ignore[arg-type]
        for head, weight, bias in zip(heads, weights, biases, strict=True):
            alone = _trainer(recipe_of(data, backbone, head)[1], accelerator, stack)
            alone.run_epochs()
            trained = alone.setup.built.module.get_submodule(alone.setup.built.head)
            torch.testing.assert_close(weight, trained.weight.detach(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(bias, trained.bias.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "mode", ["linear_probe", *(pytest.param(mode, marks=pytest.mark.extended) for mode in ("logistic", "knn"))]
)
def test_only_the_chosen_head_sees_test_images(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    read: list[tuple[str, str]] = []
    rows = Features.rows

    def recorded(features: Features, split: str) -> Any:
        read.append((features.setup.recipe.transfer.mode, split))
        return rows(features, split)

    def chosen(candidates: Sequence[Any], images: int) -> Any:
        read.append(("chosen", ""))
        return next(one for one in candidates if one.head.mode == mode)

    monkeypatch.setattr(Features, "rows", recorded)
    monkeypatch.setattr(compare_module, "_choose", chosen)
    (row,) = compare(probed_data(str(folder / "recipe.toml"), {}, print), find_backbones([pattern(folder)]), print)
    assert [entry for entry in read if entry[1] == "test"] == [(mode, "test")]
    assert read.index((mode, "test")) > read.index(("chosen", ""))
    assert row.interval == wilson_interval(row.correct, 70)
    run = toolkit("train", str(write(folder, row.recipe)), "--no-report", "--set", 'recipe.run_root="runs"')
    assert run.status == 0, run.stderr
    assert open_run(run.stdout.split()[-1]).summary["best"]["test_accuracy"] == pytest.approx(row.accuracy, abs=1e-9)


def test_validation_chooses_up_to_one_standard_error() -> None:
    def chosen(*accuracies: float) -> str:
        modes = ("logistic", "linear_probe", "knn")
        found = [_Candidate(a, -1.0, Head(mode), "") for a, mode in zip(accuracies, modes, strict=True)]
        return _choose(found, 100).head.mode

    assert chosen(0.88, 0.90, 0.90) == "logistic"  # the standard error is 3 points
    assert chosen(0.86, 0.90, 0.90) == "linear_probe"
    assert chosen(0.80, 0.80, 0.90) == "knn"


def write(folder: Path, text: str) -> Path:
    path = folder / "best.toml"
    path.write_text(text.replace("[recipe]\n", "[tracking]\ntrackers = []\n\n[recipe]\n"))
    return path


def test_the_command_writes_a_table_a_page_and_a_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = ("--models", pattern(folder), "--models", f"{ARCHITECTURE}=file:missing.pth")
    outcome = toolkit("probe", str(folder / "recipe.toml"), *models)
    assert outcome.status == 0, outcome.stderr
    assert "not compared:\ntest_resnet (file): model.weights = 'file:missing.pth': there is no file" in outcome.stdout
    written = tmp_path / "probe" / "small"
    first, second = json.loads((written / "probe.json").read_text())
    assert second["failure"]
    assert first["validation"].keys() == {"knn", "linear_probe", "logistic"}
    assert first["val_accuracy"] in first["validation"].values()
    assert first["parameters"] == sum(
        p.numel() for n, p in timm.create_model(ARCHITECTURE).named_parameters() if not n.startswith("fc.")
    )
    page = (written / "probe.html").read_text()
    assert "test_resnet (file)" in page
    assert "there is no file" in page
    assert toolkit("validate", str(written / "best.toml")).status == 0


def test_data_without_validation_images_or_with_several_labels_are_refused(folder: Path, tmp_path: Path) -> None:
    recipe = str(folder / "recipe.toml")
    refused = toolkit("probe", recipe, "--set", "data.split.validation=0", "--models", pattern(folder))
    assert refused.status == 2
    assert "chooses by validation images" in refused.stderr
    several = tmp_path / "several.toml"
    several.write_text((folder / "recipe.toml").read_text() + '[task]\nkind = "multi_label"\n')
    refused = toolkit("probe", str(several), "--models", pattern(folder))
    assert refused.status == 2
    assert "exactly one class" in refused.stderr


def test_a_given_key_of_a_table_leaves_the_others(folder: Path) -> None:
    data = probed_data(str(folder / "recipe.toml"), {"split": {"validation": 0.1}}, print)
    (choice,) = data.choices
    assert choice.keys["data.split"] == {"validation": 0.1, "test": 0.2}


def test_data_need_no_recipe(tmp_path: Path, folder: Path) -> None:
    data = probed_data("digits", {"images_per_class": 20}, print)
    (backbone,) = find_backbones([pattern(folder)])
    _, recipe = recipe_of(data, backbone, Head("knn"))
    assert (recipe.data.dataset, recipe.data.channels, recipe.transfer.mode) == ("digits", 3, "knn")
    assert recipe.data.split.validation
