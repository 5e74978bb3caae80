"""How fast a recipe trains on this machine, and what holds it up: data alone, model alone, both together.

Everything is measured warm, several times, and given as medians. Nothing is written to a run directory.
"""

from __future__ import annotations

import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import PartialState

from toolkit.data.sampling import MicroBatch
from toolkit.distributed.process import init_accelerator
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import RunFailed, UserError
from toolkit.estimate.step_cost import flop_counter
from toolkit.recipe.schema import Recipe
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.evaluation import to_device
from toolkit.training.train_step import RunningMetrics, TrainCallbacks
from toolkit.training.trainer import Trainer

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "V100": 125.0, "T4": 65.0}
"""Dense matrix arithmetic of 16-bit floats, as the makers state it; found by a word of the device's name."""


@dataclass(frozen=True)
class BenchmarkResult:
    """Medians over the repetitions of one benchmark. Images are those of all processes together."""

    device: str
    precision: str
    batch_size: int
    steps: int
    """Steps of one repetition."""
    repeats: int
    data_images_per_s: float
    """Batches made and brought to the device, no training."""
    model_images_per_s: float
    """Forward, backward and optimiser on one batch that stays on the device."""
    step_images_per_s: float
    """The whole of training."""
    waiting_for_data: float
    """Share of the whole step's time spent waiting for the next batch, 0..1."""
    memory_mb: float
    """Most of this process's resident memory, on a GPU its own memory."""
    gflop_per_image: float
    """Arithmetic of forward and backward; a multiplication and an addition are two."""
    utilisation: float | None
    """Model arithmetic as a share of the device's peak, 0..1; None where that is not known."""
    shortcuts: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class _RepeatedBatch:
    """A loader that gives one batch, already on the device, over and over."""

    def __init__(self, micro_batches: list[tuple[MicroBatch, Any]], steps: int) -> None:
        self.micro_batches, self.steps = micro_batches, steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Any]]:
        for _ in range(self.steps):
            yield from self.micro_batches

    def close(self) -> None:
        """Nothing to end."""


class _EndlessLoader:
    """A loader's epochs in one stream: a repetition goes on where the last one stopped, and pays for no new start.

    The time spent waiting for batches is added up.
    """

    def __init__(self, loader: Any) -> None:
        self.loader, self.seconds = loader, 0.0
        self._batches = self._endless()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Any]]:
        """The next micro-batches, without end."""
        while True:
            began = time.perf_counter()
            item = next(self._batches)
            self.seconds += time.perf_counter() - began
            yield item

    def _endless(self) -> Iterator[tuple[MicroBatch, Any]]:
        for epoch in itertools.count():
            yield from self.loader.epoch(epoch)

    def close(self) -> None:
        """The loader is its owner's to end."""


def bench(recipe: Recipe, *, steps: int = 20, repeats: int = 5, peak_tflops: float | None = None) -> BenchmarkResult:
    """Measure a recipe on the processes that a launcher has started (a collective).

    Images come from the cache where the recipe's training would take them from there (it is built first, if need be),
    but not features: every image goes through the whole model. Raises UserError where an epoch has no step.
    """
    accelerator = init_accelerator(recipe.train)
    display = Console(speaks=accelerator.is_main_process)
    setup = build_context(recipe, accelerator, display)
    training = Trainer(setup, None, None, GracefulStop(), None, "images")
    steps = min(steps, setup.steps)
    if steps < 1:
        raise UserError("an epoch of this recipe has no step: nothing to measure")
    try:
        return _measure(training, steps, repeats, peak_tflops)
    finally:
        training.close()


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher has started."""
    return bool(PartialState().is_main_process)


def _measure(training: Trainer, steps: int, repeats: int, peak_tflops: float | None) -> BenchmarkResult:
    setup, accelerator, table = training.setup, training.accelerator, training.recipe.train
    setup.transfer.train_mode()
    images = sum(
        min(table.batch_size, len(setup.splits["train"]) - step * table.batch_size) for step in range(setup.steps)
    )
    per_step = images / setup.steps
    loader, device = training.loaders.train, accelerator.device
    first = _first_step(training)
    flops = _flops(training, first)

    def data() -> None:
        for _, batch in itertools.islice(stream.epoch(0), steps * table.grad_accum_steps):
            to_device(batch.images, device, table.channels_last)

    stream, repeated = _EndlessLoader(loader), _RepeatedBatch(first, steps)
    data_seconds = _median(data, repeats, device)
    model_seconds = _median(lambda: _train(training, repeated, steps), repeats, device)
    stream.seconds = 0.0
    step_seconds = _median(lambda: _train(training, stream, steps), repeats, device)
    rate = steps * per_step / step_seconds
    peak = peak_tflops or _peak(device, accelerator.mixed_precision)
    world = accelerator.num_processes
    return BenchmarkResult(
        device=_device_name(device),
        precision=accelerator.mixed_precision,
        batch_size=table.batch_size,
        steps=steps,
        repeats=repeats,
        data_images_per_s=steps * per_step / data_seconds,
        model_images_per_s=steps * table.batch_size / model_seconds,
        step_images_per_s=rate,
        waiting_for_data=min(1.0, stream.seconds / (repeats + 1) / step_seconds),
        memory_mb=_memory_mb(device),
        gflop_per_image=flops / 1e9,
        utilisation=None if peak is None else flops * rate / world / (peak * 1e12),
        shortcuts=training.loaders.shortcuts,
    )


def _first_step(training: Trainer) -> list[tuple[MicroBatch, Any]]:
    """The micro-batches of the first step, their images on the device."""
    found = []
    channels_last = training.recipe.train.channels_last
    for micro, batch in training.loaders.train.epoch(0):
        images = to_device(batch.images, training.accelerator.device, channels_last)
        found.append((micro, batch._replace(images=images, labels=batch.labels.to(images.device))))
        if micro.is_last:
            return found
    raise RunFailed("the first epoch gave no whole step")


def _train(training: Trainer, loader: Any, steps: int) -> None:
    """So many optimiser steps; ends early in the middle of an epoch."""
    sums = RunningMetrics.zero(training.accelerator.device)
    done = 0

    def after_step(_: int, __: RunningMetrics) -> bool:
        nonlocal done
        done += 1
        return done >= steps

    hooks = TrainCallbacks(lambda epoch: None, after_step, lambda *_: None)
    training.trainer.train_epoch(loader, 0, 0, sums, hooks)
    sums.figures(training.accelerator)  # waits for the device


def _median(work: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds of one call: the median, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        _wait_for(device)
        began = time.perf_counter()
        work()
        _wait_for(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops(training: Trainer, first: list[tuple[MicroBatch, Any]]) -> float:
    """Floating point operations of forward and backward, for one image."""
    images = sum(micro.own for micro, _ in first)
    with flop_counter() as counter:
        _train(training, _RepeatedBatch(first, 1), 1)
    return float(counter.get_total_flops() / max(images, 1))


def _peak(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in words), None)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


def compare_with_plain_loop(recipe: str, overrides: list[str], steps: int, repeats: int) -> dict[str, Any]:
    """What :mod:`toolkit.plain_loop` measures for the same recipe in a process of its own.

    Raises RunFailed if that process fails.
    """
    command = [sys.executable, "-m", "toolkit.plain_loop", recipe, "--steps", str(steps), "--repeats", str(repeats)]
    command += [part for setting in overrides for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunFailed(f"the plain loop failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def bench_text(speeds: BenchmarkResult, plain: dict[str, Any] | None = None) -> str:
    """For a terminal."""
    lines = [
        f"device           {speeds.device}, precision {speeds.precision}",
        f"batch size       {speeds.batch_size}; medians of {speeds.repeats} x {speeds.steps} steps",
        f"data only        {speeds.data_images_per_s:10,.1f} images/s",
        f"model only       {speeds.model_images_per_s:10,.1f} images/s",
        f"whole step       {speeds.step_images_per_s:10,.1f} images/s"
        f"   {speeds.step_images_per_s / speeds.model_images_per_s:.2f} of the model alone",
        f"waiting for data {speeds.waiting_for_data:10.1%}",
        f"memory           {speeds.memory_mb:10,.0f} MB",
        f"arithmetic       {speeds.gflop_per_image:10.3f} GFLOP an image, forward and backward",
    ]
    if speeds.utilisation is not None:
        lines.append(f"utilisation      {speeds.utilisation:10.1%} of the device's peak")
    lines += [f"shortcut: {shortcut}" for shortcut in speeds.shortcuts]
    if plain is not None:
        ratio = speeds.step_images_per_s / plain["step_images_per_s"]
        lines.append(
            f"plain loop       {plain['step_images_per_s']:10,.1f} images/s; this is {ratio:.2f} times as fast"
        )
    return "\n".join(lines)
