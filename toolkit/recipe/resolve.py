"""Resolved recipes: complete text, hash and differences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_document

MOMENTUM = 0.9
"""Default momentum of sgd and nag."""

GAMMA = {"step": 0.1, "exponential": 0.95, "plateau": 0.1}
"""Default decay factors of the schedules that have one."""

ASIDE = (
    "slurm", "study", "tracking", "checkpoint", "expected_metrics", "recipe.description", "recipe.run_root",
    "expect",  # the name of expected_metrics in earlier versions
)  # fmt: skip
"""Tables and keys that do not affect the result of a run and are excluded from the hash."""

HEADER = """\
# Resolved recipe: every key with its value, defaults written out; a key that is absent is not set.
# It is complete: it extends no other file and can be run as it stands.

"""


def with_defaults(recipe: Recipe) -> Recipe:
    """Return the recipe with defaults that depend on other keys filled in."""
    optimizer, scheduler = recipe.optimizer, recipe.scheduler
    if optimizer.momentum is None and optimizer.name in ("sgd", "nag"):
        optimizer = optimizer.model_copy(update={"momentum": MOMENTUM})
    if scheduler.gamma is None and scheduler.name in GAMMA:
        scheduler = scheduler.model_copy(update={"gamma": GAMMA[scheduler.name]})
    data = recipe.data
    if data.split.seed == "recipe.seed":
        split = data.split.model_copy(update={"seed": recipe.recipe.seed})
        data = data.model_copy(update={"split": split})
    return recipe.model_copy(update={"data": data, "optimizer": optimizer, "scheduler": scheduler})


def is_resolved(text: str) -> bool:
    """Whether a recipe's text was written by :func:`resolved_toml`."""
    return text.startswith(HEADER.splitlines()[0])


def resolved_content(recipe: Recipe) -> dict[str, Any]:
    """Return all tables and keys as plain values, in schema order; keys that are not set are omitted."""
    return recipe.model_dump(exclude_none=True)


def resolved_toml(recipe: Recipe, remark: Callable[[KeyPath], str | None] = lambda path: None) -> str:
    """Return the complete recipe as TOML; reading it gives an equal Recipe. ``remark`` returns a key's comment."""
    return HEADER + toml_document(resolved_content(recipe), remark)


def recipe_hash(recipe: Recipe) -> str:
    """Return the SHA-256 of the resolved content (64 hexadecimal digits), independent of the order of keys.

    Keys in :data:`ASIDE` are excluded.
    """
    return content_hash(resolved_content(recipe))


def content_hash(content: dict[str, Any]) -> str:
    """Return the hash of a resolved recipe's content read from a file, with the keys of the version that wrote it."""
    counted = {table: value for table, value in content.items() if table not in ASIDE}
    counted["recipe"] = {key: value for key, value in counted["recipe"].items() if f"recipe.{key}" not in ASIDE}
    text = json.dumps(counted, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def experiment_diff(first: Recipe, second: Recipe) -> list[tuple[KeyPath, Any, Any]]:
    """Return the differences (see :func:`diff`) that affect the result, that is, without the keys in :data:`ASIDE`."""
    return [
        change
        for change in diff(first, second)
        if not {str(change[0][0]), ".".join(map(str, change[0][:2]))} & {*ASIDE}
    ]


def diff(first: Recipe, second: Recipe) -> list[tuple[KeyPath, Any, Any]]:
    """Return the keys whose values differ with both values; None if a key is not set. Lists are compared as a whole."""
    one, two = dict(leaves(resolved_content(first))), dict(leaves(resolved_content(second)))
    keys = [*one, *(path for path in two if path not in one)]
    return [(path, one.get(path), two.get(path)) for path in keys if one.get(path) != two.get(path)]


def leaves(content: dict[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield key paths and values of everything that is not a table, and of empty tables."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value
