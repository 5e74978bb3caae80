"""A run's best model, ready to predict: built from the run directory alone, no data, no recipe file, no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from toolkit.data.preprocessing import Preprocessing
from toolkit.engine.checkpoint import load_weights
from toolkit.errors import UserError
from toolkit.models.build import build_model
from toolkit.recipe.schema import ModelTable

FORMAT = 1
"""Version of model.json."""


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode with what its inputs and outputs mean."""

    module: nn.Module
    """float32 [n, C, H, W] -> logits [n, K]."""
    preprocessing: Preprocessing
    classes: list[str]


def model_card(
    table: ModelTable, classes: list[str], preprocessing: Preprocessing, recipe_name: str, version: str
) -> dict[str, Any]:
    """Content of model.json, kept beside best.safetensors."""
    return {
        "format": FORMAT,
        "toolkit_version": version,
        "recipe": recipe_name,
        "model": table.model_dump(mode="json"),
        "classes": classes,
        "preprocessing": preprocessing.to_dict(),
    }


def load_model(folder: Path) -> TrainedModel:
    """The model in ``folder`` (a run's ``checkpoints``, or any folder with best.safetensors, model.json).

    Raises UserError where a file is missing, damaged, or does not belong to the other.
    """
    from toolkit.runs import read_json

    card = read_json(folder / "model.json")
    try:
        if card["format"] != FORMAT:
            raise UserError(f"{folder / 'model.json'} was written by another version of this toolkit")
        preprocessing = Preprocessing.from_dict(card["preprocessing"])
        table, classes = ModelTable.model_validate(card["model"]), list(card["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'model.json'} is damaged: {error}") from None
    built = build_model(table, len(classes), preprocessing.channels, preprocessing.image_size, load_weights=False)
    weights = load_weights(folder / "best.safetensors")
    try:
        built.module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder / 'best.safetensors'} does not belong to {folder / 'model.json'}: {error}") from None
    return TrainedModel(built.module.eval(), preprocessing, classes)
