"""Image sources: color modes, unreadable files and memory."""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages, InMemoryImages, UnreadableImageError, check_images
from toolkit.errors import RunFailed
from toolkit.filenames import decode_name

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "missing.jpg": (None, "no such file"),
    "empty.jpg": (b"", "an empty file"),
    "text.jpg": (b"<html>404</html>", "not an image of a known format"),
    "cut.jpg": (jpeg()[: len(jpeg()) // 2], "damaged"),
    "cut.png": (png()[: len(png()) // 2], "damaged"),
    "header.png": (png()[:8], "not an image of a known format"),
}
GOOD = {
    "fine.jpg": jpeg(),
    "fine.png": png(),
    "appended.jpg": jpeg() + b"\0" * 20,  # some cameras append zero bytes
    "appended.png": png() + b"\0" * 20,
    "wrong suffix.jpg": png(),
}


@pytest.fixture
def folder(tmp_path: Path) -> EncodedImages:
    """Return good and bad files, the bad ones first."""
    contents = {name: content for name, (content, _) in BAD.items()} | GOOD
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    return EncodedImages(ImageFiles(tmp_path, contents), 3)


@pytest.mark.parametrize("decode", [False, True])
def test_bad_files_are_found_and_good_ones_are_not(folder: EncodedImages, decode: bool) -> None:
    done: list[int] = []
    found = check_images(folder, np.arange(len(folder)), decode=decode, threads=2, progress=done.append).bad
    assert [folder.name(i) for i, _ in found] == list(BAD)
    for (_, reason), (_, expected) in zip(found, BAD.values(), strict=True):
        assert expected in reason
    assert done[-1] == len(folder)


def test_damage_in_the_middle_of_a_file_is_only_found_by_decoding(tmp_path: Path) -> None:
    content = bytearray(png())
    content[len(content) // 2] ^= 0xFF  # breaks a checksum, not the end
    (tmp_path / "flipped.png").write_bytes(content)
    images = EncodedImages(ImageFiles(tmp_path, ["flipped.png"]), 3)
    assert check_images(images, np.arange(1), decode=False).bad == []
    assert len(check_images(images, np.arange(1), decode=True).bad) == 1


@pytest.mark.parametrize("name", BAD)
def test_loading_a_bad_file_names_it_and_survives_pickling(folder: EncodedImages, name: str) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        folder.load(list(BAD).index(name))
    assert caught.value.name == name
    assert BAD[name][1] in caught.value.reason
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.name, copy.reason, str(copy)) == (name, caught.value.reason, str(caught.value))
    assert isinstance(copy, RunFailed)


def test_an_error_of_the_machine_is_not_reported_as_a_bad_image(
    folder: EncodedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With on_bad_image = skip, a temporary lack of file handles must not drop images."""

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(RunFailed, match="Too many open files") as caught:
        folder.load(len(folder) - 1)
    assert not isinstance(caught.value, UnreadableImageError)


def test_every_mode_becomes_rgb_or_grayscale(tmp_path: Path) -> None:
    color = Image.fromarray(PIXELS)
    sixteen_bits = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    made = {
        "rgb.png": color,
        "gray.png": color.convert("L"),
        "palette.png": color.convert("P"),
        "alpha.png": color.convert("RGBA"),
        "gray alpha.png": color.convert("LA"),
        "bilevel.png": color.convert("1"),
        "cmyk.jpg": color.convert("CMYK"),
        "sixteen.png": sixteen_bits,
    }
    transparent = color.convert("P")
    transparent.info["transparency"] = bytes(range(256))
    made["transparent palette.png"] = transparent
    for name, image in made.items():
        image.save(tmp_path / name)
    for channels in (3, 1):
        images = EncodedImages(ImageFiles(tmp_path, made), channels)
        assert {images.load(i).shape[2] for i in range(len(images))} == {channels}
    gray = EncodedImages(ImageFiles(tmp_path, made), 1).load(list(made).index("sixteen.png"))
    assert gray[..., 0].tolist() == [[0, 1, 255]]  # scaled, not clipped
    images = EncodedImages(ImageFiles(tmp_path, made), 3)
    assert np.array_equal(images.load(0), PIXELS)
    opaque, through = (images.load(list(made).index(n)) for n in ("palette.png", "transparent palette.png"))
    assert np.array_equal(opaque, through)


def test_file_names_may_contain_any_bytes_that_the_system_allows(tmp_path: Path) -> None:
    names = ["人/写真 1.png", "Käfer/Ähre.png", "new\nline.png", os.fsdecode(b"latin-\xe9.png"), "a" * 200 + ".png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    images = EncodedImages(ImageFiles(tmp_path, names), 3)
    encoded = [images.name(i) for i in range(len(images))]
    assert encoded == [
        "人/写真 1.png", "Käfer/Ähre.png", "new%0Aline.png", "latin-%E9.png", "a" * 200 + ".png"
    ]  # fmt: skip
    assert [decode_name(name) for name in encoded] == names
    assert [images.source.path(i) for i in range(len(images))] == [str(tmp_path / name) for name in names]
    assert [images.load(i).shape for i in range(len(images))] == [(40, 60, 3)] * len(names)
    with pytest.raises(IndexError):
        images.name(len(names))


def test_an_array_is_an_image_source() -> None:
    images = InMemoryImages(PIXELS[None], "toy", 3)
    assert len(images) == 1
    assert images.name(0) == "toy/0"
    assert np.array_equal(images.load(0), PIXELS)
    assert check_images(images, np.arange(1), decode=False).bad == []
    with pytest.raises(ValueError, match="float64"):
        InMemoryImages(PIXELS[None].astype(float), "toy", 3)


N_LARGE = 1_300_000


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's statistics of private memory")
def test_a_worker_copies_little_of_a_large_index() -> None:
    """A forked worker reads every name: with Python objects, their reference counts would copy every page."""
    files = ImageFiles(Path("data"), (f"train/n{i % 1000:08d}/image_{i:08d}.jpg" for i in range(N_LARGE)))
    images, paths = EncodedImages(files, 3), files._paths
    assert sys.getsizeof(paths._buffer) + sys.getsizeof(paths._ends) < 70e6
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # the worker; it must not return into pytest
        try:
            before = _private_bytes()
            ends_in_jpg = sum(images.name(i).endswith(".jpg") for i in range(0, N_LARGE, 3))
            os.write(write_end, f"{ends_in_jpg} {_private_bytes() - before}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    count, growth = map(int, os.read(read_end, 100).split())
    assert count == -(-N_LARGE // 3)
    assert growth < 10e6


def _private_bytes() -> int:
    """Return the memory that this process does not share with any other, in bytes."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(kb) for kb in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))
