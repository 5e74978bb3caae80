"""Fast indexing and assignment of whole rows of a tensor.

On a CPU PyTorch's ``tensor[index]`` copies value by value, which for uint8 takes at least eight times as
long as copying whole rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(images: Tensor) -> torch.memory_format:
    """Return the memory format of [m, C, h, w]: channels_last if the channels of a pixel are adjacent."""
    return torch.channels_last if images.shape[1] > 1 and images.stride(1) == 1 else torch.contiguous_format


def index_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return a copy of ``tensor[index]`` in the same memory format. ``index``: int64 [n] on the same device."""
    if _is_channels_last(tensor):
        return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return tensor.index_select(0, index)


def assign_rows(tensor: Tensor, index: Tensor, rows: Tensor) -> None:
    """Set ``tensor[index] = rows``, of the same dtype. ``index``: int64 [n] on the same device, without duplicates."""
    if tensor.device.type != "cpu":
        tensor[index] = rows
    elif _is_channels_last(tensor):
        tensor.permute(0, 2, 3, 1).numpy()[index.numpy()] = rows.permute(0, 2, 3, 1).numpy()
    else:
        tensor.numpy()[index.numpy()] = rows.numpy()


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and memory_format(tensor) is torch.channels_last
