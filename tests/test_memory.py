"""Resident memory of a run does not grow from epoch to epoch."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
from trainers import EMA, STATEFUL, Trainers, write_recipe

from toolkit.training.trainer import Trainer

pytestmark = pytest.mark.long

GROWTH = 1.05
WARM_UP = 0.25
"""Share of the epochs after which the first figure is taken."""


def record_memory(path: Path, rank: int) -> None:
    """Make a process record its resident memory pages at the end of every epoch."""
    close_epoch = Trainer._close_epoch

    def recorded(training: Trainer, *arguments: Any) -> None:
        close_epoch(training, *arguments)
        with open(path, "a") as file:
            file.write(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1] + "\n")

    Trainer._close_epoch = recorded  # type: ignore[method-assign]


def growth(folder: Path, epochs: int, workers: int) -> float:
    """Return the ratio of resident memory at the end to that after the warm-up."""
    settings = ("--set", f"train.epochs={epochs}", "--set", f"data.workers={workers}", "--set", 'data.cache="off"')
    prepare = functools.partial(record_memory, folder / "pages")
    trainers = Trainers(1, folder, write_recipe(folder, STATEFUL), *EMA, *settings, prepare=prepare)
    assert trainers.wait(280) == [0], trainers.text()
    pages = [int(line) for line in (folder / "pages").read_text().split()]
    assert len(pages) == epochs
    return pages[-1] / pages[int(epochs * WARM_UP)]


@pytest.mark.extended
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_does_not_grow(tmp_path: Path, workers: int) -> None:
    assert growth(tmp_path, 24, workers) < GROWTH


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_does_not_grow_over_two_hundred_epochs(tmp_path: Path, workers: int) -> None:
    ratio = growth(tmp_path, 200, workers)
    print(f"resident memory after 200 epochs with {workers} workers: {ratio:.4f} of that after 50")
    assert ratio < GROWTH
