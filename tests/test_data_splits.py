"""Splits are disjoint, exact in number, and depend only on the recipe."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.image_sources import InMemoryImages
from toolkit.data.splits import check_splits, describe_splits, split_dataset, split_hash
from toolkit.errors import UserError
from toolkit.recipe.schema import DataConfig, SplitConfig


def dataset(counts: list[int], **lists: list[int]) -> Dataset:
    """Return a data set with these numbers of images per class, in random order; by default all are training images."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int64)
    images = InMemoryImages(np.zeros((len(labels), 2, 2), np.uint8), "toy", 1)
    official = {name: np.array(indices, dtype=np.int64) for name, indices in lists.items()}
    classes = [f"class {c}" for c in range(len(counts))]
    return Dataset("toy", classes, images, labels, official or {"train": np.arange(len(labels))}, 2, 1)


def table(
    method: str = "auto", validation: float | int = 0.1, test: float | int | str = "auto", seed: int = 0, **data: int
) -> DataConfig:
    split = SplitConfig.model_validate({"method": method, "validation": validation, "test": test, "seed": seed})
    return DataConfig.model_validate({"dataset": "digits", "split": split, **data})


@pytest.mark.parametrize("method", ["auto", "stratified", "random", "alternate"])
def test_splits_are_disjoint_complete_ordered_and_repeatable(method: str) -> None:
    data = dataset([50, 31, 7])
    splits = split_dataset(data, table(method))
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(88))
    assert all((np.diff(indices) > 0).all() for indices in splits.values())
    again = split_dataset(data, table(method))
    assert all(np.array_equal(splits[name], again[name]) for name in splits)


def test_the_split_has_the_same_images_on_every_machine() -> None:
    """Recorded once: with other splits, new results would not be comparable with earlier ones."""
    splits = split_dataset(dataset([6, 4]), table("stratified", 0.25, 2))
    assert {name: indices.tolist() for name, indices in splits.items()} == {
        "train": [2, 3, 4, 5, 8, 9],
        "validation": [0, 1],
        "test": [6, 7],
    }


def test_shares_are_of_the_remaining_images_and_numbers_are_exact() -> None:
    splits = split_dataset(dataset([1000, 797]), table())
    assert {name: len(indices) for name, indices in splits.items()} == {"test": 359, "validation": 144, "train": 1294}
    splits = split_dataset(dataset([1000, 797]), table(validation=100, test=97))
    assert {name: len(indices) for name, indices in splits.items()} == {"test": 97, "validation": 100, "train": 1600}


def test_stratified_takes_the_share_of_every_class_to_within_one_image() -> None:
    counts = [534, 100, 33, 21, 10, 3]
    data = dataset(counts)
    splits = split_dataset(data, table("stratified", 0.5, 1, seed=3))
    left = np.bincount(data.labels, minlength=6) - np.bincount(data.labels[splits["test"]], minlength=6)
    taken = np.bincount(data.labels[splits["validation"]], minlength=6)
    assert (np.abs(taken - left / 2) < 1).all()
    assert taken.sum() == 350


def test_seeds_draw_different_images_without_replacement() -> None:
    data = dataset([40, 40])
    drawn = [split_dataset(data, table("stratified", 0.5, seed=seed))["validation"] for seed in range(5)]
    assert len({tuple(indices) for indices in drawn}) == 5
    assert all(len(set(indices.tolist())) == len(indices) for indices in drawn)


def test_alternate_selects_odd_positions_of_the_list_not_odd_indices() -> None:
    data = dataset([10, 10], train=[4, 2, 9, 7, 0, 11, 12], test=[1, 3])
    splits = split_dataset(data, table("alternate"))
    assert splits["train"].tolist() == [4, 9, 0, 12]
    assert splits["validation"].tolist() == [2, 7, 11]
    assert splits["test"].tolist() == [1, 3]


def test_official_lists_are_used_unchanged() -> None:
    data = dataset([10, 10], train=list(range(12)), validation=[19, 12, 15], test=[13, 14])
    for method in ("auto", "official"):
        splits = split_dataset(data, table(method))
        assert [splits[name].tolist() for name in splits] == [list(range(12)), [19, 12, 15], [13, 14]]


def test_the_validation_list_is_not_trained_on_with_another_method() -> None:
    data = dataset([10, 10], train=list(range(12)), validation=list(range(12, 18)), test=[18, 19])
    splits = split_dataset(data, table("random", 0.25))
    assert set(splits["train"].tolist()) | set(splits["validation"].tolist()) == set(range(12))


def test_images_per_class_keeps_the_first_of_each_class_after_the_split() -> None:
    data = dataset([30, 30, 30])
    whole = split_dataset(data, table("stratified", 0.3))
    few = split_dataset(data, table("stratified", 0.3, images_per_class=4, test_images_per_class=2))
    for name, limit in (("train", 4), ("validation", 4), ("test", 2)):
        expected = [i for c in range(3) for i in [i for i in whole[name] if data.labels[i] == c][:limit]]
        assert few[name].tolist() == sorted(expected)


def test_a_number_of_images_of_each_class_is_drawn_from_all_lists_and_the_rest_is_test() -> None:
    data = dataset([60, 31, 40], train=[*range(70)], validation=[*range(70, 90)], test=[*range(90, 131)])
    drawn = table(validation=5 * 3)
    drawn = drawn.model_copy(update={"split": drawn.split.model_copy(update={"train_images_per_class": 30})})
    splits = split_dataset(data, drawn)
    counts = {name: np.bincount(data.labels[indices], minlength=3).tolist() for name, indices in splits.items()}
    assert counts == {"train": [25] * 3, "validation": [5] * 3, "test": [30, 1, 10]}
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(131))
    assert all((np.diff(indices) > 0).all() for indices in splits.values())
    other = split_dataset(data, drawn.model_copy(update={"split": drawn.split.model_copy(update={"seed": 1})}))
    assert not np.array_equal(other["test"], splits["test"])
    assert describe_splits(data, drawn) == (
        "splits: validation is 15 (stratified) of the training images; test is all but 30 images of each class"
    )
    too_many = drawn.split.model_copy(update={"train_images_per_class": 31})
    with pytest.raises(UserError, match="train_images_per_class = 31, but class class 1 has 31 images: none would"):
        split_dataset(data, drawn.model_copy(update={"split": too_many}))


def test_a_class_without_training_images_is_named() -> None:
    data = dataset([10, 10, 1])
    only = int(np.flatnonzero(data.labels == 2)[0])
    lists = {"train": np.setdiff1d(np.arange(21), [only]), "test": np.array([only])}
    without = Dataset("toy", data.classes, data.images, data.labels, lists, 2, 1)
    with pytest.raises(UserError, match="1 of 3 classes without a training image: class 2"):
        split_dataset(without, table("random", 0.1))


def test_empty_splits_are_refused() -> None:
    with pytest.raises(UserError, match=r"data.split.validation = 0.01 would take 0 of 8 images"):
        split_dataset(dataset([5, 5]), table(validation=0.01))
    with pytest.raises(UserError, match=r"data.split.test = 10 would take 10 of 10 images"):
        split_dataset(dataset([5, 5]), table(test=10))
    with pytest.raises(UserError, match="the test split of toy is empty"):
        check_splits(dataset([3]), {"train": np.arange(3), "test": np.array([], dtype=np.int64)}, ["train", "test"])


@pytest.mark.parametrize("method", ["auto", "stratified", "random", "alternate"])
@pytest.mark.parametrize("zero", [0, 0.0])
def test_splits_can_be_left_out(method: str, zero: float) -> None:
    """All images are then for training, and the other split stays the same."""
    data = dataset([50, 31, 7])
    splits = split_dataset(data, table(method, validation=zero, test=zero))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [88, 0, 0]
    only_test = split_dataset(data, table(method, validation=zero))
    assert np.array_equal(only_test["test"], split_dataset(data, table(method))["test"])
    assert len(only_test["train"]) + len(only_test["test"]) == 88
    assert len(split_dataset(data, table(method, test=zero))["test"]) == 0


def test_official_lists_of_unused_splits_are_not_trained_on() -> None:
    data = dataset([5, 5], train=list(range(6)), validation=[6, 7], test=[8, 9])
    splits = split_dataset(data, table(validation=0, test=0))
    assert {name: indices.tolist() for name, indices in splits.items()} == {
        "train": list(range(6)), "validation": [], "test": []}  # fmt: skip


def test_by_default_a_validation_list_without_a_test_list_means_no_test() -> None:
    """No training image is used for testing unless the recipe states a share."""
    data = dataset([10, 10], train=list(range(12)), validation=list(range(12, 20)))
    splits = split_dataset(data, table())
    assert [splits[name].tolist() for name in splits] == [list(range(12)), list(range(12, 20)), []]
    assert describe_splits(data, table()) == (
        "splits: validation is the data set's own list; test is none (the data set has a validation list but no "
        "test list; data.split.test = 0.2 would draw one)"
    )
    drawn = split_dataset(data, table(test=3))
    assert [len(drawn[name]) for name in drawn] == [9, 8, 3]
    assert sorted([*drawn["train"], *drawn["test"]]) == list(range(12))
    with pytest.raises(UserError, match="the validation split of toy is empty"):
        split_dataset(dataset([10, 10], train=list(range(20)), validation=[]), table())


@pytest.mark.parametrize(
    ("lists", "settings", "line"),
    [
        ({}, {}, "validation is 0.1 (stratified) of the training images; test is 0.2 of the training images"),
        ({"test": [0]}, {"validation": 5, "method": "random"},
         "validation is 5 (random) of the training images; test is the data set's own list"),
        ({"test": [0], "validation": [1]}, {"method": "alternate"},
         "validation is every second one of the training images; its own validation list is not used; test is the "
         "data set's own list"),
    ],
)  # fmt: skip
def test_the_log_describes_the_origin_of_the_splits(
    lists: dict[str, list[int]], settings: dict[str, Any], line: str
) -> None:
    data = dataset([10, 10], train=list(range(2, 20)), **lists)
    assert describe_splits(data, table(**settings)) == f"splits: {line}"


def test_official_without_a_list_is_refused_with_the_allowed_methods() -> None:
    with pytest.raises(UserError, match="no validation list of its own; allowed here: auto, stratified"):
        split_dataset(dataset([5, 5]), table("official"))


def test_the_split_hash_depends_on_images_classes_and_splits() -> None:
    data = dataset([20, 20])
    splits = split_dataset(data, table())
    moved = {**splits, "train": splits["test"], "test": splits["train"]}
    renamed = Dataset("toy", ["class 0", "other"], data.images, data.labels, data.lists, 2, 1)
    hashes = {split_hash(data, splits), split_hash(data, moved), split_hash(renamed, splits)}
    assert len(hashes) == 3
    assert split_hash(data, split_dataset(data, table())) in hashes


@pytest.fixture(scope="module")
def caltech_names(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the lists and file names of Caltech-101; the images are empty files."""
    folder = tmp_path_factory.mktemp("caltech")
    for name in ("caltech101-a.tar", "caltech101-b.tar"):
        with tarfile.open(shared_data / name) as archive:
            for member in archive:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                if member.name.endswith(".txt"):
                    content = archive.extractfile(member)
                    assert content is not None
                    path.write_bytes(content.read())
                elif member.isfile():
                    path.touch()
    return folder


@pytest.mark.parametrize("method", ["alternate", "stratified", "random"])
def test_caltech_official_lists_halve_into_2892_and_2892(caltech_names: Path, method: str) -> None:
    """The counts of the reports, from the real lists and file names."""
    split = SplitConfig.model_validate({"method": method, "validation": 0.5})
    recipe = DataConfig(dataset="caltech101", root=str(caltech_names), split=split)
    data = open_dataset(recipe)
    splits = split_dataset(data, recipe)
    assert len(data.classes) == 101
    assert data.classes[:3] == ["Faces", "Faces_easy", "Leopards"]
    assert {name: len(indices) for name, indices in splits.items()} == {"train": 2892, "validation": 2892, "test": 2893}
    listed = (caltech_names / "caltech101" / "train.txt").read_text().split()
    lines = [path for path in listed if not path.startswith("BACKGROUND_Google/")]
    assert len(lines) == 5784
    if method == "alternate":
        assert [data.images.name(int(i)) for i in splits["validation"]] == lines[1::2]
