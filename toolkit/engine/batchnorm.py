"""Batch norm over the whole batch of all processes, on any device.

torch's SyncBatchNorm has no CPU kernel. Here the CPU path is written out, so that training on one and on several
processes can be compared without a GPU; on a GPU torch's fused kernels are used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as FusedSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm


class _SynchronisedNorm(torch.autograd.Function):
    """Normalise [n, C, ...] by mean and variance over n and all processes (Ioffe & Szegedy 2015, arXiv:1502.03167)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        axes = [0, *range(2, x.dim())]
        count = x.new_full((1,), x.numel() / x.shape[1])
        local_mean = x.mean(axes)
        local_m2 = (x - _channels(local_mean, x)).square().sum(axes)
        mean, m2, total = _combine(local_mean, local_m2, count)
        variance = m2 / total
        scale = (variance + eps).rsqrt()
        normalised = (x - _channels(mean, x)) * _channels(scale, x)
        ctx.save_for_backward(normalised, scale, weight, total)
        ctx.mark_non_differentiable(mean, variance, total)
        out = normalised if weight is None else normalised * _channels(weight, x)
        return (out if bias is None else out + _channels(bias, x)), mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normalised, scale, weight, total = ctx.saved_tensors
        grad = gradients[0]
        axes = [0, *range(2, grad.dim())]
        bias_grad = grad.sum(axes)
        weight_grad = (grad * normalised).sum(axes)
        if weight is not None:
            grad = grad * _channels(weight, grad)
        sums = torch.stack([grad.sum(axes), (grad * normalised).sum(axes)])
        dist.all_reduce(sums)
        sums /= total
        grad = (grad - _channels(sums[0], grad) - normalised * _channels(sums[1], grad)) * _channels(scale, grad)
        return grad, (None if weight is None else weight_grad), (None if weight is None else bias_grad), None


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...], to broadcast over ``like``."""
    return values.reshape(1, -1, *([1] * (like.dim() - 2)))


def _combine(mean: Tensor, m2: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared deviations and count over all processes, without cancellation (Chan et al. 1979)."""
    mine = torch.cat([mean, m2, count])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    means, m2s, counts = torch.stack(everyone).split([mean.numel(), mean.numel(), 1], dim=1)
    total = counts.sum(0)
    pooled = (means * counts).sum(0) / total
    return pooled, (m2s + counts * (means - pooled).square()).sum(0), total


class SyncBatchNorm(_BatchNorm):
    """Batch norm over all processes' images, which can also be told that all processes hold the same ones.

    Not a subclass of torch's, which DDP refuses on the CPU. ``drop`` and ``act`` take over what timm's BatchNormAct2d
    does after normalising; parameter names stay as they were.
    """

    replicated = False
    """Set while every process computes the same whole micro-batch: then the local statistics are the global ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def _check_input_dim(self, input: Tensor) -> None:
        """Any [n, C, ...] will do: the layer that this one replaces has had its input checked by the architecture."""

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, ...] -> the same shape."""
        out: Tensor = self.act(self.drop(self._normalise(input)))
        return out

    def _normalise(self, x: Tensor) -> Tensor:
        if not self.training or self.replicated or not dist.is_initialized():
            return super().forward(x)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked or 1)
        if x.device.type == "cpu":
            return self._on_cpu(x, rate)
        group = dist.group.WORLD
        arguments = (self.weight, self.bias, self.running_mean, self.running_var, self.eps, rate, group)
        out: Tensor = FusedSyncBatchNorm.apply(x, *arguments, dist.get_world_size())
        return out

    def _on_cpu(self, x: Tensor, rate: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        result, mean, variance, total = _SynchronisedNorm.apply(wide, self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * (total / (total - 1)), rate)
        out: Tensor = result.to(x.dtype)
        return out


def synchronise(module: nn.Module) -> nn.Module:
    """Replace every batch norm inside ``module`` by a synchronised one with the same parameters and names."""
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        return _convert(module)
    for name, child in module.named_children():
        replacement = synchronise(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def _convert(norm: _BatchNorm) -> SyncBatchNorm:
    new = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    if norm.affine:
        new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.training = norm.training
    for extra in ("drop", "act"):
        if isinstance(getattr(norm, extra, None), nn.Module):
            setattr(new, extra, getattr(norm, extra))
    return new


def set_replicated(module: nn.Module, replicated: bool) -> None:
    """Say whether the next forward sees the same images on every process."""
    for child in module.modules():
        if isinstance(child, SyncBatchNorm):
            child.replicated = replicated


def average_statistics(module: nn.Module) -> None:
    """Average running statistics over processes, for batch norms that are not synchronised (a collective)."""
    for child in module.modules():
        if isinstance(child, _BatchNorm) and child.running_mean is not None and child.running_var is not None:
            for statistic in (child.running_mean, child.running_var):
                dist.all_reduce(statistic)
                statistic /= dist.get_world_size()


def local_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of the batch norms by name, which differ between processes where they are not synchronised."""
    return {
        f"{name}.{buffer}": tensor.detach().cpu()
        for name, child in module.named_modules()
        if isinstance(child, _BatchNorm)
        for buffer, tensor in child.named_buffers(recurse=False)
    }


def restore_statistics(module: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Inverse of :func:`local_statistics`."""
    for name, value in statistics.items():
        module.get_buffer(name).copy_(value)
