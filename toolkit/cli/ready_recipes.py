"""The recipes command: list, show and copy the recipes in the package. Does not import torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from toolkit import ready_recipes
from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, output
from toolkit.errors import UserError


@command
def recipes(
    action: Annotated[
        Literal["list", "show", "copy"], typer.Argument(metavar="ACTION", help="list, show or copy.")
    ] = "list",
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            autocompletion=ready_recipes.completions,
            help="Name of a recipe or launch configuration in the list.",
        ),
    ] = None,
    destination: Annotated[
        Path | None,
        typer.Argument(
            metavar="DEST", parser=output, help="With copy: a folder (default: recipes), or a new .toml file."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With copy: replace files whose content differs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List, show or copy the ready-made recipes in the package.

    The recipes that a recipe extends are copied with it. Commands that take a recipe file also accept the name of a
    ready-made recipe. Launch configurations are copied by name: toolkit recipes copy launch/cpu.yaml

    Example: toolkit recipes copy quickstart
    """
    if action != "copy" and (destination is not None or overwrite):
        raise UserError("DEST and --overwrite are only possible with toolkit recipes copy NAME [DEST]")
    if action == "list":
        if name is not None:
            raise UserError(f"toolkit recipes list does not take a name; toolkit recipes show {name} prints a recipe")
        _list(as_json)
        return
    if name is None:
        raise UserError(f"toolkit recipes {action} needs the name of a recipe; toolkit recipes lists them")
    if action == "show":
        _show(name, as_json)
    else:
        _copy(name, destination, overwrite, as_json)


def _list(as_json: bool) -> None:
    found, launch = ready_recipes.list_recipes(), ready_recipes.launch_files()
    if as_json:
        print(json.dumps({"recipes": [asdict(one) for one in found], "launch": launch}, indent=2))
        return
    width = max(len(one.name) for one in found)
    for one in found:
        print(f"{one.name:<{width}}  {one.kind:<6}  {one.description}")
    for file in launch:
        print(f"{file:<{width}}  launch  accelerate launch --config_file {file} ...")


def _show(name: str, as_json: bool) -> None:
    path = ready_recipes.FILES / name if name in ready_recipes.launch_files() else ready_recipes.recipe_path(name)
    text = path.read_text(encoding="utf-8")
    print(json.dumps({"file": str(path), "text": text}, indent=2) if as_json else text, end="\n" if as_json else "")


def _copy(name: str, destination: Path | None, overwrite: bool, as_json: bool) -> None:
    files = ready_recipes.copy_files(name, destination, overwrite=overwrite)
    if as_json:
        print(json.dumps([str(file) for file in files], indent=2))
        return
    for file in files:
        print(file)
    if files[0].suffix == ".toml":
        kind = "study" if ready_recipes.describe(ready_recipes.recipe_path(name)).kind == "study" else "train"
        print(f"next: toolkit {kind} {files[0]}", file=sys.stderr)
