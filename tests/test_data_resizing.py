"""The faster resize equals torchvision's on Pillow images, except for the last bit of some pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from toolkit.augment.resize import RandomResizedCrop, Resize, on_bytes, resizing_kernel
from toolkit.data.image_sources import as_pixels

BILINEAR, BICUBIC, NEAREST = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC, InterpolationMode.NEAREST
SIZES = [(200, 300), (300, 200), (41, 500), (256, 256), (900, 1300), (1, 1)]
"""Height and width in pixels."""


def noise_image(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Return an image of noise, for which differences between filters are largest."""
    channels = {"RGB": (3,), "L": ()}[mode]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, *channels), dtype=np.uint8))


def differences(one: Image.Image, other: Image.Image) -> np.ndarray:
    assert one.mode == other.mode
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))


@pytest.mark.skipif(resizing_kernel() == "Pillow", reason="this processor has no kernel to compare with Pillow")
@pytest.mark.parametrize("to", [256, 48, (224, 224), 400])
@pytest.mark.parametrize("size", SIZES)
def test_the_faster_resize_agrees_with_pillow(size: tuple[int, int], to: Any) -> None:
    found = differences(Resize(to)(noise_image(size)), v2.Resize(to)(noise_image(size)))
    assert found.max() <= 1
    as_bytes = v2.Resize(to)(v2.functional.pil_to_tensor(noise_image(size)))
    assert torch.equal(v2.functional.pil_to_tensor(Resize(to)(noise_image(size))), as_bytes)
    cubic = {"interpolation": BICUBIC}
    found = differences(Resize(to, **cubic)(noise_image(size)), v2.Resize(to, **cubic)(noise_image(size)))
    assert found.mean() < 0.5


@pytest.mark.skipif(resizing_kernel() == "Pillow", reason="this processor has no kernel to compare with Pillow")
def test_a_random_crop_draws_the_same_random_numbers() -> None:
    image = noise_image((200, 300)).resize((120, 90)).resize((300, 200))
    for seed in range(20):
        crops = []
        for kind in (RandomResizedCrop, v2.RandomResizedCrop):
            torch.manual_seed(seed)
            crops.append(kind(64, scale=(0.05, 1.0))(image))
        assert differences(*crops).max() <= 1


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [("L", {}), ("RGB", {"interpolation": NEAREST}), ("RGB", {"antialias": None})],
)
def test_resizes_without_a_faster_kernel_are_left_to_torchvision(mode: str, arguments: dict[str, Any]) -> None:
    image = noise_image((200, 300), mode)
    assert not differences(Resize(64, **arguments)(image), v2.Resize(64, **arguments)(image)).any()
    tensor = torch.arange(300, dtype=torch.uint8).reshape(3, 10, 10)
    assert torch.equal(Resize(7, **arguments)(tensor), v2.Resize(7, **arguments)(tensor))


def test_without_vector_instructions_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert resizing_kernel() == "Pillow"
    image = noise_image((200, 300))
    assert not differences(Resize(64)(image), v2.Resize(64)(image)).any()
    crops = []
    for kind in (RandomResizedCrop, v2.RandomResizedCrop):
        torch.manual_seed(3)
        crops.append(kind(64)(image))
    assert not differences(*crops).any()


def test_the_longest_side_is_limited() -> None:
    assert Resize(200, max_size=250)(noise_image((100, 300))).size == (250, 83)


@pytest.mark.parametrize("size", [*SIZES, (225, 226), (31, 33), (32, 500)])
def test_a_center_crop_of_bytes_equals_torchvision_s(size: tuple[int, int]) -> None:
    step, image = v2.CenterCrop((32, 31)), noise_image(size)
    assert np.array_equal(on_bytes(step, as_pixels(image)), as_pixels(step(image)))


@pytest.mark.skipif(resizing_kernel() == "Pillow", reason="this processor has no kernel for bytes")
def test_a_random_crop_of_bytes_equals_that_of_the_image() -> None:
    image, step = noise_image((200, 300)), RandomResizedCrop(64, scale=(0.05, 1.0))
    for seed in range(20):
        torch.manual_seed(seed)
        wanted = as_pixels(step(image))
        torch.manual_seed(seed)
        assert np.array_equal(on_bytes(step, as_pixels(image)), wanted)
