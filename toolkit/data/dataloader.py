"""Batches for training and evaluation, prepared by worker processes or taken from memory.

What a batch holds is a function of (seed, epoch, step) alone: a worker seeds the random generators anew for every
image, with a mix of (seed, epoch, draw). The number of workers, and which one does what, change nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from toolkit.augment.transforms import ImageTransform, UInt8Transform, random_states_kept
from toolkit.data.image_sources import ImageSource, InMemoryImages
from toolkit.data.sampling import IntArray, MicroBatch, SamplingPlan, hash64
from toolkit.distributed.cpu_count import available_cpus
from toolkit.errors import RunFailed, UserError

MAX_WORKERS = 16
SMALL_BYTES = 8 * 2**20
"""Arrays up to this size (digits: 0.1 MB) are prepared faster than a worker process is asked for them."""

_LEFT_TO_TRAINER = {
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
}

EVALUATION = -1
"""Stands for the epoch where there is none: evaluation is the same every time."""


Finish = Callable[[Tensor, int, Tensor], Tensor]
"""Makes the model's input, float32 [m, C, H, W] on its device, of bytes [m, h, w, C], an epoch and draws int64 [m]."""


class Batch(NamedTuple):
    """Examples of one micro-batch: a process's own first, then partners to mix with."""

    images: Tensor
    """float32 [m, C, H, W] (features: [m, ...])."""
    labels: Tensor
    """int64 [m]."""
    draws: Tensor
    """int64 [m], see :meth:`toolkit.data.sampling.SamplingPlan.epoch`; keys all that is random about an example."""


class TrainLoaderProtocol(Protocol):
    """What a training loop draws from."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Batch]]:
        """Micro-batches of one epoch (counted from 0), from an optimiser step on."""
        ...

    def close(self) -> None:
        """End worker processes."""
        ...


class BatchRequest(NamedTuple):
    """What a worker is asked for."""

    epoch: int
    positions: IntArray
    draws: IntArray


class WorkerError(NamedTuple):
    """Sent by a worker in place of a batch: PyTorch would rebuild exceptions from one string and lose their meaning."""

    error: Exception


class SplitDataset(torch.utils.data.Dataset[Any]):
    """One split's examples: a request gives the batch, images [m, C, H, W] and labels [m]."""

    def __init__(
        self, images: ImageSource, labels: IntArray, indices: IntArray, transform: Callable[[Any], Tensor], seed: int
    ) -> None:
        self.images, self.labels, self.indices = images, labels, indices
        self.transform, self.seed = transform, seed
        self.draws_from_python = isinstance(transform, ImageTransform) and transform.draws_from_python
        self.load = images.decoded if isinstance(transform, UInt8Transform) else images.load

    def __getitem__(self, key: tuple[int, int, int]) -> Tensor:
        """The input made of (epoch, position in the split, draw): float32 [C, H, W]. Seeds the global generators."""
        epoch, position, draw = key
        index = int(self.indices[position])
        image = self.load(index)
        seed = hash64(self.seed, epoch, draw)
        torch.default_generator.manual_seed(seed)
        if self.draws_from_python:
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
        try:
            return self.transform(image)
        except UserError:
            raise
        except Exception as error:
            failure = RunFailed(f"{self.images.name(index)}: the transforms failed: {error}")
            failure.add_note(traceback.format_exc())
            raise failure from error

    def __getitems__(self, request: BatchRequest) -> Batch | WorkerError:
        """A whole batch (PyTorch's fetcher calls this with what the batch sampler yields)."""
        try:
            if get_worker_info() is not None:
                return self._batch(request)
            with random_states_kept():
                return self._batch(request)
        except (RunFailed, UserError) as error:
            return WorkerError(error)

    def _batch(self, request: BatchRequest) -> Batch:
        epoch, positions, draws = request
        keys = zip(positions.tolist(), draws.tolist(), strict=True)
        images = default_collate([self[epoch, position, draw] for position, draw in keys])
        labels = self.labels[self.indices[positions]]
        return Batch(images, torch.from_numpy(labels), torch.from_numpy(draws))


class RequestSampler:
    """A batch sampler that yields whatever it was last given."""

    def __init__(self) -> None:
        self.current: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.current)


class DataWorkerPool:
    """A DataLoader whose worker processes live until :meth:`close`, and which answers requests in order."""

    def __init__(self, split: torch.utils.data.Dataset[Any], workers: int, pin_memory: bool) -> None:
        """``split.__getitems__`` turns a request into its answer, in a worker process; a Failure is raised."""
        self._requests = RequestSampler()
        self._loader: DataLoader[Any] | None = DataLoader(
            split,
            batch_sampler=self._requests,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker if workers else None,
            # fork shares the index and the array with the workers; elsewhere than on Linux it is not safe.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # PyTorch draws a seed each epoch: not from the global generator
        )

    def answers(self, requests: Iterable[Any]) -> Iterator[Any]:
        """A batch for each request. Raises BadImage, RunFailed and UserError as they were in the worker, and closes."""
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        self._requests.current = requests
        with _signals_held():
            iterator = iter(self._loader)  # starts the worker processes, the first time
        for answer in iterator:
            if isinstance(answer, WorkerError):
                self.close()
                raise answer.error
            yield answer

    def close(self) -> None:
        """End the worker processes now.

        Left to the garbage collector (a traceback can keep a loader alive in a cycle), PyTorch tears the queues down
        in any order, and then waits 5 seconds for each worker in turn.
        """
        iterator = None if self._loader is None else self._loader._iterator
        self._loader = None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            # PyTorch raises in here for a worker that a signal killed; it was to end anyway.
            with contextlib.suppress(RuntimeError):
                iterator._shutdown_workers()


class TrainLoader:
    """Training batches of one process."""

    def __init__(
        self, split: SplitDataset, plan: SamplingPlan, workers: int, pin_memory: bool, finish: Finish | None = None
    ) -> None:
        self.plan, self.finish, self._pool = plan, finish, DataWorkerPool(split, workers, pin_memory)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Batch]]:
        """Micro-batches of one epoch (counted from 0), from an optimiser step on; one epoch at a time.

        Raises BadImage for an unreadable file, RunFailed where the transforms fail on an image.
        """
        # Workers run ahead of the loop, so the plan is made twice, once for each side.
        plan = self.plan
        prefetch = (
            BatchRequest(plan.view(epoch), positions, plan.augmentation_ids(positions, draws))
            for _, positions, draws in plan.epoch(epoch, first_step)
        )
        answers = self._pool.answers(prefetch)
        for (micro, _, draws), batch in zip(plan.epoch(epoch, first_step), answers, strict=True):
            images = batch.images
            if self.finish is not None:
                images = self.finish(images, plan.view(epoch), batch.draws)
            yield micro, Batch(images, batch.labels, torch.from_numpy(draws))

    def close(self) -> None:
        """End worker processes."""
        self._pool.close()


class EvaluationBatch(NamedTuple):
    """Examples of a split, each exactly once over all processes."""

    positions: IntArray
    """Places in the split, int64 [m]."""
    images: Tensor
    """float32 [m, C, H, W] (features: [m, ...])."""
    labels: Tensor
    """int64 [m]."""


class EvaluationLoader:
    """This process's share of a split, the same at every iteration; processes may have different numbers of batches."""

    def __init__(
        self,
        split: SplitDataset,
        batches: list[IntArray],
        workers: int,
        pin_memory: bool,
        finish: Finish | None = None,
        view: int = EVALUATION,
    ) -> None:
        """``view`` stands for the epoch where the split's transform is random."""
        self.batches, self.finish, self.view = batches, finish, view
        self._pool = DataWorkerPool(split, min(workers, len(batches)), pin_memory)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        requests = (BatchRequest(self.view, positions, positions) for positions in self.batches)
        for positions, batch in zip(self.batches, self._pool.answers(requests), strict=True):
            images = batch.images
            if self.finish is not None:
                images = self.finish(images, self.view, batch.draws)
            yield EvaluationBatch(positions, images, batch.labels)

    def __len__(self) -> int:
        return len(self.batches)

    def close(self) -> None:
        """End worker processes."""
        self._pool.close()


def train_loader(
    images: ImageSource,
    labels: IntArray,
    indices: IntArray,
    transform: Callable[[Any], Tensor],
    plan: SamplingPlan,
    *,
    workers: int,
    pin_memory: bool,
    finish: Finish | None = None,
) -> TrainLoader:
    """Training batches of the examples ``indices`` (into the data set), in the order of ``plan``.

    ``transform`` makes the model's inputs, or bytes, uint8 [h, w, C], of one size that ``finish`` makes them of.
    """
    if plan.size != len(indices):
        raise ValueError(f"the plan is for {plan.size} images, the split has {len(indices)}")
    split = SplitDataset(images, labels, indices, transform, plan.seed)
    return TrainLoader(split, plan, workers, pin_memory, finish)


def worker_count(setting: int | str, images: ImageSource, local_processes: int) -> int:
    """Data workers for one of ``local_processes`` training processes on this machine, by ``data.workers``.

    auto: the CPUs granted to this process, less one for itself, at most 16; none for small arrays.
    """
    if isinstance(setting, int):
        return setting
    if isinstance(images, InMemoryImages) and images.pixels.nbytes <= SMALL_BYTES:
        return 0
    return max(0, min(available_cpus(local_processes) - 1, MAX_WORKERS))


def _as_is(batch: Any) -> Any:
    """The collate function of a dataset that gives whole batches."""
    return batch


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Keep signals waiting while worker processes start, which do not yet leave them to the trainer."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """Leave signals to the training process, which decides when to stop and still needs batches until then.

    A scheduler or a terminal signals the whole process group. Only SIGTERM from the training process itself counts:
    it is how Python ends its children. Workers whose parent has died end by themselves (PyTorch's watchdog).
    """
    for number in _LEFT_TO_TRAINER - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """Wait for SIGTERM; end the process when it comes from the parent."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
