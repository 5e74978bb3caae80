"""The plan, data, pack and doctor commands, which are used before training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, Overrides, RecipePath, load_recipe, output
from toolkit.errors import EXIT_FAILURE, EXIT_OK, UserError
from toolkit.formatting import plural


@command
def plan(
    recipe: RecipePath,
    processes: Annotated[int, typer.Option(min=1, metavar="N", help="Training processes, one per GPU.")] = 1,
    classes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of classes, if the data set is not on this machine.")
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the resources that a recipe needs.

    Images, steps, parameters, memory and FLOPs, and the training time if this recipe has a finished run. Nothing is
    trained or downloaded.

    Example: toolkit plan recipes/resnet50_caltech.toml --processes 8
    """
    loaded = load_recipe(recipe, set_)
    # torch is imported only here, once the recipe is known to be valid.
    from toolkit.estimate.resources import plan as make_plan
    from toolkit.estimate.resources import plan_text

    found = make_plan(loaded.recipe, processes, classes)
    print(json.dumps(found.to_json(), indent=2) if as_json else plan_text(found))


@command
def data(
    recipe: RecipePath,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FOLDER",
            parser=output,
            help="Folder of the figures. Default: data-report/RECIPE_NAME.",
        ),
    ] = None,
    write_table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=output,
            help="Instead, write the images, labels and splits to a table (.csv, .tsv, .jsonl, .parquet), and print "
            "the [data] table that reads it.",
        ),
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Inspect a recipe's images, or write them to a table.

    Reports counts per class and split, sizes, channel statistics, unreadable files and duplicates across splits, and
    draws a class histogram and a contact sheet with one image per class, raw and normalized.

    Example: toolkit data recipes/resnet50_caltech.toml --out figures
    """
    loaded = load_recipe(recipe, set_)
    if write_table is not None:
        from toolkit.data import table_writer

        if out is not None or as_json:
            raise UserError("--write-table cannot be combined with --out or --json, because it makes no report")
        print(table_writer.write_table(loaded.recipe, write_table), end="")
        return
    from toolkit.data.dataset_plots import draw
    from toolkit.data.dataset_report import analyze_dataset, report_text

    def log(text: str) -> None:
        print(text, file=sys.stderr)

    report = analyze_dataset(loaded.recipe, log)
    folder = out or Path("data-report") / loaded.recipe.recipe.name
    files = draw(report, folder, log)
    if as_json:
        print(json.dumps({**report.to_json(), "figures": [str(file) for file in files]}, indent=2))
    else:
        print(report_text(report))
        for file in files:
            print(file)


@command
def pack(
    recipe: RecipePath,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", parser=output, help="Folder to create; it may exist if it is empty.")
    ],
    shard_size: Annotated[float, typer.Option(min=0.02, metavar="MIB", help="Maximum size of a shard, in MiB.")] = 256,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Pack a recipe's images into shards.

    Shards are tar files in the WebDataset format, with an index. All images of the data set are packed unchanged, with
    labels, official splits, groups and weights. A recipe with data.dataset = "shards" trains on them.

    Example: toolkit pack recipes/resnet50_caltech.toml shards/caltech101
    """
    loaded = load_recipe(recipe, set_)
    from toolkit.data.shard_pack import pack as pack_images

    index = pack_images(loaded.recipe.data, folder, int(shard_size * 2**20), lambda text: print(text, file=sys.stderr))
    images, shards, size = len(index.shard), len(index.shards), sum(shard.size for shard in index.shards)
    if as_json:
        print(json.dumps({"folder": str(folder), "images": images, "shards": shards, "bytes": size}, indent=2))
    else:
        print(f"{images:,} images in {plural(shards, 'shard')}, {size / 2**20:,.1f} MiB, in {folder}")


@command
def doctor(
    run_root: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder that will hold the run directories.")] = Path(
        "runs"
    ),
    as_json: AsJson = False,
) -> int:
    """Check whether this machine is ready for training.

    Checks versions, GPUs and their interconnect, precision, communication, CPUs, shared memory, disk, W&B login, SLURM.

    Example: toolkit doctor --run-root /scratch/runs

    Exit status 1 if any check fails.
    """
    from toolkit.doctor import examine, report_text

    checks = examine(run_root)
    if as_json:
        from dataclasses import asdict

        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print(report_text(checks))
    return EXIT_FAILURE if any(check.state == "fail" for check in checks) else EXIT_OK
