"""Effective configuration of a recipe, found by building each component: data, transforms, model, optimizer, schedule.

Two recipes with equal effective configurations train the same model on the same data in the same way, even if their
texts differ. Models are built on PyTorch's meta device, which allocates no memory; optimizers take real steps on tiny
parameters; schedules are evaluated. Weights are not loaded, and data are opened only if the recipes' [data] tables
differ.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.augment.mixup import is_mixed
from toolkit.augment.transforms import build_transform, is_deterministic
from toolkit.data.dataset_info import info_of
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.preprocessing import (
    Preprocessing,
    eval_preprocessing,
    resolve_channels,
    resolve_preprocessing,
    training_stages,
)
from toolkit.data.sampling import RunLength
from toolkit.data.splits import split_dataset, split_hash
from toolkit.errors import UserError
from toolkit.models.build import ModelBundle, build_model, expected_input
from toolkit.models.transfer import apply_transfer, param_groups
from toolkit.plugins import PREFIX
from toolkit.recipe.catalog import weights_names
from toolkit.recipe.schema import DataConfig, OptimizerConfig, Recipe
from toolkit.recipe.training_schema import LOSS_KEYS
from toolkit.training.lr_schedule import gamma_of, scheduled_rate
from toolkit.training.optimizer import build_optimizer
from toolkit.training.whitening import whitens

STEPS = 8
"""Number of optimizer steps to take."""

ASSUMED_EPOCHS, ASSUMED_STEPS = 100, 100
"""Assumed number of epochs, and of steps per epoch, with which the schedules of runs with train.steps are compared."""

ASSUMED_CLASSES = 10
"""Number of classes assumed if the data set is needed to count them and is not available."""

NOT_BUILT = {"download", "workers", "cache", "on_bad_image", "max_bad_fraction"}
"""Keys of [data] that set how images are read, not which images or how they look."""

APPEARANCE = {
    *("channels", "image_size", "eval_image_size", "progressive_sizes", "resize", "fill", "crop", "interpolation"),
    *("normalize", "exif", "value_range", "page"),
}
"""Keys of [data] that set how images look, not which images."""

SHAPE = {"dataset", "root", "class_folders", "background_class", "channels", "image_size"}
"""Keys of [data] that set the shape of the model's input and output."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Component:
    """A component of a run: the recipe values that it depends on, and a function that builds and describes it."""

    depends: Callable[[Recipe], Any]
    """Returns plain values; components with equal values are equal and built only once."""
    build: Callable[[Recipe], Hashable]


class EffectiveConfigs:
    """Effective configurations of many recipes; each component is built once."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Hashable] = {}

    def check(self, recipe: Recipe) -> None:
        """Build the components that do not need data. Raises UserError if one cannot be built."""
        for name in ("transforms", "network"):
            self._built(name, recipe)

    def differ(self, one: Recipe, other: Recipe) -> bool:
        """Return whether the two recipes train differently."""
        return not self.groups([one, other])

    def groups(self, recipes: Sequence[Recipe]) -> list[list[int]]:
        """Group equivalent recipes; return the indices of each group of two or more.

        Components whose values are the same in all recipes are not built.
        """
        names = [name for name, part in PARTS.items() if len({_text(part.depends(recipe)) for recipe in recipes}) > 1]
        found: dict[tuple[Hashable, ...], list[int]] = {}
        for index, recipe in enumerate(recipes):
            found.setdefault(tuple(self._built(name, recipe) for name in names), []).append(index)
        return [group for group in found.values() if len(group) > 1]

    def _built(self, name: str, recipe: Recipe) -> Hashable:
        key = name, _text(PARTS[name].depends(recipe))
        if key not in self.known:
            self.known[key] = PARTS[name].build(recipe)
        return self.known[key]


def _text(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=lambda table: table.model_dump())


# -- data -------------------------------------------------------------------------------------------------------------


def _images(recipe: Recipe) -> Hashable:
    """Return a hash of the images in each split; without the data, the recipe values that determine them."""
    table = recipe.data
    try:
        dataset = _open(table)
        return split_hash(dataset, split_dataset(dataset, table))
    except UserError:
        named = [table.dataset, table.name, table.args, table.root]
        return _text([*named, table.split, table.images_per_class, table.test_images_per_class])


def _open(data: DataConfig) -> Dataset:
    return open_dataset(data.model_copy(update={"download": False}))


def _preprocessing(recipe: Recipe) -> Preprocessing:
    """Return the preprocessing of training; channel means that would have to be computed from data are set to -1."""
    data = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")
    facts = info_of(data.dataset, data.name)
    size, channels = facts.size, facts.channels
    if size is None and data.image_size is None and expected_input(recipe.model) is None:
        size = _open(data).native_size
    return resolve_preprocessing(
        data, expected_input(recipe.model), size, channels, lambda plain: ((-1.0,) * plain.channels, plain.std)
    )


def _transforms(recipe: Recipe) -> Hashable:
    """Describe all steps from an image to the model's input, per split, and the mixing of images and labels."""
    preprocessing, weights = _preprocessing(recipe), expected_input(recipe.model)
    stages = [("train", stage) for stage in training_stages(preprocessing, recipe.data, weights)]
    evaluated = eval_preprocessing(preprocessing, recipe.data, weights)
    found = [repr(preprocessing)]
    for split, inputs in (*stages, ("validation", evaluated), ("test", evaluated)):
        steps = build_transform(split, recipe.augment, inputs).steps
        found += [f"{step.p:g} {_ADDRESS.sub('', repr(step))}" for step in steps if step.probability]
    if recipe.transfer.mode == "lp_ft" and not is_deterministic("train", recipe.augment):
        found.append(f"augmentation in the probe: {recipe.transfer.probe_augment}")
    if not is_deterministic("train", recipe.augment):
        found.append(f"{recipe.data.fixed_views} versions")
    mixed = recipe.augment
    if is_mixed(mixed):
        both = mixed.mixup > 0 and mixed.cutmix > 0
        found += [repr((mixed.mixup, mixed.cutmix, mixed.mixup_prob, both and mixed.mixup_switch_prob))]
    return tuple(found), recipe.augment.label_smoothing, recipe.augment.auto_augment, recipe.augment.repeats


# -- model, transfer and optimizer ------------------------------------------------------------------------------------


def _network(recipe: Recipe) -> Hashable:
    """Describe the model and its initial values, the parameters trained in each epoch, and the optimizer's updates."""
    built, weights = _build(recipe), recipe.model.weights
    if weights == "DEFAULT":
        weights = next(iter(weights_names(recipe.model.source, recipe.model.name)), weights)
    shapes = tuple((name, tuple(value.shape)) for name, value in built.module.state_dict().items())
    start = _start(recipe) if recipe.model.source == "toolkit" else ""
    model = str(built.module), shapes, weights, start, _text(recipe.model.args), whitens(recipe.model)

    transfer = apply_transfer(built, recipe.transfer)
    groups = param_groups(built, recipe.transfer, recipe.optimizer)
    trained = [(0, tuple(transfer.trainable))]
    for epoch in range(1, transfer.last_unfreezing + 1):
        if transfer.unfreeze_for_epoch(epoch):
            trained.append((epoch, tuple(transfer.trainable)))
    transfer.train_mode()
    in_eval_mode = tuple(name for name, module in built.module.named_modules() if not module.training)

    if recipe.transfer.is_fitted:  # no optimizer is used
        values = recipe.transfer.C if recipe.transfer.mode == "logistic" else recipe.transfer.k
        return model, tuple(trained), in_eval_mode, recipe.transfer.mode, tuple(values), recipe.transfer.refit
    unfrozen: list[dict[str, Any]] = []
    if recipe.transfer.mode in ("gradual", "lp_ft"):
        built.module.requires_grad_(True)
        unfrozen = param_groups(built, recipe.transfer, recipe.optimizer)
    described = tuple((g["name"], len(g["params"]), g["lr"], g["lr_scale"], g["weight_decay"]) for g in groups)
    later = tuple((g["name"], g["lr"], g["weight_decay"]) for g in unfrozen)
    table = recipe.transfer
    lora = (table.lora_rank, table.lora_alpha) if table.mode == "lora" else ()
    settings = sorted({(group["lr"], group["weight_decay"]) for group in groups})
    steps = _steps(recipe.optimizer, settings), _around_steps(recipe.optimizer), recipe.transfer.l2_sp
    return model, tuple(trained), in_eval_mode, lora, described, later, steps, tuple(recipe.transfer.wise)


def _classes(recipe: Recipe) -> int:
    """Return the number of classes; :data:`ASSUMED_CLASSES` if it cannot be determined without the missing data."""
    known = info_of(recipe.data.dataset, recipe.data.name).class_count(background_class=recipe.data.background_class)
    if known is not None:
        return known
    try:
        return len(_open(recipe.data).classes)
    except UserError:
        return ASSUMED_CLASSES


def _build(recipe: Recipe, *, on_meta: bool = True) -> ModelBundle:
    preprocessing = _preprocessing(recipe)
    size = preprocessing.image_size, preprocessing.channels

    def build() -> ModelBundle:
        return build_model(recipe.model, _classes(recipe), size[1], size[0], load_weights=False)

    if on_meta:
        try:
            with torch.device("meta"):
                return build()
        except Exception:  # some constructors need real tensors; errors in the recipe are raised again below
            pass
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _start(recipe: Recipe) -> str:
    """Return a hash of the initial parameters of the toolkit's ConvNet, whose recipe sets the initialization."""
    digest = hashlib.sha256()
    for value in _build(recipe, on_meta=False).module.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _steps(table: OptimizerConfig, settings: Sequence[tuple[float, float]]) -> str:
    """Return a hash of tiny parameters after a few optimizer steps with each (learning rate, weight decay).

    For an optimizer that needs more than gradients, return its settings instead.
    """
    random = torch.Generator().manual_seed(0)
    parameters = [[nn.Parameter(torch.randn(shape, generator=random)) for shape in ((4, 3), (4,))] for _ in settings]
    groups = [
        {"params": params, "lr": lr, "weight_decay": decay}
        for params, (lr, decay) in zip(parameters, settings, strict=True)
    ]
    optimizer = build_optimizer(table, groups)
    digest = hashlib.sha256()
    try:
        for _ in range(STEPS):
            for parameter in itertools.chain(*parameters):
                parameter.grad = torch.randn(parameter.shape, generator=random)
            optimizer.step()
    except Exception:  # an optimizer that needs a closure or a graph
        return repr([{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups])
    for parameter in itertools.chain(*parameters):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _around_steps(table: OptimizerConfig) -> Hashable:
    """Return the settings of SAM, Lookahead and Schedule-Free."""
    sam = None if table.sam is None else (table.sam, table.sam_adaptive)
    lookahead = None if table.lookahead is None else (table.lookahead, table.lookahead_alpha)
    return sam, lookahead, table.schedule_free


# -- schedule ---------------------------------------------------------------------------------------------------------


def _schedule(recipe: Recipe) -> Hashable:
    """Return the steps, the learning rate at every quarter of an epoch, and the settings of plateau and stopping.

    Runs with train.steps are compared over :data:`ASSUMED_EPOCHS`, because the number of images is not known.
    """
    table, epochs, stopping = recipe.scheduler, recipe.scheduled_epochs, recipe.early_stopping
    length = RunLength(ASSUMED_STEPS, math.ceil(ASSUMED_STEPS * (recipe.train.epochs or ASSUMED_EPOCHS)))
    curve = tuple(scheduled_rate(recipe, step / 4, length) for step in range(math.ceil(4 * length.exact_epochs)))
    plateau, end = None, None
    if table.name == "plateau" and gamma_of(table) < 1 and table.patience < epochs:
        plateau = table.metric, gamma_of(table), table.patience, table.threshold, table.threshold_mode, table.min_lr
    if stopping.patience is not None and stopping.patience < epochs:
        end = stopping.patience, stopping.metric, stopping.min_delta
    return recipe.train.steps, curve, plateau, end, recipe.train.best_metric


# -- all --------------------------------------------------------------------------------------------------------------


def _loop_values(recipe: Recipe) -> Any:
    """Return the recipe values that the training loop uses directly: batches, loss, precision, speed settings."""
    train = recipe.train.model_dump(exclude={"epochs", "steps", "best_metric", "log_every", "loss_args"})
    loss = {key: getattr(recipe.train.loss_args, key) for key, name in LOSS_KEYS.items() if name == recipe.train.loss}
    reading = recipe.data.model_dump(include=NOT_BUILT - {"download"})
    if recipe.train.loss.startswith(PREFIX):
        loss = recipe.train.loss_args.given
    return [recipe.recipe.seed, recipe.task, train, loss, recipe.augment.run_on, reading, recipe.distillation]


PARTS = {
    "images": Component(lambda r: r.data.model_dump(exclude=NOT_BUILT | APPEARANCE), _images),
    "transforms": Component(
        lambda r: [
            r.data.model_dump(exclude=NOT_BUILT),
            r.model,
            r.augment,
            r.transfer.mode == "lp_ft",
            r.transfer.probe_augment,
        ],
        _transforms,
    ),
    "network": Component(lambda r: [r.data.model_dump(include=SHAPE), r.model, r.transfer, r.optimizer], _network),
    "schedule": Component(
        lambda r: [
            r.scheduler,
            r.optimizer.lr,
            r.early_stopping,
            r.transfer,
            r.train.epochs,
            r.train.steps,
            r.train.best_metric,
        ],
        _schedule,
    ),
    "loop": Component(lambda r: [_loop_values(r), r.train.loss_args], lambda r: _text(_loop_values(r))),
}
