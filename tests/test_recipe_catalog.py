"""The catalog of names is up to date and consistent with what torchvision, timm and torch accept."""

from __future__ import annotations

import json
import os

import pytest

from toolkit.recipe import catalog
from toolkit.recipe.catalog.generate import EXCLUDED_TRANSFORMS, generate
from toolkit.similar_names import similar_names


def test_the_catalog_is_up_to_date() -> None:
    recorded, generated = catalog.catalog(), json.loads(generate())
    versions = recorded["versions"], generated["versions"]
    parts = {*recorded, *generated} - {"versions"}
    changed = sorted(part for part in parts if recorded.get(part) != generated.get(part))
    if changed and versions[0] != versions[1] and not os.environ.get("CI"):
        pytest.skip(f"catalog.json was generated with {versions[0]}; with {versions[1]} these parts differ: {changed}")
    assert not changed, "run python -m toolkit.recipe.catalog"


def test_the_catalog_has_known_names_and_arguments() -> None:
    assert catalog.weights_names("torchvision", "resnet50") == ["IMAGENET1K_V2", "IMAGENET1K_V1"]
    assert catalog.weights_names("torchvision", "alexnet") == ["IMAGENET1K_V1"]
    alexnet = catalog.weights_input("torchvision", "alexnet", "DEFAULT")
    assert alexnet == (224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "center", None)
    resnet = catalog.weights_input("torchvision", "resnet50", "IMAGENET1K_V2")
    assert resnet is not None
    assert resnet.resize == 232
    vit = catalog.weights_input("timm", "vit_small_patch16_224", "augreg_in21k_ft_in1k")
    assert vit is not None
    assert (vit.image_size, vit.resize, vit.interpolation, vit.mean) == (224, 248, "bicubic", (0.5, 0.5, 0.5))
    squashed = catalog.weights_input("timm", "convnext_base", "fb_in22k_ft_in1k_384")
    assert squashed is not None
    assert (squashed.image_size, squashed.resize, squashed.crop_mode) == (384, 384, "squash")
    assert catalog.weights_input("timm", "vit_small_patch16_224", "none") is None
    assert catalog.weights_input("timm", "no_such_model", "DEFAULT") is None
    assert "efficientnet_lite0" in catalog.model_names("timm")


def test_transforms_accept_the_arguments_of_the_catalog() -> None:
    from torchvision.transforms import v2

    required = {"integer": 8, "number": 0.5, "array": [8, 8], "text": "x", "boolean": True}
    for name, arguments in catalog.transforms().items():
        needed = {key: required[about["kinds"][0]] for key, about in arguments.items() if about["required"]}
        needed |= {"size": 8} if "size" in arguments else {}
        needed |= {"degrees": 30} if "degrees" in arguments else {}
        needed |= {"kernel_size": 3} if "kernel_size" in arguments else {}
        needed |= {"quality": 50} if "quality" in arguments else {}
        defaults = {key: about["default"] for key, about in arguments.items() if about.get("default") is not None}
        defaults.pop("policy", None)  # an enumeration; augment/transforms.py converts it from text
        getattr(v2, name)(**{**defaults, **needed})
    classes = {name for name, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)}
    assert set(catalog.transforms()) == classes - set(EXCLUDED_TRANSFORMS)


def test_optimizers_accept_the_arguments_of_the_catalog() -> None:
    import torch
    from timm.optim import create_optimizer_v2, list_optimizers

    known = catalog.optimizers()
    assert set(known) | set(catalog.excluded_optimizers()) == {*list_optimizers(), "nag"}
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    for name, about in known.items():
        if name in ("nag", "adam", "adamw", "sgd"):
            continue
        if about["momentum"]:
            create_optimizer_v2([parameter], opt=name, lr=0.1, momentum=0.5)
        else:
            create_optimizer_v2([parameter], opt=name, lr=0.1)


def test_suggested_names_ignore_case_and_skip_very_long_input() -> None:
    assert similar_names("RESNET18", ["resnet18", "vgg"], 1) == ["resnet18"]
    assert similar_names("randomhorizontalflip", ["RandomHorizontalFlip"]) == ["RandomHorizontalFlip"]
    assert similar_names("zzz", ["resnet18"]) == []
    assert similar_names("resnet18" * 20, ["resnet18"]) == []
