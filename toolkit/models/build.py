"""Build a model from the recipe's [model] table: architecture, weights, head and layer groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import timm.models.resnet
import torchvision.models
from torch import nn

from toolkit.errors import UserError
from toolkit.models import timm_models, torchvision_models
from toolkit.models.convnet import ConvNet
from toolkit.models.dry_forward import DryForwardResult, input_shape, is_logits, probe
from toolkit.models.head import build_head, with_dropout
from toolkit.models.layer_groups import LayerGroup, find_stages, is_under
from toolkit.models.pretrained import (
    StateDict,
    WeightLoadReport,
    fit_state,
    is_file_reference,
    locate,
    read_state,
    without_prefix,
)
from toolkit.models.unknown_names import first_line
from toolkit.recipe.catalog import PretrainedInput
from toolkit.recipe.schema import ModelConfig

STEM = "conv1"
"""Name of a ResNet's first convolution in torchvision and timm."""


@dataclass
class ModelBundle:
    """A model ready for transfer and training."""

    module: nn.Module
    """Maps [N, channels, image_size, image_size] to logits [N, num_classes]; parameters keep the library's names."""
    heads: tuple[str, ...]
    """Dotted names of the last layers; more than one only for distilled transformers."""
    classifier: list[str]
    """Dotted names of the fully connected modules, including the heads."""
    stages: list[LayerGroup]
    """Layer groups from input to output. Every parameter is in exactly one; the last one is the head."""
    inputs: PretrainedInput | None
    """Input preprocessing that the weights were trained with; None without weights."""
    notes: list[str]
    """Notes for the user about the weights and the head."""
    new_stem: str | None
    """Dotted name of the first convolution if it is randomly initialized although the rest is pretrained."""

    @property
    def head(self) -> str:
        """Dotted name of the last layer."""
        return self.heads[0]


def build_model(
    table: ModelConfig, num_classes: int, channels: int, image_size: int, *, load_weights: bool = True
) -> ModelBundle:
    """Build a recipe's model. Without ``load_weights``, build the architecture only: nothing is read or downloaded.

    ``image_size`` is the height and width in pixels. Raises UserError for unknown names and arguments, for weights that
    are missing or belong to another architecture, for an image size that the architecture does not accept, and for
    models that PyTorch cannot build or that do not fit in memory.
    """
    try:
        return _built(table, num_classes, channels, image_size, load_weights)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise UserError(f"{table.name} cannot be built as [model] describes it: {first_line(error)}") from error


def _built(table: ModelConfig, num_classes: int, channels: int, image_size: int, load_weights: bool) -> ModelBundle:
    module, heads = _construct(table, num_classes, channels, image_size)
    if table.stem == "small":
        _shrink_stem(module, table)
    heads = _replace_head(table, module, heads, num_classes, channels, image_size)
    loaded = _load(table, module, heads, image_size, load_weights)
    used = _settle(table, module, heads, num_classes, channels, image_size)
    stages, classifier = find_stages(module, heads, used), _classifier_parts(module, heads)
    new_stem = STEM if STEM in loaded.new else None
    return ModelBundle(module, heads, classifier, stages, expected_input(table), loaded.notes, new_stem)


def expected_input(table: ModelConfig) -> PretrainedInput | None:
    """Return the published preprocessing of the recipe's weights, without building or downloading anything."""
    if table.weights == "none" or table.source == "toolkit":
        return None
    return timm_models.inputs(table) if table.source == "timm" else torchvision_models.inputs(table)


def _construct(
    table: ModelConfig, num_classes: int, channels: int, image_size: int
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the randomly initialized architecture and the dotted names of its last layers."""
    if table.source == "toolkit":
        assert table.convnet is not None
        return ConvNet(table.convnet, table.head, num_classes, channels, image_size), ("head",)
    if table.source == "timm":
        return timm_models.construct(table, num_classes, channels, image_size)
    return torchvision_models.construct(table, num_classes, channels, image_size)


def _shrink_stem(module: nn.Module, table: ModelConfig) -> None:
    """Replace a ResNet's stem by a 3x3 convolution of stride 1 without pooling, as in He et al. (2016) for CIFAR-10."""
    conv = getattr(module, STEM, None)
    is_resnet = isinstance(module, torchvision.models.ResNet | timm.models.resnet.ResNet)
    if not (is_resnet and isinstance(conv, nn.Conv2d) and conv.kernel_size == (7, 7)):
        raise UserError(f"model.stem = 'small' needs a ResNet that begins with one 7x7 convolution, not {table.name}")
    new = nn.Conv2d(conv.in_channels, conv.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    module.set_submodule(STEM, new)
    module.set_submodule("maxpool", nn.Identity())


def _replace_head(
    table: ModelConfig, module: nn.Module, heads: tuple[str, ...], num_classes: int, channels: int, image_size: int
) -> tuple[str, ...]:
    """Replace the architecture's head by the recipe's and return its dotted names. A ConvNet is built with it."""
    head = table.head
    if table.source == "toolkit":
        return heads
    if head.scope == "classifier":
        return (_replace_classifier(table, module, heads, num_classes, channels, image_size),)
    if not head.hidden and not head.batch_norm and not head.dropout:
        return heads
    for name in heads:
        layer = module.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"the last layer of {table.name} is a {type(layer).__name__}, not a Linear; "
                "leave out model.head's hidden, batch_norm and dropout"
            )
        is_same_layer = not head.hidden and not head.batch_norm
        new = with_dropout(layer, head.dropout) if is_same_layer else build_head(head, layer.in_features, num_classes)
        module.set_submodule(name, new)
    return heads


def _replace_classifier(
    table: ModelConfig, module: nn.Module, heads: tuple[str, ...], num_classes: int, channels: int, image_size: int
) -> str:
    """Replace all fully connected layers and the pooling before them by the recipe's head; return its name."""
    if table.source != "torchvision" or not isinstance(getattr(module, "avgpool", None), nn.Module):
        raise UserError(
            f"model.head.scope = 'classifier' needs a torchvision model that pools before its classifier, such as "
            f"AlexNet or VGG; for {table.name} use 'last_layer'"
        )
    container = heads[0].split(".")[0]
    module.set_submodule("avgpool", nn.Identity())
    try:
        features = input_shape(module, container, channels, image_size)
    except Exception as error:
        raise _unfit_size(table, image_size, error) from None
    new = build_head(table.head, math.prod(features), num_classes)
    module.set_submodule(container, new if len(features) == 1 else nn.Sequential(nn.Flatten(), new))
    return container


def _load(
    table: ModelConfig, module: nn.Module, heads: tuple[str, ...], image_size: int, load_weights: bool
) -> WeightLoadReport:
    """Load the recipe's weights. A replaced head or stem that does not match them keeps its initialization."""
    may_differ = [*heads, *([STEM] if table.stem == "small" else [])]
    is_file = is_file_reference(table.weights)
    if table.source == "toolkit" and table.weights != "none" and not is_file:
        raise UserError(
            f"model.weights = {table.weights!r}: a custom ConvNet has no published weights; use 'none' or 'file:PATH'"
        )
    if table.weights == "none" or (is_file and not load_weights):
        return WeightLoadReport([], [])
    if not load_weights:
        return WeightLoadReport([f"weights {table.weights}: not loaded"], may_differ)
    source = f"the weights file {table.weights}" if is_file else f"the weights {table.weights} of {table.name}"
    notes: list[str] = []
    if is_file:
        state, notes = _file_state(table, module, source)
    else:
        state = _published_state(table, image_size)
    if table.source == "torchvision":
        state = torchvision_models.adapt(module, state, image_size)
    elif table.source == "timm" and is_file:
        state = timm_models.adapt(table, module, state)
    loaded = fit_state(module, state, new=may_differ, source=source, ignored=torchvision_models.AUXILIARY)
    return WeightLoadReport([*notes, *loaded.notes], loaded.new)


def _file_state(table: ModelConfig, module: nn.Module, source: str) -> tuple[StateDict, list[str]]:
    """Return the state dict in the recipe's weights file, with wrapper prefixes removed from its names, and notes."""
    path, key = locate(table.weights), table.weights_key
    state, notes = read_state(path, key)
    is_prefix = key is not None and any(is_under(name, (key,)) for name in state)
    state, more = without_prefix(module, state, key if is_prefix else None, source)
    return state, [*notes, *more]


def _published_state(table: ModelConfig, image_size: int) -> StateDict:
    if table.source == "timm":
        return timm_models.published_state(table, image_size)
    return torchvision_models.published_state(table)


def _settle(
    table: ModelConfig, module: nn.Module, heads: tuple[str, ...], num_classes: int, channels: int, image_size: int
) -> tuple[str, ...]:
    """Check that images of this size give logits, and that all randomness is in dropout layers that can be keyed.

    Returns the names of the parameters in the order of their first use. Raises UserError if a check fails.
    """
    found = _probe(table, module, channels, image_size)
    for make_repeatable in (timm_models.use_plain_attention, timm_models.use_dropout_layer):
        if found.random and table.source == "timm":
            make_repeatable(module, heads)
            found = _probe(table, module, channels, image_size)
    if found.random:
        raise UserError(
            f"{table.name} draws random numbers in a way that cannot be repeated on another number of processes "
            f"({', '.join(found.random)}); leave out dropout, drop rates and random positions (rope_*_coords) in "
            "model.args (or set them to 0, or rope_rescale_coords to 1, "
            "if the model has some by default), and use model.head.dropout"
        )
    if not is_logits(found.output, num_classes):
        raise UserError(f"{table.name} does not return {num_classes} logits per image, so it is not a classifier")
    return found.used


def _probe(table: ModelConfig, module: nn.Module, channels: int, image_size: int) -> DryForwardResult:
    try:
        return probe(module, channels, image_size)
    except Exception as error:
        raise _unfit_size(table, image_size, error) from None


def _unfit_size(table: ModelConfig, image_size: int, error: Exception) -> UserError:
    return UserError(
        f"{table.name} cannot take images of {image_size}x{image_size} pixels (too small, or not a multiple of the "
        f"required size); choose another data.image_size. The error was: {first_line(error)}"
    )


def _classifier_parts(module: nn.Module, heads: tuple[str, ...]) -> list[str]:
    """Return the names of the modules that make up the classifier, as few as possible.

    A normalization layer before the last layer (as in ConvNeXt) belongs to the backbone, whichever module holds it.
    """
    parts: list[str] = ["pre_logits"] if _has_parameters(getattr(module, "pre_logits", None)) else []
    for container in dict.fromkeys(head.split(".")[0] for head in heads):
        inside = module.get_submodule(container)
        linear = [
            f"{container}.{name}" if name else container
            for name, layer in inside.named_modules()
            if isinstance(layer, nn.Linear)
        ]
        layers = tuple(dict.fromkeys([head for head in heads if is_under(head, (container,))] + linear))
        names = [f"{container}.{name}" for name, _ in inside.named_parameters()]
        if all(is_under(name, layers) for name in names):
            parts.append(container)
        else:
            parts += [one for one in layers if not is_under(one, tuple(other for other in layers if other != one))]
    return parts


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None
