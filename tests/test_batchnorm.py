"""Batch norm over several processes equals batch norm over the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torchvision
from distributed import run_on
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from toolkit.distributed import batchnorm
from toolkit.distributed.batchnorm import SyncBatchNorm, average_statistics, replace_batch_norms, set_replicated

pytestmark = pytest.mark.long

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
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 100  # a large mean causes cancellation


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
def test_uneven_shares_give_the_same_as_the_whole_batch(kind: str, world: int) -> None:
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


def test_synchronizing_keeps_names_values_and_timm_s_activation() -> None:
    module = make("timm")
    names = list(module.state_dict())
    changed = replace_batch_norms(module)
    assert isinstance(changed[0], SyncBatchNorm)
    assert list(changed.state_dict()) == names
    assert (changed.eval()(batch("timm")) >= 0).all(), "the ReLU of BatchNormAct2d must stay"


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def as_view(x: Tensor) -> Tensor:
    """Return a view that is neither contiguous nor channels_last."""
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


def results(norm: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = norm(x)
    out.backward(grad)
    found = {"out": out, "input gradient": x.grad, **dict(norm.named_buffers())}
    found |= {f"{name} gradient": p.grad for name, p in norm.named_parameters()}
    return {name: value.detach().double() for name, value in found.items() if name != "num_batches_tracked"}


@pytest.mark.parametrize(
    ("shape", "laid_out"),
    [
        ((64, 32, 8, 8), channels_last),
        ((60, 32, 8, 8), channels_last),  # 3840 positions: not a power of two
        ((13, 5, 17, 7), channels_last),  # 1547 = 7 x 13 x 17
        ((8, 64, 112, 112), channels_last),
        ((3, 2048, 7, 7), channels_last),
        ((16, 9, 1, 1), channels_last),
        ((8, 16, 64, 64), as_view),
        ((8, 16, 64, 64), Tensor.contiguous),
        ((50_000, 12), Tensor.contiguous),  # tokens of a whole batch, as in LeViT
        ((8, 40, 31), Tensor.contiguous),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mean", [1.0, 30.0])
def test_on_one_process_the_error_is_that_of_the_contiguous_kernel(
    shape: tuple[int, ...], laid_out: Callable[[Tensor], Tensor], affine: bool, mean: float
) -> None:
    """Its error is at most ten times that kernel's; PyTorch's channels_last kernel has up to 1000 times the error."""
    torch.manual_seed(0)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    norm = kind(shape[1], affine=affine)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)
    x, grad = torch.randn(shape) * 2 + mean, torch.randn(shape) + 0.3
    true = results(copy.deepcopy(norm).double(), x.double(), grad.double())
    rows = (lambda t: t.T[None].contiguous()) if len(shape) == 2 else (lambda t: t)  # [n, C] -> [1, C, n]
    contiguous = results(copy.deepcopy(norm), rows(x), rows(grad))
    found = results(replace_batch_norms(copy.deepcopy(norm)), laid_out(x), laid_out(grad))
    for key, value in true.items():
        reference = contiguous[key][0].T if len(shape) == 2 and contiguous[key].dim() == 3 else contiguous[key]
        error, usual = (found[key] - value).abs().max(), (reference - value).abs().max()
        assert error <= 10 * usual + 1e-7 * value.abs().max(), key


def test_chunks_of_different_size_are_weighted_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm, "PIECE_ROWS", (4, 4))
    monkeypatch.setattr(batchnorm, "PIECE_CHANNELS", 6)
    x = channels_last(torch.randn(5, 3, 3, 2, dtype=torch.float64) * torch.arange(1, 6).view(5, 1, 1, 1))
    assert [piece.shape for piece in batchnorm._pieces(x)] == [(4, 6), (4, 6), (4, 6), (3, 6)]
    mean, variance = batchnorm._statistics(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0))


def test_in_bf16_the_only_error_is_the_rounding_of_the_values() -> None:
    torch.manual_seed(0)
    x, grad = (channels_last(torch.randn(16, 8, 32, 32).bfloat16()) for _ in range(2))
    true = results(nn.BatchNorm2d(8).double(), x.double(), grad.double())
    for key, value in results(replace_batch_norms(nn.BatchNorm2d(8)), x, grad).items():
        assert (value - true[key]).abs().max() <= 2**-8 * true[key].abs().max(), key


def test_one_value_per_channel_is_refused_as_in_pytorch() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        replace_batch_norms(nn.BatchNorm2d(3))(channels_last(torch.randn(1, 3, 1, 1)))


def test_in_evaluation_mode_the_output_equals_pytorch_s_bit_for_bit() -> None:
    norm = make("timm").eval()
    x = channels_last(batch("timm"))
    expected = norm(x)
    assert torch.equal(replace_batch_norms(norm)(x), expected)


def test_without_synchronization_each_process_has_its_own_statistics() -> None:
    low_high = SHARES[2]
    for share, (low, high) in zip(run_on(2, own_share), low_high, strict=True):
        alone = train_step(make("2d"), batch("2d")[low:high])
        for key, value in alone.items():
            torch.testing.assert_close(share[key], value, rtol=2e-4, atol=2e-5)


def own_share() -> dict[str, Tensor]:
    low, high = SHARES[dist.get_world_size()][dist.get_rank()]
    return train_step(replace_batch_norms(make("2d"), synchronized=False), channels_last(batch("2d")[low:high]))


@pytest.mark.slow
def test_compiled_batch_norm_is_as_exact() -> None:
    torch.manual_seed(0)
    x, grad = channels_last(torch.randn(64, 32, 8, 8) * 2 + 1), channels_last(torch.randn(64, 32, 8, 8) + 0.3)
    true = results(nn.BatchNorm2d(32).double(), x.double(), grad.double())
    norm = replace_batch_norms(nn.BatchNorm2d(32))
    norm.compile()
    for key, value in results(norm, x, grad).items():
        assert (value - true[key]).abs().max() <= 1e-6 * true[key].abs().max(), key


def averaged() -> list[Tensor]:
    module = make("2d")
    module[0].running_mean.fill_(float(dist.get_rank()))
    average_statistics(module)
    return [module[0].running_mean, module[0].running_var]


def test_averaged_statistics_are_the_mean_over_processes() -> None:
    for mean, variance in run_on(3, averaged):
        assert torch.equal(mean, torch.ones(4))
        torch.testing.assert_close(variance, torch.ones(4))


def resnet_gradient() -> Tensor:
    """Return the float64 gradient of ResNet18's mean loss over eight images, of which this process has a share."""
    torch.manual_seed(0)
    module = replace_batch_norms(torchvision.models.resnet18(num_classes=5).double())
    images = torch.randn((8, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    indices = slice(8 * rank // world, 8 * (rank + 1) // world)
    losses = nn.functional.cross_entropy(module(images[indices]), torch.arange(8)[indices] % 5, reduction="none")
    (losses.sum() / 8).backward()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
    if world > 1:
        dist.all_reduce(gradient)
    return gradient


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.extended)])
def test_a_whole_network_s_gradient_equals_that_of_one_process(world: int) -> None:
    """In float64, since an untrained ResNet amplifies float32's rounding: a change of 1e-7 in the input changes
    ResNet50's gradient by one percent, for any number of processes."""
    alone = run_on(1, resnet_gradient)[0]
    for gradient in run_on(world, resnet_gradient):
        assert (gradient - alone).norm() < 1e-10 * alone.norm()
