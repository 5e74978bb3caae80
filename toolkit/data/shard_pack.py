"""Packing a data set into shards: tar files that WebDataset and timm can read too, and an index."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from PIL import Image

from toolkit.data.array_images import NUMPY
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.encoded_sources import PackedStrings, read_bytes
from toolkit.data.folder_walk import IMAGE_SUFFIXES
from toolkit.data.image_sources import EncodedImages, InMemoryImages, as_image, check_images
from toolkit.data.sampling import IntArray, keyed_permutation
from toolkit.data.shard_index import INDEX_NAME, Shard, ShardIndex
from toolkit.errors import UserError
from toolkit.filenames import decode_name
from toolkit.formatting import plural
from toolkit.locks import acquire
from toolkit.recipe.schema import DataConfig

CHUNK = 256
"""Number of images that threads read ahead, because network file systems are faster with parallel requests."""


def pack(config: DataConfig, folder: Path, shard_size: int, log: Callable[[str], None]) -> ShardIndex:
    """Write all images of a data set to shards of at most ``shard_size`` bytes; a larger image has its own shard.

    The folder gets its name once it is complete; an interrupted call leaves a folder with ".part" in its name, and the
    next call starts over. Image files are copied byte for byte; images of in-memory data sets are written as PNG. Each
    official list ("train", "val", "test") has its own shards and is shuffled before it is packed, so that a few shards
    are a random sample of it. The index keeps the order of the data set, so that training on the shards gives the same
    results.

    Raises UserError if the folder is not empty, or if images cannot be read and ``on_bad_image`` is "error".
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another one, or remove it")
    partial = folder.absolute().with_name(f".{folder.absolute().name}.part")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = acquire(partial.with_name(f"{partial.name}.lock"))
    except Timeout:
        raise UserError(f"another process is packing images into {folder}") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        shutil.rmtree(partial, ignore_errors=True)
        config = config.model_copy(update={"value_range": "auto"})
        dataset = open_dataset(config)
        if isinstance(dataset.images, InMemoryImages):  # without channels = 1, which would convert it to grayscale
            dataset = open_dataset(config.model_copy(update={"channels": None}))
        partial.mkdir()
        index = _write(dataset, config, partial, shard_size, log)
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
    return index


def _write(
    dataset: Dataset, config: DataConfig, folder: Path, shard_size: int, log: Callable[[str], None]
) -> ShardIndex:
    """Write the shards and the index to a folder."""
    kept, is_checked = _readable(dataset, config, log)
    lists = {name: np.searchsorted(kept, list_[np.isin(list_, kept)]) for name, list_ in dataset.lists.items()}
    classes = [decode_name(name) for name in dataset.classes]
    shards: list[Shard] = []
    shard, places = np.zeros(len(kept), dtype=np.int32), np.zeros((3, len(kept)), dtype=np.int64)
    for number, (split, members) in enumerate(lists.items()):
        order = members[keyed_permutation(len(members), number)]
        writer = _ShardWriter(folder, split, shard_size, log)
        for i, data in zip(order.tolist(), _encoded(dataset, kept[order]), strict=True):
            label = _label_file(dataset, classes, int(kept[i]), split)
            at = writer.add(f"{i:09d}", _suffix(dataset.images.name(int(kept[i])), data), data, label)
            shard[i] = len(shards) + len(writer.shards)
            places[:, i] = at, len(data), zlib.crc32(data)
        shards += writer.close()
    index = ShardIndex(
        shards=shards,
        classes=classes,
        shard=shard,
        offset=places[0],
        size=places[1],
        version=places[2],
        labels=dataset.labels[kept],
        names=PackedStrings(dataset.images.name(int(i)) for i in kept),
        lists=lists,
        groups=None if dataset.groups is None else dataset.groups[kept],
        weights=None if dataset.weights is None else dataset.weights[kept],
        kept={name: PackedStrings(values[i] for i in kept.tolist()) for name, values in dataset.kept.items()},
        native_size=dataset.native_size,
        native_channels=dataset.native_channels,
        is_checked=is_checked,
    )
    index.write(folder / INDEX_NAME)
    return index


def _readable(dataset: Dataset, config: DataConfig, log: Callable[[str], None]) -> tuple[IntArray, bool]:
    """Return the readable images of the official lists, and whether the check is valid for every recipe."""
    every = np.unique(np.concatenate(list(dataset.lists.values())))
    if len(every) < sum(map(len, dataset.lists.values())):
        raise ValueError("an image is in two official lists")
    checked = check_images(dataset.images, every, decode=config.on_bad_image == "skip")
    if checked.bad:
        shown = "; ".join(f"{dataset.images.name(i)}: {reason}" for i, reason in checked.bad[:5])
        text = f"{len(checked.bad)} of {plural(len(every), 'image')} cannot be read: {shown}"
        if config.on_bad_image == "error":
            raise UserError(f'{text}. Repair or remove them, or set data.on_bad_image = "skip" to leave them out')
        log(f"left out: {text}")
        every = np.setdiff1d(every, [i for i, _ in checked.bad])
    return every, not checked.extents and config.channels in (None, 1, 3) and config.page == 0


def _encoded(dataset: Dataset, indices: IntArray) -> Iterator[bytes]:
    """Yield the encoded bytes of each image, in the order of ``indices``."""
    images = dataset.images

    def read(i: int) -> bytes:
        if isinstance(images, EncodedImages):
            return read_bytes(images.source, i)
        file = io.BytesIO()
        as_image(images.load(i)).save(file, "PNG")
        return file.getvalue()

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(indices), CHUNK):
            yield from pool.map(read, indices[start : start + CHUNK].tolist())


def _suffix(name: str, data: bytes) -> str:
    """Return the suffix of an image, such as ".jpg", from its name or else from its content."""
    if data.startswith(NUMPY):
        return ".npy"  # an item of a data set of the user's own, whatever its name is
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return suffix
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": ".jpg"}.get(image.format or "", f".{image.format}".lower())


def _label_file(dataset: Dataset, classes: list[str], i: int, split: str) -> tuple[str, bytes]:
    """Return the suffix and content of the label file of image i.

    It is ".cls" with the class as a number, or ".json" if the image has several labels, a group, a weight or kept
    columns.
    """
    label = dataset.labels[i]
    if label.ndim == 0 and dataset.groups is None and dataset.weights is None and not dataset.kept:
        return ".cls", str(label).encode()
    names = classes[label] if label.ndim == 0 else [classes[k] for k in np.flatnonzero(label)]
    values: dict[str, Any] = {decode_name(name): decode_name(column[i]) for name, column in dataset.kept.items()}
    values |= {"label": names, "split": split}
    values |= {} if dataset.groups is None else {"group": int(dataset.groups[i])}
    values |= {} if dataset.weights is None else {"weight": float(dataset.weights[i])}
    return ".json", json.dumps(values).encode()


class _ShardWriter:
    """Writes the shards of one split, with the names that WebDataset and timm expect, such as train-000000.tar."""

    def __init__(self, folder: Path, split: str, shard_size: int, log: Callable[[str], None]) -> None:
        self.folder, self.split, self.shard_size, self.log = folder, split, shard_size, log
        self.shards: list[Shard] = []
        """The completed shards."""
        self._tar: tarfile.TarFile | None = None

    def add(self, key: str, suffix: str, image: bytes, label: tuple[str, bytes]) -> int:
        """Add an image and its label file; return the offset of the image in its shard, in bytes."""
        size = sum(
            tarfile.BLOCKSIZE - (-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for data in (image, label[1])
        )
        if self._tar is not None and self._tar.offset + size + tarfile.RECORDSIZE > self.shard_size:
            self._finish()
        if self._tar is None:
            self._tar = tarfile.open(self._path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        start = self._tar.offset + tarfile.BLOCKSIZE
        for name, data in ((f"{key}{suffix}", image), (f"{key}{label[0]}", label[1])):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile's list of all members, not needed here
        return start

    def close(self) -> list[Shard]:
        """Finish the last shard and return all shards."""
        if self._tar is not None:
            self._finish()
        return self.shards

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):06d}.tar"

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        path = self._path
        with open(path, "rb") as file:
            shard = Shard(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        self.shards.append(shard)
        self.log(f"{shard.name}: {shard.size / 2**20:,.1f} MiB")
