"""The environment of all tests: no network, one thread, and the real images if they are available."""

from __future__ import annotations

import gc
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before torch or wandb are imported anywhere; every process that a test starts inherits it.
os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline", WANDB_SILENT="true", HF_HUB_OFFLINE="1")
os.environ["TOOLKIT_CACHE"] = tempfile.mkdtemp(prefix="toolkit-cache-")  # for fixtures that tests share
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["TOOLKIT_CACHE"], "huggingface")

import pytest
import torch
from slurm_cluster import cluster, work_dir

from toolkit.report import plot_style
from toolkit.startup import COLLECT_AFTER

__all__ = ["cluster", "work_dir"]

torch.set_num_threads(1)
gc.set_threshold(COLLECT_AFTER)  # as the program does; tests and test modules take less CPU time


def _without_waiting_for_the_disk(descriptor: int) -> None:
    os.fstat(descriptor)  # raises as os.fsync does if nothing is open there


# os.fsync protects against a loss of power, which no test can cause: what a killed process wrote is in the page cache.
# Most test runs take less time than os.fsync would take to write their files to the disk. Tests that count or interrupt
# calls of os.fsync wrap this function, and processes that are started with `python -m` use the real one.
os.fsync = _without_waiting_for_the_disk

_drawn = plot_style._bytes


def _drawn_without_pdf(figure: Any, kind: str, **settings: Any) -> bytes:
    return b"" if kind == "pdf" else _drawn(figure, kind, **settings)


# A PDF file embeds parts of its fonts, which takes as much time as the rest of a report. Tests whose subject is not
# figures or names in them get empty PDF files; the others use the fixture `pdf_figures`.
plot_style._bytes = _drawn_without_pdf

# Autograd creates its threads at the first backward pass, one per device that it sees. After a test with fake GPUs it
# would create some, and no process could be forked any more; here it sees no GPU.
torch.zeros(1, requires_grad=True).sum().backward()

CACHES = Path(os.environ["TOOLKIT_CACHE"])
REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
ARCHIVES = ("caltech101-a.tar", "caltech101-b.tar", "cifar10.tar.xz", "cifar10-original-subset.npz")

SUBSET_CLASSES = (
    "Faces", "Leopards", "Motorbikes", "accordion", "airplanes", "anchor", "bonsai", "butterfly", "car_side", "chair",
)  # fmt: skip
"""All are in the first archive; every image of car_side is grayscale."""
SUBSET_TRAIN, SUBSET_TEST = 8, 4
"""Images per class in the subset's train.txt and test.txt."""


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Keep the order below with `--dist loadfile`, which otherwise starts with the files that have the most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with long tests first, and of these the ones on a cluster, so that all workers end at the same time."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: (item.path not in long, "slurm" not in item.path.name))


def pytest_collection_finish() -> None:
    """Leave the objects of imported modules out of garbage collections, which studies request after every run.

    There are half a million of them, and in forked processes each collection would copy their pages.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test an empty cache folder."""
    folder = Path(tempfile.mkdtemp(dir=CACHES)) / "cache"
    monkeypatch.setenv("TOOLKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def pdf_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write figures as PDF files as well."""
    monkeypatch.setattr(plot_style, "_bytes", _drawn)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHES, ignore_errors=True)


def _real_images() -> Path:
    """Return the folder in which the real images should be."""
    return Path(os.environ.get("TOOLKIT_TEST_DATA", SHARED / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with the archives of real images; skip the test if there is none."""
    folder = _real_images()
    missing = [name for name in ARCHIVES if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"no real images: {folder} lacks {', '.join(missing)} (set TOOLKIT_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def caltech_subset(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data root with 10 classes of Caltech-101, 8 training and 4 test images each, in the original layout.

    The lists keep the original lines for BACKGROUND_Google, whose images are missing.
    """
    root = tmp_path_factory.mktemp("data")
    home = root / "caltech101"
    with tarfile.open(shared_data / "caltech101-a.tar") as archive:
        wanted: list[str] = []
        home.mkdir()
        for name, count in (("train.txt", SUBSET_TRAIN), ("test.txt", SUBSET_TEST)):
            file = archive.extractfile(f"caltech101/{name}")
            assert file is not None
            lines = file.read().decode().split()
            kept = [line for c in SUBSET_CLASSES for line in [x for x in lines if x.startswith(f"{c}/")][:count]]
            wanted += kept
            background = [line for line in lines if line.startswith("BACKGROUND_Google/")]
            (home / name).write_text("\n".join(kept + background) + "\n")
        for line in wanted:
            member = archive.extractfile(f"caltech101/101_ObjectCategories/{line}")
            assert member is not None
            path = home / "101_ObjectCategories" / line
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(member.read())
    return root


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Make a skipped test fail on CI if it needs the real images and they are next to the repository."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    needs_images = "shared_data" in getattr(item, "fixturenames", ())
    if report.skipped and needs_images and os.environ.get("CI") and SHARED.is_dir():
        report.outcome = "failed"
        report.longrepr = f"skipped although CI is set and {SHARED} exists: {report.longrepr}"
