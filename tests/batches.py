"""Photographs for tests of batched augmentation, and torchvision's result for the same random parameters."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from toolkit.augment.gpu import _AUGMENT_STREAM, GpuAugmentation, keyed_uniforms
from toolkit.augment.gpu_affine import AffineOp, RandomAffine, RandomPerspective
from toolkit.augment.gpu_color import ColorJitter, GaussianBlur, Grayscale, RandomErasing
from toolkit.augment.gpu_crop_flip import BatchOp, CenterCrop, CropFlipOp, Floats, Pad, RandomCrop, RandomFlip
from toolkit.augment.transforms import build_transform
from toolkit.data.preprocessing import Preprocessing
from toolkit.recipe.schema import AugmentConfig

ADJUST = (
    functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue,
)  # fmt: skip

Entry = dict[str, Any]


@functools.cache
def photographs(n: int, height: int, width: int) -> list[Image.Image]:
    """Return n different crops of the two photographs that come with scikit-learn."""
    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    pieces = []
    for i in range(n):
        left, top = 23 * i % 200, 17 * i % 150
        piece = pictures[i % 2].crop((left, top, left + 400, top + 250))
        pieces.append(piece.resize((width, height), Image.Resampling.BILINEAR))
    return pieces


def batch(images: list[Image.Image], *, channels_last: bool = True) -> Tensor:
    """Stack the images as uint8 [n, C, h, w]."""
    pixels = torch.from_numpy(np.stack([np.atleast_3d(np.asarray(image)) for image in images])).permute(0, 3, 1, 2)
    return pixels if channels_last else pixels.contiguous()


def augmentation(*train: Entry, size: int = 224, channels: int = 3, seed: int = 0, **values: Any) -> GpuAugmentation:
    """Return training augmentation for images of any size, with output in 0..1."""
    table = AugmentConfig.model_validate({"train": list(train), **values})
    preprocessing = Preprocessing(channels, (size, size), None, True, "bilinear", (0.0,) * channels, (1.0,) * channels)
    return batched(table, preprocessing, seed)


def batched(table: AugmentConfig, preprocessing: Preprocessing, seed: int = 0, split: str = "train") -> GpuAugmentation:
    """Return the augmentation after the resize, applied to batches."""
    resized = sum(entry.stage == "before_resize" for entry in getattr(table, split))
    resized += preprocessing.resize is not None
    return GpuAugmentation(build_transform(split, table, preprocessing).steps[resized:], preprocessing, seed)


def numbers(augment: GpuAugmentation, epoch: int, draws: Floats | Any) -> Floats:
    """Return the uniform random numbers of a batch, [m, n]."""
    return keyed_uniforms(
        np.asarray(draws), sum(one.random_count for one in augment.all), _AUGMENT_STREAM, augment.seed, epoch
    )


def one_by_one(augment: GpuAugmentation, image: Image.Image, u: Floats) -> Tensor:
    """Return torchvision's result for one image and the parameters that ``u`` [slots] gives: float32 [C, H, W] in 0..1.

    All transforms are applied to Pillow images, one after the other, as in a data worker.
    """
    for one in augment.passes:
        image = after(one, image, u[None, : one.random_count])
        u = u[one.random_count :]
    pixels = functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)
    if augment.erase is not None:
        plan = augment.erase.plan(u[None], (image.height, image.width))
        if plan.applied[0]:
            top, left, height, width = plan.table[0].astype(int).tolist()
            value = torch.tensor(augment.erase.value)[:, None, None]
            pixels = functional.erase(pixels, top, left, height, width, value)
    return pixels


def after(one: BatchOp, image: Any, u: Floats) -> Any:
    """Return the image after one pass, computed by torchvision; u: [1, slots]."""
    size = (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[-2:])
    match one:
        case CropFlipOp():
            start = 0
            for step in one.steps:
                image = moved(step, image, u[:, start : start + step.random_count], one.fill)
                start += step.random_count
            return image
        case AffineOp():
            own, flips = u[:, 1 : 1 + one.warp.random_count], u[:, 1 + one.warp.random_count :]
            for number, flip in enumerate(one.before):
                image = moved(flip, image, flips[:, number : number + 1], None)
            image = warped(one, image, own, size) if u[0, 0] < one.p else image
            for number, flip in enumerate(one.after):
                image = moved(flip, image, flips[:, len(one.before) + number :], None)
            return image
    plan = one.plan(u, size)
    if not plan.applied[0]:
        return image
    row = plan.table[0]
    match one:
        case ColorJitter():
            used = one.ranges
            for kind in row[4:].astype(int).tolist():
                image = image if used[kind] is None else ADJUST[kind](image, float(row[kind]))
            return image
        case Grayscale():
            return functional.rgb_to_grayscale(image, num_output_channels=3)
        case GaussianBlur():
            return functional.gaussian_blur(image, list(one.kernel_size), [float(one.draw(u)[0])] * 2)
        case RandomErasing():
            top, left, height, width = row.astype(int).tolist()
            value = torch.tensor(one.value)[:, None, None]
            return functional.erase(image, top, left, height, width, value.to(torch.uint8))
    raise AssertionError(one)


def moved(step: Any, image: Any, u: Floats, fill: tuple[float, ...] | None) -> Any:
    """Return the image after a flip, a crop or padding."""
    color = list(fill or (0.0,))
    match step:
        case RandomFlip():
            if not step.draw(u)[0]:
                return image
            return functional.vertical_flip(image) if step.vertical else functional.horizontal_flip(image)
        case RandomCrop():
            if u[0, 0] >= step.p:
                return image
            (above, below), (before, behind) = step._paddings((image.height, image.width))
            top, left = (int(corner[0]) for corner in step.draw(u, (image.height, image.width)))
            image = functional.pad(image, [before, above, behind, below], color, step.mode)
            return functional.crop(image, top, left, *step.size)
        case CenterCrop():
            return functional.center_crop(image, list(step.size))
        case Pad():
            left, right, above, below = step.padding
            return functional.pad(image, [left, above, right, below], color, step.mode)
    raise AssertionError(step)


def warped(one: AffineOp, image: Any, u: Floats, size: tuple[int, int]) -> Any:
    """Return the image after a rotation, an affine or a perspective transform."""
    mode = InterpolationMode.BILINEAR if one.bilinear else InterpolationMode.NEAREST
    rest: Entry = {"interpolation": mode, "fill": list(one.fill)}
    warp = one.warp
    if isinstance(warp, RandomPerspective):
        (height, width), corners = size, warp.draw(u, size)[0].tolist()
        own = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
        return functional.perspective(image, own, corners, **rest)
    assert isinstance(warp, RandomAffine)
    rest["center"] = None if warp.center is None else list(warp.center)
    angle, right, down, scale, shear_x, shear_y = warp.draw(u, size)[0].tolist()
    if warp.turn < 0:
        return functional.rotate(image, angle, **rest)
    return functional.affine(image, angle, [int(right), int(down)], scale, [shear_x, shear_y], **rest)
