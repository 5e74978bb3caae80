"""Dropout masks are a function of (seed, epoch, draw, layer) alone and statistically random."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from toolkit.models.keyed_dropout import KeyedDropout, example_keys, key_dropout_layers, random_levels


def keys(count: int, *, seed: int = 0, epoch: int = 1, first: int = 0) -> Tensor:
    return torch.from_numpy(example_keys(seed, epoch, np.arange(first, first + count)))


def kept(layer: nn.Module, shape: tuple[int, ...], **of_keys: int) -> Tensor:
    """Return which elements of a tensor of ones a keyed layer keeps, as float."""
    model = nn.Sequential(layer)
    key_dropout_layers(model, 0).set_keys(keys(shape[0], **of_keys))
    return (model(torch.ones(shape)) != 0).float()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_scale(p: float) -> None:
    """Elements are kept with probability 1 - p, within 4.5 standard deviations, and scaled by 1 / (1 - p)."""
    model = nn.Sequential(nn.Dropout(p))
    key_dropout_layers(model, 0).set_keys(keys(64))
    out = model(torch.ones(64, 10_000))
    share = float((out != 0).float().mean())
    assert abs(share - (1 - p)) < 4.5 * math.sqrt(p * (1 - p) / out.numel())
    assert out.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)


def test_random_levels_are_uniform() -> None:
    """Chi-squared over 256 bins has mean 255 and standard deviation sqrt(510)."""
    levels = random_levels(keys(100), (1, 2), (100, 10_001))
    counts = torch.bincount(levels.flatten() // 256, minlength=256).double()
    expected = levels.numel() / 256
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 5 * math.sqrt(510)
    assert int(levels.min()) >= 0
    assert int(levels.max()) < 65536


def test_shares_of_kept_elements_vary_like_independent_draws() -> None:
    """The variance of each example's share of kept elements is that of independent elements, p(1-p)/n."""
    shares = kept(nn.Dropout(0.5), (4000, 500)).mean(dim=1)
    assert float(shares.var()) == pytest.approx(0.25 / 500, rel=0.12)  # 5 standard deviations of sqrt(2 / 4000) = 0.022


def test_elements_examples_layers_and_epochs_are_uncorrelated() -> None:
    mask = kept(nn.Dropout(0.3), (256, 2048))
    limit = 5 / math.sqrt(mask.numel())
    for lag in (1, 2, 3, 16, 64, 1024):
        assert abs(correlation(mask[:, lag:], mask[:, :-lag])) < limit * 2
    for lag in (1, 2, 128):
        assert abs(correlation(mask[lag:], mask[:-lag])) < limit * 2
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.3))
    key_dropout_layers(model, 0).set_keys(keys(256))
    ones = torch.ones(256, 2048)
    assert abs(correlation((model[0](ones) != 0).float(), (model[1](ones) != 0).float())) < limit
    for other in (kept(nn.Dropout(0.3), (256, 2048), epoch=2), kept(nn.Dropout(0.3), (256, 2048), seed=1)):
        assert abs(correlation(mask, other)) < limit


def test_a_mask_does_not_depend_on_the_rest_of_the_batch() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), DropPath(0.5), StochasticDepth(0.5, "row"))
    state = key_dropout_layers(model, 7)
    x, k = torch.rand(12, 6, 5, 5) + 1, keys(12)
    state.set_keys(k)
    whole = model(x)
    for part in (torch.arange(3), torch.tensor([11, 4, 7, 0]), torch.tensor([5])):
        state.set_keys(k[part])
        assert torch.equal(model(x[part]), whole[part])


def test_attention_windows_use_the_key_of_their_example() -> None:
    """Window attention cuts each example into adjacent rows."""
    model = nn.Sequential(nn.Dropout(0.5))
    state = key_dropout_layers(model, 0)
    x = torch.ones(6 * 4, 10)
    state.set_keys(keys(6))
    whole = model(x)
    state.set_keys(keys(6)[2:3])
    assert torch.equal(model(x[8:12]), whole[8:12])
    state.set_keys(keys(5))
    with pytest.raises(ValueError, match="5 keys were set for a batch of 24"):
        model(x)


def test_channel_dropout_drops_whole_channels_and_stochastic_depth_whole_rows() -> None:
    channels = kept(nn.Dropout2d(0.5), (16, 32, 4, 4))
    assert torch.equal(channels, channels[:, :, :1, :1].expand_as(channels))
    assert 0.4 < float(channels.mean()) < 0.6
    sequence = kept(nn.Dropout1d(0.5), (16, 32, 9))
    assert torch.equal(sequence, sequence[:, :, :1].expand_as(sequence))
    for layer in (DropPath(0.3), StochasticDepth(0.3, "row")):
        rows = kept(layer, (2000, 3, 2))
        assert torch.equal(rows, rows[:, :1, :1].expand_as(rows))
        assert abs(float(rows[:, 0, 0].mean()) - 0.7) < 4.5 * math.sqrt(0.21 / 2000)


def test_drop_path_respects_its_scaling_option() -> None:
    model = nn.Sequential(DropPath(0.5, scale_by_keep=False))
    key_dropout_layers(model, 0).set_keys(keys(50))
    assert set(model(torch.ones(50, 2)).unique().tolist()) == {0.0, 1.0}


def test_a_layer_called_twice_draws_two_masks() -> None:
    """As in torchvision's Swin blocks, whose two branches share one stochastic depth layer."""
    model = nn.Sequential(nn.Dropout(0.5))
    state = key_dropout_layers(model, 0)
    state.set_keys(keys(4))
    first, second = model(torch.ones(4, 100)), model(torch.ones(4, 100))
    assert not torch.equal(first, second)
    state.set_keys(keys(4))
    assert torch.equal(model(torch.ones(4, 100)), first)


def test_keyed_layers_equal_torchs_in_evaluation_and_without_keys() -> None:
    model = nn.Sequential(nn.Linear(5, 100), nn.Dropout(0.5))
    names = list(model.state_dict())
    state = key_dropout_layers(model, 0)
    assert list(model.state_dict()) == names
    x = torch.ones(3, 5)
    torch.manual_seed(0)
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(0)
    assert torch.equal(first, nn.functional.dropout(model[0](x), 0.5))
    state.set_keys(keys(3))
    model.eval()
    assert torch.equal(model(x), model[0](x))


def test_replacing_layers_keeps_their_training_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5).eval(), nn.Dropout(0.5))
    key_dropout_layers(model, 0)
    assert [layer.training for layer in model] == [False, True]


def test_the_global_random_state_is_not_used() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    key_dropout_layers(model, 0).set_keys(keys(3))
    before = torch.get_rng_state()
    model(torch.ones(3, 5))
    assert torch.equal(before, torch.get_rng_state())


def test_deep_copies_use_the_same_keys() -> None:
    model = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5))
    state = key_dropout_layers(model, 0)
    twin = copy.deepcopy(model)
    results = []
    for one in (model, twin):
        state.set_keys(keys(3, epoch=9))
        results.append(one(torch.ones(3, 5)))
    assert torch.equal(*results)


def test_the_gradient_uses_the_mask_of_the_forward_pass() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    key_dropout_layers(model, 0).set_keys(keys(4))
    x = torch.ones(4, 50, requires_grad=True)
    out = model(x)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())


def test_keyed_layers_compile_into_one_graph() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.3), DropPath(0.2))
    state = key_dropout_layers(model, 0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.ones(6, 8)
    for epoch in (1, 2, 3):
        state.set_keys(keys(6, epoch=epoch))
        expected = model(x)
        state.set_keys(keys(6, epoch=epoch))
        assert torch.equal(compiled(x), expected)


def test_example_keys_are_distinct_and_stable() -> None:
    many = np.concatenate(
        [example_keys(seed, epoch, np.arange(5000)) for seed in (0, 1, 2**32 - 1) for epoch in (1, 2, 3)]
    )
    assert len(np.unique(many)) == len(many)
    assert many.dtype == np.int64
    # Recorded once: runs that continue with a later version of the toolkit must find the same masks.
    assert example_keys(0, 1, np.array([0, 1])).tolist() == [7020451289238352619, 4964578127960768432]
    levels = random_levels(torch.tensor([1, -1]), (3, 4), (2, 3))
    assert levels.tolist() == [[40907, 43455, 64213], [40056, 44352, 50871]]


@pytest.mark.parametrize(
    "model",
    [
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, drop_rate=0.2, drop_path_rate=0.3),
        lambda: torchvision.models.swin_t(weights=None),
        lambda: torchvision.models.mobilenet_v3_small(weights=None),
    ],
    ids=["vit", "swin", "mobilenet"],
)
def test_whole_models_give_the_same_outputs_for_any_split_of_a_batch(model: object) -> None:
    """A whole batch and its micro-batches give the same outputs (batch norm is in evaluation mode here)."""
    module: nn.Module = model()  # type: ignore[operator]
    state = key_dropout_layers(module, 3)
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    assert any(isinstance(layer, KeyedDropout) and layer.p > 0 for layer in module.modules())
    x, k = torch.randn(5, 3, 32, 32), keys(5)
    with torch.no_grad():
        state.set_keys(k)
        whole = module(x)
        pieces = []
        for part in (slice(0, 2), slice(2, 5)):
            state.set_keys(k[part])
            pieces.append(module(x[part]))
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-5)


def test_batch_mode_stochastic_depth_is_not_replaced() -> None:
    """Its masks do not depend on the example alone, which the model's notes state."""
    model = nn.Sequential(StochasticDepth(0.5, "batch"), StochasticDepth(0.5, "row"))
    assert len(key_dropout_layers(model, 0).calls) == 1
    assert [type(layer) for layer in model] == [StochasticDepth, KeyedDropout]
