"""Batch norm over processes is batch norm over the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torchvision
from distributed import run_on
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from toolkit.engine.batchnorm import SyncBatchNorm, average_statistics, replace_batch_norms, set_replicated

SHARES = {2: [(0, 5), (5, 7)], 3: [(0, 1), (1, 3), (3, 7)]}
"""Uneven shares of a batch of seven."""


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    norm = {"1d": nn.BatchNorm1d(4), "2d": nn.BatchNorm2d(4, momentum=0.3), "timm": BatchNormAct2d(4)}[kind]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    return nn.Sequential(norm)


def batch(kind: str) -> Tensor:
    shape = (7, 4) if kind == "1d" else (7, 4, 3, 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 100  # a mean that invites cancellation


def train_step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).square().sum().backward()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = {f"{name} gradient": p.grad.clone() for name, p in module.named_parameters()}
    return {"out": out.detach(), "input gradient": x.grad, **state, **gradients}


def share_of(kind: str) -> dict[str, Tensor]:
    low, high = SHARES[dist.get_world_size()][dist.get_rank()]
    return train_step(replace_batch_norms(make(kind)), batch(kind)[low:high])


@pytest.mark.parametrize("kind", ["1d", "2d", "timm"])
@pytest.mark.parametrize("world", [2, 3])
def test_uneven_shares_give_what_the_whole_batch_gives(kind: str, world: int) -> None:
    whole = train_step(make(kind), batch(kind))
    shares = run_on(world, share_of, kind)
    for key in ("out", "input gradient"):
        torch.testing.assert_close(torch.cat([s[key] for s in shares]), whole[key], rtol=2e-4, atol=2e-5)
    for key in ("0.weight gradient", "0.bias gradient"):
        torch.testing.assert_close(sum(s[key] for s in shares), whole[key], rtol=2e-4, atol=1e-4)
    for share in shares:
        for key in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
            torch.testing.assert_close(share[key], whole[key], rtol=1e-5, atol=1e-6)


def replicated() -> dict[str, Tensor]:
    module = replace_batch_norms(make("2d"))
    set_replicated(module, True)
    return train_step(module, batch("2d")[:2])


def test_a_replicated_batch_is_counted_once() -> None:
    alone = train_step(make("2d"), batch("2d")[:2])
    for share in run_on(2, replicated):
        for key, value in alone.items():
            assert torch.equal(share[key], value), key


def test_synchronising_keeps_names_values_and_timm_activation() -> None:
    module = make("timm")
    names = list(module.state_dict())
    changed = replace_batch_norms(module)
    assert isinstance(changed[0], SyncBatchNorm)
    assert list(changed.state_dict()) == names
    assert (changed.eval()(batch("timm")) >= 0).all(), "the ReLU of BatchNormAct2d must stay"


def averaged() -> list[Tensor]:
    module = make("2d")
    module[0].running_mean.fill_(float(dist.get_rank()))
    average_statistics(module)
    return [module[0].running_mean, module[0].running_var]


def test_average_statistics() -> None:
    for mean, variance in run_on(3, averaged):
        assert torch.equal(mean, torch.ones(4))
        torch.testing.assert_close(variance, torch.ones(4))


def resnet_gradient() -> Tensor:
    """Gradient of ResNet18's mean loss over eight images, of which this process holds its share, in float64."""
    torch.manual_seed(0)
    module = replace_batch_norms(torchvision.models.resnet18(num_classes=5).double())
    images = torch.randn((8, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    mine = slice(8 * rank // world, 8 * (rank + 1) // world)
    losses = nn.functional.cross_entropy(module(images[mine]), torch.arange(8)[mine] % 5, reduction="none")
    (losses.sum() / 8).backward()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
    if world > 1:
        dist.all_reduce(gradient)
    return gradient


def test_a_whole_network_s_gradient_is_that_of_one_process() -> None:
    """In float64, since an untrained ResNet amplifies float32's rounding: 1e-7 on its input moves ResNet50's gradient
    by a percent, whatever the number of processes."""
    alone = run_on(1, resnet_gradient)[0]
    for world in (2, 3):
        for gradient in run_on(world, resnet_gradient):
            assert (gradient - alone).norm() < 1e-10 * alone.norm()
