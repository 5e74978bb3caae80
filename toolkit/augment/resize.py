"""Resizing of color images with PyTorch's vectorized uint8 kernel, in a third of Pillow's time.

PyTorch and Pillow use the same antialiased triangle or cubic filter in integer arithmetic. The weights in PyTorch's
kernel have fewer bits, so on photographs one value in a thousand differs by 1 of 255 (three in a thousand with the
cubic filter, some by 2). Pillow is used if the CPU lacks AVX2, and for grayscale images and other filters, for which
the kernel is not faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import CenterCropOrPad
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from toolkit.data.image_sources import Pixels, as_image, as_pixels
from toolkit.data.preprocessing import scaled_size
from toolkit.recipe.image_size import Size

_FILTERS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC, "bilinear", "bicubic")


def resizing_kernel() -> str:
    """Return the library that resizes color images on this machine, for cache keys: "torch <version>" or "Pillow"."""
    has_kernel = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return f"torch {torch.__version__}" if has_kernel else "Pillow"


class Resize(v2.Resize):  # type: ignore[misc]  # torchvision has no types
    """torchvision's Resize, but faster for color Pillow images."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """See torchvision."""
        if not (_is_color(inpt) and resizes_bytes(self)):
            return super().transform(inpt, params)
        return as_image(_resized(as_pixels(inpt), self.size, self.interpolation, self.max_size))


class RandomResizedCrop(v2.RandomResizedCrop):  # type: ignore[misc]
    """torchvision's RandomResizedCrop with the same random numbers, but faster for color Pillow images."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """See torchvision."""
        if not (_is_color(inpt) and resizes_bytes(self)):
            return super().transform(inpt, params)
        left, top = params["left"], params["top"]
        crop = inpt.crop((left, top, left + params["width"], top + params["height"]))
        return as_image(_resized(as_pixels(crop), self.size, self.interpolation))


class ResizeKeepRatio(Resize):
    """timm's ResizeKeepRatio: scale images so that they cover ``size`` or fit into it, faster on color images."""

    def __init__(self, size: Size, *, fit: bool, interpolation: str) -> None:
        """``size``: (height, width). ``fit``: fit into it instead of covering it."""
        super().__init__(list(size), InterpolationMode(interpolation), antialias=True)
        self.fit = fit

    def scaled(self, given: Size) -> list[int]:
        """Return the height and width of an image of size ``given`` after the resize."""
        return list(scaled_size(given, (self.size[0], self.size[1]), fit=self.fit))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """See torchvision."""
        height, width = functional.get_size(inpt)
        return Resize(self.scaled((height, width)), self.interpolation, antialias=True)(inpt)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``repr``."""
        return f"size={self.size}, fit={self.fit}, interpolation={self.interpolation}, antialias=True"


def is_same_on_bytes(step: Any) -> bool:
    """Return whether a step has the same result for a color image as uint8 array and as Pillow image."""
    return isinstance(step, v2.CenterCrop | CenterCropOrPad) or resizes_bytes(step)


def has_bytes_form(step: Any) -> bool:
    """Return whether :func:`on_bytes` can apply a step to images with any number of channels."""
    return isinstance(step.on_image, v2.CenterCrop | CenterCropOrPad | Resize)


def resizes_bytes(step: Any) -> bool:
    """Return whether PyTorch's uint8 kernel can do this resize or RandomResizedCrop.

    False without antialiasing, because Pillow always antialiases.
    """
    is_resize = isinstance(step, Resize | RandomResizedCrop)
    return is_resize and bool(step.antialias) and step.interpolation in _FILTERS and resizing_kernel() != "Pillow"


def on_bytes(step: Any, pixels: Pixels) -> Pixels:
    """Apply a Resize, RandomResizedCrop or center crop to uint8 [h, w, C], without torchvision's dispatch overhead.

    A RandomResizedCrop draws the same random numbers from torch's generator as for a Pillow image.
    """
    if isinstance(step, ResizeKeepRatio):
        return _resized(pixels, step.scaled(pixels.shape[:2]), step.interpolation)
    if isinstance(step, Resize):
        return _resized(pixels, step.size, step.interpolation, step.max_size)
    if isinstance(step, RandomResizedCrop):
        box = step.make_params([as_tensor(pixels)])
        left, top = box["left"], box["top"]
        crop = pixels[top : top + box["height"], left : left + box["width"]]
        # The kernel would first split a window of a larger image into channels.
        return _resized(np.ascontiguousarray(crop), step.size, step.interpolation)
    if isinstance(step, CenterCropOrPad):
        return _center_crop_or_pad(pixels, step.size, step.fill)
    (height, width), (rows, columns) = pixels.shape[:2], step.size
    if height < rows or width < columns:
        padded: Pixels = functional.center_crop(as_tensor(pixels), step.size).permute(1, 2, 0).numpy()
        return padded
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return pixels[top : top + rows, left : left + columns]


def _center_crop_or_pad(pixels: Pixels, size: Size, fill: Any) -> Pixels:
    """Crop the center of an image; if the image is smaller than ``size``, pad it with the color ``fill``."""
    color = np.broadcast_to(np.asarray(fill, dtype=np.uint8), (size[1], pixels.shape[2]))
    lines = np.empty((size[0], color.size), dtype=np.uint8)
    lines[:] = color.reshape(-1)  # whole rows, because broadcasting only the channels is slower
    made = lines.reshape(*size, -1)
    source, target = [], []
    for have, want in zip(pixels.shape[:2], size, strict=True):
        count = min(have, want)
        first, at = round(max(0, have - want) / 2), max(0, want - have) // 2  # rounded as in torchvision and timm
        source.append(slice(first, first + count))
        target.append(slice(at, at + count))
    made[tuple(target)] = pixels[tuple(source)]
    return made


def as_tensor(pixels: Pixels) -> Tensor:
    """View uint8 [h, w, C] as [C, h, w], channels last in memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _is_color(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.mode == "RGB"


def _resized(pixels: Pixels, size: Any, interpolation: Any, max_size: int | None = None) -> Pixels:
    resized: Tensor = functional.resize(as_tensor(pixels), size, interpolation, max_size, antialias=True)
    return resized.permute(1, 2, 0).contiguous().numpy()
