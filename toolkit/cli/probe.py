"""The probe command: comparison of pretrained backbones on data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, DataSettings, output
from toolkit.errors import UserError


@command
def probe(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Folder of class folders, archive, table, shards or name of a data set, as for toolkit new; or a "
            "recipe, whose data set and splits are used.",
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            metavar="PATTERN",
            help="Backbone: NAME, NAME.WEIGHTS or a pattern with * and ? of timm or torchvision (timm/resnet*), or "
            "NAME=WEIGHTS with weights as in a recipe (file:PATH). May be repeated. Default: ten of timm.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FOLDER", parser=output, help="Default: probe/NAME."),
    ] = None,
    set_: DataSettings = None,
    as_json: AsJson = False,
) -> None:
    """Compare pretrained backbones on data.

    Computes each backbone's features once, trains k-nearest-neighbor, logistic regression and linear heads on them,
    chooses one by validation, and tests it. Writes a table, a report page, and the recipe of the first row.

    Example: toolkit probe flowers --models resnet50 --models "vit_small*"
    """
    from toolkit.new_recipe.source import given_keys
    from toolkit.probe.backbones import find_backbones
    from toolkit.probe.recipes import probed_data

    if other := [setting for setting in set_ or [] if not setting.strip().startswith("data.")]:
        raise UserError(f"--set {other[0]}: toolkit probe takes keys of [data] only")

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    backbones = find_backbones(models or ())
    found = probed_data(data, given_keys(set_ or []), log)
    from toolkit.probe.compare import compare
    from toolkit.probe.results import results_text, write_results

    rows = compare(found, backbones, log)
    files = write_results(out or Path("probe") / found.name, found, rows)
    if as_json:
        print(
            json.dumps({"backbones": [row.to_json() for row in rows], "files": [str(file) for file in files]}, indent=2)
        )
        return
    print(results_text(rows))
    for file in files:
        print(file)
    print(f"next: toolkit train {files[1]}")
