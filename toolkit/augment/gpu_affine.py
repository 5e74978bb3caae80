"""Rotations, affine and perspective transforms of whole batches, each with one sampling grid.

Coordinates are continuous, as in Pillow: pixel i covers [i, i + 1). A matrix maps output coordinates to input
coordinates.

Flips next to such a transform are multiplied into its matrix. Two such transforms in a row are not fused: torchvision
takes the nearest pixel (its default) or interpolates after each, and a single pass with the product of their matrices
differs from that by more than 2/255 (see tests/test_batched_geometry.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.augment.gpu_crop_flip import Floats, Indices, RandomFlip, SampledParams, randint
from toolkit.recipe.image_size import Size


@dataclass(frozen=True)
class RandomAffine:
    """torchvision's RandomAffine, and its RandomRotation, which rotates in the opposite direction (``turn`` = -1)."""

    degrees: tuple[float, float]
    translate: tuple[float, float]
    """Maximum shift as a fraction of width and height."""
    scale: tuple[float, float]
    shear: tuple[float, float, float, float]
    """Range of the shear angle in degrees, along x and then along y."""
    center: tuple[float, float] | None
    """Center of rotation, x and y in pixels; None: the center of the image."""
    turn: int = 1
    random_count: int = 6

    def draw(self, u: Floats, size: Size) -> Floats:
        """Sample angle (degrees), shift along x and y (whole pixels), scale, shear along x and y (degrees): [m, 6]."""
        (height, width), (across, down) = size, self.translate
        ranges = [self.degrees, (-across * width, across * width), (-down * height, down * height), self.scale,
                  self.shear[:2], self.shear[2:]]  # fmt: skip
        low, high = np.array(ranges, dtype=np.float64).T
        drawn: Floats = low + (high - low) * u
        drawn[:, 1:3] = np.rint(drawn[:, 1:3])
        return drawn

    def matrices(self, u: Floats, size: Size) -> Floats:
        """Return the matrices from output coordinates (x, y, 1) to input coordinates of m images, [m, 3, 3]."""
        center = self.center or (size[1] / 2, size[0] / 2)
        return affine_matrices(self.draw(u, size) * [self.turn, 1, 1, 1, 1, 1], center)


def affine_matrices(values: Floats, center: tuple[float, float]) -> Floats:
    """Return the inverses of translate @ to_center @ rotate @ scale @ shear @ from_center, [m, 3, 3].

    The definitions are torchvision's; shear along y is applied after shear along x. ``values``: columns of
    :meth:`RandomAffine.draw`.
    """
    angle, shear_x, shear_y = (np.radians(np.ascontiguousarray(values[:, column])) for column in (0, 4, 5))
    shift, scale = values[:, 1:3], values[:, 3]
    a = np.cos(angle - shear_y) / np.cos(shear_y)
    b = -(a * np.tan(shear_x) + np.sin(angle))
    c = np.sin(angle - shear_y) / np.cos(shear_y)
    d = np.cos(angle) - c * np.tan(shear_x)
    found = np.zeros((len(values), 3, 3))
    found[:, 0, 0], found[:, 0, 1], found[:, 1, 0], found[:, 1, 1] = d / scale, -b / scale, -c / scale, a / scale
    moved = np.asarray(center) + shift
    for row in (0, 1):  # element by element: a matrix product may round differently with the number of images
        found[:, row, 2] = center[row] - (found[:, row, 0] * moved[:, 0] + found[:, row, 1] * moved[:, 1])
    found[:, 2, 2] = 1
    return found


@dataclass(frozen=True)
class RandomPerspective:
    """torchvision's RandomPerspective, which moves each corner inward."""

    distortion: float
    """Maximum movement as a fraction of half the width and height."""
    random_count: int = 8

    def draw(self, u: Floats, size: Size) -> Indices:
        """Sample the new corners (top left, top right, bottom right, bottom left), x and y in pixels: [m, 4, 2]."""
        height, width = size
        bounds = np.array([int(self.distortion * (width // 2)) + 1, int(self.distortion * (height // 2)) + 1])
        moved = randint(u.reshape(-1, 4, 2), np.broadcast_to(bounds, (4, 2)))
        far = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (np.array([width, height]) - bounds)
        corners: Indices = moved + far
        return corners

    def matrices(self, u: Floats, size: Size) -> Floats:
        """See :meth:`RandomAffine.matrices`."""
        return perspective_matrices(self.draw(u, size), size)


def perspective_matrices(corners: Indices, size: Size) -> Floats:
    """Return the matrices that map each of ``corners`` [m, 4, 2] to the corresponding image corner: [m, 3, 3].

    (x, y) -> ((ax + by + c) / (gx + hy + 1), (dx + ey + f) / (gx + hy + 1)): eight equations in eight unknowns. A map
    that takes (0, 0) to infinity has 0 instead of the 1, so these equations have no solution (torchvision fails).
    """
    height, width = size
    own = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], dtype=np.float64)
    equations = np.zeros((len(corners), 8, 8))
    x, y = corners[..., 0].astype(np.float64), corners[..., 1].astype(np.float64)
    for axis in (0, 1):
        rows, columns = slice(axis, None, 2), 3 * axis
        equations[:, rows, columns], equations[:, rows, columns + 1], equations[:, rows, columns + 2] = x, y, 1
        equations[:, rows, 6], equations[:, rows, 7] = -own[:, axis] * x, -own[:, axis] * y
    wanted = np.broadcast_to(own.reshape(8, 1), (len(corners), 8, 1))
    has_one = np.linalg.det(equations) != 0
    matrices = np.ones((len(corners), 9))
    matrices[has_one, :8] = np.linalg.solve(equations[has_one], wanted[has_one])[..., 0]
    if not has_one.all():  # the null space of the homogeneous equations
        matrices[~has_one] = np.linalg.svd(np.concatenate([equations, -wanted], 2)[~has_one])[2][:, -1]
    return matrices.reshape(-1, 3, 3)


@dataclass(frozen=True)
class AffineOp:
    """A rotation, affine or perspective transform, with the flips before and after it."""

    before: tuple[RandomFlip, ...]
    warp: RandomAffine | RandomPerspective
    p: float
    after: tuple[RandomFlip, ...]
    bilinear: bool
    fill: tuple[float, ...]
    """Value outside the image: one for all channels, or one per channel."""
    rounded: bool
    """Whether the result has integer values, as a uint8 image has."""

    @property
    def random_count(self) -> int:
        """See :class:`BatchOp`."""
        return 1 + self.warp.random_count + len(self.before) + len(self.after)

    def plan(self, u: Floats, size: Size) -> SampledParams:
        """See :class:`BatchOp`. Columns of the table: the matrix to coordinates in -1..1, row by row."""
        warped = u[:, 0] < self.p
        found = np.where(
            warped[:, None, None], self.warp.matrices(u[:, 1 : 1 + self.warp.random_count], size), np.eye(3)
        )
        applied, start = warped.copy(), 1 + self.warp.random_count
        for flip, comes_before in [(flip, True) for flip in self.before] + [(flip, False) for flip in self.after]:
            own = u[:, start : start + 1]
            mirror = flip.matrices(own, size)
            found = _product(mirror, found) if comes_before else _product(found, mirror)
            applied |= flip.draw(own)
            start += 1
        to_grid = np.array([[2 / size[1], 0, -1], [0, 2 / size[0], -1], [0, 0, 1]])
        return SampledParams(applied, _product(to_grid[None], found).reshape(-1, 9), size)

    def apply(self, images: Tensor, plan: SampledParams, table: Tensor) -> Tensor:
        """See :class:`BatchOp`."""
        grid = _grid(table, plan.size, projective=isinstance(self.warp, RandomPerspective))
        fill = torch.tensor(self.fill, device=images.device).view(1, -1, 1, 1)
        if not self.bilinear:
            pixels = images - fill if any(self.fill) else images.float()
            made = _sample(pixels, grid, "nearest", "zeros")
            return made.add_(fill) if any(self.fill) else made
        if self.rounded:  # as in Pillow: edge pixels are repeated beyond the edge, and fill is not blended with them
            x, y = grid.unbind(-1)
            inside = ((x >= -1) & (x < 1) & (y >= -1) & (y < 1))[:, None]
            return torch.where(inside, _sample(images.float(), grid, "bilinear", "border").floor_(), fill)
        # as in torchvision for tensors
        covered = _sample(torch.ones_like(images[:, :1], dtype=torch.float32), grid, "bilinear", "zeros")
        return _sample(images.float(), grid, "bilinear", "zeros").sub_(fill).mul_(covered).add_(fill)


def _sample(images: Tensor, grid: Tensor, mode: str, padding_mode: str) -> Tensor:
    return F.grid_sample(images, grid, mode=mode, padding_mode=padding_mode, align_corners=False)


def _product(left: Floats, right: Floats) -> Floats:
    """Compute left @ right for [m, 3, 3], summing each element in an order that does not depend on m."""
    product: Floats = sum(left[:, :, k, None] * right[:, k, None, :] for k in range(3))  # type: ignore[assignment]
    return product


def _grid(matrices: Tensor, size: Size, *, projective: bool) -> Tensor:
    """Return the input coordinates in -1..1 of every output pixel's center, [n, H, W, 2], for matrices [n, 9].

    Uses elementwise sums and products: a matrix product may use TF32, or an order that depends on the number of images.
    """
    height, width = size
    x = torch.arange(width, device=matrices.device) + 0.5
    y = torch.arange(height, device=matrices.device)[:, None] + 0.5
    value = [matrices[:, place, None, None] for place in range(9)]
    rows = 3 if projective else 2
    lines = [value[3 * row] * x + (value[3 * row + 1] * y + value[3 * row + 2]) for row in range(rows)]
    grid = matrices.new_empty((len(matrices), height, width, 2))
    for axis in (0, 1):
        if projective:
            torch.div(lines[axis], lines[2], out=grid[..., axis])
        else:
            grid[..., axis] = lines[axis]
    # Points at infinity are outside the image. grid_sample may multiply them by a weight of 0, which would give NaN.
    return grid.nan_to_num_(2.0, 2.0, -2.0) if projective else grid
