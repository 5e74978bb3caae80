"""Dropout and stochastic depth with masks that depend only on the example, not on its batch.

A mask is a pure function of (seed, epoch, draw of the example, layer, position within the example). It does not depend
on the number of processes, gradient accumulation or the other examples of a batch. The random bits come from a
counter-based integer hash (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and are the same on every
device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from toolkit.data.sampling import GOLDEN_GAMMA, finalize64, hash64

DROPOUT_TYPES: tuple[type[nn.Module], ...] = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, DropPath, StochasticDepth)
"""Types of dropout and stochastic depth layers that are replaced."""

_MASK32 = 2**32 - 1
_LEVELS = 2**16
"""Rates are rounded to multiples of 1/65536, so that one 32-bit hash serves two elements."""
_FACTOR_1 = 0x7FEB352D
_FACTOR_2 = 0x846CA68B - 2**32
"""Multipliers of the integer hash lowbias32 (Wellons, hash-prospector).

Subtracting 2^32 from the second keeps products within int64, which must not overflow, and does not change their lowest
32 bits.
"""


class DropoutKeys:
    """Per-example keys of the current batch, shared by all keyed dropout layers of a model and its copies."""

    def __init__(self, seed: int, layers: int) -> None:
        self.seed = seed
        self.keys: Tensor | None = None
        self.calls = [0] * layers
        """Number of calls of each layer since the keys were set: a layer used twice draws two masks."""

    def set_keys(self, keys: Tensor | None) -> None:
        """Set the keys before each training forward pass: int64 [n], one per example in batch order.

        None selects plain dropout. If a layer's input has a multiple of n rows, the rows of each example must be
        consecutive, as with attention windows.
        """
        self.keys = keys
        self.calls = [0] * len(self.calls)

    def __deepcopy__(self, memo: dict[int, Any]) -> DropoutKeys:
        """Return self, so that copies of a model (averaged, compiled) use the same keys."""
        return self


class KeyedDropout(nn.Module):
    """Replacement for a dropout or stochastic depth layer. Calls that layer without keys and in evaluation mode."""

    def __init__(self, plain: nn.Module, state: DropoutKeys, layer: int) -> None:
        super().__init__()
        self.plain = plain
        self.state = state
        self.layer = layer
        self.p, self.rescale = drop_rate(plain), getattr(plain, "scale_by_keep", True)
        self.whole = _whole_dims(plain)
        self.train(plain.training)

    def __repr__(self) -> str:
        """Return the replaced layer's representation, so that a printed model shows the architecture's own layers."""
        return repr(self.plain)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, ...] to the same shape."""
        keys = self.state.keys
        if keys is None or not self.training or self.p == 0.0:
            result: Tensor = self.plain(x)
            return result
        call = self.state.calls[self.layer]
        self.state.calls[self.layer] = call + 1
        shape = x.shape if self.whole is None else (*x.shape[: self.whole], *(1 for _ in x.shape[self.whole :]))
        dropped = min(max(round(self.p * _LEVELS), 1), _LEVELS) if self.p < 1.0 else _LEVELS
        levels = random_levels(keys.to(x.device), _salt(self.state.seed, self.layer, call), shape)
        keep = (levels >= dropped).to(x.dtype)
        scale = _LEVELS / (_LEVELS - dropped) if self.rescale and dropped < _LEVELS else 1.0
        return x * (keep * scale)


def key_dropout_layers(module: nn.Module, seed: int) -> DropoutKeys:
    """Replace every dropout and stochastic depth layer of ``module`` in place. State dict names do not change.

    Layers are numbered in registration order, so a model gets the same masks on every machine and in every process.
    Stochastic depth of whole batches stays as it is, because its masks do not depend on the example alone.
    """
    found = [(name, layer) for name, layer in module.named_modules(remove_duplicate=False) if can_be_keyed(layer)]
    state = DropoutKeys(seed, len(found))
    for number, (name, layer) in enumerate(found):
        module.set_submodule(name, KeyedDropout(layer, state, number))
    return state


def can_be_keyed(layer: nn.Module) -> bool:
    """Return whether :func:`key_dropout_layers` replaces a layer."""
    is_per_batch = isinstance(layer, StochasticDepth) and layer.mode != "row"
    return isinstance(layer, DROPOUT_TYPES) and not is_per_batch


def example_keys(seed: int, epoch: int, draws: np.ndarray) -> np.ndarray:
    """Return one 64-bit key, int64 [n], for each draw (an example's position in the epoch's order), int64 [n]."""
    start = np.uint64(hash64(hash64(seed) ^ epoch))
    steps = np.asarray(draws).astype(np.int64).view(np.uint64) * np.uint64(GOLDEN_GAMMA)
    return finalize64(steps + start).view(np.int64)


def random_levels(keys: Tensor, salt: tuple[int, int], shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Return independent uniform integers in [0, 65536), int64, of ``shape``.

    The first dimension of ``shape`` must be a multiple of len(keys); otherwise ValueError is raised.
    """
    rows = keys.shape[0]
    if shape[0] % rows:
        raise ValueError(f"{rows} keys were set for a batch of {shape[0]}")
    each = (shape[0] // rows) * math.prod(shape[1:])
    low = _hash32((keys & _MASK32) ^ salt[0])
    high = _hash32(((keys >> 32) & _MASK32) ^ low ^ salt[1])
    counter = torch.arange((each + 1) // 2, device=keys.device)
    bits = counter[None, :] ^ low[:, None]
    # The second word enters between the rounds. Otherwise examples whose first words share their upper bits would get
    # the same values in another order.
    bits = ((bits ^ (bits >> 16)) * _FACTOR_1 & _MASK32) ^ high[:, None]
    bits = (bits ^ (bits >> 15)) * _FACTOR_2 & _MASK32
    bits = bits ^ (bits >> 16)
    return torch.stack((bits & (_LEVELS - 1), bits >> 16), dim=-1).flatten(1)[:, :each].reshape(shape)


def _hash32(x: Tensor) -> Tensor:
    """Hash with lowbias32: a bijection of 32-bit integers (in int64) where an input bit flips half the output bits."""
    x = (x ^ (x >> 16)) * _FACTOR_1 & _MASK32
    x = (x ^ (x >> 15)) * _FACTOR_2 & _MASK32
    return x ^ (x >> 16)


def _salt(seed: int, layer: int, call: int) -> tuple[int, int]:
    """Return two 32-bit words that are distinct per layer and per call of a layer within a forward pass."""
    mixed = hash64(hash64(hash64(seed) ^ layer) ^ call)
    return mixed & _MASK32, mixed >> 32


def drop_rate(layer: nn.Module) -> float:
    """Return the drop probability of a dropout or stochastic depth layer, keyed or not; 0 for other layers."""
    if isinstance(layer, DropPath):
        return float(layer.drop_prob or 0.0)
    return float(layer.p) if isinstance(layer, (*DROPOUT_TYPES, KeyedDropout)) else 0.0  # type: ignore[arg-type]


def _whole_dims(plain: nn.Module) -> int | None:
    """Return how many leading dimensions the mask covers: None for all (elements), 2 for channels, 1 for examples."""
    if isinstance(plain, nn.Dropout):
        return None
    return 2 if isinstance(plain, nn.Dropout1d | nn.Dropout2d) else 1
