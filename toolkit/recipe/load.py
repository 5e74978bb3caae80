"""Load a recipe from a TOML file: read, inherit, override, validate, check. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from toolkit.recipe.cross_checks import check
from toolkit.recipe.diagnostics import Diagnostic, Issue, RecipeError, dotted
from toolkit.recipe.layers import SET, ConfigLayer, LayeredConfig, parse, parse_overrides, read_chain
from toolkit.recipe.plugin_checks import check_plugins
from toolkit.recipe.resolve import leaves, resolved_content, resolved_toml, with_defaults
from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.validation import MAX_ERRORS, validate

DEFAULT = "default"


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, the origin of each of its values, and warnings."""

    recipe: Recipe
    origins: dict[KeyPath, str]
    """Origin of each key's value in the resolved recipe: ``file:line``, ``--set`` or ``default``."""
    warnings: list[Diagnostic]

    def annotated(self) -> str:
        """Return the resolved recipe as TOML, with the origin of each value as a comment."""
        return resolved_toml(self.recipe, lambda path: self.origins[path])

    def origins_dict(self, file: str | os.PathLike[str]) -> dict[str, Any]:
        """Return the recipe's ``file`` and the origin of each key by dotted name, for the run directory."""
        return {"file": os.fspath(file), "keys": {dotted(path): origin for path, origin in self.origins.items()}}


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, with_plugins: bool = True) -> Recipe:
    """Load a recipe from a TOML file.

    ``overrides`` are ``table.key=value`` with a TOML value; the last one wins. Without ``with_plugins``, the recipe's
    plugins are not checked and need not be loaded. Raises RecipeError with all errors; use :func:`load` to get warnings
    too.
    """
    return resolve(read_sources(path, overrides), os.fspath(path), with_plugins=with_plugins).recipe


def loads_recipe(text: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from TOML text, which must not extend a file. Raises RecipeError."""
    return loads(text, overrides).recipe


def loads(text: str, overrides: Sequence[str] = (), *, name: str = "<text>") -> LoadedRecipe:
    """Like :func:`loads_recipe`, but also return origins and warnings, which call the text ``name``."""
    source = parse(name, text)
    if "extends" in source.data:
        location = source.location(("extends",), at_key=True)
        raise RecipeError([Diagnostic("error", "a recipe given as text cannot extend a file", ("extends",), location)])
    return resolve([source, *parse_overrides(overrides)], source.name)


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Like :func:`load_recipe`, but also return the origins of values and the warnings."""
    return resolve(read_sources(path, overrides), os.fspath(path))


def read_sources(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[ConfigLayer]:
    """Read the files and arguments of a recipe, base first. Raises RecipeError listing all that cannot be read."""
    errors: list[Diagnostic] = []
    files: list[ConfigLayer] = []
    arguments: list[ConfigLayer] = []
    try:
        files = read_chain(path)
    except RecipeError as error:
        errors += error.diagnostics
    try:
        arguments = parse_overrides(overrides)
    except RecipeError as error:
        errors += error.diagnostics
    if errors:
        raise RecipeError(errors)
    return [*files, *arguments]


def resolve(sources: Sequence[ConfigLayer], name: str, *, with_plugins: bool = True) -> LoadedRecipe:
    """Merge all sources, base first, into one recipe; errors without a location are reported for ``name``."""
    merged = LayeredConfig()
    for source in sources:
        merged.add(source)
    result = validate(merged.data)
    issues = list(result.issues)
    if result.recipe is not None:
        found = islice(chain(check(result.recipe), check_plugins(result.recipe) if with_plugins else ()), MAX_ERRORS)
        issues += [issue for issue in found if result.is_valid_at([issue.path, *issue.related])]
    diagnostics = located(issues, merged, name)
    if result.recipe is None or any(item.severity == "error" for item in diagnostics):
        raise RecipeError(diagnostics)
    recipe = with_defaults(result.recipe)
    return LoadedRecipe(recipe, _origins(recipe, merged), diagnostics)


def located(issues: Iterable[Issue], merged: LayeredConfig, name: str) -> list[Diagnostic]:
    """Return the issues with their locations, in the order of files and lines."""
    return sorted((_located(issue, merged, name) for issue in issues), key=_reading_order)


def _located(issue: Issue, merged: LayeredConfig, name: str) -> Diagnostic:
    """Return the issue with the location of its key in the file or argument that set it.

    If the key was not set and its default is invalid, the first related key that was set is shown.
    """
    path = issue.path[:-1] if issue.at == "table" else issue.path
    shown = next((given for given in (path, *issue.related) if merged.has(given)), path)
    source = merged.origin(shown)
    location = source.location(shown, at_key=issue.at != "value") if source else None
    note = source.note if source else None
    file = None if location else name
    return Diagnostic(issue.severity, issue.message, issue.path, location, issue.hint, note, file)


def _reading_order(item: Diagnostic) -> tuple[bool, str, int, int]:
    location = item.location
    return (location is None, location.file, location.line, location.column) if location else (True, "", 0, 0)


def _origins(recipe: Recipe, merged: LayeredConfig) -> dict[KeyPath, str]:
    return {path: _origin(path, merged) for path, _ in leaves(resolved_content(recipe))}


def _origin(path: KeyPath, merged: LayeredConfig) -> str:
    """Return the origin of a value; defaults have no entry in ``merged``."""
    source = merged.origins.get(path)
    if source is None:
        return DEFAULT
    location = source.location(path, at_key=True)
    return SET if source.name == SET or location is None else f"{location.file}:{location.line}"
