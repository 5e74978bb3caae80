"""The sweep command: a study as a W&B sweep."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, Overrides, output
from toolkit.cli.study import StudyPath
from toolkit.errors import UserError


@command
def sweep(
    study: StudyPath,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FILE", parser=output, help="Configuration to write; the recipe gets its name."
        ),
    ] = Path("sweep.yaml"),
    set_: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes of each run. Default: study.gpus_per_run.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a study as a W&B sweep, for W&B's own search.

    Writes the sweep's configuration and the recipe of its runs, and prints the next commands.

    Example: toolkit sweep recipes/studies/digits_dropout.toml -o sweep.yaml
    """
    import yaml

    from toolkit.study.expand import read_study
    from toolkit.study.wandb_sweep import sweep_config, sweep_recipe
    from toolkit.writing import write_atomically

    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"-o {out}: the configuration of a sweep is a YAML file; choose a name such as sweep.yaml")
    recipe = out.with_suffix(".toml")
    found = read_study(study, set_ or [])
    config = sweep_config(found, str(recipe), processes)
    for path in (out, recipe):
        if os.path.lexists(path) and not force:
            raise UserError(f"{path} exists already: choose another file with -o, or overwrite it with --force")
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.parent}; choose another file with -o")
    write_atomically(recipe, sweep_recipe(found).encode())
    write_atomically(out, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
    next_command = f"wandb sweep {shlex.quote(str(out))}"
    if as_json:
        print(json.dumps({"sweep": str(out), "recipe": str(recipe), "next": next_command}, indent=2))
    else:
        print(f"wrote {out} and {recipe}")
        print(f"next: {next_command}, which prints the command that starts an agent in this folder")
