"""User-defined models, by the name of their plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from toolkit.errors import UserError, first_line
from toolkit.models.dry_forward import probe
from toolkit.models.pretrained import StateDict
from toolkit.plugins import find
from toolkit.recipe.image_size import Size, as_value, size_text
from toolkit.recipe.schema import ModelConfig


def construct(
    table: ModelConfig, num_classes: int, channels: int, image_size: Size
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the randomly initialized model with ``num_classes`` outputs; also return the names of its last layers.

    Raises UserError if the factory fails or does not return a module, if the module cannot take the images or is random
    in evaluation, or if it has no last layer that can be found.
    """
    module = find("model", table.name).build(
        table.args, num_classes=num_classes, channels=channels, image_size=as_value(image_size)
    )
    if not isinstance(module, nn.Module):
        raise UserError(f"the model {table.name} must be a torch.nn.Module, not {type(module).__name__}")
    try:
        random = probe(module, channels, image_size, training=False).random
        used = probe(module, channels, image_size).used
    except Exception as error:
        raise UserError(
            f"the model {table.name} fails for a batch of {channels} x {size_text(image_size)} images, float32: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None
    if random:
        raise UserError(
            f"the model {table.name} draws random numbers in evaluation mode ({', '.join(random)}), but there its "
            "logits must be a function of the image; draw them only if self.training"
        )
    return module, _last_layers(table.name, module, used, num_classes)


def adapt(table: ModelConfig, module: nn.Module, state: StateDict, image_size: Size) -> StateDict:
    """Return a file's weights unchanged: their names must be those of ``module``."""
    return state


def _last_layers(name: str, module: nn.Module, used: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return the names of what ``get_classifier()`` returns, as in timm; without it, of the last layer that is used.

    That is the last module whose weight has ``num_classes`` rows, in the order of first use (``used``: parameters).
    """
    get_classifier: Any = getattr(module, "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        layers = list(classifier) if isinstance(classifier, list | tuple | nn.ModuleList) else [classifier]
        return tuple(name for name, layer in module.named_modules() if any(layer is one for one in layers))
    weights = [one for one in used if one.endswith(".weight") and module.get_parameter(one).shape[0] == num_classes]
    if not weights:
        raise UserError(
            f"the model {name} has no last layer with {num_classes} outputs, the number of classes: use the argument "
            "num_classes, or define get_classifier() to return the last layer, as timm's models do"
        )
    return (weights[-1].removesuffix(".weight"),)
