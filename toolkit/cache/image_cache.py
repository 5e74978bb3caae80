"""Select which decoded images a run caches, and where: on disk, in memory or on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from toolkit.cache.decoded_images import (
    CachedImages,
    CachePartition,
    DecodedBlock,
    DecodingDataset,
    are_kept,
    entry_name,
    expected_bytes,
    part_key,
    parts,
    tables_of,
)
from toolkit.cache.distributed import DistributedCache, EntryBuilder, Work, folder_of
from toolkit.cache.memory_budget import (
    DEVICE_SHARE,
    MEMORY_SHARE,
    available_memory,
    device_memory,
    gib,
)
from toolkit.cache.store import CacheEntryWriter
from toolkit.data.dataloader import DataWorkerPool
from toolkit.data.image_sources import ImageSource, InMemoryImages
from toolkit.data.pipeline import PreprocessingPlan
from toolkit.data.sampling import IntArray
from toolkit.distributed.cpu_count import available_cpus
from toolkit.distributed.process import gather_objects, local_processes
from toolkit.training.context import TrainingContext

BLOCK = 64
"""Number of images that a worker decodes and writes at a time."""


@dataclass
class CachedSplitImages:
    """Sources of each split's images, and the number of transform steps already applied to them."""

    images: dict[str, ImageSource]
    done: dict[str, int]
    rows: dict[str, tuple[Tensor, IntArray]] = field(default_factory=dict)
    """For splits stored as one tensor: the tensor, uint8 [n, h, w, c], on the CPU or device, and the row of each image
    of the data set."""
    shortcuts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, setup: TrainingContext, deliveries: dict[str, PreprocessingPlan]) -> CachedSplitImages:
        """Return an empty cache: every image is read from the data set."""
        return cls(dict.fromkeys(deliveries, setup.dataset.images), dict.fromkeys(deliveries, 0))

    def forget(self) -> None:
        """Release the memory-mapped images."""
        self.images, self.rows = {}, {}


def cache_images(
    setup: TrainingContext, deliveries: dict[str, PreprocessingPlan], keeper: DistributedCache | None, passes: int
) -> CachedSplitImages:
    """Cache the images that fit and whose caching pays off. Collective.

    ``passes`` is the number of times each image is needed, not counting evaluation. Without ``keeper`` nothing is
    cached.
    """
    kept = CachedSplitImages.of(setup, deliveries)
    if keeper is None:
        return kept
    left = _keep_array(setup, deliveries, kept)
    images = setup.dataset.images
    for part in parts({s: deliveries[s].transform for s in left}, {s: setup.splits[s] for s in left}):
        if not (isinstance(images, InMemoryImages) and are_kept(images, part.transform, part.steps)):
            _keep_part(setup, deliveries, keeper, part, passes, kept)
    return kept


def _keep_array(setup: TrainingContext, deliveries: dict[str, PreprocessingPlan], kept: CachedSplitImages) -> list[str]:
    """Use the data set's own array for splits whose precomputed steps leave it unchanged; return the other splits."""
    images = setup.dataset.images
    if not isinstance(images, InMemoryImages):
        return list(deliveries)
    plain = [
        s
        for s, way in deliveries.items()
        if way.batched and way.is_fixed and are_kept(images, way.transform, way.steps)
    ]
    if plain:
        tensor, tier = _on_tier(setup, torch.from_numpy(images.pixels))
        for split in plain:
            kept.rows[split], kept.done[split] = (tensor, np.arange(len(images))), deliveries[split].steps
        if tier == "device":
            _say(setup, kept, f"images of {_listed(plain)}, {gib(tensor.nbytes)}, held on the device as bytes")
    return [split for split in deliveries if split not in plain]


def _keep_part(
    setup: TrainingContext,
    deliveries: dict[str, PreprocessingPlan],
    keeper: DistributedCache,
    part: CachePartition,
    passes: int,
    kept: CachedSplitImages,
) -> None:
    """Read one partition from the cache, or build its entry if that pays off. Collective."""
    images = setup.dataset.images
    name = entry_name(part_key(images, part))
    entry = keeper.look(name)
    if entry is None:
        size = expected_bytes(images, part) if setup.accelerator.is_local_main_process else 0
        reason = _why_not(setup, part, size, passes)
        if reason:
            setup.display.log(f"decoded images of {_listed(part.splits)} are not cached: {reason}")
            return
        with keeper.claim(name) as entry:
            entry = entry or keeper.store(name, _filled(setup, part), size)
    if not all(gather_objects(entry is not None)) or entry is None:
        return
    stored = CachedImages(entry, part, images)
    tensor, tier = stored.tensor(), "memory" if _fits_memory(setup, entry.size) else "disk"
    whole = [s for s in part.splits if deliveries[s].batched and deliveries[s].steps == part.steps]
    if tensor is not None and whole:
        pixels, tier = _on_tier(setup, tensor[0])
        kept.rows |= dict.fromkeys(whole, (pixels, tensor[1]))
    elif setup.recipe.data.cache == "device":
        setup.display.log(f"images of {_listed(part.splits)} are not held on the device: {_why_not_device(tensor)}")
    if tier == "disk" and setup.recipe.data.cache in ("memory", "device"):
        setup.display.log(f"images are not held in memory: {gib(entry.size)} do not fit into {gib(available_memory())}")
    for split in part.splits:
        kept.images[split], kept.done[split] = stored, part.steps
    where = {"device": "held on the device", "memory": "held in memory", "disk": "read from disk"}[tier]
    _say(
        setup,
        kept,
        f"images of {_listed(part.splits)} prepared once ({part.words}): {gib(entry.size)} of bytes in "
        f"{folder_of(keeper.root)}, {where}",
    )


def _say(setup: TrainingContext, kept: CachedSplitImages, shortcut: str) -> None:
    setup.display.log(f'shortcut: {shortcut}; data.cache = "off" turns it off')
    kept.shortcuts.append(shortcut)


def _listed(splits: list[str] | tuple[str, ...]) -> str:
    return ", ".join(splits)


def _why_not_device(tensor: object) -> str:
    if tensor is None:
        return "they differ in size"
    return "they are augmented one by one, by data workers"


def _why_not(setup: TrainingContext, part: CachePartition, size: int, passes: int) -> str:
    """Return why data.cache = "auto" does not cache a partition of ``size`` bytes; "" if it does. Collective."""
    reason = ""
    if setup.recipe.data.cache == "auto" and passes < 2:
        reason = "they are needed once at most"
    elif setup.recipe.data.cache == "auto" and not part.steps and size > available_memory() * MEMORY_SHARE:
        reason = f"{gib(size)} of decoded images are larger than the files, and do not fit in memory"
    return next((each for each in gather_objects(reason) if each), "")


def _on_tier(setup: TrainingContext, tensor: Tensor) -> tuple[Tensor, str]:
    """Place the tensor where the recipe asks for it, if it fits; return it with its tier: device, memory or disk."""
    choice, device = setup.recipe.data.cache, setup.accelerator.device
    if choice == "device" or (choice == "auto" and device.type == "cuda"):
        reason = ""
        free = device_memory(device, local_processes())
        if tensor.nbytes <= free * DEVICE_SHARE:
            try:
                return tensor.to(device, copy=True), "device"
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                reason = "it ran out of memory"
        reason = reason or f"{gib(tensor.nbytes)} do not fit into {gib(free)} free"
        setup.display.log(f"images are not held on the device: {reason}; they stay in memory or on disk")
    return tensor, "memory" if _fits_memory(setup, tensor.nbytes) else "disk"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _fits_memory(setup: TrainingContext, size: int) -> bool:
    """Whether a mapped file's pages fit in memory, where verifying its checksums has already loaded them."""
    return setup.recipe.data.cache != "disk" and size <= available_memory() * MEMORY_SHARE


def _filled(setup: TrainingContext, part: CachePartition) -> EntryBuilder:
    """Return a builder that decodes a partition's images into an entry, using worker processes."""

    def fill(writer: CacheEntryWriter) -> Work:
        images = setup.dataset.images
        title = f"decoding images of {_listed(part.splits)} once"
        setup.display.log(f"{title}: {len(part.indices):,} images into {folder_of(writer.target.parent)}")
        pool = DataWorkerPool(DecodingDataset(images, part, writer), _builders(setup, part), pin_memory=False)
        decoded: list[DecodedBlock] = []
        try:
            with setup.display.bar(title, len(part.indices)) as bar:
                blocks = np.array_split(part.indices, -(-len(part.indices) // BLOCK))
                for answer in pool.answers(blocks):
                    decoded.append(answer)
                    bar.advance(len(answer.indices))
                    yield
        finally:
            pool.close()
        tables, written = tables_of(decoded)
        what = {"kind": "images", "data": setup.dataset.name, "images": len(part.indices), "what": part.words}
        return writer.publish(what, tables, written)

    return fill


def _builders(setup: TrainingContext, part: CachePartition) -> int:
    """Return the number of worker processes that build an entry: by default the CPUs available on the machine."""
    setting = setup.recipe.data.workers
    if len(part.indices) <= 4 * BLOCK:
        return 0
    return setting if isinstance(setting, int) else available_cpus()
