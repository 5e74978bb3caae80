"""timm's models by name and tag."""

from __future__ import annotations

import math
import socket
import sys
import urllib.parse
import urllib.request
from typing import Any

import timm
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import get_pretrained_cfg
from torch import nn

from toolkit.errors import UserError, first_line
from toolkit.models.head import DropoutLinear, with_dropout
from toolkit.models.layer_groups import is_under
from toolkit.models.pretrained import StateDict, is_file_reference, map_efficientnet_lite
from toolkit.models.unknown_names import unknown_name
from toolkit.recipe.catalog import PretrainedInput
from toolkit.recipe.image_size import Size, as_value
from toolkit.recipe.schema import ModelConfig

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def construct(
    table: ModelConfig, num_classes: int, channels: int, image_size: Size
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the randomly initialized model with ``num_classes`` outputs; also return the names of its last layers."""
    arguments = {"num_classes": num_classes, "in_chans": channels, **_arguments(table, image_size)}
    module = _create(_full_name(table), arguments)
    if not hasattr(module, "get_classifier"):
        raise UserError(f"timm's {table.name} has no classifier; choose another architecture")
    return module, _last_layers(module)


def published_state(table: ModelConfig, module: nn.Module, image_size: Size) -> StateDict:
    """Return the tag's weights as timm loads them, with the published classes and channels.

    They are read from the Hugging Face cache without network access, or else downloaded. Raises UserError if the tag
    has no weights or they cannot be downloaded.
    """
    name = _full_name(table)
    config, arguments = get_pretrained_cfg(name), _arguments(table, image_size)
    if not config.has_weights:
        raise UserError(f"timm publishes no weights for {name}; use model.weights = 'none' or 'file:PATH'")
    cached = _cached_file(config)
    if cached is None and not _is_reachable(config):
        raise _not_fetched(name, config, "no network")
    overlay = {"pretrained_cfg_overlay": {"file": cached}} if cached else {}
    try:
        return _create(name, {**arguments, **overlay, "pretrained": True}).state_dict()
    except UserError as error:  # the same arguments worked without weights
        raise _not_fetched(name, config, str(error)) from None


def _arguments(table: ModelConfig, image_size: Size) -> dict[str, Any]:
    """Return the recipe's arguments, plus the image size for models with a fixed input size."""
    is_fixed = get_pretrained_cfg(_full_name(table)).fixed_input_size
    return {**({"img_size": as_value(image_size)} if is_fixed else {}), **table.args}


def adapt(table: ModelConfig, module: nn.Module, state: StateDict, image_size: Size) -> StateDict:
    """Convert a file's parameter names and position embeddings to those of ``module``."""
    if "_conv_stem.weight" in state and hasattr(module, "blocks"):
        if not table.name.startswith("tf_efficientnet_lite"):
            raise UserError(
                f"{table.weights} holds EfficientNet-Lite weights converted from TensorFlow, which need its padding; "
                f"use model.name = 'tf_efficientnet_lite0' (or 1, 2, ...), because in {table.name} they would compute "
                "something else"
            )
        state = map_efficientnet_lite(state, module.blocks)  # type: ignore[arg-type]
    own_filter = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if own_filter is None:
        return state
    try:
        return dict(own_filter(state, module))
    except Exception:  # the filter may fail on another architecture's file; the check that follows reports the mismatch
        return state


def inputs(table: ModelConfig) -> PretrainedInput:
    """Return the preprocessing that the weights were trained with (for a file, that of the default weights)."""
    config = get_pretrained_cfg(_full_name(table))
    height, size = config.input_size[-2:]
    return PretrainedInput(
        image_size=size,
        resize=math.floor(size / config.crop_pct),
        interpolation=config.interpolation if config.interpolation in INTERPOLATIONS else "bicubic",
        mean=tuple(config.mean),
        std=tuple(config.std),
        crop_mode=config.crop_mode,
        height=height if height != size else None,
    )


def use_plain_attention(module: nn.Module, heads: tuple[str, ...]) -> None:
    """Disable fused attention in layers with attention dropout, because the fused kernel's masks cannot be keyed."""
    for layer in module.modules():
        if getattr(layer, "fused_attn", False) and getattr(getattr(layer, "attn_drop", None), "p", 0.0) > 0.0:
            layer.fused_attn = False  # type: ignore[assignment]


def use_dropout_layer(module: nn.Module, heads: tuple[str, ...]) -> None:
    """Replace the functional dropout that some models apply before their last layer by a dropout layer."""
    rate = getattr(module, "drop_rate", 0.0)
    layers = [module.get_submodule(head) for head in heads]
    is_plain = all(isinstance(layer, nn.Linear) and not isinstance(layer, DropoutLinear) for layer in layers)
    if isinstance(rate, float) and rate > 0.0 and is_plain:
        module.drop_rate = 0.0  # type: ignore[assignment]
        for head, layer in zip(heads, layers, strict=True):
            assert isinstance(layer, nn.Linear)
            module.set_submodule(head, with_dropout(layer, rate))


def _full_name(table: ModelConfig) -> str:
    """Return the architecture name, with the tag if ``name`` or ``weights`` specifies one."""
    base, _, tag = table.name.partition(".")
    if ":" in base or not timm.is_model(base):
        raise unknown_name("model.name", base, timm.list_models())
    if table.weights not in ("none", "DEFAULT") and not is_file_reference(table.weights):
        if tag and tag != table.weights:
            raise UserError(f"model.name = {table.name!r} and model.weights = {table.weights!r} name different tags")
        tag = table.weights
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise unknown_name("model.weights", tag, tags)
    return f"{base}.{tag}" if tag else base


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Call timm.create_model; retry without ``img_size`` if the model has a fixed input size but does not accept it."""
    try:
        module: nn.Module = timm.create_model(name, **arguments)
    except Exception as error:  # a constructor may raise anything for bad arguments
        if isinstance(error, TypeError) and "img_size" in str(error) and "img_size" in arguments:
            return _create(name, {key: value for key, value in arguments.items() if key != "img_size"})
        raise UserError(f"timm's {name} cannot be built: {first_line(error)}") from None
    return module


def _cached_file(config: Any) -> str | None:
    """Return the path of the weights in the Hugging Face cache, or None."""
    if not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    names = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    found = (try_to_load_from_cache(repository, name, revision=revision or None) for name in names)
    return next((path for path in found if isinstance(path, str)), None)


def _is_reachable(config: Any) -> bool:
    """Return whether the publisher's host name resolves; if not, the hub's client would retry for almost a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # the proxy resolves host names
    host = urllib.parse.urlparse(constants.ENDPOINT if config.hf_hub_id else config.url).hostname
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def _not_fetched(name: str, config: Any, reason: str) -> UserError:
    source = f"{constants.ENDPOINT}/{config.hf_hub_id}" if config.hf_hub_id else config.url
    return UserError(
        f"weights {name} could not be downloaded ({reason}). Without a network: download them from {source} elsewhere "
        f"and set model.weights = 'file:PATH', or copy the cache {constants.HF_HUB_CACHE} from a machine that has one"
    )


def _last_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the classifiers in the pretrained configuration and from ``get_classifier``.

    The configuration names the very last layer even if ``get_classifier`` returns a head of several layers, and also
    lists classifiers that ``get_classifier`` omits (VOLO's ``aux_head``).
    """
    classifier = module.get_classifier()  # type: ignore[operator]
    layers = list(classifier) if isinstance(classifier, list | tuple | nn.ModuleList) else [classifier]
    returned = [name for name, layer in module.named_modules() if any(layer is one for one in layers)]
    known = {name for name, layer in module.named_modules() if next(layer.parameters(), None) is not None}
    stated = module.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    listed = [name for name in ((stated,) if isinstance(stated, str) else stated) if name in known]
    listed = [name for name in listed if not any(one != name and is_under(one, (name,)) for one in returned)]
    return tuple(dict.fromkeys([*listed, *(one for one in returned if not any(is_under(x, (one,)) for x in listed))]))
