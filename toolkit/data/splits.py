"""Which images train, validate and test: a function of the recipe and the data set alone.

Every draw is without replacement; splits never overlap; all keep the order of the data set's own lists.
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
"""Share of the images that is tested on by default where the data set has no list of its own but for training."""

_VALIDATION, _TEST = 1, 2
"""Keys that keep the two drawings apart."""

Mask = npt.NDArray[np.bool_]


def split_dataset(dataset: Dataset, table: DataConfig) -> dict[str, IntArray]:
    """Indices into the data set of each split: "train", "validation", "test", int64.

    The test images are the data set's own list where there is one, else drawn by ``split.test`` (with "auto" none from
    a data set that has a validation list); then the validation images come out of the remaining training images by
    ``split.method``. With any method but official, a validation list of the data set's own stays unused: its authors
    set those images aside from training.

    With ``split.validation`` or ``split.test`` = 0 that split is empty: nothing is drawn for it, and a list of the data
    set's own is not used.

    Raises UserError where another split or a class's training images would be empty.
    """
    split, lists, labels = table.split, dataset.lists, dataset.labels
    seed = split.seed
    if not isinstance(seed, int):
        raise ValueError('data.split.seed = "recipe.seed" must be resolved first: toolkit.recipe.resolve.with_defaults')
    method = _method(dataset, split)
    train = lists["train"]
    test_share = share_of_test(dataset, split)
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


def share_of_test(dataset: Dataset, split: SplitConfig) -> float | int:
    """``split.test`` with "auto" resolved: 0 for a data set with a validation list but no test list, else 0.2."""
    if split.test != "auto":
        return split.test
    return 0 if "validation" in dataset.lists and "test" not in dataset.lists else AUTO_TEST


def describe_splits(dataset: Dataset, table: DataConfig) -> str:
    """Where the images of each split come from: one line for the log."""
    split, method = table.split, _method(dataset, table.split)
    share = share_of_test(dataset, split)
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
    """Raise UserError where a ``needed`` split is empty or a class has no training image."""
    for name in needed:
        if len(splits[name]) == 0:
            raise UserError(
                f"the {name} split of {dataset.name} is empty: see data.split.validation, data.split.test "
                f"({len(dataset.labels)} images in all)"
            )
    counts = np.bincount(dataset.labels[splits["train"]], minlength=len(dataset.classes))
    missing = [dataset.classes[c] for c in np.flatnonzero(counts == 0)]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise UserError(
            f"the split leaves {len(missing)} of {len(dataset.classes)} classes without a training image: {shown}; "
            "change data.split, or take these classes out of the data"
        )


def split_hash(dataset: Dataset, splits: dict[str, IntArray]) -> str:
    """SHA-256 (hex) over each split's image names and classes, in order: equal for the same split of the same data."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split}\0{len(splits[split])}\n".encode())
        for i in splits[split]:
            line = f"{dataset.images.name(int(i))}\0{dataset.classes[dataset.labels[i]]}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _method(dataset: Dataset, split: SplitConfig) -> str:
    """The method with auto resolved."""
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
    """Which of the listed images are taken out of training, bool [n]."""
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
    """Images to take from each class: proportional to its size, adding up to ``total`` by the largest remainders."""
    # Whole numbers, so that no rounding decides between equal remainders: the first class then has precedence.
    quotas, remainders = np.divmod(counts * total, counts.sum())
    short = total - int(quotas.sum())
    quotas[np.argsort(-remainders, kind="stable")[:short]] += 1
    return quotas


def _first_of_each_class(indices: IntArray, labels: IntArray, limit: int | None) -> IntArray:
    """At most ``limit`` images of each class, the first ones, in the order they had."""
    if limit is None:
        return indices
    own = labels[indices]
    by_class = np.argsort(own, kind="stable")
    counts = np.bincount(own)
    starts = np.cumsum(counts) - counts
    rank_in_class = np.empty(len(own), dtype=np.int64)
    rank_in_class[by_class] = np.arange(len(own)) - starts[own[by_class]]
    return indices[rank_in_class < limit]
