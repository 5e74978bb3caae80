"""The index of a folder of shards: the position of each image, its label and its split.

It is one safetensors file, ``index.safetensors``, that is memory-mapped: an array is read from disk when it is first
used, and all processes on a machine share its pages. Everything else (class names, sizes and checksums of the shards)
is JSON in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from toolkit.data.encoded_sources import PackedStrings
from toolkit.data.sampling import IntArray
from toolkit.errors import UserError

INDEX_NAME = "index.safetensors"
VERSION = 1

_FACTS = ("classes", "native_size", "native_channels", "is_checked", "image_column")
_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F64": np.float64}


class Shard(NamedTuple):
    """One file: a tar file, or the images of a Parquet file stored end to end."""

    name: str
    size: int
    """Size in bytes."""
    sha256: str = ""
    """SHA-256 checksum in hexadecimal; empty if unknown."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """All images of a folder of shards, in the order of the data set that they were packed from."""

    shards: list[Shard]
    classes: list[str]
    """Class names as they are, not encoded by :func:`toolkit.filenames.encode_name`."""
    shard: npt.NDArray[np.int32]
    """Index into ``shards`` of the shard that contains each image, [N]."""
    offset: IntArray
    """Position of the first byte of each image in its shard, int64 [N]."""
    size: IntArray
    """Number of bytes of each image, int64 [N]."""
    version: IntArray
    """Number that changes if the image changes, int64 [N]: its CRC-32, or a hash of its shard's metadata."""
    labels: npt.NDArray[Any]
    """int64 [N]; multi-label: uint8 [N, classes]."""
    names: PackedStrings
    """Name of each image for messages and predictions, encoded by :func:`toolkit.filenames.encode_name`."""
    lists: dict[str, IntArray]
    """Indices of the images in each official list ("train", "val", "test"), int64."""
    groups: IntArray | None = None
    """Group number of each image, int64 [N]."""
    weights: npt.NDArray[np.float64] | None = None
    kept: Mapping[str, PackedStrings] = field(default_factory=dict)
    """See :class:`toolkit.data.datasets.Dataset`."""
    """Weight of each image in the training loss, [N]."""
    native_size: int | None = None
    """Height and width of all images in pixels; None if they differ."""
    native_channels: int = 3
    is_checked: bool = False
    """Whether the images were checked when the index was written: all are readable and have 8 bits per sample."""
    image_column: str | None = None
    """Image column if the shards are Parquet files, else None."""

    def write(self, path: Path) -> None:
        """Write the file atomically. Raises OSError."""
        buffer, ends = self.names.arrays()
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ("shard", "offset", "size", "version")}
        arrays |= {"labels": self.labels, "names": buffer, "name_ends": ends, "groups": self.groups}
        arrays |= {"weights": self.weights, **{f"list {name}": list_ for name, list_ in self.lists.items()}}
        for name, values in self.kept.items():
            arrays[f"kept {name}"], arrays[f"ends {name}"] = values.arrays()
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
        facts = {name: getattr(self, name) for name in _FACTS}
        facts |= {"version": VERSION, "kept": [*self.kept], "shards": self.shards, "sha256": _digest(arrays)}
        partial = path.with_name(f".{path.name}-{os.getpid()}.tmp")
        partial.write_bytes(safetensors.numpy.save(arrays, metadata={"index": json.dumps(facts)}))
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Map the file into memory and verify its checksum. Raises OSError, and UserError if it is damaged."""
        try:
            arrays, facts = _read(path)
            shards = [Shard(*shard) for shard in facts.pop("shards")]
            is_whole = facts.pop("sha256") == _digest(arrays)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not an index of shards, or was truncated: {error}; copy it again") from None
        if facts.pop("version") != VERSION:
            raise UserError(f"{path} was written by another version of this toolkit; pack the images again")
        if not is_whole:
            raise UserError(f"{path} is damaged: its checksum does not match; copy it again")
        for shard in shards:
            if shard.name != os.path.basename(shard.name) or shard.name.startswith("."):
                raise UserError(f"{path} lists the shard {shard.name!r}, which is not a plain file name")
        arrays["names"] = PackedStrings.from_arrays(arrays.pop("names"), arrays.pop("name_ends"))
        lists = {name[5:]: arrays.pop(name) for name in sorted(arrays) if name.startswith("list ")}
        kept = {
            name: PackedStrings.from_arrays(arrays.pop(f"kept {name}"), arrays.pop(f"ends {name}"))
            for name in facts.pop("kept", [])
        }
        return cls(shards=shards, lists=lists, kept=kept, **arrays, **facts)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of a safetensors file, as read-only memory maps, and the JSON values of its metadata."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is incomplete")
        header = json.loads(file.read(length))
    facts = json.loads(header.pop("__metadata__")["index"])
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length).view(np.ndarray)
    if len(data) != max(entry["data_offsets"][1] for entry in header.values()):
        raise ValueError("its size differs from its header")
    arrays = {
        name: data[slice(*entry["data_offsets"])].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }
    return arrays, facts


def _digest(arrays: dict[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()
