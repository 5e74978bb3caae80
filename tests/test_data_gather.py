"""Selected rows of tensors equal those of PyTorch's own indexing, in the same memory format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from toolkit.data.tensor_loader import as_tensor
from toolkit.data.tensor_rows import assign_rows, index_rows, memory_format

KINDS = {
    "bytes as stored": torch.randint(0, 256, (9, 6, 5, 3), dtype=torch.uint8),
    "channels last": torch.randint(0, 256, (9, 6, 5, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
    "channels first": torch.rand(9, 3, 6, 5),
    "gray": torch.rand(9, 1, 6, 5),
    "features": torch.rand(9, 7),
    "labels": torch.arange(9),
}


@pytest.mark.parametrize("tensor", KINDS.values(), ids=KINDS)
def test_reading_and_writing_rows_equals_indexing(tensor: Tensor) -> None:
    index = torch.tensor([7, 0, 4])
    taken = index_rows(tensor, index)
    assert torch.equal(taken, tensor[index])
    if tensor.dim() == 4:
        assert memory_format(taken) is memory_format(tensor)

    wanted, found = tensor.clone(), tensor.clone()
    wanted[index] = tensor[:3]
    assign_rows(found, index, tensor[:3])
    assert torch.equal(found, wanted)


def test_selecting_no_rows_and_rows_of_read_only_memory() -> None:
    kept = np.arange(12, dtype=np.uint8).reshape(4, 3)
    kept.flags.writeable = False
    rows = as_tensor(kept, torch.uint8).view(4, 3)
    assert index_rows(rows, torch.tensor([3, 1])).tolist() == [[9, 10, 11], [3, 4, 5]]
    assert index_rows(rows, torch.tensor([], dtype=torch.int64)).shape == (0, 3)
