"""Batches without workers from a whole split stored as tensors: features of a frozen backbone, or uint8 images."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from toolkit.cache.store import ByteArray
from toolkit.data.dataloader import BatchRequest, Finish
from toolkit.data.sampling import IntArray
from toolkit.data.tensor_rows import index_rows

T = TypeVar("T")


class TensorBatches:
    """Batches of examples stored as rows of tensors on any device, which may be memory-mapped files.

    A :class:`toolkit.data.dataloader.BatchSource`.
    """

    def __init__(
        self,
        views: Sequence[Tensor],
        labels: IntArray,
        row_indices: IntArray | None = None,
        finish: Finish | None = None,
        prefetch: torch.device | None = None,
    ) -> None:
        """``views``: one tensor [rows, ...], or one per augmented version. ``labels``: int64 [N].

        ``row_indices``: the row of each example, int64 [N]; None: example i is row i. ``finish``: computes model inputs
        from rows. ``prefetch``: a GPU to which a background thread copies rows in advance, through pinned memory.
        """
        self.views, self.row_indices, self.finish = list(views), row_indices, finish
        self.device = self.views[0].device if prefetch is None else prefetch
        self.runs_ahead = prefetch is not None
        self.labels = torch.from_numpy(labels).to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, requests: Sequence[BatchRequest]) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`toolkit.data.dataloader.BatchSource`."""
        gathered = (self._gather(request) for request in requests)
        ready = prefetch(gathered, self.device) if self.runs_ahead else gathered
        for request, (rows, labels) in zip(requests, ready, strict=True):
            yield rows if self.finish is None else self.finish(rows, request.view, request.keys), labels

    def _gather(self, request: BatchRequest) -> tuple[Tensor, Tensor]:
        """Return the rows [m, ...] of the requested view, and the labels int64 [m]."""
        rows, positions = self.views[request.view % len(self.views)], request.positions
        taken = _take_rows(rows, positions if self.row_indices is None else self.row_indices[positions])
        if self.runs_ahead:
            taken = taken.pin_memory().to(self.device, non_blocking=True)
        return taken, _take_rows(self.labels, positions)

    def close(self) -> None:
        """Release the tensors, which closes memory-mapped files."""
        self.views = []


def _take_rows(rows: Tensor, row_indices: IntArray) -> Tensor:
    """Return the rows at ``row_indices``; a view without a copy if they are consecutive."""
    if len(row_indices) and (np.diff(row_indices) == 1).all():
        return rows[int(row_indices[0]) : int(row_indices[-1]) + 1]
    index = torch.from_numpy(row_indices)
    if rows.device.type == "cuda":
        index = index.pin_memory().to(rows.device, non_blocking=True)
    return index_rows(rows, index)


def as_tensor(data: ByteArray, dtype: torch.dtype) -> Tensor:
    """View bytes as a flat tensor of ``dtype``, without a copy. Do not write to it if the bytes are read-only."""
    return torch.from_numpy(data).view(dtype)


def prefetch(items: Iterable[T], device: torch.device, depth: int = 2) -> Iterator[T]:
    """Yield ``items``, computed up to ``depth`` items in advance by a thread that always ends with the iteration."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    is_left = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not is_left.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return True
        return False

    def fill() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # per thread; the default is the first GPU
        try:
            if all(put("item", item) for item in items):
                put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        is_left.set()
        thread.join()
