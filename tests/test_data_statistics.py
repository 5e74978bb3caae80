"""Mean and standard deviation of channels, compared with numpy and with published values."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from toolkit.data.channel_stats import channel_statistics
from toolkit.data.datasets import open_dataset
from toolkit.data.image_sources import InMemoryImages
from toolkit.data.preprocessing import Preprocessing
from toolkit.recipe.schema import DataConfig

PIXELS = np.random.default_rng(0).integers(0, 256, (700, 6, 8, 3), dtype=np.uint8)


def plain(channels: int, size: int, resize: int | None = None, crop: bool = False) -> Preprocessing:
    return Preprocessing(channels, (size, size), resize, crop, "bilinear", (0.0,) * channels, (1.0,) * channels)


@pytest.mark.parametrize("threads", [1, 3])
def test_statistics_equal_numpy_s_over_the_pixels_of_the_given_images(threads: int) -> None:
    indices = np.arange(0, 700, 2)[::-1]
    mean, std = channel_statistics(InMemoryImages(PIXELS, "toy", 3), indices, plain(3, 8), threads)
    chosen = PIXELS[::2] / 255
    np.testing.assert_allclose(mean, chosen.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, chosen.std((0, 1, 2)), rtol=1e-12)


def test_only_pixels_inside_the_crop_count() -> None:
    framed = np.zeros((5, 10, 10), np.uint8)
    framed[:, 3:7, 3:7] = 255
    mean, std = channel_statistics(InMemoryImages(framed, "toy", 1), np.arange(5), plain(1, 4, crop=True))
    assert (mean, std) == ((1.0,), (0.0,))


def test_nearly_constant_images_have_no_rounding_error() -> None:
    """E[x^2] - E[x]^2 in floating point would have an error as large as the result here."""
    pixels = np.full((2000, 10, 10), 255, np.uint8)
    pixels[0, 0, 0] = 254
    mean, std = channel_statistics(InMemoryImages(pixels, "toy", 1), np.arange(2000), plain(1, 10))
    share = 1 / 200_000
    assert mean[0] == pytest.approx(1 - share / 255, rel=1e-15)
    assert std[0] == pytest.approx((share * (1 - share)) ** 0.5 / 255, rel=1e-12)


@pytest.mark.slow
def test_statistics_of_the_cifar10_training_images(shared_data: Path, tmp_path: Path) -> None:
    """Compared with the values that come with the data, which were computed independently."""
    with tarfile.open(shared_data / "cifar10.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    data = open_dataset(DataConfig(dataset="imagefolder", root=str(tmp_path / "cifar10")))
    mean, std = channel_statistics(data.images, data.lists["train"], plain(3, 32))
    assert len(data.lists["train"]) == 50_000
    assert [round(value, 4) for value in mean] == [0.4913, 0.4821, 0.4465]
    assert [round(value, 4) for value in std] == [0.2452, 0.2428, 0.2606]
