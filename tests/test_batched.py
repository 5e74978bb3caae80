"""Batched augmentation gives each image the same result as torchvision gives for that image alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from batches import Entry, after, augmentation, batch, batched, numbers, one_by_one, photographs
from PIL import Image
from torchvision.transforms.v2 import functional

from toolkit.augment import gpu_crop_flip
from toolkit.augment.gpu import GpuAugmentation, keyed_uniforms
from toolkit.augment.gpu_affine import AffineOp, _product
from toolkit.augment.gpu_color import Grayscale, RandomErasing, _within
from toolkit.augment.transforms import build_transform
from toolkit.data.image_sources import InMemoryImages, as_image, as_pixels
from toolkit.data.pipeline import plan_preprocessing
from toolkit.data.preprocessing import Preprocessing
from toolkit.data.sampling import hash64
from toolkit.errors import UserError
from toolkit.recipe.schema import NORMALIZATIONS, AugmentConfig

ALLOWED = 2 / 255
"""Mean absolute difference between an image and torchvision's result, for pixels in 0..1."""
EXACT = 1e-6

FLIP: Entry = {"name": "RandomHorizontalFlip"}
UPSIDE: Entry = {"name": "RandomVerticalFlip", "p": 0.3}
TURN: Entry = {"name": "RandomRotation", "degrees": 30}
SMOOTH_TURN: Entry = {"name": "RandomRotation", "degrees": [10.0, 90.0], "interpolation": "bilinear", "fill": 90}
AFFINE: Entry = {
    "name": "RandomAffine", "degrees": 15, "translate": [0.1, 0.2], "scale": [0.8, 1.3],
    "shear": [-8.0, 8.0, -4.0, 4.0],
}  # fmt: skip
SMOOTH_AFFINE: Entry = {**AFFINE, "interpolation": "bilinear", "center": [8.0, 20.0], "fill": [200, 10, 60]}
PERSPECTIVE: Entry = {"name": "RandomPerspective", "p": 1.0, "distortion_scale": 0.4}
JITTER: Entry = {"name": "ColorJitter", "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2}
GRAY: Entry = {"name": "RandomGrayscale", "p": 0.5}
BLUR: Entry = {"name": "GaussianBlur", "kernel_size": [5, 9], "sigma": [0.1, 2.0]}
ERASE: Entry = {"name": "RandomErasing", "p": 0.7, "value": [124.0, 116.0, 104.0], "stage": "after_crop"}
HALF = (0.5, 0.5, 0.5)
SMALL = Preprocessing(3, (32, 32), 32, True, "bilinear", HALF, HALF)
PAD: Entry = {"name": "Pad", "padding": [3, 1, 2, 6], "fill": 7}

# Name: the transforms, the recipe's other keys, and whether every pixel must be equal.
CHAINS: dict[str, tuple[list[Entry], dict[str, Any], bool]] = {
    "nothing": ([], {}, True),
    "flip": ([FLIP], {}, True),
    "vertical flip": ([UPSIDE], {}, True),
    "flip, at times": ([{**FLIP, "apply_p": 0.5}], {}, True),
    "rotation": ([TURN], {}, False),
    "bilinear rotation": ([SMOOTH_TURN], {}, False),
    "affine": ([AFFINE], {}, False),
    "bilinear affine": ([SMOOTH_AFFINE], {}, False),
    "perspective": ([{**PERSPECTIVE, "interpolation": "nearest"}], {}, False),
    "bilinear perspective": ([{**PERSPECTIVE, "apply_p": 0.6, "fill": 30}], {}, False),
    "jitter": ([JITTER], {}, False),
    "brightness": ([{"name": "ColorJitter", "brightness": [0.3, 1.8]}], {}, True),
    "contrast": ([{"name": "ColorJitter", "contrast": [0.0, 2.0]}], {}, True),
    "saturation": ([{"name": "ColorJitter", "saturation": 0.9}], {}, True),
    "hue": ([{"name": "ColorJitter", "hue": 0.5, "apply_p": 0.8}], {}, False),
    "gray": ([GRAY], {}, True),
    "all gray": ([{"name": "Grayscale", "num_output_channels": 3}], {}, True),
    "blur": ([BLUR], {}, False),
    "erasing": ([ERASE], {}, True),
    "erasing after normalization": ([FLIP], {"random_erasing": 0.8}, True),
    # several in sequence
    "flips": ([FLIP, UPSIDE], {}, True),
    "flip, rotation": ([FLIP, TURN], {}, False),
    "flips around a rotation": ([FLIP, UPSIDE, TURN, FLIP, UPSIDE], {}, False),
    "two warps": ([TURN, FLIP, SMOOTH_AFFINE], {}, False),
    "the usual": ([FLIP, TURN, JITTER, GRAY, {**BLUR, "apply_p": 0.5}], {"random_erasing": 0.25}, False),
    "all in another order": ([JITTER, ERASE, BLUR, PERSPECTIVE, GRAY, FLIP], {}, False),
}  # fmt: skip


def differences(
    augment: GpuAugmentation, images: list[Image.Image], *, channels_last: bool = True, epoch: int = 3
) -> np.ndarray:
    """Return each image's mean absolute difference from torchvision's result, for pixels in 0..1."""
    draws = np.arange(len(images)) * 7 + 1
    made = augment(batch(images, channels_last=channels_last), epoch, draws)
    assert made.dtype == torch.float32
    alone = zip(images, numbers(augment, epoch, draws), strict=True)
    expected = torch.stack([one_by_one(augment, image, u) for image, u in alone])
    difference: np.ndarray = (made - expected).abs().mean((1, 2, 3)).numpy()
    return difference


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", CHAINS)
def test_a_batch_gets_the_result_of_torchvision_on_each_image(name: str, size: int) -> None:
    entries, values, is_exact = CHAINS[name]
    found = differences(augmentation(*entries, size=size, **values), photographs(12, size, size))
    assert found.max() <= (EXACT if is_exact else ALLOWED), found


def crop(**values: Any) -> Entry:
    return {"name": "RandomCrop", **values}


CROPS: dict[str, list[Entry]] = {
    "center": [],
    "padded": [crop(padding=4)],
    "padded unevenly, colored": [crop(padding=[5, 0, 2, 9], fill=[9, 80, 200]), FLIP],
    "reflected": [crop(padding=6, padding_mode="reflect"), FLIP],
    "symmetric": [FLIP, crop(padding=6, padding_mode="symmetric")],
    "edge": [crop(padding=[3, 5], padding_mode="edge")],
    "at times": [crop(padding=8, apply_p=0.5)],
    "instead of the crop": [crop(stage="crop"), FLIP],
    "after a flip": [{**FLIP, "stage": "before_crop"}, crop(stage="crop")],
    "larger than the image": [crop(stage="crop", pad_if_needed=True, fill=3)],
    "two paddings of one color": [{**PAD, "stage": "before_crop"}, crop(stage="crop", padding=5, fill=7)],
    "two paddings of two colors": [{**PAD, "stage": "before_crop"}, crop(stage="crop", padding=5, fill=200)],
}


SIZES = [(name, *size) for name in CROPS for size in ((40, 48), (37, 32), (250, 250))]
SIZES += [("larger than the image", 31, 45), ("center", 31, 45)]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("name", "height", "width"), SIZES)
def test_crops_and_padding_are_exact(name: str, height: int, width: int, channels_last: bool) -> None:
    augment = augmentation(*CROPS[name], size=224 if height > 200 else 32)
    found = differences(augment, photographs(9, height, width), channels_last=channels_last)
    assert found.max() < EXACT


def test_adjacent_crops_and_flips_are_one_pass_and_flips_join_a_warp() -> None:
    chain = augmentation(crop(stage="crop"), FLIP, UPSIDE, JITTER, FLIP, TURN, UPSIDE, GRAY)
    assert [type(one).__name__ for one in chain.passes] == ["CropFlipOp", "ColorJitter", "AffineOp", "Grayscale"]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_two_fused_warps_would_differ_from_torchvision(interpolation: str) -> None:
    """This is why they stay two passes."""
    augment = augmentation(
        {**TURN, "interpolation": interpolation}, {**AFFINE, "interpolation": interpolation}, size=32
    )
    _, first, second = augment.passes
    assert isinstance(first, AffineOp)
    assert isinstance(second, AffineOp)
    images, u = photographs(12, 32, 32), numbers(augment, 0, np.arange(12))
    plans = augment.plans(0, np.arange(12), (32, 32))
    to_pixels = np.linalg.inv(np.array([[2 / 32, 0, -1], [0, 2 / 32, -1], [0, 0, 1]]))
    joined = _product(plans[1].table.reshape(-1, 3, 3), to_pixels @ plans[2].table.reshape(-1, 3, 3)).reshape(-1, 9)
    made = first.apply(batch(images), plans[1], torch.from_numpy(joined).float()) / 255
    expected = torch.stack([one_by_one(augment, image, row) for image, row in zip(images, u, strict=True)])
    assert (made - expected).abs().mean() > ALLOWED


def test_without_randomness_pixels_equal_those_of_the_data_workers_bit_for_bit() -> None:
    images = photographs(6, 256, 300)
    preprocessing = Preprocessing(3, (224, 224), None, True, "bilinear", *NORMALIZATIONS["imagenet"])
    one_at_a_time = build_transform("train", AugmentConfig(), preprocessing)
    made = batched(AugmentConfig(), preprocessing)
    expected = torch.stack([one_at_a_time(image) for image in images])
    for channels_last in (True, False):
        assert torch.equal(made(batch(images, channels_last=channels_last), 0, np.arange(6)), expected)
    cropped = batch(images)[:, :, 16:240, 38:262]
    assert torch.equal(made(cropped, 0, np.arange(6)), expected), "images may already be center-cropped"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_each_split_has_its_own_transforms(split: str) -> None:
    table = AugmentConfig.model_validate({"train": [TURN], split: [{**FLIP, "p": 1.0}], "random_erasing": 1.0})
    made = batched(table, Preprocessing(3, (32, 32), None, True, "bilinear", (0.0,) * 3, (1.0,) * 3), 0, split)
    pixels = batch(photographs(3, 32, 32))
    assert torch.equal(made(pixels, 0, np.arange(3)), pixels.flip(3).float() * (1 / 255))


def test_gray_images_get_the_result_of_torchvision() -> None:
    images = [image.convert("L") for image in photographs(5, 32, 32)]
    augment = augmentation(crop(padding=4), FLIP, {**JITTER, "hue": 0.1}, GRAY, TURN, size=32, channels=1)
    draws = np.arange(5)
    made = augment(batch(images), 0, draws)
    for image, u, result in zip(images, numbers(augment, 0, draws), made, strict=True):
        expected_image = image
        for one in augment.passes:
            if not isinstance(one, Grayscale):
                expected_image = after(one, expected_image, u[None, : one.random_count])
            u = u[one.random_count :]
        expected = functional.pil_to_tensor(expected_image).float() / 255
        assert (result - expected).abs().mean() < ALLOWED


@pytest.mark.parametrize("size", [32, 224])
def test_transforms_of_the_tensor_stage_get_floats(size: int) -> None:
    """With stage = "tensor", nothing is rounded and colors are in 0..1."""
    entries = [{**FLIP, "p": 1.0}, {**SMOOTH_TURN, "fill": 0.4}, BLUR, {**ERASE, "p": 1.0, "value": 0.5}]
    augment = augmentation(*({**entry, "stage": "tensor"} for entry in entries), size=size)
    images, draws = photographs(5, size, size), np.arange(5)
    made = augment(batch(images), 0, draws)
    for image, u, result in zip(images, numbers(augment, 0, draws), made, strict=True):
        expected = functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)
        center, warp, blur, erase = augment.passes
        assert center.random_count == 0
        assert isinstance(warp, AffineOp)
        assert isinstance(erase, RandomErasing)
        uniform = u[None]
        angle = float(warp.warp.draw(uniform[:, 1:7], (size, size))[0, 0])  # type: ignore[attr-defined]
        expected = functional.rotate(
            functional.horizontal_flip(expected), angle, functional.InterpolationMode.BILINEAR, fill=[0.4]
        )
        expected = after(blur, expected, uniform[:, warp.random_count : warp.random_count + blur.random_count])
        plan = erase.plan(uniform[:, warp.random_count + blur.random_count :], (size, size))
        top, left, height, width = plan.table[0].astype(int).tolist()
        expected = functional.erase(expected, top, left, height, width, torch.tensor(0.5))
        assert (result - expected).abs().max() < 1e-4


# -- randomness --------------------------------------------------------------------------------------------------------

EVERYTHING = [crop(padding=4), {**FLIP, "apply_p": 0.9}, AFFINE, UPSIDE, {**PERSPECTIVE, "p": 0.5}, JITTER, GRAY,
              {**BLUR, "apply_p": 0.5}, {**ERASE, "p": 0.5}]  # fmt: skip
EVERYTHING += [{**SMOOTH_TURN, "stage": "tensor", "apply_p": 0.5}]


def test_random_numbers_are_hashes_of_their_keys() -> None:
    draws = np.array([0, 5, 2**40, 12345678901])
    expected = [[(hash64(9, 3, int(draw), slot) >> 11) * 2.0**-53 for slot in range(6)] for draw in draws]
    assert np.array_equal(keyed_uniforms(draws, 6, 9, 3), expected)


@pytest.mark.parametrize(("size", "count"), [(32, 200), (224, 7)])
def test_an_example_is_the_same_bit_for_bit_whatever_else_is_in_the_batch(size: int, count: int) -> None:
    augment = augmentation(*EVERYTHING, size=size, random_erasing=0.5)
    pixels, draws = batch(photographs(count, size, size)), np.arange(count) * 31
    whole = augment(pixels, 2, draws)
    order = np.random.default_rng(1).permutation(count)
    for part in np.array_split(order, 5):  # like the shares of five processes
        assert torch.equal(augment(pixels[part], 2, draws[part]), whole[part])
    for position in order[:3]:
        alone = slice(int(position), int(position) + 1)
        assert torch.equal(augment(pixels[alone], 2, draws[alone]), whole[alone])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_does_not_change_the_result(two_threads: None) -> None:
    augment, pixels = augmentation(*EVERYTHING, random_erasing=0.5), batch(photographs(4, 224, 224))
    with_two = augment(pixels, 0, np.arange(4))
    torch.set_num_threads(1)
    assert torch.equal(augment(pixels, 0, np.arange(4)), with_two)


@pytest.mark.parametrize("size", [32, 224])
def test_the_memory_format_is_kept_and_does_not_change_the_result(size: int) -> None:
    augment, images = augmentation(FLIP, JITTER, random_erasing=0.5, size=size), photographs(4, size, size)
    made = augment(batch(images), 0, np.arange(4))
    other = augment(batch(images, channels_last=False), 0, np.arange(4))
    assert torch.equal(made, other)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert other.is_contiguous()


def test_input_images_are_not_modified() -> None:
    pixels = batch(photographs(4, 32, 32), channels_last=False)
    before = pixels.clone()
    augmentation({**ERASE, "p": 1.0}, *EVERYTHING, size=32)(pixels, 0, np.arange(4))
    assert torch.equal(pixels, before)


def test_the_result_depends_on_seed_epoch_and_draw_only() -> None:
    pixels, draws = batch(photographs(1, 32, 32) * 8), np.arange(8)
    augment = augmentation(*EVERYTHING, size=32)
    made = augment(pixels, 0, draws)
    torch.manual_seed(7)
    np.random.seed(7)
    assert torch.equal(augmentation(*EVERYTHING, size=32)(pixels, 0, draws), made)
    assert torch.equal(augment(pixels, 0, torch.from_numpy(draws)), made)
    assert len(torch.unique(made, dim=0)) == 8, "each draw has its own random numbers"
    assert not torch.equal(augment(pixels, 1, draws), made)
    assert not torch.equal(augmentation(*EVERYTHING, size=32, seed=1)(pixels, 0, draws), made)


def test_the_alternating_flip_shows_both_versions_of_each_image_in_two_epochs() -> None:
    images, draws = batch(photographs(1, 32, 32) * 100), np.arange(100)
    plain = augmentation(size=32)(images, 0, draws)
    alternating = augmentation(size=32, alternating_flip=True)
    epochs = [alternating(images, epoch, draws) for epoch in range(4)]
    flipped = [(made != plain).flatten(1).any(1) for made in epochs]
    assert torch.equal(epochs[0], torch.where(flipped[0][:, None, None, None], plain.flip(3), plain))
    assert torch.equal(epochs[1], epochs[0].flip(3))
    assert torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], epochs[1])
    assert 35 <= int(flipped[0].sum()) <= 65, "binomial(100, 1/2): standard deviation 5"
    assert torch.equal(alternating(images[90:], 1, draws[90:]), epochs[1][90:])
    other_seed = augmentation(size=32, alternating_flip=True, seed=1)
    assert not torch.equal(other_seed(images, 0, draws), epochs[0])


def test_the_alternating_flip_has_its_own_random_numbers_beside_other_transforms() -> None:
    """A gradient from left to right shows the flip whatever the crop: pixels increase or decrease."""
    ramp = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None, :, None] * 6, 40, 0).repeat(3, 2))
    images, draws = batch([ramp] * 50), np.arange(50) * 3
    augment = augmentation({**BLUR, "apply_p": 0.5}, crop(size=32), alternating_flip=True, size=32)
    first, second, third = (augment(images, epoch, draws) for epoch in range(3))
    increasing = [(made[:, 0, 0, -1] > made[:, 0, 0, 0]) for made in (first, second, third)]
    assert torch.equal(increasing[0], ~increasing[1])
    assert torch.equal(increasing[0], increasing[2])
    assert not torch.equal(first, third), "the crops differ"


def test_the_alternating_flip_is_refused_where_images_are_augmented_one_by_one() -> None:
    table = AugmentConfig.model_validate({"alternating_flip": True, "auto_augment": "rand-m9"})
    with pytest.raises(UserError, match=r"alternating_flip is applied to whole batches.*auto_augment = 'rand-m9'"):
        plan_preprocessing("train", table, SMALL, 0, None)


def test_both_ways_to_copy_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    augment, pixels = augmentation(crop(padding=9, fill=[1, 2, 3]), FLIP, UPSIDE), batch(photographs(5, 224, 224))
    by_slices = augment(pixels, 0, np.arange(5))
    monkeypatch.setattr(gpu_crop_flip, "LARGE", 2**40)
    assert torch.equal(augment(pixels, 0, np.arange(5)), by_slices)


def test_both_ways_to_erase_give_the_same_result() -> None:
    plan = RandomErasing((0.02, 0.33), (0.3, 3.3), (0.0,), 0.7).plan(
        np.random.default_rng(0).random((50, 23)), (40, 30)
    )
    images = torch.ones(50, 1, 40, 30)
    RandomErasing((0.02, 0.33), (0.3, 3.3), (0.0,), 0.7).erase(images, plan, torch.empty(0))
    assert torch.equal(_within(torch.from_numpy(plan.table), torch.Size((40, 30))), images == 0)


# -- transforms that prevent batching ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"name": "RandomResizedCrop", "stage": "resize_crop"}, "augment.train[1]: RandomResizedCrop"),
        ({"name": "ElasticTransform"}, "augment.train[1]: ElasticTransform"),
        ({"name": "RandAugment"}, "augment.train[1]: RandAugment"),
        ({**TURN, "expand": True}, "augment.train[1]: RandomRotation with expand"),
        ({**TURN, "interpolation": "bicubic"}, "augment.train[1]: RandomRotation with interpolation = 'bicubic'"),
        ({**JITTER, "stage": "tensor"}, 'augment.train[1]: ColorJitter stage = "tensor"'),
        ({**FLIP, "stage": "before_resize"}, 'augment.train[1]: RandomHorizontalFlip stage = "before_resize"'),
        ({"name": "RandomErasing", "value": "random"}, "augment.train[1]: RandomErasing with value = \"random\""),
        ({"name": "CenterCrop", "apply_p": 0.5}, "augment.train[1]: CenterCrop with apply_p"),
    ],
)  # fmt: skip
def test_the_transform_that_prevents_batching_is_named(entry: Entry, expected: str) -> None:
    table = AugmentConfig.model_validate({"train": [FLIP, entry]})
    plan = plan_preprocessing("train", table, SMALL, 0, None)
    assert plan.why_not_batched == expected


def test_the_recipe_decides_where_augmentation_runs() -> None:
    workers = AugmentConfig.model_validate({"train": [FLIP], "run_on": "workers"})
    assert plan_preprocessing("train", workers, SMALL, 0, None).batched is None
    device = AugmentConfig.model_validate({"train": [{"name": "RandAugment"}], "run_on": "device"})
    with pytest.raises(UserError, match=r"is not possible: augment.train\[0\]: RandAugment"):
        plan_preprocessing("train", device, SMALL, 0, None)


def test_a_policy_prevents_batched_augmentation() -> None:
    table = AugmentConfig.model_validate({"auto_augment": "rand-m9"})
    plan = plan_preprocessing("train", table, SMALL, 0, None)
    assert (plan.why_not_batched, plan.batched) == ("augment.auto_augment = 'rand-m9'", None)
    assert plan_preprocessing("validation", table, SMALL, 0, None).batched is not None


def test_fixed_transforms_before_the_resize_do_not_prevent_batched_augmentation() -> None:
    table = AugmentConfig.model_validate({"train": [{**PAD, "stage": "before_resize"}, FLIP]})
    plan = plan_preprocessing("train", table, Preprocessing(3, (32, 32), 40, True, "bilinear", HALF, HALF), 0, None)
    assert plan.batched is not None
    assert plan.steps == 3, "padding, resize and crop are applied to each image"
    assert plan.batched(batch(photographs(2, 32, 32)), 0, np.arange(2)).shape == (2, 3, 32, 32)


def test_images_padded_to_a_square_are_augmented_in_batches_too() -> None:
    """Weights of timm with crop_mode = "border": the long side is resized, the rest padded with the mean color."""
    padded = Preprocessing(3, (32, 32), 32, True, "bilinear", (0.0,) * 3, (1.0,) * 3, border=(10, 20, 30))
    for entry in ({**FLIP, "p": 1.0}, {**FLIP, "p": 1.0, "stage": "before_crop"}):
        table = AugmentConfig.model_validate({"train": [entry]})
        plan = plan_preprocessing("train", table, padded, 0, 40)
        assert plan.batched is not None
        images = photographs(2, 30, 40)
        made = plan.batched(
            batch([as_image(plan.transform.apply(as_pixels(one), plan.steps)) for one in images]), 0, [0, 1]
        )
        assert torch.equal(made, torch.stack([plan.transform(as_pixels(one)) for one in images]))


def test_images_of_the_wrong_size_are_refused() -> None:
    pixels = batch(photographs(2, 32, 32))
    with pytest.raises(UserError, match=r"34 x 36 pixels, but data.image_size is 32"):
        augmentation({"name": "Pad", "padding": [2, 1]}, size=32)(pixels, 0, np.arange(2))
    with pytest.raises(UserError, match=r"RandomCrop of 32 x 32 pixels from images of 20 x 30"):
        augmentation(crop(stage="crop"), size=32)(batch(photographs(2, 20, 30)), 0, np.arange(2))
    with pytest.raises(UserError, match=r"images of different sizes"):
        augmentation(crop(stage="crop", apply_p=0.5), size=32)(batch(photographs(8, 40, 40)), 0, np.arange(8))


def test_a_data_set_in_memory_needs_no_conversion() -> None:
    """Fashion-MNIST and the like: uint8 [N, H, W]."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    augment = augmentation(size=28, channels=1)
    expected = torch.stack(
        [
            torch.from_numpy(InMemoryImages(pixels, "m", 1).load(i)).permute(2, 0, 1).float() * (1 / 255)
            for i in range(6)
        ]
    )
    assert torch.equal(augment(torch.from_numpy(pixels)[:, None], 0, np.arange(6)), expected)
