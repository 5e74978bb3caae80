"""Arguments and options shared by several commands."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.error_handling import is_first_process
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.recipe.load import LoadedRecipe


def chosen_run(text: str) -> Path:
    """Resolve an argument to a run directory; print the result to stderr if it differs from the argument."""
    from toolkit.runs import newest_run  # imports pydantic, which would slow down `toolkit --help`

    path = newest_run(text)
    if path != Path(text) and is_first_process():
        print(f"run {path}", file=sys.stderr)
    return path


def chosen_recipe(text: str) -> str:
    """Return ``text`` or, if it is the name of a ready-made recipe, its file, whose path is printed to stderr."""
    from toolkit.ready_recipes import RECIPES, find_recipe

    if text.endswith(".toml") or os.path.lexists(text) or (name := find_recipe(text)) is None:
        return text
    path = str(RECIPES / f"{name}.toml")
    if is_first_process():
        print(f"recipe {path}", file=sys.stderr)
    return path


def output(text: str) -> Path:
    """Return the path of a file or folder to write, checked before a command computes what belongs there."""
    try:
        check_output(Path(text))
    except UserError as error:
        raise typer.BadParameter(str(error)) from None
    return Path(text)


def check_output(path: Path) -> None:
    """Raise UserError unless a file can be created in the folder of ``path`` or in the nearest existing one above it.

    Permissions do not tell: root has them on read-only mounts, too.
    """
    try:
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another path") from None


def load_recipe(path: str, overrides: list[str] | None, *, text: str | None = None) -> LoadedRecipe:
    """Load a recipe with the values of ``--set``; print its warnings. ``text``: its content, instead of the file's."""
    from toolkit.recipe import load, loads  # imports pydantic, which would slow down `toolkit --help`

    loaded = load(path, overrides or []) if text is None else loads(text, overrides or [], name=path)
    if is_first_process():
        for warning in loaded.warnings:
            print(warning, file=sys.stderr)
    return loaded


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Override a key; the value is TOML, so strings need quotes. Or a JSON object of keys and values.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
RECIPE_HELP = "TOML file, or the name of a ready-made recipe (toolkit recipes)."
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", parser=chosen_recipe, help=RECIPE_HELP)]
RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        parser=chosen_run,
        help="Run directory, a recipe's folder (runs/quickstart: its newest run), or latest.",
    ),
]
ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        parser=chosen_run,
        help="Run directory, a recipe's folder (runs/quickstart: its newest run), or latest; "
        "or a folder written by toolkit export --format safetensors.",
    ),
]
RunOrStudyPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|STUDY",
        parser=chosen_run,
        help="Run directory, a recipe's folder for its newest run, latest, or a study's folder.",
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder of the images, if they are no longer in the recipe's data.root."),
]
ImagePaths = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH", help="Images, folders, @LIST (a text file with one path per line), - for stdin."),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Batch size per process. Default: the run's own, or 64.")
]
Workers = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Data loader workers. Default: the available CPUs minus one.")
]
DataSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="DATA.KEY=VALUE", help="Set a key of [data], such as data.root; the value is TOML."),
]
Tta = Annotated[
    list[str] | None,
    typer.Option(
        "--tta",
        metavar="VIEWS",
        help="Test-time augmentation: flip, five_crop, translate or scales=1,1.15; several are combined. Or none. "
        "Default: what is stored in model.json.",
    ),
]
