"""Measure loading images from shards on one core with the toolkit, timm's tar reader, and webdataset.

All read tar files of Caltech-101, packed by the toolkit, with one thread and no workers: timm reads all of them,
webdataset and the toolkit's "load" only those of training images. The results are images per second of CPU time. "read"
returns the encoded bytes in random order (webdataset: with a buffer of 1,000); "load" returns batches of model inputs:
decode, resize to 256, crop to 224, normalize. Each decodes with its default decoder: the toolkit with simplejpeg if it
is installed, the others with Pillow; "toolkit, Pillow" is the toolkit without simplejpeg. webdataset is not a
dependency of the project:

    pip install webdataset
    python benchmarks/shards.py recipes/resnet18_caltech.toml --set 'data.root="data"'
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import webdataset
from timm.data import create_transform
from timm.data.dataset import ImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import DataLoader

from toolkit.data import jpeg_decoding
from toolkit.data.datasets import open_dataset
from toolkit.data.encoded_sources import read_bytes
from toolkit.data.image_sources import EncodedImages
from toolkit.data.shard_pack import pack
from toolkit.distributed.process import init_accelerator
from toolkit.recipe import load
from toolkit.recipe.schema import Recipe
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.loaders import build_loaders

BATCH = 64


def images_per_core_second(images: Iterable[Any], count: int) -> float:
    """Return images per second of CPU time for ``count`` images; an item is an image, or a batch if it has a length."""
    before, done = time.process_time(), 0
    for item in images:
        done += len(item) if isinstance(item, torch.Tensor) else 1
        if done >= count:
            break
    return done / (time.process_time() - before)


def toolkit_loader(recipe: Recipe) -> Callable[[], Iterator[torch.Tensor]]:
    """Return a function that yields the batches of a new epoch."""
    setup = build_context(recipe, init_accelerator(recipe.train), Console(is_main=True), load_weights=False)
    loader, epochs = build_loaders(setup, lambda batches, rounds: batches).train, iter(range(1000))
    return lambda: (batch.images for _, batch in loader.epoch(next(epochs)))


def measure(recipe: Recipe, folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Measure all loaders alternately; return their medians, and the toolkit's divided by those of the others."""
    pack(recipe.data, folder, 32 * 2**20, lambda text: None)
    urls = sorted(str(path) for path in folder.glob("train-*.tar"))
    data = recipe.data.model_copy(update={"dataset": "shards", "root": str(folder), "cache": "off"})
    recipe = recipe.model_copy(update={"data": data})
    images = open_dataset(data).images
    assert isinstance(images, EncodedImages)
    source, order = images.source, np.random.default_rng(0).permutation(len(images))
    batches = toolkit_loader(recipe)
    transform = create_transform(224, is_training=False, interpolation="bilinear", crop_pct=0.875)
    reader = ReaderImageInTar(str(folder))
    shuffled = np.random.default_rng(0).permutation(len(reader))

    def timm_batches() -> Iterator[torch.Tensor]:
        dataset = ImageDataset(str(folder), reader=reader, transform=transform)
        return (inputs for inputs, _ in DataLoader(dataset, BATCH, sampler=shuffled.tolist()))

    def webdataset_batches() -> Iterator[torch.Tensor]:
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000).decode("pil")
        dataset = (
            dataset.rename(image="jpg;png")
            .to_tuple("image", "cls")
            .map_tuple(lambda image: transform(image.convert("RGB")), int)
        )
        return (inputs for inputs, _ in DataLoader(dataset, BATCH))

    def webdataset_bytes() -> Iterator[Any]:
        return iter(webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000))

    cases: dict[str, Callable[[], Iterable[Any]]] = {
        "read: toolkit": lambda: (read_bytes(source, i) for i in order.tolist()),
        "read: timm": lambda: (reader[i][0].read() for i in shuffled.tolist()),
        "read: webdataset": webdataset_bytes,
        "load: toolkit": batches,
        "load: toolkit, Pillow": batches,
        "load: timm": timm_batches,
        "load: webdataset": webdataset_batches,
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, images_of in cases.items():
            simplejpeg = None if name.endswith("Pillow") else jpeg_decoding.simplejpeg
            wanted = count if name.startswith("load") else len(images)
            with mock.patch.object(jpeg_decoding, "simplejpeg", simplejpeg):
                found[name].append(images_per_core_second(images_of(), wanted))
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = {
        name: medians[f"{name.partition(':')[0]}: toolkit"] / value
        for name, value in medians.items()
        if "toolkit" not in name
    }
    load_average = os.getloadavg()[0]
    return {"images per CPU second": found, "medians": medians, "multiples": ratios, "load average": load_average}


def main() -> None:
    """Parse the command line and print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    plain = ["data.workers=0", 'model.weights="none"', 'transfer.mode="scratch"', "augment.train=[]"]
    plain += [f"train.batch_size={BATCH}", "train.drop_last=false"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TOOLKIT_CACHE"] = f"{folder}/cache"
        recipe = load(arguments.recipe, [*plain, *arguments.set]).recipe
        print(json.dumps(measure(recipe, Path(folder) / "shards", arguments.images, arguments.rounds), indent=2))


if __name__ == "__main__":
    main()
