"""Memory and FLOPs of one training step, measured by running it without computing anything.

The step runs on fake tensors (shapes and types, no values), so that a model of any size is measured in about a second
and without memory. If a model reads values, which fake tensors do not have, two real images are run on the CPU instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from toolkit.models.build import ModelBundle
from toolkit.models.transfer import is_pretrained, param_groups
from toolkit.recipe.schema import OptimizerConfig, Recipe
from toolkit.training.optimizer import build_optimizer

BY_SHAPES = "fake tensors (shapes without values)"
BY_IMAGES = "two real images on the CPU"


@dataclass(frozen=True)
class StepCost:
    """Cost of one forward and backward pass."""

    activations: int
    """Bytes kept for the backward pass, for one micro-batch, including copies of weights in lower precision."""
    forward_flops: float
    """Floating-point operations of the forward pass per image; a multiplication and an addition count as two."""
    training_flops: float
    """Floating-point operations of the forward and backward pass per image."""


@dataclass(frozen=True)
class Memory:
    """Memory used on each process's device, in bytes."""

    weights: int
    """Model parameters and buffers, float32."""
    gradients: int
    optimizer: int
    average: int
    """Average of the weights (train.ema, train.swa_start, optimizer.lookahead, optimizer.schedule_free)."""
    start: int
    """Pretrained parameters before training (transfer.l2_sp)."""
    sam: int
    """Copy of the weights during the second pass of optimizer.sam."""
    activations: int
    images: int
    """Images of one micro-batch, float32."""

    @property
    def total(self) -> int:
        """Sum of all parts, without the additional memory of libraries, kernels and the allocator."""
        return sum(asdict(self).values())


def measure_step(
    module: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype | None
) -> tuple[StepCost, str]:
    """Measure one training step on a micro-batch of ``shape`` [N, C, H, W]; return its cost and how it was measured.

    ``dtype`` is the autocast type, None without mixed precision. The module's training modes and requires_grad flags
    determine what is kept for the backward pass.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _run(module, shape, dtype), BY_SHAPES
    except Exception:  # models that read values raise exceptions of any type
        two = _run(module, (2, *shape[1:]), dtype)
    activations = round(two.activations * shape[0] / 2)
    return StepCost(activations, two.forward_flops, two.training_flops), BY_IMAGES


def _run(module: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype | None) -> StepCost:
    """Run a forward and backward pass, counting operations and the bytes of the tensors that autograd saves."""
    state = _fresh_state(module)
    own = {_storage_key(tensor) for tensor in state.values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage_key(tensor), tensor)
        return tensor

    images, labels = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long)
    own.add(_storage_key(images))
    autocast = torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with flop_counter() as counter:
        with hooks, autocast:
            logits = functional_call(module, state, (images,))
            loss = nn.functional.cross_entropy(logits.float(), labels)
        forward = counter.get_total_flops()
        loss.backward()
        training = counter.get_total_flops()
    activations = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    return StepCost(activations, forward / shape[0], training / shape[0])


def flop_counter() -> FlopCounterMode:
    """Return a context that counts floating-point operations; a multiplication and an addition count as two.

    PyTorch's counter ignores the groups of a convolution in the backward pass and so overstates depthwise convolutions.
    """
    backward = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=backward)


def _convolution_backward_flops(
    grad_output: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *others: Any, **_: Any
) -> int:
    """Count the operations of a convolution's backward pass: those of one forward pass per gradient (input, weight).

    Takes the shapes of the output gradient, input and weight, then the other arguments of aten::convolution_backward.
    """
    transposed, output_mask = others[4], others[7]
    once: int = conv_flop_count(list(inputs), list(weight), list(grad_output), transposed=transposed)
    return once * sum(map(bool, output_mask[:2]))


def _fresh_state(module: nn.Module) -> dict[str, Tensor]:
    """Return new parameters and buffers of the module's shapes on the CPU (fake tensors in fake mode)."""
    state: dict[str, Tensor] = {
        name: nn.Parameter(torch.zeros_like(tensor, device="cpu"), requires_grad=tensor.requires_grad)
        for name, tensor in module.named_parameters()
    }
    return state | {name: torch.zeros_like(tensor, device="cpu") for name, tensor in module.named_buffers()}


def _storage_key(tensor: Tensor) -> int:
    """Return a key shared by all views of a storage, valid while one of them is alive."""
    return int(tensor.untyped_storage()._cdata)


def measure_memory(recipe: Recipe, built: ModelBundle, step: StepCost, shape: tuple[int, int, int, int]) -> Memory:
    """Compute the memory in use on a device during a training step on a micro-batch of ``shape``."""
    parameters = list(built.module.parameters())
    trainable = _nbytes(p for p in parameters if p.requires_grad)
    pretrained = (p for name, p in built.module.named_parameters() if p.requires_grad and is_pretrained(built, name))
    return Memory(
        weights=_nbytes([*parameters, *built.module.buffers()]),
        gradients=trainable,
        optimizer=optimizer_bytes(recipe.optimizer, param_groups(built, recipe.transfer, recipe.optimizer)),
        average=trainable * _average_copies(recipe),
        start=_nbytes(pretrained) if recipe.transfer.l2_sp else 0,
        sam=trainable if recipe.optimizer.sam else 0,
        activations=step.activations,
        images=4 * shape[0] * shape[1] * shape[2] * shape[3],
    )


def _average_copies(recipe: Recipe) -> int:
    """Return the number of copies of the trainable weights that an average of them takes."""
    if recipe.optimizer.schedule_free:
        return 2
    return int(bool(recipe.train.ema or recipe.train.swa_start or recipe.optimizer.lookahead))


def optimizer_bytes(table: OptimizerConfig, groups: list[dict[str, Any]]) -> int:
    """Return the bytes of the optimizer's state after a step over these parameter groups."""
    on_meta = [{**group, "params": [_placeholder(p, "meta") for p in group["params"]]} for group in groups]
    try:
        return _state_bytes(table, on_meta)
    except RuntimeError:  # the optimizer reads values: use real tensors, one per shape and decay
        sizes: dict[tuple[Any, ...], int] = {}
        total = 0
        for group in groups:
            for parameter in group["params"]:
                key = (tuple(parameter.shape), group["weight_decay"])
                if key not in sizes:
                    sizes[key] = _state_bytes(table, [{**group, "params": [_placeholder(parameter, "cpu")]}])
                total += sizes[key]
        return total


def _state_bytes(table: OptimizerConfig, groups: list[dict[str, Any]]) -> int:
    optimizer = build_optimizer(table, groups)
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return _nbytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def _placeholder(parameter: Tensor, device: str) -> nn.Parameter:
    return nn.Parameter(torch.ones(parameter.shape, device=device))


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
