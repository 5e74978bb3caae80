"""Benchmark of a recipe's training throughput on this machine: data loading alone, model alone, and whole steps.

Every measurement is repeated after a warm-up and reported as the median. Nothing is written to a run directory.
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
from toolkit.distributed.process import init_accelerator, leave
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
"""Dense 16-bit matrix TFLOP/s according to the manufacturers, by GPU model."""


@dataclass(frozen=True)
class BenchmarkResult:
    """Medians over the repetitions of a benchmark. Throughputs are summed over all processes."""

    device: str
    precision: str
    batch_size: int
    image_size: list[int]
    """Height and width of the inputs in pixels: data.image_size, the last one of progressive sizes."""
    is_progressive: bool
    """Whether the recipe has progressive sizes, of which only the last one was measured."""
    steps: int
    """Number of optimizer steps per repetition."""
    repeats: int
    data_images_per_s: float
    """Images per second when loading batches and copying them to the device, without training."""
    model_images_per_s: float
    """Images per second of forward, backward and optimizer on one batch that stays on the device."""
    step_images_per_s: float
    """Images per second of whole training steps."""
    waiting_for_data: float
    """Fraction of a step's time spent waiting for the next batch, 0..1."""
    memory_mb: float
    """Peak GPU memory allocated by this process; without a GPU, its peak resident memory."""
    gflop_per_image: float
    """Operations of forward and backward, in units of 10^9; a multiplication and an addition count as two."""
    utilization: float | None
    """Model FLOP/s as a fraction of the device's peak, 0..1; None if the peak is unknown."""
    cached: list[str]
    """Descriptions of what was read from the cache."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return asdict(self)


class _RepeatedBatch:
    """Loader that repeats one batch, which is already on the device."""

    def __init__(self, micro_batches: list[tuple[MicroBatch, Any]], steps: int) -> None:
        self.micro_batches, self.steps = micro_batches, steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Any]]:
        for _ in range(self.steps):
            yield from self.micro_batches


class _EndlessLoader:
    """Loader that chains epochs, so that a repetition continues where the last one stopped, without start-up cost.

    ``seconds`` accumulates the time spent waiting for batches.
    """

    def __init__(self, loader: Any) -> None:
        self.loader, self.seconds = loader, 0.0
        self._batches = self._endless()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, Any]]:
        """Yield the next micro-batches, endlessly."""
        while True:
            began = time.perf_counter()
            item = next(self._batches)
            self.seconds += time.perf_counter() - began
            yield item

    def _endless(self) -> Iterator[tuple[MicroBatch, Any]]:
        for epoch in itertools.count():
            yield from self.loader.epoch(epoch)


def bench(recipe: Recipe, *, steps: int = 20, repeats: int = 5, peak_tflops: float | None = None) -> BenchmarkResult:
    """Benchmark a recipe on the processes started by a launcher. Collective.

    Images come from the cache if training would read them from there (it is built first if necessary). Cached features
    are not used: every image passes through the whole model. Inputs have data.image_size, the last of progressive
    sizes; of transfer.mode = "lp_ft", fine-tuning is measured. Raises UserError if an epoch has no step.
    """
    is_progressive = recipe.data.progressive_sizes is not None
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"progressive_sizes": None})})
    if recipe.transfer.mode == "lp_ft":
        recipe = recipe.model_copy(update={"transfer": recipe.transfer.model_copy(update={"mode": "finetune"})})
    accelerator = init_accelerator(recipe.train)
    display = Console(is_main=accelerator.is_main_process)
    setup = build_context(recipe, accelerator, display)
    training = Trainer(setup, None, None, GracefulStop(), None, "images")
    steps = min(steps, setup.steps)
    if steps < 1:
        raise UserError("an epoch of this recipe has no step: nothing to measure")
    try:
        result = _measure(training, steps, repeats, peak_tflops, is_progressive)
        leave(accelerator)
        return result
    finally:
        training.loaders.close()


def is_main_process() -> bool:
    """Return whether this is rank 0."""
    return bool(PartialState().is_main_process)


def _measure(
    training: Trainer, steps: int, repeats: int, peak_tflops: float | None, is_progressive: bool
) -> BenchmarkResult:
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
        for _, batch in itertools.islice(stream.epoch(0), steps * len(first)):
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
        image_size=list(setup.stages[-1].image_size),
        is_progressive=is_progressive,
        steps=steps,
        repeats=repeats,
        data_images_per_s=steps * per_step / data_seconds,
        model_images_per_s=steps * table.batch_size / model_seconds,
        step_images_per_s=rate,
        waiting_for_data=min(1.0, stream.seconds / (repeats + 1) / step_seconds),
        memory_mb=_memory_mb(device),
        gflop_per_image=flops / 1e9,
        utilization=None if peak is None else flops * rate / world / (peak * 1e12),
        cached=training.loaders.cached,
    )


def _first_step(training: Trainer) -> list[tuple[MicroBatch, Any]]:
    """Return the micro-batches of the first step, on the device."""
    found = []
    channels_last = training.recipe.train.channels_last
    for micro, batch in training.loaders.train.epoch(0):
        images = to_device(batch.images, training.accelerator.device, channels_last)
        found.append((micro, batch._replace(images=images, labels=batch.labels.to(images.device))))
        if micro.is_last:
            return found
    raise RunFailed("the first epoch has no complete step")


def _train(training: Trainer, loader: Any, steps: int) -> None:
    """Train for ``steps`` optimizer steps, stopping in the middle of an epoch."""
    sums = RunningMetrics.zero(training.accelerator.device, training.recipe.train.virtual_processes)
    done = 0

    def after_step(_: int, __: RunningMetrics) -> bool:
        nonlocal done
        done += 1
        return done >= steps

    hooks = TrainCallbacks(lambda epoch: None, after_step, lambda *_: None)
    training.train_step.train_epoch(loader, 0, 0, sums, hooks)
    sums.means(training.accelerator)  # waits for the device


def _median(work: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Return the median duration of a call in seconds, after one warm-up call."""
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
    """Return the floating-point operations of forward and backward, per image."""
    images = sum(micro.own for micro, _ in first)
    with flop_counter() as counter:
        _train(training, _RepeatedBatch(first, 1), 1)
    return float(counter.get_total_flops() / max(images, 1))


def _peak(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    parts = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in parts), None)


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
    """Run :mod:`toolkit.plain_loop` on the same recipe in a separate process and return its measurements.

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
    """Format the results for a terminal."""
    lines = [
        f"device           {speeds.device}, precision {speeds.precision}",
        f"batch size       {speeds.batch_size}; medians of {speeds.repeats} x {speeds.steps} steps",
        f"input size       {' x '.join(map(str, speeds.image_size))}"
        + (", the last of data.progressive_sizes; earlier epochs are faster" if speeds.is_progressive else ""),
        f"data only        {speeds.data_images_per_s:10,.1f} images/s",
        f"model only       {speeds.model_images_per_s:10,.1f} images/s",
        f"whole step       {speeds.step_images_per_s:10,.1f} images/s"
        f"   {speeds.step_images_per_s / speeds.model_images_per_s:.2f} of the model alone",
        f"waiting for data {speeds.waiting_for_data:10.1%}",
        f"memory           {speeds.memory_mb:10,.0f} MB",
        f"arithmetic       {speeds.gflop_per_image:10.3f} GFLOP per image, forward and backward",
    ]
    if speeds.utilization is not None:
        lines.append(f"utilization      {speeds.utilization:10.1%} of the device's peak")
    lines += [f"cached: {description}" for description in speeds.cached]
    if plain is not None:
        ratio = speeds.step_images_per_s / plain["step_images_per_s"]
        lines.append(
            f"plain loop       {plain['step_images_per_s']:10,.1f} images/s; the toolkit is {ratio:.2f} times as fast"
        )
    return "\n".join(lines)
