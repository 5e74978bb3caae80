"""Split a model into a frozen backbone and a trainable tail, so that the backbone's features can be computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.models.keyed_dropout import KeyedDropout, drop_rate
from toolkit.models.transfer import Transfer


def find_frozen_backbone(transfer: Transfer) -> str | None:
    """Return the dotted name of the tail, or None if it is the whole model or has all of the model's parameters.

    The tail is the smallest submodule that contains all trainable parameters and all dropout and batch norm layers
    active in training. Whether its output is the model's output is checked by :func:`backbone_is_deterministic`.
    """
    module = transfer.built.module
    transfer.train_mode()
    owners = [name.rpartition(".")[0] for name in transfer.trainable]
    active = [name for name, layer in module.named_modules() if layer.training and _varies(layer)]
    tail = _common_prefix([*owners, *active])
    if all(name.startswith(f"{tail}.") for name, _ in module.named_parameters()):
        return None  # a module around all layers, such as self.net of a user's model: nothing before it is frozen
    return tail or None


def prefix_features(module: nn.Module, tail: str, x: Tensor) -> Tensor:
    """Return the input of submodule ``tail`` for the model input ``x``, without running the tail.

    Raises ValueError if the tail takes anything but one tensor, or is not reached.
    """
    hook = module.get_submodule(tail).register_forward_pre_hook(_stop, with_kwargs=True)
    try:
        module(x)
    except _ReachedError as reached:
        return reached.features
    finally:
        hook.remove()
    raise ValueError(f"{tail} was not reached")


@torch.no_grad()
def backbone_is_deterministic(module: nn.Module, tail: str, x: Tensor) -> bool:
    """Return whether ``tail`` on the backbone's features gives exactly ``module(x)``, in the modules' current modes.

    Two passes through the backbone must also agree and leave its buffers unchanged, which rules out randomness and a
    state before the tail; and float32, as which features are kept, must hold the tail's input. Buffers and random
    states are restored.
    """
    end = module.get_submodule(tail)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with _unchanged(module, x.device):
        try:
            torch.manual_seed(0)
            features = prefix_features(module, tail, x)
            torch.manual_seed(1)
            again = prefix_features(module, tail, x)
        except ValueError:
            return False
        if not torch.equal(features, again) or features.dtype not in _KEPT:
            return False
        if not all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers()):
            return False
        torch.manual_seed(2)
        short = end(features)
        torch.manual_seed(2)
        return torch.equal(short, module(x))


_KEPT = (torch.float32, torch.bfloat16, torch.float16)
"""Types whose values float32 holds exactly."""


class _ReachedError(Exception):
    """Raised to stop the forward pass at the tail; holds the tail's input."""

    def __init__(self, features: Tensor) -> None:
        super().__init__("reached")
        self.features = features


def _stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        raise ValueError("the tail takes more than one tensor")
    raise _ReachedError(args[0])


def _varies(layer: nn.Module) -> bool:
    """Return whether a layer in training mode can give different outputs for the same example (dropout, batch norm)."""
    return isinstance(layer, _BatchNorm) or drop_rate(layer) > 0.0


def _common_prefix(names: list[str]) -> str:
    """Return the longest dotted name that equals or contains all of ``names``; "" is the whole module."""
    parts = [name.split(".") if name else [] for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


@contextmanager
def _unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Remove the dropout keys, so that dropout is random; on exit, restore buffers, random states and keys."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states = {layer.state for layer in module.modules() if isinstance(layer, KeyedDropout)}
    keys = {state: state.keys for state in states}
    for state in states:
        state.set_keys(None)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        for state in states:
            state.set_keys(keys[state])
