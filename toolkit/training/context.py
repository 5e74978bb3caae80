"""Build everything that training needs from a recipe: images, splits, preprocessing, model, transfer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator

from toolkit.data.channel_stats import channel_statistics
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.image_sources import EncodedImages, ImageCheckResult, check_images
from toolkit.data.preprocessing import (
    Preprocessing,
    eval_preprocessing,
    resolve_channels,
    resolve_preprocessing,
    training_stages,
)
from toolkit.data.sampling import RunLength, check_steps, run_length
from toolkit.data.shard_source import check_reading_order
from toolkit.data.splits import SPLITS, check_splits, describe_splits, split_dataset, split_hash
from toolkit.data.value_range import choose_range, describe_range
from toolkit.distributed.cpu_count import available_cpus
from toolkit.distributed.process import broadcast_object, local_processes, main_first, main_only
from toolkit.errors import UserError
from toolkit.formatting import batch_split, plural
from toolkit.hashing import json_hash
from toolkit.models.build import ModelBundle, build_model, check_sizes, expected_input
from toolkit.models.keyed_dropout import DropoutKeys, key_dropout_layers
from toolkit.models.neighbors import with_neighbors
from toolkit.models.transfer import Transfer, apply_transfer, describe_groups, layer_group_table
from toolkit.recipe.schema import DataConfig, Recipe
from toolkit.training.console import Console, table
from toolkit.training.distillation import Teacher, build_teacher
from toolkit.training.ema import check_swa_start, short_run_warning
from toolkit.training.lr_schedule import check_schedule, in_epochs, scheduled_rate
from toolkit.training.model_checks import batch_dependence, check_fit, check_gradients
from toolkit.training.single_value_batches import check_single_value_batches
from toolkit.training.task import Task, build_task, check_label_splits, check_labels
from toolkit.training.whitening import set_whitening_filters, whitening_filters, whitens

SHOWN = 10
"""Maximum number of unreadable images listed in a message."""


@dataclass
class TrainingContext:
    """A recipe and the objects built from it on this machine."""

    recipe: Recipe
    accelerator: Accelerator
    display: Console
    dataset: Dataset
    task: Task
    splits: dict[str, np.ndarray]
    """Indices into the data set of "train", "validation" and "test", int64."""
    preprocessing: Preprocessing
    """Preprocessing for evaluation and prediction, stored with the weights."""
    stages: list[Preprocessing]
    """Preprocessing for training, one for each of data.progressive_sizes; the model is built for the last one."""
    built: ModelBundle
    transfer: Transfer
    stochastic: DropoutKeys
    bad_images: list[str]
    """Unreadable images that were left out: name and reason of each."""
    not_exact: list[str] = field(default_factory=list)
    """What makes results depend on the number of processes, or a resumed run differ: sentences for the summary."""
    drawn: str = ""
    """Hash of the splits that the recipe defines; ``splits`` may differ in a resumed run whose data have changed."""
    accum_steps: int = 1
    """train.grad_accum_steps; if this is "auto", the number that was found (1 before)."""
    teacher: Teacher | None = None
    """The teacher of [distillation]."""

    def preprocessing_of(self, split: str) -> Preprocessing:
        """Return the preprocessing of a split; for "train", that of the last stage."""
        return self.stages[-1] if split == "train" else self.preprocessing

    def labels(self, split: str) -> np.ndarray:
        """Return the labels of a split's images: class indices, int64 [n], or multi-label, uint8 [n, K]."""
        labels: np.ndarray = self.dataset.labels[self.splits[split]]
        return labels

    def shards(self, split: str) -> np.ndarray | None:
        """Return the shard of each image of a split, int64 [N]; None unless data.shuffle_shards is set."""
        stored_in = getattr(getattr(self.dataset.images, "source", None), "stored_in", None)
        if stored_in is None or self.recipe.data.shuffle_shards is None:
            return None
        shards: np.ndarray = stored_in[self.splits[split]].astype(np.int64)
        return shards

    def shard_order(self, split: str) -> np.ndarray | None:
        """Return the positions in a split, sorted by shard, int64 [N]; None unless :meth:`shards` returns them."""
        shards = self.shards(split)
        return None if shards is None else np.argsort(shards, kind="stable")

    def has(self, split: str) -> bool:
        """Return whether a split has images; validation and test may be empty."""
        return len(self.splits[split]) > 0

    @functools.cached_property
    def batches_key(self) -> list[str | int | bool]:
        """Everything that determines an epoch's batches; resuming within an epoch requires that it is unchanged."""
        train, seed = self.recipe.train, self.recipe.recipe.seed
        key: list[str | int | bool]
        key = [split_hash(self.dataset, self.splits), seed, train.batch_size, train.drop_last, train.sampling]
        if self.recipe.augment.repeats > 1:
            key.append(self.recipe.augment.repeats)
        if train.virtual_processes is not None:
            key.append(train.virtual_processes)
        shards = self.shards("train")
        return key if shards is None else [*key, json_hash([self.recipe.data.shuffle_shards, shards.tolist()])]

    @property
    def length(self) -> RunLength:
        """Number of optimizer steps and epochs of the run."""
        return run_length(self.recipe.train, len(self.splits["train"]))

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.length.steps_per_epoch


def build_context(
    recipe: Recipe,
    accelerator: Accelerator,
    display: Console,
    *,
    load_weights: bool = True,
    choose_splits: Callable[[Dataset, dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
) -> TrainingContext:
    """Build everything (a collective). Raises UserError on all processes for problems that the user can fix.

    ``choose_splits``: called with the data set and the splits that the recipe defines; returns the splits to use.
    """
    train, world = recipe.train, accelerator.num_processes
    data, dataset, splits, bad_images = _open_images(recipe, accelerator, display)
    drawn = split_hash(dataset, splits)
    if choose_splits is not None:
        splits = choose_splits(dataset, splits)
    count = len(splits["train"])
    check_steps(count, train)
    length = run_length(train, count)
    _check_length(recipe, length)
    check_schedule(in_epochs(recipe.scheduler, length), length.exact_epochs - recipe.transfer.epochs_of_probe)
    weights = expected_input(recipe.model)
    preprocessing = resolve_preprocessing(
        data,
        weights,
        dataset.native_size,
        dataset.native_channels,
        lambda plain: _measure(accelerator, display, dataset, splits["train"], plain),
    )
    stages = training_stages(preprocessing, data, weights)
    evaluated = eval_preprocessing(preprocessing, data, weights)
    channels, size = preprocessing.channels, preprocessing.image_size
    sizes = {stage.image_size for stage in stages}

    def build() -> ModelBundle:
        torch.manual_seed(recipe.recipe.seed)
        found = build_model(recipe.model, len(dataset.classes), channels, size, load_weights=load_weights)
        return with_neighbors(found) if recipe.transfer.mode == "knn" else found

    built = main_first(accelerator, build)  # weights are downloaded once
    if whitens(recipe.model):
        first = recipe.model.convnet.blocks[0].kernel  # type: ignore[union-attr]
        set_whitening_filters(
            built.module,
            main_only(accelerator, lambda: whitening_filters(dataset.images, splits["train"], stages[0], first)),
        )
    transfer = apply_transfer(built, recipe.transfer)
    check_sizes(built, recipe.model, channels, sorted({*sizes, evaluated.image_size} - {size}))
    check_single_value_batches(built, transfer, train, count, world, channels, min(sizes, key=math.prod))
    check_gradients(transfer, recipe.model.name, channels, size, world, display.log)
    if recipe.transfer.is_fitted:
        check_fit(transfer, dataset, sum(map(len, splits.values())), channels, evaluated.image_size)
    faults = batch_dependence(recipe.model, built, channels, evaluated.image_size)
    for fault in faults:
        display.log(f"warning: {fault}")
    stochastic = key_dropout_layers(built.module, recipe.recipe.seed)
    setup = TrainingContext(
        recipe,
        accelerator,
        display,
        dataset,
        build_task(recipe.task, len(dataset.classes), recipe.train.metrics),
        splits,
        evaluated,
        stages,
        built,
        transfer,
        stochastic,
        bad_images,
        [*built.not_exact, *faults],
        drawn,
        train.min_accum_steps,
        build_teacher(recipe, accelerator, dataset.classes, preprocessing),
    )
    scheduled = length.steps - recipe.transfer.epochs_of_probe * length.steps_per_epoch
    check_swa_start(train, length.epochs)
    if warning := short_run_warning(train, scheduled):
        display.log(warning)
    every = recipe.optimizer.lookahead
    if every is not None and every > scheduled:
        raise UserError(
            f"optimizer.lookahead = {every}, but the run has only {plural(scheduled, 'step')}: the slow weights, which "
            "are evaluated, would never change. Set a smaller number"
        )
    return setup


def _check_length(recipe: Recipe, length: RunLength) -> None:
    """Raise UserError if a run is too short for its settings; `toolkit validate` checks this only for epochs."""
    run = f"the run, which has {plural(length.steps, 'step')}, {length.steps_per_epoch:,} per epoch"
    probe = recipe.transfer.epochs_of_probe
    if probe >= length.exact_epochs:
        raise UserError(f"transfer.probe_epochs = {probe} leaves no step for fine-tuning in {run}")
    schedule = recipe.scheduler
    if in_epochs(schedule, length).warmup_epochs >= length.exact_epochs - probe:
        steps = schedule.warmup_steps
        warmup = f"warmup_epochs = {schedule.warmup_epochs:g}" if steps is None else f"warmup_steps = {steps}"
        raise UserError(f"scheduler.{warmup} is not shorter than {run}")
    if recipe.transfer.unfreeze_at and max(recipe.transfer.unfreeze_at) > length.epochs:
        raise UserError(f"transfer.unfreeze_at: epoch {max(recipe.transfer.unfreeze_at)} is beyond {run}")
    if len(recipe.data.progressive_sizes or ()) > length.epochs:
        raise UserError(f"data.progressive_sizes has more sizes than there are epochs in {run}")


def _open_images(
    recipe: Recipe, accelerator: Accelerator, display: Console
) -> tuple[DataConfig, Dataset, dict[str, np.ndarray], list[str]]:
    """Open the data set, split it and leave out unreadable images (a collective).

    Returns the [data] table with the values that depend on the data set, the data set, its splits, and images left out.
    """
    data = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")
    dataset = main_first(accelerator, lambda: open_dataset(data))
    check_labels(dataset, recipe.task.kind)
    check_reading_order(dataset, data)
    splits = split_dataset(dataset, recipe.data)
    if dataset.is_multi_label:
        check_label_splits(dataset, splits)
    for note in (*dataset.notes, describe_splits(dataset, recipe.data)):
        display.log(note)
    checked = _check_images(recipe, accelerator, dataset, splits)
    splits, bad_images = _without_bad_images(recipe, display, dataset, splits, checked.bad)
    if isinstance(dataset.images, EncodedImages) and (value_range := choose_range(checked.extents)) is not None:
        display.log(describe_range(checked.extents, value_range))
        dataset = replace(dataset, images=dataset.images.with_range(value_range))
        data = data.model_copy(update={"value_range": list(value_range)})
    return data, dataset, splits, bad_images


def _measure(
    accelerator: Accelerator, display: Console, dataset: Dataset, indices: np.ndarray, plain: Preprocessing
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return channel means and standard deviations of training images, computed by the main process (a collective)."""
    values = None
    if accelerator.is_main_process:
        display.log(f"normalization: computing mean and std of {len(indices)} training images")
        values = channel_statistics(dataset.images, indices, plain, available_cpus(local_processes()))
    mean, std = broadcast_object(values)
    return tuple(mean), tuple(std)


def _check_images(
    recipe: Recipe, accelerator: Accelerator, dataset: Dataset, splits: dict[str, np.ndarray]
) -> ImageCheckResult:
    """Find unreadable images before the first epoch, on the main process (a collective).

    With on_bad_image = "error" files are opened but not decoded (cheap); with "skip" they are decoded, so that the same
    ones are left out on every process. Files with more than 8 bits per sample are decoded if their value range has to
    be determined.
    """
    checked = ImageCheckResult([], [])
    if accelerator.is_main_process:
        every = np.concatenate([splits[name] for name in SPLITS])
        decode, threads = recipe.data.on_bad_image == "skip", available_cpus(local_processes())
        checked = check_images(dataset.images, every, decode=decode, threads=threads)
    found: ImageCheckResult = broadcast_object(checked)
    return found


def _without_bad_images(
    recipe: Recipe,
    display: Console,
    dataset: Dataset,
    splits: dict[str, np.ndarray],
    bad: list[tuple[int, str]],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the splits without unreadable images, and a list of these images with reasons.

    If there are any, raises UserError unless data.on_bad_image is "skip", or if there are more of them than
    data.max_bad_fraction allows.
    """
    if not bad:
        return splits, []
    named = [f"{dataset.images.name(index)}: {reason}" for index, reason in bad]
    shown = "; ".join(named[:SHOWN]) + ("; ..." if len(named) > SHOWN else "")
    total = sum(len(indices) for indices in splits.values())
    if len(bad) == total and isinstance(dataset.images, EncodedImages):
        shown += f" (the first one should be at {dataset.images.source.location(bad[0][0])})"
    if recipe.data.on_bad_image != "skip":
        raise UserError(
            f"{len(bad)} of {total} images cannot be read: {shown}. Repair or remove them, or set "
            'data.on_bad_image = "skip"'
        )
    if len(bad) > recipe.data.max_bad_fraction * total:
        raise UserError(
            f"{len(bad)} of {total} images cannot be read, more than data.max_bad_fraction = "
            f"{recipe.data.max_bad_fraction:g} allows: {shown}"
        )
    kept = {name: indices[~np.isin(indices, [index for index, _ in bad])] for name, indices in splits.items()}
    check_splits(dataset, kept, [name for name in SPLITS if len(splits[name])])
    display.log(f"left out {len(bad)} unreadable images: {shown}")
    return kept, named


def _length_text(setup: TrainingContext) -> str:
    """Return the length of the run in epochs; in steps, too, if the last epoch ends early or the recipe gives steps."""
    length, train = setup.length, setup.recipe.train
    if length.steps == length.epochs * length.steps_per_epoch and train.steps is None:
        return plural(length.epochs, "epoch")
    return f"{plural(length.steps, 'step')} in all = {length.exact_epochs:.4g} epochs"


def describe(setup: TrainingContext, precision: str, *, whole: bool) -> str:
    """Return the overview logged before training: layer groups, parameters, images, steps, device and precision.

    ``whole``: also print the module.
    """
    recipe, train, built = setup.recipe, setup.recipe.train, setup.built
    module_text = f"\n{built.module}" if whole else ""
    rows = layer_group_table(setup.transfer, recipe.optimizer)
    cells = [
        (
            row.name,
            f"{row.parameters:,}",
            f"{row.trainable:,}",
            f"{row.lr:.3g}" if row.trainable and not recipe.transfer.is_fitted else "-",
            f"{row.weight_decay:.3g}" if row.trainable and not recipe.transfer.is_fitted else "-",
            row.batch_norm,
        )
        for row in rows
    ]
    total, trainable = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    cells.append(("all", f"{total:,}", f"{trainable:,}", "", "", ""))
    header = ("part", "parameters", "trainable", "lr", "weight decay", "batch norm")
    counts = ", ".join(f"{len(setup.splits[name]):,} {name}" for name in SPLITS)
    channels, sizes = setup.preprocessing.channels, list(dict.fromkeys(stage.image_size for stage in setup.stages))
    inputs = ", then ".join(f"{channels}x{height}x{width}" for height, width in sizes)
    if setup.preprocessing.image_size not in sizes or len(sizes) > 1:
        inputs += f" in training, {'x'.join(map(str, (channels, *setup.preprocessing.image_size)))} in evaluation"
    lines = [
        f"model {recipe.model.source} {recipe.model.name}, weights {recipe.model.weights}, "
        f"transfer {recipe.transfer.mode}{module_text}",
        *(f"  {note}" for note in built.notes),
        table(cells, header, frozenset((1, 2, 3, 4))),
        *describe_groups(built, recipe.optimizer),
        f"images {counts}; {plural(len(setup.dataset.classes), 'class', 'classes')}; input {inputs}",
        f"batch size {batch_split(train.batch_size, setup.accelerator.num_processes, setup.accum_steps)}; "
        f"{plural(setup.steps, 'step')} per epoch, {_length_text(setup)}",
        *([] if recipe.transfer.mode != "lp_ft" else [_describe_phases(setup)]),
        f"device {setup.accelerator.device}, precision {precision}",
    ]
    return "\n".join(lines)


def _describe_phases(setup: TrainingContext) -> str:
    length, probe = setup.length.exact_epochs, setup.recipe.transfer.epochs_of_probe
    lr = scheduled_rate(setup.recipe, 0, setup.length)
    return (
        f"linear probe for {plural(probe, 'epoch')} with learning rate {lr:.3g}, then fine-tuning for "
        f"{length - probe:.4g} epoch{'' if length - probe == 1 else 's'}; the table above is of the probe"
    )
