"""Parquet shards: read from a folder or a URL, copied shard by shard into a cache of bounded size."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from test_data_shards import error_of, fetched, loaded, opened, png, source, tar

from toolkit.cache.store import cache_root, list_entries
from toolkit.data import shard_files
from toolkit.data.image_sources import EncodedImages, check_images
from toolkit.data.shard_files import ParquetShards
from toolkit.data.shard_source import check_reading_order
from toolkit.errors import RunFailed, UserError
from toolkit.recipe.schema import DataConfig

ORDER = [*range(90, 110), *range(90)]
"""Pixel values of the images in the order of the data set: shards are sorted by name, test before train."""


def write(path: Path, values: list[int], **columns: Any) -> None:
    """Write images with these pixel values, and their labels unless other ``columns`` are given."""
    columns = columns or {"label": [value % 3 for value in values]}
    parquet.write_table(pa.table({"image": [png(value) for value in values], **columns}), path, row_group_size=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three shards that the library `datasets` wrote."""
    folder = tmp_path_factory.mktemp("parquet")
    names = datasets.ClassLabel(names=["2", "cat", "0"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    for number, values in enumerate((range(40), range(40, 90), range(90, 110))):
        content = [{"bytes": png(value), "path": f"{value % 25}.png"} for value in values]
        rows = datasets.Dataset.from_dict({"image": content, "label": [v % 3 for v in values]}, features=features)
        split = ("train", "train", "test")[number]
        rows.to_parquet(folder / f"{split}-{number:05d}-of-00003.parquet")
    return folder


@pytest.fixture
def url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(shard_files, "PAUSES_S", (0.0, 0.0))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/parquet/", recursive=True)
    yield "memory://parquet"
    memory.rm("/parquet", recursive=True)


def copies(dataset: Any) -> list[Path]:
    return sorted(fetched(dataset).folder.glob("*.images"))


def test_shards_that_the_library_datasets_wrote_are_read_from_a_folder_and_a_url(
    folder: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in (folder, url, folder, url):
        found = opened(root)
        assert found.classes == ["2", "cat", "0"]
        assert found.labels.tolist() == [value % 3 for value in ORDER]
        assert {split: len(indices) for split, indices in found.lists.items()} == {"train": 90, "test": 20}
        assert [int(found.images.load(i)[0, 0, 0]) for i in range(110)] == ORDER
        assert found.images.name(0) == "test-00002-of-00003.parquet/15.png"
        assert found.images.name(20 + 26) == "train-00000-of-00003.parquet/27"  # the second image 1.png of its shard
        assert len({found.images.name(i) for i in range(110)}) == 110
        assert source(found).is_checked
        if root == url:  # the second time, the index is kept
            monkeypatch.setattr("toolkit.data.shard_source.scan_parquet", None)
            assert list(fetched(found).folder.glob("*.parquet")) == []
    assert [entry.kind for entry in list_entries(cache_root())] == ["shards", "shards"]


def test_columns_are_those_of_a_table(tmp_path: Path) -> None:
    for number in range(2):
        write(
            tmp_path / f"{number}.parquet",
            [2 * number, 2 * number + 1],
            tags=[["cat", "dog"], []],
            part=["train", "val"],
            patient=["a", "b"],
        )
    found = opened(tmp_path, columns={"label": "tags", "split": "part", "group": "patient"})
    assert found.labels.tolist() == [[1, 1], [0, 0]] * 2
    assert found.lists["validation"].tolist() == [1, 3]
    assert found.groups is not None
    assert found.groups.tolist() == [0, 1, 0, 1]
    assert found.images.name(3) == "1.parquet/2"


def test_tar_files_come_first_because_img2dataset_writes_parquet_files_beside_them(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", [1, 2])
    tar(tmp_path / "0.tar", {"0.png": png(7), "0.cls": "0", "1.png": png(8), "1.cls": "1"})
    assert [int(opened(tmp_path).images.load(i)[0, 0, 0]) for i in range(2)] == [7, 8]


def test_the_cache_keeps_to_its_limit_also_for_a_folder(folder: Path) -> None:
    whole = sum(shard.size for shard in source(opened(folder)).index.shards)
    limit = whole * 0.7
    shutil.rmtree(cache_root())
    found = opened(folder, cache_limit=limit / 2**30)
    for i in np.random.default_rng(0).permutation(110).tolist():
        assert int(found.images.load(i)[0, 0, 0]) == ORDER[i]
        assert sum(path.stat().st_size for path in copies(found)) <= limit
    table = DataConfig(dataset="shards", root=str(folder), cache_limit=limit / 2**30)
    with pytest.raises(UserError, match=r"set data\.shuffle_shards = 10"):
        check_reading_order(found, table)


def test_several_processes_share_the_copies(url: str) -> None:
    found = opened(url)
    expected = loaded(found)
    for path in copies(found):
        path.unlink()

    def read() -> None:
        os._exit(0 if loaded(found) == expected else 1)

    processes = [multiprocessing.get_context("fork").Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(copies(found)) == 3
    assert list(fetched(found).folder.glob(".*.part")) == []


def test_images_that_are_missing_or_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", [0, 1])
    contents = [png(2), None, b"not an image", png(3)[:40]]
    parquet.write_table(pa.table({"image": contents, "label": [0, 1, 0, 1]}), tmp_path / "1.parquet")
    found = opened(tmp_path)
    assert not source(found).is_checked
    bad = check_images(found.images, np.arange(6), decode=True).bad
    assert [found.images.name(i) for i, _ in bad] == ["1.parquet/2", "1.parquet/3", "1.parquet/4"]
    assert [reason for _, reason in bad][:2] == ["an empty file", "not an image of a known format"]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"label": [0, 5, 1]}, {"class_names": ["a", "b"]},
         "1 row of ROOT cannot be used: row 2 of 1.parquet: the label '5' is not in data.class_names, whose indices "
         "are 0 to 1. Correct or remove them"),
        ({"label": ["a", None, "b"]}, {}, "row 2 of 1.parquet: no label"),
        ({"other": [0, 1, 2]}, {}, "the shard ROOT/1.parquet has no column 'label', unlike ROOT/0.parquet"),
        ({"label": [0, 1, 2]}, {"columns": {"image": "jpg"}},
         "ROOT has no column 'jpg', only image, label; data.columns.image sets the column to read"),
        ({"label": [0, 1, 2]}, {"columns": {"image": "label"}},
         "the column 'label' of ROOT/0.parquet does not contain the bytes of images"),
    ],
)  # fmt: skip
def test_faulty_rows_and_columns_are_named(
    columns: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "0.parquet", [0, 1], label=[0, 1] if columns.get("label") != ["a", None, "b"] else ["a", "b"])
    write(tmp_path / "1.parquet", [2, 3, 4], **columns)
    assert message in error_of(tmp_path, **settings)


@pytest.mark.parametrize("size", [3000, 500, 4, 0])
def test_a_shard_that_was_truncated_is_one_sentence(size: int, tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", [0, 1])
    write(tmp_path / "1.parquet", list(range(50)))
    os.truncate(tmp_path / "1.parquet", size)
    message = error_of(tmp_path)
    assert message.startswith("ROOT/1.parquet is not a Parquet file, or is damaged or truncated: ")
    assert "\n" not in message


def test_a_shard_that_changes_during_training_ends_the_run_with_one_sentence(url: str, tmp_path: Path) -> None:
    found = opened(url)
    name = source(found).index.shards[0].name
    for path in copies(found):
        path.unlink()
    write(tmp_path / name, list(range(20)))
    memory = fsspec.filesystem("memory")
    content = (tmp_path / name).read_bytes()
    for changed, message in (
        (content, "the shard was truncated or replaced"),
        (memory.cat(f"/parquet/{name}")[:-9] + bytes(9), "is not a Parquet file, or is damaged or truncated"),
    ):
        memory.pipe(f"/parquet/{name}", changed)
        with pytest.raises(RunFailed, match=message) as caught:
            found.images.load(0)
        assert str(caught.value).startswith(f"{url}/{name} could not be read: ")
        assert "\n" not in str(caught.value)
    assert all(name[:10] not in path.name for path in fetched(found).folder.glob("*.images"))


def test_a_changed_shard_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", [0, 1])
    assert int(opened(tmp_path).images.load(0)[0, 0, 0]) == 0
    write(tmp_path / "0.parquet", [5, 1])
    assert int(opened(tmp_path).images.load(0)[0, 0, 0]) == 5


def test_copies_are_shards_of_the_image_loader(folder: Path) -> None:
    """The order of data.shuffle_shards and the reading order of evaluation follow the shards."""
    found = opened(folder)
    assert isinstance(found.images, EncodedImages)
    assert isinstance(source(found).files, ParquetShards)
    assert source(found).stored_in.tolist() == [0] * 20 + [1] * 40 + [2] * 50
