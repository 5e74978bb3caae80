"""Effective configuration of a recipe, found by building each component: data, transforms, model, optimizer, schedule.

Two recipes with equal fingerprints train the same model on the same data in the same way, even if their texts differ.
Models are built without memory (PyTorch's meta device), optimizers take real steps on tiny parameters, schedules are
evaluated; weights are not loaded, and data is opened only if the [data] tables of the recipes differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.augment.mixup import mixup_config
from toolkit.augment.transforms import build_transform, is_deterministic
from toolkit.data.dataset_info import DATASETS
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.preprocessing import Preprocessing, resolve_channels, resolve_preprocessing
from toolkit.data.splits import split_dataset, split_hash
from toolkit.errors import UserError
from toolkit.models.build import ModelBundle, build_model, expected_input
from toolkit.models.transfer import apply_transfer, new_param_groups
from toolkit.recipe.catalog import weights_names
from toolkit.recipe.schema import DataConfig, OptimizerConfig, Recipe, TransferConfig
from toolkit.training.lr_schedule import gamma_of, learning_rate
from toolkit.training.optimizer import build_optimizer

STEPS = 8
"""Number of optimizer steps to take; enough for Lookahead, which acts every sixth step."""

ELSEWHERE = {"root", "download", "workers", "cache", "on_bad_image", "max_bad_fraction"}
"""Keys of [data] that set where images come from and how fast, not which images or how they look."""

SOME_CLASSES = 10
LOOKS = {"channels", "image_size", "resize", "crop", "interpolation", "normalize", "exif", "value_range"}
"""Keys of [data] that set how images look, not which images."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Component:
    """A component that is built: the recipe values it depends on, and how to fingerprint it."""

    depends: Callable[[Recipe], Any]
    """Plain values; equal values give equal components, so nothing is built twice."""
    find: Callable[[Recipe], Hashable]


class EffectiveConfigs:
    """Fingerprints of many recipes; each component is built once."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Hashable] = {}

    def whole(self, recipe: Recipe) -> None:
        """Build everything that depends on the recipe alone. Raises UserError if something cannot be built."""
        for name in ("transforms", "model", "transfer", "optimizer"):
            self._mark(name, recipe)

    def differ(self, one: Recipe, other: Recipe) -> bool:
        """Return whether training would differ."""
        return any(self._mark(name, one) != self._mark(name, other) for name in self._parts_in_doubt([one, other]))

    def groups(self, recipes: Sequence[Recipe]) -> list[list[int]]:
        """Return groups of two or more indices of equivalent recipes."""
        parts = self._parts_in_doubt(recipes)
        found: dict[tuple[Hashable, ...], list[int]] = {}
        for index, recipe in enumerate(recipes):
            found.setdefault(tuple(self._mark(name, recipe) for name in parts), []).append(index)
        return [group for group in found.values() if len(group) > 1]

    def _parts_in_doubt(self, recipes: Sequence[Recipe]) -> list[str]:
        """Return the components that depend on values in which the recipes differ."""
        return [name for name, part in PARTS.items() if len({_text(part.depends(recipe)) for recipe in recipes}) > 1]

    def _mark(self, name: str, recipe: Recipe) -> Hashable:
        part = PARTS[name]
        key = (name, _text(part.depends(recipe)))
        if key not in self.known:
            self.known[key] = part.find(recipe)
        return self.known[key]


def _text(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=lambda table: table.model_dump())


# -- data -------------------------------------------------------------------------------------------------------------


def _data_keys(recipe: Recipe) -> Any:
    data = recipe.data.model_dump(exclude=ELSEWHERE)
    return data | {"pretrained": recipe.model.weights != "none", "root": recipe.data.root}


def _images(recipe: Recipe) -> Hashable:
    """Return which images are in each split; if the data is not available, the recipe values that determine it."""
    try:
        dataset = _open(recipe.data)
        return split_hash(dataset, split_dataset(dataset, recipe.data))
    except UserError:
        table = recipe.data
        return _text([table.dataset, table.root, table.split, table.images_per_class, table.test_images_per_class])


def _open(data: DataConfig) -> Dataset:
    return open_dataset(data.model_copy(update={"download": False}))


def _preprocessing(recipe: Recipe) -> Preprocessing:
    """Return the preprocessing as in training; channel means that would have to be computed are -1."""
    data = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")
    facts = DATASETS[data.dataset]
    size, channels = facts.size, facts.channels
    if size is None and data.image_size is None and expected_input(recipe.model) is None:
        size = _open(data).native_size
    return resolve_preprocessing(
        data, expected_input(recipe.model), size, channels, lambda plain: ((-1.0,) * plain.channels, plain.std)
    )


def _transforms(recipe: Recipe) -> Hashable:
    """Return every step from an image to the model's input, per split."""
    preprocessing = _preprocessing(recipe)
    told = [repr(preprocessing)]
    for split in ("train", "validation", "test"):
        steps = build_transform(split, recipe.augment, preprocessing).steps
        told += [f"{step.p:g} {_ADDRESS.sub('', repr(step))}" for step in steps if step.probability]
    if not is_deterministic("train", recipe.augment):
        told.append(f"{recipe.data.fixed_views} versions")
    return tuple(told)


def _mixing(recipe: Recipe) -> Hashable:
    settings = mixup_config(recipe.augment)
    both = settings is not None and settings.mixup > 0 and settings.cutmix > 0
    mixed = settings and (
        settings.mixup,
        settings.cutmix,
        settings.mixup_prob,
        settings.mixup_switch_prob if both else None,
    )
    return mixed, recipe.augment.label_smoothing, recipe.augment.auto_augment


# -- model ------------------------------------------------------------------------------------------------------------


def _model_keys(recipe: Recipe) -> Any:
    table = recipe.model
    weights = table.weights
    if weights == "DEFAULT":
        weights = next(iter(weights_names(table.source, table.name)), weights)
    rest = {key: value for key, value in table.model_dump().items() if key not in ("weights", "convnet")}
    return {**rest, "weights": weights, "convnet": table.convnet if table.source == "toolkit" else None}


def _shape_keys(recipe: Recipe) -> Any:
    data = recipe.data
    return [data.dataset, data.root if data.dataset == "imagefolder" else "", data.background_class, data.channels,
            data.image_size]  # fmt: skip


def _classes(recipe: Recipe) -> int:
    """Return the number of classes; a constant if only missing data could tell, as it is the same for all runs."""
    known = DATASETS[recipe.data.dataset].class_count(background_class=recipe.data.background_class)
    if known is not None:
        return known
    try:
        return len(_open(recipe.data).classes)
    except UserError:
        return SOME_CLASSES


def _build(recipe: Recipe, *, on_meta: bool = True) -> ModelBundle:
    preprocessing = _preprocessing(recipe)
    size = preprocessing.image_size, preprocessing.channels

    def build() -> ModelBundle:
        return build_model(recipe.model, _classes(recipe), size[1], size[0], load_weights=False)

    if on_meta:
        try:
            with torch.device("meta"):
                return build()
        except Exception:  # some constructors read values; errors in the recipe are raised again below
            pass
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _model(recipe: Recipe) -> Hashable:
    """Return the modules, parameter shapes, weights name and, if the recipe sets them, a hash of the initial values."""
    built = _build(recipe)
    shapes = tuple((name, tuple(value.shape)) for name, value in built.module.state_dict().items())
    start = _start(recipe) if recipe.model.source == "toolkit" else ""
    return str(built.module), shapes, _model_keys(recipe)["weights"], start, _text(recipe.model.args)


def _start(recipe: Recipe) -> str:
    """Return a hash of the initial parameters of a ConvNet described in the recipe, which sets the initialization."""
    digest = hashlib.sha256()
    for value in _build(recipe, on_meta=False).module.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _transfer_keys(recipe: Recipe) -> Any:
    return [_model_keys(recipe), _shape_keys(recipe), recipe.transfer, recipe.train.epochs]


def _transfer(recipe: Recipe) -> Hashable:
    """Return which parameters are trainable from which epoch, and the modules that run in evaluation mode."""
    built = _build(recipe)
    transfer = apply_transfer(built, recipe.transfer)
    told: list[Hashable] = [tuple(transfer.trainable)]
    for epoch in range(1, recipe.train.epochs + 1):
        if transfer.unfreeze_for_epoch(epoch):
            told.append((epoch, tuple(transfer.trainable)))
    transfer.train_mode()
    told.append(tuple(name for name, module in built.module.named_modules() if not module.training))
    return tuple(told)


# -- optimizer and schedule -------------------------------------------------------------------------------------------


def _optimizer(recipe: Recipe) -> Hashable:
    """Return the parameter groups, and a hash of the optimizer's effect on tiny stand-in parameters."""
    built = _build(recipe)
    apply_transfer(built, recipe.transfer)
    groups = new_param_groups(built, recipe.transfer, recipe.optimizer, [])
    told = tuple((g["name"], len(g["params"]), g["lr"], g["lr_scale"], g["weight_decay"]) for g in groups)
    settings = sorted({(group["lr"], group["weight_decay"]) for group in groups})
    return told, _steps(recipe.optimizer, settings), _later_scales(built, recipe.transfer, recipe.optimizer)


def _later_scales(built: ModelBundle, transfer: TransferConfig, table: OptimizerConfig) -> Hashable:
    """Return the parameter groups of the stages that gradual unfreezing unfreezes later."""
    for parameter in built.module.parameters():
        parameter.requires_grad_(True)
    if transfer.mode != "gradual":
        return ()
    return tuple((g["name"], g["lr"], g["weight_decay"]) for g in new_param_groups(built, transfer, table, []))


def _steps(table: OptimizerConfig, settings: Sequence[tuple[float, float]]) -> Hashable:
    """Return a hash of the parameters after a few steps, or the optimizer's settings if it cannot step on its own."""
    random = torch.Generator().manual_seed(0)
    groups = [
        {"params": [nn.Parameter(torch.randn(shape, generator=random)) for shape in ((4, 3), (4,))],
         "lr": lr, "weight_decay": decay}
        for lr, decay in settings
    ]  # fmt: skip
    optimizer = build_optimizer(table, groups)
    parameters = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    digest = hashlib.sha256()
    try:
        for _ in range(STEPS):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=random)
            optimizer.step()
        for parameter in parameters:
            digest.update(parameter.detach().numpy().tobytes())
    except Exception:  # an optimizer that needs a closure or a graph
        told = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return repr(told)
    return digest.hexdigest()


def _optimizer_keys(recipe: Recipe) -> Any:
    return [_model_keys(recipe), _shape_keys(recipe), recipe.transfer, recipe.optimizer]


def _schedule(recipe: Recipe) -> Hashable:
    """Return the learning rate at every quarter of an epoch; for plateau, also the rule by which it falls."""
    table, epochs = recipe.scheduler, recipe.train.epochs
    curve = tuple(learning_rate(table, recipe.optimizer.lr, step / 4, epochs) for step in range(4 * epochs))
    falls = table.name == "plateau" and gamma_of(table) < 1 and table.patience < epochs
    rule = (table.metric, gamma_of(table), table.patience, table.threshold, table.threshold_mode, table.min_lr)
    return curve, rule if falls else None


def _stopping(recipe: Recipe) -> Hashable:
    """Return when training ends and which epoch is kept."""
    table, epochs = recipe.early_stopping, recipe.train.epochs
    stops = table.patience is not None and table.patience < epochs
    return epochs, recipe.train.best_metric, (table.patience, table.metric, table.min_delta) if stops else None


# -- all --------------------------------------------------------------------------------------------------------------


def _loop_keys(recipe: Recipe) -> Any:
    """Return values that the training loop uses directly: batches, loss, precision, and speed settings."""
    train = recipe.train.model_dump(exclude={"epochs", "best_metric", "log_every"})
    data = recipe.data
    return [recipe.recipe.seed, train, recipe.augment.run_on, data.workers, data.cache, data.on_bad_image,
            data.max_bad_fraction]  # fmt: skip


PARTS = {
    "images": Component(lambda r: [r.data.model_dump(exclude=ELSEWHERE | LOOKS), r.data.root], _images),
    "transforms": Component(lambda r: [_data_keys(r), _model_keys(r), r.augment], _transforms),
    "mixing": Component(lambda r: r.augment, _mixing),
    "model": Component(lambda r: [_model_keys(r), _shape_keys(r)], _model),
    "transfer": Component(_transfer_keys, _transfer),
    "optimizer": Component(_optimizer_keys, _optimizer),
    "schedule": Component(lambda r: [r.scheduler, r.optimizer.lr, r.train.epochs], _schedule),
    "stopping": Component(lambda r: [r.early_stopping, r.train.epochs, r.train.best_metric], _stopping),
    "loop": Component(_loop_keys, lambda r: _text(_loop_keys(r))),
}
