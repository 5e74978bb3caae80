"""The validate, show, diff and schema commands. They do not import torch, unless a plugin does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, Overrides, RecipePath, chosen_recipe, chosen_run, load_recipe, output
from toolkit.errors import EXIT_BAD_INPUT, EXIT_OK

if TYPE_CHECKING:
    from toolkit.recipe import Diagnostic, Recipe


@command
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", parser=chosen_recipe, help="TOML files, or names of ready-made recipes."),
    ],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Validate recipes and report every error.

    Performs all checks that need neither data nor a GPU. Prints one line per recipe to stdout, errors and warnings to
    stderr; with --json everything to stdout. Exit status 2 if there is any error.

    Example: toolkit validate recipes/*.toml
    """
    results = {path: _diagnose(path, set_ or []) for path in recipes}
    if as_json:
        _print_json([_result_json(path, found) for path, found in results.items()])
    for path, found in results.items() if not as_json else ():
        for item in found:
            print(item, file=sys.stderr)
        print(_result_line(path, found))
    return EXIT_BAD_INPUT if any(_errors(found) for found in results.values()) else EXIT_OK


def _diagnose(path: str, overrides: list[str]) -> list[Diagnostic]:
    """Return all errors and warnings of a recipe, or of all runs of a study."""
    from toolkit.recipe import RecipeError
    from toolkit.recipe.load import read_sources, resolve

    try:
        sources = read_sources(path, overrides)
        if not any("study" in source.data for source in sources):
            return resolve(sources, path).warnings
        from toolkit.study.expand import expand, read_study  # imports NumPy, which a single recipe does not need

        return expand(read_study(path, overrides)).warnings
    except RecipeError as error:
        return error.diagnostics


def _errors(found: list[Diagnostic]) -> int:
    return sum(item.severity == "error" for item in found)


def _result_line(path: str, found: list[Diagnostic]) -> str:
    from toolkit.recipe.diagnostics import printable

    errors = _errors(found)
    counts = {"error": errors, "warning": len(found) - errors}
    listed = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items() if count)
    return printable(f"{path}: {listed if errors else 'ok' + (f' ({listed})' if listed else '')}")


def _result_json(path: str, found: list[Diagnostic]) -> dict[str, Any]:
    return {"recipe": path, "ok": not _errors(found), "diagnostics": [_diagnostic_json(item) for item in found]}


def _diagnostic_json(item: Diagnostic) -> dict[str, Any]:
    from toolkit.recipe.diagnostics import dotted

    location = item.location
    return {
        "severity": item.severity,
        "message": item.message,
        "key": dotted(item.path),
        "file": location.file if location else item.file,
        "line": location.line if location else None,
        "column": location.column if location else None,
        "hint": item.hint,
        "note": item.note,
    }


@command
def show(recipe: RecipePath, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Print a resolved recipe with the origin of each value.

    Shows every key with its value and origin: file and line, --set, or default. Keys of [data] that the recipe leaves
    unset are followed by the values that the pretrained weights or the data set imply.

    Example: toolkit show recipes/resnet50_caltech.toml --set train.epochs=5
    """
    from toolkit.recipe.diagnostics import dotted
    from toolkit.recipe.resolve import leaves, resolved_content

    loaded = load_recipe(recipe, set_)
    known = _known_input(loaded.recipe)
    if as_json:
        values = leaves(resolved_content(loaded.recipe))
        keys = {dotted(path): {"value": value, "origin": loaded.origins[path]} for path, value in values}
        for key, (value, origin) in known.items():
            entry = keys.setdefault(f"data.{key}", {"value": None, "origin": "default"})
            entry["becomes"] = {"value": value, "origin": origin}
        _print_json(keys)
    else:
        print(_with_comments(loaded.annotated(), known), end="")


def _known_input(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """Return the value and origin of each unset key of [data] that the pretrained weights or the data set determine.

    Weights from a file are assumed to expect the same input as the architecture's default weights, as in training.
    """
    from toolkit.data.dataset_info import info_of
    from toolkit.data.preprocessing import resolve_channels, resolve_preprocessing
    from toolkit.recipe.catalog import weights_input
    from toolkit.recipe.image_size import as_value

    model, dataset = recipe.model, info_of(recipe.data.dataset, recipe.data.name)
    is_pretrained, is_file = model.weights != "none", model.weights.startswith(("file:", "package:"))
    expected = None
    if is_pretrained and model.is_published:
        expected = weights_input(model.source, model.name, "DEFAULT" if is_file else model.weights)
        if expected is None:
            return {}
    found = resolve_preprocessing(
        resolve_channels(recipe.data, pretrained=is_pretrained),
        expected,
        dataset.size,
        dataset.channels,
        lambda plain: (plain.mean, plain.std),
    )
    weights = f"from {model.name}'s default weights" if is_file else f"from the weights {model.weights}"
    native = weights if expected else "from the data set"
    usual = weights if expected else "default without pretrained weights"
    known = {
        "image_size": (as_value(found.image_size), native),
        "channels": (found.channels, native),
        "resize": (found.resize or "none", usual),
        "interpolation": (found.interpolation, usual),
        "normalize": ({"mean": list(found.mean), "std": list(found.std)}, usual),
    }
    if found.cover:  # as a recipe value, [height, width] would stretch images
        del known["resize"]
    return {key: value for key, value in known.items() if getattr(recipe.data, key) in (None, "auto")}


def _with_comments(text: str, known: dict[str, tuple[Any, str]]) -> str:
    """Add the values of unset keys to a resolved recipe, as comments at the end of [data]."""
    from toolkit.recipe.toml_writer import toml_value

    end = text.index("\n\n", text.index("\n[data]\n"))
    lines = [f"\n# {key} = {toml_value(value)}  # {origin}" for key, (value, origin) in known.items()]
    return text[:end] + "".join(lines) + text[end:]


@command
def diff(
    first: Annotated[
        Path, typer.Argument(metavar="A", parser=chosen_run, help="Recipe, or run (as for toolkit evaluate).")
    ],
    second: Annotated[
        Path, typer.Argument(metavar="B", parser=chosen_run, help="Recipe, or run (as for toolkit evaluate).")
    ],
    as_json: AsJson = False,
) -> None:
    """Compare two recipes, or two runs.

    Shows every key of the resolved recipes that differs and, if both are finished runs, every metric that differs.

    Example: toolkit diff recipes/colbertaldo_fast.toml recipes/colbertaldo_best.toml
    """
    from toolkit.recipe import diff as recipe_diff
    from toolkit.recipe.diagnostics import dotted

    keys = [(dotted(path), one, two) for path, one, two in recipe_diff(_recipe_of(first), _recipe_of(second))]
    metrics = _metrics_diff(first, second)
    if as_json:
        _print_json(
            {
                name: {key: [one, two] for key, one, two in found}
                for name, found in (("recipe", keys), ("metrics", metrics))
            }
        )
        return
    for line in [_difference(*item) for item in keys] or ["the recipes are equal"]:
        print(line)
    for name, one, two in metrics:
        print(f"metric {name}: {_number(one)} -> {_number(two)}")


def _recipe_of(path: Path) -> Recipe:
    """Load the recipe of a file or of a run directory."""
    from toolkit.recipe import load_recipe
    from toolkit.runs import open_run

    return load_recipe(path, with_plugins=False) if path.is_file() else open_run(path).recipe


def _metrics_diff(first: Path, second: Path) -> list[tuple[str, Any, Any]]:
    """Return the numbers in summary.json that differ; empty unless both are finished runs."""
    from toolkit.recipe.diagnostics import dotted
    from toolkit.recipe.resolve import differences
    from toolkit.runs import Run

    runs = [Run(first), Run(second)]
    if not all(run.path.is_dir() and run.is_finished for run in runs):
        return []
    found = differences(runs[0].summary, runs[1].summary)
    return [(dotted(path), *pair) for path, *pair in found if any(isinstance(value, int | float) for value in pair)]


def _difference(key: str, one: Any, two: Any) -> str:
    from toolkit.recipe.diagnostics import printable
    from toolkit.recipe.toml_writer import toml_value

    shown = [toml_value(value) if value is not None else "(not set)" for value in (one, two)]
    return printable(f"{key}: {shown[0]} -> {shown[1]}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


@command
def schema(
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", parser=output, help="File to write. Default: stdout.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the JSON Schema of recipes, for editors.

    They complete and check recipes by it. It also has the loaded plugins, with their arguments. A recipe names the file
    in its first line: #:schema PATH.

    Example: toolkit schema --plugin my_net -o my.schema.json
    """
    from toolkit.plugins import loaded
    from toolkit.recipe.jsonschema import schema_text
    from toolkit.writing import write_atomically

    text = schema_text(loaded())
    if out is None:
        print(text, end="")
        return
    write_atomically(out, text.encode())
    if as_json:
        _print_json({"file": str(out)})
    else:
        print(f"wrote {out}; the first line of a recipe in the same folder: #:schema {out.name}")
