"""Oddly structured image folders from disks, phones, archives and attackers, read by two commands.

Each has one correct outcome: known numbers of images, classes and images per split, or an error that names the problem.
`toolkit train` must agree with the counts of `toolkit data`. Run with -m slow; -s shows the counts.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
from cli import toolkit
from damage import limited
from image_folders import write_recipe
from PIL import Image

from toolkit.data import folder_walk
from toolkit.runs import open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 13
LIMIT_S = 60
EACH = 8
"""Images in each of the classes a and b that every folder starts with."""

SETTINGS = ("train.epochs=1", "train.batch_size=4", "data.split.validation=0.25", "data.split.test=0.25")


def write_image(path: Path, mode: str = "L", size: int = 12, **options: object) -> Path:
    """Write an image of random pixels, which are a function of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(zlib.crc32(os.fsencode(path.name)))
    channels = {"L": (), "RGB": (3,), "CMYK": (4,), "RGBA": (4,), "LA": (2,)}[mode]
    Image.fromarray(random.integers(0, 256, (size, size, *channels), dtype=np.uint8), mode).save(path, **options)
    return path


def write_images(root: Path, *folders: str, each: int = EACH) -> None:
    for folder in folders:
        for number in range(each):
            write_image(root / folder / f"{number}.png")


@dataclass(frozen=True)
class Kind:
    """A kind of folder, made from the classes a and b, and its only correct outcome."""

    name: str
    make: Callable[[Path], object]
    images: int = 0
    classes: int = 2
    refusal: str = ""
    """A pattern of both commands' error message; "" if the folder is accepted."""
    bad: str = ""
    """A pattern of an additional image that `toolkit data` lists as unreadable and `toolkit train` refuses."""
    settings: tuple[str, ...] = ()
    splits: tuple[int, int, int] | None = None
    """Numbers of training, validation and test images, if the folders determine them."""
    plain: bool = True
    """Whether the folder starts with the classes a and b."""


def _png_of(width: int, height: int) -> bytes:
    """Return a PNG file whose header states a size, but which contains no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def _splits(*names: str) -> Callable[[Path], object]:
    return lambda root: [write_images(root, f"{name}/a", f"{name}/b", each=4) for name in names]


def _cut(root: Path, kind: str, suffix: str) -> None:
    path = write_image(root / f"a/cut.{suffix}", "RGB", 64, format=kind)
    os.truncate(path, path.stat().st_size * 6 // 10)


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(content)


def _deep(root: Path, white: float, kind: type, suffix: str) -> None:
    """Convert all images to more than 8 bits per sample."""
    for path in [*root.rglob("*.png")]:
        values = np.asarray(Image.open(path)).astype(np.float64) / 255 * white
        path.unlink()
        Image.fromarray(values.astype(kind)).save(path.with_suffix(suffix))


def _link(name: str, target: str) -> Callable[[Path], object]:
    return lambda root: (root / name).symlink_to(target)


def _named(root: Path, *names: bytes) -> None:
    for name in names:
        os.rename(write_image(root / "a/new.png"), os.path.join(os.fsencode(root), b"a", name))


def _sockets(root: Path) -> None:
    os.mkfifo(root / "a/pipe.png")
    folder = os.getcwd()
    os.chdir(root / "b")  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket.jpg")
    finally:
        os.chdir(folder)


TWICE = 2 * EACH
KINDS = (
    Kind("nothing odd", lambda root: None, TWICE),
    # splits
    Kind("Train, Val, Test", _splits("Train", "Val", "Test"), 24, splits=(8, 8, 8), plain=False),
    Kind("TRAINING and TESTING", _splits("TRAINING", "TESTING"), 16, splits=(6, 2, 8), plain=False),
    Kind("train and dev", _splits("train", "dev"), 16, splits=(8, 8, 0), plain=False,
        settings=('data.split.test="auto"',)),
    Kind("training_set and test_set within a folder of an archive", _splits("zip/training_set", "zip/test_set"), 16,
        splits=(6, 2, 8), plain=False),
    Kind("train and Train", _splits("train", "Train"), refusal="has both Train/ and train/", plain=False),
    Kind("seg_train and seg_test", _splits("seg_train", "seg_test"), refusal="may be splits", plain=False),
    Kind("val without train", _splits("val", "test"), refusal="but no train/", plain=False),
    Kind("a split next to classes", lambda root: write_images(root, "train/a"),
        refusal=r"splits \(train/\).*\(a/, b/\)"),
    Kind("a class named train", lambda root: write_images(root, "train"), 3 * EACH, 3),
    Kind("a class that only test has", lambda root: (_splits("train", "test")(root), write_images(root, "test/c")),
        refusal="training images do not have: c", plain=False),
    # depth
    Kind("one class", lambda root: write_images(root, "images"), refusal="has only the class 'images'", plain=False),
    Kind("no class folders", lambda root: write_image(root / "1.png"), refusal="has no class folders", plain=False),
    Kind("an empty root", lambda root: None, refusal="it is empty", plain=False),
    Kind("an empty class folder", lambda root: (root / "c").mkdir(), refusal=r"class folder \S*/c holds no image"),
    Kind("classes by letter", lambda root: write_images(root, "x/abbey", "y/bar"),
        refusal=r'class_folders = "leaf"'),
    Kind("classes grouped by letter", lambda root: write_images(root, "x/abbey", "x/alley", "y/bar"), 3 * EACH, 3,
        settings=('data.class_folders="leaf"',), plain=False),
    Kind("versions of one data set", lambda root: write_images(root, "color/a", "color/b", "gray/a", "gray/b"),
        refusal=r"hold the same folders \(a/, b/\)", plain=False),
    # links and special files
    Kind("a link to its own folder", _link("a/loop", "."), TWICE),
    Kind("a link to the root", _link("a/loop", ".."), TWICE),
    Kind("twelve links to their own folder", lambda root: [_link(f"a/{n}", ".")(root) for n in range(12)], TWICE),
    Kind("a link to another class", _link("a/more", "../b"), refusal="would be both in"),
    Kind("a class that is a link to nothing", _link("c", "gone"), refusal=r"the link \S*/c leads to gone"),
    Kind("an image that is a link to nothing", _link("a/x.png", "gone.png"), TWICE, bad=r"a/x\.png"),
    Kind("an image that is a link to itself", _link("a/x.png", "x.png"), TWICE, bad=r"a/x\.png"),
    Kind("a link to an endless device", _link("a/x.png", "/dev/zero"), TWICE),
    Kind("a pipe and a socket named like images", _sockets, TWICE),
    Kind("a folder named like an image", lambda root: write_image(root / "a/x.png/1.png"), TWICE + 1),
    # what is left out
    Kind("hidden folders and files", lambda root: [write_image(root / name) for name in (
        "a/.trash/1.png", "b/.ipynb_checkpoints/1.png", "a/@eaDir/1.png", "__MACOSX/a/1.png", "b/._1.png")], TWICE),
    Kind("texts and archives", lambda root: [(root / name).write_text("text") for name in (
        "a/notes.txt", "b/LICENSE", "a/x.zip", "labels.csv")], TWICE),
    # files
    Kind("wrong suffixes", lambda root: (
        write_image(root / "a/new.jpg", format="PNG"), write_image(root / "b/new.PNG", format="GIF")), TWICE + 2),
    Kind("many formats", lambda root: [write_image(root / f"a/new.{suffix}", "RGB") for suffix in (
        "avif", "jfif", "jp2", "jpe", "tga", "qoi", "bmp", "gif", "webp", "tiff", "ppm")], TWICE + 11),
    Kind("CMYK", lambda root: write_image(root / "a/new.jpg", "CMYK"), TWICE + 1),
    Kind("a palette, alpha, one bit", lambda root: (
        Image.open(root / "a/0.png").convert("P").save(root / "a/p.png"), write_image(root / "a/la.png", "LA"),
        write_image(root / "b/rgba.png", "RGBA"), Image.open(root / "a/0.png").convert("1").save(root / "b/1bit.png")),
        TWICE + 4),
    Kind("16 bits", lambda root: _deep(root, 65535, np.uint16, ".png"), TWICE),
    Kind("12 bits in 16", lambda root: _deep(root, 4095, np.uint16, ".png"), TWICE),
    Kind("16 bits, all of them dark", lambda root: _deep(root, 900, np.uint16, ".png"), TWICE),
    Kind("16 bits, of an unclear range", lambda root: _deep(root, 20, np.uint16, ".png"), refusal="value_range"),
    Kind("floats to 1", lambda root: _deep(root, 1, np.float32, ".tiff"), TWICE),
    Kind("floats to 300", lambda root: _deep(root, 300, np.float32, ".tiff"), refusal="value_range"),
    Kind("an empty file", _write("a/x.png", b""), TWICE, bad=r"a/x\.png"),
    Kind("a text named like an image", _write("a/x.jpg", b"no image"), TWICE, bad=r"a/x\.jpg"),
    Kind("a page named like an image", _write("a/x.png", b"<html><script>1</script>"), TWICE, bad=r"a/x\.png"),
    Kind("a huge image", _write("a/x.png", _png_of(60_000, 60_000)), TWICE, bad=r"a/x\.png"),
    Kind("an image without height", _write("a/x.png", _png_of(8, 0)), TWICE, bad=r"a/x\.png"),
    *(Kind(f"a {kind} that is cut", lambda root, kind=kind, suffix=suffix: _cut(root, kind, suffix), TWICE,
          bad=rf"a/cut\.{suffix}")
      for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tiff"))),
    # names
    Kind("a name that is not UTF-8", lambda root: _named(root, b"caf\xe9.png", b"\xff\xfe.png"), TWICE + 2),
    Kind("line breaks in names", lambda root: _named(root, b"a\nb.png", b"a\rb.png", b"a\r\nb.png"), TWICE + 3),
    Kind("escapes and formulas in names", lambda root: _named(
        root, b"\x1b[2J.png", b"=1+1.png", b"@x.png", b"-rf.png", b"%41.png", b"a,b\"c.png"), TWICE + 6),
    Kind("a class that is not UTF-8", lambda root: write_images(root, os.fsdecode(b"caf\xe9")), 3 * EACH, 3),
    Kind("a class of a line break", lambda root: write_images(root, "c\nd"), 3 * EACH, 3),
)  # fmt: skip


def arguments(folder: Path, *settings: str) -> list[str]:
    chosen = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return [str(write_recipe(folder)), *chosen]


def refused(message: str, pattern: str, status: int) -> str:
    """Return what is wrong with a refusal; "" if nothing is."""
    if status not in (1, 2):
        return f"it must refuse, but ended with status {status}"
    if "Traceback" in message:
        return f"a stack trace: {message[-500:]}"
    last = (message.strip() or "nothing").splitlines()[-1]
    return "" if re.search(pattern, last) else f"its last line does not match {pattern!r}: {last[:400]}"


def fault_of(odd: Kind, folder: Path) -> str:
    """Return what is wrong with how both commands handle a folder; "" if the outcome is correct."""
    given = arguments(folder, *odd.settings)
    with limited(LIMIT_S):
        seen = toolkit("data", *given, "--json")
    with limited(LIMIT_S):
        trained = toolkit("train", *given, "--no-report")
    if odd.refusal:
        return "; ".join(
            f"{command}: {fault}"
            for command, outcome in (("data", seen), ("train", trained))
            if (fault := refused(outcome.stderr, odd.refusal, outcome.status))
        )
    if seen.status:
        return f"data: status {seen.status}: {seen.stderr[-400:]}"
    counts = json.loads(seen.stdout)
    found, unreadable = sum(counts["images"].values()), [each["name"] for each in counts["unreadable"]]
    if (found, len(counts["images_per_class"])) != (odd.images + bool(odd.bad), odd.classes):
        return f"data: {found} images of {len(counts['images_per_class'])} classes, {unreadable} unreadable"
    if odd.bad:
        if len(unreadable) != 1 or not re.search(odd.bad, unreadable[0]):
            return f"data: unreadable are {unreadable}"
        return refused(trained.stderr, odd.bad, trained.status)
    if unreadable:
        return f"data: unreadable are {counts['unreadable']}"
    if trained.status:
        return f"train: status {trained.status}: {trained.stderr[-400:]}"
    run = open_run(trained.stdout.splitlines()[-1])
    splits = tuple(len(run.split[split]) for split in ("train", "validation", "test"))
    if sum(splits) != odd.images or len(run.model_card["classes"]) != odd.classes:
        return f"train: {splits} images of {len(run.model_card['classes'])} classes"
    return "" if odd.splits in (None, splits) else f"train: the splits hold {splits}"


def test_every_odd_folder_is_read_completely_or_refused(tmp_path: Path) -> None:
    faults = []
    began = time.monotonic()
    for number, odd in enumerate(Random(SEED).sample(KINDS, len(KINDS))):
        folder = tmp_path / str(number)
        root = folder / "data"
        root.mkdir(parents=True)
        if odd.plain:
            write_images(root, "a", "b")
        odd.make(root)
        try:
            fault = fault_of(odd, folder)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        faults += [f"seed {SEED}, {odd.name}: {fault}"] if fault else []
    to_refuse = sum(bool(odd.refusal) for odd in KINDS)
    print(
        f"\n{len(KINDS)} odd folders: {to_refuse} to be refused, {sum(bool(odd.bad) for odd in KINDS)} with a bad "
        f"image, {len(faults)} wrong, {time.monotonic() - began:.0f} s"
    )
    assert not faults, "\n".join(faults)


def test_a_folder_without_read_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is simulated, so that root can run this test too."""
    write_images(tmp_path / "data", "a", "b", "b/deep")
    scandir = os.scandir

    def refuse(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder_walk.os, "scandir", refuse)
    for command in ("data", "train"):
        outcome = toolkit(command, *arguments(tmp_path))
        assert not refused(outcome.stderr, "b/deep cannot be read: Permission denied", outcome.status)
