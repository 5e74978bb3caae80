"""Decoded and resized images, computed once and stored as bytes in the cache.

The leading deterministic steps of a split's transform are applied before an image is stored: uint8 [h, w, C], exactly
the input of the next step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
import torch
import torchvision
from PIL import features
from torch import Tensor

from toolkit.augment.resize import resizing_kernel
from toolkit.augment.transforms import CENTER_CROP, ImageTransform
from toolkit.cache.store import BlockRange, CacheEntry, CacheEntryWriter, content_key
from toolkit.data.dataloader import WorkerError
from toolkit.data.image_sources import ImageSource, InMemoryImages, Pixels
from toolkit.data.jpeg_decoding import jpeg_decoder
from toolkit.data.sampling import IntArray
from toolkit.data.tensor_loader import as_tensor
from toolkit.errors import RunFailed, UserError

DECODERS = ("jpg", "libjpeg_turbo", "zlib", "webp")
"""Pillow features (libraries) whose versions may affect decoded pixels."""

SAMPLE = 16
"""Number of images decoded to estimate the size of a cache entry."""


@dataclass(frozen=True, eq=False)
class CachePartition:
    """Images of a data set that share their precomputed leading steps, and therefore a cache entry."""

    splits: tuple[str, ...]
    indices: IntArray
    """Indices into the data set of all images in these splits, ascending."""
    transform: ImageTransform
    """Transform of one of the splits; its leading steps are precomputed."""
    steps: int
    """Number of precomputed steps."""

    @property
    def description(self) -> str:
        """The precomputed steps, for messages and for the cache key."""
        return ", ".join(("decode", *self.transform.fixed[: self.steps]))


def parts(transforms: Mapping[str, ImageTransform], splits: Mapping[str, IntArray]) -> list[CachePartition]:
    """Group splits whose leading steps are equal, or differ only by a final center crop, which is cheap.

    An entry with training images before a random crop therefore also serves validation images.
    """
    fixed = {split: transforms[split].fixed for split in splits}
    found: dict[tuple[str, ...], list[str]] = {}
    for split in sorted(splits, key=lambda split: len(fixed[split])):
        steps = next((first for first in found if _serves(first, fixed[split])), fixed[split])
        found.setdefault(steps, []).append(split)
    made = []
    for steps, names in found.items():
        indices = np.unique(np.concatenate([splits[name] for name in names]))
        in_order = tuple(name for name in splits if name in names)
        made.append(CachePartition(in_order, indices, transforms[names[0]], len(steps)))
    return made


def _serves(first: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    rest = whole[len(first) :]
    return whole[: len(first)] == first and all(step.startswith(CENTER_CROP) for step in rest)


def part_key(images: ImageSource, part: CachePartition) -> dict[str, Any]:
    """Return everything that the stored bytes depend on, as JSON-serializable values."""
    return {
        "images": images.identity(part.indices),
        "steps": part.description,
        "pillow": [PIL.__version__, *(str(features.version(name)) for name in DECODERS)],
        "jpeg": jpeg_decoder(),
        "torchvision": torchvision.__version__,
        "resize": resizing_kernel(),
    }


def entry_name(key: Mapping[str, Any]) -> str:
    """Return the entry name for a key from :func:`part_key`."""
    return f"images-{content_key(key)}"


def expected_bytes(images: ImageSource, part: CachePartition) -> int:
    """Estimate the size of the partition's entry in bytes from a sample of its images."""
    some = part.indices[np.linspace(0, len(part.indices) - 1, min(SAMPLE, len(part.indices)), dtype=np.int64)]
    sizes = [decode(images, part, int(i)).nbytes for i in some]
    return round(sum(sizes) / len(sizes) * len(part.indices))


def decode(images: ImageSource, part: CachePartition, index: int) -> Pixels:
    """Return one image as it is stored, uint8 [h, w, c]. Raises UnreadableImageError and RunFailed."""
    pixels = images.load(index)
    try:
        result: Pixels = part.transform.apply(pixels, part.steps)
    except Exception as error:
        raise RunFailed(f"{images.name(index)}: the transforms failed: {error}") from error
    return result


class DecodedBlock(NamedTuple):
    """Result of a :class:`DecodingDataset`: where the decoded images are stored in the cache entry."""

    indices: IntArray
    """Indices of the images in the data set, int64 [n]."""
    offsets: IntArray
    """Offset of each image's pixels in the entry, in bytes, int64 [n]."""
    shapes: npt.NDArray[np.int32]
    """Height, width and channels of each image, [n, 3]."""
    block: BlockRange


class DecodingDataset(torch.utils.data.Dataset[Any]):
    """Decodes the requested images and writes them into an entry; used in worker processes."""

    def __init__(self, images: ImageSource, part: CachePartition, writer: CacheEntryWriter) -> None:
        self.images, self.part, self.writer = images, part, writer

    def __getitems__(self, indices: IntArray) -> DecodedBlock | WorkerError:
        """Write one block of the entry. Errors are returned as objects; PyTorch would turn them into strings."""
        try:
            pixels = [decode(self.images, self.part, int(i)) for i in indices]
            shapes = np.array([image.shape for image in pixels], dtype=np.int32)
            lengths = shapes.astype(np.int64).prod(1)
            starts, data = np.cumsum(lengths) - lengths, np.empty(lengths.sum(), dtype=np.uint8)
            for image, start, length in zip(pixels, starts, lengths, strict=True):
                data[start : start + length].reshape(image.shape)[...] = image
            block = self.writer.add(data)
            return DecodedBlock(indices, block[0] + starts, shapes, block)
        except (RunFailed, UserError, OSError) as error:
            return WorkerError(error)


def tables_of(decoded: list[DecodedBlock]) -> tuple[dict[str, npt.NDArray[Any]], list[BlockRange]]:
    """Return an entry's arrays (offsets [n] and shapes [n, 3], in ascending order of image index) and its blocks."""
    indices = np.concatenate([one.indices for one in decoded])
    order = np.argsort(indices)
    tables = {
        "offsets": np.concatenate([one.offsets for one in decoded])[order],
        "shapes": np.concatenate([one.shapes for one in decoded])[order],
    }
    return tables, [one.block for one in decoded]


class CachedImages:
    """Memory-mapped images of a partition, indexed like the data set; only the partition's images can be read."""

    def __init__(self, entry: CacheEntry, part: CachePartition, images: ImageSource) -> None:
        self.images, self._data = images, entry.data()
        self._offsets, self._shapes = entry.tables["offsets"], entry.tables["shapes"]
        self._rows = np.full(len(images), -1, dtype=np.int64)
        self._rows[part.indices] = np.arange(len(part.indices))

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Return the name of image i."""
        return self.images.name(i)

    def identity(self, indices: IntArray) -> str:
        """Return the cache key of the source images."""
        return self.images.identity(indices)

    def load(self, i: int) -> Pixels:
        """Return image i as stored, read-only."""
        row = self._rows[i]
        start, shape = int(self._offsets[row]), self._shapes[row]
        return self._data[start : start + int(shape.prod())].reshape(shape)

    def tensor(self) -> tuple[Tensor, IntArray] | None:
        """Return all images as one tensor, uint8 [n, h, w, c], and the row of each image of the data set (-1: absent).

        The tensor is the mapped file and must not be written to. Returns None if the images differ in size.
        """
        if (self._shapes != self._shapes[0]).any():
            return None
        height, width, channels = (int(n) for n in self._shapes[0])
        images = as_tensor(self._data, torch.uint8).view(-1, height, width, channels)
        rows = np.where(self._rows >= 0, self._offsets[self._rows] // (height * width * channels), -1)
        return images, rows


def leaves_images_unchanged(images: InMemoryImages, transform: ImageTransform, steps: int) -> bool:
    """Return whether the first steps of a transform leave in-memory images unchanged, so that caching is pointless."""
    noise = np.random.default_rng(0).integers(0, 256, (1, *images.pixels.shape[1:]), dtype=np.uint8)
    one = InMemoryImages(noise, "", images.channels).load(0)
    return np.array_equal(one, transform.apply(one, steps))
