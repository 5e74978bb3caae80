"""The cache folder: entries are complete or absent, damage is detected, and limits on space are respected."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import toolkit

from toolkit.cache import store
from toolkit.cache.memory_budget import available_memory, free_disk
from toolkit.cache.store import (
    ABANDONED_S,
    CacheEntry,
    CacheEntryWriter,
    CorruptCacheEntry,
    cache_root,
    checksum,
    clean,
    content_key,
    find_entry,
    list_entries,
    remove_entry,
    remove_leftovers,
    try_lock,
    verify,
)

NAME = f"images-{'0' * 32}"
PARTS = [np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8) for i, size in enumerate((5000, 1, 9000))]
FACTS = {"kind": "images", "data": "toy", "images": 3, "what": "decode"}


def written(root: Path, name: str = NAME) -> CacheEntry:
    writer = CacheEntryWriter(root, name)
    blocks = [writer.add(part) for part in PARTS]
    return writer.publish(FACTS, {"shapes": np.arange(6)}, blocks)


def damaged(root: Path, name: str = NAME) -> str:
    """Return what is wrong with an entry; "" if nothing is."""
    store._verified.clear()  # as in a new process
    try:
        entry = find_entry(root, name)
        assert entry is not None
        list(verify(entry))
    except CorruptCacheEntry as error:
        return str(error)
    return ""


def test_an_entry_returns_what_was_written(tmp_path: Path) -> None:
    assert find_entry(tmp_path, NAME) is None
    written(tmp_path)
    entry = find_entry(tmp_path, NAME)
    assert entry is not None
    assert np.array_equal(entry.data(), np.concatenate(PARTS))
    assert np.array_equal(entry.tables["shapes"], np.arange(6))
    assert entry.facts["what"] == "decode"
    assert damaged(tmp_path) == ""
    with pytest.raises(ValueError, match="read-only"):
        entry.data()[0] = 1


def test_forked_processes_write_one_entry_concurrently(tmp_path: Path) -> None:
    writer = CacheEntryWriter(tmp_path, NAME)
    with multiprocessing.get_context("fork").Pool(3, _take, (writer,)) as pool:
        blocks = pool.map(_add, range(40), chunksize=1)
    writer.publish(FACTS, {}, blocks)
    assert damaged(tmp_path) == ""
    entry = find_entry(tmp_path, NAME)
    assert entry is not None
    assert entry.size == sum(100 + i for i in range(40))
    for i, (start, length, _) in enumerate(blocks):
        assert (entry.data()[start : start + length] == i).all()
        assert length == 100 + i


_writers: list[CacheEntryWriter] = []


def _take(writer: CacheEntryWriter) -> None:
    _writers.append(writer)


def _add(i: int) -> store.BlockRange:
    return _writers[0].add(np.full(100 + i, i, dtype=np.uint8))


@pytest.mark.parametrize("file", ["data.bin", "entry.npz"])
@pytest.mark.parametrize("kind", ["cut", "flipped", "gone"])
def test_damaged_entries_are_detected(tmp_path: Path, file: str, kind: str) -> None:
    path = written(tmp_path).folder / file
    content = bytearray(path.read_bytes())
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert damaged(tmp_path)
    remove_entry(tmp_path / NAME)
    written(tmp_path)
    assert not damaged(tmp_path)


def test_the_checksum_depends_on_every_byte() -> None:
    data = np.zeros(4096 * 2 + 100, dtype=np.uint8)
    plain = checksum(data)
    for index in (0, 7, 4095, 4096, 8191, 8192, len(data) - 1):
        data[index] = 1
        assert checksum(data) != plain, index
        data[index] = 0
    swapped = np.arange(4096 * 2, dtype=np.uint64).view(np.uint8)
    pages = swapped.reshape(-1, 4096)
    assert checksum(swapped) != checksum(pages[::-1].reshape(-1)), "the order of pages"


def test_of_two_published_entries_the_first_is_kept(tmp_path: Path) -> None:
    one, two = CacheEntryWriter(tmp_path, NAME), CacheEntryWriter(tmp_path, NAME)
    one.publish(FACTS, {}, [one.add(PARTS[0])])
    two.publish(FACTS, {}, [two.add(PARTS[0])])
    assert damaged(tmp_path) == ""
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_key_depends_on_every_value() -> None:
    keys = {content_key(parts) for parts in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": [1]}, {})}
    assert len(keys) == 6
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})


def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    lock = try_lock(tmp_path, NAME)
    assert lock is not None
    assert try_lock(tmp_path, NAME) is None
    lock.release()
    again = try_lock(tmp_path, NAME)
    assert again is not None
    again.release()


def test_a_removed_entry_stays_readable_where_it_is_open(tmp_path: Path) -> None:
    data = written(tmp_path).data()
    remove_entry(tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(data, np.concatenate(PARTS))
    remove_entry(tmp_path / NAME)  # already removed: nothing to do


def test_old_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    old, young = CacheEntryWriter(tmp_path, NAME), CacheEntryWriter(tmp_path, NAME)
    for writer in (old, young):
        writer.add(PARTS[0])
    foreign = tmp_path / ".config-of-somebody"
    foreign.mkdir()
    past = time.time() - ABANDONED_S - 60
    for path in (old.folder / "data.bin", old.folder, foreign):
        os.utime(path, (past, past))
    assert remove_leftovers(tmp_path) == 5000
    assert not old.folder.exists()
    assert young.folder.exists()
    assert foreign.exists()


def test_cleaning_keeps_files_that_are_not_cache_entries(tmp_path: Path, own_cache: Path) -> None:
    other = f"features-{'1' * 32}"
    written(own_cache), written(own_cache, other)
    (own_cache / "images-of-my-children").mkdir()
    (own_cache / "notes.txt").write_text("mine")
    month = time.time() - 30 * 86400
    os.utime(own_cache / other / "entry.npz", (month, month))
    assert [one.name for one in list_entries(own_cache)] == [NAME, other], "most recently used first"
    assert clean(own_cache, unused_s=86400)[0] == 1
    assert [one.name for one in list_entries(own_cache)] == [NAME]
    count, freed = clean(own_cache)
    assert count == 1
    assert freed > sum(part.size for part in PARTS)
    assert sorted(path.name for path in own_cache.iterdir()) == ["images-of-my-children", "notes.txt"]


def test_finding_an_entry_counts_as_use_and_listing_it_does_not(own_cache: Path) -> None:
    written(own_cache)
    month = time.time() - 30 * 86400
    os.utime(own_cache / NAME / "entry.npz", (month, month))
    assert list_entries(own_cache)[0].used == pytest.approx(month, abs=2)
    find_entry(own_cache, NAME)
    assert list_entries(own_cache)[0].used > month + 86400


def test_the_cache_command_lists_and_cleans(own_cache: Path) -> None:
    assert toolkit("cache").stdout == f"0 entries, 0.0 MiB in {own_cache}\n", "the folder need not exist"
    written(own_cache)
    shown = toolkit("cache").stdout
    assert "decode" in shown
    assert "toy" in shown
    assert "1 entry, " in shown
    (listed,) = json.loads(toolkit("cache", "--json").stdout)["entries"]
    assert listed["name"] == NAME
    assert listed["images"] == 3
    (own_cache / NAME / "entry.npz").write_text("{")
    assert "damaged: the checksum of entry.npz differs" in toolkit("cache").stdout
    assert toolkit("cache", "list", "--unused-days", "1").status == 2
    assert json.loads(toolkit("cache", "clean", "--json").stdout)["entries"] == 1
    assert list(own_cache.iterdir()) == []


def test_environment_variables_set_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    monkeypatch.delenv("TOOLKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "toolkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "toolkit"


def test_free_space_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    free = free_disk(tmp_path / "not" / "there")
    assert free == pytest.approx(free_disk(tmp_path), rel=0.5)
    assert free > 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 * 1024),
        ({"sys/fs/cgroup/memory.max": "max"}, 8000 * 1024),
        ({"sys/fs/cgroup/memory.max": "5000000", "sys/fs/cgroup/memory.current": "4000000"}, 1_000_000),
        (
            {
                "sys/fs/cgroup/job/memory.max": "5000000",
                "sys/fs/cgroup/job/memory.current": "4000000",
                "sys/fs/cgroup/job/memory.stat": "anon 1000000\ninactive_file 2000000\nactive_file 500000\n",
            },
            3_500_000,
        ),
        (
            {
                "sys/fs/cgroup/memory/old/memory.limit_in_bytes": "3000000",
                "sys/fs/cgroup/memory/old/memory.usage_in_bytes": "2000000",
                "sys/fs/cgroup/memory/old/memory.stat": "total_inactive_file 500000\ntotal_active_file 0\n",
            },
            1_500_000,
        ),
    ],
    ids=["no limit", "max", "version 2", "a job's group above, with file pages", "version 1"],
)
def test_free_memory_is_limited_by_the_cgroup(tmp_path: Path, files: dict[str, Any], expected: int) -> None:
    groups = "4:memory:/old\n0::/job/step\n"
    stat = {"sys/fs/cgroup/memory.stat": "anon 1\n"}
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n", "proc/self/cgroup": groups,
                       **stat, **files}.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_memory(tmp_path) == expected
