"""Checks of names and arguments against the catalog: models, weights, transforms, optimizers and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from toolkit.recipe import catalog
from toolkit.recipe.diagnostics import Issue, dotted
from toolkit.recipe.schema import Recipe, TransformConfig
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value
from toolkit.recipe.type_descriptions import describe_value

MODEL, WEIGHTS = ("model", "name"), ("model", "weights")
SOURCE, OPTIMIZER = ("model", "source"), ("optimizer", "name")

WEIGHT_FILES = (".safetensors", ".pth", ".pt")
_MEASURES = ("loss", "accuracy", "top5_accuracy", "balanced_accuracy")
_OF_SPLITS = [f"{split}_{measure}" for split in ("val", "test") for measure in _MEASURES]
FIGURES = (
    *_OF_SPLITS,
    *(f"last_{name}" for name in _OF_SPLITS),
    "epochs_run",
    "seconds",
    "parameters",
    "trainable_parameters",
)
"""Metrics that [expected_metrics] can refer to: those of summary.json."""

_WEIGHTS_KEY = "model.weights decides which weights are loaded"
_LOADER = "it is an option of the library's loader, not an argument of the architecture; remove it"
OWN_MODEL_KEYS = {
    "num_classes": "the data set decides it",
    "in_chans": "data.channels decides it",
    "img_size": "data.image_size decides it",
    "image_size": "data.image_size decides it",
    "input_size": "data.image_size decides it",
    "aux_logits": "auxiliary classifiers are not trained",
    "pretrained": _WEIGHTS_KEY,
    "weights": _WEIGHTS_KEY,
    "checkpoint_path": _WEIGHTS_KEY,
    "pretrained_cfg": _WEIGHTS_KEY,
    "pretrained_cfg_overlay": _WEIGHTS_KEY,
    "features_only": "a classifier is needed, not its features; remove it",
    "out_indices": "a classifier is needed, not its features; remove it",
    "feature_cfg": "a classifier is needed, not its features; remove it",
    "feature_cls": "a classifier is needed, not its features; remove it",
    "pruned": "name the pruned architecture instead, such as efficientnet_b1_pruned",
    "model_name": "use model.name",
    "variant": "use model.name",
    "device": "the launcher decides it",
    "dtype": "train.precision decides it",
    **dict.fromkeys(
        (
            "pretrained_strict",
            "pretrained_filter_fn",
            "pretrained_model_args",
            "model_cls",
            "model_cfg",
            "kwargs_filter",
            "cache_dir",
            "scriptable",
            "exportable",
            "no_jit",
            "progress",
        ),
        _LOADER,
    ),
}
"""Arguments that are set by other recipe keys or are not constructor arguments of an architecture, and why."""

OWN_OPTIMIZER_KEYS = {key: f"optimizer.{key}" for key in ("lr", "momentum", "weight_decay")} | {
    "nesterov": 'optimizer.name = "nag"'
}

TENSOR_ONLY = ("GaussianNoise",)
"""Transforms that do not work on Pillow images."""

KINDS = {
    "text": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
}
"""Descriptions of the kinds of TOML values in catalog.json."""

_POLICIES = {
    "rand": r"(-(m|n|inc|mmax)\d+|-(mstd|p)\d+(\.\d+)?|-t\w+)*",
    "augmix": r"(-(m|w|b)\d+|-d-?\d+|-(mstd|a)\d+(\.\d+)?)*",
    "original": r"(-mstd\d+(\.\d+)?)*",
    "originalr": r"(-mstd\d+(\.\d+)?)*",
    "v0": r"(-mstd\d+(\.\d+)?)*",
    "v0r": r"(-mstd\d+(\.\d+)?)*",
    "3a": r"(-mstd\d+(\.\d+)?)*",
}
"""timm's policies and patterns of the options that each one accepts."""


def model_is_known(recipe: Recipe) -> Iterator[Issue]:
    """Check that the source provides the architecture."""
    source, name = recipe.model.source, recipe.model.name
    if source == "toolkit":
        if name != "convnet":
            yield _model_finding(f'source "toolkit" has one model, "convnet", not {toml_value(name)}', [])
        return
    known = catalog.model_names(source)
    if name in known:
        return
    other = "timm" if source == "torchvision" else "torchvision"
    base, _, tag = name.partition(".")
    if source == "timm" and base in catalog.excluded_models():
        yield _model_finding(f"{base} {catalog.excluded_models()[base]}", catalog.nearest(base, known))
    elif name in catalog.model_names(other):
        yield _model_finding(f"{source} has no model {toml_value(name)}, but {other} has", [], f'source = "{other}"')
    elif tag and base in known:
        hint = f'name = "{base}", weights = {toml_value(tag)}'
        yield _model_finding(f"{toml_value(name)} combines a model and its weights, which are separate keys", [], hint)
    else:
        yield _model_finding(f"{source} has no model {_shown(name)}", catalog.nearest(name, known))


def _model_finding(message: str, similar: list[str], hint: str | None = None) -> Issue:
    hint = hint or _did_you_mean(similar) or "`toolkit models` lists the known ones"
    return Issue(f"model.name: {message}", MODEL, (SOURCE,), hint)


def weights_are_known(recipe: Recipe) -> Iterator[Issue]:
    """Check that the weights are none, a file, or available for the architecture."""
    model = recipe.model
    if model.weights_key is not None and not model.weights.startswith(("file:", "package:")):
        message = f"model.weights_key: has no effect with weights = {toml_value(model.weights)}, which is not a file"
        yield Issue(message, ("model", "weights_key"), (WEIGHTS,), "remove it, or name a file in model.weights")
    if model.weights == "none":
        return
    if model.weights.startswith(("file:", "package:")):
        yield from _weights_file(model.weights)
    elif model.source == "toolkit":
        message = 'source "toolkit" has no pretrained weights; expected "none", "file:PATH" or "package:NAME/PATH"'
        yield Issue(f"model.weights: {message}", WEIGHTS, (SOURCE,))
    elif model.name in catalog.model_names(model.source):
        known = catalog.weights_names(model.source, model.name)
        if model.weights not in ([*known, "DEFAULT"] if known else []):
            yield _unknown_weights(model.name, model.weights, known)


def _weights_file(weights: str) -> Iterator[Issue]:
    kind, _, path = weights.partition(":")
    if not path.endswith(WEIGHT_FILES):
        yield Issue(f"model.weights: expected a file {', '.join(WEIGHT_FILES)}, found {_shown(path)}", WEIGHTS)
    elif kind == "package":
        parts = PurePosixPath(path).parts
        if len(parts) < 2 or ".." in parts or parts[0] == "/" or "\\" in path:
            yield Issue(f"model.weights: expected package:NAME/PATH within the package, found {_shown(path)}", WEIGHTS)


def _unknown_weights(model: str, weights: str, known: list[str]) -> Issue:
    if not known:
        hint = 'expected "none", "file:PATH" or "package:NAME/PATH"'
        return Issue(
            f"model.weights: {model} has no pretrained weights, so no {_shown(weights)}", WEIGHTS, (MODEL, SOURCE), hint
        )
    hint = (
        _did_you_mean(catalog.nearest(weights, known, 1))
        or f'{model} has {", ".join(known[:12])}; DEFAULT is the first; or "none"'
    )
    return Issue(f"model.weights: {model} has no weights {_shown(weights)}", WEIGHTS, (MODEL, SOURCE), hint)


def model_arguments_are_free(recipe: Recipe) -> Iterator[Issue]:
    """Check that model.args does not set what other keys set, nor load files."""
    for name in recipe.model.args:
        if name in OWN_MODEL_KEYS:
            path = ("model", "args", name)
            yield Issue(f"model.args: {name} cannot be given here", path, hint=OWN_MODEL_KEYS[name], at="key")
    if recipe.model.args and recipe.model.source == "toolkit":
        yield Issue(
            'model.args: has no effect with source = "toolkit"',
            ("model", "args"),
            (SOURCE,),
            severity="warning",
            at="key",
        )


def optimizer_is_known(recipe: Recipe) -> Iterator[Issue]:
    """Check that the optimizer exists and accepts its arguments."""
    table = recipe.optimizer
    known = catalog.optimizers().get(table.name)
    if known is None:
        reason = catalog.excluded_optimizers().get(table.name)
        message = f"{table.name} {reason}" if reason else f"unknown optimizer {_shown(table.name)}"
        similar = [] if reason else catalog.nearest(table.name, catalog.optimizers())
        hint = _did_you_mean(similar) or "`toolkit optimizers` lists the known ones"
        yield Issue(f"optimizer.name: {message}", OPTIMIZER, hint=hint)
        return
    if table.momentum is not None and not known["momentum"]:
        hint = "its counterpart is args.betas" if "betas" in known["args"] else "remove it"
        yield Issue(
            f"optimizer.momentum: {table.name} takes no momentum", ("optimizer", "momentum"), (OPTIMIZER,), hint
        )
    for name, value in table.args.items():
        yield from _optimizer_argument(table.name, known["args"], name, value)


def _optimizer_argument(optimizer: str, known: dict[str, Any], name: str, value: Any) -> Iterator[Issue]:
    path = ("optimizer", "args", name)
    if name in OWN_OPTIMIZER_KEYS:
        yield Issue(
            f"optimizer.args: {name} cannot be given here",
            path,
            (OPTIMIZER,),
            f"use {OWN_OPTIMIZER_KEYS[name]}",
            at="key",
        )
    elif name not in known:
        hint = (
            _did_you_mean(catalog.nearest(name, known, 1)) or f"{optimizer} takes {', '.join(known) or 'no arguments'}"
        )
        yield Issue(f"optimizer.args: {optimizer} takes no argument {_shown(name)}", path, (OPTIMIZER,), hint, at="key")
    elif known[name] is not None and not _is_like(value, known[name]):
        expected = (
            f"a list of {len(known[name])} numbers" if isinstance(known[name], list) else KINDS[_kind(known[name])]
        )
        yield Issue(f"{dotted(path)}: expected {expected}, found {describe_value(value)}", path, (OPTIMIZER,))


def transforms_are_known(recipe: Recipe) -> Iterator[Issue]:
    """Check that each augmentation exists and accepts its arguments."""
    for split in ("train", "validation", "test"):
        for index, entry in enumerate(getattr(recipe.augment, split)):
            yield from _transform(entry, ("augment", split, index))


def _transform(entry: TransformConfig, path: KeyPath) -> Iterator[Issue]:
    known = catalog.transforms().get(entry.name)
    name_path = (*path, "name")
    if known is None:
        reason = catalog.excluded_transforms().get(entry.name)
        message = f"{entry.name} {reason}" if reason else f"unknown transform {_shown(entry.name)}"
        similar = [] if reason else catalog.nearest(entry.name, catalog.transforms())
        hint = _did_you_mean(similar) or "`toolkit transforms` lists the known ones"
        yield Issue(f"{dotted(name_path)}: {message}", name_path, hint=hint)
        return
    given = entry.arguments
    for argument, value in given.items():
        yield from _transform_argument(entry.name, known, argument, value, (*path, argument))
    missing = [name for name, about in known.items() if about["required"] and name not in given]
    if missing:
        hint = ", ".join(f"{name} = {_words(known[name])}" for name in missing)
        yield Issue(f"{dotted(path)}: {entry.name} needs {' and '.join(missing)}", path, (name_path,), f"give {hint}")


def _transform_argument(
    transform: str, known: dict[str, Any], argument: str, value: Any, path: KeyPath
) -> Iterator[Issue]:
    name_path = (*path[:-1], "name")
    if argument not in known:
        similar = catalog.nearest(argument, [*known, "apply_p", "stage"], 1)
        renamed = f"renamed to {dotted((*path[:-1], 'stage'))}" if argument == "at" else ""
        hint = renamed or _did_you_mean(similar) or f"{transform} takes {', '.join(known) or 'no arguments'}"
        yield Issue(
            f"{dotted(path[:-1])}: {transform} takes no argument {_shown(argument)}", path, (name_path,), hint, at="key"
        )
        return
    about = known[argument]
    kinds = about["kinds"]
    is_kind = not kinds or _kind(value) in kinds or (_kind(value) == "integer" and "number" in kinds)
    if not is_kind or value not in about.get("choices", [value]):
        similar = catalog.nearest(value, about.get("choices", []), 1) if isinstance(value, str) else []
        message = f"{dotted(path)}: expected {_words(about)}, found {describe_value(value)}"
        yield Issue(message, path, (name_path,), _did_you_mean(similar))
    elif argument == "p" and not 0 <= value <= 1:
        yield Issue(f"{dotted(path)}: expected a number from 0 to 1, found {describe_value(value)}", path, (name_path,))


def places_are_free(recipe: Recipe) -> Iterator[Issue]:
    """Check that at most one transform replaces the crop, and that transforms that need a tensor get one."""
    for split in ("train", "validation", "test"):
        taken: KeyPath | None = None
        entries = getattr(recipe.augment, split)
        takes_both = any(entry.stage == "resize_crop" for entry in entries)
        for index, entry in enumerate(entries):
            path = ("augment", split, index, "stage")
            if entry.name in TENSOR_ONLY and entry.stage not in (None, "tensor"):
                yield Issue(
                    f'{dotted(path)}: {entry.name} needs a tensor, so stage = "tensor"', path, ((*path[:-1], "name"),)
                )
            if entry.stage == "before_crop" and takes_both:
                message = f'{dotted(path)}: "before_crop" is not possible if another entry has "resize_crop"'
                yield Issue(message, path, (("augment", split),))
            if entry.stage in ("crop", "resize_crop"):
                if taken:
                    message = f"{dotted(path)}: {dotted(taken)} already replaces the crop"
                    yield Issue(message, path, (("augment", split),), "only one transform can")
                taken = taken or path


def policy_is_known(recipe: Recipe) -> Iterator[Issue]:
    """Check that augment.auto_augment is a valid timm policy string."""
    policy = recipe.augment.auto_augment
    if policy is None:
        return
    path, name = ("augment", "auto_augment"), policy.split("-")[0]
    if name not in _POLICIES:
        hint = _did_you_mean(catalog.nearest(name, _POLICIES, 1)) or "a policy starts with " + ", ".join(_POLICIES)
        yield Issue(f"augment.auto_augment: unknown policy {_shown(policy)}", path, hint=hint)
    elif not re.fullmatch(_POLICIES[name], policy[len(name) :], re.ASCII):
        hint = "for example rand-m9-n2-mstd0.5, augmix-m3-w3 or original-mstd0.5"
        yield Issue(f"augment.auto_augment: {name} does not accept {_shown(policy[len(name) :])}", path, hint=hint)


def figures_are_known(recipe: Recipe) -> Iterator[Issue]:
    """Check that [expected_metrics] names metrics that a run has, with accuracies from 0 to 1."""
    for name, expected in recipe.expected_metrics.items():
        path = ("expected_metrics", name)
        if name not in FIGURES:
            hint = _did_you_mean(catalog.nearest(name, FIGURES, 2)) or "the metrics are " + ", ".join(FIGURES)
            yield Issue(f"[expected_metrics]: a run has no metric {_shown(name)}", path, hint=hint, at="key")
        for bound in ("at_least", "at_most", "value"):
            value = getattr(expected, bound)
            if name.endswith("accuracy") and value is not None and not 0 <= value <= 1:
                message = f"{dotted((*path, bound))}: accuracies are numbers from 0 to 1, found {describe_value(value)}"
                yield Issue(
                    message, (*path, bound), hint=f"{value / 100:g} is {value:g} %" if 1 < value <= 100 else None
                )


def _did_you_mean(names: Iterable[str]) -> str | None:
    similar = list(names)
    return "did you mean " + " or ".join(similar) + "?" if similar else None


def _shown(text: str) -> str:
    return describe_value(text).removeprefix("the text ")


def _kind(value: Any) -> str:
    """Return the kind of a TOML value, named as in catalog.json."""
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "text"), (list, "array"))
    return next((kind for cls, kind in kinds if isinstance(value, cls)), "table")


def _is_like(value: Any, default: Any) -> bool:
    """Whether an optimizer argument has the same kind as its default."""
    if isinstance(default, list):
        return isinstance(value, list) and len(value) == len(default) and all(map(_is_like, value, default))
    if _kind(default) in ("integer", "number"):
        return _kind(value) in ("integer", "number")
    return _kind(value) == _kind(default)


def _words(about: dict[str, Any]) -> str:
    if "choices" in about:
        return " or ".join(toml_value(choice) for choice in about["choices"])
    return " or ".join(KINDS[kind] for kind in about["kinds"]) or "a value"
