"""The models, transforms, optimizers, datasets and plugins commands: names that a recipe can use.

They do not import torch, unless a plugin does.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson
from toolkit.errors import UserError
from toolkit.plugins import PROVIDED, loaded
from toolkit.similar_names import did_you_mean

Pattern = Annotated[
    str | None, typer.Argument(metavar="PATTERN", help="Part of a name, or a pattern with * and ?; case is ignored.")
]

OwnPlugins = Annotated[bool, typer.Option("--plugins", help="List the loaded plugins of this kind instead.")]


@command
def models(
    pattern: Pattern = None,
    source: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Only models from torchvision, timm or toolkit.")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Also list pretrained weights, default first.")] = False,
    plugins: OwnPlugins = False,
    as_json: AsJson = False,
) -> None:
    """List the models that a recipe can use.

    Example: toolkit models "resnet*" --source torchvision --weights
    """
    if plugins:
        if source or weights:
            raise UserError("--plugins lists models of your own, which have neither --source nor --weights")
        _list_plugins(pattern, ["model"], as_json)
        return
    from toolkit.recipe import catalog

    if source not in (None, "torchvision", "timm", "toolkit"):
        raise UserError(f"--source {source}: expected torchvision, timm or toolkit")
    known = {"toolkit": ["convnet"], **{name: catalog.model_names(name) for name in ("torchvision", "timm")}}
    listed = [(library, name) for library in known if source in (None, library) for name in known[library]]
    names = set(matching(pattern, [name for _, name in listed], "model"))
    found = [
        {"source": library, "name": name, "weights": _weights(library, name)}
        for library, name in listed
        if name in names
    ]
    _show(found, [_model_row(entry, weights) for entry in found], as_json)


def _weights(source: str, model: str) -> list[dict[str, Any]]:
    """Return the pretrained weights of a model, with the input that they expect."""
    from toolkit.recipe import catalog

    found = []
    for name in catalog.weights_names(source, model) if source != "toolkit" else ():
        expected = catalog.weights_input(source, model, name)
        found.append({"name": name, **(expected._asdict() if expected else {})})
    return found


def _model_row(entry: dict[str, Any], weights: bool) -> tuple[str, ...]:
    row = (entry["source"], entry["name"])
    return (*row, ", ".join(each["name"] for each in entry["weights"]) or "none") if weights else row


@command
def transforms(pattern: Pattern = None, plugins: OwnPlugins = False, as_json: AsJson = False) -> None:
    """List the transforms that a recipe can use.

    Shows their arguments and defaults.

    Example: toolkit transforms flip
    """
    if plugins:
        _list_plugins(pattern, ["transform"], as_json)
        return
    from toolkit.recipe import catalog

    known = catalog.transforms()
    names = matching(pattern, known, "transform")
    found = [{"name": name, "arguments": known[name]} for name in names]
    _show(found, [(name, _arguments(known[name])) for name in names], as_json)


def _arguments(arguments: dict[str, dict[str, Any]]) -> str:
    """Format arguments by name, with the defaults of optional ones."""
    return ", ".join(name + _default(info) for name, info in arguments.items())


def _default(info: dict[str, Any]) -> str:
    from toolkit.recipe.toml_writer import toml_value

    value = info.get("default")
    if info["required"] or value is None:
        return " (required)" if info["required"] else ""
    return f" = {toml_value(value)}"


@command
def optimizers(pattern: Pattern = None, plugins: OwnPlugins = False, as_json: AsJson = False) -> None:
    """List the optimizers that a recipe can use.

    "momentum" marks those with a momentum argument.

    Example: toolkit optimizers "*adam*"
    """
    if plugins:
        _list_plugins(pattern, ["optimizer"], as_json)
        return
    from toolkit.recipe import catalog

    known = catalog.optimizers()
    found = [{"name": name, **known[name]} for name in matching(pattern, known, "optimizer")]
    rows = [(entry["name"], "momentum" if entry["momentum"] else "", str(entry["description"])) for entry in found]
    _show(found, rows, as_json)


@command
def datasets(pattern: Pattern = None, plugins: OwnPlugins = False, as_json: AsJson = False) -> None:
    """List the data sets that a recipe can use.

    Shows how each one is obtained. torchvision/NAME means data.dataset = "torchvision" and data.name = NAME; the
    arguments for data.args follow.

    Example: toolkit datasets torchvision/
    """
    if plugins:
        _list_plugins(pattern, ["dataset"], as_json)
        return
    from dataclasses import asdict

    from toolkit.data.dataset_info import DATASETS, info_of
    from toolkit.recipe import catalog

    known = dict(DATASETS) | {f"torchvision/{name}": info_of("torchvision", name) for name in catalog.datasets()}
    names = matching(pattern, known, "data set")
    arguments = {f"torchvision/{name}": found for name, found in catalog.datasets().items()}
    found = [{"name": name, **asdict(known[name])} for name in names]
    for entry in found:
        del entry["opener"], entry["torchvision_class"]
        entry["arguments"] = arguments.get(entry["name"], {})
    rows = [(name, known[name].description, known[name].source, _arguments(arguments.get(name, {}))) for name in names]
    _show(found, rows, as_json)


@command
def plugins(pattern: Pattern = None, as_json: AsJson = False) -> None:
    """List the plugins that are loaded.

    These are the ones of --plugin and of installed packages. Shows kind, name, module, and the arguments for a recipe.

    Example: toolkit plugins --plugin my_net
    """
    _list_plugins(pattern, PROVIDED, as_json)


def _list_plugins(pattern: str | None, kinds: Collection[str], as_json: bool) -> None:
    """Show kind, name, module and arguments of the loaded plugins. Raises UserError if there are none."""
    known = loaded(kinds)
    if not known:
        what = f"{next(iter(kinds))} plugins" if len(kinds) == 1 else "plugins"
        raise UserError(f"no {what} are loaded: name a module with --plugin MODULE")
    shown = set(matching(pattern, [plugin.name for plugin in known], "plugin"))
    chosen = [plugin for plugin in known if plugin.name in shown]
    found = [plugin.record | {"arguments": plugin.arguments} for plugin in chosen]
    rows = [
        (plugin.kind, plugin.name, plugin.record["module"] or "", _arguments(plugin.arguments)) for plugin in chosen
    ]
    _show(found, rows, as_json)


def matching(pattern: str | None, known: Iterable[str], kind: str) -> list[str]:
    """Return the names that contain ``pattern``, or match it if it has * ? or [ ]. Raises UserError if none does."""
    names = list(known)
    if pattern is None:
        return names
    folded = pattern.casefold()
    is_pattern = any(char in pattern for char in "*?[")
    found = [n for n in names if (fnmatchcase(n.casefold(), folded) if is_pattern else folded in n.casefold())]
    if not found:
        raise UserError(f"no {kind} matches {pattern!r}{did_you_mean(pattern, names, 3, prefix='; ')}")
    return found


def _show(found: list[dict[str, Any]], rows: Sequence[tuple[str, ...]], as_json: bool) -> None:
    """Print JSON, or aligned columns without a header, which are easy to parse."""
    if as_json:
        print(json.dumps(found, indent=2))
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
