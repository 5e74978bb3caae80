"""SAM, Lookahead, Schedule-Free and Muon: compared with their formulas, resumed, and combined."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm.optim
import torch
from accelerate import Accelerator
from finished import CONVNET, train_on_files
from torch import Tensor, nn
from torch.nn import functional as F
from trainers import GRADUAL, STATEFUL, only_run, outcome, write_recipe

from toolkit.data.sampling import SamplingPlan
from toolkit.errors import UserError
from toolkit.models.keyed_dropout import DropoutKeys, KeyedDropout, key_dropout_layers
from toolkit.recipe import load_recipe
from toolkit.recipe.schema import AugmentConfig, OptimizerConfig, TrainConfig
from toolkit.training.checkpoint import find_latest, load_checkpoint, load_weights
from toolkit.training.ema import Lookahead, ScheduleFree
from toolkit.training.fit import fit
from toolkit.training.losses import training_loss
from toolkit.training.optimizer import build_optimizer
from toolkit.training.sam import ETA, perturbation
from toolkit.training.task import SingleLabel
from toolkit.training.train_step import RunningMetrics, TrainCallbacks, TrainStep, TrainStepConfig

IMAGES, BATCH, CLASSES, RADIUS = 40, 10, 3, 0.3


class Loader:
    """Batches of random vectors."""

    def __init__(self, parts: int) -> None:
        self.plan = SamplingPlan(size=IMAGES, seed=0, batch_size=BATCH, grad_accum_steps=parts)
        random = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(IMAGES, 6, generator=random)
        self.labels = torch.randint(CLASSES, (IMAGES,), generator=random)

    def epoch(self, epoch: int, first_step: int) -> Any:
        for micro, positions, draws in self.plan.epoch(epoch, first_step):
            at = torch.from_numpy(positions)
            yield micro, SimpleNamespace(images=self.inputs[at], labels=self.labels[at], draws=draws)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, CLASSES))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def trained(
    module: nn.Module, parts: int = 1, keys: DropoutKeys | None = None, *, max_grad_norm: float | None = None,
    **settings: Any
) -> RunningMetrics:  # fmt: skip
    """Train ``module`` for one epoch with the toolkit's train step."""
    accelerator = Accelerator(cpu=True)
    table = TrainConfig(epochs=1, batch_size=BATCH)
    config = TrainStepConfig(
        seed=0, task=SingleLabel(CLASSES), loss=training_loss(table, 0.0, None), augment=AugmentConfig(),
        max_grad_norm=max_grad_norm, channels_last=False, cuda_graphs=False, steps_per_epoch=IMAGES // BATCH,
        log_every=0, **settings,
    )  # fmt: skip
    step = TrainStep(accelerator, module, module, sgd(module), keys or DropoutKeys(0, 0), None, config)
    sums = RunningMetrics.zero(accelerator.device)
    hooks = TrainCallbacks(lambda epoch: None, lambda step, sums: False, lambda *_: None)
    step.train_epoch(Loader(parts), 0, 0, sums, hooks)
    return sums


def plain_sam(module: nn.Module, *, adaptive: bool, max_grad_norm: float | None) -> float:
    """Train as Foret et al. 2021, algorithm 1, without the toolkit; return the mean loss at the unperturbed weights."""
    optimizer, loader, losses = sgd(module), Loader(1), []
    for _, batch in loader.epoch(0, 0):
        loss = F.cross_entropy(module(batch.images), batch.labels)
        losses.append(loss.item())
        weights = nn.utils.parameters_to_vector(module.parameters()).detach()
        gradient = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(module.parameters()))).detach()
        scale = weights.abs() + 0.01 if adaptive else torch.ones_like(weights)
        neighbor = copy.deepcopy(module)
        move = RADIUS * scale**2 * gradient / (scale * gradient).norm()
        nn.utils.vector_to_parameters(weights + move, neighbor.parameters())
        there = torch.autograd.grad(F.cross_entropy(neighbor(batch.images), batch.labels), list(neighbor.parameters()))
        for parameter, each in zip(module.parameters(), there, strict=True):
            parameter.grad = each
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
        optimizer.step()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_steps_of_sam_are_those_of_the_paper(adaptive: bool, max_grad_norm: float | None) -> None:
    """Batch norm statistics are those of the first pass only: the reference takes the second one with a copy."""
    found, expected = network(), network()
    sums = trained(found, sam_radius=RADIUS, sam_adaptive=adaptive, max_grad_norm=max_grad_norm)
    loss = plain_sam(expected, adaptive=adaptive, max_grad_norm=max_grad_norm)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert sums.values[0, 0].item() / IMAGES == pytest.approx(loss, rel=1e-5)
    plain = network()
    trained(plain, max_grad_norm=max_grad_norm)
    assert (plain[0].weight - found[0].weight).abs().max() > 1e-3, "SAM makes a difference"


def test_the_perturbation_has_the_radius_of_its_norm() -> None:
    torch.manual_seed(0)
    weights, gradients = [torch.randn(4, 3), torch.randn(4)], [torch.randn(4, 3), torch.randn(4)]
    moves = torch.cat([e.flatten() for e in perturbation(weights, gradients, 0.7, adaptive=False)])
    flat = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(moves, 0.7 * flat / flat.norm())
    scale = torch.cat([w.flatten() for w in weights]).abs() + ETA
    adapted = torch.cat([e.flatten() for e in perturbation(weights, gradients, 0.7, adaptive=True)])
    assert (adapted / scale).norm().item() == pytest.approx(0.7, rel=1e-5), "||T^-1 e|| = rho"
    assert F.cosine_similarity(adapted / scale**2, flat, dim=0).item() == pytest.approx(1, abs=1e-6)
    nothing = perturbation(weights, [torch.zeros_like(w) for w in weights], 0.7, adaptive=False)
    assert all((e == 0).all() for e in nothing), "no gradient, no move, and no division by 0"


def test_both_passes_of_sam_have_the_same_dropout_masks() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES))
    keys, masks = key_dropout_layers(module, 0), list[Tensor]()

    def keep(layer: nn.Module, inputs: Any, out: Tensor) -> None:
        masks.append(out == 0)

    assert isinstance(module[1], KeyedDropout)
    module[1].register_forward_hook(keep)
    trained(module, 2, keys, sam_radius=RADIUS)
    assert len(masks) == 2 * 2 * IMAGES // BATCH
    steps = [masks[at : at + 4] for at in range(0, len(masks), 4)]
    assert all(torch.equal(one, two) for a, b, c, d in steps for one, two in ((a, c), (b, d)))
    assert not torch.equal(steps[0][0], steps[1][0])


def test_gradient_accumulation_does_not_change_the_steps_of_sam() -> None:
    """Without batch norm, whose statistics are those of a micro-batch."""
    one, other = (nn.Sequential(*[layer for layer in network() if not isinstance(layer, nn.BatchNorm1d)]) for _ in "ab")
    trained(one, 1, sam_radius=RADIUS)
    trained(other, 5, sam_radius=RADIUS)
    for found, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def walk(module: nn.Module, steps: int, make: Callable[[nn.Module], Any], after: Callable[[int], None]) -> None:
    optimizer = make(module)
    for step in range(1, steps + 1):
        random = torch.Generator().manual_seed(step)
        module(torch.randn(8, 6, generator=random)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)


@pytest.mark.parametrize(("k", "alpha"), [(3, 0.5), (5, 0.8), (1, 0.3)])
def test_lookahead_follows_the_paper(k: int, alpha: float) -> None:
    """Zhang et al. 2019, algorithm 1; the optimizer's momentum is kept from one round to the next."""
    found, expected = network(), network()
    average = Lookahead(found, k, alpha)
    slow = [p.detach().clone() for p in expected.parameters()]

    def outer_step(step: int) -> None:
        if step % k == 0:
            for value, parameter in zip(slow, expected.parameters(), strict=True):
                value += alpha * (parameter.detach() - value)
                parameter.data.copy_(value)

    walk(found, 11, sgd, lambda step: average.update(found, step))
    walk(expected, 11, sgd, outer_step)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(average.averages.values(), slow, strict=True):
        torch.testing.assert_close(one, other)
    with average.swapped_in(found):
        for one, other in zip(found.parameters(), slow, strict=True):
            torch.testing.assert_close(one.detach(), other)


def test_lookahead_is_timm_s_once_its_slow_weights_exist() -> None:
    """timm's slow weights start at the weights after k steps; with these as initial weights, both agree."""
    found, expected, k = network(), network(), 4
    average = Lookahead(found, k, 0.5)

    def restart(step: int) -> None:
        if step == k:  # in place of the first outer step
            average.averages.update({name: p.detach().clone() for name, p in found.named_parameters()})
        else:
            average.update(found, step)

    walk(found, 13, sgd, restart)
    walk(expected, 13, lambda module: timm.optim.Lookahead(sgd(module), alpha=0.5, k=k), lambda step: None)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adamw() -> None:
    """Compared with PyTorch's Muon for the matrices and its AdamW for the biases."""
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
    expected = copy.deepcopy(found)
    newton_schulz = [3.4445, -4.775, 2.0315]  # PyTorch's coefficients; timm's default differs
    table = OptimizerConfig(name="muon", lr=0.02, momentum=0.95, args={"ns_coefficients": newton_schulz})
    group = {"params": list(found.parameters()), "lr": 0.02, "weight_decay": 0.1}
    walk(found, 5, lambda _: build_optimizer(table, [group]), lambda step: None)

    matrices, biases = ([p for p in expected.parameters() if p.dim() == dims] for dims in (2, 1))
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    muon = torch.optim.Muon(matrices, nesterov=False, adjust_lr_fn="match_rms_adamw", **settings)
    adamw = torch.optim.AdamW(biases, betas=(0.9, 0.95), eps=1e-7, **settings)
    both = SimpleNamespace(step=lambda: (muon.step(), adamw.step()), zero_grad=expected.zero_grad)
    walk(expected, 5, lambda _: both, lambda step: None)
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_free_follows_the_paper(warmup: int) -> None:
    """Defazio et al. 2024, equations 2 to 4, with gradient steps; in the warm-up, weights as in the paper's code."""
    found, beta = network(), 0.9
    average = ScheduleFree(found, beta)
    z = [p.detach().clone() for p in found.parameters()]
    x, total = [value.clone() for value in z], 0.0
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    for step in range(1, 12):
        lr = 0.1 * min(1.0, step / warmup) if warmup else 0.1
        optimizer.param_groups[0]["lr"] = lr
        for parameter, one, other in zip(found.parameters(), x, z, strict=True):
            torch.testing.assert_close(parameter.detach(), (1 - beta) * other + beta * one)
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        found(inputs).square().mean().backward()
        gradients = [p.grad.clone() for p in found.parameters() if p.grad is not None]
        average.before_step(found, lr)
        optimizer.step()
        optimizer.zero_grad()
        average.update(found, step)
        total += lr**2
        z = [value - lr * gradient for value, gradient in zip(z, gradients, strict=True)]
        x = [(1 - lr**2 / total) * one + lr**2 / total * other for one, other in zip(x, z, strict=True)]
    with average.swapped_in(found):
        for parameter, value in zip(found.parameters(), x, strict=True):
            torch.testing.assert_close(parameter.detach(), value)


# -- runs -------------------------------------------------------------------------------------------------------------

COMBINATIONS = [
    pytest.param(
        STATEFUL,
        ('optimizer={name="muon", lr=0.01, sam=0.5, sam_adaptive=true, lookahead=4}', "train.grad_accum_steps=2"),
        id="Muon, ASAM and Lookahead",
    ),
    pytest.param(
        STATEFUL,
        ('optimizer={name="sgd", lr=0.05, momentum=0.0, schedule_free=0.9}', 'scheduler={name="constant"}'),
        id="Schedule-Free",
    ),
    pytest.param(STATEFUL, ("optimizer.sam=0.05", "train.ema=0.9"), id="SAM and EMA", marks=pytest.mark.extended),
    pytest.param(
        GRADUAL, ("optimizer.sam=0.05", "optimizer.lookahead=4"), id="gradual unfreezing", marks=pytest.mark.extended
    ),
]


@pytest.mark.long
@pytest.mark.parametrize(("text", "settings"), COMBINATIONS)
def test_an_interrupted_run_continues_bit_for_bit(
    text: str, settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended within an epoch, between two outer steps of Lookahead, by an exception at a step after a checkpoint."""
    fast = (f"train.epochs={5 if text == GRADUAL else 2}", *settings)
    whole = fit(load_recipe(write_recipe(tmp_path / "whole", text), fast), quiet=True)
    recipe = load_recipe(write_recipe(tmp_path / "ended", text), fast)
    update, calls = TrainStep._update, [0]

    def end(step: TrainStep, number: int) -> None:
        calls[0] += 1
        if calls[0] == (12 if text == GRADUAL else 6):
            raise InterruptedError
        update(step, number)

    monkeypatch.setattr(TrainStep, "_update", end)
    with pytest.raises(InterruptedError):
        fit(recipe, quiet=True)
    run = only_run(tmp_path / "ended")
    fit(run.recipe, resume=run.path, quiet=True)
    assert "resuming after epoch" in run.log_file.read_text()
    assert outcome(run) == outcome(whole)


def test_the_slow_weights_of_lookahead_are_evaluated_and_saved(tmp_path: Path) -> None:
    """Of 10 steps in 2 epochs, the 9th is the last outer step: the 10th changes the weights, but not the slow ones."""
    run = train_on_files(tmp_path, CONVNET, 'train.best_metric="last"', "optimizer.lookahead=9", epochs=2)
    content = load_checkpoint(find_latest(run.checkpoints, lambda line: None))
    saved = load_weights(run.best_weights)
    assert content["ema"], "the slow weights"
    assert all(torch.equal(saved[name], value) for name, value in content["ema"].items())
    assert not all(torch.equal(saved[name], content["model"][name]) for name in content["ema"])


def test_lookahead_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, STATEFUL), ("train.epochs=2", "optimizer.lookahead=1000"))
    with pytest.raises(
        UserError, match=r"optimizer\.lookahead = 1000, but the run has only 14 steps: the slow weights"
    ):
        fit(recipe, quiet=True)
