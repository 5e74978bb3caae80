"""Detect changes in a run's data since its checkpoint was written; keep images trained on out of evaluation.

The names and classes of each split's images are compared, and the sizes and modification times of image files. If the
modification times of all files differ, the data were copied: then sizes are compared, and the content of up to 32
files. In such a copy, a file replaced by one of the same size is detected only if it is one of the 32. Images that are
not files have a digest instead of a modification time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from toolkit.data.datasets import Dataset
from toolkit.data.encoded_sources import EncodedSource, read_bytes
from toolkit.data.image_sources import SAMPLED, EncodedImages
from toolkit.data.sampling import IntArray
from toolkit.data.splits import SPLITS, split_hash
from toolkit.errors import UserError
from toolkit.reading import require_file
from toolkit.runs import Run
from toolkit.writing import write_atomically

Splits = dict[str, IntArray]

SHOWN = 3
"""Maximum number of images named for each kind of difference."""
CHUNK = 1024
"""Number of files whose size and time a thread reads at a time."""


class DataDifference:
    """Differences of the current images and splits from the recorded ones; ``str()`` describes them for messages."""

    def __init__(
        self,
        record: dict[str, list[str]],
        dataset: Dataset,
        drawn: Splits,
        classes: list[str],
        files: FileFacts | None,
    ) -> None:
        """``record``: recorded image names of each split. ``drawn``: current splits. ``classes``: recorded classes."""
        self.dataset, self.drawn, self.classes = dataset, drawn, classes
        self.replaced = [] if files is None else files.replaced()
        self.before = {name: split for split in SPLITS for name in record[split]}
        self.names = [dataset.images.name(i) for i in range(len(dataset.images))]
        there = set(self.names)
        now = {self.names[i] for split in SPLITS for i in drawn[split]}
        self.removed = [name for name in self.before if name not in there]
        self.added = sorted(now - set(self.before))
        self.left_out = [name for name in self.before if name in there and name not in now]
        self.moved = _moved([*self.removed, *self.replaced], [*self.added, *self.replaced], files)
        """Images that may have been renamed, with their possible earlier names."""

    def __str__(self) -> str:
        gone, new = ([c for c in one if c not in other] for one, other in (
            (self.classes, self.dataset.classes), (self.dataset.classes, self.classes)))  # fmt: skip
        moved_from = {old for olds in self.moved.values() for old in olds}
        parts = [
            _listed("class(es) gone", gone),
            _listed("new class(es)", new),
            _listed("image(s) moved", [f"{olds[0]} -> {name}" for name, olds in self.moved.items()]),
            _listed("image(s) removed", [name for name in self.removed if name not in moved_from]),
            _listed("image(s) added", [name for name in self.added if name not in self.moved]),
            _listed("image(s) left out", self.left_out),
            _listed("file(s) replaced", [name for name in self.replaced if name not in self.moved]),
        ]
        return "; ".join(part for part in parts if part) or "the same images are split differently"

    def check_outputs(self) -> None:
        """Raise UserError if, with the current classes, an output of the trained model would refer to another class."""
        then, now = self.classes, self.dataset.classes
        if len(then) != len(now) or any(then.index(c) != i for i, c in enumerate(now) if c in then):
            raise UserError(
                f"the model's {len(then)} outputs are the classes in the order of their names, and this order has "
                f"changed: {self}. Start a new run, or name the classes so that they sort as before"
            )

    def kept_apart(self, trained: set[str], same_rules: bool) -> Splits:
        """Return the drawn splits with all ``trained`` images moved to train.

        ``same_rules``: whether the recipe's splitting rules are unchanged; then all other known images keep their
        split, too.
        """
        place = np.full(len(self.names), -1)
        for number, split in enumerate(SPLITS):
            place[self.drawn[split]] = number
        for i in np.flatnonzero(place >= 0):
            name = self.names[i]
            earlier = [name, *self.moved.get(name, [])]
            if any(each in trained for each in earlier):
                place[i] = 0
            elif same_rules and (known := [self.before[each] for each in earlier if each in self.before]):
                place[i] = SPLITS.index(known[0])
        return {split: np.flatnonzero(place == number) for number, split in enumerate(SPLITS)}


def _moved(gone: list[str], new: list[str], files: FileFacts | None) -> dict[str, list[str]]:
    """Map new images to missing ones that may be the same: equal file name and size, or equal size and time."""
    by_file, by_facts = defaultdict(list), defaultdict(list)
    for name in gone:
        by_file[os.path.basename(name)].append(name)
        if files is not None:
            by_facts[files.recorded(name)].append(name)
    found = {}
    for name in sorted(new):
        same = by_file.get(os.path.basename(name), [])
        if files is not None:
            size, time = files.current(name)
            same = [old for old in same if files.recorded(old)[0] == size] + by_facts.get((size, time), [])
        if earlier := [old for old in dict.fromkeys(same) if old != name]:
            found[name] = earlier
    return found


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}"


# -- size and modification time of image files ------------------------------------------------------------------------


def write_file_facts(run: Run, dataset: Dataset, splits: Splits) -> None:
    """Store size and modification time of the splits' image files, and the SHA-256 of some, for a later resume."""
    if not isinstance(dataset.images, EncodedImages):
        return
    indices = np.concatenate([splits[name] for name in SPLITS])
    source = dataset.images.source
    sample = _digests(source, indices[_sampled(len(indices))])
    data = safetensors.numpy.save(
        {"files": _stat(source, indices), "sample": sample}, metadata={"split": split_hash(dataset, splits)}
    )
    write_atomically(run.file_facts, data)


class FileFacts:
    """Recorded and current size and modification time of a run's image files."""

    def __init__(
        self, names: list[str], images: EncodedSource, files: npt.NDArray[np.int64], sample: npt.NDArray[np.uint8]
    ) -> None:
        self.names, self.images, self.files, self.sample = names, images, files, sample
        self.rows = {name: row for row, name in enumerate(names)}
        self.index = {images.name(i): i for i in range(len(images))}
        self.is_current = False
        """Whether :meth:`replaced` found all modification times unchanged."""

    @classmethod
    def read(cls, run: Run, trained: str, dataset: Dataset, record: dict[str, list[str]]) -> FileFacts | None:
        """Read what a run stored about its image files; None if it stored nothing, or if images are not files."""
        names = [name for split in SPLITS for name in record[split]]
        try:
            require_file(run.file_facts)
            with safe_open(run.file_facts, "numpy") as file:
                files, sample = file.get_tensor("files"), file.get_tensor("sample")
                is_ours = (file.metadata() or {}).get("split") == trained
        except (OSError, UserError, SafetensorError):
            return None
        fits = files.shape == (len(names), 2) and sample.shape == (len(_sampled(len(names))), 32)
        if not (is_ours and fits and isinstance(dataset.images, EncodedImages)):
            return None
        return cls(names, dataset.images.source, files, sample)

    def recorded(self, name: str) -> tuple[int, int]:
        """Return the recorded size and modification time of a file."""
        size, time = self.files[self.rows[name]].tolist()
        return size, time

    def current(self, name: str) -> tuple[int, int]:
        """Return the current size and modification time of a file."""
        size, time = _stat(self.images, np.array([self.index[name]]))[0].tolist()
        return size, time

    @functools.cache  # noqa: B019  (one object per resume)
    def replaced(self) -> list[str]:
        """Return the names of files whose content changed, as far as is known without reading all of them."""
        indices = np.array([self.index.get(name, -1) for name in self.names], dtype=np.int64)
        there = np.flatnonzero(indices >= 0)
        other_size, other_time = (self.files[there] != _stat(self.images, indices[there])).T
        self.is_current = not other_time.any()
        if not other_time.all():
            return [self.names[row] for row in there[other_size | other_time]]
        rows = _sampled(len(self.names))
        is_there = indices[rows] >= 0
        digests = _digests(self.images, indices[rows[is_there]])
        other_content = rows[is_there][(digests != self.sample[is_there]).any(1)]
        return [self.names[row] for row in sorted({*there[other_size].tolist(), *other_content.tolist()})]


def _stat(images: EncodedSource, indices: IntArray) -> npt.NDArray[np.int64]:
    """Return size in bytes and modification time in nanoseconds of files, int64 [n, 2]; -1 for a missing file."""

    def look(start: int) -> None:
        for row in range(start, min(start + CHUNK, len(indices))):
            with contextlib.suppress(OSError):
                found[row] = images.size_and_version(int(indices[row]))

    found = np.full((len(indices), 2), -1, dtype=np.int64)
    with ThreadPoolExecutor(8) as pool:  # network file systems serve several requests at once
        list(pool.map(look, range(0, len(indices), CHUNK)))
    return found


def _sampled(count: int) -> IntArray:
    """Return the indices of up to 32 of ``count`` files, evenly spread."""
    return np.linspace(0, count - 1, min(SAMPLED, count), dtype=np.int64)


def _digests(images: EncodedSource, indices: IntArray) -> npt.NDArray[np.uint8]:
    """Return the SHA-256 of files, uint8 [k, 32]; zeros for a file that cannot be read."""
    digests = np.zeros((len(indices), 32), dtype=np.uint8)
    for row, i in enumerate(indices.tolist()):
        with contextlib.suppress(Exception):  # a damaged archive can raise errors other than OSError
            digests[row] = np.frombuffer(hashlib.sha256(read_bytes(images, i)).digest(), dtype=np.uint8)
    return digests
