"""The find-lr command: a learning-rate range test of a recipe."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, Overrides, RecipePath, load_recipe, output
from toolkit.errors import UserError
from toolkit.plugins import modules


@command
def find_lr(
    recipe: RecipePath,
    steps: Annotated[int, typer.Option(min=20, metavar="N", help="Maximum number of optimizer steps.")] = 100,
    min_lr: Annotated[float, typer.Option(metavar="LR", help="Learning rate of the first step.")] = 1e-7,
    max_lr: Annotated[float, typer.Option(metavar="LR", help="Learning rate of the last step.")] = 10.0,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FOLDER", parser=output, help="Folder for the figure and the table."),
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Suggest a learning rate by a range test.

    Trains for some steps while the learning rate rises exponentially, until the loss diverges. The learning rates of
    all layer groups rise together. Works on any number of processes; no run directory is written.

    Example: toolkit find-lr recipes/quickstart.toml
    """
    loaded = load_recipe(recipe, set_)
    if loaded.recipe.study is not None:
        raise UserError(f"{recipe} is a study of many runs: specify the recipe that it extends")
    if (transfer := loaded.recipe.transfer).is_fitted:
        raise UserError(f'transfer.mode = "{transfer.mode}" has no learning rate: the layer is fitted once')
    from toolkit import lr_finder

    result, is_main = lr_finder.find_lr(loaded.recipe, steps=steps, min_lr=min_lr, max_lr=max_lr)
    if not is_main:  # the result is the same on all processes
        return
    folder = out or Path("lr-finder") / loaded.recipe.recipe.name
    files = lr_finder.write_range_test(result, loaded.recipe, folder, lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps({**result.to_json(), "files": [str(file) for file in files]}, indent=2))
    else:
        options = [*(("--plugin", name) for name in modules()), *(("--set", text) for text in set_ or ())]
        command = shlex.join(["toolkit", "train", str(recipe), *itertools.chain(*options)])
        print(lr_finder.range_test_text(result, loaded.recipe, command))
        for file in files:
            print(file)
