"""Validate a recipe's values against the schema and report every error in plain English.

pydantic checks a rule between keys of a table only if the values of the table are valid, and the checks across tables
need a complete recipe. So each error is recorded and its value replaced with a placeholder, until the recipe is
valid. Nothing that depends on a replaced value is reported.
"""

from __future__ import annotations

import copy
import datetime
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

from toolkit.recipe.diagnostics import Issue, dotted, error
from toolkit.recipe.earlier_versions import RENAMED_VALUES, renamed_key, renamed_metric
from toolkit.recipe.layers import value_at
from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value
from toolkit.recipe.type_descriptions import describe_type, describe_value, unwrap_annotation
from toolkit.similar_names import similar_names

MAX_ERRORS = 100
"""Maximum number of errors handled per round: nobody reads more, and a malicious recipe may have 50,000."""

MAX_ROUNDS = 8

PLACEHOLDERS: dict[tuple[str, str], Any] = {
    ("Recipe", "recipe"): {"name": "placeholder"},
    ("Recipe", "data"): {"dataset": "imagefolder"},
    ("Recipe", "model"): {"source": "torchvision", "name": "resnet18"},
    ("Recipe", "optimizer"): {"lr": 0.1},
    ("Recipe", "train"): {"epochs": 1, "batch_size": 1},
    ("ExperimentConfig", "name"): "placeholder",
    ("DataConfig", "dataset"): "imagefolder",
    ("TransformConfig", "name"): "Identity",
    ("ModelConfig", "source"): "torchvision",
    ("OptimizerConfig", "lr"): 0.1,
    ("TrainConfig", "epochs"): 1,
    ("TrainConfig", "batch_size"): 1,
    ("Expectation", "source"): "placeholder",
}
"""Placeholders for required keys that are missing or wrong, by schema class and field."""

OTHER_NAMES = {
    "learning_rate": "lr",
    "optim": "optimizer",
    "lr_scheduler": "scheduler",
    "transforms": "augment",
    "augmentation": "augment",
    "arch": "name",
    "architecture": "name",
    "pretrained": "weights",
}
"""Names that other tools use for a key and that are too different from its name to be found by similarity."""


OTHER_SCHEDULES = {
    "none": "constant",
    "poly": "polynomial",
    "cosineannealing": "cosine",
    "cosineannealingwarmrestarts": "cosine_restarts",
    "cosinewarmrestarts": "cosine_restarts",
    "warmrestarts": "cosine_restarts",
    "sgdr": "cosine_restarts",
    "fitflatcos": "flat_cosine",
    "flatcos": "flat_cosine",
    "warmupstabledecay": "wsd",
    "trapezoidal": "wsd",
    "reduceonplateau": "plateau",
    "reducelronplateau": "plateau",
}
"""Names of schedules in torch, timm and other tools, in lower case, without underscores and a final "lr"."""


@dataclass
class ValidationResult:
    """Validation result; ``recipe`` has placeholders at the ``untrusted`` paths, or is None if none could be built."""

    recipe: Recipe | None = None
    issues: list[Issue] = field(default_factory=list)
    untrusted: set[KeyPath] = field(default_factory=set)

    def is_valid_at(self, paths: Iterable[KeyPath]) -> bool:
        """Return whether none of the values at, above or below these paths had to be replaced."""
        return not any(path[: len(bad)] == bad or bad[: len(path)] == path for path in paths for bad in self.untrusted)


def validate(values: dict[str, Any]) -> ValidationResult:
    """Validate values against the schema and find all errors."""
    result, data = ValidationResult(), copy.deepcopy(values)
    for path, message in list(islice(_unsupported_values(data), MAX_ERRORS)):
        result.issues.append(error(path, message))
        key = _locate(path, data)
        _replace(data, key if key and key.path == path else _Key(path, None, None, None), result)
    for _ in range(MAX_ROUNDS):
        try:
            result.recipe = Recipe.model_validate(data)
            break
        except ValidationError as invalid:
            # Unknown keys first: a misspelled key explains why the correct one is missing.
            errors = invalid.errors(include_url=False)[:MAX_ERRORS]
            for item in sorted(errors, key=lambda item: item["type"] != "extra_forbidden"):
                _record(result, data, item)
    return result


def _unsupported_values(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield an issue for each value that TOML allows but recipes do not.

    pydantic does not report them, because arguments of models and optimizers may have any type.
    """
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unsupported_values(item, (*path, key))
    elif isinstance(value, datetime.date | datetime.time):
        yield path, "dates and times are not allowed in a recipe; put text into quotes"
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"expected a finite number, found {value}"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield path, "the number is too large (64 bits at most)"


def _record(result: ValidationResult, data: dict[str, Any], item: Any) -> None:
    """Record one of pydantic's errors, unless it follows from a known one, and replace the value."""
    key = _locate(item["loc"], data)
    if key is None:
        return
    kind, path = item["type"], key.path
    if kind == "value_error":  # a rule within a table
        if result.is_valid_at([path]):
            result.issues.append(_broken_rule(key, str(item["ctx"]["error"])))
        _replace(data, key, result)
        return
    known = result.untrusted if kind == "missing" else {issue.path for issue in result.issues}
    if path not in known:
        result.issues.append(_issue(key, kind))
    if kind == "extra_forbidden":
        table = value_at(data, path[:-1])
        result.untrusted |= {(*path[:-1], name) for name in _similar(key)[:1] if name not in table}
    _replace(data, key, result)


@dataclass(frozen=True)
class _Key:
    """A key or list element of the recipe, its value, and its type in the schema."""

    path: KeyPath
    value: Any
    annotation: Any
    table: type[BaseModel] | None
    """The class that defines the key."""


def _locate(loc: tuple[str | int, ...], data: Any) -> _Key | None:
    """Return the key that a pydantic location refers to; None for a union branch that does not match the value.

    For a union, pydantic's location contains the name of the branch in addition to the keys.
    """
    annotation: Any = Recipe
    table: type[BaseModel] | None = None
    path: KeyPath = ()
    for part in loc:
        plain, _ = unwrap_annotation(annotation)
        if typing.get_origin(plain) in (typing.Union, types.UnionType):
            models = [member for member in typing.get_args(plain) if _is_model(member)]
            if not (models and isinstance(value_at(data, path), dict)):
                break
            if part != models[0].__name__:
                return None
            annotation = models[0]
            continue
        if _is_model(plain):
            table, entry = plain, plain.model_fields.get(part)
            annotation = entry.rebuild_annotation() if entry else None
        elif typing.get_args(plain):
            annotation, table = typing.get_args(plain)[-1], None
        else:
            break
        path = (*path, part)
    return _Key(path, value_at(data, path), annotation, table)


def _issue(key: _Key, kind: str) -> Issue:
    """Return the issue for an unknown key, a missing key or a value of the wrong type."""
    path, value = key.path, key.value
    if kind == "extra_forbidden":
        what = f"table [{dotted(path)}]" if isinstance(value, dict) else f"key {dotted(path)}"
        return Issue(f"unknown {what}", path, hint=_unknown_hint(key), at="key")
    expected = "a table" if len(path) == 1 else describe_type(key.annotation)
    if kind != "missing":
        return error(path, f"expected {expected}, found {describe_value(value)}", hint=_value_hint(key, expected))
    if len(path) > 1:
        return Issue(f"{_table(path[:-1])} lacks {path[-1]}: expected {expected}", path, at="table")
    needed = " and ".join(PLACEHOLDERS["Recipe", str(path[0])])
    return Issue(f"table [{path[0]}] is missing", path, hint=f"it needs at least {needed}", at="key")


def _unknown_hint(key: _Key) -> str:
    assert key.table is not None, "only a table has unknown keys"
    name, similar = str(key.path[-1]), _similar(key)
    if (new := renamed_key(key.path)) is not None:
        return f"renamed to {dotted((*key.path[:-1], new))}"
    if "set" in key.table.model_fields and name in Recipe.model_fields:
        return f"to change keys of [{name}] in {_table(key.path[:-1])}: set.{name}"
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    if tables := _tables_with(name):
        return f"{name} belongs to " + " or ".join(f"[{table}]" for table in tables)
    if tables := _tables_with(OTHER_NAMES.get(name, "")):
        return f"did you mean {' or '.join(f'{table}.{OTHER_NAMES[name]}' for table in tables)}?"
    known = ", ".join(key.table.model_fields)
    return f"{_table(key.path[:-1])} takes {known}" if key.path[:-1] else f"the tables are {known}"


def _tables_with(key: str) -> list[str]:
    """Return the tables that have a key of this name."""
    return [t for t, entry in Recipe.model_fields.items() if key in getattr(entry.annotation, "model_fields", {})]


def _similar(key: _Key) -> list[str]:
    """Return the known keys of this table that resemble an unknown one."""
    assert key.table is not None, "only a table has unknown keys"
    name, known = str(key.path[-1]), key.table.model_fields
    other = renamed_key(key.path) or OTHER_NAMES.get(name)
    return [other] if other in known else similar_names(name, known, 2)


def _value_hint(key: _Key, expected: str) -> str | None:
    value = key.value
    if not isinstance(value, str):
        return None
    if key.path == ("data", "dataset") and (os.sep in value or value.startswith((".", "~"))):
        return f'for your own images: dataset = "imagefolder" and root = {toml_value(value)}'
    allowed = list(_allowed_strings(key.annotation))
    if (new := RENAMED_VALUES.get(value, renamed_metric(value))) != value and new in allowed:
        return f'renamed to "{new}"'
    if key.path == ("scheduler", "name"):
        plain = value.casefold().replace("_", "").replace("-", "").removesuffix("lr")
        value = OTHER_SCHEDULES.get(plain, plain)
    similar = similar_names(value, allowed, 1)
    if similar:
        return f'did you mean "{similar[0]}"?'
    is_plain = value in ("true", "false") or value.replace(".", "", 1).lstrip("+-").isdigit()
    return f"without quotes: {value}" if is_plain and ("number" in expected or "true" in expected) else None


def _allowed_strings(annotation: Any) -> Iterator[str]:
    """Yield the strings that the Literals of an annotation allow."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from (value for value in typing.get_args(annotation) if isinstance(value, str))
    else:
        for member in typing.get_args(annotation):
            yield from _allowed_strings(member)


def _table(path: KeyPath) -> str:
    """Format the path of a table: ``[optimizer]``, ``augment.train[0]``."""
    return f"[{dotted(path)}]" if all(isinstance(part, str) for part in path) else dotted(path)


def _broken_rule(key: _Key, message: str) -> Issue:
    """Return the issue for a broken rule within one table, located at the key that the message starts with, if any."""
    first = message.split()[0].rstrip(":")
    names_key = _is_model(key.annotation) and first in key.annotation.model_fields
    return Issue(f"{_table(key.path)}: {message}", (*key.path, first) if names_key else key.path, at="key")


def _replace(data: dict[str, Any], key: _Key, result: ValidationResult) -> None:
    """Replace a bad value with its placeholder, or remove it, if necessary with the list or table around it."""
    path, name = key.path, str(key.path[-1])
    placeholder = PLACEHOLDERS.get((key.table.__name__, name)) if key.table else None
    entry = key.table.model_fields.get(name) if key.table else None
    if entry is not None and entry.is_required() and placeholder is None:
        path = path[:-1]
    while isinstance(path[-1], int) or not isinstance(value_at(data, path[:-1]), dict):
        path = path[:-1]
    result.untrusted |= {key.path, path}
    table = value_at(data, path[:-1])
    table.pop(path[-1], None)
    if placeholder is not None and path == key.path:
        table[name] = copy.deepcopy(placeholder)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
