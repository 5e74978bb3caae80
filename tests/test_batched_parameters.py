"""The parameters of batched augmentation have the documented distributions, which are those of torchvision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from batches import augmentation, numbers
from torchvision.transforms import v2

from toolkit.augment.gpu import keyed_uniforms
from toolkit.augment.gpu_affine import AffineOp, RandomAffine, RandomPerspective, perspective_matrices
from toolkit.augment.gpu_color import ColorJitter, GaussianBlur, Grayscale, RandomErasing
from toolkit.augment.gpu_crop_flip import CropFlipOp, RandomCrop, RandomFlip

N = 4000
SIZE = (40, 60)
Sample = npt.NDArray[np.float64]


def uniforms(random_count: int, key: int = 0) -> Sample:
    return keyed_uniforms(np.arange(N), random_count, key)


def only_pass(**entry: Any) -> Any:
    """Return the only pass that implements the transform, for images that need no crop."""
    passes = augmentation(entry, size=60).passes
    assert isinstance(passes[0], CropFlipOp)
    return passes[1]


def assert_uniform(sample: Sample, low: float, high: float) -> None:
    """Check uniformity by a Kolmogorov-Smirnov test; one in a thousand uniform samples exceeds the bound."""
    assert sample.min() >= low
    assert sample.max() <= high
    expected = (np.sort(sample) - low) / (high - low)
    steps = np.arange(len(sample) + 1) / len(sample)
    distance = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(len(sample))


def assert_alike(of_toolkit: Sample, of_torchvision: Sample) -> None:
    """Check by a Kolmogorov-Smirnov test that two samples have one distribution; one in a thousand pairs fails."""
    positions = np.union1d(of_toolkit, of_torchvision)
    shares = [np.searchsorted(np.sort(one), positions, side="right") / len(one) for one in (of_toolkit, of_torchvision)]
    assert np.abs(shares[0] - shares[1]).max() < 1.95 * math.sqrt(1 / len(of_toolkit) + 1 / len(of_torchvision))


def assert_share(flags: npt.NDArray[np.bool_], p: float) -> None:
    """Check that the share of True is within four standard deviations of ``p``."""
    assert abs(flags.mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(flags))


def of_torchvision(transform: v2.Transform, n: int = N) -> list[dict[str, Any]]:
    """Return torchvision's own parameters."""
    torch.manual_seed(0)
    image = torch.zeros(3, *SIZE)
    return [transform.make_params([image]) for _ in range(n)]


def test_the_uniform_numbers_are_uniform_and_independent() -> None:
    u = keyed_uniforms(np.arange(200), 200, 1, 2)
    assert_uniform(u.ravel()[:N], 0, 1)
    assert_uniform(u.T.ravel()[:N], 0, 1)
    correlations = np.corrcoef(u.T)[np.triu_indices(200, 1)]
    assert np.abs(correlations).max() < 5.5 / math.sqrt(200)
    assert abs(correlations.mean()) < 4 / math.sqrt(200 * len(correlations))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_transforms_are_applied_with_their_probability(p: float) -> None:
    for entry in ({"name": "RandomHorizontalFlip"}, {"name": "RandomVerticalFlip"}):
        augment = augmentation({**entry, "p": p}, size=32)
        flips = augment.passes[0].steps[-1]  # type: ignore[attr-defined]
        assert isinstance(flips, RandomFlip)
        assert_share(flips.draw(numbers(augment, 0, np.arange(N))), p)
    for one in (
        only_pass(name="RandomPerspective", p=p),
        only_pass(name="RandomGrayscale", p=p),
        only_pass(name="GaussianBlur", kernel_size=3, apply_p=p),
        only_pass(name="ColorJitter", hue=0.1, apply_p=p),
        only_pass(name="RandomRotation", degrees=10, apply_p=p),
        only_pass(name="RandomErasing", p=p),
    ):
        assert_share(one.plan(uniforms(one.random_count), SIZE).applied, p)
    crop = augmentation({"name": "RandomCrop", "padding": 4, "apply_p": p}, size=32).passes[0].steps[-1]  # type: ignore[attr-defined]
    rows, _ = crop.maps(uniforms(3), (32, 32))
    assert_share((rows != np.arange(32)).any(1), p * 8 / 9)  # the middle one of nine positions changes nothing


def test_the_two_probabilities_of_a_transform_are_multiplied() -> None:
    assert_share(only_pass(name="RandomGrayscale", p=0.5, apply_p=0.4).plan(uniforms(1), SIZE).applied, 0.2)


def test_rotation_is_uniform() -> None:
    one = only_pass(name="RandomRotation", degrees=[-20.0, 50.0])
    assert isinstance(one, AffineOp)
    assert isinstance(one.warp, RandomAffine)
    assert_uniform(one.warp.draw(uniforms(6), SIZE)[:, 0], -20, 50)


def test_affine_is_drawn_as_torchvision_does() -> None:
    arguments: dict[str, Any] = {"degrees": 15, "translate": [0.1, 0.4], "scale": [0.7, 1.2]}
    arguments["shear"] = [-5.0, 9.0, 0.0, 3.0]
    one = only_pass(name="RandomAffine", **arguments)
    drawn = one.warp.draw(uniforms(6), SIZE)
    expected = of_torchvision(v2.RandomAffine(**arguments))
    columns = [
        np.array([[each["angle"], *each["translate"], each["scale"], *each["shear"]] for each in expected])[:, column]
        for column in range(6)
    ]
    for of_toolkit, other in zip(drawn.T, columns, strict=True):
        assert_alike(of_toolkit, other)
    assert np.array_equal(drawn[:, 1:3], drawn[:, 1:3].round())
    assert set(np.abs(drawn[:, 1])) == set(range(7))  # a tenth of 60 pixels


def test_shear_of_two_numbers_is_along_x_alone() -> None:
    drawn = only_pass(name="RandomAffine", degrees=0, shear=10).warp.draw(uniforms(6), SIZE)
    assert_uniform(drawn[:, 4], -10, 10)
    assert not drawn[:, [0, 1, 2, 5]].any()
    assert (drawn[:, 3] == 1).all()


@pytest.mark.parametrize("distortion", [0.0, 0.3, 1.0])
def test_perspective_moves_each_corner_inwards(distortion: float) -> None:
    height, width = SIZE
    corners = RandomPerspective(distortion).draw(uniforms(8), SIZE)
    far_x, far_y = int(distortion * (width // 2)), int(distortion * (height // 2))
    left, right, top, bottom = corners[:, [0, 3], 0], corners[:, 1:3, 0], corners[:, :2, 1], corners[:, 2:, 1]
    assert (left.min(), left.max()) == (0, far_x)
    assert (right.min(), right.max()) == (width - 1 - far_x, width - 1)
    assert (top.min(), top.max()) == (0, far_y)
    assert (bottom.min(), bottom.max()) == (height - 1 - far_y, height - 1)
    for positions in (left, top):
        counts = np.bincount(positions.ravel())
        assert np.abs(counts - counts.mean()).max() <= 5 * math.sqrt(counts.mean())


def test_perspectives_that_map_the_origin_to_infinity_give_finite_pixels() -> None:
    moves = np.array(list(itertools.product(range(3), repeat=8))).reshape(-1, 4, 2)
    corners = moves + np.array([[0, 0], [5, 0], [5, 5], [0, 5]])  # all that are possible for an image of 8 x 8 pixels
    matrices = perspective_matrices(corners, (8, 8))
    assert (np.abs(matrices[:, 2, 2]) < 1e-9).any()
    x, y, w = np.moveaxis(matrices @ np.concatenate([corners, np.ones((len(corners), 4, 1))], 2).swapaxes(1, 2), 1, 0)
    assert np.allclose(x / w, [0, 7, 7, 0])
    assert np.allclose(y / w, [0, 0, 7, 7])
    for interpolation in ("nearest", "bilinear"):
        augment = augmentation({"name": "RandomPerspective", "p": 1.0, "interpolation": interpolation}, size=8)
        made = augment(torch.full((N, 3, 8, 8), 255, dtype=torch.uint8), 0, torch.arange(N))
        assert made.min() == 0
        assert made.max() == 1
        assert made.isfinite().all()


def test_crop_positions_are_uniform() -> None:
    tops, lefts = RandomCrop((32, 32), (4, 4, 2, 2), False, "constant", 1.0).draw(uniforms(3), (32, 32))
    for positions, count in ((tops, 5), (lefts, 9)):
        counts = np.bincount(positions, minlength=count)
        assert len(counts) == count
        assert np.abs(counts - N / count).max() <= 5 * math.sqrt(N / count)


def test_jitter_factors_are_uniform_and_every_order_occurs() -> None:
    one = only_pass(name="ColorJitter", brightness=0.4, contrast=[0.5, 3.0], saturation=2.0, hue=[-0.1, 0.3])
    assert isinstance(one, ColorJitter)
    table = one.plan(uniforms(9), SIZE).table
    for column, (low, high) in enumerate([(0.6, 1.4), (0.5, 3.0), (0.0, 3.0), (-0.1, 0.3)]):
        assert_uniform(table[:, column], low, high)
    orders, counts = np.unique(table[:, 4:], axis=0, return_counts=True)
    assert [tuple(order) for order in orders] == list(itertools.permutations(range(4)))
    assert np.abs(counts - N / 24).max() <= 5 * math.sqrt(N / 24)


def test_blur_strength_is_uniform_in_its_range() -> None:
    one = only_pass(name="GaussianBlur", kernel_size=5, sigma=[0.5, 1.5])
    assert isinstance(one, GaussianBlur)
    assert_uniform(one.draw(uniforms(2)), 0.5, 1.5)
    weights = one.plan(uniforms(2), SIZE).table[:, :3]
    assert np.allclose(weights[:, 0] + 2 * weights[:, 1:].sum(1), 1)
    assert not Grayscale(0.0).plan(uniforms(1), SIZE).applied.any()


@pytest.mark.parametrize("arguments", [{}, {"scale": [0.1, 0.9], "ratio": [0.2, 8.0]}])
def test_rectangles_to_erase_are_drawn_as_torchvision_does(arguments: dict[str, Any]) -> None:
    one = only_pass(name="RandomErasing", p=1.0, **arguments)
    assert isinstance(one, RandomErasing)
    plan = one.plan(uniforms(one.random_count), SIZE)
    expected = [each for each in of_torchvision(v2.RandomErasing(p=1.0, **arguments)) if each["v"] is not None]
    assert abs(plan.applied.mean() - len(expected) / N) < 0.01
    drawn = plan.table[plan.applied]
    for column, name in enumerate(("i", "j", "h", "w")):
        assert_alike(drawn[:, column], np.array([each[name] for each in expected], dtype=np.float64))
    assert (drawn[:, 0] + drawn[:, 2] <= SIZE[0]).all()
    assert (drawn[:, 1] + drawn[:, 3] <= SIZE[1]).all()
