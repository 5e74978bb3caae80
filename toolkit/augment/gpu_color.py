"""Color transforms, blur and random erasing of whole batches.

Colors are computed as in Pillow on uint8 images, including the integer values after each operation, so that a batch
gets the same result as Pillow images in a worker. Values are stored as float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.augment.gpu_crop_flip import Floats, Indices, SampledParams, randint
from toolkit.data.tensor_rows import assign_rows, index_rows
from toolkit.recipe.image_size import Size

ATTEMPTS = 10
"""Maximum number of rectangles that torchvision samples for random erasing before it leaves the image unchanged."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter: brightness, contrast, saturation and hue, in a random order for each image."""

    ranges: tuple[tuple[float, float] | None, ...]
    """Ranges of the factors of brightness, contrast and saturation, and of the hue's shift as a fraction of the color
    circle; None: unchanged."""
    p: float
    random_count: int = 9

    def plan(self, u: Floats, size: Size) -> SampledParams:
        """See :class:`toolkit.augment.gpu_crop_flip.BatchOp`.

        Columns of the table: the four factors, then the four operations (0..3) in order.
        """
        factors = [np.ones(len(u)) if span is None else span[0] + (span[1] - span[0]) * u[:, 1 + kind]
                   for kind, span in enumerate(self.ranges)]  # fmt: skip
        order = np.argsort(u[:, 5:9], axis=1, kind="stable")
        return SampledParams(u[:, 0] < self.p, np.column_stack([*factors, order]), size)

    def apply(self, images: Tensor, plan: SampledParams, table: Tensor) -> Tensor:
        """Apply the operations in each image's order, batching the images that share the current operation."""
        # Contiguous format, because sums over the channels of a pixel are slow in channels_last.
        images = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        active = [kind for kind, span in enumerate(self.ranges) if span is not None]
        if images.shape[1] == 1:  # gray has neither saturation nor hue
            active = [kind for kind in active if kind in (BRIGHTNESS, CONTRAST)]
        for turn in range(4):
            for kind in active:
                due = np.flatnonzero(plan.table[:, 4 + turn] == kind)
                if len(due) == len(images):
                    images = _OPERATIONS[kind](images, table[:, kind, None, None, None])
                elif len(due):
                    where = torch.from_numpy(due).to(images.device, non_blocking=True)
                    some = index_rows(images, where)
                    assign_rows(images, where, _OPERATIONS[kind](some, table[where, kind, None, None, None]))
        return images


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by ``factor``.

    This and the other three operations take and return integer values 0..255 as float32 [n, C, H, W]; ``factor`` is
    [n, 1, 1, 1].
    """
    return (images * factor).clamp_(0, 255).floor_()


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with the mean of its grayscale version."""
    gray = luma(images) if images.shape[1] == 3 else images
    # A float64 sum of integers is exact, so it depends neither on the order nor on the rest of the batch.
    mean = (gray.mean((1, 2, 3), keepdim=True, dtype=torch.float64) + 0.5).floor_().float()
    return _blend(mean, images, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its grayscale version."""
    return _blend(luma(images), images, factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate hues by ``shift``, a fraction of the color circle. Hue and saturation are 8-bit, as in Pillow's HSV."""
    red, green, blue = images.unbind(1)
    low, value = images.amin(1), images.amax(1)
    span = value - low
    divisor = span.clamp(min=1)
    to_red, to_green, to_blue = (value - red) / divisor, (value - green) / divisor, (value - blue) / divisor
    sector = torch.where(
        red == value,
        to_blue - to_green,
        torch.where(green == value, to_red + 2 - to_blue, to_green + 4 - to_red),
    )
    hue = ((sector / 6 + 1).remainder_(1) * 255).floor_()
    hue = (hue + (shift[:, 0] * 255).trunc()).remainder_(256) * (6 / 255)
    drop = (span / value.clamp(min=1) * 255).floor_() / 255 * value
    made = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        place = (hue + offset).remainder_(6)
        share = torch.minimum(place, 4 - place).clamp_(0, 1)
        made[:, channel] = (value - drop * share).add_(0.5).floor_()
    return made


_OPERATIONS = {BRIGHTNESS: adjust_brightness, CONTRAST: adjust_contrast, SATURATION: adjust_saturation, HUE: adjust_hue}


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Compute base + factor * (images - base) as integer values in 0..255."""
    return (images - base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def luma(images: Tensor) -> Tensor:
    """Convert color [n, 3, H, W] to gray [n, 1, H, W], rounded as in Pillow (ITU-R 601-2, 16-bit weights)."""
    red, green, blue = images.unbind(1)
    # All products and sums are integers below 2**24, so exact in float32.
    gray = (red * 19595).add_(green * 38470).add_(blue * 7471).add_(32768)
    return gray.mul_(2.0**-16).floor_()[:, None]


@dataclass(frozen=True)
class Grayscale:
    """torchvision's Grayscale and RandomGrayscale; the number of channels is kept."""

    p: float
    random_count: int = 1

    def plan(self, u: Floats, size: Size) -> SampledParams:
        """See :class:`toolkit.augment.gpu_crop_flip.BatchOp`. The table has no columns."""
        return SampledParams(u[:, 0] < self.p, np.empty((len(u), 0)), size)

    def apply(self, images: Tensor, plan: SampledParams, table: Tensor) -> Tensor:
        """See :class:`toolkit.augment.gpu_crop_flip.BatchOp`."""
        if images.shape[1] != 3:
            return images
        return torch.empty_like(images).copy_(luma(images.float()))


@dataclass(frozen=True)
class GaussianBlur:
    """torchvision's GaussianBlur."""

    kernel_size: tuple[int, int]
    """Width and height in pixels; odd."""
    sigma: tuple[float, float]
    p: float
    rounded: bool
    """Whether the result is rounded to integer values, as a uint8 image has."""
    random_count: int = 2

    def draw(self, u: Floats) -> Floats:
        """Sample the standard deviation of each image's kernel in pixels, [m]."""
        drawn: Floats = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * u[:, 1]
        return drawn

    def plan(self, u: Floats, size: Size) -> SampledParams:
        """See :class:`toolkit.augment.gpu_crop_flip.BatchOp`.

        Columns of the table: the kernel's weights along x, then along y, each from the center outward.
        """
        sigma = self.draw(u)
        return SampledParams(u[:, 0] < self.p, np.concatenate([_kernel(k, sigma) for k in self.kernel_size], 1), size)

    def apply(self, images: Tensor, plan: SampledParams, table: Tensor) -> Tensor:
        """Sum the weighted shifted images along x and then y: elementwise, so the rest of the batch has no effect."""
        along_x, along_y = (k // 2 for k in self.kernel_size)
        images = F.pad(images.float(), (along_x, along_x, along_y, along_y), mode="reflect")
        images = _weighted(images, table[:, : along_x + 1], 3)
        images = _weighted(images, table[:, along_x + 1 :], 2)
        return images.round_() if self.rounded else images


def _kernel(size: int, sigma: Floats) -> Floats:
    """Return the weights of torchvision's Gaussian kernel from the center outward, [m, size // 2 + 1]."""
    reach = (size - 1) / (2 * math.sqrt(2))
    x = np.linspace(-reach, reach, size)[size // 2 :]
    weights = np.exp(-((x / sigma[:, None]) ** 2))
    total = weights[:, 0].copy()
    for column in range(1, weights.shape[1]):  # one by one, because a sum over an axis may round differently
        total += 2 * weights[:, column]
    kernel: Floats = weights / total[:, None]
    return kernel


def _weighted(images: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Sum the images shifted along ``axis`` with weights [n, reach + 1] from the center outward."""
    reach = weights.shape[1] - 1
    length = images.shape[axis] - 2 * reach
    weights = weights[:, :, None, None, None]
    total = images.narrow(axis, reach, length) * weights[:, 0]
    for shift in range(1, reach + 1):
        pair = images.narrow(axis, reach - shift, length) + images.narrow(axis, reach + shift, length)
        total += pair.mul_(weights[:, shift])
    return total


@dataclass(frozen=True)
class RandomErasing:
    """torchvision's RandomErasing (Zhong et al. 2020, arXiv:1708.04896)."""

    scale: tuple[float, float]
    """Range of the erased fraction of the image's area."""
    ratio: tuple[float, float]
    """Range of the rectangle's height divided by its width."""
    value: tuple[float, ...]
    """Value of erased pixels: one for all channels, or one per channel."""
    p: float
    random_count: int = 1 + 2 * ATTEMPTS + 2

    def plan(self, u: Floats, size: Size) -> SampledParams:
        """See :class:`toolkit.augment.gpu_crop_flip.BatchOp`.

        Columns of the table: top, left, height and width of the rectangle in pixels; all 0 if nothing is erased.
        """
        area, log_ratio = size[0] * size[1], np.log(self.ratio)
        erased = area * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 1 : 1 + ATTEMPTS])
        aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[:, 1 + ATTEMPTS : 1 + 2 * ATTEMPTS])
        height, width = np.rint(np.sqrt(erased * aspect)), np.rint(np.sqrt(erased / aspect))
        fits = (height < size[0]) & (width < size[1])
        first = fits.argmax(1)[:, None]
        shape: list[Indices] = [np.take_along_axis(side, first, 1)[:, 0].astype(np.int64) for side in (height, width)]
        corner = [randint(u[:, -2 + axis], np.maximum(size[axis] - shape[axis] + 1, 1)) for axis in (0, 1)]
        applied = (u[:, 0] < self.p) & fits.any(1)
        return SampledParams(applied, np.column_stack([*corner, *shape]) * applied[:, None].astype(np.float64), size)

    def apply(self, images: Tensor, plan: SampledParams, table: Tensor) -> Tensor:
        """See :class:`toolkit.augment.gpu_crop_flip.BatchOp`."""
        images = images.clone()
        self.erase(images, plan, table)
        return images

    def erase(self, images: Tensor, plan: SampledParams, table: Tensor) -> None:
        """Erase the rectangles in place."""
        value = torch.tensor(self.value, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        if images.device.type == "cpu":
            for image, (top, left, height, width) in zip(images, plan.table.astype(int).tolist(), strict=True):
                image[:, top : top + height, left : left + width] = value
        else:
            images.copy_(torch.where(_within(table, images.shape[2:]), value, images))


def _within(boxes: Tensor, size: torch.Size) -> Tensor:
    """Return masks of the pixels in each image's box (top, left, height, width): [n, 4] -> bool [n, 1, H, W]."""
    top, left, height, width = (boxes[:, column, None] for column in range(4))
    y, x = (torch.arange(n, device=boxes.device) for n in size)
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return (rows[:, :, None] & columns[:, None])[:, None]
