"""Baseline of `toolkit bench --compare`: the loop a careful user would write with PyTorch and torchvision.

A Dataset that opens each JPEG with Pillow, torchvision's transforms on each image, a DataLoader with worker processes,
and the usual loop (forward, loss, backward, step, loss.item() for the progress line). Model, optimizer, precision and
batch size are those of the recipe, built the same way. What the toolkit adds is left out: exact sampling, resuming,
caches, batched augmentation.

    python -m toolkit.plain_loop recipes/resnet18_caltech.toml --steps 20 --repeats 5 [--set KEY=VALUE]

prints one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from toolkit.data.datasets import open_dataset
from toolkit.data.image_sources import BLOCKS_KEPT, EncodedImages, as_image
from toolkit.data.preprocessing import Preprocessing, eval_preprocessing, resolve_channels, resolve_preprocessing
from toolkit.data.splits import split_dataset
from toolkit.errors import UserError
from toolkit.models.build import build_model, expected_input
from toolkit.models.transfer import apply_transfer, param_groups
from toolkit.recipe import load
from toolkit.recipe.schema import Recipe
from toolkit.training.optimizer import build_optimizer


class ImageList(Dataset[Any]):
    """Map-style data set of the image files of one split."""

    def __init__(self, dataset: Any, indices: Any, transform: Any) -> None:
        self.images, self.labels, self.indices, self.transform = dataset.images, dataset.labels, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        index = int(self.indices[position])
        if isinstance(self.images, EncodedImages):
            with self.images.source.open(index) as file, Image.open(file) as opened:
                image = opened.convert("RGB")
        else:
            image = as_image(self.images.load(index))
        return self.transform(image), int(self.labels[index])


def transform_of(recipe: Recipe, preprocessing: Preprocessing, *, train: bool) -> Any:
    """Compose torchvision's transforms: resize, augmentations, crop, tensor conversion, normalization."""
    by_stage: dict[str, list[Any]] = {}
    for entry in recipe.augment.train if train else []:
        built = getattr(v2, entry.name)(**entry.arguments)
        if entry.apply_p < 1:
            built = v2.RandomApply([built], p=entry.apply_p)
        by_stage.setdefault(entry.stage or "after_crop", []).append(built)
    steps = [*by_stage.get("before_resize", [])]
    if "resize_crop" in by_stage:
        steps += by_stage["resize_crop"]
    else:
        if preprocessing.resize is not None:
            size = preprocessing.resize if isinstance(preprocessing.resize, int) else list(preprocessing.resize)
            resize = v2.Resize(size, InterpolationMode(preprocessing.interpolation))
            fits = preprocessing.border is not None
            keep_ratio = ResizeKeepRatio(size, longest=float(fits), interpolation=preprocessing.interpolation)
            steps.append(keep_ratio if preprocessing.cover or fits else resize)
        steps += by_stage.get("before_crop", [])
        fill = 0 if preprocessing.border is None else list(preprocessing.border)
        center = CenterCropOrPad(list(preprocessing.image_size), fill=fill)
        steps += by_stage.get("crop", [center] if preprocessing.crop else [])
    steps += [*by_stage.get("after_crop", []), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.Normalize(list(preprocessing.mean), list(preprocessing.std))])


@contextlib.contextmanager
def default_pillow_allocation() -> Iterator[None]:
    """Restore Pillow's default memory allocation; the toolkit makes Pillow keep freed blocks, which is faster."""
    Image.core.set_blocks_max(0)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        Image.core.set_blocks_max(BLOCKS_KEPT)  # type: ignore[attr-defined]


class PlainLoop:
    """Data loaders, model and optimizer of a recipe, in plain PyTorch."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.task.kind == "multi_label":
            raise UserError('the plain loop supports only task.kind = "single_label"')
        self.recipe = recipe
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(recipe.recipe.seed)
        data = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")
        dataset = open_dataset(data)
        self.splits = split_dataset(dataset, recipe.data)
        weights = expected_input(recipe.model)
        self.preprocessing = resolve_preprocessing(
            data,
            weights,
            dataset.native_size,
            dataset.native_channels,
            lambda plain: ((0.5,) * plain.channels, (0.5,) * plain.channels),
        )
        built = build_model(
            recipe.model, len(dataset.classes), self.preprocessing.channels, self.preprocessing.image_size
        )
        self.transfer = apply_transfer(built, recipe.transfer)
        self.model = built.module.to(self.device)
        self.optimizer = build_optimizer(recipe.optimizer, param_groups(built, recipe.transfer, recipe.optimizer))
        self.loss = nn.CrossEntropyLoss(label_smoothing=recipe.augment.label_smoothing)
        workers = max(1, len(os.sched_getaffinity(0)) - 1)
        train = ImageList(dataset, self.splits["train"], transform_of(recipe, self.preprocessing, train=True))
        evaluated = eval_preprocessing(self.preprocessing, data, weights)
        validation = ImageList(dataset, self.splits["validation"], transform_of(recipe, evaluated, train=False))
        common: dict[str, Any] = {
            "batch_size": recipe.train.batch_size,
            "num_workers": workers,
            "pin_memory": self.device.type == "cuda",
            "persistent_workers": True,
        }
        self.train_loader = DataLoader(train, shuffle=True, drop_last=recipe.train.drop_last, **common)
        self.validation_loader = DataLoader(validation, **common)

    def autocast(self) -> Any:
        """Return a bf16 autocast context if the recipe sets bf16, or "auto" on a GPU; otherwise a null context."""
        precision = self.recipe.train.precision
        if precision == "bf16" or (precision == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def endless(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield training batches, epoch after epoch."""
        while True:
            yield from self.train_loader

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Take one optimizer step and return its loss."""
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.loss(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return float(loss.item())

    @torch.no_grad()
    def validate(self) -> float:
        """Return the accuracy on the validation images, 0..1."""
        self.model.eval()
        right = 0
        for images, labels in self.validation_loader:
            with self.autocast():
                right += int((self.model(images.to(self.device)).argmax(1).cpu() == labels).sum())
        return right / len(self.splits["validation"])

    def epochs(self, count: int) -> float:
        """Train and validate for ``count`` epochs and return the duration in seconds."""
        began = time.perf_counter()
        for _ in range(count):
            self.transfer.train_mode()
            for images, labels in self.train_loader:
                self.step(images, labels)
            self.validate()
        return time.perf_counter() - began


def measure(recipe: Recipe, steps: int, repeats: int) -> dict[str, float]:
    """Measure images per second of data loading alone and of training: medians after one warm-up repetition."""
    loop = PlainLoop(recipe)
    loop.transfer.train_mode()
    batches = loop.endless()
    rates: dict[str, float] = {}
    for name in ("data", "step"):
        repetitions = []
        for _ in range(repeats + 1):
            began, images = time.perf_counter(), 0
            for _ in range(steps):
                batch, labels = next(batches)
                images += len(batch)
                if name == "step":
                    loop.step(batch, labels)
                else:
                    batch.to(loop.device)
            repetitions.append(images / (time.perf_counter() - began))
        rates[f"{name}_images_per_s"] = statistics.median(repetitions[1:])
    return rates


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=0, help="instead, measure the duration of this many epochs")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    recipe = load(arguments.recipe, arguments.set).recipe
    with default_pillow_allocation():
        if arguments.epochs:
            print(json.dumps({"seconds": PlainLoop(recipe).epochs(arguments.epochs)}))
        else:
            print(json.dumps(measure(recipe, arguments.steps, arguments.repeats)))


if __name__ == "__main__":
    main()
