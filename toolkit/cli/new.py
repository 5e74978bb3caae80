"""The new command: a recipe for data, without writing one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, DataSettings, check_output, output
from toolkit.errors import UserError


@command
def new(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Folder of class folders (also in a zip or tar file), table (.csv, .tsv, .jsonl, .parquet), shards, "
            "or the name of a data set, such as digits.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", parser=output, help="Recipe to write. Default: NAME.toml."),
    ] = None,
    goal: Annotated[
        Literal["accuracy", "fast", "small"],
        typer.Option(
            metavar="GOAL", help="What matters most: accuracy, fast (a short training) or small (a small network)."
        ),
    ] = "accuracy",
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Training processes. Default: one for each GPU.")
    ] = None,
    set_: DataSettings = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe for data.

    Looks at a sample of the images and at this machine, chooses splits, input, architecture, transfer mode and
    hyperparameters, says why in one comment line each, and prints the next command.

    Example: toolkit new flowers --goal fast
    """
    from toolkit.new_recipe.source import given_keys
    from toolkit.new_recipe.write import new_recipe
    from toolkit.writing import write_atomically

    given = given_keys(set_ or [])
    if other := [setting for setting in set_ or [] if not setting.strip().startswith("data.")]:
        raise UserError(f"--set {other[0]}: toolkit new takes keys of [data] only; edit the recipe for others")
    found = new_recipe(data, goal, processes, given, lambda line: print(line, file=sys.stderr))
    path = out or Path(f"{found.name}.toml")
    if os.path.lexists(path) and not force:
        raise UserError(f"{path} exists already: choose another file with -o, or overwrite it with --force")
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise UserError(f"{path} {reason}; choose another file with -o")
    check_output(path)
    write_atomically(path, found.text.encode())
    next_command = found.next_command(str(path))
    if as_json:
        choices = [choice._asdict() for choice in found.choices]
        print(json.dumps({"recipe": str(path), "next": next_command, "choices": choices}, indent=2))
    else:
        print(f"wrote {path}\nnext: {next_command}")
