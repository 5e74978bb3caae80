"""Measure loading augmented 224-pixel batches of Caltech-101 on one core, with the toolkit's cache and a plain loader.

The plain loader is a DataLoader over Pillow and torchvision's transforms, image by image (toolkit/plain_loop.py). The
results are images per second of CPU time, of this process and its workers, so that idle cores do not count. One thread,
no training. The first pass, which builds the cache, reads all splits, as does the pass of the plain loader that it is
compared with; later passes read training images.

    python benchmarks/delivery.py recipes/resnet18_caltech.toml --set 'augment.train=[{name="RandomHorizontalFlip"}]'
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from toolkit.distributed.process import init_accelerator
from toolkit.plain_loop import ImageList, PlainLoop, default_pillow_allocation
from toolkit.recipe import load
from toolkit.recipe.schema import Recipe
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.loaders import build_loaders


def cpu_seconds() -> float:
    """Return the CPU time so far, of this process and of the workers that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def images_per_core_second(batches: Callable[[], Iterable[torch.Tensor]]) -> float:
    """Return images per CPU second of one pass, including what comes before its first batch."""
    before, images = cpu_seconds(), 0
    for batch in batches():
        images += len(batch)
    gc.collect()
    return images / (cpu_seconds() - before)


def measure(recipe: Recipe, passes: int) -> dict[str, Any]:
    """Measure both, the plain loader before and after the toolkit, to show changes of the machine's speed."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    plain = PlainLoop(recipe)
    train, validation = plain.train_loader.dataset, plain.validation_loader.dataset
    test = ImageList(validation, plain.splits["test"], validation.transform)
    setup = build_context(recipe, init_accelerator(recipe.train), Console(is_main=True))
    loaders: Any = None

    def ordinary(*splits: Any) -> Iterator[torch.Tensor]:
        with default_pillow_allocation():
            for split in splits:
                for images, _ in DataLoader(split, batch_size=recipe.train.batch_size, shuffle=split is train):
                    yield images

    def building() -> Iterator[torch.Tensor]:
        nonlocal loaders
        loaders = build_loaders(setup, lambda batches, rounds: batches)
        yield from later(0)
        for split in ("validation", "test"):
            for batch in loaders.evaluation(split)[0]:
                yield batch.images

    def later(epoch: int) -> Iterator[torch.Tensor]:
        for _, batch in loaders.train.epoch(epoch):
            yield batch.images

    measured: dict[str, Any] = {"images": {name: len(indices) for name, indices in setup.splits.items()}}
    measured["ordinary, all"] = images_per_core_second(lambda: ordinary(train, validation, test))
    measured["building, all"] = images_per_core_second(building)
    measured["ordinary"] = [images_per_core_second(lambda: ordinary(train))]
    measured["cached"] = [images_per_core_second(lambda epoch=epoch: later(epoch)) for epoch in range(1, passes + 1)]
    measured["ordinary"].append(images_per_core_second(lambda: ordinary(train)))
    measured["ratio, pass that builds"] = measured["building, all"] / measured["ordinary, all"]
    measured["ratio, later passes"] = statistics.median(measured["cached"]) / statistics.mean(measured["ordinary"])
    measured["what was cached"] = loaders.cached
    loaders.close()
    return measured


def main() -> None:
    """Parse the command line and print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    plain = ["data.workers=0", 'model.weights="none"', 'transfer.mode="scratch"']
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TOOLKIT_CACHE"] = folder
        print(json.dumps(measure(load(arguments.recipe, [*plain, *arguments.set]).recipe, arguments.passes)))


if __name__ == "__main__":
    main()
