"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): the weight W of a layer becomes W + alpha / rank * B A.

W is frozen; the factors A [rank, inputs] and B [outputs, rank] are trained. B begins at 0, so that the model first
computes exactly what it did before. A convolution's weight [outputs, channels, height, width] counts as a matrix
[outputs, channels * height * width].

The sum is a parametrization of the weight (torch.nn.utils.parametrize), not a second branch beside the layer: torch's
MultiheadAttention and timm's EVA and Swin V2 use the weights of their layers without calling the layers.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from toolkit.errors import UserError
from toolkit.models.layer_groups import is_under
from toolkit.models.pretrained import StateDict, state_hash

_ORIGINAL = re.compile(r"\.parametrizations\.(\w+)\.original$")
_FACTOR = re.compile(r"(.*)\.parametrizations\.(\w+)\.0\.lora_(A|B|scale)$")
"""Pattern of the names of factors; its groups are the layer, its parameter, and the factor ("A" or "B")."""

SHOWN = 4
"""Maximum number of layer names in a message."""


class LowRankUpdate(nn.Module):
    """Parametrization that maps a weight to its sum with the product of the two factors."""

    lora_scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.lora_B = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.register_buffer("lora_scale", weight.new_full((), alpha / rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in the authors' code and in peft

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight, in the weight's precision under autocast too, so that it equals the merged one."""
        is_meta = weight.device.type == "meta"  # it has no autocast
        with contextlib.nullcontext() if is_meta else torch.autocast(weight.device.type, enabled=False):
            return _updated(weight, self.lora_A, self.lora_B, self.lora_scale)


def _updated(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return weight + scale * (b @ a.flatten(1)).view_as(weight)


def add_lora(module: nn.Module, rank: int, alpha: float, targets: list[str], excluded: list[str]) -> None:
    """Add factors to all layers whose names match one of the patterns ``targets``, except those under ``excluded``.

    Layers are Linear, convolutions with groups = 1, and the input projection of torch's MultiheadAttention, which has
    the name of the whole attention layer. Raises UserError for a pattern without a match.
    """
    layers = {name: key for name, key in _adaptable(module).items() if not is_under(name, excluded)}
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            names = ", ".join(list(layers)[-SHOWN:]) or "there are none"
            raise UserError(
                f"transfer.lora_targets: {pattern!r} matches no Linear layer and no convolution with groups = 1 below "
                f"the head; their names are like {names}"
            )
    for name, key in layers.items():
        if any(fnmatchcase(name, pattern) for pattern in targets):
            layer = module.get_submodule(name)
            parametrize.register_parametrization(layer, key, LowRankUpdate(getattr(layer, key), rank, alpha))


def _adaptable(module: nn.Module) -> dict[str, str]:
    """Return the names of the layers that can have factors, and the name of each one's parameter."""
    users = Counter(id(parameter) for layer in module.modules() for parameter in layer._parameters.values())
    found = {}
    for name, layer in module.named_modules():
        is_plain = isinstance(layer, _ConvNd) and layer.groups == 1 and not layer.transposed
        key = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
        if not isinstance(layer, nn.Linear | nn.MultiheadAttention) and not is_plain:
            continue
        parameter = layer._parameters.get(key)
        # None: the weight is computed, or there are several. A weight shared by two layers cannot be updated in one.
        if parameter is not None and users[id(parameter)] == 1:
            found[name] = key
    return found


def is_lora(name: str) -> bool:
    """Return whether a parameter's name is that of a factor."""
    return _FACTOR.match(name) is not None


def base_name(name: str) -> str:
    """Return a parameter's name in the model without LoRA: ``fc.weight`` for ``fc.parametrizations.weight.original``.

    Names of factors are returned as they are.
    """
    return name if is_lora(name) else _ORIGINAL.sub(r".\1", name)


def merge_lora(state: StateDict) -> StateDict:
    """Return the state dict of the equivalent model without LoRA; a state dict without factors is returned as it is."""
    merged = {base_name(name): tensor for name, tensor in state.items() if not is_lora(name)}
    for layer, key in {match.group(1, 2) for name in state if (match := _FACTOR.match(name))}:
        factors = [state[f"{layer}.parametrizations.{key}.0.lora_{part}"] for part in ("A", "B", "scale")]
        merged[f"{layer}.{key}"] = _updated(merged[f"{layer}.{key}"], *factors)
    return merged


def without_base(state: StateDict, base: StateDict) -> StateDict:
    """Return the factors in ``state``, and its other tensors that are not in ``base`` or differ from it (the head)."""
    plain = {base_name(name): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in plain.items() if name not in base or not torch.equal(tensor, base[name])}


def frozen_hash(base: StateDict, update: StateDict) -> str:
    """Return the hash of the pretrained weights that ``update``, from :func:`without_base`, does not replace."""
    return state_hash({name: tensor for name, tensor in base.items() if name not in update})
