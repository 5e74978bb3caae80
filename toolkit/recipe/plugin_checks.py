"""Checks of the plugins in a recipe: whether they are loaded, and their arguments.

Not part of :mod:`toolkit.recipe.cross_checks`, because a run's recipe can be read without its plugins.
"""

from __future__ import annotations

from collections.abc import Iterator

from toolkit import plugins
from toolkit.recipe.catalog_checks import arguments
from toolkit.recipe.diagnostics import Issue, dotted, error, warning
from toolkit.recipe.schema import Recipe


def check_plugins(recipe: Recipe) -> Iterator[Issue]:
    """Yield the errors and warnings about the plugins in a recipe."""
    for use in plugins.named_plugins(recipe):
        if not plugins.is_loaded(use.kind, use.name):
            hint = plugins.how_to_load(use.kind, use.name)
            yield error(use.key, plugins.unknown(use.kind, use.name), hint=hint)
            continue
        plugin = plugins.find(use.kind, use.name)
        takes = plugin.arguments
        if plugin.takes_any:
            takes = {name: {"kinds": [], "required": False} for name in use.arguments} | takes
        own = [name for name in plugins.PROVIDED[use.kind] if name in use.arguments]
        for name in own:
            text, path = f"{dotted(use.arguments_key)}: {name} cannot be given here", (*use.arguments_key, name)
            yield Issue(text, path, (use.key,), f"the toolkit passes it to {use.name}", at="key")
        given = {name: value for name, value in use.arguments.items() if name not in own}
        yield from arguments(use.name, given, takes, use.arguments_key, use.key)
        if use.kind == "optimizer":
            yield from _optimizer(recipe, plugin)
        elif use.kind == "loss":
            yield from _loss(recipe, plugin)


def _optimizer(recipe: Recipe, plugin: plugins.Plugin) -> Iterator[Issue]:
    """Check that the optimizer accepts the momentum and weight decay that are set."""
    table = recipe.optimizer
    if table.momentum is not None and not plugin.takes("momentum"):
        yield error("optimizer.momentum", f"{plugin.name} takes no momentum", "optimizer.name", hint="remove it")
    if table.weight_decay and not plugin.takes("weight_decay"):
        text = f"{plugin.name} has no argument weight_decay, so it must read it from its parameter groups"
        yield warning("optimizer.weight_decay", text, "optimizer.name")


def _loss(recipe: Recipe, plugin: plugins.Plugin) -> Iterator[Issue]:
    """Check that the loss accepts the class weights and the label smoothing that are set."""
    asked = {"train.class_weights": recipe.train.class_weights != "none"}
    asked["augment.label_smoothing"] = recipe.augment.label_smoothing > 0
    for key, is_set in asked.items():
        name = key.rpartition(".")[2]
        if is_set and not plugin.takes(name):
            text = f"the loss {plugin.name} has no argument {name}"
            yield error(key, text, "train.loss", hint=f"remove it, or add {name} to the loss")
