"""The faster JPEG decoder gives the same bytes as Pillow, and leaves unusual files to Pillow."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toolkit.data import jpeg_decoding
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages, UnreadableImageError
from toolkit.data.jpeg_decoding import decode_jpeg, jpeg_decoder

lacks_decoder = jpeg_decoder() == "Pillow" and not os.environ.get("CI")
needs_simplejpeg = pytest.mark.skipif(lacks_decoder, reason='pip install -e ".[fast]" has the decoder')


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def as_jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@needs_simplejpeg
@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["444", "422", "420"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(301, 203), (16, 16), (17, 1), (1, 1)])
def test_the_faster_decoder_gives_the_same_bytes_as_pillow(
    subsampling: int, progressive: bool, size: tuple[int, int]
) -> None:
    for quality in (10, 75, 100):
        data = as_jpeg(photograph(*size), subsampling=subsampling, progressive=progressive, quality=quality)
        found = decode_jpeg(data)
        assert found is not None
        assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(data))))


@needs_simplejpeg
def test_unusual_jpeg_files_are_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = as_jpeg(photograph(64, 48))
    others = {
        "gray": as_jpeg(photograph(64, 48, "L")),
        "CMYK": as_jpeg(photograph(64, 48, "CMYK")),
        "truncated": whole[: len(whole) // 2],
        "start only": whole[:3],
        "empty": b"",
        "a PNG": b"\x89PNG\r\n\x1a\n",
    }
    assert [name for name, data in others.items() if decode_jpeg(data) is not None] == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    assert decode_jpeg(whole) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_jpeg(whole) is not None


@needs_simplejpeg
def test_a_file_on_which_the_faster_decoder_fails_is_decoded_by_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes) -> None:
        raise RuntimeError("out of handles")

    monkeypatch.setattr(jpeg_decoding.simplejpeg, "decode_jpeg", broken)
    image = photograph(64, 48)
    (tmp_path / "a.jpg").write_bytes(as_jpeg(image, quality=95))
    assert EncodedImages(ImageFiles(tmp_path, ["a.jpg"]), 3).load(0).shape == (image.height, image.width, 3)


@pytest.mark.parametrize("with_decoder", [pytest.param(True, marks=needs_simplejpeg), False])
def test_images_are_the_same_with_and_without_the_faster_decoder(
    with_decoder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_decoder:
        monkeypatch.setattr(jpeg_decoding, "simplejpeg", None)
        assert jpeg_decoder() == "Pillow"
    whole = as_jpeg(photograph(64, 48))
    (tmp_path / "color.jpg").write_bytes(whole)
    (tmp_path / "gray.jpg").write_bytes(as_jpeg(photograph(64, 48, "L")))
    (tmp_path / "cmyk.jpg").write_bytes(as_jpeg(photograph(64, 48, "CMYK")))
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    names = ["color.jpg", "gray.jpg", "cmyk.jpg", "truncated.jpg"]
    for channels, mode in ((3, "RGB"), (1, "L")):
        images = EncodedImages(ImageFiles(tmp_path, names), channels)
        for i, name in enumerate(names[:3]):
            wanted = np.asarray(Image.open(tmp_path / name).convert(mode))
            assert np.array_equal(images.load(i), wanted.reshape(images.load(i).shape))
        with pytest.raises(UnreadableImageError, match=r"truncated.jpg: damaged \(image file is truncated"):
            images.load(3)
