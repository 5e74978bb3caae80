"""Measure how long training takes on this machine's CPUs, before training."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import nn

from toolkit.cache.frozen_features import tail_of
from toolkit.data.sampling import run_length
from toolkit.estimate.resources import plan
from toolkit.formatting import duration
from toolkit.models.build import build_model
from toolkit.models.transfer import apply_transfer
from toolkit.recipe.schema import Recipe

BATCH = 16


def cpu_time(recipe: Recipe, processes: int, classes: int, images: Mapping[str, int]) -> tuple[float, str]:
    """Return the seconds that the model needs for all epochs on the CPUs of this machine, and how they were measured.

    ``classes``: their number. ``images``: number of images in each split. A batch of random images goes through the
    model, with random weights. If all layers but the last ones are frozen, each image needs one forward pass in all
    epochs, because features are cached. Reading the images is not included.
    """
    found = plan(recipe, processes, classes)
    size, channels = found.preprocessing.image_size, found.preprocessing.channels
    built = build_model(recipe.model, classes, channels, size, load_weights=False)
    is_frozen = tail_of(recipe, apply_transfer(built, recipe.transfer)) is not None
    epochs = run_length(recipe.train, images["train"]).exact_epochs
    passes = sum(images.values()) if is_frozen else epochs * images["train"]
    speed = BATCH / _seconds(built.module, torch.rand(BATCH, channels, *size), backward=not is_frozen)
    what = "each image once, because its features are cached" if is_frozen else recipe.train.length_text
    return passes / speed, f"{duration(passes / speed)}: {what}, at {speed:,.0f} images/s without reading them"


def _seconds(module: nn.Module, images: torch.Tensor, *, backward: bool) -> float:
    """Return the time of a batch, after a first one in which memory is allocated."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        with torch.set_grad_enabled(backward):
            logits = module(images)
            if backward:
                logits.sum().backward()
        times.append(time.perf_counter() - began)
    return times[-1]
