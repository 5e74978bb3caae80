"""Prediction of image files with a trained model."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from toolkit.augment.transforms import ImageTransform, preserved_random_states
from toolkit.data.dataloader import MAX_WORKERS
from toolkit.data.folder_walk import FORMATS, FolderWalk
from toolkit.data.image_sources import Pixels, UnreadableImageError
from toolkit.data.sampling import hash64
from toolkit.distributed.cpu_count import available_cpus
from toolkit.distributed.process import local_processes
from toolkit.errors import UserError
from toolkit.inference.features import ModelWithFeatures
from toolkit.run_directory import LABEL_SEPARATOR
from toolkit.training.evaluation import to_device
from toolkit.training.trained_model import TrainedModel


def collect(
    arguments: Sequence[str], read_stdin: Callable[[], bytes], log: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Expand command-line arguments to image paths, in order.

    An argument is an image, a folder (every image below it, sorted), ``@LIST`` (a text file with one image or folder
    per line) or ``-`` (the same from standard input). ``log`` receives a message about files skipped in a folder.
    Raises UserError if there are no images.
    """
    found: list[str] = []
    for argument in arguments:
        lines = [argument]
        if argument == "-":
            lines = _lines(read_stdin(), "standard input")
        elif argument.startswith("@") and not os.path.lexists(argument):
            try:
                lines = _lines(Path(argument[1:]).read_bytes(), argument[1:])
            except OSError as error:
                raise UserError(f"the list {argument[1:]} cannot be read: {error.strerror}") from None
        found += [path for line in lines for path in images_at(line, log)]
    if not found:
        raise UserError("no images given: specify images, folders, @LIST (one path per line), or - for standard input")
    return found


def _lines(content: bytes, source: str) -> list[str]:
    """Split a list into paths, one per line; empty lines are ignored."""
    if b"\0" in content:
        raise UserError(f"{source} is not a text file with one path per line")
    return [os.fsdecode(line.rstrip(b"\r")) for line in content.split(b"\n") if line.strip()]


def images_at(path: str, log: Callable[[str], None]) -> list[str]:
    """Return a folder's images at any depth, sorted, without hidden files and folders; any other path unchanged."""
    if not os.path.isdir(path):
        return [path]
    walk = FolderWalk(path)
    found = [os.path.join(path, name) for name in walk.images("", "")]
    for note in walk.notes():
        log(f"{path}: {note}")
    if not found:
        raise UserError(f"{path} holds no image {FORMATS}")
    return found


# -- prediction -------------------------------------------------------------------------------------------------------


class ImagesToPredict(Protocol):
    """A numbered collection of images, such as :class:`toolkit.data.image_sources.EncodedImages`."""

    def __len__(self) -> int: ...

    def load(self, i: int) -> Pixels:
        """Return image i, decoded. Raises UnreadableImageError."""
        ...

    def name(self, i: int) -> str:
        """Return the name of image i for output files."""
        ...


class FailedFile(NamedTuple):
    """An image that could not be predicted."""

    position: int
    """Index of the image."""
    reason: str


@dataclass(frozen=True)
class Predictions:
    """The most probable classes of each image, in the order of the paths, the same on every process."""

    paths: list[str]
    """Paths encoded by :func:`toolkit.filenames.encode_name`, as in all output files."""
    classes: list[str]
    ranking: npt.NDArray[np.int64]
    """Class indices by decreasing probability, [N, k]."""
    probabilities: npt.NDArray[np.float64]
    """Probabilities of the classes in ``ranking``, [N, k]."""
    failed: list[FailedFile]
    thresholds: npt.NDArray[np.float64] | None = None
    """Minimum probability for a class to be listed, [K]; None: all classes in ``ranking`` are listed."""
    features: npt.NDArray[np.float32] | None = None
    """Inputs of the last layer, [N, D], if requested; 0 for images that could not be predicted."""

    @property
    def readable(self) -> npt.NDArray[np.int64]:
        """Positions of the images that could be predicted, in order."""
        return np.setdiff1d(np.arange(len(self.paths)), [file.position for file in self.failed])

    def rows(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yield, for each readable image, its path and (class, probability to six digits) by decreasing probability."""
        failed = {file.position for file in self.failed}
        for position, path in enumerate(self.paths):
            if position not in failed:
                yield path, [(self.classes[i], f"{np.float32(p):.6g}") for i, p in self.ranked(position)]

    def ranked(self, position: int) -> list[tuple[int, float]]:
        """Return the classes listed for an image, as (class index, probability), by decreasing probability."""
        pairs = zip(self.ranking[position].tolist(), self.probabilities[position].tolist(), strict=True)
        return [(i, p) for i, p in pairs if self.thresholds is None or p >= self.thresholds[i]]

    def text(self, style: str) -> str:
        """Format all rows as ``csv``, ``json`` (one array) or ``jsonl`` (one object per line)."""
        if style == "csv":
            return self._csv()
        objects = [
            {"path": path, "predictions": [{"class": name, "probability": float(p)} for name, p in pairs]}
            for path, pairs in self.rows()
        ]
        if style == "json":
            return json.dumps(objects, indent=1) + "\n"
        return "".join(json.dumps(each) + "\n" for each in objects)

    def _csv(self) -> str:
        """Format as CSV: columns path, prediction, probability, then prediction_2, probability_2, ...

        With thresholds the columns are path, predictions and probabilities, the latter two separated by semicolons.
        """
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        if self.thresholds is not None:
            writer.writerow(["path", "predictions", "probabilities"])
            for path, pairs in self.rows():
                writer.writerow([path, *(LABEL_SEPARATOR.join(pair[i] for pair in pairs) for i in (0, 1))])
            return out.getvalue()
        suffixes = ["", *(f"_{rank}" for rank in range(2, self.ranking.shape[1] + 1))]
        writer.writerow(["path", *(name + suffix for suffix in suffixes for name in ("prediction", "probability"))])
        writer.writerows([path, *(cell for pair in pairs for cell in pair)] for path, pairs in self.rows())
        return out.getvalue()


class _Inputs(NamedTuple):
    """A batch of inputs from a data loader worker."""

    positions: list[int]
    images: Tensor | None
    failed: list[FailedFile]


class _InputDataset(Dataset[Any]):
    """Data set of preprocessed images; a list of positions returns :class:`_Inputs`."""

    def __init__(self, images: ImagesToPredict, transform: ImageTransform) -> None:
        self.images, self.transform = images, transform

    def __getitems__(self, positions: list[int]) -> _Inputs:
        """Return a batch; images that cannot be read or transformed are returned as failures."""
        with preserved_random_states():
            found = {position: self._input(position) for position in positions}
        inputs = {position: image for position, image in found.items() if isinstance(image, Tensor)}
        failed = [FailedFile(position, text) for position, text in found.items() if isinstance(text, str)]
        return _Inputs([*inputs], torch.stack([*inputs.values()]) if inputs else None, failed)

    def _input(self, position: int) -> Tensor | str:
        """Return the input [C, H, W], or the reason for a failure."""
        try:
            image = self.images.load(position)
        except UnreadableImageError as error:
            return error.reason
        torch.default_generator.manual_seed(hash64(position))  # for test transforms that use random numbers
        try:
            return self.transform(image)
        except UserError as error:
            return str(error)
        except Exception as error:  # transforms may raise exceptions of any type
            return f"the transforms failed: {error}"


@torch.inference_mode()
def predict(
    trained: TrainedModel,
    images: ImagesToPredict,
    device: torch.device,
    *,
    top_k: int | None,
    batch_size: int,
    workers: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    with_features: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> Predictions:
    """Predict each image on one of the processes, and gather the results. Collective.

    ``top_k``: number of most probable classes per image; None: the most probable class, or for a multi-label model
    all labels whose probability is at least their threshold.
    ``batch_size`` is per process. The images are divided into batches, which are then distributed, so that the results
    do not depend on the number of processes. ``workers``: number of data loader workers; None: the available CPUs minus
    one. A single batch is loaded without workers. ``with_features``: also return the inputs of the last layer.
    ``advance`` is called with the number of images of each batch of this process.
    """
    module = trained.module.to(device)
    if channels_last:
        module.to(memory_format=torch.channels_last)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    count, thresholds = len(images), trained.task.decision_thresholds if top_k is None else None
    top_k = len(trained.classes) if thresholds is not None else min(top_k or 1, len(trained.classes))
    batches = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)][rank::world]
    if workers is None:
        workers = min(available_cpus(local_processes()) - 1, MAX_WORKERS)
    workers = min(workers, len(batches)) if len(batches) > 1 else 0
    loader: DataLoader[Any] = DataLoader(
        _InputDataset(images, trained.transform),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=_leave_interrupts_to_parent if workers else None,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    model = ModelWithFeatures(module, trained.heads[0]) if with_features else None
    width = model.width(trained.preprocessing.channels, trained.preprocessing.image_size) if model else 0
    found = torch.zeros(count, 2, top_k, dtype=torch.float64)  # probabilities and class indices
    features = torch.zeros(count, width)
    failed = list[FailedFile]()
    for positions, batch, bad in loader:
        failed += bad
        if batch is not None:
            inputs = to_device(batch, device, channels_last)
            with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                logits = module(inputs) if model is None else model(inputs)
            if model is not None:
                features[positions] = model.features.float().cpu()
            probabilities, classes = trained.task.probabilities(logits.float()).topk(top_k, 1)
            found[positions] = torch.stack([probabilities.double(), classes.double()], 1).cpu()
        advance(len(positions) + len(bad))
    found, features, failed = _summed(found, device), _summed(features, device), _gathered(failed)
    probabilities, classes = found.unbind(1)
    names = [images.name(i) for i in range(count)]
    ranking = classes.numpy().astype(np.int64)
    kept = features.numpy() if with_features else None
    return Predictions(names, trained.classes, ranking, probabilities.numpy(), failed, thresholds, kept)


def _identity(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _summed(rows: Tensor, device: torch.device) -> Tensor:
    """Combine the rows of all processes; in each process, the rows of the others must be 0. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    shared = rows.to(device) if dist.get_backend() == "nccl" else rows
    dist.all_reduce(shared)
    return shared.cpu()


def _gathered(failed: list[FailedFile]) -> list[FailedFile]:
    """Combine the failures of all processes, in order. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return failed
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, failed)
    return sorted(file for process in gathered for file in process)
