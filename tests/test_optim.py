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


def test_an_unsupported_optimizer_argument_is_named() -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.0}
    with pytest.raises(UserError, match="bettas"):
        build_optimizer(OptimizerConfig(name="adam", lr=0.1, args={"bettas": [0.9, 0.99]}), [group])
