"""Test-time augmentation (TTA): the weighted mean of a model's logits over several views of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.data.preprocessing import Preprocessing
from toolkit.errors import UserError, first_line
from toolkit.recipe.image_size import Size
from toolkit.training.trained_model import TrainedModel
from toolkit.tta import parse_tta

View = Callable[[Tensor], Tensor]
"""Maps inputs [n, C, H, W] to other inputs."""
Views = list[tuple[float, View]]
"""Views with their weights, which add up to 1."""


class MeanOverViews(nn.Module):
    """A model whose logits are the weighted mean of another model's logits over views of the input."""

    def __init__(self, model: nn.Module, stages: Sequence[Views]) -> None:
        """``stages``: views to combine: each view of a stage is applied to all views of the stages before it."""
        super().__init__()
        self.model, self.stages = model, stages

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, C, H, W] to logits [n, K]."""
        views = [(1.0, images)]
        for stage in self.stages:
            views = [(weight * other, view(image)) for weight, image in views for other, view in stage]
        logits: Tensor = torch.stack([weight * self.model(image) for weight, image in views]).sum(0)
        return logits


def with_tta(trained: TrainedModel, names: Sequence[str] | None = None) -> TrainedModel:
    """Return a model with test-time augmentation: the one in model.json, unless ``names`` are given.

    ``names``: as for :func:`toolkit.tta.parse_tta`; ("none",) for none. With five_crop, the result also has another
    preprocessing: a larger input, from which the crops are taken. Raises UserError for unknown names, and if the
    model's input has no margin to crop or does not accept other sizes.
    """
    names = trained.tta if names is None else () if [*names] == ["none"] else names
    if not names:
        return replace(trained, tta=())
    preprocessing, size = trained.preprocessing, trained.preprocessing.image_size
    stages: list[Views] = []
    for kind, values in parse_tta(names).items():
        if kind == "five_crop":
            preprocessing = _with_margin(preprocessing)
            stages.append(five_crops(preprocessing.image_size, size))
        elif kind == "translate":
            stages.append([(0.5, _unchanged), (0.25, _shift(0)), (0.25, _shift(2))])
        elif kind == "scales":
            sizes = [(round(size[0] * value), round(size[1] * value)) for value in values]
            _check_sizes(trained, sizes)
            stages.append([(1 / len(sizes), _resize(each, size)) for each in sizes])
        else:
            stages.append([(0.5, _unchanged), (0.5, _flip)])
    module = MeanOverViews(trained.module, stages).eval()
    return replace(trained, module=module, preprocessing=preprocessing, tta=())


def five_crops(outer: Size, size: Size) -> Views:
    """Return the four corners and the center of images of ``outer`` (height, width) as views of ``size``.

    The center crop is that of torchvision's five_crop.
    """
    (height, width), (down, right) = size, (outer[0] - size[0], outer[1] - size[1])
    starts = [(0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2))]
    return [(0.2, _crop(top, left, height, width)) for top, left in starts]


def _with_margin(wanted: Preprocessing) -> Preprocessing:
    """Return the preprocessing whose center crop has the size to which images are resized."""
    resize = wanted.resize
    if not wanted.crop or not isinstance(resize, int) or resize <= max(wanted.image_size) or wanted.border is not None:
        raise UserError(
            "--tta five_crop needs images that are resized to more than the model's input and then cropped "
            '(data.resize = 256, data.crop = "center" with data.image_size = 224): this model sees whole images'
        )
    return replace(wanted, image_size=(resize, resize))


def _check_sizes(trained: TrainedModel, sizes: Sequence[Size]) -> None:
    """Raise UserError unless the model accepts inputs of all ``sizes``."""
    device = next((parameter.device for parameter in trained.module.parameters()), torch.device("cpu"))
    for height, width in sizes:
        try:
            with torch.inference_mode():
                trained.module(torch.zeros(1, trained.preprocessing.channels, height, width, device=device))
        except Exception as error:  # models raise exceptions of any type
            raise UserError(
                f"--tta scales: {trained.table.name} does not accept images of {height}x{width} pixels: "
                f"{first_line(error)}"
            ) from None


def _unchanged(images: Tensor) -> Tensor:
    return images


def _flip(images: Tensor) -> Tensor:
    return images.flip(3)


def _crop(top: int, left: int, height: int, width: int) -> View:
    return lambda images: images[:, :, top : top + height, left : left + width]


def _shift(start: int) -> View:
    """Return the view translated by one pixel along both axes, right and down for 0, left and up for 2.

    The missing pixels are reflected, as in airbench94 (Jordan 2024, arXiv:2404.00498).
    """

    def shifted(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        return F.pad(images, (1, 1, 1, 1), "reflect")[:, :, start : start + height, start : start + width]

    return shifted


def _resize(size: Size, own: Size) -> View:
    """Return the view of the image resized to ``size``, bilinear without antialiasing."""
    if size == own:
        return _unchanged
    return lambda images: F.interpolate(images, size, mode="bilinear", align_corners=False)
