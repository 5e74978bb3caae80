"""Transforms: the recipe's list gives exactly the same images as the equivalent hand-written Compose."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from toolkit.augment.resize import resizing_kernel
from toolkit.augment.steps import transform_names
from toolkit.augment.transforms import TENSOR_ONLY, build_transform, is_deterministic, try_transform
from toolkit.data.image_sources import InMemoryImages, to_pixels
from toolkit.data.preprocessing import Preprocessing
from toolkit.errors import UserError
from toolkit.recipe.gpu_support import FIXED
from toolkit.recipe.schema import NORMALIZATIONS, AugmentConfig

HALF = (0.5, 0.5, 0.5)
CIFAR = Preprocessing(3, (32, 32), 32, True, "bilinear", HALF, HALF)
CALTECH = Preprocessing(3, (224, 224), 256, True, "bilinear", *NORMALIZATIONS["imagenet"])
SQUASHED = Preprocessing(3, (224, 224), (256, 256), True, "bilinear", HALF, HALF)
FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]

Entry = dict[str, Any]


def photograph(height: int = 32, width: int = 32) -> Image.Image:
    """Return an image of noise, in which any difference in processing is visible."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def augment(*train: Entry, **values: Any) -> AugmentConfig:
    return AugmentConfig.model_validate({"train": list(train), **values})


def as_tensor(step: Any) -> Callable[[Image.Image], Image.Image]:
    """Apply a transform to a tensor of bytes, so that torchvision's kernel is used instead of Pillow's."""
    return lambda image: v2.functional.to_pil_image(step(v2.functional.pil_to_tensor(image)))


def same(built: Callable[[Any], Tensor], by_hand: list[Any], image: Image.Image) -> None:
    """Check that both give the same bits from the same torch seeds."""
    resizing = (v2.Resize, v2.RandomResizedCrop) if resizing_kernel() != "Pillow" else ()
    compose = v2.Compose([as_tensor(step) if isinstance(step, resizing) else step for step in by_hand])
    for seed in range(10):
        torch.manual_seed(seed)
        expected = compose(image)
        torch.manual_seed(seed)
        assert torch.equal(built(to_pixels(image, 3)), expected.as_subclass(Tensor))


FLIP = {"name": "RandomHorizontalFlip"}
CROP = {"name": "RandomCrop", "padding": 4}
GRAY = {"name": "RandomGrayscale", "p": 0.2}
BLUR = {"name": "GaussianBlur", "kernel_size": 3, "apply_p": 0.5}
JITTER = {"name": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "apply_p": 0.4}
V2_CROP, V2_FLIP, V2_GRAY = v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.RandomGrayscale(0.2)
V2_BLUR = v2.RandomApply([v2.GaussianBlur(3)], p=0.5)
V2_JITTER = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.4)

ON_CIFAR: dict[str, tuple[list[Entry], list[Any]]] = {
    # giunta, G7
    "flip 0.3, rotation 20": (
        [{**FLIP, "p": 0.3}, {"name": "RandomRotation", "degrees": [-20.0, 20.0]}],
        [v2.RandomHorizontalFlip(0.3), v2.RandomRotation((-20.0, 20.0))],
    ),
    "flip 0.6": ([{**FLIP, "p": 0.6}], [v2.RandomHorizontalFlip(0.6)]),
    "rotation 20": ([{"name": "RandomRotation", "degrees": 20}], [v2.RandomRotation(20)]),
    "perspective": ([{"name": "RandomPerspective", "p": 1.0}], [v2.RandomPerspective(p=1.0)]),
    "jitter": ([{"name": "ColorJitter", "brightness": 0.5, "hue": 0.3}], [v2.ColorJitter(brightness=0.5, hue=0.3)]),
    # yildiz, Y3
    **{f"flip {p}": ([{**FLIP, "p": p}], [v2.RandomHorizontalFlip(p)]) for p in (0.1, 0.3, 0.5, 0.7, 0.9)},
    "crop": ([CROP], [V2_CROP]),
    "crop, flip": ([CROP, FLIP], [V2_CROP, V2_FLIP]),
    "gray": ([GRAY], [V2_GRAY]),
    "crop, flip, gray": ([CROP, FLIP, GRAY], [V2_CROP, V2_FLIP, V2_GRAY]),
    "jitter 0.4": ([JITTER], [V2_JITTER]),
    "crop, flip, gray, blur": ([CROP, FLIP, GRAY, BLUR], [V2_CROP, V2_FLIP, V2_GRAY, V2_BLUR]),
    "crop, flip, gray, blur, jitter": (
        [CROP, FLIP, GRAY, BLUR, JITTER],
        [V2_CROP, V2_FLIP, V2_GRAY, V2_BLUR, V2_JITTER],
    ),
    # colbertaldo, C4
    "flip, rotation 15, jitter": (
        [FLIP, {"name": "RandomRotation", "degrees": 15}, {k: v for k, v in JITTER.items() if k != "apply_p"}],
        [V2_FLIP, v2.RandomRotation(15), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)],
    ),
}


@pytest.mark.parametrize("name", ON_CIFAR)
def test_transforms_of_the_cifar_reports_equal_a_hand_written_compose(name: str) -> None:
    entries, by_hand = ON_CIFAR[name]
    built = build_transform("train", augment(*entries), CIFAR)
    same(built, [*by_hand, *FLOAT, v2.Normalize(HALF, HALF)], photograph())


MEREU_JITTER = {"name": "ColorJitter", "brightness": 0.1, "contrast": 0.05, "saturation": 0.05, "hue": 0.1}
EARLY = {"stage": "before_crop"}
V2_MEREU_JITTER = v2.ColorJitter(0.1, 0.05, 0.05, 0.1)
MEREU: dict[str, tuple[list[Entry], list[Any]]] = {
    "set 1": ([FLIP, MEREU_JITTER], [V2_FLIP, V2_MEREU_JITTER]),
    "set 2": ([FLIP, {"name": "RandomRotation", "degrees": 30}], [V2_FLIP, v2.RandomRotation(30)]),
    "set 3": (
        [FLIP, {"name": "RandomRotation", "degrees": 30}, MEREU_JITTER],
        [V2_FLIP, v2.RandomRotation(30), V2_MEREU_JITTER],
    ),
}


@pytest.mark.parametrize("name", MEREU)
def test_transforms_of_mereu_are_applied_between_resize_and_crop(name: str) -> None:
    entries, by_hand = MEREU[name]
    built = build_transform("train", augment(*({**entry, **EARLY} for entry in entries)), SQUASHED)
    hand = [v2.Resize((256, 256)), *by_hand, v2.CenterCrop(224), *FLOAT, v2.Normalize(HALF, HALF)]
    same(built, hand, photograph(300, 200))


MURABITO: dict[str, tuple[list[Entry], list[Any]]] = {
    "center crop": ([], [v2.CenterCrop(224)]),
    "random crop": ([{"name": "RandomCrop", "stage": "crop"}], [v2.RandomCrop(224)]),
    "center crop, flip": ([FLIP], [v2.CenterCrop(224), V2_FLIP]),
    "center crop, rotation": (
        [{"name": "RandomRotation", "degrees": 180}],
        [v2.CenterCrop(224), v2.RandomRotation(180)],
    ),
}


@pytest.mark.parametrize("name", MURABITO)
def test_transforms_of_murabito_equal_a_hand_written_compose(name: str) -> None:
    entries, by_hand = MURABITO[name]
    built = build_transform("train", augment(*entries), CALTECH)
    hand = [v2.Resize(256), *by_hand, *FLOAT, v2.Normalize(*NORMALIZATIONS["imagenet"])]
    same(built, hand, photograph(300, 400))


@pytest.mark.parametrize("size", [(500, 300), (300, 500), (20, 30), (256, 256)])
@pytest.mark.parametrize(
    "preprocessing",
    [
        CALTECH,
        SQUASHED,
        Preprocessing(3, (300, 300), 256, True, "bicubic", HALF, HALF),
        Preprocessing(3, (64, 64), None, True, "bilinear", HALF, HALF),
    ],
)
def test_transforms_of_bytes_equal_those_of_the_pillow_image(
    preprocessing: Preprocessing, size: tuple[int, int]
) -> None:
    """Each transform gives the same for a tensor of bytes and a Pillow image, also if the crop is larger than it."""
    transform = build_transform("test", AugmentConfig(), preprocessing)
    image = photograph(*size)
    assert transform.fixed
    for count in range(len(transform.fixed) + 1):
        by_pillow = image
        for step in transform.steps[:count]:
            by_pillow = step.on_image(by_pillow)
        assert np.array_equal(transform.apply(to_pixels(image, 3), count), np.array(by_pillow)), count


def test_each_stage_is_applied_at_its_position() -> None:
    table = augment(
        {"name": "RandomRotation", "degrees": 5, "stage": "before_resize"},
        {"name": "GaussianNoise", "sigma": 0.05},  # needs a tensor, so its default stage is "tensor"
        {"name": "RandomVerticalFlip", "stage": "after_crop"},
        {"name": "RandomPerspective", "stage": "before_crop"},
        {"name": "RandomInvert", "stage": "tensor"},
        {"name": "RandomCrop", "stage": "crop"},
        random_erasing=0.5,
    )
    hand = [
        v2.RandomRotation(5),
        v2.Resize(256),
        v2.RandomPerspective(),
        v2.RandomCrop(224),
        v2.RandomVerticalFlip(),
        *FLOAT,
        v2.GaussianNoise(sigma=0.05),
        v2.RandomInvert(),
        v2.Normalize(*NORMALIZATIONS["imagenet"]),
        v2.RandomErasing(0.5, value=0),
    ]
    same(build_transform("train", table, CALTECH), hand, photograph(280, 300))


def test_resized_crop_replaces_resize_and_crop_and_enumerations_are_given_by_name() -> None:
    table = augment(
        {"name": "RandomResizedCrop", "stage": "resize_crop", "scale": [0.3, 1.0], "interpolation": "bicubic"},
        {"name": "AutoAugment", "policy": "cifar10"},
    )
    hand = [
        v2.RandomResizedCrop(224, scale=(0.3, 1.0), interpolation=InterpolationMode.BICUBIC),
        v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        *FLOAT,
        v2.Normalize(*NORMALIZATIONS["imagenet"]),
    ]
    same(build_transform("train", table, CALTECH), hand, photograph(100, 300))


def test_splits_have_their_own_transforms_and_only_training_images_are_erased() -> None:
    table = augment(FLIP, validation=[{"name": "Grayscale", "num_output_channels": 3}], random_erasing=1.0)
    normal = [*FLOAT, v2.Normalize(HALF, HALF)]
    same(build_transform("validation", table, CIFAR), [v2.Grayscale(3), *normal], photograph())
    same(build_transform("test", table, CIFAR), normal, photograph())


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original"])
def test_timm_policies_give_the_same_images_as_timm(policy: str) -> None:
    timms = create_transform(
        32, is_training=True, no_aug=False, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=0.0,
        auto_augment=policy, interpolation="bilinear", mean=HALF, std=HALF,
    )  # fmt: skip
    timm_policy = next(step for step in timms.transforms if type(step).__module__ == "timm.data.auto_augment")
    built = build_transform("train", AugmentConfig(auto_augment=policy), CIFAR)
    assert built.draws_from_python
    hand = v2.Compose([timm_policy, *FLOAT, v2.Normalize(HALF, HALF)])
    for seed in range(10):
        results = []
        for transform, image in ((built, to_pixels(photograph(), 3)), (hand, photograph())):
            random.seed(seed)
            np.random.seed(seed)
            results.append(transform(image).as_subclass(Tensor))
        assert torch.equal(*results)
    assert not build_transform("validation", AugmentConfig(auto_augment=policy), CIFAR).draws_from_python


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original"])
def test_timm_policies_accept_grayscale_images(policy: str) -> None:
    gray = Preprocessing(1, (28, 28), None, True, "bilinear", (0.3,), (0.2,))
    transform = build_transform("train", AugmentConfig(auto_augment=policy), gray)
    for seed in range(40):
        random.seed(seed)
        np.random.seed(seed)
        assert transform(to_pixels(photograph(28, 28), 1)).shape == (1, 28, 28)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_converted_to_the_requested_channels(mode: str, channels: int) -> None:
    one = Preprocessing(channels, (32, 32), 32, True, "bilinear", (0.5,) * channels, (0.5,) * channels)
    result = build_transform("test", AugmentConfig(), one)(to_pixels(photograph().convert(mode), channels))
    assert (result.shape, result.dtype, type(result)) == ((channels, 32, 32), torch.float32, Tensor)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "RandomHorizontalFlop"}, r"augment.train\[1\]: .*no 'RandomHorizontalFlop'; did you mean RandomHori"),
        ({"name": "Zzz"}, r"has no 'Zzz' \(`toolkit transforms` lists all\)"),
        ({"name": "functional"}, "has no 'functional'"),
        ({"name": "RandomRotation", "degree": 3}, "RandomRotation takes no 'degree'; did you mean degrees"),
        ({"name": "RandomRotation"}, "RandomRotation cannot be created with no arguments: .*degrees"),
        ({"name": "RandomRotation", "degrees": -3}, "RandomRotation cannot be created with degrees = -3"),
        ({"name": "RandomRotation", "degrees": 3, "interpolation": "cubic"}, "'cubic' is not one of nearest"),
        ({"name": "GaussianBlur", "kernel_size": 4}, "GaussianBlur cannot be created with kernel_size = 4"),
        ({"name": "GaussianNoise", "stage": "before_crop"}, "GaussianNoise needs a tensor"),
        ({"name": "MixUp"}, r"MixUp cannot be used, since it mixes examples: use augment.mixup"),
        ({"name": "Lambda", "lambd": "print"}, "since it runs code"),
        ({"name": "FiveCrop"}, "since it makes several images from one"),
        ({"name": "Normalize", "mean": [0.5], "std": [0.5]}, r"use data.normalize"),
    ],
)
def test_an_invalid_transform_is_refused_with_its_name_and_the_reason(entry: Entry, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_transform("train", augment(FLIP, entry), CIFAR)


def test_only_one_transform_can_replace_the_crop() -> None:
    with pytest.raises(UserError, match="only one transform"):
        build_transform("train", augment({**CROP, "stage": "crop"}, {**CROP, "stage": "crop"}), CIFAR)
    resized = {"name": "RandomResizedCrop", "stage": "resize_crop"}
    with pytest.raises(UserError, match="stage = 'before_crop' cannot be combined"):
        build_transform("train", augment(resized, {**FLIP, "stage": "before_crop"}), CIFAR)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("magic", "'magic' is not a policy that timm knows"),
        ("rand-m9-mstt0.5", "not a policy that timm knows .*Unknown RandAugment config section"),
        ("rand-m9-tnothing", "'tnothing' has no effect"),
        ("rand-mn", "'mn' has no effect"),
        ("augmix-mm-w3", "'mm' has no effect"),
    ],
)
def test_a_policy_that_timm_does_not_know_is_refused(policy: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_transform("train", AugmentConfig(auto_augment=policy), CIFAR)


def test_the_largest_magnitudes_do_not_fail() -> None:
    """timm's posterize then uses 0 bits, which Pillow 13 refuses: training would stop at a random image."""
    for policy in ("rand-m10-n20-p1-inc1", "augmix-m10-d9"):
        transform = build_transform("train", AugmentConfig(auto_augment=policy), CIFAR)
        for seed in range(20):
            random.seed(seed)
            np.random.seed(seed)
            assert transform(to_pixels(photograph(), 3)).isfinite().all()


def test_a_wrong_image_size_is_reported_with_the_expected_one() -> None:
    uncropped = Preprocessing(3, (32, 32), 32, False, "bilinear", HALF, HALF)
    transform = build_transform("test", AugmentConfig(), uncropped)
    assert transform(to_pixels(photograph(50, 50), 3)).shape == (3, 32, 32)
    with pytest.raises(UserError, match=r"32 x 64 pixels from one of 50 x 100, but data.image_size is 32"):
        transform(to_pixels(photograph(50, 100), 3))


def test_a_failing_transform_is_reported_before_training_without_changing_random_states() -> None:
    images = InMemoryImages(np.asarray(photograph())[None], "toy", 3)
    torch.manual_seed(1)
    before = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    try_transform(build_transform("train", augment(CROP, auto_augment="rand-m9"), CIFAR), images, 0)
    assert torch.rand(1) == before[0]
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()) == states
    too_large = build_transform("train", augment({"name": "RandomCrop", "size": 40}), CIFAR)
    with pytest.raises(UserError, match=r"augment.train: RandomCrop fails on toy/0 \(32 x 32 pixels\)"):
        try_transform(too_large, images, 0)


# Arguments of transforms that require some.
REQUIRED: dict[str, Entry] = {
    "GaussianBlur": {"kernel_size": 3},
    "JPEG": {"quality": 50},
    "Pad": {"padding": 0},
    "RandomAffine": {"degrees": 5},
    "RandomPosterize": {"bits": 4},
    "RandomResize": {"min_size": 32, "max_size": 33},
    "RandomRotation": {"degrees": 5},
    "RandomShortestSize": {"min_size": [32]},
    "RandomSolarize": {"threshold": 128},
    "RandomAdjustSharpness": {"sharpness_factor": 2.0},
    "ScaleJitter": {"target_size": [32, 32], "scale_range": [1.0, 1.0]},
    "RandomZoomOut": {"p": 0.0},
}


@pytest.mark.parametrize("name", transform_names())
def test_every_available_transform_works_on_an_image(name: str) -> None:
    """Each is tested at its default stage."""
    transform = build_transform("train", augment({"name": name, **REQUIRED.get(name, {})}), CIFAR)
    assert transform(to_pixels(photograph(), 3)).shape == (3, 32, 32)


@pytest.mark.parametrize("name", sorted(FIXED.intersection(transform_names())))
def test_deterministic_transforms_draw_no_random_numbers(name: str) -> None:
    entry = {"name": name, **REQUIRED.get(name, {}), **({"num_output_channels": 3} if name == "Grayscale" else {})}
    transform = build_transform("train", augment(entry), CIFAR)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    transform(to_pixels(photograph(), 3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()) == states[1:]


def test_transforms_are_deterministic_only_if_known_to_be() -> None:
    assert is_deterministic("train", AugmentConfig())
    assert is_deterministic("train", augment({"name": "Grayscale", "num_output_channels": 3}))
    assert not is_deterministic("train", augment(FLIP))
    assert not is_deterministic("train", augment({"name": "Grayscale", "apply_p": 0.5}))
    assert not is_deterministic("train", augment({"name": "SomethingNew"}))
    for key, value in (("mixup", 0.2), ("cutmix", 1.0), ("random_erasing", 0.1), ("auto_augment", "rand-m9"),
                       ("alternating_flip", True)):  # fmt: skip
        table = AugmentConfig.model_validate({key: value})
        assert not is_deterministic("train", table)
        assert is_deterministic("validation", table)
    assert not is_deterministic("test", AugmentConfig.model_validate({"test": [FLIP]}))
    assert set(transform_names()) >= TENSOR_ONLY
