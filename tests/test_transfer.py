"""For each transfer mode and kind of model: which parameters train, and that frozen ones do not change by one bit."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import timm.optim
import torch
from torch import nn
from torch.nn import functional as F

from toolkit.errors import UserError
from toolkit.models.build import ModelBundle, build_model
from toolkit.models.frozen_backbone import backbone_is_deterministic, find_frozen_backbone, prefix_features
from toolkit.models.keyed_dropout import key_dropout_layers
from toolkit.models.layer_groups import is_under
from toolkit.models.transfer import Transfer, apply_transfer, layer_group_table, param_groups
from toolkit.recipe.schema import HeadConfig, ModelConfig, OptimizerConfig, TransferConfig

CLASSES = 5
SGD = OptimizerConfig(lr=0.1, weight_decay=0.1)
VGG_CONVOLUTIONS = [f"features.{i}" for i in (0, 1, 4, 5, 8, 9, 11, 12, 15, 16, 18, 19, 22, 23, 25, 26)]
RESNET_BACKBONE = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]

# Model config, image size, backbone, classifier and head prefixes, and the two layer groups below the head.
MODELS: dict[str, tuple[ModelConfig, int, list[str], list[str], str, list[list[str]]]] = {
    "alexnet": (
        ModelConfig(source="torchvision", name="alexnet"),
        64,
        ["features.0", "features.3", "features.6", "features.8", "features.10"],
        ["classifier.1", "classifier.4", "classifier.6"],
        "classifier.6",
        [["classifier.4"], ["classifier.1"]],
    ),
    "vgg11_bn": (  # table G9 of giunta: two new linear layers replace VGG's three
        ModelConfig(
            source="torchvision",
            name="vgg11_bn",
            head=HeadConfig(hidden=[512], batch_norm=True, scope="classifier"),
        ),
        32,
        VGG_CONVOLUTIONS,
        ["classifier"],
        "classifier",
        [["features.25", "features.26"], ["features.22", "features.23"]],
    ),
    "resnet18": (
        ModelConfig(source="torchvision", name="resnet18"),
        32,
        RESNET_BACKBONE,
        ["fc"],
        "fc",
        [["layer4"], ["layer3"]],
    ),
    "resnet50": (
        ModelConfig(source="torchvision", name="resnet50"),
        32,
        RESNET_BACKBONE,
        ["fc"],
        "fc",
        [["layer4"], ["layer3"]],
    ),
    "tf_efficientnet_lite0": (
        ModelConfig(source="timm", name="tf_efficientnet_lite0"),
        32,
        ["conv_stem", "bn1", "blocks", "conv_head", "bn2"],
        ["classifier"],
        "classifier",
        [["blocks.6", "conv_head", "bn2"], ["blocks.5"]],
    ),
    "vit_tiny_patch16_224": (
        ModelConfig(source="timm", name="vit_tiny_patch16_224"),
        32,
        ["cls_token", "pos_embed", "patch_embed", "blocks", "norm"],
        ["head"],
        "head",
        [["blocks.11", "norm"], ["blocks.10"]],
    ),
}
# Which of backbone (B), classifier below the head (C), head (H) and factors of LoRA (L) train in each mode.
MODES: dict[str, tuple[TransferConfig, str]] = {
    "scratch": (TransferConfig(mode="scratch"), "BCH"),
    "finetune": (TransferConfig(mode="finetune"), "BCH"),
    "feature_extractor": (TransferConfig(mode="feature_extractor"), "CH"),
    "backbone_only": (TransferConfig(mode="backbone_only"), "BH"),
    "backbone_only, head too": (TransferConfig(mode="backbone_only", new_layer="freeze"), "B"),
    "linear_probe": (TransferConfig(mode="linear_probe"), "H"),
    "logistic": (TransferConfig(mode="logistic"), "H"),
    "knn": (TransferConfig(mode="knn"), "H"),
    "gradual": (TransferConfig(mode="gradual", unfreeze_at=[2, 4]), "H"),
    "lp_ft": (TransferConfig(mode="lp_ft", probe_epochs=2), "H"),
    "lora": (TransferConfig(mode="lora", lora_rank=2), "HL"),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@cache
def initial(name: str) -> ModelBundle:
    """Build a model once; tests change a copy of it."""
    table, size, *_ = MODELS[name]
    return build_model(table, CLASSES, 3, size)


def fresh(name: str) -> ModelBundle:
    return copy.deepcopy(initial(name))


def names_under(module: nn.Module, prefixes: list[str]) -> set[str]:
    return {name for name, _ in module.named_parameters() if is_under(name, prefixes)}


def expected_trainable(name: str, trains: str) -> list[str]:
    _, _, backbone, classifier, head, _ = MODELS[name]
    below = [part for part in classifier if part != head]
    return (backbone if "B" in trains else []) + (below if "C" in trains else []) + ([head] if "H" in trains else [])


def train_two_steps(
    name: str, transfer: Transfer, groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    """Train two steps on random images, with momentum and a strong weight decay."""
    optimizer = optimizer or torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    size = MODELS[name][1]
    transfer.train_mode()
    for _ in range(2):
        images, labels = torch.randn(4, 3, size, size), torch.randint(CLASSES, (4,))
        F.cross_entropy(transfer.built.module(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.extended if name in ("alexnet", "resnet50") else ()) for name in MODELS],
)
def test_exactly_the_trainable_parameters_change(name: str, mode: str) -> None:
    table, trains = MODES[mode]
    built = fresh(name)
    transfer = apply_transfer(built, table)
    before = {key: value.clone() for key, value in built.module.state_dict().items()}
    expected = names_under(built.module, expected_trainable(name, trains))
    if "L" in trains:
        expected |= {key for key in before if key.endswith((".lora_A", ".lora_B"))}
    assert set(transfer.trainable) == expected

    optimizer = train_two_steps(name, transfer, param_groups(built, table, SGD))

    after = built.module.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    statistics = {key for key in before if "running_" in key or "num_batches" in key}
    assert moved - statistics == expected
    owners = {key.rpartition(".")[0] for key in expected}
    owners = set() if table.is_fitted else owners  # in evaluation mode
    assert moved & statistics == {key for key in statistics if key.rpartition(".")[0] in owners}
    parameters = dict(built.module.named_parameters())
    assert {id(p) for p in optimizer.state} == {id(parameters[key]) for key in expected}
    assert all(p.grad is None for key, p in parameters.items() if key not in expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradual_unfreezing_unfreezes_one_layer_group_after_another(name: str) -> None:
    table, _ = MODES["gradual"]
    head, (first, second) = MODELS[name][4], MODELS[name][5]
    built = fresh(name)
    transfer = apply_transfer(built, table)
    groups = param_groups(built, table, SGD)
    opened = {1: [head], 2: [head, *first], 3: [head, *first], 4: [head, *first, *second], 5: [head, *first, *second]}
    for epoch, parts in opened.items():
        assert transfer.unfreeze_for_epoch(epoch) == (epoch in (2, 4))
        fresh_groups = param_groups(built, table, SGD, groups)
        assert bool(fresh_groups) == (epoch in (2, 4))
        groups += fresh_groups
        expected = names_under(built.module, parts)
        assert set(transfer.trainable) == expected
        parameters = dict(built.module.named_parameters())
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(parameters[key]) for key in expected)


@pytest.mark.parametrize("name", MODELS)
def test_lp_ft_trains_all_parameters_after_the_probe(name: str) -> None:
    table, _ = MODES["lp_ft"]
    built = fresh(name)
    transfer = apply_transfer(built, table)
    parameters = {key for key, _ in built.module.named_parameters()}
    assert set(transfer.ever_trained) == parameters
    assert [transfer.unfreeze_for_epoch(epoch) for epoch in (1, 2, 3, 4)] == [False, False, True, False]
    assert set(transfer.trainable) == parameters
    transfer.train_mode()
    assert all(module.training for module in built.module.modules())


def test_lp_ft_keeps_frozen_patterns_frozen_and_needs_something_to_fine_tune() -> None:
    table = TransferConfig(mode="lp_ft", probe_epochs=1, freeze=["conv1.*"])
    transfer = apply_transfer(fresh("resnet18"), table)
    transfer.unfreeze_for_epoch(2)
    assert {name for name, p in transfer.built.module.named_parameters() if not p.requires_grad} == {"conv1.weight"}
    with pytest.raises(UserError, match="trains the same parameters after the probe as in it"):
        apply_transfer(fresh("resnet18"), TransferConfig(mode="lp_ft", probe_epochs=1, freeze=["[!f]*"]))
    with pytest.raises(UserError, match="needs probe_epochs"):
        apply_transfer(fresh("resnet18"), TransferConfig(mode="lp_ft"))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("feature_extractor", ["classifier"]),
        ("backbone_only", [*VGG_CONVOLUTIONS, "classifier.6"]),
        ("backbone_only, head too", VGG_CONVOLUTIONS),
        ("linear_probe", ["classifier.6"]),
    ],
)
def test_vgg_can_keep_its_own_classifier(mode: str, expected: list[str]) -> None:
    """Its three fully connected layers are the classifier. Built on the meta device: 129 million parameters."""
    with torch.device("meta"):
        built = build_model(ModelConfig(source="torchvision", name="vgg11_bn"), CLASSES, 3, 32)
    assert set(apply_transfer(built, MODES[mode][0]).trainable) == names_under(built.module, expected)


def test_gradual_unfreezing_trains_the_unfrozen_groups() -> None:
    table, _ = MODES["gradual"]
    built = fresh("resnet18")
    transfer = apply_transfer(built, table)
    groups = param_groups(built, table, SGD)
    optimizer = train_two_steps("resnet18", transfer, groups)
    before = {key: value.clone() for key, value in built.module.state_dict().items()}
    assert transfer.unfreeze_for_epoch(2)
    for group in param_groups(built, table, SGD, optimizer.param_groups):
        optimizer.add_param_group(group)
    train_two_steps("resnet18", transfer, [], optimizer)
    moved = {
        key.split(".")[0] for key, value in built.module.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"layer4", "fc"}


def test_gradual_unfreezing_catches_up_after_a_resume() -> None:
    """A run resumed at epoch 4 unfreezes the groups due at epochs 2 and 4."""
    table, _ = MODES["gradual"]
    transfer = apply_transfer(fresh("resnet18"), table)
    assert transfer.unfreeze_for_epoch(4)
    assert {name.split(".")[0] for name in transfer.trainable} == {"layer3", "layer4", "fc"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TransferConfig(mode="finetune", freeze=["layer9.*"]), "no parameter's name matches 'layer9.*'.*layer4, fc"),
        (TransferConfig(mode="linear_probe", train=["Layer4.*"]), "transfer.train: no parameter's name matches"),
        (TransferConfig(mode="linear_probe", freeze=["fc.*"]), "leaves nothing to train.*conv1/bn1, layer1"),
        (TransferConfig(mode="gradual"), "needs unfreeze_at"),
        (
            TransferConfig(mode="gradual", unfreeze_at=[1, 2, 3, 4, 5, 6]),
            "6 epochs, but 5 layer groups are below the head: conv1/bn1",
        ),
    ],
)
def test_transfer_errors_are_reported(table: TransferConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_transfer(fresh("resnet18"), table)


@pytest.mark.parametrize(
    ("name", "norms", "count"),
    [("resnet50", ("bn", "downsample.1"), 53_120), ("vit_tiny_patch16_224", ("norm", "norm1", "norm2"), 25 * 2 * 192)],
)
def test_norm_tuning_trains_the_head_and_every_normalization_layer(
    name: str, norms: tuple[str, ...], count: int
) -> None:
    built = fresh(name)
    before = {key: value.clone() for key, value in built.module.named_parameters()}
    table = TransferConfig(mode="norm_tuning")
    transfer = apply_transfer(built, table)
    head = MODELS[name][4]
    below = {key for key in transfer.trainable if not is_under(key, [head])}
    assert all(any(norm in key for norm in norms) for key in below)
    assert sum(before[key].numel() for key in below) == count
    assert names_under(built.module, [head]) <= set(transfer.trainable)
    train_two_steps(name, transfer, param_groups(built, table, SGD))
    moved = {key for key, value in built.module.named_parameters() if not torch.equal(value, before[key])}
    assert moved == set(transfer.trainable)


def test_norm_tuning_needs_normalization_layers() -> None:
    with pytest.raises(UserError, match="no normalization layers; use linear_probe"):
        apply_transfer(fresh("alexnet"), TransferConfig(mode="norm_tuning"))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_bias_trains_the_head_and_every_bias(name: str) -> None:
    built = fresh(name)
    table = TransferConfig(mode="bias")
    transfer = apply_transfer(built, table)
    before = {key: value.clone() for key, value in built.module.named_parameters()}
    expected = names_under(built.module, [MODELS[name][4]]) | {key for key in before if key.endswith(".bias")}
    assert set(transfer.trainable) == expected
    train_two_steps(name, transfer, param_groups(built, table, SGD))
    assert {key for key, value in built.module.named_parameters() if not torch.equal(value, before[key])} == expected


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "tf_efficientnet_lite0", "resnet18"])
def test_layer_decay_by_block_is_that_of_timm(name: str) -> None:
    with torch.device("meta"):
        built = build_model(ModelConfig(source="timm", name=name), CLASSES, 3, 224)
    table = TransferConfig(mode="finetune", layer_decay=0.7, layer_decay_by="block")
    apply_transfer(built, table)
    found = {id(p): group["lr_scale"] for group in param_groups(built, table, SGD) for p in group["params"]}
    expected = timm.optim.param_groups_layer_decay(built.module, layer_decay=0.7)
    assert found == pytest.approx({id(p): group["lr_scale"] for group in expected for p in group["params"]})


def test_layer_decay_by_block_divides_torchvision_stages() -> None:
    built = fresh("resnet18")
    table = TransferConfig(mode="finetune", layer_decay=0.5, layer_decay_by="block")
    transfer = apply_transfer(built, table)
    scales = {id(p): group["lr_scale"] for group in param_groups(built, table, SGD) for p in group["params"]}
    found = {name: scales[id(p)] for name, p in built.module.named_parameters()}
    assert len(found) == len(scales)
    blocks = [f"layer{stage}.{block}" for stage in (4, 3, 2, 1) for block in (1, 0)]
    for depth, block in enumerate(["fc", *blocks, "conv1"]):
        assert {found[name] for name in names_under(built.module, [block])} == {0.5**depth}
    assert [row.lr for row in layer_group_table(transfer, SGD)][-2:] == pytest.approx([0.05, 0.1])


def test_patterns_add_to_the_mode() -> None:
    table = TransferConfig(mode="linear_probe", train=["layer4.1.*", "*.bn1.weight"], freeze=["fc.bias"])
    built = fresh("resnet18")
    transfer = apply_transfer(built, table)
    names = {name for name, _ in built.module.named_parameters()}
    expected = {n for n in names if n.startswith("layer4.1.") or n.endswith(".bn1.weight")} | {"fc.weight"}
    assert set(transfer.trainable) == expected


def test_a_frozen_pattern_stays_frozen_under_gradual_unfreezing() -> None:
    table = TransferConfig(mode="gradual", unfreeze_at=[2], freeze=["layer4.0.*"])
    transfer = apply_transfer(fresh("resnet18"), table)
    transfer.unfreeze_for_epoch(2)
    assert {name for name in transfer.trainable if name.startswith("layer4.0.")} == set()
    assert any(name.startswith("layer4.1.") for name in transfer.trainable)


def test_batch_norm_statistics_follow_the_data_if_the_recipe_says_so() -> None:
    table = TransferConfig(mode="linear_probe", frozen_batch_norm="update")
    built = fresh("resnet18")
    before = {key: value.clone() for key, value in built.module.state_dict().items()}
    transfer = apply_transfer(built, table)
    train_two_steps("resnet18", transfer, param_groups(built, table, SGD))
    moved = {key for key, value in built.module.state_dict().items() if not torch.equal(value, before[key])}
    statistics = {key for key in before if "running_" in key or "num_batches" in key}
    assert moved == statistics | {"fc.weight", "fc.bias"}


def test_dropout_is_off_if_the_layer_that_it_feeds_is_frozen() -> None:
    """AlexNet's classifier is dropout.0, linear.1, relu.2, dropout.3, linear.4, relu.5, linear.6."""
    built = fresh("alexnet")
    classifier = built.module.get_submodule("classifier")
    for mode, modes in (("linear_probe", [False, False]), ("feature_extractor", [True, True])):
        transfer = apply_transfer(built, TransferConfig(mode=mode))  # type: ignore[arg-type]
        built.module.eval()
        transfer.train_mode()
        assert [classifier.get_submodule(i).training for i in ("0", "3")] == modes


def test_vit_dropout_after_position_embeddings_is_off_if_the_blocks_are_frozen() -> None:
    table = ModelConfig(source="timm", name="vit_tiny_patch16_224", args={"pos_drop_rate": 0.5, "drop_rate": 0.2})
    built = build_model(table, CLASSES, 3, 32)
    apply_transfer(built, TransferConfig(mode="linear_probe"))
    assert not built.module.get_submodule("pos_drop").training
    assert built.module.get_submodule("head_drop").training


def test_parameter_groups_have_learning_rates_by_layer_group() -> None:
    """Layer decay 0.5, backbone 0.1, head 2; biases and norms are in groups of their own without weight decay."""
    table = TransferConfig(mode="finetune", backbone_lr=0.1, head_lr=2.0, layer_decay=0.5)
    built = fresh("resnet18")
    transfer = apply_transfer(built, table)
    optimizer = OptimizerConfig(lr=0.4, weight_decay=0.01, decay_bias_and_norm=False)
    groups = param_groups(built, table, optimizer)
    stages = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert [group["name"] for group in groups] == [n for stage in stages for n in (stage, f"{stage} (no decay)")]
    scales = [0.1 * 0.5**5, 0.1 * 0.5**4, 0.1 * 0.5**3, 0.1 * 0.5**2, 0.1 * 0.5, 2.0]
    assert [group["lr_scale"] for group in groups[::2]] == pytest.approx(scales)
    assert [group["lr"] for group in groups[1::2]] == pytest.approx([0.4 * scale for scale in scales])
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0] * 6
    assert all(p.ndim <= 1 for group in groups[1::2] for p in group["params"])
    assert all(p.ndim > 1 for group in groups[::2] for p in group["params"])
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in built.module.parameters())
    rows = layer_group_table(transfer, optimizer)
    assert [row.lr for row in rows] == pytest.approx([0.4 * scale for scale in scales])


def test_optimizer_groups_have_their_own_rate_and_weight_decay() -> None:
    built = fresh("resnet18")
    table = TransferConfig(mode="finetune", backbone_lr=0.1, head_lr=2.0)
    apply_transfer(built, table)
    own = [
        {"pattern": "fc.*", "lr_scale": 5.0},
        {"pattern": "*.bias", "lr_scale": 64.0, "weight_decay": 0.03},
        {"pattern": "layer4.*", "weight_decay": 0.0},
    ]
    optimizer = OptimizerConfig(lr=0.1, weight_decay=0.01, decay_bias_and_norm=False, groups=own)
    groups = param_groups(built, table, optimizer)
    found = {id(p): (g["lr_scale"], g["weight_decay"], g["lr"]) for g in groups for p in g["params"]}
    for name, parameter in built.module.named_parameters():
        if name.startswith("fc."):
            scale, decay = 10.0, 0.01 if parameter.ndim > 1 else 0.0
        elif name.endswith(".bias"):
            scale, decay = 6.4, 0.03
        elif name.startswith("layer4."):
            scale, decay = 0.1, 0.0
        else:
            scale, decay = 0.1, 0.01 if parameter.ndim > 1 else 0.0
        assert found[id(parameter)] == pytest.approx((scale, decay, 0.1 * scale)), name
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert len({group["name"] for group in groups}) == len(groups)


def test_optimizer_groups_apply_to_parameters_that_are_unfrozen_later() -> None:
    table = TransferConfig(mode="gradual", unfreeze_at=[2])
    built = fresh("resnet18")
    transfer = apply_transfer(built, table)
    optimizer = OptimizerConfig(lr=0.1, groups=[{"pattern": "*.bias", "lr_scale": 64.0}])
    groups = param_groups(built, table, optimizer)
    transfer.unfreeze_for_epoch(2)
    later = param_groups(built, table, optimizer, groups)
    scales = {id(p): group["lr_scale"] for group in (*groups, *later) for p in group["params"]}
    for name in transfer.trainable:
        assert scales[id(built.module.get_parameter(name))] == (64.0 if name.endswith(".bias") else 1.0)


def test_an_optimizer_group_without_a_parameter_is_an_error() -> None:
    built = fresh("resnet18")
    optimizer = OptimizerConfig(lr=0.1, groups=[{"pattern": "*.bais"}])
    with pytest.raises(UserError, match=r"optimizer\.groups: no parameter's name matches '\*\.bais'"):
        param_groups(built, TransferConfig(mode="finetune"), optimizer)


def test_the_layer_group_table_of_a_linear_probe() -> None:
    """ResNet18 has 11,176,512 parameters below its last layer; layer group sizes as published."""
    built = fresh("resnet18")
    table = TransferConfig(mode="linear_probe")
    rows = layer_group_table(apply_transfer(built, table), SGD)
    assert [(row.name, row.parameters) for row in rows] == [
        ("stem", 9_536),
        ("layer1", 147_968),
        ("layer2", 525_568),
        ("layer3", 2_099_712),
        ("layer4", 8_393_728),
        ("head", 512 * CLASSES + CLASSES),
    ]
    assert sum(row.parameters for row in rows[:-1]) == 11_176_512
    assert [row.trainable for row in rows] == [0, 0, 0, 0, 0, 512 * CLASSES + CLASSES]
    assert [row.batch_norm for row in rows] == ["fixed"] * 5 + ["-"]
    assert (rows[0].lr, rows[0].weight_decay, rows[-1].lr, rows[-1].weight_decay) == (0.0, 0.0, 0.1, 0.1)
    for mode, expected in (("finetune", "trained"), ("linear_probe", "updated")):
        table = TransferConfig(mode=mode, frozen_batch_norm="update")  # type: ignore[arg-type]
        assert layer_group_table(apply_transfer(built, table), SGD)[1].batch_norm == expected


def test_a_newly_initialized_small_stem_is_not_frozen() -> None:
    table = ModelConfig(source="torchvision", name="resnet18", weights="DEFAULT", stem="small")
    built = build_model(table, CLASSES, 3, 32, load_weights=False)
    with pytest.raises(UserError, match=r'conv1 is new .* transfer.train = \["conv1\.\*"\]'):
        apply_transfer(built, TransferConfig(mode="linear_probe"))
    transfer = apply_transfer(built, TransferConfig(mode="linear_probe", train=["conv1.*"]))
    assert transfer.trainable == ["conv1.weight", "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("name", "mode", "tail"),
    [
        ("resnet18", "linear_probe", "fc"),
        ("resnet18", "feature_extractor", "fc"),
        ("alexnet", "feature_extractor", "classifier"),
        ("alexnet", "linear_probe", "classifier.6"),
        ("vgg11_bn", "linear_probe", "classifier"),
        ("tf_efficientnet_lite0", "linear_probe", "classifier"),
        ("vit_tiny_patch16_224", "linear_probe", "head"),
        ("resnet18", "backbone_only", None),
        ("resnet18", "lora", None),
        ("vit_tiny_patch16_224", "finetune", None),
    ],
)
def test_the_frozen_prefix_and_the_tail_compute_the_whole_model(name: str, mode: str, tail: str | None) -> None:
    built = fresh(name)
    transfer = apply_transfer(built, TransferConfig(mode=mode))  # type: ignore[arg-type]
    key_dropout_layers(built.module, 0)
    assert find_frozen_backbone(transfer) == tail
    if tail is None:
        return
    x = torch.randn(3, 3, MODELS[name][1], MODELS[name][1])
    state = {key: value.clone() for key, value in built.module.state_dict().items()}
    assert backbone_is_deterministic(built.module, tail, x)
    assert all(torch.equal(value, state[key]) for key, value in built.module.state_dict().items())
    features = prefix_features(built.module, tail, x)
    built.module.eval()
    assert torch.equal(built.module.get_submodule(tail)(features), built.module(x))


def test_dropout_before_the_last_layer_is_part_of_the_tail() -> None:
    """VGG applies dropout before its last layer, so features there are random; those before the classifier are not."""
    table = ModelConfig(source="toolkit", convnet=_tiny_convnet(), head=HeadConfig(dropout=0.5, hidden=[8]))
    built = build_model(table, CLASSES, 3, 8)
    transfer = apply_transfer(built, TransferConfig(mode="linear_probe", freeze=["head.0.*"]))
    assert transfer.trainable == ["head.3.weight", "head.3.bias"]
    assert find_frozen_backbone(transfer) == "head"
    assert backbone_is_deterministic(built.module, "head", torch.randn(4, 3, 8, 8))
    assert not backbone_is_deterministic(built.module, "head.3", torch.randn(4, 3, 8, 8))


def test_with_updated_batch_norm_there_is_no_frozen_prefix() -> None:
    built = fresh("resnet18")
    assert (
        find_frozen_backbone(apply_transfer(built, TransferConfig(mode="linear_probe", frozen_batch_norm="update")))
        is None
    )


def test_a_tail_whose_output_differs_from_the_models_is_detected() -> None:
    built = fresh("resnet18")
    apply_transfer(built, TransferConfig(mode="linear_probe"))
    assert not backbone_is_deterministic(built.module, "layer4", torch.randn(2, 3, 32, 32))


class _Wrapped(nn.Module):
    """A small network whose layers are all in one submodule, ``net``; ``forward`` counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        output: torch.Tensor = self.net(x)
        return output


def test_a_submodule_with_all_layers_has_nothing_frozen_before_it() -> None:
    module = _Wrapped()
    built = ModelBundle(module, ("net.1",), ["net.1"], [], None, [], None)
    assert find_frozen_backbone(Transfer(built, TransferConfig(), frozenset())) is None


def test_features_of_a_backbone_with_a_state_or_in_float64_are_not_cached() -> None:
    assert not backbone_is_deterministic(_Wrapped(), "net.1", torch.randn(2, 4)), "it counts its calls"
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    assert backbone_is_deterministic(network, "1", torch.randn(2, 4))
    assert not backbone_is_deterministic(network.double(), "1", torch.randn(2, 4).double())


def _tiny_convnet() -> Any:
    from toolkit.recipe.schema import ConvBlock, ConvNetConfig

    return ConvNetConfig(blocks=[ConvBlock(channels=4, pool=2)])
