"""transfer.mode = "lora": agreement with the paper's formula and with peft, merged weights, and the run directory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cli import toolkit
from torch import Tensor, nn
from torch.nn import functional as F
from trainers import LORA, Trainers, only_run, outcome, write_recipe

from toolkit.errors import UserError
from toolkit.inference.export import export
from toolkit.models.build import build_model
from toolkit.models.lora import add_lora, base_name, is_lora, merge_lora
from toolkit.models.transfer import apply_transfer, param_groups
from toolkit.recipe import load_recipe
from toolkit.recipe.optimizer_schema import ParameterGroup
from toolkit.recipe.schema import ModelConfig, OptimizerConfig, TransferConfig
from toolkit.report.run_data import _read_filters
from toolkit.runs import Run
from toolkit.training.fit import fit
from toolkit.training.trained_model import load_model, load_state

pytestmark = pytest.mark.long

SETTINGS = ("train.ema=0.9", "train.epochs=3", "optimizer.weight_decay=0.01")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Small(nn.Module):
    """A convolution, a depthwise convolution, a Linear and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.linear = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(F.relu(self.linear(self.depthwise(F.relu(self.conv(x))).mean((2, 3)))))
        return output


def with_lora(module: nn.Module, **settings: Any) -> nn.Module:
    """Add factors below the head, with B != 0, and freeze everything else."""
    add_lora(module, **{"rank": 2, "alpha": 5.0, "targets": ["*"], "excluded": ["head"], **settings})
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_lora(name))
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return module


def factors(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if is_lora(name)}


def test_outputs_and_gradients_are_those_of_the_formula() -> None:
    """Hu et al. 2021, section 4.1: h = W x + alpha / r * B A x; of a convolution B is one of 1x1 after A."""
    module, x = with_lora(Small()), torch.randn(5, 3, 9, 9)
    module(x).square().sum().backward()
    assert [name.split(".")[0] for name in factors(module)] == ["conv", "conv", "linear", "linear"]
    a1, b1, a2, b2 = copies = [parameter.detach().clone().requires_grad_() for parameter in factors(module).values()]
    plain = Small()
    plain.load_state_dict({base_name(name): value for name, value in module.state_dict().items() if not is_lora(name)})
    hidden = plain.conv(x) + 2.5 * F.conv2d(F.conv2d(x, a1, stride=2, padding=1), b1[:, :, None, None])
    hidden = plain.depthwise(F.relu(hidden)).mean((2, 3))
    expected = plain.head(F.relu(plain.linear(hidden) + 2.5 * (hidden @ a2.T) @ b2.T))
    torch.testing.assert_close(module(x), expected)
    expected.square().sum().backward()
    for parameter, copied in zip(factors(module).values(), copies, strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad)
    assert all(parameter.grad is None for name, parameter in module.named_parameters() if not is_lora(name))


@pytest.mark.extended  # importing peft takes 7 s
@pytest.mark.parametrize("dropped", [["conv"], []])
def test_outputs_and_gradients_are_those_of_peft(dropped: list[str]) -> None:
    import peft

    plain, x = Small(), torch.randn(5, 3, 9, 9)
    targets = [name for name in ("conv", "linear") if name not in dropped]
    ours = with_lora(copy.deepcopy(plain), targets=targets)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets))
    theirs_named = {name: value for name, value in theirs.named_parameters() if value.requires_grad}
    for layer in targets:
        for part in "AB":
            (theirs_one,) = (value for name, value in theirs_named.items() if f".{layer}.lora_{part}." in name)
            ours_one = factors(ours)[f"{layer}.parametrizations.weight.0.lora_{part}"]
            theirs_one.data.copy_(ours_one.view_as(theirs_one))
    assert len(theirs_named) == len(factors(ours))
    outputs = ours(x), theirs(x)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for layer in targets:
        for part in "AB":
            (theirs_one,) = (value for name, value in theirs_named.items() if f".{layer}.lora_{part}." in name)
            ours_one = factors(ours)[f"{layer}.parametrizations.weight.0.lora_{part}"]
            torch.testing.assert_close(ours_one.grad.flatten(), theirs_one.grad.flatten())  # type: ignore[union-attr]


ARCHITECTURES = {
    "resnet18": (ModelConfig(source="torchvision", name="resnet18"), 32),
    "efficientnet": (ModelConfig(source="timm", name="tf_efficientnet_lite0"), 32),
    "vit": (ModelConfig(source="timm", name="vit_tiny_patch16_224", args={"depth": 2}), 32),
    # Their attention uses the weight of `qkv` without calling the layer.
    "eva": (ModelConfig(source="timm", name="eva02_tiny_patch14_224", args={"depth": 2}), 28),
    "swin v2": (
        ModelConfig(
            source="timm",
            name="swinv2_tiny_window8_256",
            args={"depths": [1, 1], "embed_dim": 24, "num_heads": [1, 2], "window_size": 4},
        ),
        32,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_begins_as_it_was_every_factor_is_used_and_merging_changes_no_output(name: str) -> None:
    table, size = ARCHITECTURES[name]
    built, x = build_model(table, 5, 3, size), torch.randn(3, 3, size, size)
    module = built.module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # some begin at 0
        before = module(x)
    apply_transfer(built, TransferConfig(mode="lora", lora_rank=2))
    assert torch.equal(module.eval()(x), before)
    for parameter_name, parameter in factors(module).items():
        if parameter_name.endswith("lora_B"):
            nn.init.normal_(parameter)
    unmerged = module(x)
    assert (unmerged - before).abs().max() > 0.01
    unmerged.square().sum().backward()
    assert [key for key, value in factors(module).items() if value.grad is None or not value.grad.any()] == []
    merged = build_model(table, 5, 3, size).module.eval()
    load_state(merged, module.state_dict())
    torch.testing.assert_close(merged(x), unmerged, rtol=0, atol=1e-5)


class Attention(nn.Module):
    """Self-attention by torch's class, which torchvision's transformers use."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x)[0]
        return output


def test_torch_s_attention_is_updated_in_its_input_and_output_projection() -> None:
    module, x = Attention(), torch.randn(3, 5, 8)
    before = module(x)
    add_lora(module, 2, 2.0, ["*"], [])
    assert torch.equal(module(x), before)
    for parameter in factors(module).values():
        nn.init.normal_(parameter)
    module(x).square().sum().backward()
    assert len(factors(module)) == 4
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in factors(module).values())
    plain = Attention()
    plain.load_state_dict(merge_lora(module.state_dict()))
    for mode in (True, False):
        with torch.inference_mode(not mode):  # evaluation has a kernel of its own
            torch.testing.assert_close(module.train(mode)(x), plain.train(mode)(x), rtol=0, atol=1e-5)


def test_under_autocast_weights_keep_their_precision() -> None:
    module = with_lora(Small())
    outside = module.linear.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.linear.weight, outside)


def test_patterns_choose_layers_but_never_the_head_or_a_depthwise_convolution() -> None:
    for targets, expected in (
        (["*"], {"conv", "linear"}),
        (["lin*"], {"linear"}),
        (["conv", "linear"], {"conv", "linear"}),
    ):
        found = factors(with_lora(Small(), targets=targets))
        assert {name.split(".")[0] for name in found} == expected
    for pattern in ("depthwise", "head", "Linear"):
        with pytest.raises(UserError, match=f"'{pattern}' matches no Linear layer .* names are like conv, linear"):
            with_lora(Small(), targets=["conv", pattern])


def test_the_factors_can_have_different_learning_rates() -> None:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354)."""
    built, table = build_model(ARCHITECTURES["vit"][0], 5, 3, 32), TransferConfig(mode="lora")
    apply_transfer(built, table)
    optimizer = OptimizerConfig(lr=0.1, groups=[ParameterGroup(pattern="*.lora_B", lr_scale=16)])
    found = {id(p): group["lr"] for group in param_groups(built, table, optimizer) for p in group["params"]}
    for name, parameter in built.module.named_parameters():
        if parameter.requires_grad:
            assert found.pop(id(parameter)) == (1.6 if name.endswith("lora_B") else 0.1)
    assert not found


def test_a_weight_that_two_layers_share_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    assert {name.split(".")[0] for name in factors(with_lora(module))} == {"2"}


def test_patterns_of_parameters_name_weights_as_without_lora_and_a_new_stem_is_not_updated() -> None:
    built = build_model(ModelConfig(source="torchvision", name="resnet18"), 5, 3, 32)
    table = TransferConfig(mode="lora", train=["layer4.1.conv2.weight"], freeze=["layer1.*"])
    trained = set(apply_transfer(built, table).trainable)
    assert "layer4.1.conv2.parametrizations.weight.original" in trained
    assert not [name for name in trained if name.startswith("layer1.")]
    table = ModelConfig(source="torchvision", name="resnet18", weights="DEFAULT", stem="small")
    built = build_model(table, 5, 3, 32, load_weights=False)
    transfer = TransferConfig(mode="lora", train=["conv1.*"])
    assert [name for name in apply_transfer(built, transfer).trainable if name.startswith("conv1")] == ["conv1.weight"]


# -- the run directory ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("lora")
    return fit(load_recipe(write_recipe(folder, LORA), SETTINGS), quiet=True)


def test_a_run_trains_the_factors_and_the_head_and_keeps_the_pretrained_weights(run: Run) -> None:
    written = safetensors.torch.load_file(run.best_weights)
    pretrained = safetensors.torch.load_file(run.path.parents[2] / "weights.safetensors")
    head = {name for name in pretrained if name.startswith("head.")}
    trained = {name for name in written if name.endswith(("lora_A", "lora_B"))} | head
    assert {name for name, value in pretrained.items() if not torch.equal(written_as(written, name), value)} == head
    assert run.summary["trainable_parameters"] == sum(written[name].numel() for name in trained)
    assert run.summary["trainable_parameters"] == 2 * (3 * 9 + 6) + 2 * (6 * 9 + 8) + (8 * 4 + 1) * 10
    assert all(written[name].any() for name in trained)
    assert load_model(run.path).module.state_dict().keys() == pretrained.keys()


def written_as(state: dict[str, Tensor], name: str) -> Tensor:
    """Return the pretrained weight ``name`` in the state dict of a run."""
    (found,) = (value for key, value in state.items() if base_name(key) == name)
    return found


def test_commands_after_training_use_the_merged_weights(run: Run) -> None:
    reproduced = toolkit("evaluate", str(run.path))
    assert reproduced.status == 0, reproduced.stderr
    filters = _read_filters(run)
    assert (filters.before != filters.after).any()
    merged = load_model(run.path).module.state_dict()
    assert torch.equal(torch.from_numpy(filters.after), merged[filters.layer])
    result = export(run.path, "safetensors")
    assert load_model(result.folder).module.state_dict().keys() == merged.keys()
    assert toolkit("export", str(run.path), "--format", "safetensors", "--epoch", "last").status == 0
    table = run.recipe.model.model_copy(update={"weights": f"file:{run.best_weights}"})
    another = build_model(table, 10, 3, 8).module.state_dict()
    assert all(torch.equal(another[name], value) for name, value in merged.items())


def test_the_update_can_be_stored_without_the_pretrained_weights(run: Run, tmp_path: Path) -> None:
    result = export(run.path, "lora", tmp_path / "update")
    stored = safetensors.torch.load_file(tmp_path / "update/lora.safetensors")
    assert all(is_lora(name) or name.startswith("head.") for name in stored)
    whole, loaded = load_model(run.path).module.state_dict(), load_model(result.folder).module.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())
    again = export(result.folder, "lora", tmp_path / "again")
    assert (again.folder / "lora.safetensors").read_bytes() == (result.folder / "lora.safetensors").read_bytes()

    weights = run.path.parents[2] / "weights.safetensors"
    original = weights.read_bytes()
    state = safetensors.torch.load(original)
    try:
        name = next(name for name in state if not name.startswith("head."))
        weights.write_bytes(safetensors.torch.save(state | {name: state[name] + 1}))
        with pytest.raises(UserError, match="not trained on the pretrained weights"):
            load_model(result.folder)
    finally:
        weights.write_bytes(original)
    (result.folder / "lora.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights: model.safetensors or lora.safetensors is missing"):
        load_model(result.folder)


def test_only_the_best_epoch_of_a_lora_run_can_be_stored_so(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the best epoch only"):
        export(run.path, "lora", tmp_path / "update", epoch="last")
    merged = export(run.path, "safetensors", tmp_path / "merged").folder
    with pytest.raises(UserError, match=r'--format lora is for runs with transfer.mode = "lora"'):
        export(merged, "lora", tmp_path / "update")
    assert not (tmp_path / "update").exists()


def test_a_resumed_run_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, LORA), SETTINGS)
    paused = fit(recipe, until=1, quiet=True)
    assert fit(recipe, resume=paused.path, quiet=True).is_finished
    assert outcome(only_run(tmp_path)) == outcome(run)


def test_without_validation_the_saved_weights_are_those_in_memory(tmp_path: Path) -> None:
    settings = (*SETTINGS, "data.split.validation=0", 'train.best_metric="last"', "train.epochs=1")
    assert fit(load_recipe(write_recipe(tmp_path, LORA), settings), quiet=True).is_finished


@pytest.mark.extended
def test_two_processes_give_the_results_of_one(run: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, LORA)
    trainers = Trainers(2, tmp_path, recipe, *(text for setting in SETTINGS for text in ("--set", setting)))
    assert trainers.wait() == [0, 0], trainers.text()
    two = only_run(tmp_path)
    assert two.summary["best"] == pytest.approx(run.summary["best"], rel=1e-4)
