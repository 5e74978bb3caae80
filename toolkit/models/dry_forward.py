"""Inspect a model's forward pass on PyTorch's meta device, which computes no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toolkit.models.keyed_dropout import can_be_keyed
from toolkit.recipe.image_size import Size

ROUNDING = 1e-3
"""Differences between logits that rounding can cause, relative to the largest logit; usual ones are below 1e-5."""


@dataclass(frozen=True)
class DryForwardResult:
    """Result of one forward pass with two images."""

    output: Any
    random: tuple[str, ...]
    """Operations that drew random numbers, except in layers that :mod:`~toolkit.models.keyed_dropout` replaces."""
    used: tuple[str, ...]
    """Names of the parameters used, in the order of their first use."""


def probe(module: nn.Module, channels: int, image_size: Size, *, training: bool = True) -> DryForwardResult:
    """Run two images through the module in training or evaluation mode; parameters, buffers and modes are unchanged.

    Raises whatever the model raises for images of this size.
    """
    try:
        return _probe_on(torch.device("meta"), module, channels, image_size, training)
    except Exception:
        # A few models read values, which meta tensors do not have. Errors with other causes recur on the CPU.
        return _probe_on(torch.device("cpu"), module, channels, image_size, training)


def input_shape(module: nn.Module, name: str, channels: int, image_size: Size) -> tuple[int, ...]:
    """Return the shape of the input of submodule ``name``, without the batch dimension."""
    shapes: list[tuple[int, ...]] = []
    hook = module.get_submodule(name).register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[1:])))
    try:
        probe(module, channels, image_size)
    except Exception:
        # The layers after ``name`` may reject this shape; they will be replaced.
        if not shapes:
            raise
    finally:
        hook.remove()
    return shapes[0]


def without_gradient(module: nn.Module, channels: int, image_size: Size) -> set[str]:
    """Return the names of the parameters, trained or frozen, on which the logits do not depend in training mode."""
    try:
        return _without_gradient_on(torch.device("meta"), module, channels, image_size)
    except Exception:  # as in probe
        return _without_gradient_on(torch.device("cpu"), module, channels, image_size)


def depends_on_batch(module: nn.Module, channels: int, image_size: Size) -> bool:
    """Return whether the logits of an image depend on the other image of its batch in evaluation mode.

    Computes the logits of two images, together and alone. Raises whatever the model raises.
    """
    images = torch.randn(2, channels, *image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _without_dropout(module, training=False), torch.random.fork_rng(devices=[]):
        together, alone = module(images), torch.cat([module(image) for image in images.split(1)])
    return bool((together - alone).abs().max() > ROUNDING * together.abs().max())


def _without_gradient_on(device: torch.device, module: nn.Module, channels: int, image_size: Size) -> set[str]:
    images = torch.zeros(2, channels, *image_size, device=device)
    with (
        torch.enable_grad(),
        _without_dropout(module, training=True),
        torch.random.fork_rng(devices=[]),
        _copies_on(device, module),
    ):
        named = {name: copy.requires_grad_() for name, copy in module.named_parameters() if copy.is_floating_point()}
        gradients = torch.autograd.grad(module(images).sum(), list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}


def _probe_on(
    device: torch.device, module: nn.Module, channels: int, image_size: Size, training: bool
) -> DryForwardResult:
    images = torch.zeros(2, channels, *image_size, device=device)
    with (
        torch.no_grad(),
        _without_dropout(module, training),
        torch.random.fork_rng(devices=[]),
        _copies_on(device, module),
        _Recorder(module) as recorder,
    ):
        output = module(images)
    return DryForwardResult(output, tuple(dict.fromkeys(recorder.random)), tuple(recorder.used))


@contextmanager
def _copies_on(device: torch.device, module: nn.Module) -> Iterator[None]:
    """Swap the module's tensors for copies on ``device``; on exit, put the original tensors back.

    Submodules registered under several names are swapped only once. torch.func.functional_call does not restore those.
    """
    entries: list[tuple[dict[str, Any], str, Tensor]] = [
        (tensors, name, tensor)
        for submodule in module.modules()
        for tensors in (submodule._parameters, submodule._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    copies: dict[int, Tensor] = {}
    for _, _, tensor in entries:
        if isinstance(tensor, nn.Parameter):
            copies[id(tensor)] = nn.Parameter(tensor.detach().to(device), tensor.requires_grad)
        else:
            copies[id(tensor)] = tensor.detach().clone().to(device)
    try:
        for tensors, name, tensor in entries:
            tensors[name] = copies[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in entries:
            tensors[name] = tensor


@contextmanager
def _without_dropout(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode, except for the dropout layers that :func:`key_dropout_layers` replaces; restore on exit."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.train(training)
    for submodule in modes:
        if can_be_keyed(submodule):
            submodule.eval()
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


class _Recorder(TorchDispatchMode):
    """Records the operations that draw random numbers, and the order in which parameters are used."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random: list[str] = []
        self.used: list[str] = []
        self._unused = {id(parameter): name for name, parameter in module.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument in tree_leaves((args, kwargs)):
            if id(argument) in self._unused:
                self.used.append(self._unused.pop(id(argument)))
        if torch.Tag.nondeterministic_seeded in func.tags and not _has_fixed_result(func, args, kwargs):
            self.random.append(str(func))
        return func(*args, **kwargs)


def _has_fixed_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a random operation has one possible result: attention without dropout, or a range of one value."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if "scaled_dot_product" in str(func):
        return not given.get("dropout_p", 0.0)
    return str(func).startswith("aten.uniform_") and bool(given.get("from", 0.0) == given.get("to", 1.0))


def is_logits(output: Any, num_classes: int) -> bool:
    """Return whether the output of :func:`probe` is one tensor of shape [2, num_classes]."""
    return isinstance(output, Tensor) and tuple(output.shape) == (2, num_classes)
