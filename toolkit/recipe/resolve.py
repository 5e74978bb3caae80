"""Resolved recipes: complete text, hash and differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from toolkit.hashing import json_hash
from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_document

MOMENTUM = 0.9
"""Default momentum of sgd and nag."""

GAMMA = {"step": 0.1, "multi_step": 0.1, "exponential": 0.95, "plateau": 0.1}
"""Default decay factors of the schedules that have one."""

DECAY_FRACTION = {"flat_cosine": 0.25, "wsd": 0.2}
"""Default decay_fraction of the schedules that have one."""

NOT_HASHED = (
    "slurm", "study", "tracking", "checkpoint", "expected_metrics", "recipe.description", "recipe.run_root",
    "expect",  # the name of expected_metrics in earlier versions
)  # fmt: skip
"""Tables and keys that do not affect the result of a run and are excluded from the hash."""

HEADER = """\
# Resolved recipe: all keys with their values, including defaults. Keys that are missing here are not set.
# This file is complete: it does not extend another recipe, and can be trained as it is.

"""


def with_defaults(recipe: Recipe) -> Recipe:
    """Return the recipe with defaults that depend on other keys filled in."""
    optimizer, scheduler = recipe.optimizer, recipe.scheduler
    if optimizer.momentum is None and optimizer.name in ("sgd", "nag"):
        optimizer = optimizer.model_copy(update={"momentum": MOMENTUM})
    if scheduler.gamma is None and scheduler.name in GAMMA:
        scheduler = scheduler.model_copy(update={"gamma": GAMMA[scheduler.name]})
    if scheduler.decay_fraction is None and scheduler.name in DECAY_FRACTION:
        scheduler = scheduler.model_copy(update={"decay_fraction": DECAY_FRACTION[scheduler.name]})
    data = recipe.data
    if data.split.seed == "recipe.seed":
        split = data.split.model_copy(update={"seed": recipe.recipe.seed})
        data = data.model_copy(update={"split": split})
    return recipe.model_copy(update={"data": data, "optimizer": optimizer, "scheduler": scheduler})


def is_resolved(text: str) -> bool:
    """Return whether a recipe's text was written by :func:`resolved_toml`."""
    return text.startswith("# Resolved recipe:")  # the rest of the comment differs between versions


def resolved_content(recipe: Recipe) -> dict[str, Any]:
    """Return all tables and keys as plain values, in schema order; keys that are not set are omitted."""
    return recipe.model_dump(exclude_none=True)


def resolved_toml(recipe: Recipe, comment: Callable[[KeyPath], str | None] = lambda path: None) -> str:
    """Return the complete recipe as TOML; reading it gives an equal Recipe. ``comment`` returns a key's comment."""
    return HEADER + toml_document(resolved_content(recipe), comment)


def recipe_hash(recipe: Recipe) -> str:
    """Return the SHA-256 of the resolved content (64 hexadecimal digits), independent of the order of keys.

    Keys in :data:`NOT_HASHED` are excluded.
    """
    return content_hash(resolved_content(recipe))


def content_hash(content: dict[str, Any]) -> str:
    """Return the hash of the content of a resolved recipe file, which has the keys of the version that wrote it."""
    counted = {table: value for table, value in content.items() if table not in NOT_HASHED}
    counted["recipe"] = {key: value for key, value in counted["recipe"].items() if f"recipe.{key}" not in NOT_HASHED}
    return json_hash(counted)


def experiment_diff(first: Recipe, second: Recipe) -> list[tuple[KeyPath, Any, Any]]:
    """Return the differences (see :func:`diff`) that affect the result: without the keys in :data:`NOT_HASHED`."""
    return [
        change
        for change in diff(first, second)
        if not {str(change[0][0]), ".".join(map(str, change[0][:2]))} & {*NOT_HASHED}
    ]


def diff(first: Recipe, second: Recipe) -> list[tuple[KeyPath, Any, Any]]:
    """Return the keys whose values differ with both values; None if a key is not set. Lists are compared as a whole."""
    return differences(resolved_content(first), resolved_content(second))


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[KeyPath, Any, Any]]:
    """Return path and both values of the keys of nested tables whose values differ; None if a key is missing."""
    one, two = dict(leaves(first)), dict(leaves(second))
    keys = [*one, *(path for path in two if path not in one)]
    return [(path, one.get(path), two.get(path)) for path in keys if one.get(path) != two.get(path)]


def leaves(content: dict[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield key paths and values of everything that is not a table, and of empty tables."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value
