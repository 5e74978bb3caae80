"""A recipe written out in full: as text, as a hash, as a list of differences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_document

MOMENTUM = 0.9
"""Of sgd and nag, where the recipe gives none."""

GAMMA = {"step": 0.1, "exponential": 0.95, "plateau": 0.1}
"""Of the schedules that have a factor, where the recipe gives none."""

ASIDE = ("slurm", "study", "tracking", "checkpoint", "expected_metrics", "recipe.description", "recipe.run_root")
"""Where and in what company a run is computed, who is told, what is expected: the run comes out the same."""

HEADER = """\
# Resolved recipe: every key with its value, defaults written out; a key that is absent is not set.
# It is complete: it extends no other file and can be run as it stands.

"""


def with_defaults(recipe: Recipe) -> Recipe:
    """The recipe with those values that depend on another key."""
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
    """All tables and keys as plain values, in the schema's order; keys that are not set are left out."""
    return recipe.model_dump(exclude_none=True)


def resolved_toml(recipe: Recipe, remark: Callable[[KeyPath], str | None] = lambda path: None) -> str:
    """The complete recipe as TOML; reading it gives an equal Recipe. ``remark`` may give a comment for a key."""
    return HEADER + toml_document(resolved_content(recipe), remark)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the resolved content, 64 hexadecimal digits; the order of keys does not matter.

    What is no part of the experiment does not count: :data:`ASIDE`.
    """
    return content_hash(resolved_content(recipe))


def content_hash(content: dict[str, Any]) -> str:
    """The same of a resolved recipe's content as a file has it, with the keys of the version that wrote it."""
    counted = {table: value for table, value in content.items() if table not in ASIDE}
    counted["recipe"] = {key: value for key, value in counted["recipe"].items() if f"recipe.{key}" not in ASIDE}
    text = json.dumps(counted, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def experiment_diff(first: Recipe, second: Recipe) -> list[tuple[KeyPath, Any, Any]]:
    """The differences (see :func:`diff`) that make it another experiment; what is in :data:`ASIDE` is left out."""
    return [
        change
        for change in diff(first, second)
        if not {str(change[0][0]), ".".join(map(str, change[0][:2]))} & {*ASIDE}
    ]


def diff(first: Recipe, second: Recipe) -> list[tuple[KeyPath, Any, Any]]:
    """Keys whose values differ, with both values; None where a key is not set. Lists are compared whole."""
    one, two = dict(leaves(resolved_content(first))), dict(leaves(resolved_content(second)))
    keys = [*one, *(path for path in two if path not in one)]
    return [(path, one.get(path), two.get(path)) for path in keys if one.get(path) != two.get(path)]


def leaves(content: dict[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Key paths and values of all that is no table, and of empty tables."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value
