"""Precomputed features of a frozen backbone.

If the transfer mode freezes all layers before one submodule (the tail) and the tail's inputs do not change between
epochs, they are computed once and used as training inputs: the losses are the same, and the frozen layers need not run.
The features are stored in the cache and shared by all runs with the same images, preprocessing and frozen backbone.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.augment.transforms import is_deterministic
from toolkit.cache.distributed import DistributedCache, EntryBuilder, Guard, Work
from toolkit.cache.feature_key import feature_name, frozen_part, weights_hash
from toolkit.cache.memory_budget import MEMORY_SHARE, available_memory, copy_to_device, gib
from toolkit.cache.store import BlockRange, CacheEntry, CacheEntryWriter
from toolkit.data.dataloader import EVALUATION, EvaluationLoader
from toolkit.data.sampling import IntArray
from toolkit.data.tensor_loader import as_tensor
from toolkit.distributed.process import autocast_dtype, gather_objects, local_processes
from toolkit.errors import RunFailed
from toolkit.models.frozen_backbone import backbone_is_deterministic, find_frozen_backbone, prefix_features
from toolkit.models.transfer import Transfer
from toolkit.recipe.image_size import Size
from toolkit.recipe.schema import Recipe
from toolkit.training.context import TrainingContext
from toolkit.training.evaluation import to_device

BLOCK_BYTES = 16 * 2**20
"""Size of an entry's blocks, each with a checksum."""


def tail_of(recipe: Recipe, transfer: Transfer) -> str | None:
    """Return the name of the submodule after the frozen backbone; None if caching would change the experiment."""
    if recipe.data.cache == "off" or recipe.transfer.mode == "gradual" or not has_fixed_inputs(recipe):
        return None
    return find_frozen_backbone(transfer)


def has_fixed_inputs(recipe: Recipe) -> bool:
    """Return whether each training image has a fixed set of inputs: one, or data.fixed_views augmented versions."""
    augment = recipe.augment
    if augment.mixup or augment.cutmix or recipe.data.progressive_sizes:
        return False
    return is_deterministic("train", augment) or recipe.data.fixed_views is not None


def input_views(setup: TrainingContext, split: str) -> list[int]:
    """Return the augmented views of a split, if its inputs are fixed."""
    recipe = setup.recipe
    if split != "train" or is_deterministic("train", recipe.augment):
        return [EVALUATION]
    return list(range(min(recipe.data.fixed_views or 1, setup.length.epochs)))


class Features:
    """Inputs of the trainable tail for whole splits. Methods are collective unless stated otherwise."""

    def __init__(
        self,
        setup: TrainingContext,
        tail: str,
        cache: DistributedCache,
        guard: Guard,
        loader: Callable[[str, list[IntArray], int], EvaluationLoader],
        batched: dict[str, bool],
    ) -> None:
        """``loader``: returns a loader for a split, a list of batches and the number of an augmented view.

        ``batched``: whether the images of each split are augmented in batches.
        """
        self.setup, self.tail, self.cache, self.guard, self.loader = setup, tail, cache, guard, loader
        self.batched, self.frozen = batched, frozen_part(setup, tail)
        self.made: dict[str, list[Tensor]] = {}
        self.identities: dict[str, str] = {}

    def _name(self, split: str, view: int) -> str:
        setup = self.setup
        if split not in self.identities:
            self.identities[split] = setup.dataset.images.identity(setup.splits[split])
        return feature_name(setup, self.frozen, self.identities[split], split, view, self.batched[split])

    @property
    def description(self) -> str:
        """Description of what is cached, for messages."""
        versions = len(self.views("train"))
        images = sum(len(self.setup.splits[split]) for split in self._used)
        each = f", {versions} versions of each training image" if versions > 1 else ""
        return f"inputs of {self.tail} computed once for {images} images{each}: all layers before it are frozen"

    @property
    def _used(self) -> list[str]:
        """Names of the splits whose features are needed in every epoch."""
        return [split for split in ("train", "validation") if self.setup.has(split)]

    def views(self, split: str) -> list[int]:
        """Return the augmented views of a split for which features are computed."""
        return input_views(self.setup, split)

    def why_not_cached(self, sample: Tensor) -> str:
        """Return why features cannot be cached ("" if they can): not deterministic on ``sample``, or too large."""
        module, tail, counts = self.setup.built.module, self.tail, self.setup.splits
        if not backbone_is_deterministic(module, tail, sample):
            return "the frozen part is not deterministic"
        one = prefix_features(module, tail, sample[:1])
        images = sum(len(counts[split]) * len(self.views(split)) for split in counts)
        need, free = one.numel() * 4 * images * local_processes(), available_memory()
        fits = need <= free * MEMORY_SHARE or not self.passes_needed()
        if not all(gather_objects(fits)):
            return f"its features need {gib(need)}, but only {gib(free)} are free"
        return ""

    def passes_needed(self) -> int:
        """Return the maximum number of passes over any split needed to fill missing cache entries.

        Not a collective: each process checks the cache on its own.
        """
        names = [[self._name(split, view) for view in self.views(split)] for split in self._used]
        return max(sum(not (self.cache.root / n).is_dir() for n in of_split) for of_split in names)

    def rows(self, split: str) -> list[Tensor]:
        """Return the features of a split for each view, float32 [N, ...], on the device if they fit."""
        if split not in self.made:
            self.made[split] = [self._placed(self._of_view(split, view)) for view in self.views(split)]
        return self.made[split]

    def _of_view(self, split: str, view: int) -> Tensor:
        version = f", version {view + 1}" if view >= 0 else ""
        found = f"features of {split}{version} taken from the cache: inputs of {self.tail}"
        title = f"inputs of {self.tail} of {self.setup.recipe.model.name}, {split}{version}"
        name = self._name(split, view)
        return kept_in_cache(self.cache, name, title, lambda: self._compute(split, view), found=found)

    def _compute(self, split: str, view: int) -> Tensor:
        module = self.setup.built.module.eval()
        title, forward = f"frozen features of {split}", functools.partial(self._forward, module)
        return compute_outputs(self.setup, self.guard, self.loader, split, view, title, forward)

    @torch.no_grad()
    def _forward(self, module: nn.Module, images: Tensor) -> Tensor:
        """Return the inputs of the tail of ``module`` for a batch, float32 [m, ...] on the CPU."""
        device, dtype = self.setup.accelerator.device, autocast_dtype(self.setup.accelerator.mixed_precision)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            inputs = to_device(images, device, self.setup.recipe.train.channels_last)
            return prefix_features(module, self.tail, inputs).float().cpu()

    def check_backbone(self, written: nn.Module) -> None:
        """Raise RunFailed unless ``written``, a complete model, has the frozen backbone that produced the features.

        Its frozen weights must be bitwise equal. Features recomputed from some images of the last split used in every
        epoch must match up to differences between a device's algorithms.
        """
        setup, tail = self.setup, self.tail
        fault = weights_hash(written, tail) != self.frozen["weights"]
        if not fault:
            split = self._used[-1]
            used = self.made[split][0][: chunk_size(setup.preprocessing_of(split).image_size)].cpu()
            with contextlib.closing(self.loader(split, [np.arange(len(used))], self.views(split)[0])) as loader:
                found = self._forward(written.eval(), next(iter(loader)).images)
            fault = not torch.allclose(found, used, rtol=1e-3, atol=1e-3 * float(used.abs().max()))
        if fault:
            raise RunFailed(
                f"best.safetensors does not hold the trained model: its inputs of {tail} differ from the features "
                "that the run used"
            )

    def release(self) -> None:
        """Release the memory-mapped features."""
        self.made = {}

    def _placed(self, features: Tensor) -> Tensor:
        device = self.setup.accelerator.device
        placed = features if device.type == "cpu" else copy_to_device(features, device, local_processes())
        return placed if isinstance(placed, Tensor) else features


def kept_in_cache(
    cache: DistributedCache, name: str, title: str, compute: Callable[[], Tensor], *, found: str
) -> Tensor:
    """Return the rows stored in the cache under ``name``, float32 [N, ...]; if missing, compute and store them.

    ``title``: description for the list of cache entries. ``found``: message that is logged if they are in the cache.
    A collective.
    """
    setup = cache.setup
    with cache.claim(name) as entry:
        if entry is not None:
            setup.display.log(found)
            return _mapped(entry)
        rows = compute()
        facts = {
            "kind": "features",
            "data": setup.dataset.name,
            "images": len(rows),
            "what": title,
            "shape": list(rows.shape),
        }
        entry = cache.store(name, _written(rows, facts), rows.nbytes)
    return rows if entry is None else _mapped(entry)


def compute_outputs(
    setup: TrainingContext,
    guard: Guard,
    loader_of: Callable[[str, list[IntArray], int], EvaluationLoader],
    split: str,
    view: int,
    title: str,
    forward: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return ``forward(images)`` of all images of a split in one view, float32 [N, ...] on the CPU, on every process.

    ``forward`` returns float32 [m, ...] on the CPU. The result does not depend on the batch size or the number of
    processes. ``title`` is shown on the progress bar. A collective.
    """
    accelerator = setup.accelerator
    count, world = len(setup.splits[split]), accelerator.num_processes
    chunk = chunk_size(setup.preprocessing_of(split).image_size)
    in_order, order = np.arange(count), setup.shard_order(split)
    chunks = [(in_order if order is None else order)[start : start + chunk] for start in range(0, count, chunk)]
    bounds = [len(chunks) * rank // world for rank in range(world + 1)]
    mine = chunks[bounds[accelerator.process_index] : bounds[accelerator.process_index + 1]]
    loader, rows = loader_of(split, mine, view), None
    with contextlib.closing(loader), setup.display.bar(title, count) as bar:
        for positions, images, _ in guard(loader, max(np.diff(bounds).tolist())):
            batch = forward(images)
            if rows is None:
                rows = batch.new_zeros((count, *batch.shape[1:]))
            rows[torch.from_numpy(positions)] = batch
            bar.advance(len(positions) * world)
    return _join(rows, count, accelerator.device)


def chunk_size(image_size: Size) -> int:
    """Return the batch size for the frozen layers: the pixels of 64 images of 224 x 224, at most 256 images.

    The last bits of the features depend on it, so it must not depend on the recipe's batch size.
    """
    return max(1, min(256, 64 * 224**2 // math.prod(image_size)))


def _join(features: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Combine the rows of all processes (None: this process has no rows). Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert features is not None
        return features
    shapes: list[tuple[int, ...] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, None if features is None else tuple(features.shape[1:]))
    shape = next(s for s in shapes if s is not None)
    mine = torch.zeros((count, *shape)) if features is None else features
    shared = mine.to(device) if dist.get_backend() == "nccl" else mine
    dist.all_reduce(shared)
    return shared.cpu()


def _written(features: Tensor, facts: dict[str, Any]) -> EntryBuilder:
    def fill(writer: CacheEntryWriter) -> Work:
        data = features.contiguous().view(-1).view(torch.uint8).numpy()
        blocks: list[BlockRange] = []
        for start in range(0, len(data), BLOCK_BYTES):
            blocks.append(writer.add(data[start : start + BLOCK_BYTES]))
            yield
        return writer.publish(facts, {}, blocks)

    return fill


def _mapped(entry: CacheEntry) -> Tensor:
    """Return stored features, float32 [N, ...], as a memory-mapped tensor, which must not be written to."""
    return as_tensor(entry.data(), torch.float32).view(entry.facts["shape"])
