"""Estimate the resources a recipe needs: images, steps, parameters, memory, FLOPs, time.

Nothing is trained or downloaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from toolkit.cache.frozen_features import tail_of
from toolkit.data.dataset_info import info_of
from toolkit.data.datasets import open_dataset
from toolkit.data.preprocessing import (
    Preprocessing,
    eval_preprocessing,
    resolve_channels,
    resolve_preprocessing,
    training_stages,
)
from toolkit.data.sampling import RunLength, check_batch_size, check_steps, run_length
from toolkit.data.splits import split_dataset
from toolkit.distributed.process import autocast_dtype
from toolkit.errors import UserError
from toolkit.estimate.step_cost import Memory, StepCost, measure_memory, measure_step
from toolkit.formatting import batch_split, duration
from toolkit.models.build import ModelBundle, build_model, check_sizes, expected_input
from toolkit.models.transfer import Transfer, apply_transfer
from toolkit.recipe.image_size import size_text
from toolkit.recipe.schema import DataConfig, Recipe
from toolkit.runs import Run, runs_of


@dataclass(frozen=True)
class DatasetCounts:
    """Number of classes and images, and native image format, of a recipe's data set."""

    classes: int
    native_size: int | None
    native_channels: int
    images: dict[str, int] | None
    """Number of images in each split; None if the data are not on this machine."""
    absent: str
    """Why the images could not be counted; "" if they were."""


@dataclass(frozen=True)
class Throughput:
    """Throughput of an earlier run."""

    images_per_s: float
    """Images per second, summed over all processes."""
    run: str
    processes: int
    device: str


@dataclass(frozen=True)
class ResourceEstimate:
    """Everything shown by `toolkit plan`."""

    recipe: Recipe
    processes: int
    contents: DatasetCounts
    preprocessing: Preprocessing
    parameters: int
    trainable: int
    memory: Memory
    step: StepCost
    measured_by: str
    precision: str
    notes: list[str]
    speed: Throughput | None

    @property
    def micro_batch(self) -> int:
        """Number of images in a micro-batch of one process."""
        return self.recipe.train.batch_size // self.processes // self.recipe.train.min_accum_steps

    @property
    def length(self) -> RunLength | None:
        """Number of optimizer steps and epochs of the run; None if the number of images is unknown."""
        images = self.contents.images
        return run_length(self.recipe.train, images["train"]) if images else None

    @property
    def seconds(self) -> float | None:
        """Training time of all epochs at the measured speed, scaled to the number of processes; None if unknown."""
        if self.speed is None or self.contents.images is None or self.length is None:
            return None
        speed: float = self.speed.images_per_s * self.processes / self.speed.processes
        return self.contents.images["train"] * self.length.exact_epochs / speed

    def to_json(self) -> dict[str, Any]:
        """Return all values; sizes in bytes, times in seconds."""
        length = self.length
        return {
            "recipe": self.recipe.recipe.name,
            "images": self.contents.images,
            "classes": self.contents.classes,
            "input": [self.preprocessing.channels, *self.preprocessing.image_size],
            "epochs": self.recipe.train.epochs if length is None else length.epochs,
            "steps_per_epoch": None if length is None else length.steps_per_epoch,
            "steps": self.recipe.train.steps if length is None else length.steps,
            "batch_size": self.recipe.train.batch_size,
            "processes": self.processes,
            "grad_accum_steps": self.recipe.train.grad_accum_steps,
            "images_per_process": self.micro_batch,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "precision": self.precision,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "measured_by": self.measured_by,
            "forward_flops_per_image": self.step.forward_flops,
            "training_flops_per_image": self.step.training_flops,
            "throughput": asdict(self.speed) if self.speed else None,
            "seconds": self.seconds,
            "notes": self.notes,
        }


def plan(recipe: Recipe, processes: int = 1, classes: int | None = None) -> ResourceEstimate:
    """Estimate a recipe for a number of processes.

    ``classes``: number of classes, needed only if it depends on data that are missing. Raises UserError for a batch
    size that is not divisible by the processes and accumulation steps, and for anything that training would reject.
    """
    train = recipe.train
    check_batch_size(train, processes)
    contents = _contents(recipe.data, classes)
    if contents.images:
        check_steps(contents.images["train"], train)
    preprocessing = _preprocessing(recipe, contents)
    weights = expected_input(recipe.model)
    sizes = [stage.image_size for stage in training_stages(preprocessing, recipe.data, weights)]
    sizes.append(eval_preprocessing(preprocessing, recipe.data, weights).image_size)
    images = train.batch_size // processes // train.min_accum_steps
    shape = (images, preprocessing.channels, *preprocessing.image_size)
    precision, notes = _precision(recipe)
    if train.grad_accum_steps == "auto":
        notes.append('memory is that of 1 accumulation step; train.grad_accum_steps = "auto" takes more if necessary')
    if contents.absent:
        notes.insert(0, f"images and steps are left out: {contents.absent}")
    built, transfer, step, measured_by = _measure(recipe, contents.classes, shape, autocast_dtype(precision))
    others = sorted(set(sizes) - {preprocessing.image_size})
    check_sizes(built, recipe.model, preprocessing.channels, others)
    if others:
        shown = ", ".join(map(size_text, others))
        notes.append(f"memory and FLOPs are for {size_text(preprocessing.image_size)}; also used: {shown}")
    notes += _transfer_notes(recipe, transfer)
    if recipe.distillation is not None:
        notes.append("the memory and forward passes of the teacher of [distillation] are not included")
    parameters = list(built.module.parameters())
    return ResourceEstimate(
        recipe=recipe,
        processes=processes,
        contents=contents,
        preprocessing=preprocessing,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        memory=measure_memory(recipe, built, step, shape),
        step=step,
        measured_by=measured_by,
        precision=precision,
        notes=notes,
        speed=find_speed(recipe),
    )


def _contents(data: DataConfig, classes: int | None) -> DatasetCounts:
    """Count the images if the data are on this machine; otherwise use the known metadata of the data set."""
    try:
        dataset = open_dataset(data.model_copy(update={"download": False}))
    except UserError as error:
        facts = info_of(data.dataset, data.name)
        known = classes or facts.class_count(background_class=data.background_class)
        if known is None:
            message = f"{error}. Without the data the number of classes is unknown: set it with --classes"
            raise UserError(message) from None
        return DatasetCounts(known, facts.size, facts.channels, None, f"the data are not on this machine ({error})")
    images = {split: len(indices) for split, indices in split_dataset(dataset, data).items()}
    return DatasetCounts(len(dataset.classes), dataset.native_size, dataset.native_channels, images, "")


def _preprocessing(recipe: Recipe, contents: DatasetCounts) -> Preprocessing:
    """Resolve the preprocessing as in training, except for normalization statistics, which are not computed."""
    data = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")

    def unmeasured(plain: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return plain.mean, plain.std

    weights = expected_input(recipe.model)
    return resolve_preprocessing(data, weights, contents.native_size, contents.native_channels, unmeasured)


def _precision(recipe: Recipe) -> tuple[str, list[str]]:
    """Return the precision to assume, with a note if it is "auto", which depends on the machine."""
    wanted = recipe.train.precision
    if wanted != "auto":
        return wanted, []
    found = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    other = "no" if found == "bf16" else "bf16"
    return found, [
        f'train.precision = "auto" is "{found}" on this machine; '
        f"--set 'train.precision=\"{other}\"' estimates with the other"
    ]


def _measure(
    recipe: Recipe, classes: int, shape: tuple[int, int, int, int], dtype: torch.dtype | None
) -> tuple[ModelBundle, Transfer, StepCost, str]:
    """Build the model without weights and measure the cost of a step."""

    def build() -> tuple[ModelBundle, Transfer]:
        built = build_model(recipe.model, classes, shape[1], shape[2:], load_weights=False)
        transfer = apply_transfer(built, recipe.transfer)
        transfer.unfreeze_for_epoch(transfer.last_unfreezing)  # gradual, lp_ft: the final stage
        transfer.train_mode()
        return built, transfer

    try:
        with torch.device("meta"):
            built, transfer = build()
    except Exception:  # some constructors read tensor values; an error in the recipe is raised again
        built, transfer = build()
    step, measured_by = measure_step(built.module, shape, dtype)
    if recipe.optimizer.sam is not None:  # two forward and backward passes
        step = replace(step, training_flops=2 * step.training_flops)
    return built, transfer, step, measured_by


def _transfer_notes(recipe: Recipe, transfer: Transfer) -> list[str]:
    if recipe.transfer.mode == "gradual":
        return ["gradual unfreezing: parameters and memory are those with all layer groups unfrozen"]
    if recipe.transfer.mode == "lp_ft":
        return ["lp_ft: parameters, memory and time are those of fine-tuning; the probe before it needs less"]
    tail = tail_of(recipe, transfer)
    if tail is None:
        return []
    return [
        f"all layers before {tail} are frozen and deterministic: training may compute their outputs once and then run "
        f"{tail} alone, with far less memory and time than shown"
    ]


def find_speed(recipe: Recipe) -> Throughput | None:
    """Return the throughput of the most recent finished run that trained this recipe's model with equal settings."""
    for run in runs_of(recipe.recipe.run_root, recipe.recipe.name):
        try:
            if run.is_finished and _is_alike(run.recipe, recipe):
                summary = run.summary
                if summary["images_per_s"] == 0:
                    continue
                return Throughput(
                    summary["images_per_s"], str(run.path), summary["processes"], str(_device(run, summary["device"]))
                )
        except (UserError, KeyError):
            continue  # skip damaged and older runs
    return None


def _is_alike(one: Recipe, other: Recipe) -> bool:
    tables = ("model", "transfer")
    keys = ("batch_size", "grad_accum_steps", "precision", "compile", "channels_last")
    sizes = ("dataset", "image_size", "progressive_sizes", "resize", "cache")
    return (
        all(getattr(one, table) == getattr(other, table) for table in tables)
        and all(getattr(one.train, key) == getattr(other.train, key) for key in keys)
        and all(getattr(one.data, key) == getattr(other.data, key) for key in sizes)
    )


def _device(run: Run, kind: str) -> str:
    """Return the name of the run's device (such as a GPU model) if the run recorded it, else ``kind``."""
    return str(run.environment.get("device", kind))


def plan_text(found: ResourceEstimate) -> str:
    """Format the estimate for a terminal."""
    recipe, train, contents = found.recipe, found.recipe.train, found.contents
    memory = found.memory
    lines = [
        ("recipe", f"{recipe.recipe.name}: {recipe.model.source} {recipe.model.name}, weights {recipe.model.weights}, "
                   f"transfer {recipe.transfer.mode}"),
        ("images", ", ".join(f"{count:,} {split}" for split, count in (contents.images or {}).items()) or "unknown"),
        ("classes", f"{contents.classes}"),
        ("input", f"{found.preprocessing.channels} x {size_text(found.preprocessing.image_size)}"),
        ("steps", _steps_text(found)),
        ("batch", batch_split(train.batch_size, found.processes, train.min_accum_steps)),
        ("parameters", f"{found.parameters:,}, of which {found.trainable:,} are trained"),
        ("precision", found.precision),
        ("memory", f"{_size(memory.total)} on each device, measured by {found.measured_by}"),
        *[("", f"{_size(value):>10}  {word}") for word, value in _memory_rows(memory)],
        ("", "plus what libraries, kernel workspaces and the allocator use: often 1 to 2 GiB on a GPU"),
        ("arithmetic", f"{_flops(found.step.forward_flops)} per image forward, "
                       f"{_flops(found.step.training_flops)} forward and backward"),
        ("time", _time_text(found)),
        *[("note", note) for note in found.notes],
    ]  # fmt: skip
    return "\n".join(f"{word:<12}{text}" for word, text in lines)


def _memory_rows(memory: Memory) -> list[tuple[str, int]]:
    labels = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer state",
        "average": "average of the weights",
        "start": "pretrained weights before training",
        "sam": "copy of the weights for SAM",
        "activations": "activations kept for the backward pass",
        "images": "images",
    }
    return [
        (labels[key], value) for key, value in asdict(memory).items() if value or key not in ("average", "start", "sam")
    ]


def _steps_text(found: ResourceEstimate) -> str:
    text, length = found.recipe.train.length_text, found.length
    if length is None:
        return text
    if found.recipe.train.steps is not None:
        return f"{length.steps_per_epoch:,} per epoch, {length.steps:,} in {length.exact_epochs:.4g} epochs"
    return f"{length.steps_per_epoch:,} per epoch, {length.steps:,} in {text}"


def _time_text(found: ResourceEstimate) -> str:
    speed = found.speed
    if speed is None:
        root = Path(found.recipe.recipe.run_root) / found.recipe.recipe.name
        return f"no estimate: no finished run of this model and batch under {root}"
    at = f"{speed.images_per_s:,.0f} images/s measured on {speed.processes} x {speed.device} in {speed.run}"
    if speed.processes != found.processes:
        at += f", scaled to {found.processes} processes"
    return f"{duration(found.seconds)} of training ({at})" if found.seconds is not None else f"unknown ({at})"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _flops(count: float) -> str:
    return f"{count / 1e9:.2f} GFLOP" if count >= 1e8 else f"{count / 1e6:.2f} MFLOP"
