"""Shards: packed and read back, scanned without an index, fetched from a URL into a cache of bounded size."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from cli import toolkit
from finished import digit_files
from PIL import Image

from toolkit.cache.store import cache_root, clean, list_entries
from toolkit.data import shard_files
from toolkit.data.dataloader import BatchRequest, SplitDataset, WorkerBatches
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.encoded_sources import read_bytes
from toolkit.data.image_sources import EncodedImages, check_images
from toolkit.data.shard_files import FetchedShards
from toolkit.data.shard_index import INDEX_NAME, Shard, ShardIndex
from toolkit.data.shard_pack import pack
from toolkit.data.shard_prefetch import shard_prefetch
from toolkit.data.shard_source import ShardImages, check_reading_order
from toolkit.errors import RunFailed, UserError
from toolkit.recipe.schema import DataConfig

SHARD_SIZE = 40_000


def config(**settings: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": "shards", **settings})


def packed(data: DataConfig, folder: Path, shard_size: int = SHARD_SIZE) -> Path:
    pack(data, folder, shard_size, lambda text: None)
    return folder


def opened(root: Path | str, **settings: Any) -> Dataset:
    return open_dataset(config(root=str(root), **settings))


def source(dataset: Dataset) -> ShardImages:
    assert isinstance(dataset.images, EncodedImages)
    assert isinstance(dataset.images.source, ShardImages)
    return dataset.images.source


def fetched(dataset: Dataset) -> FetchedShards:
    files = source(dataset).files
    assert isinstance(files, FetchedShards)
    return files


def error_of(root: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, **settings)
    return str(caught.value).replace(str(root), "ROOT")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_files(tmp_path_factory.mktemp("digits") / "images")


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the digits as shards."""
    return packed(DataConfig(dataset="imagefolder", root=str(images)), tmp_path_factory.mktemp("packed") / "shards")


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


# -- packing ----------------------------------------------------------------------------------------------------------


def test_packed_images_are_those_of_the_folder_in_the_same_order(images: Path, folder: Path) -> None:
    expected, found = open_dataset(DataConfig(dataset="imagefolder", root=str(images))), opened(folder)
    assert found.classes == expected.classes
    assert found.labels.tolist() == expected.labels.tolist()
    assert {name: found.lists[name].tolist() for name in found.lists} == {
        name: expected.lists[name].tolist() for name in expected.lists
    }
    assert isinstance(expected.images, EncodedImages)
    for i in range(len(expected.images)):
        assert found.images.name(i) == expected.images.name(i)
        assert read_bytes(source(found), i) == read_bytes(expected.images.source, i)


def test_other_programs_read_the_same_samples(images: Path, folder: Path) -> None:
    """Read with tarfile alone: image and class of each key, in shards named by their split, of bounded size."""
    found: dict[str, list[tuple[bytes, str]]] = {"train": [], "test": []}
    for path in sorted(folder.glob("*.tar")):
        assert path.stat().st_size <= SHARD_SIZE
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        samples = [(members[name], members[f"{name[:-4]}.cls"].decode()) for name in members if name.endswith("png")]
        found[path.name.split("-")[0]] += samples
    assert len(list(folder.glob("train-*.tar"))) > 2
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    for split, samples in found.items():
        paths = (images / split).rglob("*.png")
        assert sorted(samples) == sorted((path.read_bytes(), path.parent.name) for path in paths)


def test_packing_twice_gives_the_same_bytes(images: Path, folder: Path, tmp_path: Path) -> None:
    again = packed(DataConfig(dataset="imagefolder", root=str(images)), tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_arrays_in_memory_are_packed_without_loss(tmp_path: Path) -> None:
    found = opened(packed(DataConfig(dataset="digits"), tmp_path / "shards", 2**22))
    expected = open_dataset(DataConfig(dataset="digits"))
    assert (found.native_size, found.native_channels) == (8, 1)
    assert all((found.images.load(i)[..., :1] == expected.images.load(i)).all() for i in range(0, 1797, 50))


def table_of(folder: Path, rows: str) -> DataConfig:
    for i in range(4):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(folder / f"{i}.png")
    (folder / "labels.csv").write_text(rows)
    columns = {"group": "group", "weight": "weight", "keep": ["weight", "site"]}
    settings = {"columns": columns, "label_separator": ";"}
    return DataConfig.model_validate({"dataset": "table", "table": str(folder / "labels.csv"), **settings})


def test_several_labels_groups_weights_and_other_columns_are_kept_with_and_without_the_index(tmp_path: Path) -> None:
    rows = "image,label,group,weight,site\n0.png,cat;dog,a,1,x\n1.png,,b,0.5,\n2.png,dog,a,2,=y\n3.png,cat,b,1,-3\n"
    data = table_of(tmp_path, rows)
    expected, shards = open_dataset(data), packed(data, tmp_path / "shards")
    found = opened(shards)
    for field in ("labels", "groups", "weights"):
        assert getattr(found, field).tolist() == getattr(expected, field).tolist()
    kept = {name: [column[i] for i in range(4)] for name, column in found.kept.items()}
    assert kept == {"weight": ["1", "0.5", "2", "1"], "site": ["x", "", "%3Dy", "-3"]}
    (shards / INDEX_NAME).unlink()
    again = opened(shards, columns={"group": "group", "weight": "weight", "keep": ["site"]})
    assert again.classes == ["cat", "dog"]
    of_image = [int(again.images.load(i)[0, 0, 0]) for i in range(4)]  # the shard's order is random
    assert again.labels.tolist() == expected.labels[of_image].tolist()
    assert again.weights is not None
    assert again.weights.tolist() == [[1, 0.5, 2, 1][i] for i in of_image]
    assert [again.kept["site"][k] for k in range(4)] == [kept["site"][i] for i in of_image]


def test_unreadable_images_are_refused_or_left_out(images: Path, tmp_path: Path) -> None:
    copied(images, tmp_path / "images")
    bad = next((tmp_path / "images" / "train" / "3").iterdir())
    cut(bad, 40)
    data = DataConfig(dataset="imagefolder", root=str(tmp_path / "images"))
    with pytest.raises(UserError, match=f"1 of 130 images cannot be read: train/3/{bad.name}"):
        packed(data, tmp_path / "shards")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]  # nothing is left behind
    found = opened(packed(data.model_copy(update={"on_bad_image": "skip"}), tmp_path / "shards"))
    assert len(found.labels) == 129
    assert len(found.lists["train"]) == 79


def test_a_killed_packing_leaves_no_folder_and_the_next_begins_again(
    images: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, target = DataConfig(dataset="imagefolder", root=str(images)), tmp_path / "shards"

    def killed() -> None:
        monkeypatch.setattr(ShardIndex, "write", lambda self, path: os._exit(9))
        packed(data, target)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not target.exists()
    packed(data, target)
    assert sorted(os.listdir(tmp_path)) == ["shards"]
    assert sorted(os.listdir(target)) == sorted(os.listdir(folder))


def test_a_folder_with_files_is_not_packed_into(images: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        packed(DataConfig(dataset="imagefolder", root=str(images)), folder)


def test_the_command_packs_and_reports(images: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[recipe]\nname = "a"\n[data]\ndataset = "imagefolder"\nroot = {json.dumps(str(images))}\nimage_size = 8\n'
        '[model]\nsource = "toolkit"\nname = "convnet"\n[model.convnet]\nblocks = [{ channels = 4 }]\n'
        '[transfer]\nmode = "scratch"\n[optimizer]\nname = "sgd"\nlr = 0.1\n[train]\nepochs = 1\nbatch_size = 8\n'
    )
    outcome = toolkit("pack", recipe, tmp_path / "shards", "--json")
    assert outcome.status == 0, outcome.stderr
    assert json.loads(outcome.stdout)["images"] == 130
    assert len(opened(tmp_path / "shards").labels) == 130


# -- without an index -------------------------------------------------------------------------------------------------


Members = dict[str, bytes | str]


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(out, "png")
    return out.getvalue()


def tar(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_webdataset_tars_are_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar(
        tmp_path / "a-train-00.tar",
        {"x/0.seg.png": png(9), "x/0.png": png(0), "x/0.cls": "1\n", "x/1.PNG": png(1), "x/1.cls": "0"},
    )
    tar(tmp_path / "a-val-00.tar", {"2.cls": "1", "2.png": png(2)})
    for _ in range(2):
        found = opened(tmp_path, class_names=["cat", "dog"])
        assert found.classes == ["cat", "dog"]
        assert found.labels.tolist() == [1, 0, 1]
        assert found.lists["validation"].tolist() == [2]
        names = [found.images.name(i) for i in range(3)]
        assert names == ["a-train-00.tar/x/0.png", "a-train-00.tar/x/1.PNG", "a-val-00.tar/2.png"]
        assert [int(found.images.load(i)[0, 0, 0]) for i in range(3)] == [0, 1, 2]
        assert source(found).is_checked
        monkeypatch.setattr("toolkit.data.shard_source.scan", None)  # the second time, the index is kept
    assert [entry.kind for entry in list_entries(cache_root())] == ["shards"]
    clean(cache_root())
    assert list_entries(cache_root()) == []


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        ({"0.png": b"", "0.cls": "0", "1.png": b""}, {}, "1 row of ROOT cannot be used: row 2: a.tar/1.png: no label"),
        ({"0.png": b"", "0.json": '{"label": "a"}', "1.png": b"", "1.json": "["}, {}, "1.json is not a JSON object"),
        ({"0.cls": "1", "0.png": b"", "1.cls": "0"}, {}, "row 2: a.tar: no image"),
        ({"0.png": b"", "0.jpg": b"", "0.cls": "0"}, {}, "two images in one sample"),
        ({"0.png": b"", "0.cls": "0", "1.png": b"", "1.cls": "5"}, {"class_names": ["a", "b"]},
         "the label '5' is not in data.class_names"),
        ({"0.png": b"", "0.cls": "0"}, {"columns": {"label": "breed"}}, "ROOT has no column 'breed'"),
        ({"0.png": b"", "0.cls": "0"}, {}, "ROOT has only the class '0'"),
        ({}, {}, "a.tar has no files"),
    ],
)  # fmt: skip
def test_faulty_samples_are_named(tmp_path: Path, members: Members, settings: dict[str, Any], message: str) -> None:
    tar(tmp_path / "a.tar", members)
    assert message in error_of(tmp_path, **settings)


@pytest.mark.parametrize("size", [10240, 5000, 1600, 700])
def test_a_tar_that_was_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    tar(tmp_path / "a.tar", {f"{i}.{kind}": "0" * (kind == "cls") for i in range(12) for kind in ("cls", "png")})
    assert (tmp_path / "a.tar").stat().st_size > size
    cut(tmp_path / "a.tar", size)
    message = error_of(tmp_path)
    assert "ROOT/a.tar" in message
    assert "truncated" in message


def test_a_folder_without_shards_and_other_files_are_refused(tmp_path: Path) -> None:
    assert error_of(tmp_path) == "ROOT contains neither index.safetensors nor files that end in .tar or .parquet"
    assert "is not a folder" in error_of(tmp_path / "none")
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    assert "ROOT/a.tar cannot be read as an uncompressed tar file" in error_of(tmp_path)


# -- damaged shards and indexes ---------------------------------------------------------------------------------------


def test_a_packed_shard_that_was_cut_short_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    root = copied(folder, tmp_path / "shards")
    size = (root / "test-000000.tar").stat().st_size
    cut(root / "test-000000.tar", 9_000)
    assert f"ROOT/test-000000.tar has 9,000 bytes instead of {size:,}: it was truncated" in error_of(root)
    (root / "test-000000.tar").unlink()
    assert error_of(root) == "the shard ROOT/test-000000.tar cannot be read: No such file or directory"


def test_a_damaged_index_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    root = copied(folder, tmp_path / "shards")
    whole = (root / INDEX_NAME).read_bytes()
    for content in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1]), b"\xff" * 200):
        (root / INDEX_NAME).write_bytes(content)
        assert "ROOT/index.safetensors" in error_of(root)


def test_an_index_cannot_name_files_elsewhere(folder: Path, tmp_path: Path) -> None:
    index = ShardIndex.read(folder / INDEX_NAME)
    index.shards[0] = Shard("../shards/train-000000.tar", index.shards[0].size)
    index.write(tmp_path / INDEX_NAME)
    assert "not a plain file name" in error_of(tmp_path)


def test_keys_that_the_index_makes_superfluous_are_refused(folder: Path) -> None:
    message = "data.class_names has no effect: the index of ROOT contains classes and labels; remove the key"
    assert error_of(folder, class_names=["a", "b"]) == message


# -- shards at a URL --------------------------------------------------------------------------------------------------


@pytest.fixture
def url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URL of the shards in fsspec's file system in memory."""
    monkeypatch.setattr(shard_files, "PAUSES_S", (0.0, 0.0))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/images/", recursive=True)
    yield "memory://images"
    memory.rm("/images", recursive=True)


def loaded(dataset: Dataset) -> list[bytes]:
    return [read_bytes(source(dataset), i) for i in range(len(dataset.labels))]


def kept(dataset: Dataset) -> list[Path]:
    return sorted(fetched(dataset).folder.glob("*.tar"))


def test_images_at_a_url_are_those_of_the_folder_and_fetched_once(url: str, folder: Path) -> None:
    found = opened(url)
    assert check_images(found.images, np.arange(130), decode=False).bad == []
    assert kept(found) == []  # the index says that they were checked
    assert loaded(found) == loaded(opened(folder))
    assert len(kept(found)) == len(list(folder.glob("*.tar")))
    fsspec.filesystem("memory").rm("/images/train-000000.tar")
    assert loaded(opened(url)) == loaded(opened(folder))


def test_the_cache_keeps_to_its_limit_and_removes_what_was_not_used_for_the_longest_time(
    url: str, folder: Path
) -> None:
    limit = 70_000
    found = opened(url, cache_limit=limit / 2**30)
    files, names = fetched(found), [shard.name for shard in source(found).index.shards]
    for number in (0, 1, 0, 2):
        files.read(number, 0, 512)
        time.sleep(0.01)
    assert {path.name.split("-", 1)[1] for path in kept(found)} == {names[0], names[2]}
    for i in range(130):
        read_bytes(source(found), i)
        assert sum(path.stat().st_size for path in kept(found)) <= limit


def test_several_processes_share_a_cache_that_is_too_small(url: str, folder: Path) -> None:
    found, expected = opened(url, cache_limit=50_000 / 2**30), loaded(opened(folder))

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(130)[:60]:
            if read_bytes(source(found), int(i)) != expected[i]:
                os._exit(1)
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=read, args=(seed,)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(kept(found)) == 1
    assert list(fetched(found).folder.glob(".*.part")) == []


def test_what_a_killed_process_left_does_not_count(url: str) -> None:
    found = opened(url, cache_limit=50_000 / 2**30)
    left = fetched(found).folder / f".{fetched(found).path(1).name}.part"
    left.write_bytes(b"0" * 30_000)
    fetched(found).read(0, 0, 512)
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-512], ": the shard was truncated or replaced"),
        (lambda data: data[:-20480] + b"1" + data[-20479:], "its checksum differs from the one in the index"),
        (None, "train-000000.tar"),
    ],
)
def test_a_damaged_or_missing_shard_ends_the_run_with_one_sentence(
    url: str, change: Callable[[bytes], bytes] | None, message: str
) -> None:
    memory = fsspec.filesystem("memory")
    if change is None:
        memory.rm("/images/train-000000.tar")
    else:
        memory.pipe("/images/train-000000.tar", change(memory.cat("/images/train-000000.tar")))
    found = opened(url)
    with pytest.raises(RunFailed, match=message) as caught:
        [found.images.load(i) for i in range(130)]
    assert str(caught.value).startswith("memory://images/train-000000.tar could not be read")
    assert all("train-000000" not in path.name for path in kept(found))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("memory://nowhere", "data.root = 'ROOT' cannot be reached: /nowhere"),
        ("nosuch://bucket", "data.root = 'ROOT' cannot be reached: Protocol not known: nosuch"),
        ("adl://bucket/images", "data.root = 'ROOT' needs a package that is not installed"),
    ],
)
def test_a_url_that_cannot_be_reached_is_one_sentence(root: str, message: str) -> None:
    found = error_of(root)
    assert message in found
    assert "\n" not in found


def test_without_a_network_the_shards_in_the_cache_are_used(url: str, folder: Path) -> None:
    assert loaded(opened(url)) == loaded(opened(folder))
    fsspec.filesystem("memory").rm("/images", recursive=True)
    found = opened(url)
    assert "the index in the cache folder is used" in found.notes[0]
    assert loaded(found) == loaded(opened(folder))
    kept(found)[0].unlink()
    with pytest.raises(RunFailed, match="could not be read"):
        [found.images.load(i) for i in range(130)]
    fsspec.filesystem("memory").mkdir("/images")


def test_a_repacked_data_set_at_the_same_url_is_noticed(url: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    assert len(loaded(opened(url))) == 130
    digit_files(tmp_path / "fewer", train=3)
    packed(DataConfig(dataset="imagefolder", root=str(tmp_path / "fewer")), tmp_path / "again")
    memory.rm("/images", recursive=True)
    memory.put(f"{tmp_path}/again/", "/images/", recursive=True)
    assert loaded(opened(url)) == loaded(opened(tmp_path / "again"))


def test_shards_at_a_url_without_an_index_are_scanned(url: str, folder: Path) -> None:
    fsspec.filesystem("memory").rm("/images/index.safetensors")
    found = opened(url)
    assert sorted(loaded(found)) == sorted(loaded(opened(folder)))
    assert sorted(found.labels.tolist()) == sorted(opened(folder).labels.tolist())


def test_shards_are_fetched_over_http(folder: Path) -> None:
    pytest.importorskip("aiohttp")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    try:
        assert loaded(opened(root)) == loaded(opened(folder))
    finally:
        server.shutdown()
        server.server_close()
    assert "cannot be reached" in error_of(f"{root}/other")


def test_an_order_that_would_fetch_shards_again_and_again_is_refused(url: str) -> None:
    def message(**settings: Any) -> str:
        table = config(root=url, cache_limit=150_000 / 2**30, **settings)
        with pytest.raises(UserError) as caught:
            check_reading_order(open_dataset(table), table)
        return str(caught.value)

    assert "set data.shuffle_shards = 10" in message()
    assert "data.shuffle_shards = 4 needs room for two shards more than that" in message(shuffle_shards=4)
    for settings in ({"shuffle_shards": 2, "cache_limit": 150_000 / 2**30}, {}):
        table = config(root=url, **settings)
        check_reading_order(open_dataset(table), table)


# -- prefetch ---------------------------------------------------------------------------------------------------------


def test_the_next_shard_is_fetched_before_it_is_needed_and_no_more_than_one(url: str) -> None:
    found = opened(url)
    order = np.argsort(source(found).stored_in, kind="stable")
    batches = np.array_split(np.arange(130), 13)
    needed = [set(source(found).stored_in[order[batch]].tolist()) for batch in batches]
    prefetch = shard_prefetch(found.images, order, batches)
    assert prefetch is not None
    for requested in range(14):
        prefetch.advance(requested)
        expected = set().union(*needed[:requested])
        ahead = next((sorted(more - expected)[:1] for more in needed[requested:] if more - expected), [])
        until = time.monotonic() + 20
        while len(kept(found)) < len(expected) + len(ahead) and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(0.01)
        assert {path.name.split("-", 1)[1] for path in kept(found)} == {
            source(found).index.shards[number].name for number in {*expected, *ahead}
        }
    prefetch.finish()


def test_batches_are_the_same_with_a_prefetch_that_fails(url: str, folder: Path) -> None:
    """The data worker that needs the shard reports the fault, after the batches before it."""
    fsspec.filesystem("memory").rm("/images/train-000001.tar")
    found = opened(url)
    order = np.argsort(source(found).stored_in, kind="stable")
    transform = lambda pixels: torch.from_numpy(pixels.copy())  # noqa: E731
    batches = WorkerBatches(SplitDataset(found.images, found.labels, order, transform, 0), 1, False)
    requests = [BatchRequest(0, batch, batch) for batch in np.array_split(np.arange(130), 13)]
    labels: list[int] = []

    def load() -> None:
        for _, more in batches.batches(requests):
            labels.extend(more.tolist())

    with pytest.raises(RunFailed, match=r"train-000001\.tar could not be read"):
        load()
    before = int((source(found).stored_in == 0).sum())
    assert labels == found.labels[order][: before // 10 * 10].tolist()
