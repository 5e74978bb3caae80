"""Loaders without workers for a whole split stored as tensors: features of a frozen backbone, or uint8 images."""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from toolkit.cache.store import ByteArray
from toolkit.data.dataloader import EVALUATION, Batch, EvaluationBatch, Finish
from toolkit.data.sampling import IntArray, MicroBatch, SamplingPlan
from toolkit.data.tensor_rows import index_rows

T = TypeVar("T")


class TensorSplit:
    """Examples of a split as rows of tensors on any device, which may be memory-mapped files."""

    def __init__(
        self,
        views: Sequence[Tensor],
        labels: IntArray,
        places: IntArray | None = None,
        finish: Finish | None = None,
        prefetch: torch.device | None = None,
    ) -> None:
        """``views``: one tensor [rows, ...], or one per augmented version. ``labels``: int64 [N].

        ``places``: the row of each example, int64 [N]; None: example i is row i. ``finish``: computes model inputs from
        rows. ``prefetch``: a GPU to which a background thread copies rows ahead of training, through pinned memory.
        """
        self.views, self.places, self.finish = list(views), places, finish
        self.device = self.views[0].device if prefetch is None else prefetch
        self.runs_ahead = prefetch is not None
        self.labels = torch.from_numpy(labels).to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, view: int, positions: IntArray) -> tuple[Tensor, Tensor]:
        """Return the rows [m, ...] of one view, and the labels int64 [m]."""
        rows = self.views[view % len(self.views)]
        index = positions if self.places is None else self.places[positions]
        labels, taken = _taken(self.labels, positions), _taken(rows, index)
        return (taken.pin_memory().to(self.device, non_blocking=True) if self.runs_ahead else taken), labels

    def finished(self, rows: Tensor, view: int, draws: IntArray) -> Tensor:
        """Compute model inputs from gathered rows."""
        return rows if self.finish is None else self.finish(rows, view, torch.from_numpy(draws))


def _taken(rows: Tensor, places: IntArray) -> Tensor:
    """Return the rows at ``places``; a view without a copy if they are consecutive."""
    if len(places) and (np.diff(places) == 1).all():
        return rows[int(places[0]) : int(places[-1]) + 1]
    index = torch.from_numpy(places)
    if rows.device.type == "cuda":
        index = index.pin_memory().to(rows.device, non_blocking=True)
    return index_rows(rows, index)


class TensorLoader:
    """Loader of training batches from a :class:`TensorSplit`."""

    def __init__(self, rows: TensorSplit, plan: SamplingPlan) -> None:
        """``plan`` defines the order of the examples."""
        if len(rows) != plan.size:
            raise ValueError(f"{len(rows)} examples, a plan for {plan.size}")
        self.rows, self.plan = rows, plan

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Batch]]:
        """See :meth:`toolkit.data.dataloader.TrainLoader.epoch`."""
        view, plan = self.plan.view(epoch), self.plan
        gathered = (
            (micro, self.rows.gather(view, positions), positions, draws)
            for micro, positions, draws in plan.epoch(epoch, first_step)
        )
        for micro, (rows, labels), positions, draws in _maybe_ahead(gathered, self.rows):
            images = self.rows.finished(rows, view, plan.augmentation_ids(positions, draws))
            yield micro, Batch(images, labels, torch.from_numpy(draws))

    def close(self) -> None:
        """Release the tensors, which closes memory-mapped files."""
        self.rows.views = []


class TensorEvaluationLoader:
    """Loader of evaluation batches from a :class:`TensorSplit`, the same in every iteration."""

    def __init__(self, rows: TensorSplit, batches: list[IntArray], view: int = EVALUATION) -> None:
        """``batches``: this process's share, as positions in the split."""
        self.rows, self.batches, self.view = rows, [positions for positions in batches if len(positions)], view

    def __iter__(self) -> Iterator[EvaluationBatch]:
        gathered = ((positions, self.rows.gather(self.view, positions)) for positions in self.batches)
        for positions, (rows, labels) in _maybe_ahead(gathered, self.rows):
            yield EvaluationBatch(positions, self.rows.finished(rows, self.view, positions), labels)

    def __len__(self) -> int:
        return len(self.batches)

    def close(self) -> None:
        """Release the tensors."""
        self.rows.views = []


def as_tensor(data: ByteArray, dtype: torch.dtype) -> Tensor:
    """View bytes as a flat tensor of ``dtype``, without a copy. Do not write to it if the bytes are read-only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that it does not support read-only tensors
        return torch.frombuffer(data.data, dtype=dtype)


def _maybe_ahead(items: Iterable[T], rows: TensorSplit) -> Iterator[T]:
    return prefetch(items, rows.device) if rows.runs_ahead else iter(items)


def prefetch(items: Iterable[T], device: torch.device, depth: int = 2) -> Iterator[T]:
    """Yield ``items`` from a thread that runs up to ``depth`` items ahead and always ends with the iteration."""
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
