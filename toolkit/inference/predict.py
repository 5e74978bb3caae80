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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from toolkit.augment.transforms import ImageTransform, random_states_kept
from toolkit.data.folder_walk import FORMATS, FolderWalk
from toolkit.data.image_sources import ImageFiles, UnreadableImageError
from toolkit.data.sampling import hash64
from toolkit.errors import UserError
from toolkit.filenames import encode_name
from toolkit.training.evaluation import to_device
from toolkit.training.trained_model import TrainedModel


def collect(
    arguments: Sequence[str], read_stdin: Callable[[], bytes], log: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Return the paths of the images that the arguments name, in order.

    An argument is an image, a folder (every image below it, sorted), ``@LIST`` (a text file with one image or folder
    per line) or ``-`` (the same from standard input). ``log`` receives a message about files skipped in a folder.
    Raises UserError if no image is named.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == "-":
            lines = _lines(read_stdin(), "standard input")
        elif argument.startswith("@") and not os.path.lexists(argument):
            lines = _lines(_read_list(argument[1:]), argument[1:])
        else:
            lines = [argument]
        found += [path for line in lines for path in _expand(line, log)]
    if not found:
        raise UserError("no image is named: give images, folders, @LIST (one per line), or - for standard input")
    return found


def _read_list(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"the list {path} cannot be read: {error.strerror}") from None


def _lines(content: bytes, source: str) -> list[str]:
    """Split a list into paths, one per line; empty lines are ignored."""
    if b"\0" in content:
        raise UserError(f"{source} is not a text file with one path per line")
    return [os.fsdecode(line.rstrip(b"\r")) for line in content.split(b"\n") if line.strip()]


def _expand(path: str, log: Callable[[str], None]) -> list[str]:
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


class FailedFile(NamedTuple):
    """A file that could not be predicted."""

    position: int
    """Index in the list of paths."""
    reason: str


@dataclass(frozen=True)
class Predictions:
    """The most probable classes of each image, in the order of the paths, the same on every process."""

    paths: list[str]
    """Encoded by :func:`toolkit.filenames.encode_name`, as in all files."""
    classes: list[str]
    ranking: npt.NDArray[np.int64]
    """Class indices by decreasing probability, [N, k]."""
    probabilities: npt.NDArray[np.float64]
    """Their probabilities, [N, k]."""
    faults: list[FailedFile]

    def rows(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yield, for each readable image, its path and (class, probability to six digits) by decreasing probability."""
        bad = {fault.position for fault in self.faults}
        for position, path in enumerate(self.paths):
            if position not in bad:
                pairs = zip(self.ranking[position], self.probabilities[position], strict=True)
                yield path, [(self.classes[int(index)], f"{np.float32(p):.6g}") for index, p in pairs]

    def text(self, style: str) -> str:
        """Format all rows as ``csv``, ``json`` (one array) or ``jsonl`` (one object per line)."""
        return {"csv": self._csv, "json": self._json, "jsonl": self._jsonl}[style]()

    def _csv(self) -> str:
        """Format as CSV: columns path, prediction, probability, then prediction_2, probability_2, ..."""
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        suffixes = ["", *(f"_{place}" for place in range(2, self.ranking.shape[1] + 1))]
        writer.writerow(["path", *(name + suffix for suffix in suffixes for name in ("prediction", "probability"))])
        writer.writerows([path, *(cell for pair in pairs for cell in pair)] for path, pairs in self.rows())
        return out.getvalue()

    def _json(self) -> str:
        return json.dumps(list(self._objects()), indent=1) + "\n"

    def _jsonl(self) -> str:
        return "".join(json.dumps(each) + "\n" for each in self._objects())

    def _objects(self) -> Iterator[dict[str, Any]]:
        for path, pairs in self.rows():
            yield {"path": path, "predictions": [{"class": name, "probability": float(p)} for name, p in pairs]}


class _Inputs(NamedTuple):
    """A batch as returned by a worker."""

    positions: list[int]
    images: Tensor | None
    faults: list[FailedFile]


class _Files(Dataset[Any]):
    """Data set of preprocessed image files; a list of positions returns :class:`_Inputs`."""

    def __init__(self, images: ImageFiles, transform: ImageTransform) -> None:
        self.images, self.transform = images, transform

    def __getitems__(self, positions: list[int]) -> _Inputs:
        """Return a batch; images that cannot be read or transformed are returned as failures."""
        inputs, good, faults = [], [], []
        with random_states_kept():
            for position in positions:
                outcome = self._input(position)
                if isinstance(outcome, Tensor):
                    good.append(position)
                    inputs.append(outcome)
                else:
                    faults.append(FailedFile(position, outcome))
        return _Inputs(good, torch.stack(inputs) if inputs else None, faults)

    def _input(self, position: int) -> Tensor | str:
        """Return the input [C, H, W], or the reason why there is none."""
        try:
            image = self.images.load(position)
        except UnreadableImageError as error:
            return error.reason
        torch.default_generator.manual_seed(hash64(position))  # for test transforms that draw random numbers
        try:
            return self.transform(image)
        except UserError as error:
            return str(error)
        except Exception as error:  # transforms may raise exceptions of any type
            return f"the transforms failed: {error}"


@torch.inference_mode()
def predict(
    trained: TrainedModel,
    paths: Sequence[str],
    device: torch.device,
    *,
    top_k: int,
    batch_size: int,
    workers: int,
    world: int = 1,
    rank: int = 0,
    autocast_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> Predictions:
    """Predict each image once on one of ``world`` processes, and gather the results. Collective.

    ``batch_size`` is per process. The paths are divided into batches before these are distributed, so that the results
    do not depend on the number of processes. ``advance`` is called with the number of images of each batch of this
    process.
    """
    module = trained.module.to(device)
    if channels_last:
        module.to(memory_format=torch.channels_last)
    count, top_k = len(paths), min(top_k, len(trained.classes))
    batches = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)][rank::world]
    table, faults = torch.zeros(count, 2 * top_k, dtype=torch.float64), list[FailedFile]()
    for positions, images, bad in _loader(trained, paths, batches, workers):
        faults += bad
        if images is not None:
            inputs = to_device(images, device, channels_last)
            with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                logits = module(inputs)
            probabilities, classes = logits.float().softmax(1).topk(top_k, 1)
            table[positions] = torch.cat([classes.double(), probabilities.double()], 1).cpu()
        advance(len(positions) + len(bad))
    table, faults = _joined(table, faults, device)
    ranking, probabilities = table.numpy()[:, :top_k].astype(np.int64), table.numpy()[:, top_k:]
    return Predictions([encode_name(path) for path in paths], trained.classes, ranking, probabilities, faults)


def _loader(
    trained: TrainedModel, paths: Sequence[str], batches: list[list[int]], workers: int
) -> DataLoader[Any] | Iterator[_Inputs]:
    files = _Files(trained.files(paths), trained.transform)
    workers = min(workers, len(batches))
    return DataLoader(
        files,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_leave_interrupts_to_parent if workers else None,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def _as_is(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _joined(table: Tensor, faults: list[FailedFile], device: torch.device) -> tuple[Tensor, list[FailedFile]]:
    """Combine the rows and faults of all processes; rows of other processes must be 0 in ``table``. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return table, faults
    shared = table.to(device) if dist.get_backend() == "nccl" else table
    dist.all_reduce(shared)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, faults)
    return shared.cpu(), sorted(fault for share in gathered for fault in share)
