"""Train, validation and test splits, which depend only on the recipe and the data set.

Images are drawn without replacement, splits never overlap, and all keep the order of the data set's own lists.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from toolkit.data.datasets import Dataset
from toolkit.data.sampling import IntArray, keyed_permutation
from toolkit.errors import UserError
from toolkit.recipe.schema import DataConfig, SplitConfig

SPLITS = ("train", "validation", "test")

AUTO_TEST = 0.2
"""Default test fraction if the data set has no official list other than the training list."""

_VALIDATION, _TEST = 1, 2
"""Keys that make the random numbers of the test and the validation split independent of each other."""

Mask = npt.NDArray[np.bool_]


def split_dataset(dataset: Dataset, table: DataConfig) -> dict[str, IntArray]:
    """Return the indices into the data set of each split: "train", "validation", "test", int64.

    The test split is the data set's official test list if there is one, else drawn according to ``split.test`` ("auto"
    draws none from a data set with a validation list). The validation split is then taken from the remaining training
    images according to ``split.method``. With a method other than "official", an official validation list is not used,
    not even for training, because its authors excluded those images from training.

    If ``split.validation`` or ``split.test`` is 0, that split is empty: nothing is drawn and an official list is not
    used.

    Raises UserError if another split, or the training images of a class, would be empty.
    """
    split, lists, labels = table.split, dataset.lists, dataset.labels
    seed = split.seed
    if not isinstance(seed, int):
        raise ValueError('data.split.seed = "recipe.seed" must be resolved first: toolkit.recipe.resolve.with_defaults')
    method = _method(dataset, split)
    train = lists["train"]
    test_share = test_fraction(dataset, split)
    if test_share == 0:
        test = np.array([], dtype=np.int64)
    elif "test" in lists:
        test = lists["test"]
    else:
        method_for_test = "random" if method == "random" else "stratified"
        chosen = _choose(labels[train], method_for_test, test_share, "data.split.test", seed, _TEST)
        train, test = train[~chosen], train[chosen]
    if split.validation == 0:
        validation = np.array([], dtype=np.int64)
    elif method == "official":
        validation = lists["validation"]
    else:
        chosen = _choose(labels[train], method, split.validation, "data.split.validation", seed, _VALIDATION)
        train, validation = train[~chosen], train[chosen]
    splits = {
        "train": _first_of_each_class(train, labels, table.images_per_class),
        "validation": _first_of_each_class(validation, labels, table.images_per_class),
        "test": _first_of_each_class(test, labels, table.test_images_per_class),
    }
    shares = {"train": 1, "validation": split.validation, "test": test_share}
    check_splits(dataset, splits, [name for name in SPLITS if shares[name]])
    return splits


def test_fraction(dataset: Dataset, split: SplitConfig) -> float | int:
    """Resolve "auto" in ``split.test``: 0 for a data set with a validation list but no test list, else 0.2."""
    if split.test != "auto":
        return split.test
    return 0 if "validation" in dataset.lists and "test" not in dataset.lists else AUTO_TEST


def describe_splits(dataset: Dataset, table: DataConfig) -> str:
    """Describe where the images of each split come from, in one line for the log."""
    split, method = table.split, _method(dataset, table.split)
    share = test_fraction(dataset, split)
    if split.validation == 0:
        validation = "none (data.split.validation = 0)"
    elif method == "official":
        validation = "the data set's own list"
    else:
        amount = "every second one" if method == "alternate" else f"{split.validation:g} ({method})"
        unused = "; its own validation list is not used" if "validation" in dataset.lists else ""
        validation = f"{amount} of the training images{unused}"
    if share == 0:
        why = "the data set has a validation list but no test list; data.split.test = 0.2 would draw one"
        test = f"none ({why if split.test == 'auto' else 'data.split.test = 0'})"
    elif "test" in dataset.lists:
        test = "the data set's own list"
    else:
        test = f"{share:g} of the training images"
    return f"splits: validation is {validation}; test is {test}"


def check_splits(dataset: Dataset, splits: dict[str, IntArray], needed: Sequence[str]) -> None:
    """Raise UserError if a ``needed`` split is empty or a class has no training image."""
    for name in needed:
        if len(splits[name]) == 0:
            raise UserError(
                f"the {name} split of {dataset.name} is empty: see data.split.validation, data.split.test "
                f"({len(dataset.labels)} images in total)"
            )
    counts = np.bincount(dataset.labels[splits["train"]], minlength=len(dataset.classes))
    missing = [dataset.classes[c] for c in np.flatnonzero(counts == 0)]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise UserError(
            f"the split leaves {len(missing)} of {len(dataset.classes)} classes without a training image: {shown}; "
            "change data.split, or remove these classes from the data"
        )


def split_hash(dataset: Dataset, splits: dict[str, IntArray]) -> str:
    """Return the SHA-256 (hex) of each split's image names and classes, in order, which identifies the splits."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split}\0{len(splits[split])}\n".encode())
        for i in splits[split]:
            line = f"{dataset.images.name(int(i))}\0{dataset.classes[dataset.labels[i]]}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _method(dataset: Dataset, split: SplitConfig) -> str:
    """Resolve "auto" in ``split.method``. Raises UserError for "official" without an official validation list."""
    has_list = "validation" in dataset.lists
    if split.method == "auto":
        return "official" if has_list else "stratified"
    if split.method == "official" and not has_list:
        raise UserError(
            f"data.split.method = 'official', but {dataset.name} has no validation list of its own; "
            "allowed here: auto, stratified, random, alternate"
        )
    return split.method


def _choose(labels: IntArray, method: str, share: float | int, key: str, seed: int, purpose: int) -> Mask:
    """Choose which of n images to take out of training: bool [n]. Raises UserError if none or all would be taken."""
    n = len(labels)
    if method == "alternate":
        odd: Mask = np.arange(n) % 2 == 1
        return odd
    count = share if isinstance(share, int) else math.floor(share * n + 0.5)
    if not 0 < count < n:
        raise UserError(
            f"{key} = {share} would take {count} of {n} images: at least 1 must be taken, and 1 left for training"
        )
    chosen = np.zeros(n, dtype=bool)
    if method == "random":
        chosen[keyed_permutation(n, seed, purpose)[:count]] = True
        return chosen
    for label, quota in enumerate(_quotas(np.bincount(labels), count)):
        members = np.flatnonzero(labels == label)
        chosen[members[keyed_permutation(len(members), seed, purpose, label)[:quota]]] = True
    return chosen


def _quotas(counts: IntArray, total: int) -> IntArray:
    """Return how many of ``total`` images to take from each class, proportional to its size (largest remainders)."""
    # Integers, so that rounding cannot decide between equal remainders: the first class then takes precedence.
    quotas, remainders = np.divmod(counts * total, counts.sum())
    short = total - int(quotas.sum())
    quotas[np.argsort(-remainders, kind="stable")[:short]] += 1
    return quotas


def _first_of_each_class(indices: IntArray, labels: IntArray, limit: int | None) -> IntArray:
    """Keep the first ``limit`` images of each class, in their order; None keeps all."""
    if limit is None:
        return indices
    own = labels[indices]
    by_class = np.argsort(own, kind="stable")
    counts = np.bincount(own)
    starts = np.cumsum(counts) - counts
    rank_in_class = np.empty(len(own), dtype=np.int64)
    rank_in_class[by_class] = np.arange(len(own)) - starts[own[by_class]]
    return indices[rank_in_class < limit]
