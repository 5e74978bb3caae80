"""The backbones to compare: a default list, or those that patterns name. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from toolkit.errors import UserError
from toolkit.recipe.catalog import model_names, weights_names
from toolkit.similar_names import did_you_mean

DEFAULT = (
    "resnet18.tv_in1k",
    "resnet50.tv_in1k",
    "resnet50.a1_in1k",
    "mobilenetv3_large_100.ra_in1k",
    "efficientnet_b0.ra_in1k",
    "tf_efficientnet_lite0.in1k",
    "convnext_tiny.in12k_ft_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_clip_224.openai",
)
"""Small and medium-sized architectures of timm with weights whose licenses allow commercial use (the images and texts
that they were trained on may have other terms)."""

MOST = 100
"""Maximum number of backbones that a pattern may match."""

SOURCES = ("timm", "torchvision")


class Backbone(NamedTuple):
    """A pretrained architecture: the values of model.source, model.name and model.weights."""

    source: str
    name: str
    weights: str

    @property
    def label(self) -> str:
        """Name for tables, without the path of weights from a file."""
        if self.weights.startswith(("file:", "package:")):
            return f"{self.name} ({self.weights.partition(':')[0]})"
        return f"{self.name}.{self.weights}"


def find_backbones(patterns: Sequence[str] = ()) -> list[Backbone]:
    """Return the backbones that patterns name, without duplicates; by default :data:`DEFAULT`.

    A pattern is NAME, NAME.WEIGHTS or one with * and ?, of timm or else torchvision, optionally after ``timm/`` or
    ``torchvision/``; or NAME=WEIGHTS with any value of model.weights, also after ``plugin/``. Raises UserError if
    nothing matches.
    """
    found = [backbone for pattern in patterns or DEFAULT for backbone in _matching(pattern)]
    return list(dict.fromkeys(found))


def _matching(pattern: str) -> list[Backbone]:
    name, has_weights, weights = pattern.partition("=")
    source, slash, rest = name.partition("/")
    sources, name = ((source,), rest) if slash else (SOURCES, name)
    if slash and source not in (*SOURCES, "plugin"):
        raise UserError(f"--models {pattern}: expected timm/, torchvision/ or plugin/, not {source}/")
    if has_weights:
        known = next((one for one in sources if one == "plugin" or name in model_names(one)), None)
        if known is None:
            raise _unknown(pattern, name, sources)
        return [Backbone(known, name, weights)]
    if source == "plugin":
        raise UserError(f"--models {pattern}: add the weights of the plugin, as in plugin/{name}=file:PATH")
    is_pattern = any(char in name for char in "*?[")
    for one in sources:
        found = _by_pattern(one, name) if is_pattern else _by_name(one, name)
        if len(found) > MOST:
            raise UserError(f"--models {pattern} matches {len(found)} backbones; name fewer")
        if found:
            return found
    raise _unknown(pattern, name, sources)


def _by_name(source: str, name: str) -> list[Backbone]:
    """Return the architecture with the named weights, or with its default ones."""
    base, _, tag = name.partition(".")
    if base not in model_names(source) or (tag and tag not in weights_names(source, base)):
        return []
    return [Backbone(source, base, tag or next(iter(weights_names(source, base)), "DEFAULT"))]


def _by_pattern(source: str, pattern: str) -> list[Backbone]:
    """Return all architectures that match, with their default weights; with a "." all weights that match."""
    found = []
    for name in model_names(source):
        tags = weights_names(source, name)
        if "." in pattern:
            found += [Backbone(source, name, tag) for tag in tags if fnmatchcase(f"{name}.{tag}", pattern)]
        elif tags and fnmatchcase(name, pattern):
            found.append(Backbone(source, name, tags[0]))
    return found


def _unknown(pattern: str, name: str, sources: Sequence[str]) -> UserError:
    known = [one for source in sources if source != "plugin" for one in model_names(source)]
    hint = did_you_mean(name.partition(".")[0], known, 3, prefix="; ")
    return UserError(f"--models {pattern}: no pretrained architecture matches{hint} (toolkit models lists them)")


NOT_STATED = "not stated"


def license_of(backbone: Backbone) -> str:
    """Return the license of the weights as timm or torchvision state it. Imports timm or torchvision."""
    if backbone.weights.startswith(("file:", "package:")) or backbone.source == "plugin":
        return NOT_STATED
    if backbone.source == "torchvision":
        import torchvision

        try:
            return str(torchvision.models.get_model_weights(backbone.name)[backbone.weights].meta["license"])
        except (KeyError, ValueError):
            return NOT_STATED
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(backbone.name if backbone.weights == "DEFAULT" else ".".join(backbone[1:]))
    return str((config and config.license) or NOT_STATED)


def is_non_commercial(license_id: str) -> bool:
    """Return whether a license's name says that it excludes commercial use."""
    return re.search(r"\bnc\b|non-?commercial|SWAG", license_id, re.IGNORECASE) is not None
