"""Training and evaluation batches of a run: images, or precomputed features of a frozen backbone."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from toolkit.augment.mixup import is_mixed
from toolkit.augment.transforms import UInt8Transform, try_transform
from toolkit.cache.distributed import DistributedCache, Guard
from toolkit.cache.frozen_features import Features, tail_of
from toolkit.cache.image_cache import SplitImages, split_of
from toolkit.cache.teacher_outputs import compute_teacher_outputs, why_not_computed_once
from toolkit.data.dataloader import (
    EVALUATION,
    BatchSource,
    EvaluationLoader,
    ProgressiveTrainLoader,
    SplitDataset,
    TrainLoader,
    WorkerBatches,
    worker_count,
)
from toolkit.data.pipeline import DevicePreprocessor, PreprocessingPlan, plan_preprocessing
from toolkit.data.preprocessing import Preprocessing, stage_of
from toolkit.data.sampling import IntArray, SamplingPlan, balanced_weights, plan_evaluation
from toolkit.data.splits import SPLITS
from toolkit.data.tensor_loader import TensorBatches
from toolkit.distributed.process import local_processes
from toolkit.errors import UserError
from toolkit.recipe.image_size import size_text
from toolkit.training.context import TrainingContext
from toolkit.training.distillation import Teacher

EVALUATION_ROWS, EVALUATION_BYTES = 4096, 64 * 2**20
"""Upper limits of a process's evaluation batch of features, in rows and in bytes; the smaller one applies."""

CachePolicy = Literal["all", "images", "none"]


@dataclass
class ImageLoaders:
    """Image batches of each split, from the data set or from the cache."""

    setup: TrainingContext
    plans: dict[str, PreprocessingPlan]
    """Plans by split; with progressive sizes one for each stage: "train at 128 x 128", ..., and "train", the last."""
    cached: SplitImages

    def training(self, plan: SamplingPlan) -> TrainLoader:
        """Return the loader of training batches."""
        stages, epochs = self.setup.stages, self.setup.length.epochs
        if len(stages) == 1:
            return TrainLoader(self.batches("train"), plan)
        names = [stage_name(self.setup, stage) for stage in stages]
        return ProgressiveTrainLoader(self.batches, lambda epoch: names[stage_of(epoch, epochs, len(names))], plan)

    def evaluation(self, split: str, batches: list[IntArray], view: int = EVALUATION) -> EvaluationLoader:
        """Return a loader of the given batches of a split; each batch is an array of positions in the split."""
        return EvaluationLoader(self.batches(split, most_workers=len(batches)), batches, view)

    def batches(self, split: str, most_workers: int = sys.maxsize) -> BatchSource:
        """Return the source of a split's batches: from one tensor if the cache has one, else by data workers."""
        setup, plan = self.setup, self.plans[split]
        device, indices = setup.accelerator.device, setup.splits[split_of(split)]
        channels_last = setup.recipe.train.channels_last
        if split in self.cached.rows:
            tensor, row_indices = self.cached.rows[split]
            on_device = DevicePreprocessor(plan, device, channels_last=channels_last)
            prefetch = device if device.type == "cuda" and tensor.device.type == "cpu" else None
            return TensorBatches([tensor], setup.labels(split_of(split)), row_indices[indices], on_device, prefetch)
        workers = min(worker_count(setup.recipe.data.workers, setup.dataset.images, local_processes()), most_workers)
        done = self.cached.done[split]
        rest = plan.transform.after(done) if done else plan.transform
        transform: Any = rest
        finish = None
        # Without a cache, evaluation preprocesses image by image, which is the reference for all other methods.
        if plan.batched is not None and (done or not plan.is_exact):
            transform = UInt8Transform(rest, plan.steps - done)
            finish = DevicePreprocessor(plan, device, channels_last=channels_last, beside_workers=workers > 0)
        images, seed = self.cached.images[split], setup.recipe.recipe.seed
        dataset = SplitDataset(images, setup.dataset.labels, indices, transform, seed)
        return WorkerBatches(dataset, workers, device.type == "cuda", finish)


def stage_name(setup: TrainingContext, stage: Preprocessing) -> str:
    """Return the split name of a training stage, such as "train at 128 x 128"; "train" for the last stage."""
    if stage.image_size == setup.stages[-1].image_size:
        return "train"
    return f"train at {size_text(stage.image_size)}"


@dataclass
class DataLoaders:
    """The loaders of training and evaluation batches."""

    setup: TrainingContext
    images: ImageLoaders
    train: TrainLoader
    features: Features | None
    """Precomputed inputs of the trainable tail, if the backbone is frozen and features are cached."""
    made: dict[str, tuple[EvaluationLoader, int]] = field(default_factory=dict)

    @property
    def tail(self) -> str | None:
        """Name of the submodule that is trained on cached features; None if the whole module is trained on images."""
        return None if self.features is None else self.features.tail

    @property
    def cached(self) -> list[str]:
        """Descriptions of what is cached."""
        return [*([] if self.features is None else [self.features.description]), *self.images.cached.descriptions]

    def evaluation(self, split: str) -> tuple[EvaluationLoader, int]:
        """Return a split's batches (of features if training uses them) and the largest number that any process has.

        A collective on the first call for a split.
        """
        if split not in self.made:
            self.made[split] = self._evaluation(split)
        return self.made[split]

    def _evaluation(self, split: str) -> tuple[EvaluationLoader, int]:
        accelerator, size = self.setup.accelerator, _eval_batch_size(self.setup)
        rows = None if self.features is None else self.features.rows(split)
        count, world, virtual = len(self.setup.splits[split]), accelerator.num_processes, self.train.plan.virtual
        if rows is not None:
            at_once = min(EVALUATION_ROWS, EVALUATION_BYTES // (rows[0][0].numel() * 4))
            size = max(size, at_once * (virtual or world))
        shares = [plan_evaluation(count, size, world, rank, virtual) for rank in range(world)]
        mine, rounds = shares[accelerator.process_index], max(len(share) for share in shares)
        if rows is None:
            order = self.setup.shard_order(split)
            return self.images.evaluation(split, mine if order is None else [order[batch] for batch in mine]), rounds
        return EvaluationLoader(TensorBatches(rows, self.setup.labels(split)), mine), rounds

    def use_accum_steps(self, number: int) -> None:
        """Divide the batches of later epochs, and of evaluations, for another number of accumulation steps."""
        self.train.plan = replace(self.train.plan, grad_accum_steps=number)
        for loader, _ in self.made.values():
            loader.close()
        self.made.clear()

    def close(self) -> None:
        """Stop all worker processes and release memory maps."""
        self.train.close()
        for loader, _ in self.made.values():
            loader.close()
        self.images.cached.release()
        if self.features is not None:
            self.features.release()


def build_loaders(setup: TrainingContext, guard: Guard, cache_policy: CachePolicy = "all") -> DataLoaders:
    """Build the loaders; the model must be on its device and have its initial weights (a collective).

    ``cache_policy``: what may be cached if the recipe allows it: "all" (images and features), "images" or "none".
    """
    recipe, images = setup.recipe, setup.dataset.images
    inputs = {stage_name(setup, stage): stage for stage in setup.stages}
    inputs |= {split: setup.preprocessing_of(split) for split in SPLITS if setup.has(split)}
    plans = {
        name: plan_preprocessing(
            split_of(name), recipe.augment, preprocessing, recipe.recipe.seed, setup.dataset.native_size
        )
        for name, preprocessing in inputs.items()
    }
    for split, plan in plans.items():
        try_transform(plan.transform, images, int(setup.splits[split_of(split)][0]))
        if plan.why_not_batched and recipe.augment.run_on == "auto":
            which = "augmented" if plan.batched is None else "augmented up to the crop"
            setup.display.log(f"{split} images are {which} one by one, by data workers: {plan.why_not_batched}")
    is_cached = cache_policy != "none" and recipe.data.cache != "off"
    if is_cached and setup.dataset.why_not_cached:
        setup.display.log(f"images and features are not cached: {setup.dataset.why_not_cached}")
        is_cached = False
    cache = DistributedCache(setup, guard) if is_cached else None
    source = ImageLoaders(setup, plans, SplitImages(setup, plans))
    features = _features(setup, source, cache, guard) if cache_policy == "all" else None
    if setup.teacher is not None:
        _compute_teacher(setup, setup.teacher, source, cache if cache_policy == "all" else None, guard, features)
    passes = setup.length.epochs // len(setup.stages) if features is None else features.passes_needed()
    if cache is not None:
        source.cached.cache(cache, passes)
    sampling = _plan(setup)
    if features is None:
        return DataLoaders(setup, source, source.training(sampling), None)
    train = TrainLoader(TensorBatches(features.rows("train"), setup.labels("train")), sampling)
    loaders = DataLoaders(setup, source, train, features)
    if setup.has("validation"):
        loaders.evaluation("validation")
    setup.display.log(f'cached: {features.description}; data.cache = "off" turns it off')
    return loaders


def _features(
    setup: TrainingContext, images: ImageLoaders, cache: DistributedCache | None, guard: Guard
) -> Features | None:
    """Return the features of the frozen backbone, after a trial on two images; None if they cannot be used.

    The reason is logged if the recipe allows them in principle.
    """
    tail = tail_of(setup.recipe, setup.transfer)
    if tail is None or cache is None:
        return None
    batched = {split: plan.batched is not None and not plan.is_exact for split, plan in images.plans.items()}
    features = Features(setup, tail, cache, guard, images.evaluation, batched)
    transform, first = images.plans["train"].transform, setup.splits["train"][:2]
    two = [try_transform(transform, setup.dataset.images, int(i)) for i in first]
    setup.transfer.train_mode()
    reason = features.why_not_cached(torch.stack(two).to(setup.accelerator.device))
    if reason:
        setup.display.log(f"frozen features are not cached: {reason}")
        return None
    return features


def _compute_teacher(
    setup: TrainingContext,
    teacher: Teacher,
    images: ImageLoaders,
    cache: DistributedCache | None,
    guard: Guard,
    features: Features | None,
) -> None:
    """Compute the teacher's outputs once if they are the same in all epochs, else log why not (a collective)."""
    teacher.computed = None  # mode "lp_ft" builds loaders for each phase
    reason = "caching is off" if cache is None else why_not_computed_once(setup)
    if cache is not None and not reason:
        plan = images.plans["train"]
        batched = plan.batched is not None and not plan.is_exact
        teacher.computed = compute_teacher_outputs(setup, teacher, cache, guard, images.evaluation, batched=batched)
        setup.display.log("cached: outputs of the teacher for all training images, which are the same in every epoch")
        return
    setup.display.log(f"the teacher's outputs are computed for each batch: {reason}")
    if features is not None:  # the student's inputs are features, from which the teacher cannot compute anything
        raise UserError(f'the outputs of the teacher cannot be computed once: {reason}; set data.cache = "off"')


def _plan(setup: TrainingContext) -> SamplingPlan:
    table = setup.recipe.train
    return SamplingPlan(
        size=len(setup.splits["train"]),
        seed=setup.recipe.recipe.seed,
        batch_size=table.batch_size,
        grad_accum_steps=setup.accum_steps,
        virtual=table.virtual_processes,
        drop_last=table.drop_last,
        world=setup.accelerator.num_processes,
        rank=setup.accelerator.process_index,
        mixing=is_mixed(setup.recipe.augment),
        weights=balanced_weights(setup.labels("train")) if table.sampling == "balanced" else None,
        repeats=setup.recipe.augment.repeats,
        views=setup.recipe.data.fixed_views,
        shards=setup.shards("train"),
        shards_at_once=setup.recipe.data.shuffle_shards or 1,
        length=setup.length,
    )


def _eval_batch_size(setup: TrainingContext) -> int:
    return setup.recipe.train.images_per_evaluation(setup.accum_steps)
