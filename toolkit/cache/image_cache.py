"""Select which decoded images a run caches, and where: on disk, in memory or on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from toolkit.cache.decoded_images import (
    CachedImages,
    CachePartition,
    DecodedBlock,
    DecodingDataset,
    entry_name,
    expected_bytes,
    leaves_images_unchanged,
    part_key,
    parts,
    tables_of,
)
from toolkit.cache.distributed import DistributedCache, EntryBuilder, Work, folder_of
from toolkit.cache.memory_budget import MEMORY_SHARE, available_memory, copy_to_device, gib
from toolkit.cache.store import CacheEntryWriter
from toolkit.data.dataloader import DataWorkerPool
from toolkit.data.image_sources import ImageSource, InMemoryImages, in_stored_order
from toolkit.data.pipeline import PreprocessingPlan
from toolkit.data.sampling import IntArray
from toolkit.distributed.cpu_count import available_cpus
from toolkit.distributed.process import gather_objects, local_processes
from toolkit.training.context import TrainingContext

BLOCK = 64
"""Number of images that a worker decodes and writes at a time."""


def split_of(name: str) -> str:
    """Return the split in the name of a preprocessing plan, such as "train" for "train at 128 x 128"."""
    return name.partition(" ")[0]


class SplitImages:
    """Source of each split's images (data set or cache), and the number of transform steps already applied to them."""

    def __init__(self, setup: TrainingContext, plans: dict[str, PreprocessingPlan]) -> None:
        """Start with the data set as the source of every image; :meth:`cache` changes that."""
        self.setup, self.plans = setup, plans
        self.images: dict[str, ImageSource] = dict.fromkeys(plans, setup.dataset.images)
        self.done = dict.fromkeys(plans, 0)
        self.rows: dict[str, tuple[Tensor, IntArray]] = {}
        """For splits stored as one tensor: the tensor, uint8 [n, h, w, c], on the CPU or device, and the row of each
        image of the data set."""
        self.descriptions: list[str] = []
        """What is cached, one description per log line."""

    def cache(self, cache: DistributedCache, passes: int) -> None:
        """Cache the images that fit and whose caching pays off. Collective.

        ``passes`` is the number of times each image is needed, not counting evaluation.
        """
        images, splits = self.setup.dataset.images, list(self.plans)
        if isinstance(images, InMemoryImages):
            splits = self._use_array(images)
        transforms = {split: self.plans[split].transform for split in splits}
        for part in parts(transforms, {split: self.setup.splits[split_of(split)] for split in splits}):
            if not (isinstance(images, InMemoryImages) and leaves_images_unchanged(images, part.transform, part.steps)):
                self._use_entry(cache, part, passes)

    def release(self) -> None:
        """Release the memory-mapped images."""
        self.images, self.rows = {}, {}

    def _use_array(self, images: InMemoryImages) -> list[str]:
        """Use the data set's in-memory array for splits whose precomputed steps change nothing; return the others."""
        splits = [
            split
            for split, plan in self.plans.items()
            if plan.batched and plan.is_fixed and leaves_images_unchanged(images, plan.transform, plan.steps)
        ]
        if splits:
            tensor, storage = self._place(torch.from_numpy(images.pixels))
            for split in splits:
                self.rows[split], self.done[split] = (tensor, np.arange(len(images))), self.plans[split].steps
            if storage == "held on the device":
                self._announce(f"images of {', '.join(splits)}, {gib(tensor.nbytes)}, {storage}")
        return [split for split in self.plans if split not in splits]

    def _use_entry(self, cache: DistributedCache, part: CachePartition, passes: int) -> None:
        """Read one partition's images from the cache, or build the cache entry if that pays off. Collective."""
        setup, splits, choice = self.setup, ", ".join(part.splits), self.setup.recipe.data.cache
        name = entry_name(part_key(setup.dataset.images, part))
        entry = cache.find(name)
        if entry is None:
            size = expected_bytes(setup.dataset.images, part) if setup.accelerator.is_local_main_process else 0
            reason = self._why_not_cached(part, size, passes)
            if reason:
                setup.display.log(f"decoded images of {splits} are not cached: {reason}")
                return
            with cache.claim(name) as entry:
                entry = entry or cache.store(name, self._builder(part), size)
        if not all(gather_objects(entry is not None)) or entry is None:
            return
        stored = CachedImages(entry, part, setup.dataset.images)
        tensor, storage = stored.tensor(), self._storage_of_file(entry.size)
        whole = [split for split in part.splits if self.plans[split].batched and self.plans[split].steps == part.steps]
        if tensor is not None and whole:
            pixels, storage = self._place(tensor[0])
            self.rows |= dict.fromkeys(whole, (pixels, tensor[1]))
        elif choice == "device":
            why = "they differ in size" if tensor is None else "they are augmented one by one, by data workers"
            setup.display.log(f"images of {splits} are not held on the device: {why}")
        if storage == "read from disk" and choice in ("memory", "device"):
            free = gib(available_memory())
            setup.display.log(f"images are not held in memory: {gib(entry.size)} needed, {free} free")
        for split in part.splits:
            self.images[split], self.done[split] = stored, part.steps
        details = f"{gib(entry.size)} in {folder_of(cache.root)}, {storage}"
        self._announce(f"images of {splits}, preprocessed once ({part.description}): {details}")

    def _announce(self, description: str) -> None:
        self.setup.display.log(f'cached: {description}; data.cache = "off" turns it off')
        self.descriptions.append(description)

    def _why_not_cached(self, part: CachePartition, size: int, passes: int) -> str:
        """Return why data.cache = "auto" does not cache a partition of ``size`` bytes; "" if it does. Collective."""
        reason = ""
        if self.setup.recipe.data.cache == "auto" and passes < 2:
            reason = "they are needed at most once"
        elif self.setup.recipe.data.cache == "auto" and not part.steps and size > available_memory() * MEMORY_SHARE:
            reason = f"the decoded images need {gib(size)}, more than the files, and do not fit in memory"
        return next((each for each in gather_objects(reason) if each), "")

    def _place(self, tensor: Tensor) -> tuple[Tensor, str]:
        """Move a tensor to the storage that the recipe requests, if it fits; return it and its storage."""
        choice, device = self.setup.recipe.data.cache, self.setup.accelerator.device
        if choice == "device" or (choice == "auto" and device.type == "cuda"):
            placed = copy_to_device(tensor, device, local_processes())
            if isinstance(placed, Tensor):
                return placed, "held on the device"
            self.setup.display.log(f"images are not held on the device: {placed}; they stay in memory or on disk")
        return tensor, self._storage_of_file(tensor.nbytes)

    def _storage_of_file(self, size: int) -> str:
        """Describe where a mapped file of ``size`` bytes is read from: memory, if the page cache holds it, or disk."""
        fits = self.setup.recipe.data.cache != "disk" and size <= available_memory() * MEMORY_SHARE
        return "held in memory" if fits else "read from disk"

    def _builder(self, part: CachePartition) -> EntryBuilder:
        """Return a function that decodes a partition's images into an entry, using worker processes."""
        setup, count = self.setup, len(part.indices)
        workers = setup.recipe.data.workers if isinstance(setup.recipe.data.workers, int) else available_cpus()
        title = f"decoding images of {', '.join(part.splits)} once"

        def fill(writer: CacheEntryWriter) -> Work:
            setup.display.log(f"{title}: {count:,} images into {folder_of(writer.target.parent)}")
            dataset = DecodingDataset(setup.dataset.images, part, writer)
            indices = in_stored_order(setup.dataset.images, part.indices)
            pool = DataWorkerPool(dataset, workers if count > 4 * BLOCK else 0, pin_memory=False)
            decoded: list[DecodedBlock] = []
            try:
                with setup.display.bar(title, count) as bar:
                    for answer in pool.answers(np.array_split(indices, -(-count // BLOCK))):
                        decoded.append(answer)
                        bar.advance(len(answer.indices))
                        yield
            finally:
                pool.close()
            tables, blocks = tables_of(decoded)
            facts = {"kind": "images", "data": setup.dataset.name, "images": count, "what": part.description}
            return writer.publish(facts, tables, blocks)

        return fill
