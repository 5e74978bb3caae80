"""Validate a recipe's values against the schema and report every error in plain words.

pydantic stops at the first error of some kinds, and the checks across tables need a complete recipe. So each error is
recorded and the bad value replaced with a placeholder until the recipe is valid. Replaced values are marked as
untrusted, and nothing that depends on them is reported.
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

from toolkit.recipe.diagnostics import Issue, dotted
from toolkit.recipe.earlier_versions import RENAMED_VALUES, renamed_key, renamed_metric
from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value
from toolkit.recipe.type_descriptions import describe_type, describe_value, unwrap_annotation
from toolkit.similar_names import similar_names

MAX_ERRORS = 100
"""Maximum number of errors handled per round: nobody reads more, and a malicious recipe can have 50,000."""

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
"""Names of keys in other tools that are too different from ours to be found by similarity."""


@dataclass
class ValidationResult:
    """``recipe`` has placeholders at the ``untrusted`` paths; it is None if the values could not be repaired."""

    recipe: Recipe | None = None
    findings: list[Issue] = field(default_factory=list)
    untrusted: set[KeyPath] = field(default_factory=set)

    def is_valid_at(self, paths: Iterable[KeyPath]) -> bool:
        """Whether none of the values at, above or below these paths had to be replaced."""
        return not any(_touches(path, bad) for path in paths for bad in self.untrusted)


def validate(values: dict[str, Any]) -> ValidationResult:
    """Validate values against the schema and find all errors."""
    verdict, data = ValidationResult(), copy.deepcopy(values)
    for path, message in list(islice(_foreign_values(data), MAX_ERRORS)):
        verdict.findings.append(Issue(f"{dotted(path)}: {message}", path))
        place = _schema_location(path, data)
        is_known = place is not None and place.path == path
        _replace_with_placeholder(
            data, place if place and is_known else _SchemaLocation(path, None, None, (), None), verdict
        )
    for _ in range(MAX_ROUNDS):
        try:
            verdict.recipe = Recipe.model_validate(data)
            break
        except ValidationError as error:
            # Unknown keys first: a misspelled key explains why the correct one is missing.
            errors = sorted(error.errors(include_url=False)[:MAX_ERRORS], key=lambda e: e["type"] != "extra_forbidden")
            for item in errors:
                _record(verdict, data, item)
    return verdict


def _foreign_values(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield values that TOML allows but recipes do not.

    Not left to pydantic, since arguments of models and optimizers accept any type.
    """
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _foreign_values(item, (*path, key))
    elif isinstance(value, datetime.date | datetime.time):
        yield path, "dates and times are not allowed in a recipe; put text into quotes"
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"expected a finite number, found {value}"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield path, "the number is too large (64 bits at most)"


def _record(verdict: ValidationResult, data: dict[str, Any], error: Any) -> None:
    """Record one error, unless it follows from a known one, and replace the value with a placeholder."""
    place = _schema_location(error["loc"], data)
    if place is None:
        return
    kind, path = error["type"], place.path
    if kind == "value_error":  # a rule within a table, which runs once its values are valid
        if verdict.is_valid_at([path]):
            verdict.findings.append(_broken_rule(place, str(error["ctx"]["error"])))
        _replace_with_placeholder(data, place, verdict)
        return
    known = verdict.untrusted if kind == "missing" else {finding.path for finding in verdict.findings}
    if path not in known:
        verdict.findings.append(_finding(place, error))
    if kind == "extra_forbidden":
        table = _at(data, path[:-1])
        verdict.untrusted |= {(*path[:-1], name) for name in _similar(place)[:1] if name not in table}
    _replace_with_placeholder(data, place, verdict)


@dataclass(frozen=True)
class _SchemaLocation:
    """A key path, its value, and its type in the schema."""

    path: KeyPath
    value: Any
    annotation: Any
    constraints: tuple[Any, ...]
    table: type[BaseModel] | None
    """The class that defines the key."""


def _schema_location(loc: tuple[str | int, ...], data: Any) -> _SchemaLocation | None:
    """Return the key that a pydantic location refers to; None for a union branch that does not match the value.

    For a union, pydantic's location contains the name of the branch in addition to the keys.
    """
    annotation: Any = Recipe
    constraints: tuple[Any, ...] = ()
    table: type[BaseModel] | None = None
    path: KeyPath = ()
    value = data
    for part in loc:
        annotation, inner = unwrap_annotation(annotation)
        constraints = (*constraints, *inner)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            models = [member for member in typing.get_args(annotation) if _is_model(member)]
            if not (models and isinstance(value, dict)):
                break
            if part != models[0].__name__:
                return None
            annotation = models[0]
            continue
        if _is_model(annotation):
            table, entry = annotation, annotation.model_fields.get(part)
            annotation, constraints = (entry.annotation, tuple(entry.metadata)) if entry else (None, ())
        elif typing.get_args(annotation):
            annotation, constraints, table = typing.get_args(annotation)[-1], (), None
        else:
            break
        path, value = (*path, part), _child(value, part)
    return _SchemaLocation(path, value, annotation, constraints, table)


def _finding(place: _SchemaLocation, error: Any) -> Issue:
    path, kind = place.path, error["type"]
    if kind == "extra_forbidden":
        what = f"table [{dotted(path)}]" if isinstance(error["input"], dict) else f"key {dotted(path)}"
        return Issue(f"unknown {what}", path, hint=_unknown_hint(place), at="key")
    if kind == "missing":
        return _missing(place)
    expected = "a table" if len(path) == 1 else describe_type(place.annotation, place.constraints)
    message = f"{dotted(path)}: expected {expected}, found {describe_value(place.value)}"
    return Issue(message, path, hint=_value_hint(place))


def _missing(place: _SchemaLocation) -> Issue:
    path = place.path
    if len(path) == 1:
        keys = [name for name, entry in place.annotation.model_fields.items() if entry.is_required()]
        return Issue(f"table [{path[0]}] is missing", path, hint=f"it needs at least {' and '.join(keys)}", at="key")
    expected = describe_type(place.annotation, place.constraints)
    return Issue(f"{_owner(path[:-1])} lacks {path[-1]}: expected {expected}", path, at="table")


def _unknown_hint(place: _SchemaLocation) -> str:
    assert place.table is not None, "only a table has unknown keys"
    if (new := renamed_key(place.path)) is not None:
        return f"renamed to {dotted((*place.path[:-1], new))}"
    name, similar = place.path[-1], _similar(place)
    if similar:
        return "did you mean " + " or ".join(similar) + "?"
    homes = _tables_with(str(name))
    if homes:
        return f"{name} belongs to " + " or ".join(f"[{home}]" for home in homes)
    elsewhere = [f"{home}.{OTHER_NAMES[str(name)]}" for home in _tables_with(OTHER_NAMES.get(str(name), ""))]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    known = list(place.table.model_fields)
    return (f"{_owner(place.path[:-1])} takes " if place.path[:-1] else "the tables are ") + ", ".join(known)


def _tables_with(key: str) -> list[str]:
    """Return the tables that have a key of this name."""
    return [t for t, entry in Recipe.model_fields.items() if key in getattr(entry.annotation, "model_fields", {})]


def _similar(place: _SchemaLocation) -> list[str]:
    """Return the known keys of this table that resemble an unknown one."""
    assert place.table is not None, "only a table has unknown keys"
    name, known = str(place.path[-1]), place.table.model_fields
    other = OTHER_NAMES.get(name)
    return [other] if other in known else similar_names(name, known, 2)


def _value_hint(place: _SchemaLocation) -> str | None:
    value = place.value
    if not isinstance(value, str):
        return None
    if place.path == ("data", "dataset") and (os.sep in value or value.startswith((".", "~"))):
        return f'for your own images: dataset = "imagefolder" and root = {toml_value(value)}'
    words = list(_words(place.annotation))
    if (new := RENAMED_VALUES.get(value, renamed_metric(value))) != value and new in words:
        return f'renamed to "{new}"'
    similar = similar_names(value, words, 1)
    if similar:
        return f'did you mean "{similar[0]}"?'
    expected = describe_type(place.annotation, place.constraints)
    is_plain = value in ("true", "false") or value.replace(".", "", 1).lstrip("+-").isdigit()
    return f"without quotes: {value}" if is_plain and ("number" in expected or "true" in expected) else None


def _words(annotation: Any) -> Iterator[str]:
    """Yield the strings that an annotation allows."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from (value for value in typing.get_args(annotation) if isinstance(value, str))
    else:
        for member in typing.get_args(annotation):
            yield from _words(member)


def _owner(path: KeyPath) -> str:
    """Format the path of a table: ``[optimizer]``, ``augment.train[0]``."""
    return f"[{dotted(path)}]" if all(isinstance(part, str) for part in path) else dotted(path)


def _broken_rule(place: _SchemaLocation, message: str) -> Issue:
    """Return the issue of a rule within one table, located at the key that the message starts with, if any."""
    first = message.split()[0].rstrip(":")
    is_key = _is_model(place.annotation) and first in place.annotation.model_fields
    path = (*place.path, first) if is_key else place.path
    return Issue(f"{_owner(place.path)}: {message}", path, at="key")


def _replace_with_placeholder(data: dict[str, Any], place: _SchemaLocation, verdict: ValidationResult) -> None:
    """Replace a bad value with its placeholder, or remove it, if necessary with the list or table around it."""
    path, name = place.path, str(place.path[-1])
    placeholder = PLACEHOLDERS.get((place.table.__name__, name)) if place.table else None
    entry = place.table.model_fields.get(name) if place.table else None
    if entry is not None and entry.is_required() and placeholder is None:
        path = path[:-1]
    while isinstance(path[-1], int) or not isinstance(_at(data, path[:-1]), dict):
        path = path[:-1]
    verdict.untrusted |= {place.path, path}
    table = _at(data, path[:-1])
    table.pop(path[-1], None)
    if placeholder is not None and path == place.path:
        table[name] = copy.deepcopy(placeholder)


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = _child(data, part)
    return data


def _child(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    if isinstance(value, list) and isinstance(part, int) and part < len(value):
        return value[part]
    return None


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _touches(one: KeyPath, other: KeyPath) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]
