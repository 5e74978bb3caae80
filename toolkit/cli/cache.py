"""The cache command: list and delete cached images and features. Does not import torch."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Literal

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson
from toolkit.errors import UserError


@command
def cache(
    action: Annotated[Literal["list", "clean"], typer.Argument(metavar="ACTION", help="list or clean.")] = "list",
    unused_days: Annotated[
        float, typer.Option(min=0, metavar="DAYS", help="With clean: only entries unused for this many days.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """List or delete the entries of the cache folder.

    Entries are decoded images and features of frozen layers, listed with their size and last use. Deleting them does
    not affect runs that are reading them; later runs compute them again. The folder is TOOLKIT_CACHE, or
    ~/.cache/toolkit by default.

    Example: toolkit cache clean --unused-days 30
    """
    if action == "clean":
        _clean(unused_days, as_json)
    elif unused_days:
        raise UserError("--unused-days is only for toolkit cache clean")
    else:
        _list(as_json)


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _list(as_json: bool) -> None:
    from dataclasses import asdict

    from toolkit.cache.store import cache_root, list_entries
    from toolkit.training.console import table

    root = cache_root()
    found = list_entries(root)
    if as_json:
        print(json.dumps({"folder": str(root), "entries": [asdict(one) for one in found]}, indent=2))
        return
    if found:
        rows = [
            (_size(one.bytes), _local_time(one.used), one.kind, one.data, f"{one.images:,}", one.what) for one in found
        ]
        print(table(rows, ("size", "last used", "kind", "data", "images", "what"), frozenset((0, 4))))
    print(f"{_entries(len(found))}, {_size(sum(one.bytes for one in found))} in {root}")


def _clean(unused_days: float, as_json: bool) -> None:
    from toolkit.cache.store import cache_root, clean

    root = cache_root()
    try:
        count, freed = clean(root, unused_days * 86400)
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be removed: {error.strerror or error}") from None
    if as_json:
        print(json.dumps({"folder": str(root), "entries": count, "bytes": freed}))
    else:
        print(f"removed {_entries(count)}, {_size(freed)}, from {root}")


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _local_time(seconds: float) -> str:
    """Format a timestamp as local time, to the minute."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
