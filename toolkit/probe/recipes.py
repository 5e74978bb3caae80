"""The recipes of `toolkit probe`: the user's data, one backbone, and one kind of head."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError
from toolkit.new_recipe.situation import KORNBLITH, Choice
from toolkit.new_recipe.source import merged
from toolkit.new_recipe.write import data_choices, recipe_text
from toolkit.probe.backbones import Backbone
from toolkit.recipe import load, loads_recipe
from toolkit.recipe.base import NAME_LENGTH
from toolkit.recipe.schema import Recipe

BATCH_SIZE = 128
EPOCHS = 10
"""Epochs of a linear layer that is trained by SGD."""

OF_THE_MODEL = (
    "image_size", "eval_image_size", "progressive_sizes", "resize", "crop", "interpolation", "normalize", "cache",
    "fixed_views",
)  # fmt: skip
"""Keys of [data] that are not taken from a recipe: the weights determine them, or they prevent cached features."""


@dataclass(frozen=True)
class ProbedData:
    """Data on which backbones are compared."""

    name: str
    choices: list[Choice]
    """The keys of [data]."""
    seed: int


@dataclass(frozen=True)
class Head:
    """A kind of head with its hyperparameters."""

    mode: str
    """The value of transfer.mode."""
    lr: float = 0.0
    """linear_probe: learning rate."""
    weight_decay: float = 0.0
    """linear_probe: weight decay."""

    @property
    def choices(self) -> list[Choice]:
        """The keys of the head."""
        if self.mode != "linear_probe":
            how = "L-BFGS" if self.mode == "logistic" else "k nearest neighbors"
            keys: dict[str, Any] = {"transfer.mode": self.mode, "transfer.refit": True}
            why = f"{how} on features of the frozen backbone; validation images are added after they have chosen"
            return [
                Choice("transfer", keys, why, KORNBLITH),
                Choice("optimizer", {"optimizer.name": "sgd", "optimizer.lr": 0.1}, "required, but not used", ""),
                Choice("length", {"train.epochs": 1, "train.batch_size": BATCH_SIZE}, "fitted once", ""),
            ]
        optimizer = {"optimizer.name": "sgd", "optimizer.lr": self.lr, "optimizer.weight_decay": self.weight_decay}
        train: dict[str, Any] = {"train.epochs": EPOCHS, "train.batch_size": BATCH_SIZE, "train.best_metric": "last"}
        return [
            Choice("transfer", {"transfer.mode": self.mode}, "only a new last layer is trained", KORNBLITH),
            Choice("optimizer", optimizer, "chosen by validation", ""),
            Choice("schedule", {"scheduler.name": "cosine"}, "falls to 0 along half a cosine", ""),
            Choice("length", train, "the last epoch's weights are kept, as in the comparison", ""),
        ]


def probed_data(argument: str, given: Mapping[str, Any], log: Callable[[str], None]) -> ProbedData:
    """Return the keys of [data] for a folder, archive, table, shards or data set, or those of a recipe's file.

    ``given``: keys of [data] that are not chosen. Raises UserError if backbones cannot be compared on the data.
    """
    if not argument.endswith(".toml"):
        name, choices, is_multi_label = data_choices(argument, given, log)
        data = ProbedData(name, choices, 0)
    else:
        recipe = load(argument, []).recipe
        is_multi_label = recipe.task.kind == "multi_label"
        keys = recipe.data.model_dump(mode="json", exclude_unset=True, exclude=set(OF_THE_MODEL))
        keys = merged(keys, given)
        chosen = Choice("data", {f"data.{key}": value for key, value in keys.items()}, f"as in {argument}", "")
        data = ProbedData(recipe.recipe.name, [chosen], recipe.recipe.seed)
    split: dict[str, Any] = next(
        (choice.keys["data.split"] for choice in data.choices if "data.split" in choice.keys), {}
    )
    if split.get("validation") == 0:
        raise UserError(f"{argument}: toolkit probe chooses by validation images: set data.split.validation")
    if is_multi_label:
        raise UserError(f"{argument}: toolkit probe compares backbones for images with exactly one class")
    return data


def recipe_of(data: ProbedData, backbone: Backbone, head: Head) -> tuple[str, Recipe]:
    """Return the text of a recipe, and the checked recipe."""
    model = {"model.source": backbone.source, "model.name": backbone.name, "model.weights": backbone.weights}
    choices = [*data.choices, Choice("model", model, "chosen by toolkit probe", ""), *head.choices]
    name = re.sub(r"[^A-Za-z0-9_-]", "-", f"{data.name}-{backbone.name}-{head.mode}")[:NAME_LENGTH]
    text = recipe_text(name, ["Written by: toolkit probe"], choices)
    if data.seed:
        text = text.replace("[recipe]\n", f"[recipe]\nseed = {data.seed}\n", 1)
    return text, loads_recipe(text)
