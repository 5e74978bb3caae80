"""Batch norm with accurate sums on CPUs, optionally synchronized over all processes on any device.

PyTorch's CPU kernel for channels_last sums all positions of a channel sequentially in float32. Its rounding error grows
with the batch size, so a run on one process is less accurate than one on two. Here short pieces are summed in float32
and the sums of the pieces in float64. torch's SyncBatchNorm has no CPU kernel either, so both cases share one function
on CPUs. On a GPU torch's fused kernels are used. Cost: benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as FusedSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

PIECE_ROWS = 64, 1024
"""Minimum and maximum number of values summed sequentially in float32. Fewer are more accurate but slower."""

PIECE_CHANNELS = 1024
"""Approximate number of sums computed in parallel: fewer calls for the same number of rows, within the L1 cache."""


class _CpuBatchNorm(torch.autograd.Function):
    """Batch norm of [n, C, ...] over all dimensions but C, and over ``processes``.

    Ioffe & Szegedy 2015, arXiv:1502.03167. Returns the output in the dtype of ``x``, and in float64 mean and biased
    variance [2, C] and the number of values per channel [1].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, processes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics = (_OPAQUE_STATISTICS if torch.compiler.is_compiling() else _statistics)(x)
        count = statistics.new_full((1,), x.numel() / x.shape[1])
        if processes > 1:
            statistics, count = _combine_processes(statistics, count, processes)
        mean, variance = statistics.to(_at_least_float32(x))
        out = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.eps, ctx.processes = eps, processes
        ctx.save_for_backward(x, weight, statistics, count)
        ctx.mark_non_differentiable(statistics, count)
        return out, statistics, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, statistics, count = ctx.saved_tensors
        grad, (mean, variance) = gradients[0], statistics
        scale = (variance + ctx.eps).rsqrt()
        sums = (_OPAQUE_GRADIENT_SUMS if torch.compiler.is_compiling() else _gradient_sums)(grad, x, mean, scale)
        weight_grad, bias_grad = sums.to(_at_least_float32(x), copy=True)  # of this process only
        grad_input = None
        if ctx.needs_input_grad[0]:
            if ctx.processes > 1:
                dist.all_reduce(sums)
            # scale * weight * (grad - mean(grad) - normalized * mean(grad * normalized)), with the terms in x together
            factor = scale if weight is None else scale * weight
            mean_weighted, mean_grad = sums / count
            slope = -factor * scale * mean_weighted
            shift = -factor * mean_grad - slope * mean
            grad_input = _linear(x, grad, torch.stack([slope, shift, factor]))
        return (
            grad_input,
            (None if weight is None else weight_grad),
            (None if weight is None else bias_grad),
            None,
            None,
        )


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _is_summed_inexactly(x: Tensor) -> bool:
    """Return whether PyTorch's CPU kernels sum ``x`` in float32 with an error above the rounding error of its values.

    For contiguous tensors [n, C, ...] they sum in float64. In bf16 the rounding error of the values is larger.
    """
    return x.dtype == torch.float32 and (_is_channels_innermost(x) or not x.is_contiguous())


def _is_channels_innermost(x: Tensor) -> bool:
    """Return whether ``x`` is [n, C], or [n, C, h, w] in channels_last."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 2 and x.is_contiguous()


def _pieces(x: Tensor) -> list[Tensor]:
    """Split ``x`` [n, C, ...] into tensors that PyTorch's kernels sum accurately.

    If channels are innermost: views [rows, k * C] whose column j holds values of channel j % C. Otherwise ``x`` itself,
    contiguous and in float32 or float64.
    """
    if not _is_channels_innermost(x):
        return [x.to(_at_least_float32(x)).contiguous()]
    channels = x.shape[1]
    positions = x.numel() // channels
    side_by_side = math.gcd(positions, max(PIECE_CHANNELS // channels, 1))
    rows = x.movedim(1, -1).reshape(positions // side_by_side, side_by_side * channels)
    fewest, most = PIECE_ROWS
    return list(rows.split(min(max(len(rows) // 8, fewest), most)))


def _statistics(x: Tensor) -> Tensor:
    """Return mean and biased variance of ``x`` [n, C, ...], float64 [2, C]."""
    pieces = _pieces(x)
    # These only determine the dtype of the results.
    running = None if x.dtype == _at_least_float32(x) else torch.zeros(pieces[0].shape[1])
    found = [each for piece in pieces for each in torch.batch_norm_update_stats(piece, running, running, 0.0)]
    means, variances = torch.cat(found).double().view(len(pieces), 2, -1, x.shape[1]).unbind(1)  # each [pieces, k, C]
    counts = torch.tensor([piece.shape[0] for piece in pieces], dtype=torch.float64).view(-1, 1, 1)
    return _combine(means, variances, counts)


def _combine(means: Tensor, variances: Tensor, counts: Tensor) -> Tensor:
    """Combine means and biased variances [m, k, C] of m x k parts of relative sizes [m, 1, 1] into [2, C].

    Avoids cancellation (Chan et al. 1979).
    """
    shares = counts / (counts.sum() * means.shape[1])
    mean = (means * shares).sum((0, 1))
    return torch.stack([mean, ((variances + (means - mean).square()) * shares).sum((0, 1))])


def _combine_processes(statistics: Tensor, count: Tensor, processes: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [2, C] and count [1] over all processes (a collective)."""
    mine = torch.cat([statistics.flatten(), count])
    everyone = [torch.empty_like(mine) for _ in range(processes)]
    dist.all_gather(everyone, mine)
    channels = statistics.shape[1]
    means, variances, counts = torch.stack(everyone).unsqueeze(1).split([channels, channels, 1], dim=2)
    return _combine(means, variances, counts), counts.sum().view(1)


def _gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return the sums of gradient times normalized input, and of the gradient, float64 [2, C]."""
    pieces, grad_pieces = _pieces(x), _pieces(_laid_out_like(x, grad))
    repeats = pieces[0].shape[1] // x.shape[1]
    wide = _at_least_float32(x)
    mean, scale = torch.stack([mean, scale]).to(wide).repeat(1, repeats)
    weight = None if x.dtype == wide else torch.ones_like(mean)  # determines the dtype of the sums
    only_sums = [False, True, True]
    found = [
        each
        for piece, grad_piece in zip(pieces, grad_pieces, strict=True)
        for each in torch.ops.aten.native_batch_norm_backward(
            grad_piece, piece, weight, None, None, mean, scale, True, 0.0, only_sums
        )[1:]
    ]
    return torch.cat(found).double().view(len(pieces), 2, repeats, -1).sum((0, 2))


def _laid_out_like(x: Tensor, grad: Tensor) -> Tensor:
    if x.dim() == 4 and _is_channels_innermost(x):
        return grad.contiguous(memory_format=torch.channels_last)
    return grad.contiguous()


def _linear(x: Tensor, grad: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``slope * x + shift + factor * grad`` in the dtype of ``x``; [slope, shift, factor] is [3, C]."""
    wide = _at_least_float32(x)
    slope, shift, factor = coefficients.to(wide).view(3, -1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift, x.to(wide), slope).addcmul_(grad.to(wide), factor).to(x.dtype)


# torch.compile would unroll the loops over pieces, of which there can be hundreds.
_OPAQUE_STATISTICS = torch.library.custom_op("toolkit::batch_norm_statistics", _statistics, mutates_args=())
_OPAQUE_GRADIENT_SUMS = torch.library.custom_op("toolkit::batch_norm_gradient_sums", _gradient_sums, mutates_args=())


@_OPAQUE_STATISTICS.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


@_OPAQUE_GRADIENT_SUMS.register_fake
def _(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the images of all processes, or over the local ones if all processes have the same images.

    Not a subclass of torch's SyncBatchNorm, which DDP refuses on CPUs. ``drop`` and ``act`` are those of timm's
    BatchNormAct2d, applied after normalization; parameter names do not change.
    """

    synchronized = True
    """If False, each process normalizes by its own images only."""

    replicated = False
    """True while every process computes the same micro-batch, so that local statistics are the global ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any [n, C, ...]; the replaced layer already matched its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [n, C, ...] to the same shape."""
        out: Tensor = self.act(self.drop(self._normalize(input)))
        return out

    def _normalize(self, x: Tensor) -> Tensor:
        is_distributed = self.synchronized and not self.replicated and dist.is_initialized()
        processes = dist.get_world_size() if is_distributed else 1
        on_cpu = x.device.type == "cpu"
        is_exact = not on_cpu or not _is_summed_inexactly(x)
        has_one_value = x.numel() == x.shape[1]  # PyTorch raises an error for this
        if not self.training or (processes == 1 and (is_exact or has_one_value)):
            return super().forward(x)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked or 1)
        if on_cpu:
            return self._on_cpu(x, rate, processes)
        group = dist.group.WORLD
        arguments = (self.weight, self.bias, self.running_mean, self.running_var, self.eps, rate, group)
        out: Tensor = FusedSyncBatchNorm.apply(x, *arguments, processes)
        return out

    def _on_cpu(self, x: Tensor, rate: float, processes: int) -> Tensor:
        out: Tensor
        out, statistics, count = _CpuBatchNorm.apply(x, self.weight, self.bias, self.eps, processes)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                mean, variance = statistics
                self.running_mean.lerp_(mean.to(self.running_mean), rate)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), rate)
        return out


def replace_batch_norms(module: nn.Module, *, synchronized: bool = True) -> nn.Module:
    """Replace every batch norm in ``module`` by a :class:`SyncBatchNorm` with the same parameters and names.

    If ``synchronized``, statistics are computed over the images of all processes, otherwise over each process's own.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        return _convert(module, synchronized)
    for name, child in module.named_children():
        replacement = replace_batch_norms(child, synchronized=synchronized)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def _convert(norm: _BatchNorm, synchronized: bool) -> SyncBatchNorm:
    new = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    if norm.affine:
        new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.training, new.synchronized = norm.training, synchronized
    for extra in ("drop", "act"):
        if isinstance(getattr(norm, extra, None), nn.Module):
            setattr(new, extra, getattr(norm, extra))
    return new


def set_replicated(module: nn.Module, replicated: bool) -> None:
    """Set whether every process gets the same images in the next forward pass."""
    for child in module.modules():
        if isinstance(child, SyncBatchNorm):
            child.replicated = replicated


@contextlib.contextmanager
def recomputed_statistics(module: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Replace the running statistics of ``layers`` by means over the batches passed through ``module`` in this context.

    ``layers``: batch norms of ``module``, which normalize by the batch in this context; everything else is in
    evaluation mode. Their momentum and all modes are restored afterwards. This is what torch.optim.swa_utils.update_bn
    does (Izmailov et al. 2018, arXiv:1803.05407).
    """
    modes = {part: part.training for part in module.modules()}
    norms = [layer for layer in layers if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    momenta = {norm: norm.momentum for norm in norms}
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.training = True
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for part, training in modes.items():
            part.training = training


def average_statistics(module: nn.Module) -> None:
    """Average running statistics over processes, for batch norms that are not synchronized (a collective)."""
    for child in module.modules():
        if isinstance(child, _BatchNorm) and child.running_mean is not None and child.running_var is not None:
            for statistic in (child.running_mean, child.running_var):
                dist.all_reduce(statistic)
                statistic /= dist.get_world_size()


def local_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of all batch norms by name; they differ between processes if they are not synchronized."""
    return {
        f"{name}.{buffer}": tensor.detach().cpu()
        for name, child in module.named_modules()
        if isinstance(child, _BatchNorm)
        for buffer, tensor in child.named_buffers(recurse=False)
    }


def restore_statistics(module: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Restore buffers from :func:`local_statistics`."""
    for name, value in statistics.items():
        module.get_buffer(name).copy_(value)
