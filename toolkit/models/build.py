"""Build a model from the recipe's [model] table: architecture, weights, head and layer groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import timm.models.resnet
import torchvision.models
from torch import nn

from toolkit.errors import UserError, first_line
from toolkit.models import plugin_models, timm_models, torchvision_models
from toolkit.models.convnet import ConvNet
from toolkit.models.dry_forward import DryForwardResult, input_shape, is_logits, probe
from toolkit.models.head import build_head, with_dropout
from toolkit.models.layer_groups import LayerGroup, find_stages, is_under
from toolkit.models.lora import merge_lora
from toolkit.models.pretrained import (
    StateDict,
    WeightLoadReport,
    fit_state,
    is_file_reference,
    locate,
    read_state,
    without_prefix,
)
from toolkit.models.unknown_names import check_arguments
from toolkit.recipe.catalog import PretrainedInput
from toolkit.recipe.image_size import Size, as_size, size_text
from toolkit.recipe.schema import ModelConfig

STEM = "conv1"
"""Name of a ResNet's first convolution in torchvision and timm."""


LIBRARIES: dict[str, ModuleType] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "plugin": plugin_models,
}
"""Modules by model.source. Each has the functions construct and adapt; those of libraries, inputs and published_state
too."""


@dataclass
class ModelBundle:
    """A model ready for transfer and training."""

    module: nn.Module
    """Maps [N, channels, height, width] to logits [N, num_classes]; parameters keep the library's names."""
    heads: tuple[str, ...]
    """Dotted names of the last layers; more than one only for distilled transformers."""
    classifier: list[str]
    """Dotted names of the modules that make up the classifier, including the heads."""
    stages: list[LayerGroup]
    """Layer groups from input to output. Every parameter is in exactly one; the last one is the head."""
    inputs: PretrainedInput | None
    """Input preprocessing that the weights were trained with; None without weights."""
    notes: list[str]
    """Notes for the user about the weights, the head and randomness."""
    new_stem: str | None
    """Dotted name of the first convolution if it is randomly initialized although the rest is pretrained."""
    unkeyed: tuple[str, ...] = ()
    """Operations outside dropout layers that draw random numbers in training. They cannot be keyed by example."""
    has_new_head: bool = False
    """Whether the last layer is randomly initialized although the rest is pretrained."""

    @property
    def not_exact(self) -> list[str]:
        """Sentences that say why results depend on the number of processes."""
        drawn = ", ".join(self.unkeyed)
        return [f"the model draws random numbers that are not keyed by example: {drawn}"] if drawn else []

    @property
    def head(self) -> str:
        """Dotted name of the last layer."""
        return self.heads[0]


def build_model(
    table: ModelConfig, num_classes: int, channels: int, image_size: int | Size, *, load_weights: bool = True
) -> ModelBundle:
    """Build a recipe's model. Without ``load_weights``, build the architecture only: nothing is read or downloaded.

    ``image_size`` is the height and width in pixels, or one number for both. Raises UserError for unknown names and
    arguments, for weights that are missing or belong to another architecture, for an image size that the architecture
    does not accept, and for models that PyTorch cannot build or that do not fit in memory.
    """
    try:
        return _Builder(table, num_classes, channels, as_size(image_size)).build(load_weights)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise UserError(f"{table.name} cannot be built as [model] describes it: {first_line(error)}") from error


def check_sizes(built: ModelBundle, table: ModelConfig, channels: int, sizes: Iterable[Size]) -> None:
    """Raise UserError unless a model also accepts inputs of ``sizes``, in addition to that it was built for."""
    for size in sizes:
        try:
            probe(built.module, channels, size)
        except Exception as error:
            advice = ""
            if table.source == "timm" and getattr(built.module, "pretrained_cfg", {}).get("fixed_input_size"):
                advice = "; timm's ViTs accept other sizes with model.args = { dynamic_img_size = true }"
            raise UserError(
                f"{table.name}, built for data.image_size, does not accept images of {size_text(size)} pixels{advice}; "
                f"change data.eval_image_size or data.progressive_sizes. The error was: {first_line(error)}"
            ) from None


def expected_input(table: ModelConfig) -> PretrainedInput | None:
    """Return the published preprocessing of the recipe's weights, without building or downloading anything."""
    if table.weights == "none" or not table.is_published:
        return None
    found: PretrainedInput = LIBRARIES[table.source].inputs(table)
    return found


class _Builder:
    """Builds one model from the recipe's [model] table."""

    def __init__(self, table: ModelConfig, num_classes: int, channels: int, image_size: Size) -> None:
        self.table, self.library = table, LIBRARIES.get(table.source)
        self.num_classes, self.channels, self.image_size = num_classes, channels, image_size
        self.module: nn.Module
        self.heads: tuple[str, ...]
        if self.library is None:
            assert table.convnet is not None
            self.module, self.heads = ConvNet(table.convnet, table.head, num_classes, channels, image_size), ("head",)
        else:
            if table.is_published:
                check_arguments(table.args)
            self.module, self.heads = self.library.construct(table, num_classes, channels, image_size)

    def build(self, load_weights: bool) -> ModelBundle:
        """Adapt the architecture to the recipe, load the weights and check the result."""
        if self.table.stem == "small":
            self._shrink_stem()
        if self.library is not None:  # a ConvNet is already built with its head
            self._replace_head()
        loaded = self._load(load_weights)
        found = self._probe_and_key()
        return ModelBundle(
            self.module,
            self.heads,
            _classifier_parts(self.module, self.heads),
            find_stages(self.module, self.heads, found.used),
            expected_input(self.table),
            [*loaded.notes, *self._randomness_note(found.random)],
            STEM if STEM in loaded.new else None,
            found.random,
            any(head in loaded.new for head in self.heads),
        )

    def _shrink_stem(self) -> None:
        """Replace a ResNet's stem with a 3x3 convolution of stride 1 without pooling, as in He et al. 2016."""
        conv = getattr(self.module, STEM, None)
        is_resnet = isinstance(self.module, torchvision.models.ResNet | timm.models.resnet.ResNet)
        if not (is_resnet and isinstance(conv, nn.Conv2d) and conv.kernel_size == (7, 7)):
            raise UserError(
                f"model.stem = 'small' needs a ResNet that begins with one 7x7 convolution, not {self.table.name}"
            )
        new = nn.Conv2d(conv.in_channels, conv.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        self.module.set_submodule(STEM, new)
        self.module.set_submodule("maxpool", nn.Identity())

    def _replace_head(self) -> None:
        """Replace the architecture's head with the recipe's, if it defines one."""
        head = self.table.head
        if head.scope == "classifier":
            self.heads = (self._replace_classifier(),)
            return
        if not head.hidden and not head.batch_norm and not head.dropout:
            return
        for name in self.heads:
            layer = self.module.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise UserError(
                    f"the last layer of {self.table.name} is a {type(layer).__name__}, not a Linear; "
                    "leave out model.head's hidden, batch_norm and dropout"
                )
            is_same_layer = not head.hidden and not head.batch_norm
            new = (
                with_dropout(layer, head.dropout)
                if is_same_layer
                else build_head(head, layer.in_features, self.num_classes)
            )
            self.module.set_submodule(name, new)

    def _replace_classifier(self) -> str:
        """Replace all fully connected layers and the pooling before them with the recipe's head; return its name."""
        if self.table.source != "torchvision" or not isinstance(getattr(self.module, "avgpool", None), nn.Module):
            raise UserError(
                "model.head.scope = 'classifier' needs a torchvision model that pools before its classifier, such as "
                f"AlexNet or VGG; for {self.table.name} use 'last_layer'"
            )
        container = self.heads[0].split(".")[0]
        self.module.set_submodule("avgpool", nn.Identity())
        try:
            features = input_shape(self.module, container, self.channels, self.image_size)
        except Exception as error:
            raise self._unfit_size(error) from None
        new = build_head(self.table.head, math.prod(features), self.num_classes)
        self.module.set_submodule(container, new if len(features) == 1 else nn.Sequential(nn.Flatten(), new))
        return container

    def _load(self, load_weights: bool) -> WeightLoadReport:
        """Load the recipe's weights. A replaced head or stem that does not match them keeps its initialization."""
        table, module = self.table, self.module
        may_differ = [*self.heads, *([STEM] if table.stem == "small" else [])]
        is_file = is_file_reference(table.weights)
        if not table.is_published and table.weights != "none" and not is_file:
            own = "a custom ConvNet" if self.library is None else f"the plugin {table.name}"
            raise UserError(
                f"model.weights = {table.weights!r}: {own} has no published weights; use 'none' or 'file:PATH'"
            )
        if table.weights == "none" or (is_file and not load_weights):
            return WeightLoadReport([], [])
        if not load_weights:
            return WeightLoadReport([f"weights {table.weights}: not loaded"], may_differ)
        notes: list[str] = []
        if is_file:
            origin = f"the weights file {table.weights}"
            state, notes = _file_state(table, module, origin)
            if self.library is not None:
                state = self.library.adapt(table, module, state, self.image_size)
        else:
            assert self.library is not None
            origin = f"the weights {table.weights} of {table.name}"
            state = self.library.published_state(table, module, self.image_size)
        loaded = fit_state(module, state, new=may_differ, source=origin, ignored=torchvision_models.AUXILIARY)
        return WeightLoadReport([*notes, *loaded.notes], loaded.new)

    def _probe_and_key(self) -> DryForwardResult:
        """Check that the model returns logits for images of this size, and key its dropout masks by example."""
        found = self._probe()
        for make_keyable in (timm_models.use_plain_attention, timm_models.use_dropout_layer):
            if found.random and self.table.source == "timm":
                make_keyable(self.module, self.heads)
                found = self._probe()
        if not is_logits(found.output, self.num_classes):
            raise UserError(
                f"{self.table.name} does not return {self.num_classes} logits per image, so it is not a classifier"
            )
        return found

    def _probe(self) -> DryForwardResult:
        try:
            return probe(self.module, self.channels, self.image_size)
        except Exception as error:
            raise self._unfit_size(error) from None

    def _unfit_size(self, error: Exception) -> UserError:
        height, width = self.image_size
        return UserError(
            f"{self.table.name} cannot take images of {height}x{width} pixels (too small, or not a multiple of the "
            f"required size); choose another data.image_size. The error was: {first_line(error)}"
        )

    def _randomness_note(self, operations: tuple[str, ...]) -> list[str]:
        """Return a warning about the consequences if some random numbers cannot be keyed by example."""
        if not operations:
            return []
        return [
            f"warning: {self.table.name} draws random numbers that do not depend on the example alone "
            f"({', '.join(operations)}). The results depend on the number of processes and on "
            "train.grad_accum_steps, so a run that is resumed on another number of processes differs from one that is "
            "not interrupted. To avoid this, leave out dropout, drop rates and random positions (rope_*_coords) in "
            "model.args (or set them to 0, or rope_rescale_coords to 1, if the model has some by default), and use "
            "model.head.dropout"
        ]


def _file_state(table: ModelConfig, module: nn.Module, source: str) -> tuple[StateDict, list[str]]:
    """Return the state dict in the recipe's weights file, with wrapper prefixes removed from its names, and notes."""
    path, key = locate(table.weights), table.weights_key
    state, notes = read_state(path, key)
    state = merge_lora(state)  # if it comes from a run with transfer.mode = "lora"
    is_prefix = key is not None and any(is_under(name, (key,)) for name in state)
    state, more = without_prefix(module, state, key if is_prefix else None, source)
    return state, [*notes, *more]


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
