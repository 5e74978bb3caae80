"""Data loaders for training and evaluation, with worker processes or in the training process.

The content of a batch depends only on (seed, epoch, step): before each image a worker seeds the random generators
with a hash of (seed, epoch, draw). The number of workers and the assignment of images to workers have no effect.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from toolkit.augment.transforms import ImageTransform, preserved_random_states
from toolkit.data.image_sources import ImageSource, InMemoryImages, Pixels
from toolkit.data.sampling import IntArray, MicroBatch, SamplingPlan, hash64
from toolkit.data.shard_prefetch import shard_prefetch
from toolkit.distributed.cpu_count import available_cpus
from toolkit.errors import RunFailed, UserError

MAX_WORKERS = 16
PREFETCH_FACTOR = 2
"""Number of batches that each worker loads before they are used; PyTorch's default."""
SMALL_BYTES = 8 * 2**20
"""In-memory images up to this size (digits: 0.1 MB) use no workers: communication would take longer than loading."""

_LEFT_TO_TRAINER = {
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
}

EVALUATION = -1
"""Used instead of the epoch number in evaluation, so that every evaluation draws the same random numbers."""


Finish = Callable[[Tensor, int, IntArray], Tensor]
"""Function of (uint8 [m, h, w, C], view, keys int64 [m]) that returns model inputs, float32 [m, C, H, W] on the model's
device; view and keys as in :class:`BatchRequest`."""


class Batch(NamedTuple):
    """Examples of one micro-batch: first the process's own, then partners for mixup or CutMix."""

    images: Tensor
    """Model inputs, float32 [m, C, H, W] (features: [m, ...])."""
    labels: Tensor
    """Class of each example, int64 [m]; multi-label: 1 for each label of an example, uint8 [m, K]."""
    draws: Tensor
    """Key of each example's random numbers, int64 [m]: see :meth:`toolkit.data.sampling.SamplingPlan.epoch`."""
    positions: Tensor
    """Position of each example in the training split, int64 [m]."""


class EvaluationBatch(NamedTuple):
    """One batch of an evaluation; over all processes each example of the split occurs exactly once."""

    positions: IntArray
    """Position of each example in the split, int64 [m]."""
    images: Tensor
    """Model inputs, float32 [m, C, H, W] (features: [m, ...])."""
    labels: Tensor
    """Class of each example, int64 [m]; multi-label: 1 for each label of an example, uint8 [m, K]."""


class BatchRequest(NamedTuple):
    """The examples of one batch. Their augmentation depends on nothing but the seed, the view and the key."""

    view: int
    """Number of the epoch or of the fixed view, or EVALUATION."""
    positions: IntArray
    """Position of each example in the split, int64 [m]."""
    keys: IntArray
    """Key of each example's augmentation within the view, int64 [m]."""


class BatchSource(Protocol):
    """The examples of one split, from image files, arrays or tensors."""

    def __len__(self) -> int: ...

    def batches(self, requests: Sequence[BatchRequest]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield model inputs, float32 [m, ...], and labels, int64 [m] or uint8 [m, K], for each request, in order.

        Only one iteration is possible at a time. Raises UnreadableImageError for an unreadable file and RunFailed if
        the transforms fail on an image.
        """
        ...

    def close(self) -> None:
        """Stop worker processes and release memory."""
        ...


class TrainLoader:
    """Loader of the training batches of one process."""

    def __init__(self, source: BatchSource, plan: SamplingPlan) -> None:
        """``plan`` defines the order of the examples."""
        if plan.size != len(source):
            raise ValueError(f"the plan is for {plan.size} images, but the split has {len(source)}")
        self.source, self.plan = source, plan

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Batch]]:
        """Yield the micro-batches of one epoch (counted from 0), starting at optimizer step ``first_step``.

        Only one epoch can be iterated at a time. Raises as :meth:`BatchSource.batches`.
        """
        view, steps = self.plan.view(epoch), list(self.plan.epoch(epoch, first_step))
        requests = [BatchRequest(view, at, self.plan.augmentation_ids(at, draws)) for _, at, draws in steps]
        for (micro, at, draws), (images, labels) in zip(steps, self.source.batches(requests), strict=True):
            yield micro, Batch(images, labels, torch.from_numpy(draws), torch.from_numpy(at))

    def close(self) -> None:
        """Close the source."""
        self.source.close()


class ProgressiveTrainLoader(TrainLoader):
    """Training loader whose source depends on the epoch; only one source is open at a time."""

    def __init__(self, source_of: Callable[[str], BatchSource], stage_of: Callable[[int], str], plan: SamplingPlan):
        """``source_of`` opens the source of a stage; ``stage_of`` returns the stage of an epoch, counted from 0."""
        self.source_of, self.stage_of, self.stage = source_of, stage_of, stage_of(0)
        super().__init__(source_of(self.stage), plan)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Batch]]:
        """See :class:`TrainLoader`."""
        stage = self.stage_of(epoch)
        if stage != self.stage:
            self.source.close()
            self.source, self.stage = self.source_of(stage), stage
        yield from super().epoch(epoch, first_step)


class EvaluationLoader:
    """Loader of this process's share of a split, the same in every iteration.

    Processes may have different numbers of batches.
    """

    def __init__(self, source: BatchSource, batches: Sequence[IntArray], view: int = EVALUATION) -> None:
        """``batches``: positions in the split. ``view`` is used instead of the number of an epoch."""
        self.source, self.requests = source, [BatchRequest(view, positions, positions) for positions in batches]

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for request, (images, labels) in zip(self.requests, self.source.batches(self.requests), strict=True):
            yield EvaluationBatch(request.positions, images, labels)

    def __len__(self) -> int:
        return len(self.requests)

    def close(self) -> None:
        """Close the source."""
        self.source.close()


class WorkerError(NamedTuple):
    """An error returned by a worker instead of a batch.

    PyTorch re-raises worker exceptions from a single string, which loses their other attributes.
    """

    error: Exception


class DataWorkerPool:
    """DataLoader that answers requests in order, with worker processes that live until :meth:`close`."""

    def __init__(self, dataset: torch.utils.data.Dataset[Any], workers: int, pin_memory: bool) -> None:
        """``dataset.__getitems__`` answers a request in a worker process; a returned :class:`WorkerError` is raised."""
        self._requests: list[Any] = []
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_sampler=self._requests,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH_FACTOR if workers else None,
            worker_init_fn=_start_worker if workers else None,
            # fork shares the index and the array with the workers; it is not safe on systems other than Linux.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # PyTorch draws a seed per epoch
        )

    def answers(self, requests: Sequence[Any]) -> Iterator[Any]:
        """Yield the answer to each request.

        Closes the pool and raises if a worker returns UnreadableImageError, RunFailed or UserError.
        """
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        self._requests[:] = requests
        with _signals_blocked():
            iterator = iter(self._loader)  # the first call starts the worker processes
        for answer in iterator:
            if isinstance(answer, WorkerError):
                self.close()
                raise answer.error
            yield answer

    def close(self) -> None:
        """Stop the worker processes now.

        If this is left to the garbage collector (a traceback can keep a loader alive in a reference cycle), PyTorch
        closes the queues in arbitrary order and then waits 5 seconds for each worker in turn.
        """
        iterator = None if self._loader is None else self._loader._iterator
        self._loader = None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            # PyTorch raises here if a signal killed a worker, which no longer matters.
            with contextlib.suppress(RuntimeError):
                iterator._shutdown_workers()


class SplitDataset(torch.utils.data.Dataset[Any]):
    """Images of one split. A worker answers a request with a whole batch: images [m, C, H, W] and labels [m]."""

    def __init__(
        self, images: ImageSource, labels: IntArray, indices: IntArray, transform: Callable[[Pixels], Tensor], seed: int
    ) -> None:
        """``indices`` are those of the split's images in ``images`` and ``labels``, int64 [N].

        ``transform`` returns model inputs, or uint8 [h, w, C] of equal size from which ``finish`` of
        :class:`WorkerBatches` computes them.
        """
        self.images, self.labels, self.indices = images, labels, indices
        self.transform, self.seed = transform, seed
        self.draws_from_python = isinstance(transform, ImageTransform) and transform.draws_from_python

    def __getitems__(self, request: BatchRequest) -> tuple[Tensor, Tensor] | WorkerError:
        """Return a whole batch. Called by PyTorch's fetcher with each item of the batch sampler."""
        indices = self.indices[request.positions]
        keys = zip(indices.tolist(), request.keys.tolist(), strict=True)
        try:
            with contextlib.nullcontext() if get_worker_info() is not None else preserved_random_states():
                images = default_collate([self._image(index, request.view, key) for index, key in keys])
        except (RunFailed, UserError) as error:
            return WorkerError(error)
        return images, torch.from_numpy(self.labels[indices])

    def _image(self, index: int, view: int, key: int) -> Tensor:
        """Load and transform an image. Seeds the global generators."""
        pixels = self.images.load(index)
        seed = hash64(self.seed, view, key)
        torch.default_generator.manual_seed(seed)
        if self.draws_from_python:
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
        try:
            return self.transform(pixels)
        except UserError:
            raise
        except Exception as error:
            failure = RunFailed(f"{self.images.name(index)}: the transforms failed: {error}")
            failure.add_note(traceback.format_exc())
            raise failure from error


class WorkerBatches(DataWorkerPool):
    """Batches of images that are loaded and transformed one by one; a :class:`BatchSource`."""

    def __init__(self, split: SplitDataset, workers: int, pin_memory: bool, finish: Finish | None = None) -> None:
        """``finish``: computes model inputs from the images that the workers return."""
        super().__init__(split, workers, pin_memory)
        self.split, self.size, self.finish = split, len(split.indices), finish
        self.ahead = PREFETCH_FACTOR * workers
        """Number of batches that workers load before they are used."""

    def __len__(self) -> int:
        return self.size

    def batches(self, requests: Sequence[BatchRequest]) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`BatchSource`."""
        answers, prefetch = self.answers(requests), None
        try:
            for number, (request, (images, labels)) in enumerate(zip(requests, answers, strict=True), 1):
                if number == 1:  # the workers have been forked, which must not happen beside a thread
                    batches = [each.positions for each in requests]
                    prefetch = shard_prefetch(self.split.images, self.split.indices, batches)
                if prefetch is not None:
                    prefetch.advance(number + self.ahead)
                yield images if self.finish is None else self.finish(images, request.view, request.keys), labels
            if prefetch is not None:
                prefetch.finish()
        finally:
            if prefetch is not None:
                prefetch.stop()


def worker_count(setting: int | str, images: ImageSource, local_processes: int) -> int:
    """Return the number of data workers of each of ``local_processes`` training processes on this machine.

    ``setting`` is ``data.workers``. "auto" means the CPUs available to this process minus one for itself, at most 16;
    0 for small in-memory images.
    """
    if isinstance(setting, int):
        return setting
    if isinstance(images, InMemoryImages) and images.pixels.nbytes <= SMALL_BYTES:
        return 0
    return max(0, min(available_cpus(local_processes) - 1, MAX_WORKERS))


def _as_is(batch: Any) -> Any:
    """Collate function for a data set that returns whole batches."""
    return batch


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals while worker processes start, until they have set up their own signal handling."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """Ignore signals in a worker: the training process decides when to stop and needs batches until then.

    A scheduler or a terminal signals the whole process group. Only SIGTERM from the training process itself is obeyed,
    because that is how Python terminates child processes. Workers exit by themselves if their parent dies (PyTorch's
    watchdog).
    """
    for number in _LEFT_TO_TRAINER - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    """Wait for SIGTERM and exit once the parent has sent it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
