"""Every optimizer that a recipe can name takes steps with the parameter groups of transfer learning."""

from __future__ import annotations

import pytest
import torch

from toolkit.errors import UserError
from toolkit.recipe.catalog import optimizers
from toolkit.recipe.schema import OptimizerConfig
from toolkit.training.optimizer import build_optimizer

NAMES = sorted(optimizers())

SLOW = ("kron", "kronc", "kronw")
"""With torch 2.15, the first step of one of these takes half a minute."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.extended if name in SLOW else ()) for name in NAMES]
)
def test_every_optimizer_changes_the_weights(name: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    before = [p.detach().clone() for p in module.parameters()]
    table = OptimizerConfig(name=name, lr=0.01, weight_decay=1e-3, momentum=0.9 if name in ("sgd", "nag") else None)
    group = {"params": list(module.parameters()), "lr": 0.01, "lr_scale": 1.0, "weight_decay": 1e-3, "name": "all"}
    optimizer = build_optimizer(table, [group])
    for _ in range(2):
        loss = module(torch.randn(16, 4)).square().mean()
        loss.backward(create_graph=name == "adahessian")
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["lr_scale"] == 1.0, "the scheduler reads it"
    assert all(p.isfinite().all() for p in module.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def test_nag_is_sgd_with_nesterov_momentum_and_sgd_is_plain() -> None:
    for name, nesterov in (("sgd", False), ("nag", True)):
        table = OptimizerConfig(name=name, lr=0.1, momentum=0.9)
        group = {"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.0}
        optimizer = build_optimizer(table, [group])
        assert isinstance(optimizer, torch.optim.SGD)
        assert optimizer.defaults["nesterov"] is nesterov


def steps_of(table: OptimizerConfig, start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return a parameter after a step with each gradient."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer(table, [{"params": [parameter], "weight_decay": table.weight_decay}])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_lars_scales_steps_without_weight_decay_if_the_recipe_says_so() -> None:
    """As in MAE's linear probe: the step is lr x mu, mu = 0.9 mu + 0.001 |p| / |g| x g (You et al. 2017)."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), [torch.randn(5, 3) for _ in range(3)]
    expected, momentum = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.001 * expected.norm() / gradient.norm() * gradient
        expected = expected - 6.4 * momentum
    table = OptimizerConfig(name="lars", lr=6.4, momentum=0.9, args={"always_adapt": True})
    torch.testing.assert_close(steps_of(table, start, gradients), expected)


def test_lamb_follows_its_formula() -> None:
    """You et al. 2020, arXiv:1904.00962, algorithm 2, with bias correction and gradients clipped to a norm of 1."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), [torch.randn(5, 3) for _ in range(3)]
    expected, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for number, gradient in enumerate(gradients, 1):
        clipped = gradient / gradient.norm().clamp(min=1)
        first, second = 0.9 * first + 0.1 * clipped, 0.999 * second + 0.001 * clipped**2
        update = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-6) + 0.02 * expected
        expected = expected - 5e-3 * expected.norm() / update.norm() * update
    table = OptimizerConfig(name="lamb", lr=5e-3, weight_decay=0.02)
    torch.testing.assert_close(steps_of(table, start, gradients), expected)


def test_an_unsupported_optimizer_argument_is_named() -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.0}
    with pytest.raises(UserError, match="bettas"):
        build_optimizer(OptimizerConfig(name="adam", lr=0.1, args={"bettas": [0.9, 0.99]}), [group])
