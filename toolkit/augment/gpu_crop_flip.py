"""Flips, crops and padding of whole batches as index maps, and the interface of all batch operations.

Consecutive flips, crops and padding are composed into one map of rows and one of columns, and pixels are copied once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toolkit.data.tensor_rows import memory_format
from toolkit.errors import UserError
from toolkit.recipe.image_size import Size

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
LARGE = 2**15
"""Minimum number of values per image for copying slices image by image on a CPU, where it is faster than indexing."""


@dataclass(frozen=True)
class SampledParams:
    """The sampled parameters of one operation for a batch of m images."""

    applied: Flags
    """Whether the operation changes each image, [m]."""
    table: Floats
    """Parameters, [m, k]; each operation defines its columns."""
    size: Size
    """Size of the resulting images."""

    def of(self, indices: slice | Indices) -> SampledParams:
        """Return the parameters of some of the images."""
        return SampledParams(self.applied[indices], self.table[indices], self.size)


class BatchOp(Protocol):
    """An operation on the pixels of a batch."""

    @property
    def random_count(self) -> int:
        """Number of random numbers needed per image."""
        ...

    def plan(self, u: Floats, size: Size) -> SampledParams:
        """Sample the parameters of m images of equal size from uniform numbers in [0, 1), [m, random_count]."""
        ...

    def apply(self, images: Tensor, plan: SampledParams, table: Tensor) -> Tensor:
        """Transform images [n, C, h, w] (uint8, or float32 in 0..255) to [n, C, H, W], never in place.

        Only called with images for which ``plan.applied`` is true. ``table``: ``plan.table`` as float32 [n, k] on the
        images' device.
        """
        ...


@dataclass(frozen=True)
class RandomFlip:
    """torchvision's RandomHorizontalFlip and RandomVerticalFlip."""

    vertical: bool
    p: float
    random_count: int = 1

    def draw(self, u: Floats) -> Flags:
        """Sample whether each image is flipped, [m]."""
        flipped: Flags = u[:, 0] < self.p
        return flipped

    def maps(self, u: Floats, size: Size) -> tuple[Indices, Indices]:
        """Return the input row of each output row [m, H] and the input columns [m, W] of m images; -1 for padding."""
        rows, columns = (np.broadcast_to(np.arange(n), (len(u), n)) for n in size)
        flipped = self.draw(u)[:, None]
        if self.vertical:
            return np.where(flipped, rows[:, ::-1], rows), columns
        return rows, np.where(flipped, columns[:, ::-1], columns)

    def matrices(self, u: Floats, size: Size) -> Floats:
        """Return the flips as matrices from output to input coordinates, [m, 3, 3]."""
        height, width = size
        mirror = np.array([[1, 0, 0], [0, -1, height], [0, 0, 1]] if self.vertical else [[-1, 0, width], [0, 1, 0],
                          [0, 0, 1]], dtype=np.float64)  # fmt: skip
        return np.where(self.draw(u)[:, None, None], mirror, np.eye(3))


@dataclass(frozen=True)
class AlternatingFlip:
    """Horizontal flip in every second epoch (``augment.alternating_flip``)."""

    random_count: int = 1

    def maps(self, u: Floats, size: Size) -> tuple[Indices, Indices]:
        """See :meth:`RandomFlip.maps`; ``u`` comes from :func:`alternating_uniforms`."""
        return RandomFlip(vertical=False, p=0.5).maps(u, size)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomCrop: a random window of ``size`` in the padded image."""

    size: Size
    padding: tuple[int, int, int, int]
    """Padding in pixels: left, right, top, bottom."""
    pad_if_needed: bool
    mode: str
    """Padding mode: constant, edge, reflect or symmetric."""
    p: float
    random_count: int = 3

    def draw(self, u: Floats, size: Size) -> tuple[Indices, Indices]:
        """Sample the top and left of the window within the padded image, [m] each.

        Raises UserError if the padded image is smaller than the window.
        """
        corners: list[Indices] = []
        for axis, (before, after) in enumerate(self._paddings(size)):
            room = size[axis] + before + after - self.size[axis] + 1
            if room < 1:
                wanted, found = (f"{height} x {width}" for height, width in (self.size, size))
                raise UserError(
                    f"augment: RandomCrop of {wanted} pixels from images of {found}: set a smaller size, padding, or "
                    "pad_if_needed = true"
                )
            corners.append(randint(u[:, 1 + axis], room))
        return corners[0], corners[1]

    def maps(self, u: Floats, size: Size) -> tuple[Indices, Indices]:
        """See :meth:`RandomFlip.maps`."""
        found = []
        for axis, (corner, padding) in enumerate(zip(self.draw(u, size), self._paddings(size), strict=True)):
            found.append(padded(size[axis], padding, self.mode)[corner[:, None] + np.arange(self.size[axis])])
        applied = u[:, 0] < self.p
        if applied.all():
            return found[0], found[1]
        if self.size != size:
            raise UserError("augment: RandomCrop with apply_p leaves images of different sizes in a batch")
        rows, columns = (np.where(applied[:, None], one, np.arange(n)) for one, n in zip(found, size, strict=True))
        return rows, columns

    def _paddings(self, size: Size) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the padding (top, bottom), (left, right) for images of this size."""
        left, right, top, bottom = self.padding
        sides = [(top, bottom), (left, right)]
        if self.pad_if_needed:
            for axis, (before, after) in enumerate(sides):
                missing = max(0, self.size[axis] - size[axis] - before - after)
                sides[axis] = (before + missing, after + missing)
        return sides[0], sides[1]


@dataclass(frozen=True)
class CenterCrop:
    """torchvision's CenterCrop and timm's CenterCropOrPad: images smaller than ``size`` are padded."""

    size: Size
    random_count: int = 0

    def maps(self, u: Floats, size: Size) -> tuple[Indices, Indices]:
        """See :meth:`RandomFlip.maps`."""
        found = []
        for have, want in zip(size, self.size, strict=True):
            missing = max(0, want - have)
            line = padded(have, (missing // 2, (missing + 1) // 2), "constant")
            start = round((len(line) - want) / 2)  # half to even, as in torchvision
            found.append(np.broadcast_to(line[start : start + want], (len(u), want)))
        return found[0], found[1]


@dataclass(frozen=True)
class Pad:
    """torchvision's Pad."""

    padding: tuple[int, int, int, int]
    """Padding in pixels: left, right, top, bottom."""
    mode: str
    random_count: int = 0

    def maps(self, u: Floats, size: Size) -> tuple[Indices, Indices]:
        """See :meth:`RandomFlip.maps`."""
        left, right, top, bottom = self.padding
        rows, columns = padded(size[0], (top, bottom), self.mode), padded(size[1], (left, right), self.mode)
        return np.broadcast_to(rows, (len(u), len(rows))), np.broadcast_to(columns, (len(u), len(columns)))


def padded(n: int, padding: tuple[int, int], mode: str) -> Indices:
    """Return the source index of each position of a line of n padded before and after; -1 for constant padding."""
    line = np.arange(n)
    values = {"constant_values": -1} if mode == "constant" else {}
    indices: Indices = np.pad(line, padding, mode=mode, **values)  # type: ignore[call-overload]
    return indices


IndexMap = RandomFlip | AlternatingFlip | RandomCrop | CenterCrop | Pad
"""The transforms that only rearrange whole rows and columns of pixels."""


@dataclass(frozen=True)
class CropFlipOp:
    """Consecutive flips, crops and padding as a single copy of the remaining pixels."""

    steps: tuple[IndexMap, ...]
    fill: tuple[float, ...] | None
    """Padding value: one for all channels, or one per channel; None without constant padding."""

    @property
    def random_count(self) -> int:
        """See :class:`BatchOp`."""
        return sum(step.random_count for step in self.steps)

    def plan(self, u: Floats, size: Size) -> SampledParams:
        """See :class:`BatchOp`. Columns of the table: H input rows, then W input columns; -1 for fill."""
        lines = [np.broadcast_to(np.arange(n), (len(u), n)) for n in size]
        start = 0
        for step in self.steps:
            more = step.maps(u[:, start : start + step.random_count], (lines[0].shape[1], lines[1].shape[1]))
            lines = [_compose(line, further) for line, further in zip(lines, more, strict=True)]
            start += step.random_count
        new = (lines[0].shape[1], lines[1].shape[1])
        if new == size:
            applied = (lines[0] != np.arange(size[0])).any(1) | (lines[1] != np.arange(size[1])).any(1)
        else:
            applied = np.ones(len(u), dtype=np.bool_)
        return SampledParams(applied, np.concatenate(lines, 1).astype(np.float64), new)

    def apply(self, images: Tensor, plan: SampledParams, table: Tensor) -> Tensor:
        """See :class:`BatchOp`."""
        height, channels = plan.size[0], images.shape[1]
        fill = torch.tensor(self.fill or (0,), dtype=images.dtype, device=images.device).view(-1, 1, 1)
        if images.device.type == "cpu" and images[0].numel() >= LARGE:
            shape = (len(images), channels, *plan.size)
            made = torch.empty(shape, dtype=images.dtype, memory_format=memory_format(images))
            for image, result, line in zip(images, made, plan.table.astype(np.int64), strict=True):
                _copy(image, result, line[:height], line[height:], fill)
            return made
        lines = table.long()
        is_filled = bool((plan.table < 0).any())
        return _gather(images, lines[:, :height, None], lines[:, None, height:], fill if is_filled else None)


def _gather(images: Tensor, rows: Tensor, columns: Tensor, fill: Tensor | None) -> Tensor:
    """Index images [n, C, h, w] with rows int64 [n, H, 1] and columns [n, 1, W]; index -1 gives ``fill``.

    Returns channels_last [n, C, H, W].
    """
    count, channels, height, width = images.shape
    first = torch.arange(count, device=images.device)[:, None, None] * (height * width)
    indices = first + rows.clamp(min=0) * width + columns.clamp(min=0)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, indices.view(-1))
    taken = pixels.view(*indices.shape, channels).permute(0, 3, 1, 2)
    return taken if fill is None else torch.where(((rows < 0) | (columns < 0))[:, None], fill, taken)


def _compose(first: Indices, second: Indices) -> Indices:
    """Compose ``second`` (output -> intermediate) with ``first`` (intermediate -> input) per image, [m, n]."""
    through: Indices = np.take_along_axis(first, second.clip(min=0), 1)
    return np.where(second < 0, -1, through)


def _copy(image: Tensor, result: Tensor, rows: Indices, columns: Indices, fill: Tensor) -> None:
    """Copy the given rows and columns of ``image`` to ``result`` [C, H, W], with slices if they are contiguous."""
    (top, bottom, row), (left, right, column) = _run(rows), _run(columns)
    if (top, left) != (0, 0) or (bottom, right) != result.shape[1:]:
        result.copy_(fill)
    if bottom == top or right == left:
        return
    window = result[:, top:bottom, left:right]
    if not row or not column:  # reflected padding
        taken = image[:, torch.from_numpy(rows[top:bottom])]
        window.copy_(taken[:, :, torch.from_numpy(columns[left:right])])
        return
    down, across = sorted((rows[top], rows[bottom - 1])), sorted((columns[left], columns[right - 1]))
    part = image[:, down[0] : down[1] + 1, across[0] : across[1] + 1]
    backwards = [axis for axis, step in ((1, row), (2, column)) if step < 0]
    window.copy_(part.flip(backwards) if backwards else part)


def _run(line: Indices) -> tuple[int, int, int]:
    """Return the range (start, end) of indices that are not -1, and its step: 1, -1, or 0 if it is not contiguous."""
    valid = np.flatnonzero(line >= 0)
    if not len(valid):
        return 0, 0, 1
    first, end = int(valid[0]), int(valid[-1]) + 1
    steps = np.diff(line[first:end])
    step = int(steps[0]) if len(steps) else 1
    return first, end, step if abs(step) == 1 and (steps == step).all() and end - first == len(valid) else 0


def randint(u: Floats, n: int | Indices) -> Indices:
    """Convert uniform numbers in [0, 1) to integers in 0..n-1."""
    whole: Indices = np.minimum(np.floor(u * n), np.asarray(n) - 1).astype(np.int64)
    return whole
