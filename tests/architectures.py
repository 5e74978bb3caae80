"""Checks that hold for every architecture; used by the sampled tests and by the tests of all architectures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from toolkit.data.preprocessing import Preprocessing
from toolkit.inference.explain import find_layer
from toolkit.inference.export import _write_safetensors
from toolkit.models.build import ModelBundle
from toolkit.models.dry_forward import probe
from toolkit.models.layer_groups import is_under
from toolkit.models.transfer import apply_transfer, param_groups
from toolkit.recipe.schema import ModelConfig, OptimizerConfig, TransferConfig
from toolkit.training.task import SingleLabel
from toolkit.training.trained_model import TrainedModel, load_model

CLASSES = ["a", "b", "c", "d", "e", "f", "g"]


def check_structure(built: ModelBundle, size: int) -> None:
    """Check heads, layer groups and optimizer groups; probing the model must leave all parameters unchanged."""
    module = built.module
    before = [(name, id(p)) for name, p in module.named_parameters(remove_duplicate=False)]
    used = probe(module, 3, (size, size)).used
    assert before == [(name, id(p)) for name, p in module.named_parameters(remove_duplicate=False)]
    for head in built.heads:
        outputs = [p.shape[0] for p in module.get_submodule(head).parameters()]
        assert outputs, head
        assert outputs[-1] == len(CLASSES), head
    assert (built.stages[-1].name, built.stages[-1].prefixes) == ("head", built.heads)
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        assert sum(stage.holds(name) for stage in built.stages) == 1, name
    assert len({stage.name for stage in built.stages}) == len(built.stages)
    check_order(built, used)
    groups = param_groups(built, TransferConfig(layer_decay=0.5), OptimizerConfig(name="sgd", lr=1.0))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())


def check_order(built: ModelBundle, used: tuple[str, ...]) -> None:
    """Check that every parameter of a layer group is used for the first time before any of the next group."""
    steps = {name: step for step, name in enumerate(used)}
    end = -1
    for stage in built.stages[:-1]:
        firsts = []
        for prefix in stage.prefixes:
            inside = [steps[name] for name in steps if is_under(name, (prefix,))]
            firsts += [min(inside)] if inside else []
        if firsts:  # otherwise no parameter of the layer group is used
            assert min(firsts) > end, f"{stage.name} is used before the preceding layer group"
            end = max(firsts)


def check_step(built: ModelBundle, size: int) -> None:
    """Check one SGD step: the loss is finite, and every parameter in use changes or has a gradient of zero."""
    transfer = apply_transfer(built, TransferConfig())
    groups = param_groups(built, TransferConfig(), OptimizerConfig(name="sgd", lr=0.01))
    optimizer = torch.optim.SGD(groups, lr=0.01)
    transfer.train_mode()
    used = set(probe(built.module, 3, (size, size)).used)
    device = next(built.module.parameters()).device
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    loss = nn.functional.cross_entropy(built.module(images), torch.tensor([0, 1], device=device))
    loss.backward()
    without = {name for name, p in built.module.named_parameters() if p.grad is None}
    assert not without & used, f"no gradient: {sorted(without & used)[:4]}"
    optimizer.step()
    if device.type == "cpu":
        assert torch.isfinite(loss)


def trained(built: ModelBundle, table: ModelConfig, size: int) -> TrainedModel:
    plain = Preprocessing(3, (size, size), size, True, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return TrainedModel(
        built.module.eval(), plain, (), CLASSES, SingleLabel(len(CLASSES)), table, "none", Path("model.safetensors")
    )


def check_explained(model: TrainedModel, built: ModelBundle) -> None:
    """Check that Grad-CAM chooses a layer in the second half of the network."""
    size = model.preprocessing.image_size
    sample = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for head in built.heads:  # some are initialized to zero, which makes all gradients zero
            for parameter in model.module.get_submodule(head).parameters():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    layer = find_layer(model, sample)
    modules = dict(model.module.named_modules())
    order = list(modules)
    owners = [
        name for name in order[: order.index(layer.name) + 1] if next(modules[name].parameters(False), None) is not None
    ]
    inside = [name for name in order if is_under(name, (layer.name,))]
    last = [name for name in inside if next(modules[name].parameters(False), None) is not None] or owners
    names = [f"{last[-1]}.{name}" for name, _ in modules[last[-1]].named_parameters(recurse=False)]
    group_index = next(index for index, stage in enumerate(built.stages) if stage.holds(names[0]))
    assert group_index >= (len(built.stages) - 1) // 2, f"{layer.name} is in {built.stages[group_index].name}"


def check_export(model: TrainedModel, folder: Path) -> None:
    """Check that the exported folder computes the same logits."""
    _write_safetensors(model, folder)
    again = load_model(folder)
    size = model.preprocessing.image_size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(again.module(images), model.module(images))
