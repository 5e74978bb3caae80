"""Prediction with a run's best model, which is built from its folder alone: without data, recipe file or network."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from toolkit.augment.transforms import ImageTransform, build_transform, random_states_kept
from toolkit.data.folder_walk import FORMATS, FolderWalk
from toolkit.data.image_sources import ImageFiles, UnreadableImageError
from toolkit.data.preprocessing import Preprocessing
from toolkit.data.sampling import hash64
from toolkit.errors import UserError
from toolkit.filenames import encode_name
from toolkit.models.build import build_model
from toolkit.reading import DamagedFile, Shape, check_shape, read_json
from toolkit.recipe.earlier_versions import update_model
from toolkit.recipe.schema import AugmentConfig, ModelConfig, TransformConfig
from toolkit.runs import Run
from toolkit.training.checkpoint import finished_fault, load_weights
from toolkit.training.evaluation import to_device

FORMAT = 1
"""Version of model.json."""

WEIGHTS = ("best.safetensors", "model.safetensors")
"""Names of the weights file in a run and in a folder written by `toolkit export`."""


class _Preprocessing(Shape):
    """Schema of ``preprocessing`` in model.json."""

    channels: Literal[1, 3]
    image_size: int = Field(ge=1, le=10_000)
    resize: int | list[int] | None
    crop: bool
    interpolation: Literal["nearest", "bilinear", "bicubic"]
    mean: list[float]
    std: list[float]


class _Card(Shape):
    """Schema of model.json."""

    recipe: str
    model: dict[str, Any]
    classes: list[str] = Field(min_length=1)
    preprocessing: _Preprocessing
    transforms: list[dict[str, Any]] = Field([])


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with its preprocessing and classes."""

    module: nn.Module
    """float32 [n, C, H, W] -> logits [n, K]."""
    preprocessing: Preprocessing
    transforms: tuple[TransformConfig, ...]
    """The recipe's own transforms of test images, in addition to the preprocessing ([augment] test)."""
    classes: list[str]
    table: ModelConfig
    recipe: str
    """Name of the recipe that trained it."""
    weights: Path
    """File of the weights."""

    @property
    def transform(self) -> ImageTransform:
        """Transform from a decoded image to a model input, as for the run's test images."""
        return build_transform("test", AugmentConfig(test=list(self.transforms)), self.preprocessing)

    def files(self, paths: Sequence[str]) -> ImageFiles:
        """Return a reader that decodes image files as the run did; ``load(i)`` returns input of :attr:`transform`."""
        wanted = self.preprocessing
        return ImageFiles(Path(), paths, wanted.channels, exif=wanted.exif, value_range=wanted.value_range)

    @property
    def caution(self) -> str | None:
        """Warning to show to the user, if any."""
        if self.weights.name in WEIGHTS:
            return None
        return f"the run has not finished: {self.weights.name} holds the best epoch so far"


def model_card(
    table: ModelConfig,
    classes: list[str],
    preprocessing: Preprocessing,
    transforms: Sequence[TransformConfig],
    recipe_name: str,
    version: str,
) -> dict[str, Any]:
    """Return the content of model.json, stored next to best.safetensors."""
    return {
        "format": FORMAT,
        "toolkit_version": version,
        "recipe": recipe_name,
        "model": table.model_dump(mode="json"),
        "classes": classes,
        "preprocessing": preprocessing.to_dict(),
        "transforms": [entry.model_dump(mode="json", exclude_none=True) for entry in transforms],
    }


def load_model(path: str | os.PathLike[str]) -> TrainedModel:
    """Load the model of a run directory, a run's ``checkpoints``, or any folder with model.json and weights.

    Raises UserError if a file is missing or damaged, or if the two do not belong together.
    """
    folder = _model_folder(Path(path))
    weights = _weights_in(folder)
    card = read_json(folder / "model.json")
    if card.get("format") != FORMAT:
        raise UserError(f"{folder / 'model.json'} was written by another version of this toolkit")
    check_shape(folder / "model.json", card, _Card)
    try:
        preprocessing = Preprocessing.from_dict(card["preprocessing"])
        if not len(preprocessing.mean) == len(preprocessing.std) == preprocessing.channels or 0 in preprocessing.std:
            raise ValueError("preprocessing.mean and preprocessing.std do not fit the channels")
        update_model(card["model"])
        table, classes = ModelConfig.model_validate(card["model"]), list(card["classes"])
        transforms = tuple(TransformConfig.model_validate(entry) for entry in card.get("transforms", []))
        recipe = str(card["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(folder / "model.json", error) from None
    size = preprocessing.image_size
    try:
        with torch.inference_mode(False):  # building a model uses autograd, and the caller may be in inference mode
            built = build_model(table, len(classes), preprocessing.channels, size, load_weights=False)
        built.module.load_state_dict(_versioned(built.module, load_weights(weights)))
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{weights} does not belong to {folder / 'model.json'}: {error}") from None
    _check_finished(folder, weights, classes)
    return TrainedModel(built.module.eval(), preprocessing, transforms, classes, table, recipe, weights)


def _check_finished(folder: Path, weights: Path, classes: list[str]) -> None:
    """Raise UserError if a finished run's weights or classes are intact but belong to another run."""
    run = Run(folder.parent)
    if weights.name != WEIGHTS[0] or not run.is_finished:
        return
    with contextlib.suppress(DamagedFile):  # prediction works without the summary
        epoch = run.summary["best"]["epoch"]
        if fault := finished_fault(folder, epoch, classes):
            raise UserError(f"{folder}: {fault}: it was edited, or belongs to another run. Restore the run's own file")


def _versioned(module: nn.Module, state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Add the layers' version metadata to a state dict: safetensors drops it, and MNASNet requires it."""
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    return versioned


def _model_folder(path: Path) -> Path:
    """Return the folder that holds model.json."""
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; name a run directory, or a folder that toolkit export wrote")
    if (path / "recipe.toml").is_file() and not (path / "model.json").is_file():
        return path / "checkpoints"
    if not (path / "model.json").is_file() and path.name != "checkpoints":
        raise UserError(
            f"{path} holds no model: neither recipe.toml (a run directory) nor model.json (what toolkit export "
            "--format safetensors writes)"
        )
    return path


def _weights_in(folder: Path) -> Path:
    """Return the file of the best weights: the final ones, or those of the best epoch so far."""
    whole = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    found = whole or sorted(folder.glob("best-*.safetensors"), reverse=True)
    if not found:
        raise UserError(f"{folder / WEIGHTS[0]} is missing: the run has not finished an epoch yet, so it has no model")
    return found[0]


# -- images -----------------------------------------------------------------------------------------------------------


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
