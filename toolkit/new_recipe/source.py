"""Recognizing the argument of `toolkit new`: a folder, an archive, a table, shards, or the name of a data set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.data.dataset_info import DATASETS
from toolkit.data.folder_walk import list_folder
from toolkit.data.shard_index import INDEX_NAME
from toolkit.data.table_files import FORMATS, open_table_file
from toolkit.data.torchvision_info import TORCHVISION_SETS
from toolkit.errors import UserError
from toolkit.new_recipe.guess_columns import guess_columns
from toolkit.recipe.base import NAME_LENGTH
from toolkit.recipe.layers import parse_overrides
from toolkit.recipe.validation import validate
from toolkit.similar_names import did_you_mean

ARCHIVES = (".zip", ".tar")
CALTECH_FOLDER = "101_ObjectCategories"
NEEDS_FILES = ("table", "imagefolder", "shards", "torchvision", "huggingface")
"""Values of data.dataset that need another key to select the data set."""


@dataclass(frozen=True)
class DataSource:
    """The keys of [data] that select a data set."""

    name: str
    """Name for the recipe."""
    keys: dict[str, Any]
    why: str
    """Comment for the recipe that states how the data set was recognized."""
    more: dict[str, str] = field(default_factory=dict)
    """Comments by key, such as ``columns``."""


GIVEN = "given with --set"


def is_data(argument: str) -> bool:
    """Return whether the argument of `toolkit train` is a path to data or the name of a data set, not a recipe."""
    suffix = os.path.splitext(argument)[1].lower()
    if suffix == ".toml":
        return False
    if os.path.exists(argument):
        return os.path.isdir(argument) or suffix in (*FORMATS, *ARCHIVES)
    return argument in DATASETS or argument in TORCHVISION_SETS or "://" in argument


def given_keys(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the keys of [data] among ``--set`` arguments, which say how data are read. Raises RecipeError."""
    found: dict[str, Any] = {}
    for layer in parse_overrides(overrides):
        found = merged(found, layer.data.get("data", {}))
    return found


def find_source(argument: str, given: Mapping[str, Any] | None = None) -> DataSource:
    """Return the data source for the argument; an existing path takes precedence over a name.

    ``given``: keys of [data] that replace those found, or are read besides. Raises UserError.
    """
    if not argument.isprintable():
        raise UserError(f"{argument!r} has control characters or bytes that are not UTF-8, which no recipe can name")
    source = _found(argument, given or {})
    if not given:
        return source
    keys = merged(source.keys, given)
    _check(keys)
    return replace(source, keys=keys, more={**source.more, **dict.fromkeys(given, GIVEN)})


def _check(keys: Mapping[str, Any]) -> None:
    """Raise UserError if the keys of [data] are unknown or their values are wrong."""
    for issue in validate({"data": dict(keys)}).issues:
        if issue.path[0] == "data":  # the other tables of a recipe are missing here
            raise UserError(f"--set: {issue.message}{f'; {issue.hint}' if issue.hint else ''}")


def merged(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with the keys of another, tables within it merged in the same way."""
    return {**base, **{
        key: merged(base[key], value) if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) else value
        for key, value in other.items()
    }}  # fmt: skip


def _found(argument: str, given: Mapping[str, Any]) -> DataSource:
    path = Path(argument)
    if "://" in argument:
        return DataSource(_name(argument), {"dataset": "shards", "root": argument}, f"the shards at {argument}")
    if path.is_dir():
        return _folder(path, given)
    suffix = path.suffix.lower()
    if path.exists() and suffix in FORMATS:
        return _table(path, given)
    if path.exists() and suffix in ARCHIVES:
        why = f"{path.name} holds class folders and is read in place, without unpacking it"
        return DataSource(_name(path.stem), {"dataset": "imagefolder", "root": argument}, why)
    if path.exists():
        raise UserError(
            f"{argument} is neither a folder nor a table ({', '.join(FORMATS)}) nor an archive "
            f"({', '.join(ARCHIVES)}): specify a folder with one folder per class, or a table that lists the images"
        )
    return _named(argument)


def _folder(path: Path, given: Mapping[str, Any]) -> DataSource:
    if (path / "recipe.toml").is_file() or (path / "study.json").is_file():
        raise UserError(f"{path} is a run or study directory, not a folder of images; to resume it: --resume {path}")
    root, name = str(path), _name(path.resolve().name)
    hub = {"dataset": "huggingface", "name": root}
    for folder in (path, path / "caltech101"):
        if (folder / CALTECH_FOLDER).is_dir():
            why = f"{folder / CALTECH_FOLDER} is Caltech-101"
            return DataSource("caltech101", {"dataset": "caltech101", "root": root}, why)
    listing = list_folder(path)
    files = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    if INDEX_NAME in files or any(file.endswith(".tar") for file in files):
        count = sum(file.endswith(".tar") for file in files)
        return DataSource(name, {"dataset": "shards", "root": root}, f"{count} tar files: shards of images")
    if {"dataset_dict.json", "state.json", "dataset_info.json"} & set(files):
        return DataSource(name, hub, "a data set saved by the library `datasets`")
    tables = [file for file in files if Path(file).suffix.lower() in FORMATS]
    parquet = [*path.glob("*.parquet"), *path.glob("data/*.parquet")]
    if len(parquet) > 1:
        return DataSource(name, hub, f"{len(parquet)} Parquet files, read by the library `datasets`")
    if any((path / folder / "metadata.csv").is_file() for folder in listing.folders):
        return DataSource(name, hub, "folders with metadata.csv, read by the library `datasets`")
    holds_images = any(list_folder(path / one).images for one in listing.folders)
    if len(tables) == 1 and (listing.images or len(listing.folders) <= 1):
        return _table(path / tables[0], given)
    if not listing.folders:
        raise UserError(_no_class_folders(path, len(listing.images), tables))
    if len(tables) > 1 and not holds_images:
        raise UserError(f"{path} contains several tables ({', '.join(tables[:5])}): specify the one to train on")
    return DataSource(name, {"dataset": "imagefolder", "root": root}, "")


def _no_class_folders(path: Path, images: int, tables: list[str]) -> str:
    if tables:
        return f"{path} contains several tables ({', '.join(tables[:5])}): specify the one to train on"
    found = f"it holds {images:,} images without labels" if images else "it is empty"
    return (
        f"{path} has no class folders: {found}. Sort the images into {path}/<class>/, or list them with their labels "
        "in a table (.csv) and name that"
    )


def _table(path: Path, given: Mapping[str, Any]) -> DataSource:
    table = open_table_file(path)
    found = guess_columns(table, given.get("columns", {}), given.get("root"))
    keys: dict[str, Any] = {"dataset": "table", "table": str(path)}
    if found.root is not None:
        keys["root"] = found.root
    keys["columns"] = found.columns
    if found.separator is not None:
        keys["label_separator"] = found.separator
    return DataSource(_name(path.stem), keys, f"one row per image in {path.name}", {"columns": found.why})


def _named(argument: str) -> DataSource:
    if argument in DATASETS and argument not in NEEDS_FILES:
        keys = {"dataset": argument} if argument == "digits" else {"dataset": argument, "root": "data"}
        return DataSource(argument, keys, DATASETS[argument].description)
    if argument in TORCHVISION_SETS:
        keys = {"dataset": "torchvision", "name": argument, "root": "data"}
        return DataSource(_name(argument.lower()), keys, TORCHVISION_SETS[argument].description)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", argument):
        return DataSource(_name(argument), {"dataset": "huggingface", "name": argument}, "a data set of the hub")
    names = [*(name for name in DATASETS if name not in NEEDS_FILES), *TORCHVISION_SETS]
    hint = did_you_mean(argument, names, prefix="; ", otherwise="; `toolkit datasets` lists the names")
    raise UserError(f"{argument} is neither a file or folder nor the name of a data set{hint}")


def _name(text: str) -> str:
    """Return a valid recipe name made from a path or the name of a data set."""
    name = re.sub(r"[^\w+=,@-]+", "-", text.replace("://", "-")).strip("-_+=,@")
    return name[:NAME_LENGTH].rstrip("-_+=,@") or "images"
