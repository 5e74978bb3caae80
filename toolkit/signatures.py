"""Descriptions of the arguments that a recipe can give to a callable, from its signature."""

from __future__ import annotations

import enum
import inspect
import types
import typing
from numbers import Number
from typing import Any


def describe_argument(parameter: inspect.Parameter) -> dict[str, Any]:
    """Return the kinds of TOML values that an argument takes (empty: unknown), whether it is required, and its default.

    An argument with a fixed list of strings also has ``choices``. ``size`` defaults to data.image_size, so it is never
    required.
    """
    annotation = parameter.annotation
    if annotation is parameter.empty:
        annotation = type(parameter.default)
    argument: dict[str, Any] = {
        "kinds": sorted(_kinds(annotation)),
        "required": parameter.default is parameter.empty and parameter.name != "size",
    }
    if parameter.default is not parameter.empty:
        argument["default"] = plain(parameter.default)
    choices = _choices(annotation)
    if choices:
        argument["choices"] = choices
    return argument


def plain(value: Any) -> Any:
    """Return a default value without enumeration members and tuples, as TOML would write it."""
    if isinstance(value, enum.Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def _choices(annotation: Any) -> list[str]:
    """Return the strings that an argument accepts, if they are a fixed list."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    members = typing.get_args(annotation) or (annotation,)
    return [str(item.value) for cls in members if inspect.isclass(cls) and issubclass(cls, enum.Enum) for item in cls]


def _kinds(annotation: Any) -> set[str]:
    """Return the TOML kinds (integer, number, boolean, text, array) that an annotation allows."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    if any(inspect.isclass(cls) and issubclass(cls, enum.Enum) for cls in members):
        return {"text"}
    simple = {int: "integer", float: "number", bool: "boolean", str: "text", Number: "number"}
    found = {simple[member] for member in members if member in simple}
    origins = [typing.get_origin(member) or member for member in members]
    if any(inspect.isclass(o) and issubclass(o, typing.Sequence) and o is not str for o in origins):
        found.add("array")
    if typing.get_origin(annotation) is typing.Literal:
        found.add("text")
    return found - {"integer"} if "number" in found else found
