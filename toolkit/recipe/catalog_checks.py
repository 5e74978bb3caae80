"""Checks of names and arguments against the catalog: models, weights, data sets, transforms, optimizers, metrics."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from toolkit.metrics import EXPECTED_METRICS
from toolkit.plugins import PREFIX
from toolkit.recipe import catalog
from toolkit.recipe.diagnostics import Issue, dotted, error, warning
from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value
from toolkit.recipe.training_schema import LOSS_KEYS
from toolkit.recipe.type_descriptions import describe_value, shown
from toolkit.similar_names import did_you_mean

LIST = "`toolkit {}` lists the known ones"
WEIGHT_FILES = (".safetensors", ".pth", ".pt")
_WEIGHTS_KEY = "model.weights determines which weights are loaded"
_LOADER = "it is an option of the library's loader, not an argument of the architecture; remove it"
OWN_MODEL_KEYS = {
    "num_classes": "the data set determines it",
    "in_chans": "data.channels determines it",
    "img_size": "data.image_size determines it",
    "image_size": "data.image_size determines it",
    "input_size": "data.image_size determines it",
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
    "device": "the launcher determines it",
    "dtype": "train.precision determines it",
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
"""Arguments that model.args must not contain, and why: other keys set them, or no constructor takes them."""

OWN_OPTIMIZER_KEYS = {key: f"optimizer.{key}" for key in ("lr", "momentum", "weight_decay")} | {
    "nesterov": 'optimizer.name = "nag"'
}

LOAD_DATASET: dict[str, dict[str, Any]] = {
    **{key: {"kinds": ["text"], "required": False} for key in ("name", "revision", "data_dir", "split")},
    "data_files": {"kinds": [], "required": False},
}
"""Arguments of load_dataset (Hugging Face's `datasets`) that a recipe can set, in the catalog's format."""

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
"""timm's augmentation policies, with a regular expression for the options that each one accepts."""


def model(recipe: Recipe) -> Iterator[Issue]:
    """Check that the source provides the architecture, and that model.args has no arguments that other keys set."""
    table = recipe.model
    if table.is_published:
        yield from _architecture(table.source, table.name)
    elif table.source == "toolkit" and table.name != "convnet":
        text = f'source "toolkit" has one model, "convnet", not {toml_value(table.name)}'
        yield error("model.name", text, "model.source", hint=LIST.format("models"))
    for name in table.args if table.source != "plugin" else ():
        if name in OWN_MODEL_KEYS:
            path = ("model", "args", name)
            yield Issue(f"model.args: {name} cannot be given here", path, hint=OWN_MODEL_KEYS[name], at="key")
    if table.args and table.source == "toolkit":
        yield warning("model.args", 'has no effect with source = "toolkit"', "model.source", at="key")


def _architecture(source: str, name: str) -> Iterator[Issue]:
    known, excluded = catalog.model_names(source), catalog.excluded_models()
    if name in known:
        return
    other = "timm" if source == "torchvision" else "torchvision"
    base, _, tag = name.partition(".")
    if source == "timm" and base in excluded:
        text, hint = f"{base} {excluded[base]}", did_you_mean(base, known, 3)
    elif name in catalog.model_names(other):
        text, hint = f"{source} has no model {toml_value(name)}, but {other} has", f'source = "{other}"'
    elif tag and base in known:
        text = f"{toml_value(name)} combines a model and its weights, which are separate keys"
        hint = f'name = "{base}", weights = {toml_value(tag)}'
    else:
        text, hint = f"{source} has no model {shown(name)}", did_you_mean(name, known, 3)
    yield error("model.name", text, "model.source", hint=hint or LIST.format("models"))


def weights(recipe: Recipe) -> Iterator[Issue]:
    """Check that the weights are none, a file, or available for the architecture."""
    table = recipe.model
    is_file = table.weights.startswith(("file:", "package:"))
    if table.weights_key is not None and not is_file:
        text = f"has no effect with weights = {toml_value(table.weights)}, which is not a file"
        yield error("model.weights_key", text, "model.weights", hint="remove it, or set model.weights to a file")
    if is_file:
        yield from _weights_file(table.weights)
    elif table.weights == "none":
        return
    elif not table.is_published:
        text = f'source "{table.source}" has no pretrained weights; expected "none", "file:PATH" or "package:NAME/PATH"'
        yield error("model.weights", text, "model.source")
    elif table.name in catalog.model_names(table.source):
        known = catalog.weights_names(table.source, table.name)
        if not known:
            text = f"{table.name} has no pretrained weights, so no {shown(table.weights)}"
            hint = 'expected "none", "file:PATH" or "package:NAME/PATH"'
            yield error("model.weights", text, "model.name", "model.source", hint=hint)
        elif table.weights not in (*known, "DEFAULT"):
            text = f"{table.name} has no weights {shown(table.weights)}"
            listed = f'expected "none" or one of {", ".join(known[:12])} (DEFAULT is the first)'
            hint = did_you_mean(table.weights, known, otherwise=listed)
            yield error("model.weights", text, "model.name", "model.source", hint=hint)


def _weights_file(name: str) -> Iterator[Issue]:
    kind, _, path = name.partition(":")
    if not path.endswith(WEIGHT_FILES):
        yield error("model.weights", f"expected a file {', '.join(WEIGHT_FILES)}, found {shown(path)}")
    elif kind == "package":
        parts = PurePosixPath(path).parts
        if len(parts) < 2 or ".." in parts or parts[0] == "/" or "\\" in path:
            yield error("model.weights", f"expected package:NAME/PATH within the package, found {shown(path)}")


def optimizer(recipe: Recipe) -> Iterator[Issue]:
    """Check that the optimizer exists and accepts its arguments."""
    table, known = recipe.optimizer, catalog.optimizers()
    if table.name.startswith(PREFIX):
        return
    if table.name not in known:
        yield _unknown_name("optimizer", ("optimizer", "name"), table.name, known, catalog.excluded_optimizers())
        return
    arguments = known[table.name]["args"]
    if table.momentum is not None and not known[table.name]["momentum"]:
        hint = "its counterpart is args.betas" if "betas" in arguments else "remove it"
        yield error("optimizer.momentum", f"{table.name} takes no momentum", "optimizer.name", hint=hint)
    for name, value in table.args.items():
        path = ("optimizer", "args", name)
        if name in OWN_OPTIMIZER_KEYS:
            message, hint = f"optimizer.args: {name} cannot be given here", f"use {OWN_OPTIMIZER_KEYS[name]}"
            yield Issue(message, path, (("optimizer", "name"),), hint, at="key")
        elif name not in arguments:
            yield _unknown_argument(table.name, path, arguments, ("optimizer", "name"))
        elif arguments[name] is not None and not _is_like(value, arguments[name]):
            default = arguments[name]
            expected = f"a list of {len(default)} numbers" if isinstance(default, list) else KINDS[_kind(default)]
            yield error(path, f"expected {expected}, found {describe_value(value)}", "optimizer.name")


def loss(recipe: Recipe) -> Iterator[Issue]:
    """Check that a built-in loss has all arguments that the recipe sets."""
    table = recipe.train
    for name in table.loss_args.model_extra or () if not table.loss.startswith(PREFIX) else ():
        known = [key for key, user in LOSS_KEYS.items() if user == table.loss]
        yield _unknown_argument(table.loss, ("train", "loss_args", name), known, ("train", "loss"))


def torchvision_dataset(recipe: Recipe) -> Iterator[Issue]:
    """Check that torchvision has the data set and that it accepts the arguments."""
    table, known = recipe.data, catalog.datasets()
    if table.dataset != "torchvision":
        return
    if table.name is None:
        hint = 'for example name = "OxfordIIITPet"; `toolkit datasets torchvision/` lists the known ones'
        yield error("data.name", 'must be given with dataset = "torchvision"', "data.dataset", hint=hint, at="table")
    elif table.name not in known:
        yield _unknown_name("data set", ("data", "name"), table.name, known, catalog.excluded_datasets())
    else:
        yield from arguments(table.name, table.args, known[table.name], ("data", "args"), ("data", "name"))


def huggingface_dataset(recipe: Recipe) -> Iterator[Issue]:
    """Check that ``data.name`` is set for a Hugging Face data set, and check the arguments of load_dataset."""
    table = recipe.data
    if table.dataset != "huggingface":
        return
    if table.name is None:
        hint = 'a folder, or the name of a data set on the Hub, for example name = "ylecun/mnist"'
        yield error("data.name", 'must be given with dataset = "huggingface"', "data.dataset", hint=hint, at="table")
    yield from arguments("load_dataset", table.args, LOAD_DATASET, ("data", "args"), ("data", "dataset"))


def transforms(recipe: Recipe) -> Iterator[Issue]:
    """Check that each augmentation exists and accepts its arguments."""
    known = catalog.transforms()
    for split in ("train", "validation", "test"):
        for index, entry in enumerate(getattr(recipe.augment, split)):
            path: KeyPath = ("augment", split, index)
            if entry.name.startswith(PREFIX):
                continue
            if entry.name in known:
                name, keys = (*path, "name"), ("apply_p", "stage")
                yield from arguments(entry.name, entry.arguments, known[entry.name], path, name, keys)
            else:
                excluded = catalog.excluded_transforms()
                yield _unknown_name("transform", (*path, "name"), entry.name, known, excluded)


def arguments(
    owner: str,
    given: dict[str, Any],
    known: dict[str, Any],
    path: KeyPath,
    name: KeyPath,
    keys: tuple[str, ...] = (),
) -> Iterator[Issue]:
    """Check the arguments of a transform, data set or plugin.

    ``known``: descriptions of the arguments that ``owner`` accepts. ``path``: key of the table with the arguments.
    ``name``: key that selects the owner. ``keys``: other keys that are allowed in the table.
    """
    for argument, value in given.items():
        if argument in known:
            yield from _argument(known[argument], value, (*path, argument), name)
        else:
            issue = _unknown_argument(owner, (*path, argument), known, name, keys)
            is_old = argument == "at" and "stage" in keys
            yield replace(issue, hint=f"renamed to {dotted((*path, 'stage'))}") if is_old else issue
    missing = [key for key, info in known.items() if info["required"] and key not in given]
    if missing:
        hint = "give " + ", ".join(f"{key} = {_expected(known[key])}" for key in missing)
        yield error(path, f"{owner} needs {' and '.join(missing)}", name, hint=hint)


def _argument(info: dict[str, Any], value: Any, path: KeyPath, name: KeyPath) -> Iterator[Issue]:
    kind, kinds, choices = _kind(value), info["kinds"], info.get("choices", [])
    is_kind = not kinds or kind in kinds or (kind == "integer" and "number" in kinds)
    if not is_kind or (choices and value not in choices):
        hint = did_you_mean(value, choices) if isinstance(value, str) else None
        yield error(path, f"expected {_expected(info)}, found {describe_value(value)}", name, hint=hint)
    elif path[0] == "augment" and path[-1] == "p" and not 0 <= value <= 1:
        yield error(path, f"expected a number from 0 to 1, found {describe_value(value)}", name)


def _unknown_name(kind: str, path: KeyPath, name: str, known: Iterable[str], excluded: dict[str, str]) -> Issue:
    """Return the issue for a transform, optimizer or data set that a recipe cannot use."""
    listed = LIST.format(f"{kind.replace(' ', '')}s")
    if name in excluded:
        return error(path, f"{name} {excluded[name]}", hint=listed)
    return error(
        path,
        f"unknown {kind.replace('dataset', 'data set')} {shown(name)}",
        hint=did_you_mean(name, known, 3, otherwise=listed),
    )


def _unknown_argument(
    owner: str, path: KeyPath, known: Collection[str], name: KeyPath, keys: tuple[str, ...] = ()
) -> Issue:
    """Return the issue for an argument that a transform or optimizer does not have. ``keys``: other allowed keys."""
    takes = f"{owner} takes {', '.join(known) or 'no arguments'}"
    hint = did_you_mean(str(path[-1]), [*known, *keys], otherwise=takes)
    message = f"{dotted(path[:-1])}: {owner} takes no argument {shown(str(path[-1]))}"
    return Issue(message, path, (name,), hint, at="key")


def stages(recipe: Recipe) -> Iterator[Issue]:
    """Check that at most one transform replaces the crop, and that transforms that need a tensor get one."""
    for split in ("train", "validation", "test"):
        taken: KeyPath | None = None
        entries = getattr(recipe.augment, split)
        takes_both = any(entry.stage == "resize_crop" for entry in entries)
        for index, entry in enumerate(entries):
            path, related = ("augment", split, index, "stage"), f"augment.{split}"
            if entry.name in TENSOR_ONLY and entry.stage not in (None, "tensor"):
                yield error(path, f'{entry.name} needs a tensor: set stage = "tensor"', (*path[:-1], "name"))
            if entry.stage == "before_crop" and takes_both:
                yield error(path, '"before_crop" is not possible if another entry has "resize_crop"', related)
            if entry.stage in ("crop", "resize_crop"):
                if taken:
                    text = f"{dotted(taken)} already replaces the crop"
                    yield error(path, text, related, hint="only one transform can replace it")
                taken = taken or path


def auto_augment(recipe: Recipe) -> Iterator[Issue]:
    """Check that augment.auto_augment is a valid timm policy string."""
    policy = recipe.augment.auto_augment
    if policy is None:
        return
    name = policy.split("-")[0]
    if name not in _POLICIES:
        hint = did_you_mean(name, _POLICIES, otherwise="a policy starts with " + ", ".join(_POLICIES))
        yield error("augment.auto_augment", f"unknown policy {shown(policy)}", hint=hint)
    elif not re.fullmatch(_POLICIES[name], policy[len(name) :], re.ASCII):
        hint = "for example rand-m9-n2-mstd0.5, augmix-m3-w3 or original-mstd0.5"
        yield error("augment.auto_augment", f"{name} does not accept {shown(policy[len(name) :])}", hint=hint)


def expected_metrics(recipe: Recipe) -> Iterator[Issue]:
    """Check that [expected_metrics] names metrics that a run has, with accuracies from 0 to 1."""
    for name, expected in recipe.expected_metrics.items():
        path = ("expected_metrics", name)
        metric = EXPECTED_METRICS.get(name)
        if metric is None:
            hint = did_you_mean(name, EXPECTED_METRICS, 2, otherwise="the metrics are " + ", ".join(EXPECTED_METRICS))
            yield Issue(f"[expected_metrics]: a run has no metric {shown(name)}", path, hint=hint, at="key")
        for bound in ("at_least", "at_most", "value"):
            value = getattr(expected, bound)
            is_fraction = metric is not None and metric.measure.unit == "%"
            if is_fraction and value is not None and not 0 <= value <= 1:
                message = f"{dotted((*path, bound))}: accuracies are numbers from 0 to 1, found {describe_value(value)}"
                yield Issue(
                    message, (*path, bound), hint=f"{value / 100:g} is {value:g} %" if 1 < value <= 100 else None
                )


def _kind(value: Any) -> str:
    """Return the kind of a TOML value, named as in catalog.json."""
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "text"), (list, "array"))
    return next((kind for cls, kind in kinds if isinstance(value, cls)), "table")


def _is_like(value: Any, default: Any) -> bool:
    """Return whether an optimizer argument has the same kind as its default."""
    if isinstance(default, list):
        return isinstance(value, list) and len(value) == len(default) and all(map(_is_like, value, default))
    if _kind(default) in ("integer", "number"):
        return _kind(value) in ("integer", "number")
    return _kind(value) == _kind(default)


def _expected(info: dict[str, Any]) -> str:
    if "choices" in info:
        return " or ".join(toml_value(choice) for choice in info["choices"])
    return " or ".join(KINDS[kind] for kind in info["kinds"]) or "a value"
