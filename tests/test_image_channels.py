"""Images of any number of channels, of more than 8 bits per sample and of several pages, from the file to the model."""

from __future__ import annotations

import builtins
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import timm
import torch
from cli import toolkit
from finished import CONVNET, digit_files, train_on_files
from PIL import Image
from torchvision.models import resnet18
from torchvision.transforms import v2

from toolkit.augment.transforms import build_transform
from toolkit.data.array_images import turned
from toolkit.data.channel_stats import channel_statistics
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages, InMemoryImages, UnreadableImageError, check_images
from toolkit.data.orientation import TURNS
from toolkit.data.pipeline import plan_preprocessing
from toolkit.data.preprocessing import Preprocessing
from toolkit.data.value_range import choose_range
from toolkit.errors import UserError
from toolkit.models.build import build_model
from toolkit.recipe.input_checks import COLOR_ONLY
from toolkit.recipe.schema import AugmentConfig, ModelConfig
from toolkit.runs import Run

CHANNELS = 5
FLIP = {"name": "RandomHorizontalFlip", "p": 1.0}


def noise(*shape: int, high: int = 256, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def reader(path: Path, channels: int, **options: Any) -> EncodedImages:
    return EncodedImages(ImageFiles(path.parent, [path.name]), channels, **options)


def loaded(path: Path, channels: int, **options: Any) -> npt.NDArray[np.uint8]:
    images = reader(path, channels, **options)
    assert not check_images(images, np.arange(1), decode=True).bad
    return images.load(0)


def reason(path: Path, channels: int, **options: Any) -> str:
    """Return why an image cannot be read, which the check before training finds too."""
    images = reader(path, channels, **options)
    (found,) = check_images(images, np.arange(1), decode=True).bad
    with pytest.raises(UnreadableImageError) as error:
        images.load(0)
    assert error.value.reason == found[1]
    return found[1]


def plain(size: tuple[int, int], channels: int = CHANNELS, *, resized: tuple[int, int] | None = None) -> Preprocessing:
    return Preprocessing(channels, size, resized, True, "bilinear", (0.5,) * channels, (0.25,) * channels)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 5, 32])
def test_arrays_of_any_number_of_channels_are_read_exactly(tmp_path: Path, channels: int) -> None:
    pixels = noise(9, 40, channels)
    np.save(tmp_path / "last.npy", pixels)
    np.save(tmp_path / "first.npy", np.moveaxis(pixels, 2, 0))
    tifffile.imwrite(tmp_path / "contig.tif", pixels, photometric="minisblack", planarconfig="contig")
    planes = np.moveaxis(pixels, 2, 0)
    tifffile.imwrite(tmp_path / "planar.tif", planes, photometric="minisblack", planarconfig="separate")
    for name in ("last.npy", "first.npy", "contig.tif", "planar.tif"):
        assert np.array_equal(loaded(tmp_path / name, channels), pixels), name


def test_channels_of_png_files_with_alpha_are_read_as_they_are(tmp_path: Path) -> None:
    pixels = noise(9, 12, 4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(loaded(tmp_path / "a.png", 4), pixels)
    assert np.array_equal(loaded(tmp_path / "a.png", 3), pixels[..., :3])


def test_gray_and_color_arrays_are_converted_as_image_files_are(tmp_path: Path) -> None:
    color = noise(9, 12, 3)
    np.save(tmp_path / "c.npy", color)
    np.save(tmp_path / "g.npy", color[..., 0])
    assert np.array_equal(loaded(tmp_path / "c.npy", 3), color)
    assert np.array_equal(loaded(tmp_path / "c.npy", 1)[..., 0], np.asarray(Image.fromarray(color).convert("L")))
    assert np.array_equal(loaded(tmp_path / "g.npy", 3), np.repeat(color[..., :1], 3, axis=2))


def test_another_number_of_channels_is_a_fault_of_the_image(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(9, 40, 5))
    tifffile.imwrite(tmp_path / "a.tif", noise(9, 40, 5), photometric="minisblack", planarconfig="contig")
    Image.fromarray(noise(9, 40, 3)).save(tmp_path / "a.png")
    advice = "(if this is true of all images, set data.channels = {})"
    for name in ("a.npy", "a.tif"):
        for channels in (8, 3):
            expected = f"it has 5 channels, but data.channels is {channels} {advice.format(5)}"
            assert reason(tmp_path / name, channels) == expected
    assert reason(tmp_path / "a.png", 5) == f"it has 3 channels, but data.channels is 5 {advice.format(3)}"
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    assert "not numbers" in reason(tmp_path / "text.npy", 3)
    np.save(tmp_path / "flat.npy", noise(9))
    assert "an array of shape [9] is not an image" in reason(tmp_path / "flat.npy", 3)


def test_images_in_memory_are_not_given_channels_that_they_do_not_have() -> None:
    assert InMemoryImages(noise(2, 9, 12, 5), "toy", 5).load(0).shape == (9, 12, 5)
    for found, wanted in ((1, 5), (3, 5), (5, 3)):
        with pytest.raises(UserError, match=rf"toy have {found} channels?, but data.channels is {wanted}"):
            InMemoryImages(noise(2, 9, 12, found), "toy", wanted)


def test_a_damaged_or_cut_array_is_found_before_training(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(9, 40, 5))
    whole = (tmp_path / "a.npy").read_bytes()
    for cut in (whole[:-1], whole[:40]):
        (tmp_path / "a.npy").write_bytes(cut)
        ((_, found),) = check_images(reader(tmp_path / "a.npy", 5), np.arange(1), decode=False).bad
        assert found.startswith("damaged")
    np.save(tmp_path / "b.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert check_images(reader(tmp_path / "b.npy", 5), np.arange(1), decode=False).bad, "a pickle is never loaded"


# -- samples of more than 8 bits --------------------------------------------------------------------------------------


def color_png(values: npt.NDArray[Any]) -> bytes:
    """Return a PNG file with 16 bits per sample of [h, w, 3 or 4], which Pillow cannot write."""
    height, width, channels = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "tif", "planar"])
def test_color_with_12_of_16_bits_is_read_with_all_of_them(tmp_path: Path, kind: str) -> None:
    """Pillow would read its upper 8 bits: 16 of 256 levels."""
    values = noise(9, 40, 3, high=4096, dtype=np.uint16)
    values[0, 0] = 4095
    path = tmp_path / f"a.{kind}"
    if kind == "png":
        path.write_bytes(color_png(values))
    elif kind == "tif":
        tifffile.imwrite(path, values, photometric="rgb")
    else:
        tifffile.imwrite(path, np.moveaxis(values, 2, 0), photometric="rgb", planarconfig="separate")
    extents = check_images(reader(path, 3), np.arange(1), decode=False).extents
    assert choose_range(extents) == (0, 4095)
    assert np.array_equal(loaded(path, 3, value_range=(0, 4095)), np.rint(values.astype(float) * 255 / 4095))
    window = loaded(path, 3, value_range=(1000, 2000))
    assert np.array_equal(window, np.rint((values.astype(float) - 1000) * 255 / 1000).clip(0, 255))


@pytest.mark.parametrize(
    ("dtype", "high", "expected"), [(np.uint16, 4096, (0, 4095)), (np.int32, 1000, (0, 1023)), (np.float32, 1, (0, 1))]
)
def test_the_range_of_deep_multi_channel_images_is_found(
    tmp_path: Path, dtype: npt.DTypeLike, high: int, expected: tuple[int, int]
) -> None:
    values = (np.random.default_rng(0).random((9, 40, CHANNELS)) * (high - (high > 1))).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig")
    for name in ("a.npy", "a.tif"):
        path = tmp_path / name
        assert choose_range(check_images(reader(path, CHANNELS), np.arange(1), decode=False).extents) == expected
        made = loaded(path, CHANNELS, value_range=expected)
        assert np.array_equal(made, np.rint(values.astype(np.float64) * 255 / expected[1]))
    np.save(tmp_path / "nan.npy", np.full((4, 4, CHANNELS), np.nan, dtype=np.float32))
    assert "not finite" in reason(tmp_path / "nan.npy", CHANNELS)


def test_rounding_to_8_bits_changes_a_value_by_at_most_a_510th_of_the_range(tmp_path: Path) -> None:
    """The precision that docs/data.md states."""
    values = np.linspace(0, 1, 10_001, dtype=np.float32).reshape(73, 137, 1).repeat(2, axis=2)
    np.save(tmp_path / "a.npy", values)
    made = loaded(tmp_path / "a.npy", 2, value_range=(0.0, 1.0))
    assert np.abs(made / 255 - values).max() <= 1 / 510 + 1e-6


def test_without_tifffile_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(9, 40, 5), photometric="minisblack", planarconfig="contig")
    Image.fromarray(noise(9, 40, 3)).save(tmp_path / "b.tif")
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "tifffile":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert loaded(tmp_path / "b.tif", 3).shape == (9, 40, 3)
    for act in (lambda images: images.load(0), lambda images: check_images(images, np.arange(1), decode=False)):
        with pytest.raises(UserError, match=r"tifffile, which is not installed: pip install '.*\[tiff\]'"):
            act(reader(tmp_path / "a.tif", 5))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_arrays_are_turned_as_pillow_turns_images(tmp_path: Path, orientation: int) -> None:
    pixels = noise(5, 8, 3)
    expected = Image.fromarray(pixels)
    expected = expected.transpose(TURNS[orientation]) if orientation in TURNS else expected
    assert np.array_equal(turned(pixels, orientation), np.asarray(expected))
    tag = [(274, "H", 1, orientation, False)]
    values = noise(5, 8, CHANNELS)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig", extratags=tag)
    assert np.array_equal(loaded(tmp_path / "a.tif", CHANNELS), turned(values, orientation))
    assert np.array_equal(loaded(tmp_path / "a.tif", CHANNELS, exif="ignore"), values)


# -- pages ------------------------------------------------------------------------------------------------------------


def test_a_page_of_a_file_is_chosen(tmp_path: Path) -> None:
    pages = [Image.fromarray(noise(9, 12, 3) // (n + 1)) for n in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for number, page in enumerate(pages):
        assert np.array_equal(loaded(tmp_path / "a.tif", 3, page=number), np.asarray(page))
    assert reason(tmp_path / "a.tif", 3, page=3) == "it has 3 pages, but data.page is 3 (counted from 0)"
    Image.fromarray(noise(9, 12, 3)).save(tmp_path / "b.jpg")
    assert reason(tmp_path / "b.jpg", 3, page=1) == "it has 1 page, but data.page is 1 (counted from 0)"
    deep = noise(3, 9, 12, 5, high=4096, dtype=np.uint16)
    with tifffile.TiffWriter(tmp_path / "c.tif") as writer:
        for page in deep:
            writer.write(page, photometric="minisblack", planarconfig="contig")
    found = loaded(tmp_path / "c.tif", 5, page=2, value_range=(0, 4095))
    assert np.array_equal(found, np.rint(deep[2].astype(float) * 255 / 4095))
    assert "it has 3 pages" in reason(tmp_path / "c.tif", 5, page=7, value_range=(0, 4095))


@pytest.mark.parametrize("options", [{"photometric": "minisblack"}, {"imagej": True}])
def test_pages_can_be_channels(tmp_path: Path, options: dict[str, Any]) -> None:
    planes = noise(4, 9, 12)
    tifffile.imwrite(tmp_path / "a.tif", planes, **options)
    assert np.array_equal(loaded(tmp_path / "a.tif", 4, page="channels"), np.moveaxis(planes, 0, 2))
    assert np.array_equal(loaded(tmp_path / "a.tif", 1, page=2)[..., 0], planes[2])


# -- transforms -------------------------------------------------------------------------------------------------------


def test_many_channels_are_resized_and_cropped_as_torchvision_does() -> None:
    pixels = noise(50, 70, CHANNELS)
    made = build_transform("test", AugmentConfig(), plain((24, 40), resized=(30, 50)))(pixels)
    reference = v2.Compose(
        [
            v2.Resize((30, 50), antialias=True),
            v2.CenterCrop((24, 40)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * CHANNELS, [0.25] * CHANNELS),
        ]
    )
    expected = reference(torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(made, expected)
    for channel in range(CHANNELS):
        alone = np.asarray(Image.fromarray(pixels[..., channel]).resize((50, 30), Image.Resampling.BILINEAR))
        assert np.abs(made[channel].numpy() * 0.25 + 0.5 - alone[3:27, 5:45] / 255).max() < 1.01 / 255


def test_batches_of_many_channels_equal_single_images() -> None:
    table = AugmentConfig.model_validate({"train": [FLIP, {"name": "RandomVerticalFlip", "p": 1.0}]})
    plan = plan_preprocessing("train", table, plain((24, 40), resized=(30, 50)), 0, None)
    assert plan.batched is not None
    images = [noise(50, 70, CHANNELS), noise(33, 41, CHANNELS)]
    pixels = torch.stack([torch.from_numpy(plan.transform.apply(one, plan.steps).copy()) for one in images])
    for layout in (torch.contiguous_format, torch.channels_last):
        batch = pixels.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        made = plan.batched(batch, 0, np.arange(2))
        assert torch.equal(made, torch.stack([plan.transform(one) for one in images]))


@pytest.mark.parametrize("name", ["RandomResizedCrop", "RandomRotation", "GaussianBlur", "ElasticTransform"])
def test_transforms_of_workers_apply_to_many_channels(name: str) -> None:
    arguments = {"RandomRotation": {"degrees": 9}, "GaussianBlur": {"kernel_size": 3}}.get(name, {})
    stage = {"stage": "resize_crop"} if name == "RandomResizedCrop" else {}
    table = AugmentConfig.model_validate({"train": [{"name": name, **arguments, **stage}], "run_on": "workers"})
    plan = plan_preprocessing("train", table, plain((24, 24), resized=(24, 24)), 0, None)
    assert plan.transform(noise(50, 70, CHANNELS)).shape == (CHANNELS, 24, 24)


@pytest.mark.parametrize("name", sorted(COLOR_ONLY))
def test_transforms_that_are_refused_for_many_channels_cannot_be_applied(name: str) -> None:
    arguments = {"JPEG": {"quality": 50}, "RandomAdjustSharpness": {"sharpness_factor": 2},
                 "ColorJitter": {"hue": 0.1}}.get(name, {})  # fmt: skip
    certain = {"p": 1.0} if name.startswith("Random") else {}
    transform = getattr(v2, name)(**arguments, **certain)
    image = torch.from_numpy(noise(CHANNELS, 20, 20))
    with pytest.raises(Exception, match=r".+"):
        [transform(image) for _ in range(20)]  # policies draw their operations


def test_the_mean_of_many_channels_is_exact() -> None:
    pixels = noise(6, 10, 12, CHANNELS)
    mean, std = channel_statistics(InMemoryImages(pixels, "", CHANNELS), np.arange(6), plain((10, 12)))
    assert mean == pytest.approx((pixels / 255).mean((0, 1, 2)), abs=1e-12)
    assert std == pytest.approx((pixels / 255).std((0, 1, 2)), abs=1e-12)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 32])
def test_weights_of_timm_are_adapted_as_timm_adapts_them(tmp_path: Path, channels: int) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "w.pth")
    table = ModelConfig(source="timm", name="test_resnet", weights=f"file:{tmp_path / 'w.pth'}")
    found = build_model(table, 7, channels, 32)
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 7}
    expected = timm.create_model(
        "test_resnet", num_classes=7, in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay
    )
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], tensor), name
    assert found.module.eval()(torch.zeros(1, channels, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("channels", [1, 5])
def test_weights_of_torchvision_are_adapted_in_the_same_way(tmp_path: Path, channels: int) -> None:
    color = resnet18(num_classes=7)
    torch.save(color.state_dict(), tmp_path / "w.pth")
    table = ModelConfig(source="torchvision", name="resnet18", weights=f"file:{tmp_path / 'w.pth'}")
    found = build_model(table, 7, channels, 32).module.state_dict()["conv1.weight"]
    expected = timm.models.adapt_input_conv(channels, color.state_dict()["conv1.weight"])
    assert torch.equal(found, expected)


# -- runs -------------------------------------------------------------------------------------------------------------


def as_arrays(root: Path, write: Callable[[Path, npt.NDArray[np.uint8]], None]) -> None:
    """Write digits of five channels, each brighter than the one before, instead of the PNG files below ``root``."""
    for file in sorted(digit_files(root).rglob("*.png")):
        gray = np.asarray(Image.open(file)).astype(int)
        write(file, np.stack([gray * (n + 1) // CHANNELS for n in range(CHANNELS)], axis=2).astype(np.uint8))
        file.unlink()


MANY = ("data.channels=5", 'data.normalize="dataset"', 'augment.train=[{name="RandomHorizontalFlip"}]')


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on .npy files of five channels."""
    folder = tmp_path_factory.mktemp("many")
    as_arrays(folder / "data", lambda file, pixels: np.save(file.with_suffix(".npy"), pixels))
    return train_on_files(folder, CONVNET, *MANY)


@pytest.mark.long
def test_a_run_on_five_channels_is_evaluated_predicted_explained_exported_and_reported(
    many: Run, tmp_path: Path
) -> None:
    evaluated = toolkit("evaluate", many.path, "--json")
    assert {m["verdict"] for m in json.loads(evaluated.stdout)["metrics"]["best"].values()} == {"equal"}
    file = next((many.path.parents[2] / "data" / "test").rglob("*.npy"))
    for command in (("predict",), ("explain", "-o", tmp_path / "maps")):
        outcome = toolkit(command[0], many.path, file, *command[1:])
        assert outcome.status == 0, outcome.stderr
    assert toolkit("export", many.path, "--format", "safetensors", "-o", tmp_path / "out").status == 0
    card = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert card["input"]["shape"] == ["batch", 5, 16, 16]
    assert "decode to all 5 channels, 8 bits per channel" in card["steps"]
    assert len(card["mean"]) == 5
    report = toolkit("report", many.path)
    assert report.status == 0, report.stderr
    page = (many.path / "report.html").read_text()
    assert "cannot be shown" not in page
    data = toolkit("data", many.path.parents[2] / "recipe.toml", *(p for s in MANY for p in ("--set", s)))
    assert data.status == 0, data.stderr


@pytest.mark.long
def test_tiff_files_of_the_same_pixels_give_the_same_metrics(many: Run, tmp_path: Path) -> None:
    def write(file: Path, pixels: npt.NDArray[np.uint8]) -> None:
        tifffile.imwrite(file.with_suffix(".tif"), pixels, photometric="minisblack", planarconfig="contig")

    as_arrays(tmp_path / "data", write)
    run = train_on_files(tmp_path, CONVNET, *MANY)
    assert run.metrics_file.read_bytes() == many.metrics_file.read_bytes()


@pytest.mark.long
def test_the_page_and_range_of_training_are_used_in_prediction(tmp_path: Path) -> None:
    """The digit is on page 1, with 12 bits; page 0 is empty."""
    for file in sorted(digit_files(tmp_path / "data").rglob("*.png")):
        gray = np.asarray(Image.open(file)).astype(np.uint16) * 16
        tifffile.imwrite(file.with_suffix(".tif"), np.stack([gray * 0, gray]), photometric="minisblack")
        file.unlink()
    run = train_on_files(tmp_path, CONVNET, "data.page=1")
    stored = json.loads((run.checkpoints / "model.json").read_text())["preprocessing"]
    assert (stored["page"], stored["value_range"]) == (1, [0, 4095])
    shutil.copytree(tmp_path / "data" / "test", tmp_path / "elsewhere")
    predicted = toolkit("predict", run.path, tmp_path / "elsewhere", "--json")
    assert predicted.status == 0, predicted.stderr
    evaluated = toolkit("evaluate", run.path, "--json")
    assert {m["verdict"] for m in json.loads(evaluated.stdout)["metrics"]["best"].values()} == {"equal"}
