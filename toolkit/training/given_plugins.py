"""Plugins given to :func:`toolkit.fit` as objects: each is registered, and the recipe that is trained names it."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from toolkit.errors import UserError
from toolkit.plugins import PREFIX, Plugin, add
from toolkit.recipe import Recipe, RecipeError, load_recipe
from toolkit.recipe.cross_checks import check
from toolkit.recipe.diagnostics import Diagnostic
from toolkit.recipe.plugin_checks import check_plugins
from toolkit.recipe.resolve import resolved_content

Object = Callable[..., Any] | nn.Module
"""A factory, or a module, which each call of fit copies."""


_KEYS = {
    "loss": ("train", "loss", "loss_args"),
    "optimizer": ("optimizer", "name", "args"),
    "schedule": ("scheduler", "name", "args"),
}
"""Table of the recipe, and its keys for name and arguments."""


def recipe_with(recipe: Recipe | str | os.PathLike[str], given: dict[str, Any]) -> Recipe:
    """Register objects by kind (see :data:`toolkit.plugins.PROVIDED`) and return the recipe with their names.

    Transforms and metrics are sequences of objects; None: none of a kind. Arguments in the recipe (or its file) are
    kept if it already names the object, and removed otherwise. Raises RecipeError if the result is not a valid recipe.
    """
    for kind, objects in given.items():
        if kind in ("transform", "metric") and not isinstance(objects, list | tuple | None):
            raise UserError(f"fit({kind}s={objects!r}): give a list")
    lists = {kind: one if kind in ("transform", "metric") else [one] for kind, one in given.items() if one is not None}
    has_objects = any(len(objects) for objects in lists.values())
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, with_plugins=not has_objects)
    if not has_objects:
        return recipe
    content = resolved_content(recipe)
    for kind, objects in lists.items():
        for one in objects:
            _name(content, kind, _registered(kind, one))
    named = Recipe.model_validate(content)
    issues = [issue for issue in (*check(named), *check_plugins(named)) if issue.severity == "error"]
    if issues:
        raise RecipeError([Diagnostic("error", issue.message, issue.path, hint=issue.hint) for issue in issues])
    return named


def as_factory(given: Object) -> Callable[..., Any]:
    """Return the factory; for a module, one that copies it."""
    return functools.partial(copy.deepcopy, given) if isinstance(given, nn.Module) else given


def _registered(kind: str, given: Any) -> Plugin:
    """Register a factory under its own name; a data set or a dictionary of them, under that of its class."""
    named = given.func if isinstance(given, functools.partial) else given
    name = getattr(named, "__name__", type(named).__name__)
    if not name.isidentifier():
        raise UserError(f"fit({kind}={name}): give a function or class with a name, or register it under one")
    is_value = kind == "dataset" and not callable(given)
    if not is_value and not callable(given):
        raise UserError(f"fit({kind}={given!r}): give a function or class; built-in names belong in the recipe")
    code = next(iter(given.values()), None) if is_value and isinstance(given, dict) else given
    plugin = Plugin(kind, name, (lambda: given) if is_value else as_factory(given), code=code)
    add(plugin, replace=True)
    return plugin


def _name(content: dict[str, Any], kind: str, plugin: Plugin) -> None:
    """Change a recipe's content so that it names the plugin."""
    full_name = PREFIX + plugin.name
    if kind in ("model", "dataset"):
        table, key = (content["model"], "source") if kind == "model" else (content["data"], "dataset")
        if (table[key], table.get("name")) != ("plugin", plugin.name):
            table |= {key: "plugin", "name": plugin.name, "args": {}}
            table.pop("convnet", None)
    elif kind == "metric":
        content["train"]["metrics"] = list(dict.fromkeys([*content["train"]["metrics"], full_name]))
    elif kind == "transform":
        if full_name not in [entry["name"] for entry in content["augment"]["train"]]:
            content["augment"]["train"].append({"name": full_name})
    else:
        at, name, arguments = _KEYS[kind]
        table = content[at]
        if table[name] != full_name:
            table |= {name: full_name, arguments: {}}
            if kind == "optimizer" and not plugin.takes("momentum"):
                table.pop("momentum", None)  # of another optimizer
