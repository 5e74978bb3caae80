"""Exact mean and standard deviation of the training images' channels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from toolkit.augment.transforms import ImageTransform, resize_and_crop
from toolkit.data.image_sources import MODES, ImageSource, Pixels, as_image, in_stored_order
from toolkit.data.preprocessing import SMALL_IMAGE, Preprocessing
from toolkit.distributed.cpu_count import available_cpus

Channels = tuple[float, ...]


def channel_statistics(
    images: ImageSource, indices: npt.NDArray[np.int64], preprocessing: Preprocessing, threads: int | None = None
) -> tuple[Channels, Channels]:
    """Return each channel's mean and population standard deviation over all pixels, with values in 0..1.

    Images are resized and cropped according to ``preprocessing``, but not normalized. Pixels and sums are integers, so
    the result depends neither on the order of the images nor on the number of threads. Raises UnreadableImageError.
    """
    transform = ImageTransform("train", resize_and_crop(preprocessing), preprocessing)

    def count_values(chunk: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count each pixel value in each channel, [channels, 256]."""
        counts = np.zeros((preprocessing.channels, 256), dtype=np.int64)
        for i in chunk:
            counts += _histogram(transform.apply(images.load(int(i)), len(transform.steps)))
        return counts

    if threads is None:  # threads slow down the decoding of small images by half (measured)
        threads = 1 if max(preprocessing.image_size) <= SMALL_IMAGE else available_cpus()
    chunks = np.array_split(in_stored_order(images, indices), max(1, -(-len(indices) // 256)))
    with ThreadPoolExecutor(threads) as pool:
        counts = sum(pool.map(count_values, chunks), np.zeros((preprocessing.channels, 256), dtype=np.int64))
    values = np.arange(256)
    mean, std = [], []
    for channel in counts:
        # Python integers: no overflow and no cancellation in pixels * squares - total**2.
        pixels, total, squares = int(channel.sum()), int(channel @ values), int(channel @ values**2)
        mean.append(total / (pixels * 255))
        std.append(((pixels * squares - total * total) / (pixels * pixels)) ** 0.5 / 255)
    return tuple(mean), tuple(std)


def _histogram(pixels: Pixels) -> npt.NDArray[np.int64]:
    """Count how often each value occurs in each channel, int64 [channels, 256]."""
    if pixels.shape[2] in MODES:  # Pillow is faster
        return np.array(as_image(pixels).histogram(), dtype=np.int64).reshape(-1, 256)
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(pixels, 2, 0)])
