"""Data sets in shards: tar files in the WebDataset format, or Parquet files, in a folder or at a URL."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from toolkit.cache.store import cache_root, content_key, describe_folder
from toolkit.data.datasets import Dataset, encoded_images
from toolkit.data.image_sources import EncodedImages, check_images
from toolkit.data.shard_files import FetchedShards, LocalShards, ParquetShards, ShardFiles, open_url, url_errors
from toolkit.data.shard_index import INDEX_NAME, Shard, ShardIndex
from toolkit.data.shard_scan import scan, scan_parquet
from toolkit.errors import UserError
from toolkit.filenames import encode_name
from toolkit.recipe.schema import DataConfig


@dataclass(frozen=True, eq=False)
class ShardImages:
    """Encoded images in shards; implements :class:`toolkit.data.encoded_sources.EncodedSource`."""

    index: ShardIndex
    files: ShardFiles
    note: str = ""
    """Text appended to the log's line about the data set."""

    @property
    def stored_in(self) -> npt.NDArray[np.int32]:
        """Number of the shard that contains each image, int32 [N]."""
        return self.index.shard

    @property
    def is_checked(self) -> bool:
        """Whether all images were checked when the index was written."""
        return self.index.is_checked

    def __len__(self) -> int:
        return len(self.index.shard)

    def open(self, i: int) -> BinaryIO:
        """Return the bytes of image i as an in-memory file. Raises OSError, and EOFError if the shard is too short."""
        offset, size = int(self.index.offset[i]), int(self.index.size[i])
        data = self.files.read(int(self.index.shard[i]), offset, size)
        if len(data) < size:
            raise EOFError(f"{self.location(i)} ends before this image: it was truncated")
        return io.BytesIO(data)

    def name(self, i: int) -> str:
        """Return the name of image i in the data set that was packed, or SHARD/MEMBER for shards of other programs."""
        return self.index.names[i]

    def location(self, i: int) -> str:
        """Return the path or URL of the shard that contains image i."""
        return encode_name(self.files.location(int(self.index.shard[i])))

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the size in bytes and the version of image i, from the index."""
        return int(self.index.size[i]), int(self.index.version[i])


def open_shards(config: DataConfig) -> Dataset:
    """Open a data set in shards, with the index of `toolkit pack` if there is one. Raises UserError.

    Without it, the shards are read once to build an index, which is kept in the cache folder.
    """
    is_local = "://" not in config.root_folder
    try:
        source = _open_local(config) if is_local else _open_url(config)
    except OSError as error:
        raise UserError(
            f"the shards in {config.root_folder} cannot be used: {error.strerror or error} ({error.filename}); if this "
            "is the cache folder, set TOOLKIT_CACHE to another folder"
        ) from error
    index = source.index
    return Dataset(
        name="shards",
        classes=index.classes,
        images=encoded_images(source, config),
        labels=index.labels,
        lists=index.lists,
        native_size=index.native_size,
        native_channels=index.native_channels,
        notes=(f"{config.root_folder}: {len(source):,} images in {len(index.shards)} shards{source.note}",),
        groups=index.groups,
        weights=index.weights,
        kept=index.kept,
    )


def check_reading_order(dataset: Dataset, config: DataConfig) -> None:
    """Raise UserError if training would download the shards over and over, because they do not all fit on the disk."""
    files = getattr(getattr(dataset.images, "source", None), "files", None)
    if not isinstance(files, FetchedShards):
        return
    sizes = sorted((shard.size for shard in files.shards), reverse=True)
    whole, limit = sum(sizes), files.limit
    needed = whole if config.shuffle_shards is None else min(whole, sum(sizes[: config.shuffle_shards + 2]))
    if needed <= limit:
        return
    if config.shuffle_shards is None:
        advice = "set data.shuffle_shards = 10, so that each batch is drawn from a few shards, or allow more space"
    else:
        advice = (
            f"data.shuffle_shards = {config.shuffle_shards} needs room for two shards more than that: set a smaller "
            "number, or allow more space"
        )
    raise UserError(
        f"the shards at {files.url} have {_gib(whole)}, but only {_gib(limit)} of them may be kept in {files.folder} "
        f"(data.cache_limit; by default half of the free disk space): {advice}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _open_local(config: DataConfig) -> ShardImages:
    root = Path(config.root_folder)
    if not root.is_dir():
        raise UserError(
            f"data.root = {str(root)!r} is not a folder; dataset = 'shards' reads tar or Parquet files from it"
        )
    if (root / INDEX_NAME).exists():
        index = _packed(root / INDEX_NAME, config)
        return ShardImages(index, LocalShards(root, index.shards))
    states = {entry.name: entry.stat() for entry in os.scandir(root)}
    shards = [Shard(name, states[name].st_size) for name in _shard_names(states)]
    versions = [str(states[shard.name].st_mtime_ns) for shard in shards]
    return _scanned(config, LocalShards(root, shards), versions, str(root.resolve()))


def _open_url(config: DataConfig) -> ShardImages:
    url = config.root_folder.rstrip("/")
    folder = _cache_folder(url)
    folder.mkdir(parents=True, exist_ok=True)
    note = ""
    try:
        with url_errors(url):
            filesystem, path = open_url(url)
            kept = _fetch_index(filesystem, f"{path}/{INDEX_NAME}", folder)
            paths = [] if kept else [str(entry["name"]) for entry in filesystem.ls(path, detail=True)]
            by_name = {os.path.basename(path): path for path in paths}
            states = {name: filesystem.info(by_name[name]) for name in _shard_names(by_name)}
    except UserError as error:  # without a network, an index and shards downloaded earlier can still be used
        kept = max(folder.glob("index-*"), key=lambda path: path.stat().st_mtime, default=None)
        if kept is None:
            raise
        note = f"; the index in the cache folder is used, because {error}"
    if kept is not None:
        index = _packed(kept, config)
        describe_folder(folder, {"kind": "shards", "data": url, "images": len(index.shard), "what": "from a URL"})
        return ShardImages(index, FetchedShards(url, index.shards, folder, _limit(config)), note)
    shards = [Shard(name, state["size"]) for name, state in states.items()]
    return _scanned(
        config, FetchedShards(url, shards, folder, _limit(config)), [str(state) for state in states.values()], url
    )


def _shard_names(names: Iterable[str]) -> list[str]:
    """Return the tar files, sorted, or else the Parquet files (img2dataset writes tables next to its tar files)."""
    by_suffix = ([name for name in sorted(names) if name.endswith(suffix)] for suffix in (".tar", ".parquet"))
    return next((found for found in by_suffix if found), [])


def _limit(config: DataConfig) -> int | None:
    return None if config.cache_limit is None else int(config.cache_limit * 2**30)


def _fetch_index(filesystem: Any, path: str, folder: Path) -> Path | None:
    """Return the path of a URL's index in the cache folder, downloading it if needed; None if the URL has no index."""
    if not filesystem.exists(path):
        return None
    # The name depends on all that the file system reports about the file without reading it (size, date, ETag).
    kept = folder / f"index-{content_key({'state': str(filesystem.info(path))})}.safetensors"
    if not kept.exists():
        partial = kept.with_name(f".{kept.name}-{os.getpid()}.tmp")
        filesystem.get_file(path, str(partial))
        ShardIndex.read(partial)
        os.replace(partial, kept)
    return kept


def _cache_folder(root: str) -> Path:
    return cache_root() / f"shards-{content_key({'root': root})}"


def _packed(path: Path, config: DataConfig) -> ShardIndex:
    """Read the index that `toolkit pack` wrote. Raises UserError if the recipe has keys that the index replaces."""
    for key in ("columns", "class_names", "label_separator"):
        if getattr(config, key) != DataConfig.model_fields[key].default:
            raise UserError(
                f"data.{key} has no effect: the index of {config.root_folder} contains classes and labels; remove the "
                "key"
            )
    return ShardIndex.read(path)


def _scanned(config: DataConfig, files: LocalShards | FetchedShards, versions: list[str], root: str) -> ShardImages:
    """Return shards that have no index, which is built once by reading them, and kept in the cache folder.

    The images are checked at the same time, so that later runs do not have to download or read all shards first.
    """
    if not files.shards:
        raise UserError(f"{config.root_folder} contains neither {INDEX_NAME} nor files that end in .tar or .parquet")
    columns, names = config.columns.model_dump(), config.class_names
    if isinstance(names, str):
        with contextlib.suppress(OSError):  # the scan reports it
            names = Path(names).read_text(errors="surrogateescape")
    facts = {"shards": files.shards, "versions": versions, "columns": columns, "names": names}
    folder = _cache_folder(root)
    kept = folder / f"scan-{content_key({**facts, 'separator': config.label_separator})}.safetensors"

    def images(index: ShardIndex) -> ShardImages:
        if index.image_column is None:
            return ShardImages(index, files)
        return ShardImages(index, ParquetShards(files, index.image_column, index.shards, folder, _limit(config)))

    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        is_parquet = files.shards[0].name.endswith(".parquet")
        index = scan_parquet(config, files) if is_parquet else scan(config, files, versions)
        checked = check_images(EncodedImages(images(index), 3), np.arange(len(index.shard)), decode=False)
        if not checked.bad and not checked.extents:  # otherwise each run checks them again
            index = ShardIndex(**{**vars(index), "is_checked": True})
        index.write(kept)
    index = ShardIndex.read(kept)
    describe_folder(folder, {"kind": "shards", "data": root, "images": len(index.shard), "what": "without an index"})
    return images(index)
