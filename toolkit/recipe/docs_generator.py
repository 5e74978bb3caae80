"""Generate the reference section of docs/recipes.md from the schema: ``python -m toolkit.recipe.docs_generator``.

The text above the marker in that file is hand-written and stays unchanged.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from toolkit.metrics import EXPECTED_METRICS
from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_writer import toml_value
from toolkit.recipe.type_descriptions import describe_type, unwrap_annotation

FILE = Path(__file__).parents[2] / "docs" / "recipes.md"
MARKER = (
    "<!-- Below: written by `python -m toolkit.recipe.docs_generator`; change the schema in toolkit/recipe instead. -->"
)


def reference() -> str:
    """Return all tables with their keys as Markdown."""
    sections = [section for name, entry in Recipe.model_fields.items() for section in _sections(name, entry)]
    return "\n".join(["## All tables and keys", "", *sections])


def updated(page: str) -> str:
    """Return the page with its generated section regenerated."""
    return page.split(MARKER)[0] + MARKER + "\n\n" + reference()


def _sections(path: str, entry: FieldInfo) -> Iterator[str]:
    """Yield the section of a table, then those of its nested tables."""
    model, heading = _table_of(path, entry.annotation)
    if model is None:
        if "." not in path:  # a table with user-defined keys
            yield f"### `[{path}]`\n\n{entry.description}\n"
        return
    alike = ", `[[augment.validation]]`, `[[augment.test]]`" if path == "augment.train" else ""
    yield f"### `{heading}`{alike}\n"
    yield f"{inspect.cleandoc(model.__doc__ or '')}\n"
    if path == "expected_metrics":
        yield f"Metrics: {', '.join(f'`{name}`' for name in EXPECTED_METRICS)}.\n"
    yield "| key | value | default | unit | meaning |\n|---|---|---|---|---|"
    for name, field in model.model_fields.items():
        yield _row(f"{path}.{name}", name, field)
    yield ""
    for name, field in model.model_fields.items():
        if (path, name) not in (("augment", "validation"), ("augment", "test")):  # the same as train
            yield from _sections(f"{path}.{name}", field)


def _table_of(path: str, annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Return the schema class of a key (directly, in a union, list or dictionary) and its TOML header."""
    annotation, _ = unwrap_annotation(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, f"[{path}]"
    for member in typing.get_args(annotation):
        model, _ = _table_of(path, member)
        if model is not None:
            origin = typing.get_origin(annotation)
            return model, f"[[{path}]]" if origin is list else f"[{path}.METRIC]" if origin is dict else f"[{path}]"
    return None, ""


def _row(path: str, name: str, entry: FieldInfo) -> str:
    model, heading = _table_of(path, entry.annotation)
    is_choice = typing.get_origin(unwrap_annotation(entry.annotation)[0]) in (typing.Union, types.UnionType)
    kind = f"table `{heading}`" if model and not is_choice else describe_type(entry.rebuild_annotation())
    extra = entry.json_schema_extra if isinstance(entry.json_schema_extra, dict) else {}
    cells = [f"`{name}`", kind, _default(entry), str(extra.get("unit", "")), entry.description or ""]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _default(entry: FieldInfo) -> str:
    if entry.is_required():
        return "required"
    if isinstance(entry.default, BaseModel):
        return ""
    return "not set" if entry.default is None else f"`{toml_value(entry.default)}`"


if __name__ == "__main__":
    FILE.write_text(updated(FILE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {FILE}")
