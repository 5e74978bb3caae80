"""Data sets listed in a table: image paths, or the images themselves in a Parquet file, with their labels."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.cache.store import (
    CacheEntry,
    CacheEntryWriter,
    CorruptCacheEntry,
    cache_root,
    content_key,
    find_entry,
    remove_entry,
    remove_leftovers,
    verify,
)
from toolkit.data.datasets import Dataset, encoded_images
from toolkit.data.encoded_sources import EncodedSource, ImageFiles, PackedImages, PackedStrings
from toolkit.data.table_columns import Examples, RowFaults, describe_columns, describe_encoding, read_examples
from toolkit.data.table_files import Table, open_table_file, read_encoded
from toolkit.errors import UserError
from toolkit.formatting import plural
from toolkit.locks import held
from toolkit.recipe.schema import DataConfig

FORMAT = 1
"""Format version of the copied images in the cache folder."""


@dataclass(frozen=True)
class RowNumbers:
    """Table row of each image, for messages."""

    table: str
    rows: npt.NDArray[np.int64]

    def __call__(self, i: int) -> str:
        """Return, for example, "row 7 of labels.csv"."""
        return f"row {self.rows[i]} of {self.table}"


def open_table(config: DataConfig) -> Dataset:
    """Open a table of labeled images. Raises UserError, which lists all invalid rows together."""
    table = open_table_file(Path(config.table or ""))
    examples = read_examples(table, config)
    source = _embedded_images(table, examples) or ImageFiles(Path(config.root_folder), examples.paths)
    images = encoded_images(source, config, RowNumbers(table.path.name, examples.rows))
    return Dataset(
        name="table",
        classes=examples.classes,
        images=images,
        labels=examples.labels,
        lists=examples.lists,
        native_size=None,
        native_channels=3,
        notes=(
            *describe_columns(table, config.columns),
            *describe_encoding(table, examples),
            *_divided_groups(examples),
        ),
        groups=examples.groups,
        weights=examples.weights,
        kept=examples.kept,
    )


def _divided_groups(examples: Examples) -> list[str]:
    """Return notes for the log about groups with images in more than one split of the table."""
    notes = list[str]()
    if examples.groups is None:
        return notes
    for one, other in combinations(examples.lists, 2):
        both = np.intersect1d(examples.groups[examples.lists[one]], examples.groups[examples.lists[other]])
        if len(both):
            notes.append(f"{plural(len(both), 'group')} of the table in both {one} and {other}")
    return notes


def _embedded_images(table: Table, examples: Examples) -> EncodedSource | None:
    """Return the images stored in the table's image column; None if it contains only paths."""
    if examples.encoded is None:
        return None
    entry = _copied_images(table, examples.encoded)
    sizes = entry.tables["sizes"]
    faults = RowFaults(table)
    if (sizes < 0).all():
        for other, first in examples.repeated:
            faults.add(int(examples.rows[other]), f"{examples.paths[other]} is also in row {examples.rows[first]}")
        faults.check()
        return None
    for i in np.flatnonzero(sizes < 0):
        faults.add(int(examples.rows[i]), f"no image in column {examples.encoded!r}")
    faults.check()
    paths = examples.paths
    if examples.repeated or not all(paths[i] for i in range(len(paths))):  # `datasets` stores only file names
        paths = PackedStrings(f"{table.path.name}/{row}" for row in examples.rows)
    return PackedImages(entry.data(), np.cumsum(sizes), paths, entry.tables["digests"], location=str(table.path))


def _copied_images(table: Table, column: str) -> CacheEntry:
    """Copy the images of a column to the cache folder, unless they are there, and return the cache entry.

    Parquet compresses many rows together, so that reading one image from it means reading hundreds.
    """
    state, root = os.stat(table.path), cache_root()
    facts = {"table": str(table.path.resolve()), "size": state.st_size, "time": state.st_mtime_ns, "column": column}
    name = f"encoded-{content_key({**facts, 'format': FORMAT})}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with held(root / f"{name}.lock"):
            try:
                entry = find_entry(root, name)
                if entry is not None:
                    for _ in verify(entry):
                        pass
                    return entry
            except CorruptCacheEntry:
                remove_entry(root / name)
            remove_leftovers(root, name)
            return _copy_images(table, column, CacheEntryWriter(root, name))
    except OSError as error:
        raise UserError(
            f"the images of {table.path} could not be copied to the cache folder {root}: {error.strerror or error}; "
            "set TOOLKIT_CACHE to another folder"
        ) from error


def _copy_images(table: Table, column: str, writer: CacheEntryWriter) -> CacheEntry:
    """Write the images of a column to a new cache entry.

    It contains their bytes, "sizes" in bytes (int64 [N], -1 for a missing image), and "digests", hashes of the bytes
    (int64 [N]).
    """
    sizes: list[int] = []
    digests: list[bytes] = []
    blocks: list[Any] = []
    try:
        for images in read_encoded(table.path, column):
            sizes += [-1 if image is None else len(image) for image in images]
            digests += [hashlib.blake2b(image or b"", digest_size=8).digest() for image in images]
            blocks.append(writer.add(np.frombuffer(b"".join(image or b"" for image in images), dtype=np.uint8)))
        facts = {"kind": "encoded", "data": table.path.name, "images": len(sizes), "what": f"column {column}"}
        tables = {"sizes": np.array(sizes, dtype=np.int64), "digests": np.frombuffer(b"".join(digests), dtype=np.int64)}
        return writer.publish(facts, tables, blocks)
    finally:
        writer.discard()
