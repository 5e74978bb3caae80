"""Write values and tables as TOML. tomli reads the text back to equal values (tested)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from toolkit.recipe.toml_positions import KeyPath

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")


def toml_key(name: str) -> str:
    """Format a key, quoted if necessary."""
    return name if _BARE_KEY.match(name) else toml_value(name)


def toml_value(value: Any) -> str:
    """Format a value on one line; tables become inline tables."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        pairs = [f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items()]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    return repr(value)  # int and float: Python's repr is valid TOML


def toml_document(content: Mapping[str, Any], comment: Callable[[KeyPath], str | None] = lambda path: None) -> str:
    """Format tables under headers, with tables in arrays inline. ``comment`` returns a key path's comment, if any."""
    return "\n\n".join(_tables((), content, comment)) + "\n"


def _tables(path: KeyPath, table: Mapping[str, Any], comment: Callable[[KeyPath], str | None]) -> list[str]:
    """Return the text of this table, then those of its subtables."""
    own = {key: value for key, value in table.items() if not isinstance(value, Mapping) or not value}
    lines = ["[" + ".".join(toml_key(str(part)) for part in path) + "]"] if path else []
    for key, value in own.items():
        text = comment((*path, key))
        lines.append(f"{toml_key(key)} = {toml_value(value)}" + (f"  # {text}" if text else ""))
    texts = ["\n".join(lines)] if lines and (own or not table) else []
    for key, value in table.items():
        if key not in own:
            texts += _tables((*path, key), value, comment)
    return texts
