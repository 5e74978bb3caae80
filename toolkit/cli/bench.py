"""The bench command: training throughput of a recipe on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, Overrides, RecipePath, load_recipe, output
from toolkit.errors import UserError


@command
def bench(
    recipe: RecipePath,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps per repetition, at most one epoch.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Repetitions; the median is reported.")] = 5,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also measure a plain PyTorch loop on the same recipe.")
    ] = False,
    peak_tflops: Annotated[
        float | None,
        typer.Option(metavar="TFLOPS", help="Peak performance of the device, if the toolkit does not know it."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", parser=output, help="Also write the results to this JSON file."),
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Benchmark data loading, the model and whole training steps.

    Reports images per second, the fraction of time spent waiting for data, memory and FLOPs. No run is written.

    Example: toolkit bench recipes/resnet18_caltech.toml --compare
    """
    loaded = load_recipe(recipe, set_)
    if compare and loaded.recipe.task.kind == "multi_label":
        raise UserError('--compare: the plain loop trains with task.kind = "single_label" only')
    from toolkit import bench as module

    speeds = module.bench(loaded.recipe, steps=steps, repeats=repeats, peak_tflops=peak_tflops)
    if not module.is_main_process():  # the results are the same on all ranks
        return
    plain = module.compare_with_plain_loop(recipe, set_ or [], speeds.steps, repeats) if compare else None
    content = {**speeds.to_json(), **({"plain_loop": plain} if plain else {})}
    if out is not None:
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=2) if as_json else module.bench_text(speeds, plain))
