"""Inputs of pretrained weights: for every published name, the same as timm's and torchvision's transforms produce."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor

from toolkit.augment import resize
from toolkit.augment.transforms import build_transform
from toolkit.data.image_sources import as_pixels, to_pixels
from toolkit.data.preprocessing import Preprocessing, resolve_preprocessing
from toolkit.inference.export import _steps
from toolkit.inference.timm_config import timm_config
from toolkit.models.build import expected_input
from toolkit.recipe import catalog
from toolkit.recipe.catalog import PretrainedInput
from toolkit.recipe.schema import AugmentConfig, DataConfig, ModelConfig
from toolkit.training.task import SingleLabel
from toolkit.training.trained_model import TrainedModel

NO_SQUARE = {f"vit_{size}_patch16_sapiens2.fb" for size in ("base", "large", "huge", "giant", "5b")}
"""Their input is 1024 x 768 pixels."""
Geometry = tuple[int, int, int, str, str]


def resolved(weights: PretrainedInput | None, **data: object) -> Preprocessing:
    table = DataConfig.model_validate({"dataset": "imagefolder", **data})
    return resolve_preprocessing(table, weights, None, 3, lambda plain: pytest.fail("nothing is to be measured"))


def photographs() -> Iterator[Image.Image]:
    """Return a wide and a tall image with structure at all scales up to the edges."""
    for height, width in ((61, 150), (143, 64)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[: height // 3] //= 4
        pixels[:, : width // 3, 0] = 255
        yield Image.fromarray(pixels)


def assert_same_inputs(preprocessing: Preprocessing, reference: Callable[[Image.Image], Tensor]) -> None:
    transform = build_transform("test", AugmentConfig(), preprocessing)
    for image in photographs():
        torch.testing.assert_close(
            transform(as_pixels(image)), reference(image), rtol=0, atol=1e-6 / min(preprocessing.std)
        )


@pytest.fixture
def pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resize with Pillow's kernel in both pipelines, so that pixels are equal and not only close."""
    monkeypatch.setattr(resize, "resizing_kernel", lambda: "Pillow")


@pytest.mark.usefixtures("pillow_resizes")
def test_inputs_of_every_timm_tag_equal_timms_own() -> None:
    """Compare the parameters of all tags, and the pixels of two images for one tag of each geometry."""
    tried: dict[Geometry, str] = {}
    modes = {"center": 0, "squash": 0, "border": 0}
    for tag in timm.list_pretrained():
        config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(tag).to_dict())
        name, _, weights = tag.partition(".")
        preprocessing = expected_input(ModelConfig(source="timm", name=name, weights=weights))
        assert preprocessing is not None
        _, height, width = config["input_size"]
        wanted = PretrainedInput(
            width,
            math.floor(width / config["crop_pct"]),
            config["interpolation"],
            tuple(config["mean"]),
            tuple(config["std"]),
            config["crop_mode"],
            height if height != width else None,
        )
        assert preprocessing == wanted, tag
        listed = catalog.weights_input("timm", name, weights)
        if name in catalog.excluded_models():
            assert listed is None
        else:
            assert listed == preprocessing, tag
        modes[config["crop_mode"]] += 1
        assert (height != width) == (tag in NO_SQUARE)
        geometry = (height, width, preprocessing.resize, preprocessing.crop_mode, preprocessing.interpolation)
        if geometry not in tried:
            tried[geometry] = tag
            assert_same_inputs(resolved(preprocessing), create_transform(**config))
    assert modes["squash"] >= 131
    assert modes["border"] >= 6
    assert len(tried) > 80


@pytest.mark.usefixtures("pillow_resizes")
def test_inputs_of_all_torchvision_weights_equal_torchvisions_own() -> None:
    tried = set()
    count = 0
    for name in torchvision.models.list_models(module=torchvision.models):
        for entry in torchvision.models.get_model_weights(name):
            count += 1
            preprocessing = expected_input(ModelConfig(source="torchvision", name=name, weights=entry.name))
            assert preprocessing is not None
            published = entry.transforms()
            assert (preprocessing.image_size, preprocessing.resize) == (
                published.crop_size[0],
                published.resize_size[0],
            ), entry
            assert (preprocessing.interpolation, preprocessing.mean, preprocessing.std) == (
                published.interpolation.value,
                tuple(published.mean),
                tuple(published.std),
            )
            if preprocessing not in tried:
                tried.add(preprocessing)
                assert_same_inputs(resolved(preprocessing), published)
    assert count >= 115


def weights(tag: str) -> PretrainedInput:
    name, _, weights = tag.partition(".")
    found = expected_input(ModelConfig(source="timm", name=name, weights=weights))
    assert found is not None
    return found


def test_images_of_another_size_keep_the_crop_mode_of_the_weights() -> None:
    squash = next(tag for tag in timm.list_pretrained() if get_pretrained_cfg(tag).crop_mode == "squash")
    config = get_pretrained_cfg(squash)
    side = round(math.floor(config.input_size[-1] / config.crop_pct) * 128 / config.input_size[-1])
    assert resolved(weights(squash), image_size=128).resize == (side, side)
    border = next(tag for tag in timm.list_pretrained() if get_pretrained_cfg(tag).crop_mode == "border")
    half = resolved(weights(border), image_size=196)
    assert (half.resize, half.border) == (196, tuple(round(255 * value) for value in get_pretrained_cfg(border).mean))
    mean = half.border
    assert mean is not None
    image = Image.new("RGB", (100, 50), (9, 9, 9))
    made = build_transform("test", AugmentConfig(), half).apply(to_pixels(image, 3), 2)
    assert made.shape == (196, 196, 3)
    assert tuple(made[48, 98]) == tuple(made[147, 98]) == mean
    assert tuple(made[49, 98]) == tuple(made[146, 98]) == (9, 9, 9)


def test_a_recipes_own_resize_replaces_the_crop_mode() -> None:
    border = next(tag for tag in timm.list_pretrained() if get_pretrained_cfg(tag).crop_mode == "border")
    own = resolved(weights(border), image_size=64, resize=72)
    assert (own.resize, own.border) == (72, None)


def test_weights_for_images_that_are_not_square_give_inputs_of_their_shape() -> None:
    sapiens = weights("vit_base_patch16_sapiens2.fb")
    assert resolved(sapiens).image_size == (1024, 768)
    assert resolved(sapiens).resize == (1024, 768)
    assert resolved(sapiens, image_size=384).resize == (384, 384)


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [[112, 224], [196, 84]])
def test_inputs_that_are_not_square_equal_timms_own(mode: str, size: list[int]) -> None:
    """A wide and a tall input, from a wide and a tall image, in each crop mode."""
    expected = PretrainedInput(224, 256, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), mode)
    preprocessing = resolved(expected, image_size=size)
    reference = create_transform(
        (3, *size), crop_pct=0.875, crop_mode=mode, interpolation="bicubic", mean=expected.mean, std=expected.std
    )
    assert_same_inputs(preprocessing, reference)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_the_crop_mode_is_exported_with_a_model(mode: str) -> None:
    """timm builds the same transform from config.json, and preprocessing.json describes it in words."""
    preprocessing = resolved(PretrainedInput(64, 72, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), mode))
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    table = ModelConfig(source="timm", name="test_resnet")
    module = timm.create_model("test_resnet", num_classes=2)
    trained = TrainedModel(module, preprocessing, (), ["a", "b"], SingleLabel(2), table, "none", None)  # type: ignore[arg-type]
    config = timm_config(trained)["pretrained_cfg"]
    assert config["crop_mode"] == mode
    reference = create_transform(**resolve_data_config(pretrained_cfg=config))
    for image in photographs():
        difference = (build_transform("test", AugmentConfig(), preprocessing)(image) - reference(image)).abs()
        assert float(difference.mean()) < 0.02
    description = (
        "resize to (72, 72) (height, width) pixels" if mode == "squash" else "padding smaller images with the color"
    )
    assert any(description in step for step in _steps(trained))
