"""Indexing tar files without an index by reading their headers, grouped into samples as in WebDataset.

A sample consists of all members with the same path up to the first dot of the file name. One of them is the image;
``.cls`` contains the label as text, and the keys of the JSON object in ``.json`` are columns.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from toolkit.data.encoded_sources import PackedStrings
from toolkit.data.folder_layout import split_of
from toolkit.data.folder_walk import IMAGE_SUFFIXES
from toolkit.data.shard_files import ShardFiles
from toolkit.data.shard_index import ShardIndex
from toolkit.data.table_columns import read_examples
from toolkit.data.table_files import BadRow, RowValues, Table
from toolkit.errors import UserError
from toolkit.filenames import encode_name
from toolkit.hashing import json_hash
from toolkit.recipe.schema import DataConfig


@dataclass
class _Sample:
    values: dict[str, Any] = field(default_factory=dict)
    """Values by column; the value of "image" is SHARD/MEMBER."""
    fault: str = ""
    offset: int = 0
    size: int = 0


def scan(config: DataConfig, files: ShardFiles, versions: Sequence[str]) -> ShardIndex:
    """Build the index of all shards from their headers.

    ``versions``: one string per shard that changes with its content, such as its modification time. Raises UserError.
    """
    shard, offset, size = array("i"), array("q"), array("q")

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, RowValues]]:
        for number in range(len(files.shards)):
            for sample in _samples(files, number):
                missing = [name for name in wanted if name not in sample.values]
                fault = sample.fault or (f"no {missing[0]}" if missing else "")
                shard.append(number)
                offset.append(sample.offset)
                size.append(sample.size)
                where = sample.values.get("image", files.shards[number].name)
                values: RowValues = [sample.values.get(name) for name in wanted]
                yield len(shard), BadRow(f"{where}: {fault}") if fault else values

    first = next(_samples(files, 0), None)
    if first is None:
        raise UserError(f"the shard {files.location(0)} has no files")
    if "split" in first.values and config.columns.split is None:
        config = config.model_copy(update={"columns": config.columns.model_copy(update={"split": "split"})})
    examples = read_examples(Table(Path(config.root_folder), list(first.values), read), config)
    hashes = [int(json_hash([*one])[:15], 16) for one in zip(files.shards, versions, strict=True)]
    where = np.frombuffer(shard, dtype=np.int32)
    return ShardIndex(
        shards=list(files.shards),
        classes=examples.classes,
        shard=where,
        offset=np.frombuffer(offset, dtype=np.int64),
        size=np.frombuffer(size, dtype=np.int64),
        version=np.array(hashes, dtype=np.int64)[where],
        labels=examples.labels,
        names=PackedStrings(encode_name(examples.paths[i]) for i in range(len(examples.paths))),
        lists=examples.lists,
        groups=examples.groups,
        weights=examples.weights,
    )


def _samples(files: ShardFiles, number: int) -> Iterator[_Sample]:
    """Yield the samples of a shard. Raises UserError if it is not a tar file or was truncated."""
    shard, key, sample = files.shards[number], None, _Sample()
    splits = [found for part in re.split(r"[\W_\d]+", shard.name) if (found := split_of(part))]
    try:
        with files.open(number) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all members, to no use here
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                if key not in (None, (folder, stem)):
                    yield sample
                    sample = _Sample()
                key = folder, stem
                if splits:
                    sample.values.setdefault("split", splits[0])
                _add(sample, member, suffix.lower(), tar, shard.name)
            if key is not None:
                yield sample
            if os.pread(file.fileno(), 512, tar.offset) != bytes(512):  # two blocks of zeros end a tar file
                raise UserError(f"the shard {files.location(number)} was truncated: its last bytes are missing")
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"the shard {files.location(number)} cannot be read as an uncompressed tar file: {error}; it may have been "
            "truncated"
        ) from error


def _add(sample: _Sample, member: tarfile.TarInfo, suffix: str, tar: tarfile.TarFile, shard: str) -> None:
    """Add one member of the tar file to its sample."""
    if f".{suffix}" in IMAGE_SUFFIXES:
        if "image" in sample.values:
            sample.fault = "two images in one sample"
        sample.values["image"] = f"{shard}/{member.name}"
        sample.offset, sample.size = member.offset_data, member.size
    elif suffix in ("cls", "json"):
        file: BinaryIO | Any = tar.extractfile(member)
        text = file.read().decode(errors="replace").strip()
        if suffix == "cls":
            sample.values["label"] = text
            return
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, dict):
            sample.values = {**found, **sample.values}
        else:
            sample.fault = f"{member.name} is not a JSON object"
