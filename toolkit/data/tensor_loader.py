"""Batches gathered from tensors that hold a whole split: features of frozen layers, or images as bytes; no workers."""

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
    """Examples of a split as rows of a tensor, on any device; the tensor may be a file mapped into memory."""

    def __init__(
        self,
        views: Sequence[Tensor],
        labels: IntArray,
        places: IntArray | None = None,
        finish: Finish | None = None,
        prefetch: torch.device | None = None,
    ) -> None:
        """views: for each augmented version, or once for all, a tensor [rows, ...]; labels: int64 [N].

        places: the row of each example, int64 [N]; None: example i is row i. finish: makes the model's inputs of rows.
        ahead: a GPU that rows are brought to, from pinned memory, by a thread that runs ahead of training.
        """
        self.views, self.places, self.finish = list(views), places, finish
        self.device = self.views[0].device if prefetch is None else prefetch
        self.runs_ahead = prefetch is not None
        self.labels = torch.from_numpy(labels).to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, view: int, positions: IntArray) -> tuple[Tensor, Tensor]:
        """Rows [m, ...] of one view, and labels int64 [m]."""
        rows = self.views[view % len(self.views)]
        index = positions if self.places is None else self.places[positions]
        labels, taken = _taken(self.labels, positions), _taken(rows, index)
        return (taken.pin_memory().to(self.device, non_blocking=True) if self.runs_ahead else taken), labels

    def finished(self, rows: Tensor, view: int, draws: IntArray) -> Tensor:
        """Model inputs of gathered rows."""
        return rows if self.finish is None else self.finish(rows, view, torch.from_numpy(draws))


def _taken(rows: Tensor, places: IntArray) -> Tensor:
    """These rows: a view and no copy, where they are consecutive."""
    if len(places) and (np.diff(places) == 1).all():
        return rows[int(places[0]) : int(places[-1]) + 1]
    index = torch.from_numpy(places)
    if rows.device.type == "cuda":
        index = index.pin_memory().to(rows.device, non_blocking=True)
    return index_rows(rows, index)


class TensorLoader:
    """Training batches."""

    def __init__(self, rows: TensorSplit, plan: SamplingPlan) -> None:
        """The examples in the order of ``plan``."""
        if len(rows) != plan.size:
            raise ValueError(f"{len(rows)} examples, a plan for {plan.size}")
        self.rows, self.plan = rows, plan

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Batch]]:
        """As :meth:`toolkit.data.dataloader.TrainLoader.epoch`."""
        view, plan = self.plan.view(epoch), self.plan
        gathered = (
            (micro, self.rows.gather(view, positions), positions, draws)
            for micro, positions, draws in plan.epoch(epoch, first_step)
        )
        for micro, (rows, labels), positions, draws in _maybe_ahead(gathered, self.rows):
            images = self.rows.finished(rows, view, plan.augmentation_ids(positions, draws))
            yield micro, Batch(images, labels, torch.from_numpy(draws))

    def close(self) -> None:
        """Let the tensors go: files that are mapped into memory are closed with them."""
        self.rows.views = []


class TensorEvaluationLoader:
    """Evaluation batches, the same at every iteration."""

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
        """Let the tensors go."""
        self.rows.views = []


def as_tensor(data: ByteArray, dtype: torch.dtype) -> Tensor:
    """Bytes as a flat tensor of that type, without a copy; if they are read-only, it must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has no tensors that are read-only, and says so
        return torch.frombuffer(data.data, dtype=dtype)


def _maybe_ahead(items: Iterable[T], rows: TensorSplit) -> Iterator[T]:
    return prefetch(items, rows.device) if rows.runs_ahead else iter(items)


def prefetch(items: Iterable[T], device: torch.device, depth: int = 2) -> Iterator[T]:
    """``items``, made by a thread that is up to ``depth`` items ahead; it ends when the iteration does, however."""
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
            torch.cuda.set_device(device)  # each thread has its own, and begins with the first GPU
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
