"""Building the index of shards that have none, from the headers of tar files or all rows of Parquet files.

In tar files, members are grouped into samples as in WebDataset: a sample consists of all members with the same path up
to the first dot of the file name. One of them is the image; ``.cls`` contains the label as text, and the keys of the
JSON object in ``.json`` are columns.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from toolkit.data.encoded_sources import PackedStrings
from toolkit.data.folder_layout import split_of
from toolkit.data.folder_walk import IMAGE_SUFFIXES
from toolkit.data.sampling import IntArray
from toolkit.data.shard_files import ShardFiles
from toolkit.data.shard_index import Shard, ShardIndex
from toolkit.data.table_columns import Examples, choose_columns, read_examples
from toolkit.data.table_files import BadRow, RowValues, Table, open_parquet, read_encoded
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
    examples = read_examples(
        Table(Path(config.root_folder), list(first.values), read), _with_split(config, first.values)
    )
    hashes = [int(json_hash([*one])[:15], 16) for one in zip(files.shards, versions, strict=True)]
    where = np.frombuffer(shard, dtype=np.int32)
    places = where, np.frombuffer(offset, dtype=np.int64), np.frombuffer(size, dtype=np.int64)
    return _index(list(files.shards), examples, places, np.array(hashes, dtype=np.int64)[where])


def scan_parquet(config: DataConfig, files: ShardFiles) -> ShardIndex:
    """Build the index of all Parquet files by reading them. Raises UserError.

    Offsets in the index refer to the copied images of each file, stored end to end (:class:`ParquetShards`).
    """
    copies = list[Shard]()
    shard, size, version, starts = array("i"), array("q"), array("q"), [0]

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, RowValues]]:
        for number, stored in enumerate(files.shards):
            digest, seen = hashlib.sha256(), set[str]()
            for row, (values, image) in enumerate(_parquet_rows(files, number, wanted, column), 1):
                digest.update(image)
                shard.append(number)
                size.append(len(image))
                version.append(zlib.crc32(image))
                path = values[0] if values[0] not in seen else None  # not unique: `datasets` stores only file names
                seen.add(path or "")
                yield starts[-1] + row, [f"{stored.name}/{path or row}", *values[1:]]
            starts.append(len(shard))
            copies.append(Shard(stored.name, sum(size[starts[-2] :]), digest.hexdigest()))

    def describe_row(number: int) -> str:
        at = bisect.bisect_left(starts, number) - 1
        return f"row {number - starts[at]} of {files.shards[at].name}"

    with files.open(0) as file:
        first = open_parquet(files.location(0), file)
    columns = [*first.columns, *(["split"] if _split_in(files.shards[0].name) and "split" not in first.columns else [])]
    config = _with_split(config, columns)
    table = Table(Path(config.root_folder), columns, read, frozenset(), first.class_names, describe_row)
    column = choose_columns(table, config.columns)["image"]
    if column not in first.encoded:
        raise UserError(
            f"the column {column!r} of {files.location(0)} does not contain the bytes of images; select the image "
            'column with data.columns.image. To read paths of image files from one Parquet file, use dataset = "table"'
        )
    examples = read_examples(table, config)
    sizes = np.frombuffer(size, dtype=np.int64)
    ends = np.cumsum(sizes)
    begins = np.concatenate([[0], ends])[starts[:-1]]
    where = np.frombuffer(shard, dtype=np.int32)
    places = where, ends - sizes - begins[where], sizes
    return _index(copies, examples, places, np.frombuffer(version, dtype=np.int64), column)


def _parquet_rows(
    files: ShardFiles, number: int, wanted: Sequence[str], column: str
) -> Iterator[tuple[list[Any], bytes]]:
    """Yield the values and the image of each row of a Parquet shard; b"" if it has no image. Raises UserError."""
    location, split = files.location(number), _split_in(files.shards[number].name)
    with files.open(number) as file, files.open(number) as same:  # twice, because each has its own position
        table = open_parquet(location, file)
        missing = [name for name in wanted if name not in table.columns]
        if missing and (missing != ["split"] or split is None):
            raise UserError(f"the shard {location} has no column {missing[0]!r}, unlike {files.location(0)}")
        stored = [name for name in wanted if name in table.columns]
        places = [stored.index(name) if name in stored else None for name in wanted]
        images = (image or b"" for batch in read_encoded(same, column, location) for image in batch)
        for (_, values), image in zip(table.read(stored), images, strict=True):
            yield [split if place is None else values[place] for place in places], image


def _with_split(config: DataConfig, columns: Iterable[str]) -> DataConfig:
    """Return ``config`` with "split" as the split column, if there is such a column and no other is selected."""
    if "split" not in columns or config.columns.split is not None:
        return config
    return config.model_copy(update={"columns": config.columns.model_copy(update={"split": "split"})})


def _index(
    shards: list[Shard],
    examples: Examples,
    places: tuple[npt.NDArray[np.int32], IntArray, IntArray],
    versions: IntArray,
    image_column: str | None = None,
) -> ShardIndex:
    """Build the index. ``places``: shard, offset and size of each image."""
    return ShardIndex(
        shards=shards,
        classes=examples.classes,
        shard=places[0],
        offset=places[1],
        size=places[2],
        version=versions,
        labels=examples.labels,
        names=PackedStrings(encode_name(examples.paths[i]) for i in range(len(examples.paths))),
        lists=examples.lists,
        groups=examples.groups,
        weights=examples.weights,
        kept=examples.kept,
        image_column=image_column,
    )


def _split_in(name: str) -> str | None:
    """Return the split in the name of a shard, such as train-00000-of-00002.parquet."""
    return next((found for part in re.split(r"[\W_\d]+", name) if (found := split_of(part))), None)


def _samples(files: ShardFiles, number: int) -> Iterator[_Sample]:
    """Yield the samples of a shard. Raises UserError if it is not a tar file or was truncated."""
    shard, key, sample = files.shards[number], None, _Sample()
    split = _split_in(shard.name)
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
                if split:
                    sample.values.setdefault("split", split)
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
