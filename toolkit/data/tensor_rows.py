"""Rows of a tensor, taken and put by whole rows.

On a CPU PyTorch's own ``tensor[index]`` goes value by value: for bytes it takes at least eight times as long as a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(images: Tensor) -> torch.memory_format:
    """channels_last where the channels of a pixel lie side by side, of [m, C, h, w]."""
    return torch.channels_last if images.shape[1] > 1 and images.stride(1) == 1 else torch.contiguous_format


def index_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor[index]``, a copy in the same memory format. index: int64 [n] on the same device."""
    if _is_channels_last(tensor):
        return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return tensor.index_select(0, index)


def assign_rows(tensor: Tensor, index: Tensor, rows: Tensor) -> None:
    """``tensor[index] = rows``, of the same type. index: int64 [n] on the same device, each row once."""
    if tensor.device.type != "cpu":
        tensor[index] = rows
    elif _is_channels_last(tensor):
        tensor.permute(0, 2, 3, 1).numpy()[index.numpy()] = rows.permute(0, 2, 3, 1).numpy()
    else:
        tensor.numpy()[index.numpy()] = rows.numpy()


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and memory_format(tensor) is torch.channels_last
