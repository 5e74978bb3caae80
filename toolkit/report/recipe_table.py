"""Tables of the resolved recipe, with differences from its base and the defaults, and of the environments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from toolkit.recipe import Recipe
from toolkit.recipe.diagnostics import dotted
from toolkit.recipe.layers import SET
from toolkit.recipe.load import DEFAULT
from toolkit.recipe.resolve import leaves, resolved_content
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value
from toolkit.report.html import HtmlCell, HtmlRow, HtmlTable, code, name

OWN, BASE, UNCHANGED = "changed", "base", "default"
"""Kinds of rows: value set by the recipe itself or --set; inherited from the file it extends; left at the default."""

MAX_VALUES = 4
"""Maximum number of different values shown for one key."""


def recipe_table(
    recipe: Recipe, origins: Mapping[str, Any], varied: Mapping[str, Sequence[str]] | None = None
) -> HtmlTable:
    """Return a table of every key with its value and default, and its origin if the run recorded it (``origins``).

    Keys that the recipe itself sets are highlighted; in a study, the varied keys, whose values are in ``varied``.
    """
    keys, file = origins.get("keys"), str(origins.get("file", ""))
    defaults = dict(_defaults(recipe, ()))
    rows = []
    for path, value in leaves(resolved_content(recipe)):
        key, default = dotted(path), defaults.get(path)
        if keys is not None:
            kind = _kind(str(keys.get(key, "")), file)
        else:
            kind = UNCHANGED if path in defaults and value == default else OWN
        shown = toml_value(value)
        if varied is not None and key in varied:
            kind, shown = OWN, _join_values(varied[key], ", ")
        elif varied is not None and kind == OWN:
            kind = BASE
        default_shown = "" if path not in defaults else "not set" if default is None else toml_value(default)
        origin = [name(str(keys.get(key, "")))] if keys is not None else []
        rows.append(HtmlRow([code(key), code(shown), code(default_shown), *origin], kind))
    head = ["key", "value", "default", *(["comes from"] if keys is not None else [])]
    if varied is not None:
        text = "Highlighted: keys that vary between runs, with all their values. Others have the first run's value."
        buttons = [("all", ""), ("varies", OWN), ("differs from the defaults", f"{OWN} {BASE}")]
    elif keys is None:
        text = "Highlighted: values that differ from the defaults. The run did not record the origins of its values."
        buttons = [("all", ""), ("differs from default", OWN)]
    else:
        text = f"Highlighted: values set by {file} itself or by --set, not inherited from its base or the defaults."
        buttons = [("all", ""), ("differs from its base", OWN), ("differs from the defaults", f"{OWN} {BASE}")]
    return HtmlTable(head, rows, text=text, buttons=buttons)


def _kind(origin: str, file: str) -> str:
    if origin == DEFAULT:
        return UNCHANGED
    return OWN if origin == SET or origin.rpartition(":")[0] == file else BASE


def _defaults(table: BaseModel, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the path and default of every key that has one."""
    for key, entry in type(table).model_fields.items():
        value = getattr(table, key)
        if isinstance(value, BaseModel):
            yield from _defaults(value, (*path, key))
        elif not entry.is_required() and not isinstance(entry.default, BaseModel):
            yield (*path, key), entry.default


def environment_table(environments: Sequence[Mapping[str, Any]]) -> HtmlTable:
    """Return a table of the runs' environments, one row per entry; entries that differ list the different values."""
    values: dict[str, list[str]] = {}
    for environment in environments:
        for key, value in environment.items():
            for inner, item in value.items() if isinstance(value, dict) else [("", value)]:
                known = values.setdefault(f"{key} {inner}".strip(), [])
                text = "-" if item is None else str(item)
                known += [text] if text not in known else []
    rows = [HtmlRow([HtmlCell(key), code(_join_values(found, " | "))]) for key, found in values.items()]
    return HtmlTable(["entry", "value"], rows)


def _join_values(values: Sequence[str], separator: str) -> str:
    """Join the first values; if there are more, append their total number."""
    shown = values if len(values) <= MAX_VALUES else [*values[:MAX_VALUES], f"... ({len(values)} values)"]
    return separator.join(shown)
