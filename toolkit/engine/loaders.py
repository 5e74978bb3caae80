"""What a run draws its batches from: images, or features of frozen layers computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.data.loading import (
    EvaluationLoader,
    TensorEvaluation,
    TensorLoader,
    TrainSource,
    evaluation_loader,
    train_loader,
    worker_count,
)
from toolkit.data.mixing import MixSettings, mix_settings
from toolkit.data.order import TrainPlan, balanced_weights, plan_evaluation
from toolkit.data.transforms import build_transform, try_transform
from toolkit.engine.features import compute_features, is_worthwhile, tail_of
from toolkit.engine.process import autocast_dtype, local_processes
from toolkit.engine.setup import Setup

Guard = Callable[[Any, int], Iterator[Any]]
"""Wraps a stream of batches so that all processes can agree to stop; the number is how often they ask."""


@dataclass
class Loaders:
    """Sources of training and evaluation batches."""

    train: TrainSource
    validation: EvaluationLoader | TensorEvaluation
    """As training needs it after each epoch: features, where training has features."""
    images: dict[str, EvaluationLoader]
    """Images of "validation" and "test", for the final evaluation of whole models."""
    rounds: dict[str, int]
    """Batches of the process that has most of them, for each evaluated split."""
    mixing: MixSettings | None
    tail: str | None
    """Name of the submodule that trains on features; None: the whole module trains on images."""
    shortcuts: list[str]
    """What was left out because it cannot change, in words."""

    def close(self) -> None:
        """End all worker processes."""
        for loader in (self.train, self.validation, *self.images.values()):
            loader.close()


def build_loaders(setup: Setup, guard: Guard, *, shortcuts: bool = True) -> Loaders:
    """Loaders for a setup whose model is on its device and has the weights it starts with (a collective)."""
    images = {split: _evaluation(setup, split) for split in ("validation", "test")}
    rounds = {split: _rounds(setup, split) for split in images}
    mixing = mix_settings(setup.recipe.augment)
    tail, reason = _usable_tail(setup) if shortcuts else (None, "")
    if reason:
        setup.display.say(f"frozen features are not kept: {reason}")
    if tail is None:
        return Loaders(_training(setup, mixing), images["validation"], images, rounds, mixing, None, [])
    train, validation = (_features(setup, tail, split, guard) for split in ("train", "validation"))
    count = len(train) + len(validation)
    shortcut = f"inputs of {tail} computed once for {count} images: all before it is frozen and nothing there is random"
    setup.display.say(f'shortcut: {shortcut}; data.cache = "off" turns it off')
    device = setup.accelerator.device
    labels = {split: torch.from_numpy(setup.labels(split)).to(device) for split in ("train", "validation")}
    source = TensorLoader(train.to(device), labels["train"], _plan(setup, mixing))
    evaluation = TensorEvaluation(
        validation.to(device),
        labels["validation"],
        batch_size=_eval_batch_size(setup),
        world=setup.accelerator.num_processes,
        rank=setup.accelerator.process_index,
    )
    return Loaders(source, evaluation, images, rounds, mixing, tail, [shortcut])


def _plan(setup: Setup, mixing: MixSettings | None) -> TrainPlan:
    table = setup.recipe.train
    return TrainPlan(
        size=len(setup.splits["train"]),
        seed=setup.recipe.recipe.seed,
        batch_size=table.batch_size,
        accumulation=table.accumulation,
        drop_last=table.drop_last,
        world=setup.accelerator.num_processes,
        rank=setup.accelerator.process_index,
        mixing=mixing is not None,
        weights=balanced_weights(setup.labels("train")) if table.sampling == "balanced" else None,
    )


def _training(setup: Setup, mixing: MixSettings | None) -> TrainSource:
    transform = build_transform("train", setup.recipe.augment, setup.preprocessing)
    indices = setup.splits["train"]
    try_transform(transform, setup.dataset.images, int(indices[0]))
    return train_loader(
        setup.dataset.images,
        setup.dataset.labels,
        indices,
        transform,
        _plan(setup, mixing),
        workers=_workers(setup),
        pin_memory=setup.accelerator.device.type == "cuda",
    )


def _evaluation(setup: Setup, split: str) -> EvaluationLoader:
    transform = build_transform(split, setup.recipe.augment, setup.preprocessing)
    indices = setup.splits[split]
    try_transform(transform, setup.dataset.images, int(indices[0]))
    return evaluation_loader(
        setup.dataset.images,
        setup.dataset.labels,
        indices,
        transform,
        seed=setup.recipe.recipe.seed,
        batch_size=_eval_batch_size(setup),
        world=setup.accelerator.num_processes,
        rank=setup.accelerator.process_index,
        workers=_workers(setup),
        pin_memory=setup.accelerator.device.type == "cuda",
    )


def _rounds(setup: Setup, split: str) -> int:
    world, count = setup.accelerator.num_processes, len(setup.splits[split])
    return max(len(plan_evaluation(count, _eval_batch_size(setup), world, rank)) for rank in range(world))


def _eval_batch_size(setup: Setup) -> int:
    return setup.recipe.train.eval_batch_size or setup.recipe.train.batch_size


def _workers(setup: Setup) -> int:
    return worker_count(setup.recipe.data.workers, setup.dataset.images, local_processes())


def _usable_tail(setup: Setup) -> tuple[str | None, str]:
    """The tail to train on features of, after trying it on two images; else None, and why where that is of interest."""
    tail = tail_of(setup.recipe, setup.transfer)
    if tail is None:
        return None, ""
    transform = build_transform("train", setup.recipe.augment, setup.preprocessing)
    two = [try_transform(transform, setup.dataset.images, int(i)) for i in setup.splits["train"][:2]]
    sample = torch.stack(two).to(setup.accelerator.device)
    count = len(setup.splits["train"]) + len(setup.splits["validation"])
    setup.transfer.train_mode()
    usable, reason = is_worthwhile(setup.built.module, tail, sample, count, local_processes())
    return (tail if usable else None), reason


def _features(setup: Setup, tail: str, split: str, guard: Guard) -> Tensor:
    """The tail's inputs for one split, under that split's own transform (a collective)."""
    loader = _evaluation(setup, split)
    count = len(setup.splits[split])
    with setup.display.bar(f"frozen features of {split}", count) as bar:

        def counted() -> Iterator[Any]:
            for batch in loader:
                yield batch
                bar.advance(len(batch.positions) * setup.accelerator.num_processes)

        features = compute_features(
            setup.built.module,
            tail,
            guard(counted(), _rounds(setup, split)),
            count,
            setup.accelerator.device,
            autocast_dtype=autocast_dtype(setup.accelerator.mixed_precision),
            channels_last=setup.recipe.train.channels_last,
        )
    loader.close()
    return features
