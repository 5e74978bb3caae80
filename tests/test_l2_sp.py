"""transfer.l2_sp: gradients and steps equal to those of the formula, weight decay, resuming and several processes."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from trainers import PRETRAINED, outcome, write_recipe

from toolkit.data.sampling import SamplingPlan
from toolkit.errors import UserError
from toolkit.models.build import build_model
from toolkit.models.keyed_dropout import DropoutKeys
from toolkit.models.transfer import apply_transfer, layer_group_table, param_groups
from toolkit.recipe import load_recipe
from toolkit.recipe.schema import AugmentConfig, ModelConfig, OptimizerConfig, TrainConfig, TransferConfig
from toolkit.runs import Run
from toolkit.training.fit import fit
from toolkit.training.l2_sp import L2SP
from toolkit.training.losses import training_loss
from toolkit.training.optimizer import build_optimizer
from toolkit.training.task import SingleLabel
from toolkit.training.train_step import RunningMetrics, TrainCallbacks, TrainStep, TrainStepConfig

IMAGES, BATCH, CLASSES, ALPHA = 24, 8, 3, 0.3


class Loader:
    """Random inputs, in batches of two micro-batches."""

    def __init__(self) -> None:
        self.plan = SamplingPlan(size=IMAGES, seed=0, batch_size=BATCH, grad_accum_steps=2)
        self.images = torch.randn(IMAGES, 5, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(IMAGES) % CLASSES

    def epoch(self, epoch: int, first_step: int) -> Any:
        for micro, positions, draws in self.plan.epoch(epoch, first_step):
            chosen = torch.from_numpy(positions)
            yield micro, SimpleNamespace(images=self.images[chosen], labels=self.labels[chosen], draws=draws)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def optimizer_of(module: nn.Module, name: str) -> torch.optim.Optimizer:
    return build_optimizer(
        OptimizerConfig(name=name, lr=0.1, momentum=0.9 if name == "sgd" else None),
        [{"params": list(module.parameters()), "lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.1}],
    )


def penalty(module: nn.Sequential, start: dict[str, Tensor]) -> Tensor:
    """Return the term of the paper for the pretrained layer, the first one."""
    distances = [(value - start[name]).square().sum() for name, value in module[0].named_parameters()]
    return ALPHA / 2 * torch.stack(distances).sum()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.2])
def test_steps_equal_those_with_the_penalty_in_the_loss(name: str, max_grad_norm: float | None) -> None:
    module = network()
    start = {key: value.detach().clone() for key, value in module[0].named_parameters()}
    expected = copy.deepcopy(module)
    accelerator, loader = Accelerator(cpu=True), Loader()
    settings = TrainStepConfig(
        seed=0, task=SingleLabel(CLASSES),
        loss=training_loss(TrainConfig(epochs=1, batch_size=BATCH), 0.0, None), augment=AugmentConfig(),
        max_grad_norm=max_grad_norm, channels_last=False, cuda_graphs=False, steps_per_epoch=3, log_every=0,
    )  # fmt: skip
    step = TrainStep(accelerator, module, module, optimizer_of(module, name), DropoutKeys(0, 0), None, settings)
    step.l2_sp = L2SP(ALPHA, [(value, start[key]) for key, value in module[0].named_parameters()])
    hooks = TrainCallbacks(lambda epoch: None, lambda step, sums: False, lambda *_: None)
    optimizer = optimizer_of(expected, name)
    for epoch in range(3):
        step.train_epoch(loader, epoch, 0, RunningMetrics.zero(accelerator.device), hooks)
        whole_batches = SamplingPlan(size=IMAGES, seed=0, batch_size=BATCH)
        for _, positions, _ in whole_batches.epoch(epoch, 0):
            chosen = torch.from_numpy(positions)
            loss = F.cross_entropy(expected(loader.images[chosen]), loader.labels[chosen])
            (loss + penalty(expected, start)).backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(expected.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    assert penalty(expected, start) > 1e-3
    for found, value in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_the_scale_of_fp16_applies_to_the_penalty() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.zeros(2, 2)
    L2SP(0.5, [(layer.weight, layer.weight.detach() - 1), (layer.bias, layer.bias.detach() - 1)]).add_gradients(4.0)
    torch.testing.assert_close(layer.weight.grad, torch.full((2, 2), 2.0))
    assert layer.bias.grad is None, "no gradient, such as that of a layer that is unfrozen later"


def test_pretrained_parameters_have_no_weight_decay() -> None:
    built = build_model(ModelConfig(source="torchvision", name="resnet18"), 3, 3, 32)
    table, optimizer = TransferConfig(mode="finetune", l2_sp=0.1), OptimizerConfig(lr=0.1, weight_decay=0.01)
    transfer = apply_transfer(built, table)
    decays = {id(p): group["weight_decay"] for group in param_groups(built, table, optimizer) for p in group["params"]}
    assert {name: decays[id(p)] for name, p in built.module.named_parameters()} == {
        name: 0.01 if name.startswith("fc.") else 0.0 for name, _ in built.module.named_parameters()
    }
    assert [row.weight_decay for row in layer_group_table(transfer, optimizer)] == [0.0] * 5 + [0.01]
    assert set(transfer.pretrained) == {n for n, _ in built.module.named_parameters() if not n.startswith("fc.")}


def test_a_mode_that_trains_new_layers_only_is_refused() -> None:
    built = build_model(ModelConfig(source="torchvision", name="resnet18"), 3, 3, 32)
    with pytest.raises(UserError, match="l2_sp needs pretrained parameters that are trained"):
        apply_transfer(built, TransferConfig(mode="feature_extractor", l2_sp=0.1))


FINETUNE = f"""{PRETRAINED}
[transfer]
mode = "gradual"
unfreeze_at = [2]
l2_sp = 1.0
"""


def distance(run: Run) -> float:
    """Return the distance of the trained convolution from its start, as the run's files have it."""
    name = "blocks.1.conv.weight"
    start, end = (safetensors.torch.load_file(path)[name] for path in (run.starting_weights, run.best_weights))
    return float((end - start).norm())


@pytest.mark.long
def test_a_resumed_run_is_identical_and_does_not_need_the_pretrained_weights_again(tmp_path: Path) -> None:
    settings = ["train.epochs=4", 'train.best_metric="last"']
    recipe = load_recipe(write_recipe(tmp_path, FINETUNE), settings)
    plain = fit(recipe, quiet=True)
    without = fit(load_recipe(write_recipe(tmp_path, FINETUNE), [*settings, "transfer.l2_sp=0"]), quiet=True)
    run = fit(recipe, until=2, quiet=True)
    (tmp_path / "weights.safetensors").unlink()
    assert outcome(fit(recipe, resume=run.path, quiet=True)) == outcome(plain)
    assert not without.starting_weights.exists()
    without.starting_weights.write_bytes(plain.starting_weights.read_bytes())
    assert distance(plain) < 0.9 * distance(without)


@pytest.mark.long
def test_a_run_whose_starting_weights_are_lost_is_not_resumed(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, FINETUNE))
    run = fit(recipe, until=1, quiet=True)
    run.starting_weights.unlink()
    with pytest.raises(UserError, match="starting_weights"):
        fit(recipe, resume=run.path, quiet=True)
