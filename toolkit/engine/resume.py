"""Before a run is resumed: its recipe and its data are compared with those that its checkpoint was trained with.

A recipe edited inside the run directory, a checkpoint of another run, and data that changed in between are refused with
their differences. ``--allow-changes`` accepts them; images that were trained then stay out of validation and test.

What of the data is compared: the names and classes of the images of each split, and for image files their size and time
of change. Where every file has another time of change the data were copied: then sizes are compared, and the content of
up to 32 files. A file replaced by one of the same size in such a copy is not seen unless it is one of the 32.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tomllib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from toolkit.data.datasets import Dataset
from toolkit.data.images import SAMPLED, FileImages
from toolkit.data.order import Indices
from toolkit.data.splits import SPLITS, check_splits, split_hash
from toolkit.engine.checkpoint import BestWeightsLost, find_latest, load_checkpoint
from toolkit.engine.display import Display
from toolkit.engine.process import main_only
from toolkit.errors import UserError
from toolkit.recipe import Recipe, recipe_hash
from toolkit.recipe.resolved import content_hash, experiment_diff, resolved_content
from toolkit.runs import Run, write_atomically

Splits = dict[str, Indices]

SHOWN = 3
"""So many images of each kind of difference are named."""
ADVICE = (
    "Bring back what the run was trained with, or start a new run, or say --allow-changes, which keeps the images that "
    "were trained out of validation and test"
)


@dataclass
class Resumption:
    """A run that is resumed from a checkpoint."""

    run: Run
    recipe: Recipe
    checkpoint: dict[str, Any]
    accelerator: Accelerator
    display: Display
    allow_changes: bool
    recipe_changed: bool = False
    """Whether the recipe is not that of the checkpoint, which was allowed."""
    data_changed: bool = False
    """Whether the images or their splits are not those of the checkpoint, which was allowed."""

    @property
    def changed(self) -> bool:
        """Whether anything changed that the next checkpoint must know of."""
        return self.recipe_changed or self.data_changed or bool(self.checkpoint.get("best_lost"))

    def compare_recipe(self) -> None:
        """Raise UserError where the recipe is not that of the checkpoint, unless this is allowed (a collective)."""
        self.recipe_changed = main_only(self.accelerator, self._compare_recipe)

    def _compare_recipe(self) -> bool:
        stored = self.checkpoint.get("recipe")
        if stored is None:  # written by a version that kept the hash alone
            hashes = {recipe_hash(self.recipe), content_hash(_plain_recipe(self.run))}
            if self.checkpoint["recipe_hash"] in hashes:
                return False
            listed = "only the hash of its recipe was kept, so the differences cannot be named"
        else:
            changes = experiment_diff(_validated(stored), self.recipe)
            if not changes:
                return False
            listed = "; ".join(f"{'.'.join(map(str, key))}: {old!r} -> {new!r}" for key, old, new in changes)
        if not self.allow_changes:
            raise UserError(
                f"the checkpoint of {self.run.path} was written under another recipe ({listed}): recipe.toml was "
                "edited, or the checkpoint is another run's. Undo this, or say --allow-changes"
            )
        self.display.say(f"the recipe has changed since the checkpoint was written ({listed})")
        return True

    def settle(self, dataset: Dataset, drawn: Splits) -> Splits:
        """The splits to go on with (a collective); ``drawn`` are those that the recipe gives with the data of now.

        Raises UserError where data or splits are not those of the checkpoint, unless this is allowed.
        """
        splits, self.data_changed = main_only(self.accelerator, lambda: self._settle(dataset, drawn))
        return splits

    def _settle(self, dataset: Dataset, drawn: Splits) -> tuple[Splits, bool]:
        now, trained = split_hash(dataset, drawn), self.checkpoint["batches"][0]
        record = self._record(trained)
        files = None if record is None else FileFacts.read(self.run, trained, dataset, record)
        replaced = [] if files is None else files.replaced()
        if now == self.checkpoint.get("drawn", trained) and not replaced:
            return (drawn if now == trained else self._recorded(record, dataset, trained)), False
        if record is None:
            raise UserError(
                f"the data or the splits of {self.run.path} have changed since its checkpoint was written, and "
                "split.json, which would say what was trained, is missing or damaged. Start a new run"
            )
        difference = Difference(record, dataset, drawn, self._classes(), files)
        if not self.allow_changes:
            raise UserError(f"the data of {self.run.path} have changed since it was trained: {difference}. {ADVICE}")
        difference.check_outputs()
        before = self._recipe_before()
        same_rules = all(
            getattr(before.data, key) == getattr(self.recipe.data, key)
            for key in ("split", "images_per_class", "test_images_per_class")
        )
        splits = difference.kept_apart(self._ever_trained(), same_rules)
        check_splits(dataset, splits)
        self.display.say(f"the data have changed since the checkpoint was written: {difference}")
        counts = ", ".join(f"{len(splits[name])} {name}" for name in SPLITS)
        self.display.say(f"trained images stay out of validation and test: now {counts}")
        return splits, True

    def _record(self, trained: str) -> dict[str, list[str]] | None:
        """Names of the images of each split as the checkpoint was trained with them; None where they are not known."""
        with contextlib.suppress(UserError):
            for split in self.run.splits():
                names: dict[str, Any] = {name: split.get(name) for name in SPLITS}
                is_whole = all(isinstance(v, list) and all(isinstance(n, str) for n in v) for v in names.values())
                if split.get("hash") == trained and is_whole:
                    return names
        return None

    def _recorded(self, record: dict[str, list[str]] | None, dataset: Dataset, trained: str) -> Splits:
        """The splits of a run whose data changed earlier: those that were settled then, not those drawn now."""
        index = {dataset.images.name(i): i for i in range(len(dataset.images))}
        names = record or {}
        if record is not None and all(name in index for split in SPLITS for name in names[split]):
            splits = {s: np.array([index[name] for name in names[s]], dtype=np.int64) for s in SPLITS}
            if split_hash(dataset, splits) == trained:
                return splits
        raise UserError(f"{self.run.path / 'split.json'} is not the one that the checkpoint was trained with")

    def _ever_trained(self) -> set[str]:
        """Names of all images that were in a training split since the run began."""
        return {name for split in self.run.splits() for name in split["train"]}

    def _classes(self) -> list[str]:
        return list(self.checkpoint.get("classes") or self.run.model_card["classes"])

    def _recipe_before(self) -> Recipe:
        stored = self.checkpoint.get("recipe")
        return self.run.recipe if stored is None else _validated(stored)


def find_resumption(
    run: Run, recipe: Recipe, accelerator: Accelerator, display: Display, allow_changes: bool
) -> Resumption | None:
    """What there is to resume from: the newest whole checkpoint, chosen by the main process; None (a collective).

    Raises UserError where it was written under another recipe, or where the best weights of all checkpoints are lost,
    unless changes are allowed.
    """

    def choose() -> tuple[Path | None, bool]:
        run.remove_temporary_files()
        try:
            return find_latest(run.checkpoints, display.say, with_best=True), False
        except BestWeightsLost as lost:
            if not allow_changes:
                raise UserError(
                    f"{lost}. Bring back the file, or start a new run, or say --allow-changes: then the best epoch is "
                    "chosen among the last one and those to come"
                ) from None
            return lost.path, True

    path, best_lost = main_only(accelerator, choose)
    if path is None:
        return None
    checkpoint = load_checkpoint(path) | {"best_lost": best_lost}
    resumption = Resumption(run, recipe, checkpoint, accelerator, display, allow_changes)
    resumption.compare_recipe()
    return resumption


def stored_recipe(recipe: Recipe) -> str:
    """The resolved recipe as a checkpoint holds it."""
    return json.dumps(resolved_content(recipe))


def _validated(stored: str) -> Recipe:
    """The recipe of a checkpoint, with the defaults of keys that have come since."""
    try:
        return Recipe.model_validate(json.loads(stored))
    except ValueError:
        raise UserError(
            "the checkpoint was written under a recipe that this version of the toolkit does not know: use the version "
            "that began the run, or start a new run"
        ) from None


def _plain_recipe(run: Run) -> dict[str, Any]:
    """recipe.toml as it was written, without the defaults of keys that have come since."""
    with open(run.path / "recipe.toml", "rb") as file:
        return tomllib.load(file)


# -- what changed in the data -----------------------------------------------------------------------------------------


class Difference:
    """How the images and splits of now differ from those of a record; as text, what is named to the user."""

    def __init__(
        self,
        record: dict[str, list[str]],
        dataset: Dataset,
        drawn: Splits,
        classes: list[str],
        files: FileFacts | None,
    ) -> None:
        """``classes`` are those of the record."""
        self.dataset, self.drawn, self.classes = dataset, drawn, classes
        self.replaced = [] if files is None else files.replaced()
        self.before = {name: split for split in SPLITS for name in record[split]}
        self.names = [dataset.images.name(i) for i in range(len(dataset.images))]
        there = set(self.names)
        now = {self.names[i] for split in SPLITS for i in drawn[split]}
        self.removed = [name for name in self.before if name not in there]
        self.added = sorted(now - set(self.before))
        self.left_out = [name for name in self.before if name in there and name not in now]
        self.moved = _moved(self.removed, self.added, files)
        """Images that may have had another name before, with their possible earlier names."""

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
            _listed("file(s) replaced", self.replaced),
        ]
        return "; ".join(part for part in parts if part) or "the same images are split otherwise"

    def check_outputs(self) -> None:
        """Raise UserError where an output of the trained model would come to mean another class."""
        then, now = self.classes, self.dataset.classes
        if len(then) != len(now) or any(then.index(c) != i for i, c in enumerate(now) if c in then):
            raise UserError(
                f"the model's {len(then)} outputs are the classes in the order of their names, and this order has "
                f"changed: {self}. Start a new run, or give classes names that sort as before"
            )

    def kept_apart(self, trained: set[str], same_rules: bool) -> Splits:
        """The drawn splits, but for images that were trained: these are in no split but train.

        ``same_rules``: the recipe splits as before, so that all other images that were there stay in their split too.
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


def _moved(removed: list[str], added: list[str], files: FileFacts | None) -> dict[str, list[str]]:
    """For each added image those removed that may be the same: equal in file name and size, or in size and time."""
    by_file, by_facts = defaultdict(list), defaultdict(list)
    for name in removed:
        by_file[os.path.basename(name)].append(name)
        if files is not None:
            by_facts[files.then(name)].append(name)
    found = {}
    for name in added:
        same_file = by_file.get(os.path.basename(name), [])
        if files is not None:
            size, time = files.now(name)
            same_file = [old for old in same_file if files.then(old)[0] == size] + by_facts.get((size, time), [])
        if same_file:
            found[name] = list(dict.fromkeys(same_file))
    return found


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"


# -- size and time of change of image files ---------------------------------------------------------------------------


def write_file_facts(run: Run, dataset: Dataset, splits: Splits) -> None:
    """Keep size and time of change of every image file of the splits, and SHA-256 of some, for a later resumption."""
    if not isinstance(dataset.images, FileImages):
        return
    indices = np.concatenate([splits[name] for name in SPLITS])
    sample = _digests(dataset.images, indices[_sampled(len(indices))])
    data = safetensors.numpy.save(
        {"files": _stat(dataset.images, indices), "sample": sample}, metadata={"split": split_hash(dataset, splits)}
    )
    write_atomically(run.file_facts, data)


class FileFacts:
    """Size and time of change of a record's image files, then and now."""

    def __init__(
        self, names: list[str], images: FileImages, files: npt.NDArray[np.int64], sample: npt.NDArray[np.uint8]
    ) -> None:
        self.names, self.images, self.files, self.sample = names, images, files, sample
        self.rows = {name: row for row, name in enumerate(names)}
        self.index = {images.name(i): i for i in range(len(images))}

    @classmethod
    def read(cls, run: Run, trained: str, dataset: Dataset, record: dict[str, list[str]]) -> FileFacts | None:
        """What was kept of a record's files; None where nothing was, and where images are no files."""
        names = [name for split in SPLITS for name in record[split]]
        try:
            with safe_open(run.file_facts, "numpy") as file:
                files, sample = file.get_tensor("files"), file.get_tensor("sample")
                is_ours = (file.metadata() or {}).get("split") == trained and len(files) == len(names)
        except (OSError, SafetensorError):
            return None
        return cls(names, dataset.images, files, sample) if is_ours and isinstance(dataset.images, FileImages) else None

    def then(self, name: str) -> tuple[int, int]:
        """Size and time of change of a file of the record."""
        size, time = self.files[self.rows[name]].tolist()
        return size, time

    def now(self, name: str) -> tuple[int, int]:
        """Size and time of change of a file of the data set."""
        size, time = _stat(self.images, np.array([self.index[name]]))[0].tolist()
        return size, time

    @functools.cache  # noqa: B019  (one object a resumption)
    def replaced(self) -> list[str]:
        """Names of the files whose content is another one, as far as can be seen without reading them all."""
        places = np.array([self.index.get(name, -1) for name in self.names], dtype=np.int64)
        there = np.flatnonzero(places >= 0)
        other_size, other_time = (self.files[there] != _stat(self.images, places[there])).T
        if not other_time.all():
            return [self.names[row] for row in there[other_size | other_time]]
        rows = _sampled(len(self.names))
        is_there = places[rows] >= 0
        digests = _digests(self.images, places[rows[is_there]])
        other_content = rows[is_there][(digests != self.sample[is_there]).any(1)]
        return [self.names[row] for row in sorted({*there[other_size].tolist(), *other_content.tolist()})]


def _stat(images: FileImages, indices: Indices) -> npt.NDArray[np.int64]:
    """Size in bytes and time of change in nanoseconds of these files, int64 [n, 2]; -1 for one that is gone."""

    def look(i: int) -> tuple[int, int]:
        try:
            state = os.stat(images.path(i))
        except OSError:
            return -1, -1
        return state.st_size, state.st_mtime_ns

    found = np.empty((len(indices), 2), dtype=np.int64)
    with ThreadPoolExecutor(8) as pool:  # a network file system answers several at once
        for start in range(0, len(indices), 1024):
            chunk = indices[start : start + 1024].tolist()
            found[start : start + len(chunk)] = list(pool.map(look, chunk))
    return found


def _sampled(count: int) -> Indices:
    """Places of up to 32 of so many files, evenly spread."""
    return np.linspace(0, count - 1, min(SAMPLED, count), dtype=np.int64)


def _digests(images: FileImages, indices: Indices) -> npt.NDArray[np.uint8]:
    """SHA-256 of these files, uint8 [k, 32]; zeros for one that cannot be read."""
    digests = np.zeros((len(indices), 32), dtype=np.uint8)
    for row, i in enumerate(indices.tolist()):
        with contextlib.suppress(OSError):
            content = Path(images.path(i)).read_bytes()
            digests[row] = np.frombuffer(hashlib.sha256(content).digest(), dtype=np.uint8)
    return digests
