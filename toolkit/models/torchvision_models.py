"""torchvision's classification models by name and weights enum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from toolkit.errors import UserError, first_line
from toolkit.models.pretrained import StateDict, map_densenet
from toolkit.models.unknown_names import unknown_name
from toolkit.recipe.catalog import PretrainedInput
from toolkit.recipe.image_size import Size
from toolkit.recipe.schema import ModelConfig

AUXILIARY = ("AuxLogits", "aux1", "aux2")
"""Auxiliary classifiers in the published weights of Inception and GoogLeNet; never built here."""


def construct(
    table: ModelConfig, num_classes: int, channels: int, image_size: Size
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the randomly initialized model with ``num_classes`` outputs; also return the name of its last layer."""
    known = torchvision.models.list_models(module=torchvision.models)
    if table.name not in known:
        raise unknown_name("model.name", table.name, known)
    arguments = {**_own_arguments(table, channels, image_size), **table.args}
    try:
        module = torchvision.models.get_model(table.name, weights=None, num_classes=num_classes, **arguments)
    except Exception as error:  # a constructor may raise anything for bad arguments
        raise UserError(f"torchvision's {table.name} cannot be built: {first_line(error)}") from None
    if channels != 3:
        _change_channels(module, channels)
    return module, (_last_layer(module, num_classes),)


def published_state(table: ModelConfig, module: nn.Module, image_size: Size) -> StateDict:
    """Return the weights of the enum member, from torch's cache or downloaded. Raises UserError if that fails."""
    weights = _enum(table)
    try:
        state = dict(weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # URLError, OSError, RuntimeError for a wrong hash, ...
        target = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        raise UserError(
            f"weights {table.weights} of {table.name} could not be downloaded ({first_line(error)}). Without a "
            f"network: copy {weights.url} to {target}, or set model.weights = 'file:PATH'"
        ) from None
    return adapt(table, module, state, image_size)


def adapt(table: ModelConfig, module: nn.Module, state: StateDict, image_size: Size) -> StateDict:
    """Convert published parameter names and position embeddings to those of ``module``."""
    state = map_densenet(state)
    position = "encoder.pos_embedding"
    is_other_size = (
        isinstance(module, VisionTransformer)
        and position in state
        and (state[position].shape != module.encoder.pos_embedding.shape)
    )
    return dict(interpolate_embeddings(image_size[0], module.patch_size, state)) if is_other_size else state


def inputs(table: ModelConfig) -> PretrainedInput:
    """Return the preprocessing that the weights were trained with (for a file, that of the default weights)."""
    preset = _enum(table).transforms()
    return PretrainedInput(
        image_size=preset.crop_size[0],
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _enum(table: ModelConfig) -> Any:
    """Return the member of the weights enum; the default one for weights from a file."""
    members = torchvision.models.get_model_weights(table.name)
    if table.weights == "DEFAULT" or table.weights.startswith(("file:", "package:")):
        return members.DEFAULT
    if table.weights not in members.__members__:
        raise unknown_name("model.weights", table.weights, list(members.__members__))
    return members[table.weights]


def _own_arguments(table: ModelConfig, channels: int, image_size: Size) -> dict[str, Any]:
    """Return the arguments that torchvision's builders add when loading weights, and the input size if it is fixed."""
    if table.name in ("inception_v3", "googlenet"):
        # The published weights were trained in TensorFlow with another normalization, which the module converts to.
        is_pretrained = table.weights != "none"
        return {
            "aux_logits": False,
            "init_weights": not is_pretrained,
            "transform_input": is_pretrained and channels == 3,
        }
    if table.name.startswith("vit_"):
        return {"image_size": image_size[0]}  # always square: the recipe's checks refuse other shapes
    if table.name.startswith("maxvit_"):
        return {"input_size": image_size}
    return {}


def _change_channels(module: nn.Module, channels: int) -> None:
    """Replace the first convolution by one with ``channels`` input channels."""
    name, conv = next((n, layer) for n, layer in module.named_modules() if isinstance(layer, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    module.set_submodule(name, new)


def _last_layer(module: nn.Module, num_classes: int) -> str:
    """Return the name of the last registered layer with ``num_classes`` outputs."""
    layers: list[str] = [
        name
        for name, layer in module.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == num_classes)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == num_classes)
    ]
    return layers[-1]
