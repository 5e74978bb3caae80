"""JSON Schema of recipe files, for completion and validation in editors (Taplo, Even Better TOML).

``python -m toolkit.recipe.jsonschema`` writes ``recipe.schema.json``; `toolkit schema` writes one that also has the
loaded plugins. A recipe refers to it in its first line, ``#:schema PATH``. The schema covers a single file, which may
inherit other values, so no table or key is required except within lists, which are never merged. Rules across tables
are checked by ``toolkit validate`` only.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolkit.metrics import EXPECTED_METRICS
from toolkit.plugins import PREFIX, Plugin
from toolkit.recipe import catalog
from toolkit.recipe.base import NAME_PATTERN, PLUGIN_PATTERN
from toolkit.recipe.catalog_checks import OWN_MODEL_KEYS
from toolkit.recipe.schema import Recipe

FILE = Path(__file__).parent / "recipe.schema.json"

Schema = dict[str, Any]

NAME_PATTERN_ECMA = r"^[^\s_.+=,@/\\-]([ .]?[^\s./\\])*$"
"""NAME_PATTERN for validators whose ``\\w`` is ASCII only. Never stricter, so no valid name is reported."""

JSON_TYPES = {"text": "string", "number": "number", "integer": "integer", "boolean": "boolean", "array": "array"}


def recipe_schema(plugins: Iterable[Plugin] = ()) -> Schema:
    """Return the schema of a recipe file (Draft 7, without references), with the names and arguments of plugins."""
    raw = Recipe.model_json_schema()
    schema = _plain(raw, raw.get("$defs", {}), in_list=False)
    tables = schema["properties"]
    _name_models(tables["model"])
    _name_optimizers(tables["optimizer"])
    for split in ("train", "validation", "test"):
        _name_transforms(tables["augment"]["properties"][split]["items"])
    tables["expected_metrics"]["propertyNames"] = {"enum": list(EXPECTED_METRICS)}
    for plugin in plugins:
        _name_plugin(tables, plugin)
    extends = {"type": "string", "minLength": 1, "description": "Recipe to inherit from, relative to this file."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe",
        "description": "What to train, for `toolkit train`; see docs/recipes.md.",
        "type": "object",
        "properties": {"extends": extends, **tables},
        "additionalProperties": False,
    }


def schema_text(plugins: Iterable[Plugin] = ()) -> str:
    """Return the text of recipe.schema.json: indented, with lists of plain values on one line."""
    text = json.dumps(recipe_schema(plugins), indent=1, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\n\s*", " ", match.group()), text) + "\n"


def _plain(node: Schema, definitions: Schema, *, in_list: bool) -> Schema:
    """Return pydantic's schema without references, nulls and titles, and without required keys outside lists.

    Units are added to the descriptions, which editors show.
    """
    node = dict(node)
    if "$ref" in node:
        node = {**definitions[node.pop("$ref").rsplit("/", 1)[1]], **node}
    branches = [branch for branch in node.pop("anyOf", []) if branch != {"type": "null"}]
    if len(branches) == 1:
        node = {**branches[0], **node}
        return _plain(node, definitions, in_list=in_list)
    if branches:
        node["anyOf"] = [_plain(branch, definitions, in_list=in_list) for branch in branches]
    for key in ("title", *(() if in_list else ("required",))):
        node.pop(key, None)
    if node.get("default", ...) is None:
        node.pop("default")
    if node.get("pattern") == NAME_PATTERN:
        node["pattern"] = NAME_PATTERN_ECMA
    if isinstance(node.get("items"), dict):
        node["items"] = _plain(node["items"], definitions, in_list=True)
    if isinstance(node.get("additionalProperties"), dict):
        node["additionalProperties"] = _plain(node["additionalProperties"], definitions, in_list=in_list)
    if "properties" in node:
        node["properties"] = {
            key: _plain(value, definitions, in_list=in_list) for key, value in node["properties"].items()
        }
    if "unit" in node:
        node["description"] += f" Unit: {node['unit']}."
    return node


def _name_models(table: Schema) -> None:
    """Restrict model.name to the architectures of model.source, if the file sets it. A plugin may have any name."""
    names = {source: catalog.model_names(source) for source in ("torchvision", "timm")}
    names["toolkit"] = ["convnet"]
    _or_plugin(table["properties"]["name"], sorted(set().union(*names.values())), ".")
    own = {"properties": {"args": {"propertyNames": {"not": {"enum": list(OWN_MODEL_KEYS)}}}}}
    table["allOf"] = [
        *(_when("source", [source], {"properties": {"name": {"enum": known}}}) for source, known in names.items()),
        _when("source", list(names), own),
    ]


def _name_optimizers(table: Schema) -> None:
    """Restrict optimizer.name to known optimizers, and optimizer.args to the arguments of the one named."""
    optimizers = catalog.optimizers()
    _or_plugin(table["properties"]["name"], list(optimizers))
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, info in optimizers.items():
        alike[tuple(info["args"])].append(name)
    table["allOf"] = [
        _when("name", names, {"properties": {"args": {"propertyNames": {"enum": list(args)}}}})
        for args, names in alike.items()
    ]


def _or_plugin(key: Schema, names: list[str], pattern: str = PLUGIN_PATTERN) -> None:
    """Restrict a key to the names, which editors complete, and to names of plugins."""
    del key["type"]
    key["anyOf"] = [{"enum": names}, {"type": "string", "pattern": pattern}]


def _name_transforms(entry: Schema) -> None:
    """Restrict an entry to known transforms and to the arguments of the one it names."""
    transforms = catalog.transforms()
    own = list(entry["properties"])
    _or_plugin(entry["properties"]["name"], list(transforms))
    entry["allOf"] = [
        _when("name", [name], _arguments(arguments, own) | _required(arguments))
        for name, arguments in transforms.items()
    ]


def _name_plugin(tables: Schema, plugin: Plugin) -> None:
    """Add a plugin's name, for completion, and the arguments that it takes if a file selects it.

    Other names of plugins remain valid.
    """
    name, arguments = PREFIX + plugin.name, {"args": _arguments(plugin.arguments, takes_any=plugin.takes_any)}
    match plugin.kind:
        case "model" | "dataset":
            table, key = (tables["model"], "source") if plugin.kind == "model" else (tables["data"], "dataset")
            _add_name(table["properties"], "name", plugin.name)
            selected = {"properties": {key: {"enum": ["plugin"]}, "name": {"enum": [plugin.name]}}}
            rule = {"if": selected | {"required": [key, "name"]}, "then": {"properties": arguments}}
            table.setdefault("allOf", []).append(rule)
        case "optimizer" | "schedule":
            table = tables["optimizer" if plugin.kind == "optimizer" else "scheduler"]
            _add_name(table["properties"], "name", name)
            table.setdefault("allOf", []).append(_when("name", [name], {"properties": arguments}))
        case "loss":
            table = tables["train"]
            _add_name(table["properties"], "loss", name)
            then = {"properties": {"loss_args": arguments["args"]}}
            built_in = table["properties"]["loss_args"]["properties"]
            for argument in plugin.arguments.keys() & built_in.keys():
                built_in[argument] = {"anyOf": [built_in[argument], _argument(plugin.arguments[argument])]}
            table.setdefault("allOf", []).append(_when("loss", [name], then))
        case "transform":
            for split in ("train", "validation", "test"):
                entry = tables["augment"]["properties"][split]["items"]
                own = list(entry["properties"])
                _add_name(entry["properties"], "name", name)
                then = _arguments(plugin.arguments, own, takes_any=plugin.takes_any) | _required(plugin.arguments)
                entry["allOf"].append(_when("name", [name], then))
        case "metric":
            _add_name(tables["train"]["properties"]["metrics"], "items", name)
            for table, key in (("train", "best_metric"), ("scheduler", "metric"), ("early_stopping", "metric")):
                _add_name(tables[table]["properties"], key, f"val/{plugin.name}")


def _add_name(properties: Schema, key: str, name: str) -> None:
    """Add a name to those that editors complete for a key."""
    if "anyOf" not in properties[key]:
        about = {one: properties[key].pop(one) for one in ("description", "default") if one in properties[key]}
        properties[key] = about | {"anyOf": [{"enum": []}, properties[key]]}
    properties[key]["anyOf"][0]["enum"].append(name)


def _arguments(arguments: Schema, other: Iterable[str] = (), *, takes_any: bool = False) -> Schema:
    """Return the schema of a table with arguments, as the catalog describes them, and with ``other`` keys."""
    found: Schema = {"properties": {key: _argument(info) for key, info in arguments.items()}}
    return found if takes_any else found | {"propertyNames": {"enum": [*other, *arguments]}}


def _required(arguments: Schema) -> Schema:
    return {"required": [key for key, info in arguments.items() if info["required"]]}


def _argument(info: dict[str, Any]) -> Schema:
    schema: Schema = {"type": [JSON_TYPES[kind] for kind in info["kinds"]]} if info["kinds"] else {}
    if "choices" in info:
        schema["enum"] = info["choices"]
    if info.get("default") is not None:
        schema["default"] = info["default"]
    return schema


def _when(key: str, values: list[str], then: Schema) -> Schema:
    """Return a rule that applies if the key has one of the values."""
    return {"if": {"properties": {key: {"enum": values}}, "required": [key]}, "then": then}


if __name__ == "__main__":
    FILE.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {FILE}")
