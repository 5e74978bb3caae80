"""Splits that keep groups whole, of multi-label data sets, and in folds."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from toolkit.data.datasets import Dataset
from toolkit.data.image_sources import InMemoryImages
from toolkit.data.splits import SPLITS, describe_splits, split_dataset, split_hash
from toolkit.data.stratification import group_parts, iterative_stratification, stratified_folds
from toolkit.errors import UserError
from toolkit.recipe.schema import DataConfig


def dataset(labels: Any, groups: Any = None, **lists: list[int]) -> Dataset:
    labels = np.asarray(labels)
    count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    images = InMemoryImages(np.zeros((len(labels), 2, 2), np.uint8), "toy", 1)
    official = {name: np.array(indices, dtype=np.int64) for name, indices in lists.items()}
    return Dataset(
        "toy", [f"class {c}" for c in range(count)], images, labels, official or {"train": np.arange(len(labels))},
        2, 1, groups=None if groups is None else np.asarray(groups, dtype=np.int64),
    )  # fmt: skip


def config(**split: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": "digits", "split": split})


def patients(seed: int, images: int = 600, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of three classes (60, 30 and 10 %) and groups of 1 to about 40 images, each mostly of one class."""
    random = np.random.default_rng(seed)
    groups = np.sort(random.choice(count, images, p=random.dirichlet(np.ones(count))))
    usual = random.choice(3, count, p=[0.6, 0.3, 0.1])
    other = random.choice(3, images, p=[0.6, 0.3, 0.1])
    return np.where(random.random(images) < 0.7, usual[groups], other), groups


def multi_label(seed: int, images: int = 1000, count: int = 20, least: float = 0.005) -> np.ndarray:
    """Return uint8 [images, labels]; labels have ``least`` to 0.5 of the images and occur in correlated pairs."""
    random = np.random.default_rng(seed)
    labels = random.random((images, count)) < np.geomspace(least, 0.5, count)
    labels[:, 1::2] |= labels[:, ::2] & (random.random((images, count // 2)) < 0.5)
    return labels.astype(np.uint8)


# -- groups -----------------------------------------------------------------------------------------------------------


def test_no_group_is_on_two_sides_in_100_draws() -> None:
    drawn = set()
    for seed in range(100):
        labels, groups = patients(seed % 10)
        data = dataset(labels, groups)
        method = "stratified" if seed % 2 else "random"
        splits = split_dataset(data, config(method=method, validation=0.15, test=0.2, seed=seed))
        assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(600))
        for one, other in combinations(SPLITS, 2):
            assert not set(groups[splits[one]]) & set(groups[splits[other]])
        drawn.add((seed % 10, tuple(splits["test"].tolist())))
    assert len(drawn) == 100  # seeds give different splits


def test_groups_are_stratified_as_well_as_possible() -> None:
    """Fractions of classes and sizes of splits are close to what was asked for, and closer than without strata."""
    deviations = {}
    for method in ("stratified", "random"):
        found = []
        for seed in range(10):
            labels, groups = patients(seed)
            splits = split_dataset(dataset(labels, groups), config(method=method, validation=0.15, test=0.2, seed=seed))
            for split, share in (("test", 0.2), ("validation", 0.15 * 0.8)):
                assert abs(len(splits[split]) / 600 - share) < 0.05
                taken = np.bincount(labels[splits[split]], minlength=3) / np.bincount(labels)
                found.append(np.abs(taken - share).mean())
        deviations[method] = np.mean(found)
    assert deviations["stratified"] < 0.03
    assert deviations["stratified"] < deviations["random"] / 2


def test_group_folds_are_as_good_as_scikit_learns() -> None:
    ours, theirs = [], []
    for seed in range(10):
        labels, groups = patients(seed)
        folds = np.zeros(600, dtype=np.int64)
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
        for fold, (_, test) in enumerate(splitter.split(labels, labels, groups)):
            folds[test] = fold
        for found, parts in ((ours, group_parts(groups, labels, [0.2] * 5, seed)), (theirs, folds)):
            counts = np.stack([np.bincount(labels[parts == fold], minlength=3) for fold in range(5)])
            found.append(np.abs(counts / np.bincount(labels) - 0.2).mean())
    assert np.mean(ours) < 1.1 * np.mean(theirs)


def test_groups_of_one_image_are_stratified_like_images() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    parts = group_parts(np.arange(160), labels, [0.1, 0.9], 0)
    assert np.bincount(labels[parts == 0]).tolist() == [10, 5, 1]


# -- several labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [[0.2] * 5, [0.1, 0.9]])
def test_iterative_stratification_keeps_the_fraction_of_every_label(shares: list[float]) -> None:
    labels = multi_label(0)
    parts = iterative_stratification(labels, shares, 3)
    counts = np.stack([labels[parts == part].sum(0) for part in range(len(shares))])
    wanted = np.array(shares)[:, None] * labels.sum(0)
    assert np.abs(counts - wanted).max() < 0.02 * len(labels)
    # Random parts differ from the wanted numbers by their standard deviation; here rare labels are exact.
    assert (np.abs(counts - wanted)[:, labels.sum(0) < 60] < 2).all()
    assert np.abs(np.bincount(parts) - np.array(shares) * len(labels)).max() < 0.02 * len(labels)
    assert np.array_equal(parts, iterative_stratification(labels, shares, 3))
    assert not np.array_equal(parts, iterative_stratification(labels, shares, 4))


def test_parts_are_the_same_on_every_machine() -> None:
    """Recorded once: with other parts, new results would not be comparable with earlier ones."""
    groups, labels = np.array([3, 3, 1, 1, 1, 2, 0, 0, 5, 4]), np.array([0, 1, 0, 0, 1, 1, 0, 1, 1, 0])
    assert group_parts(groups, labels, [0.3, 0.7], 7).tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    several = np.array([[1, 0], [1, 1], [0, 1], [0, 0], [1, 0], [0, 1], [1, 1], [0, 0]], dtype=np.uint8)
    assert iterative_stratification(several, [0.25, 0.75], 7).tolist() == [1, 0, 1, 0, 1, 1, 1, 1]


def test_splits_of_a_multi_label_data_set() -> None:
    labels = multi_label(1, least=0.02)
    data = dataset(labels)
    splits = split_dataset(data, config(validation=0.1, test=0.2))
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(1000))
    assert (np.abs(labels[splits["test"]].sum(0) - 0.2 * labels.sum(0)) < 10).all()
    few = DataConfig.model_validate({"dataset": "digits", "images_per_class": 3})
    kept = labels[split_dataset(data, few)["train"]]
    assert kept.sum(0).min() >= 3
    assert len(kept) <= 3 * labels.shape[1]
    changed = labels.copy()
    changed[splits["train"][0], 0] ^= 1
    assert split_hash(data, splits) != split_hash(dataset(changed), splits)


def test_multi_label_groups_stay_whole() -> None:
    labels, groups = multi_label(2), np.random.default_rng(0).integers(0, 120, 1000)
    splits = split_dataset(dataset(labels, groups), config(method="random", folds=4, fold=1))
    for one, other in combinations(SPLITS, 2):
        assert not set(groups[splits[one]]) & set(groups[splits[other]])


# -- folds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "random", "alternate"])
@pytest.mark.parametrize("kind", ["one label", "groups", "several labels"])
def test_folds_test_each_image_once(kind: str, method: str) -> None:
    labels, groups = patients(0)
    data = {
        "one label": dataset(labels),
        "groups": dataset(labels, groups),
        "several labels": dataset(multi_label(3, 600, least=0.05)),
    }[kind]
    if kind == "groups" and method == "alternate":
        with pytest.raises(UserError, match="would divide groups"):
            split_dataset(data, config(method=method, folds=5))
        return
    folds = [split_dataset(data, config(method=method, folds=5, fold=fold, seed=7)) for fold in range(5)]
    assert sorted(np.concatenate([fold["test"] for fold in folds]).tolist()) == list(range(600))
    for fold in folds:
        assert sorted(np.concatenate(list(fold.values())).tolist()) == list(range(600))
        assert abs(len(fold["test"]) - 120) <= (0 if kind == "one label" else 15)


def test_folds_have_the_same_number_of_every_class_to_within_one() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 33, 7]))
    parts = stratified_folds(labels, 5, 0)
    counts = np.array([np.bincount(labels[parts == fold], minlength=3) for fold in range(5)])
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp(counts.sum(1)) <= 1


def test_the_fold_is_the_validation_split_if_the_test_split_is_given() -> None:
    labels = np.arange(100) % 4
    official = dataset(labels, train=list(range(80)), test=list(range(80, 100)))
    drawn = [split_dataset(dataset(labels), config(test=0.2, folds=4, fold=fold)) for fold in range(4)]
    for folds, data in (
        ([split_dataset(official, config(folds=4, fold=fold)) for fold in range(4)], official),
        (drawn, dataset(labels)),
    ):
        assert len({tuple(fold["test"].tolist()) for fold in folds}) == 1
        validated = sorted(np.concatenate([fold["validation"] for fold in folds]).tolist())
        assert validated == sorted(set(range(100)) - set(folds[0]["test"].tolist()))
        assert describe_splits(data, config(test=0.2, folds=4, fold=1)).startswith(
            "splits: validation is fold 1 of 4 of the training images (stratified); test is "
        )
    assert describe_splits(dataset(labels, labels), config(folds=4)) == (
        "splits: validation is 0.1 (stratified, without dividing groups) of the training images; test is fold 0 of 4 "
        "of the training images (stratified, without dividing groups)"
    )


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "groups", "split", "expected"),
    [
        ([0] * 20 + [1] * 3, None, {"folds": 5},
         r"folds = 5, but class class 1 has 3 training images, so that some folds would have none"),
        ([0] * 10 + [1] * 10, [0] * 10 + [1] * 10, {},
         r"all training images of class class 0 are in one group, toy/0 for example, and no "
         r"group may be divided between training and evaluation: add images of other groups"),
        ([0] * 10 + [1] * 10, [0, 1] * 10, {"folds": 3}, r"class class 0 are in 2 groups, toy/0 .* between 3 folds"),
        ([0, 1] * 10, [0] * 20, {"method": "random"},
         r"data.split.test = 0.2 would take 0 of 20 images: at least 1 must be taken, and 1 left "
         r"for training, and no group may be divided"),
        ([0, 1] * 10, None, {"folds": 30}, "folds = 30 is more than the 20 training images"),
        ([0, 1] * 10, None, {"folds": 2, "test": 3, "validation": 0}, "but data.split.validation is 0"),
    ],
)  # fmt: skip
def test_impossible_splits_are_refused(labels: Any, groups: Any, split: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        split_dataset(dataset(labels, groups), config(**split))
