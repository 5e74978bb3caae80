"""Descriptions of schema types and values in English, for messages and the reference page."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from toolkit.recipe.base import (
    NAME_PATTERN,
    PLUGIN_COLUMN,
    PLUGIN_METRIC,
    PLUGIN_PATTERN,
    REGISTRY,
    SLURM_FEATURES,
    SLURM_MEMORY,
    SLURM_OPTION,
    SLURM_TIME,
    SLURM_WORD,
)
from toolkit.recipe.toml_writer import toml_value

SHOWN = 60
"""Maximum length of a value in messages, in characters; longer values are truncated."""


PATTERNS = {
    NAME_PATTERN: "text that starts with a letter or digit, followed by letters, digits and _+=,@-, with "
    "single spaces and dots between them, at most 100 characters",
    PLUGIN_PATTERN: '"plugin:NAME"',
    PLUGIN_METRIC: '"val/NAME" of a plugin in train.metrics',
    PLUGIN_COLUMN: '"val_NAME" or "test_NAME" of a plugin in train.metrics',
    REGISTRY: "the name of a registry, or registry/collection; letters, digits and _.-",
    SLURM_WORD: "text of letters, digits and _.,@+-",
    SLURM_FEATURES: "text of letters, digits and _.,:&|*()[]@+-",
    SLURM_MEMORY: "a size such as 64G (K, M, G or T; megabytes without a unit)",
    SLURM_TIME: "a time such as 90 (minutes), 4:00:00 or 2-12:00:00 (days-hours)",
    SLURM_OPTION: "an option of sbatch such as --exclusive or --mail-type=FAIL, without spaces or quotation marks",
}
"""Descriptions of the schema's regular expressions, for messages."""


def describe_type(annotation: Any, constraints: tuple[Any, ...] = ()) -> str:
    """Describe the values that an annotation allows: ``a number from 0 to 1 or a whole number >= 1``."""
    annotation, inner = unwrap_annotation(annotation)
    constraints = (*constraints, *inner)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            describe_type(member, constraints) for member in typing.get_args(annotation) if member is not types.NoneType
        )
    if origin is typing.Literal:
        return _either([toml_value(value) for value in typing.get_args(annotation)])
    if origin is list:
        return _list(typing.get_args(annotation)[0], constraints)
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return _text(constraints)
    if annotation in (int, float):
        return " ".join(filter(None, ["a whole number" if annotation is int else "a number", _range(constraints)]))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a table {{ {', '.join(f'{name} = ...' for name in annotation.model_fields)} }}"
    return "a table"


def unwrap_annotation(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Strip ``Annotated`` and ``| None``; return the inner annotation and the constraints found on the way."""
    constraints: tuple[Any, ...] = ()
    while True:
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, *extra = typing.get_args(annotation)
            for item in extra:
                constraints += tuple(item.metadata) if isinstance(item, FieldInfo) else (item,)
        elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
            members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
            if len(members) > 1:
                return annotation, constraints
            annotation = members[0]
        else:
            return annotation, constraints


def describe_value(value: Any) -> str:
    """Describe an invalid value, truncated to a readable length: ``the text "8"``, ``1.5``, ``a table``."""
    if isinstance(value, dict):
        return "a table"
    return f"the text {shown(value)}" if isinstance(value, str) else shown(value)


def shown(value: Any) -> str:
    """Format a value as TOML, truncated to a readable length."""
    text = toml_value(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + "..." + text[-1]


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _text(constraints: tuple[Any, ...]) -> str:
    limits = _limits(constraints)
    if limits.get("pattern") in PATTERNS:
        return PATTERNS[limits["pattern"]]
    return "text, not empty" if "min_length" in limits else "text"


def _list(item: Any, constraints: tuple[Any, ...]) -> str:
    limits = _limits(constraints)
    least, most = limits.get("min_length"), limits.get("max_length")
    if least is not None and most is not None:
        size = f" of {least}" if least == most else f" of {least} to {most}"
    else:
        size = f" of at least {least}" if least is not None else ""
    return f"a list{size}, each {describe_type(item)}"


def _range(constraints: tuple[Any, ...]) -> str:
    limits = _limits(constraints)
    if "ge" in limits and "le" in limits:
        return f"from {limits['ge']} to {limits['le']}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and ".join(f"{sign} {limits[name]}" for name, sign in signs.items() if name in limits)


def _limits(constraints: tuple[Any, ...]) -> dict[str, Any]:
    """Return the limits of numbers and lengths, and the pattern, by their names in pydantic."""
    names = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
    return {name: getattr(item, name) for item in reversed(constraints) for name in names if hasattr(item, name)}
