"""Files with more than 8 bits per sample have one range per data set, also for a single image, or are refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages, UnreadableImageError, check_images
from toolkit.data.value_range import Extent, choose_range
from toolkit.errors import UserError

RAMP = np.linspace(0, 1, 2400).reshape(40, 60)
"""From black to white."""
GRAYS = np.rint(RAMP * 255).astype(int)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def color_png(values: npt.NDArray[np.int64]) -> bytes:
    """Return a PNG file of 16-bit RGB values [h, w, 3], which Pillow cannot write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def save(path: Path, values: npt.NDArray[np.float64]) -> None:
    """Save ``values`` as 16-bit PNG or PGM, int32 TIFF, float TIFF or PFM, depending on the name."""
    kind: type = {"png": np.uint16, "pgm": np.uint16, "int.tiff": np.int32, "jp2": np.uint16}.get(
        path.name.partition(".")[2], np.float32
    )
    Image.fromarray((values if kind is np.float32 else np.rint(values)).astype(kind)).save(path)


def settled(images: EncodedImages) -> EncodedImages:
    """Return the images with the range that training would determine."""
    found = check_images(images, np.arange(len(images)), decode=False)
    assert found.bad == []
    return images.with_range(choose_range(found.extents))


@pytest.mark.parametrize(
    ("name", "white"),
    [(n, w) for n in ("a.png", "a.int.tiff") for w in (255, 1023, 4095, 16383, 65535)]
    + [("a.float.tiff", 1), ("a.pfm", 1)],
)
def test_black_is_0_and_white_255_for_any_bit_depth(name: str, white: int, tmp_path: Path) -> None:
    save(tmp_path / name, RAMP * white)
    images = settled(EncodedImages(ImageFiles(tmp_path, [name]), 1))
    assert images.value_range == (0, white)
    pixels = images.load(0)[..., 0].astype(int)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.abs(pixels - GRAYS).max() <= 1  # the file's own rounding


def test_the_whole_data_set_has_one_range(tmp_path: Path) -> None:
    """An image is not scaled by its own values: one that is half as bright stays half as bright."""
    for name, factor in (("bright.png", 4000), ("half.png", 2000), ("dark.png", 20)):
        save(tmp_path / name, RAMP * factor)
    Image.fromarray(GRAYS.astype(np.uint8)).save(tmp_path / "eight.png")
    images = settled(EncodedImages(ImageFiles(tmp_path, ["dark.png", "bright.png", "half.png", "eight.png"]), 1))
    assert images.value_range == (0, 4095)
    assert [int(images.load(i).max()) for i in range(4)] == [1, 249, 125, 255]
    alone = EncodedImages(
        ImageFiles(tmp_path, ["half.png"]), 1, value_range=images.value_range
    )  # as predict reads one image
    assert np.array_equal(alone.load(0), images.load(2))


def test_eight_bits_stored_in_sixteen_are_read_exactly(tmp_path: Path) -> None:
    save(tmp_path / "a.png", GRAYS * 257.0)
    assert np.array_equal(settled(EncodedImages(ImageFiles(tmp_path, ["a.png"]), 1)).load(0)[..., 0], GRAYS)


def test_the_header_of_a_pgm_file_states_its_white(tmp_path: Path) -> None:
    """The maxval in its header is used even if all images are dark."""
    values = np.rint(RAMP * 100).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5\n60 40\n1023\n" + values.tobytes())
    plain = EncodedImages(ImageFiles(tmp_path, ["a.pgm"]), 1)
    assert check_images(plain, np.arange(1), decode=False).extents == []
    for images in (plain, plain.with_range((0, 4095))):
        assert np.abs(images.load(0)[..., 0] - values * 255 / 1023).max() <= 0.51


def test_sixteen_bit_color_is_read_with_one_range(tmp_path: Path) -> None:
    values = np.rint(RAMP * 65535).astype(np.int64)[..., None].repeat(3, 2)
    (tmp_path / "a.png").write_bytes(color_png(values))
    (tmp_path / "b.png").write_bytes(color_png(values // 16))
    both = settled(EncodedImages(ImageFiles(tmp_path, ["a.png", "b.png"]), 3))
    assert both.value_range == (0, 65535)
    assert [int(both.load(i).max()) for i in (0, 1)] == [255, 15]
    dark = EncodedImages(ImageFiles(tmp_path, ["b.png"]), 3)
    assert settled(dark).value_range == (0, 4095)
    assert np.abs(settled(dark).load(0) - (values // 16) * 255 / 4095).max() <= 0.51
    with pytest.raises(UnreadableImageError, match=r"b\.png: it has color samples.*convert it to 8 bits"):
        dark.load(0)
    assert dark.with_range((0, 65535)).load(0).max() == 15


@pytest.mark.parametrize(
    ("name", "factor", "offset"),
    [
        ("a.int.tiff", 2e6, 0),  # beyond 16 bits
        ("a.int.tiff", 1000, -500),  # negative
        ("a.int.tiff", 9, 0),  # labels?
        ("a.float.tiff", 37, 0),  # degrees?
        ("a.float.tiff", 1, -0.5),
        ("a.float.tiff", 0.1, 0),
        ("a.pfm", 255, 0),
    ],
)
def test_an_unknown_range_is_refused_and_can_be_stated_in_the_recipe(
    name: str, factor: float, offset: float, tmp_path: Path
) -> None:
    save(tmp_path / name, RAMP * factor + offset)
    images = EncodedImages(ImageFiles(tmp_path, [name]), 1)
    low, high = offset, factor + offset
    with pytest.raises(UserError) as caught:
        settled(images)
    for part in (name, f"from {low:g} to {high:g}", "data.value_range = [BLACK, WHITE]"):
        assert part in str(caught.value)
    with pytest.raises(UnreadableImageError, match="the value that means white is unknown; convert it to 8 bits"):
        images.load(0)
    pixels = images.with_range((low, high)).load(0)[..., 0].astype(int)
    assert np.abs(pixels - GRAYS).max() <= (15 if factor == 9 else 1)


def test_values_outside_the_range_are_clipped(tmp_path: Path) -> None:
    """The range is a window, as in computed tomography."""
    save(tmp_path / "a.int.tiff", RAMP * 3000 - 1000)
    pixels = (
        EncodedImages(ImageFiles(tmp_path, ["a.int.tiff"]), 1, value_range=(-100, 400)).load(0)[..., 0].astype(float)
    )
    assert np.abs(pixels - ((RAMP * 3000 - 1000 + 100) * 255 / 500).clip(0, 255)).max() <= 0.8


def test_a_single_image_is_accepted_only_if_its_range_is_unambiguous(tmp_path: Path) -> None:
    """For a model that was trained on files of 8 bits."""
    save(tmp_path / "full.png", RAMP * 65535)
    save(tmp_path / "twelve.png", RAMP * 4095)
    images = EncodedImages(ImageFiles(tmp_path, ["full.png", "twelve.png"]), 1)
    assert np.array_equal(images.load(0)[..., 0], np.rint(np.rint(RAMP * 65535) * 255 / 65535))
    with pytest.raises(
        UnreadableImageError,
        match=r"twelve\.png: it has integer samples.* from 0 to 4095, and the value that means white",
    ):
        images.load(1)


def test_values_that_are_not_numbers_are_reported_as_damage(tmp_path: Path) -> None:
    save(tmp_path / "nan.float.tiff", np.where(RAMP > 0.5, np.nan, RAMP))
    save(tmp_path / "fine.float.tiff", RAMP)
    images = EncodedImages(ImageFiles(tmp_path, ["nan.float.tiff", "fine.float.tiff"]), 1)
    found = check_images(images, np.arange(2), decode=False)
    assert [(i, "NaN" in reason) for i, reason in found.bad] == [(0, True)]
    assert choose_range(found.extents) == (0, 1)
    with pytest.raises(UnreadableImageError, match="NaN"):
        images.with_range((0, 1)).load(0)


def test_images_with_different_kinds_of_samples_are_refused() -> None:
    with pytest.raises(UserError, match="a and b have samples of different kinds"):
        choose_range([Extent("float", 0, 1, "a"), Extent("integer", 0, 255, "b")])
    assert choose_range([]) is None
