"""Table of the resolved recipe, highlighting differences from its base and from the defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from toolkit.recipe import Recipe
from toolkit.recipe.diagnostics import dotted, printable
from toolkit.recipe.layers import SET
from toolkit.recipe.load import DEFAULT
from toolkit.recipe.resolve import leaves, resolved_content
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value
from toolkit.report.html import HtmlCell, HtmlColumn, HtmlRow, HtmlTable, name

OWN, BASE, UNCHANGED = "changed", "base", "default"
"""Kinds of rows: set by the recipe itself or --set; inherited from the file it extends; left at the default."""


def recipe_table(recipe: Recipe, origins: dict[str, Any]) -> HtmlTable:
    """Return a table of every key with its value and default, and its origin if the run recorded it (``origins``)."""
    keys = origins.get("keys")
    file = str(origins.get("file", ""))
    is_told = isinstance(keys, dict)
    defaults = dict(_defaults(recipe, ()))
    rows = []
    for path, value in leaves(resolved_content(recipe)):
        key, origin = dotted(path), str(keys.get(dotted(path), "")) if isinstance(keys, dict) else ""
        default = defaults.get(path)
        kind = _kind(origin, file) if is_told else UNCHANGED if path in defaults and value == default else OWN
        shown = "" if path not in defaults else "not set" if default is None else toml_value(default)
        cells = [_code(key), _code(toml_value(value)), _code(shown)]
        rows.append(HtmlRow([*cells, name(origin)] if is_told else cells, kind))
    columns = [HtmlColumn(title) for title in ("key", "value", "default", *(["comes from"] if is_told else []))]
    if not is_told:
        text = "Highlighted: values that differ from the defaults. The run did not record the origins of its values."
        return HtmlTable(columns, rows, text, [("all", ""), ("differs from default", OWN)])
    text = f"Highlighted: values set by {printable(file)} itself or --set, as opposed to its base and the defaults."
    buttons = [("all", ""), ("differs from its base", OWN), ("differs from the defaults", f"{OWN} {BASE}")]
    return HtmlTable(columns, rows, text, buttons)


def _code(text: str) -> HtmlCell:
    return HtmlCell(printable(text), name=True, code=True)


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
