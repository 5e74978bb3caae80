"""data.exif: one rule for all formats, with the same pixels for every decoder, and separate cache entries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toolkit.augment.transforms import build_transform
from toolkit.cache.decoded_images import CachePartition, part_key
from toolkit.data import jpeg_decoding
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages
from toolkit.data.orientation import TURNS, jpeg_turn
from toolkit.data.preprocessing import Preprocessing
from toolkit.recipe.schema import AugmentConfig

UPRIGHT = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
"""The upright image, 40 x 56 pixels in blocks of 8, which JPEG compression preserves."""

STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}
"""The stored pixels for each value of the orientation tag, by the EXIF standard (6: row 0 is the right side)."""

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
FORMATS = {
    "jpg": {"quality": 100, "subsampling": 0},
    "png": {},
    "tiff": {},
    "lzw.tiff": {"compression": "tiff_lzw"},
    "webp": {"lossless": True},
    "avif": {"quality": 100, "subsampling": "4:4:4"},
}


def save(path: Path, tag: int, **options: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(np.ascontiguousarray(STORED[tag])).save(path, exif=exif, **options)


def close(found: np.ndarray, wanted: np.ndarray, name: str) -> None:
    pixels = found.astype(int)
    assert pixels.shape == wanted.shape, name
    lossy = name.endswith(("jpg", "avif"))
    assert np.abs(pixels - wanted).mean() < (3 if lossy else 1e-9), name


@pytest.mark.parametrize("kind", FORMATS)
def test_images_of_every_format_are_rotated_by_the_same_rule(kind: str, tmp_path: Path) -> None:
    names = [f"{tag}.{kind}" for tag in STORED]
    for tag, name in zip(STORED, names, strict=True):
        save(tmp_path / name, tag, **FORMATS[kind])
    upright, stored = (
        EncodedImages(ImageFiles(tmp_path, names), 3),
        EncodedImages(ImageFiles(tmp_path, names), 3, exif="ignore"),
    )
    for i, (tag, name) in enumerate(zip(STORED, names, strict=True)):
        close(upright.load(i), UPRIGHT, name)
        close(stored.load(i), STORED[tag], name)
        gray = EncodedImages(ImageFiles(tmp_path, names), 1).load(i)
        assert gray.shape == (40, 56, 1)


def test_the_faster_decoder_applies_the_orientation_like_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{tag}.jpg" for tag in STORED]
    for tag, name in zip(STORED, names, strict=True):
        save(tmp_path / name, tag, quality=90)
    images = EncodedImages(ImageFiles(tmp_path, names), 3)
    fast = [images.load(i) for i in range(8)]
    monkeypatch.setattr(jpeg_decoding, "simplejpeg", None)
    for i, pixels in enumerate(fast):
        assert np.array_equal(pixels, images.load(i)), names[i]


def test_the_orientation_in_xmp_is_used_only_if_there_is_none_in_exif(tmp_path: Path) -> None:
    image = Image.fromarray(np.ascontiguousarray(STORED[6]))
    image.save(tmp_path / "xmp.jpg", xmp=XMP, quality=100, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 1
    image.save(tmp_path / "both.jpg", xmp=XMP, exif=exif, quality=100, subsampling=0)
    close(EncodedImages(ImageFiles(tmp_path, ["xmp.jpg"]), 3).load(0), UPRIGHT, "xmp.jpg")
    close(EncodedImages(ImageFiles(tmp_path, ["both.jpg"]), 3).load(0), STORED[6], "both.jpg")


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_damaged_metadata_do_not_make_an_image_unreadable(exif: bytes, tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp"):
        Image.fromarray(UPRIGHT).save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
        assert EncodedImages(ImageFiles(tmp_path, [name]), 3).load(0).shape == (40, 56, 3)


def test_an_orientation_out_of_range_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    Image.fromarray(UPRIGHT).save(tmp_path / "a.jpg", exif=exif)
    assert jpeg_turn((tmp_path / "a.jpg").read_bytes()) is None
    assert EncodedImages(ImageFiles(tmp_path, ["a.jpg"]), 3).load(0).shape == (40, 56, 3)


def test_a_jpeg_without_metadata_is_not_opened_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "a.jpg")

    def fail(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(Image, "open", fail)
    assert jpeg_turn((tmp_path / "a.jpg").read_bytes()) is None


def test_the_cache_key_depends_on_the_orientation_rule(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", 6)
    preprocessing = Preprocessing(3, (32, 32), 32, True, "bilinear", (0.5,) * 3, (0.5,) * 3)
    part = CachePartition(("train",), np.arange(1), build_transform("train", AugmentConfig(), preprocessing), 1)
    keys = [
        part_key(EncodedImages(ImageFiles(tmp_path, ["a.jpg"]), 3, exif=exif), part) for exif in ("apply", "ignore")
    ]
    assert keys[0] != keys[1]
    deep = EncodedImages(ImageFiles(tmp_path, ["a.jpg"]), 3).with_range((0, 4095))
    assert part_key(deep, part) not in keys


def test_the_orientation_tags_follow_the_exif_standard() -> None:
    for tag, turn in TURNS.items():
        stored = Image.fromarray(np.ascontiguousarray(STORED[tag]))
        assert np.array_equal(np.asarray(stored.transpose(turn)), UPRIGHT), tag
