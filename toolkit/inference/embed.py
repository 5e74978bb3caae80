"""Features of images, and their nearest neighbors by cosine similarity."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from toolkit.data.datasets import Dataset
from toolkit.data.image_sources import Pixels
from toolkit.data.sampling import IntArray
from toolkit.data.table_files import require_pyarrow
from toolkit.errors import UserError
from toolkit.inference.predict import ImagesToPredict, Predictions
from toolkit.run_directory import LABEL_SEPARATOR
from toolkit.writing import write_atomically

SUFFIXES = (".parquet", ".npy")
"""Suffixes of files of features."""
CHUNK = 2**24
"""Maximum number of similarities computed at once; 64 MB."""


class DatasetImages:
    """Selected images of a data set, numbered from 0."""

    def __init__(self, dataset: Dataset, indices: IntArray) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, i: int) -> Pixels:
        """Return image i, decoded. Raises UnreadableImageError."""
        return self.dataset.images.load(int(self.indices[i]))

    def name(self, i: int) -> str:
        """Return the name of image i in the data set."""
        return self.dataset.images.name(int(self.indices[i]))

    def label(self, i: int) -> str:
        """Return the class of image i; several labels are separated by semicolons."""
        labels = self.dataset.labels_of(int(self.indices[i]))
        return LABEL_SEPARATOR.join(self.dataset.classes[k] for k in labels)


@dataclass(frozen=True)
class Embeddings:
    """Features of the readable images, in order."""

    paths: list[str]
    """Names of the images, [N]."""
    predictions: list[str]
    """Predicted class of each image, [N]; of a multi-label model the predicted labels, separated by semicolons."""
    labels: list[str] | None
    """Labels of each image, [N]; None if they are unknown."""
    features: npt.NDArray[np.float32]
    """Inputs of the model's last layer, [N, D]."""

    @classmethod
    def of(cls, found: Predictions, images: ImagesToPredict) -> Embeddings:
        """Take the features and the predicted classes from predictions that have features."""
        assert found.features is not None
        rows = found.readable.tolist()
        predictions = [LABEL_SEPARATOR.join(found.classes[k] for k, _ in found.ranked(i)) for i in rows]
        labels = [images.label(i) for i in rows] if isinstance(images, DatasetImages) else None
        return cls([found.paths[i] for i in rows], predictions, labels, found.features[rows])


def check_file(path: Path) -> None:
    """Raise UserError if features cannot be written to ``path``: wrong suffix, or pyarrow is missing."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"-o {path}: expected a file name that ends in {' or '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        require_pyarrow(path)


def write_features(found: Embeddings, path: Path) -> list[Path]:
    """Write features to a Parquet file, or to an .npy file next to a .txt file of paths; return the files.

    The Parquet file has the columns path, prediction, label (if known) and features, a list of D float32 numbers. The
    array in the .npy file is float32 [N, D]; each line of the text file is the path of a row.
    """
    try:
        if path.suffix == ".parquet":
            write_atomically(path, _parquet(found, path))
            return [path]
        array = io.BytesIO()
        np.save(array, found.features)
        names = path.with_suffix(".txt")
        write_atomically(path, array.getvalue())
        write_atomically(names, "".join(f"{name}\n" for name in found.paths).encode())
        return [path, names]
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _parquet(found: Embeddings, path: Path) -> bytes:
    pa, parquet = require_pyarrow(path)
    values = pa.array(found.features.reshape(-1))
    columns: dict[str, Any] = {"path": found.paths, "prediction": found.predictions}
    columns |= {} if found.labels is None else {"label": found.labels}
    columns["features"] = pa.FixedSizeListArray.from_arrays(values, found.features.shape[1])
    out = io.BytesIO()
    parquet.write_table(pa.table(columns), out)
    return out.getvalue()


class Neighbor(NamedTuple):
    """One of the nearest neighbors of an image."""

    path: str
    rank: int
    """1 for the nearest one."""
    neighbor: str
    """Name of the neighbor."""
    neighbor_class: str
    """Label of the neighbor or, if it is unknown, its prediction."""
    similarity: float
    """Cosine similarity of the features, -1..1."""


def neighbors(queries: Embeddings, among: Embeddings, count: int) -> list[Neighbor]:
    """Return the ``count`` nearest neighbors of each query, nearest first; an image with the same name is left out."""
    names = {name: i for i, name in enumerate(among.paths)}
    own = torch.tensor([names.get(name, -1) for name in queries.paths])
    similarities, indices = nearest(torch.from_numpy(queries.features), torch.from_numpy(among.features), count, own)
    labels = among.labels or among.predictions
    found = []
    for path, values, row in zip(queries.paths, similarities.tolist(), indices.tolist(), strict=True):
        pairs = [(value, i) for value, i in zip(values, row, strict=True) if value > -torch.inf]
        found += [Neighbor(path, rank, among.paths[i], labels[i], value) for rank, (value, i) in enumerate(pairs, 1)]
    return found


def nearest(queries: Tensor, among: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return cosine similarities and indices of the nearest rows of ``among``, both [M, k], nearest first.

    ``queries``: [M, D]; ``among``: [N, D]; k is the smaller of ``count`` and N. ``own``: index of the row that is the
    query itself, or -1, [M]; its similarity is -inf. The similarity to a vector of zeros is 0.
    """
    queries, among = F.normalize(queries, dim=1), F.normalize(among, dim=1)
    values, indices = [], []
    for rows in torch.arange(len(queries)).split(max(1, CHUNK // max(1, len(among)))):
        similarities = queries[rows] @ among.T
        if own is not None:
            has_own = own[rows] >= 0
            similarities[has_own.nonzero()[:, 0], own[rows][has_own]] = -torch.inf
        best = similarities.topk(min(count, len(among)), 1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), torch.cat(indices)
