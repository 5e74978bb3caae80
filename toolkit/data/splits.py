"""Train, validation and test splits, which depend only on the recipe and the data set.

Images are drawn without replacement, splits never overlap, and all keep the order of the data set's own lists.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.data.datasets import Dataset
from toolkit.data.sampling import IntArray, keyed_permutation
from toolkit.data.stratification import group_parts, iterative_stratification, label_pairs, stratified_folds
from toolkit.errors import UserError
from toolkit.formatting import plural
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

    If ``split.validation`` or ``split.test`` is 0, that split is empty: nothing is drawn, and an official list is not
    used. With ``split.folds``, one of the two splits is a fold (:func:`fold_split`). Random splits never divide a
    group.

    With ``split.train_images_per_class``, this many images of each class are drawn for training and validation, and all
    others are the test split.

    Raises UserError if another split, or the training images of a class, would be empty.
    """
    split, lists, labels = table.split, dataset.lists, dataset.labels
    if not isinstance(split.seed, int):
        raise ValueError('data.split.seed = "recipe.seed" must be resolved first: toolkit.recipe.resolve.with_defaults')
    method, fold = _method(dataset, split), fold_split(dataset, split)
    train, nothing = lists["train"], np.array([], dtype=np.int64)
    test_share = test_fraction(dataset, split)
    if split.train_images_per_class is not None:
        train, test = _draw_of_each_class(dataset, split.train_images_per_class, split.seed)
    elif fold == "test":
        train, test = _take_fold(dataset, train, split, method, _TEST)
    elif test_share == 0:
        test = nothing
    elif "test" in lists:
        test = lists["test"]
    else:
        method_for_test = "random" if method == "random" else "stratified"
        train, test = _take(dataset, train, method_for_test, test_share, "data.split.test", split.seed, _TEST)
    if fold == "validation":
        train, validation = _take_fold(dataset, train, split, method, _VALIDATION)
    elif split.validation == 0:
        validation = nothing
    elif method == "official":
        validation = lists["validation"]
    else:
        key = "data.split.validation"
        train, validation = _take(dataset, train, method, split.validation, key, split.seed, _VALIDATION)
    splits = {
        "train": _first_of_each_class(train, labels, table.images_per_class),
        "validation": _first_of_each_class(validation, labels, table.images_per_class),
        "test": _first_of_each_class(test, labels, table.test_images_per_class),
    }
    shares = {"train": 1, "validation": split.validation, "test": test_share or fold == "test" or len(test)}
    check_splits(dataset, splits, [name for name in SPLITS if shares[name]])
    return splits


def test_fraction(dataset: Dataset, split: SplitConfig) -> float | int:
    """Resolve "auto" in ``split.test``: 0 for a data set with a validation list but no test list, else 0.2."""
    if split.test != "auto":
        return split.test
    return 0 if "validation" in dataset.lists and "test" not in dataset.lists else AUTO_TEST


def fold_split(dataset: Dataset, split: SplitConfig) -> str | None:
    """Return which split is a fold, "test" or "validation"; None without folds.

    It is "test" if ``split.test`` is "auto" and there is no official test list: then the models of all folds together
    predict each image once. Otherwise it is "validation". Raises UserError if it is "validation" but
    ``split.validation`` is 0 or ``split.method`` is "official".
    """
    if split.folds is None:
        return None
    if split.test == "auto" and "test" not in dataset.lists:
        return "test"
    given = f"data.split.test = {split.test}" if split.test != "auto" else f"{dataset.name} has a test list of its own"
    if split.validation == 0:
        raise UserError(f"{given}, so the fold would be the validation split, but data.split.validation is 0")
    if split.method == "official":
        raise UserError(f"{given}, so the fold is the validation split: data.split.method cannot be 'official'")
    return "validation"


def describe_splits(dataset: Dataset, table: DataConfig) -> str:
    """Describe where the images of each split come from, in one line for the log."""
    split, method = table.split, _method(dataset, table.split)
    share, fold = test_fraction(dataset, split), fold_split(dataset, split)
    groups = "" if dataset.groups is None else ", without dividing groups"
    the_fold = f"fold {split.fold} of {split.folds} of the training images ({method}{groups})"
    is_unused = "validation" in dataset.lists and split.train_images_per_class is None
    unused = "; its own validation list is not used" if is_unused else ""
    if fold == "validation":
        validation = f"{the_fold}{unused}"
    elif split.validation == 0:
        validation = "none (data.split.validation = 0)"
    elif method == "official":
        validation = "the data set's own list"
    else:
        amount = "every second one" if method == "alternate" else f"{split.validation:g} ({method}{groups})"
        validation = f"{amount} of the training images{unused}"
    if split.train_images_per_class is not None:
        test = f"all but {plural(split.train_images_per_class, 'image')} of each class"
    elif fold == "test":
        test = the_fold
    elif share == 0:
        why = "the data set has a validation list but no test list; data.split.test = 0.2 would draw one"
        test = f"none ({why if split.test == 'auto' else 'data.split.test = 0'})"
    elif "test" in dataset.lists:
        test = "the data set's own list"
    else:
        test = f"{share:g} of the training images{groups}"
    return f"splits: validation is {validation}; test is {test}"


def check_splits(dataset: Dataset, splits: dict[str, IntArray], needed: Sequence[str]) -> None:
    """Raise UserError if a ``needed`` split is empty or a class has no training image."""
    for name in needed:
        if len(splits[name]) == 0:
            raise UserError(
                f"the {name} split of {dataset.name} is empty: see data.split.validation, data.split.test "
                f"({len(dataset.labels)} images in total)"
            )
    counts = dataset.class_counts(splits["train"])
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
        for i in splits[split].tolist():
            line = "\0".join([dataset.images.name(i), *(dataset.classes[label] for label in dataset.labels_of(i))])
            digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _method(dataset: Dataset, split: SplitConfig) -> str:
    """Resolve "auto" in ``split.method``. Raises UserError for "official" without an official validation list."""
    has_list = "validation" in dataset.lists
    if split.method == "auto":
        is_used = has_list and split.train_images_per_class is None and fold_split(dataset, split) != "validation"
        return "official" if is_used else "stratified"
    if split.method == "alternate" and dataset.groups is not None:
        raise UserError(
            "data.split.method = 'alternate' would divide groups (data.columns.group); allowed: stratified, random"
        )
    if split.method == "official" and not has_list:
        raise UserError(
            f"data.split.method = 'official', but {dataset.name} has no validation list of its own; "
            "allowed here: auto, stratified, random, alternate"
        )
    return split.method


def _take(
    dataset: Dataset, train: IntArray, method: str, share: float | int, key: str, seed: int, purpose: int
) -> tuple[IntArray, IntArray]:
    """Divide ``train`` into the indices that remain and those taken out, which are a fraction or a number of them.

    The size is exact, except with groups or several labels per image. Raises UserError if none or all would be taken.
    """
    labels, n = dataset.labels[train], len(train)
    count = n // 2 if method == "alternate" else share if isinstance(share, int) else math.floor(share * n + 0.5)
    shares = [count / max(n, 1), 1 - count / max(n, 1)]
    if method != "alternate" and not 0 < count < n:
        chosen = np.full(n, count >= n)
    elif dataset.groups is not None:
        _check_groups(dataset, train, method, 2)
        by = labels if method == "stratified" else None
        chosen = group_parts(dataset.groups[train], by, shares, seed, purpose) == 0
    elif method == "stratified" and dataset.is_multi_label:
        chosen = iterative_stratification(labels, shares, seed, purpose) == 0
    else:
        chosen = _choose(labels, method, count, seed, purpose)
    if not chosen.any() or chosen.all():
        taken = int(chosen.sum()) if 0 < count < n else count
        rule = "" if dataset.groups is None else ", and no group may be divided"
        raise UserError(
            f"{key} = {share} would take {taken} of {n} images: at least 1 must be taken, and 1 left for training{rule}"
        )
    return train[~chosen], train[chosen]


def _choose(labels: IntArray, method: str, count: int, seed: int, purpose: int) -> Mask:
    """Choose ``count`` of n images to take out of training; return a mask, bool [n]."""
    n = len(labels)
    if method == "alternate":
        odd: Mask = np.arange(n) % 2 == 1
        return odd
    chosen = np.zeros(n, dtype=bool)
    if method == "random":
        chosen[keyed_permutation(n, seed, purpose)[:count]] = True
        return chosen
    counts = np.bincount(labels)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    for label, (members, quota) in enumerate(zip(by_class, _quotas(counts, count), strict=True)):
        chosen[members[keyed_permutation(len(members), seed, purpose, label)[:quota]]] = True
    return chosen


def _draw_of_each_class(dataset: Dataset, number: int, seed: int) -> tuple[IntArray, IntArray]:
    """Draw ``number`` images of each class from all lists of the data set; return their indices and all others.

    Raises UserError for images with groups or several labels, and if a class has no more images than that.
    """
    key = "data.split.train_images_per_class"
    if dataset.is_multi_label or dataset.groups is not None:
        what = "several labels" if dataset.is_multi_label else "groups, which must not be divided"
        raise UserError(f"{key} is not possible for images with {what}")
    every = np.sort(np.concatenate(list(dataset.lists.values())))
    labels, chosen = dataset.labels[every], np.zeros(len(every), dtype=bool)
    for label, name in enumerate(dataset.classes):
        members = np.flatnonzero(labels == label)
        if len(members) <= number:
            raise UserError(
                f"{key} = {number}, but class {name} has {plural(len(members), 'image')}: none would be left for the "
                "test split"
            )
        chosen[members[keyed_permutation(len(members), seed, _TEST, label)[:number]]] = True
    return every[chosen], every[~chosen]


def _take_fold(
    dataset: Dataset, train: IntArray, split: SplitConfig, method: str, purpose: int
) -> tuple[IntArray, IntArray]:
    """Return the indices outside and inside ``split.fold``. Raises UserError if a class has too few images."""
    labels, n, folds = dataset.labels[train], len(train), split.folds or 1
    key = (int(split.seed), purpose)
    method = "stratified" if method == "official" else method
    if folds > n:
        raise UserError(f"data.split.folds = {folds} is more than the {n} training images")
    if dataset.groups is not None:
        _check_groups(dataset, train, method, folds)
        by = labels if method == "stratified" else None
        parts = group_parts(dataset.groups[train], by, [1 / folds] * folds, *key)
    elif method == "alternate":
        parts = np.arange(n) % folds
    elif method == "random":
        parts = np.argsort(keyed_permutation(n, *key)) % folds
    elif dataset.is_multi_label:
        parts = iterative_stratification(labels, [1 / folds] * folds, *key)
    else:
        counts = dataset.class_counts(train)
        small = np.flatnonzero((counts > 0) & (counts < folds))
        if len(small):
            name, count = dataset.classes[small[0]], plural(int(counts[small[0]]), "training image")
            raise UserError(
                f"data.split.folds = {folds}, but class {name} has {count}, so that some folds would have none; use "
                "fewer folds, or data.split.method = 'random'"
            )
        parts = stratified_folds(labels, folds, *key)
    return train[parts != split.fold], train[parts == split.fold]


def _check_groups(dataset: Dataset, train: IntArray, method: str, needed: int) -> None:
    """Raise UserError if the images of any class are in fewer groups than there are parts (``needed``)."""
    groups = dataset.groups
    if method != "stratified" or groups is None:
        return
    examples, labels = label_pairs(dataset.labels[train])
    pairs = np.unique(np.stack([groups[train][examples], labels], 1), axis=0)
    counts = np.bincount(pairs[:, 1], minlength=len(dataset.classes))
    short = np.flatnonzero((counts > 0) & (counts < needed))
    if len(short):
        image = dataset.images.name(int(train[examples[labels == short[0]][0]]))
        where = "one group" if counts[short[0]] == 1 else f"{counts[short[0]]} groups"
        parts = "training and evaluation" if needed == 2 else f"{needed} folds"
        raise UserError(
            f"all training images of class {dataset.classes[short[0]]} are in {where}, {image} for example, and no "
            f"group may be divided between {parts}: add images of other groups, leave the class out, or set "
            "data.split.method = 'random'"
        )


def _quotas(counts: IntArray, total: int) -> IntArray:
    """Return how many of ``total`` images to take from each class, proportional to its size (largest remainders)."""
    # Integers, so that rounding cannot decide between equal remainders: the first class then takes precedence.
    quotas, remainders = np.divmod(counts * total, counts.sum())
    short = total - int(quotas.sum())
    quotas[np.argsort(-remainders, kind="stable")[:short]] += 1
    return quotas


def _first_of_each_class(indices: IntArray, labels: npt.NDArray[Any], limit: int | None) -> IntArray:
    """Keep the first ``limit`` images of each class, in their order; None keeps all.

    An image with several labels is kept if it is among the first ``limit`` images of any of its labels.
    """
    if limit is None:
        return indices
    examples, own = label_pairs(labels[indices])
    by_class = np.argsort(own, kind="stable")
    counts = np.bincount(own)
    starts = np.cumsum(counts) - counts
    rank_in_class = np.empty(len(own), dtype=np.int64)
    rank_in_class[by_class] = np.arange(len(own)) - starts[own[by_class]]
    return indices[np.unique(examples[rank_in_class < limit])]
