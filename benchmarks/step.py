"""Compare the whole training step with the model alone and with timm's training loop, on batches in memory.

bare      the model alone: forward, loss, backward, optimizer, zero_grad, which every training loop needs
toolkit   the toolkit's epoch over the same batch, with everything else it does (exact sums, stop flags, finite check)
timm      timm's training loop: its loss, its optimizer by name, loss.item() for its meter, and its running average of
          losses. timm's train.py is not part of the package that pip installs, so this is a transcript of its loop,
          without its loader

All three run in one process, with the same model, memory format, precision and allocator, in turns.

    python benchmarks/step.py --model resnet18 --batch 32 --steps 8 --rounds 7
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm.optim
import timm.utils
import torch
from torch import nn

from toolkit.bench import _RepeatedBatch, _train
from toolkit.distributed.process import autocast_dtype, init_accelerator
from toolkit.distributed.signals import GracefulStop
from toolkit.recipe import load
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.trainer import Trainer

RECIPE = """
[recipe]
name = "step"

[data]
dataset = "digits"
image_size = {size}
channels = 3
normalize = "half"

[model]
source = "timm"
name = "{model}"

[optimizer]
name = "sgd"
lr = 0.01
momentum = 0.9

[train]
epochs = 1
batch_size = {batch}
precision = "{precision}"

[tracking]
trackers = []
"""


def ways(training: Trainer, batch: Any, steps: int) -> dict[str, Callable[[], None]]:
    """Return the three loops, each as a function that trains the given number of steps."""
    model, device = training.train_step.network, training.accelerator.device
    micro, content = batch
    images, labels = content.images, content.labels
    kind = autocast_dtype(training.accelerator.mixed_precision)
    loss_of = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    timm_optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
            return loss_of(model(images), labels)

    def bare() -> None:
        for _ in range(steps):
            forward().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def as_timm() -> None:
        losses = timm.utils.AverageMeter()
        for _ in range(steps):
            loss = forward()
            timm_optimizer.zero_grad()
            loss.backward()
            timm_optimizer.step()
            losses.update(loss.item(), len(images))

    repeated = _RepeatedBatch([(micro, content)], steps)
    return {"bare": bare, "toolkit": lambda: _train(training, repeated, steps), "timm": as_timm}


def measure(model: str, size: int, batch: int, precision: str, steps: int, rounds: int) -> dict[str, Any]:
    """Return images per second of each loop: medians over the rounds, each of which runs all three."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.toml"
        path.write_text(RECIPE.format(model=model, size=size, batch=batch, precision=precision))
        recipe = load(path).recipe
    accelerator = init_accelerator(recipe.train)
    setup = build_context(recipe, accelerator, Console(is_main=True, shows=False))
    training = Trainer(setup, None, None, GracefulStop(), None, "images")
    setup.transfer.train_mode()
    loops = ways(training, first_step(training), steps)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name in turned(list(loops), number):
            began = time.perf_counter()
            loops[name]()
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    training.close()
    median = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    by_round = zip(seconds["toolkit"][1:], seconds["bare"][1:], strict=True)
    return {
        "model": model,
        "batch": batch,
        "precision": accelerator.mixed_precision,
        "images_per_s": {name: round(steps * batch / each, 1) for name, each in median.items()},
        "toolkit / bare": statistics.median(bare / ours for ours, bare in by_round),
        "toolkit / timm": median["timm"] / median["toolkit"],
    }


def turned(names: list[str], by: int) -> list[str]:
    """Return the names in an order that changes from round to round."""
    return names[by % len(names) :] + names[: by % len(names)]


def first_step(training: Trainer) -> Any:
    """Return the first batch of the first epoch, on the device."""
    steps: Iterator[Any] = training.loaders.train.epoch(0)
    micro, batch = next(steps)
    images = batch.images.to(training.accelerator.device).contiguous(memory_format=torch.channels_last)
    return micro, batch._replace(images=images, labels=batch.labels.to(images.device))


def main() -> None:
    """Parse the command line and print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    print(json.dumps(measure(a.model, a.size, a.batch, a.precision, a.steps, a.rounds)))


if __name__ == "__main__":
    main()
