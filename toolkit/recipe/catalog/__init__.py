"""Names that a recipe can use: models, weights, transforms, optimisers, and the arguments they take.

Read from ``catalog.json``, so that a recipe is checked without importing torch. ``python -m toolkit.recipe.catalog``
writes that file anew from the installed versions of torch, torchvision and timm.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent.parent / "catalog.json"


class Input(NamedTuple):
    """What pretrained weights expect of an image."""

    image_size: int
    """Height and width of the input, pixels."""
    resize: int
    """Side before the center crop, pixels: which side, says ``crop_mode``."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"
    """center: the short side becomes ``resize``; squash: both sides; border: the long side, and the rest is padded."""
    height: int | None = None
    """Height of an input that is not square, pixels; image_size is then its width."""


@cache
def catalog() -> dict[str, Any]:
    """The whole of catalog.json."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Known names that resemble ``name``, best first, whatever the case; none for absurdly long names."""
    by_folded: dict[str, str] = {}
    for candidate in known:
        by_folded.setdefault(candidate.casefold(), candidate)
    if len(name) > 80:  # difflib is quadratic
        return []
    return [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, count, 0.6)]


def model_names(source: str) -> list[str]:
    """Architectures of ``torchvision`` or ``timm``."""
    return list(catalog()[source]["models"])


def excluded_models() -> dict[str, str]:
    """Architectures of timm that a recipe cannot name, and why."""
    reasons: dict[str, str] = catalog()["excluded_models"]
    return reasons


def weights_names(source: str, model: str) -> list[str]:
    """Names of the pretrained weights of an architecture, the default first; empty where there are none."""
    return list(catalog()[source]["models"][model])


def weights_input(source: str, model: str, weights: str) -> Input | None:
    """What named weights (or DEFAULT) expect; None where they are unknown."""
    known = catalog()[source]["models"].get(model, {})
    if weights == "DEFAULT" and known:
        weights = next(iter(known))
    if weights not in known:
        return None
    size, resize, interpolation, mean, std, *rest = catalog()["inputs"][known[weights]]
    return Input(size, resize, interpolation, tuple(mean), tuple(std), *rest)


def transforms() -> dict[str, dict[str, dict[str, Any]]]:
    """Transforms by name; their arguments have ``kinds`` (of TOML value), ``required``, ``default``, ``choices``."""
    known: dict[str, dict[str, dict[str, Any]]] = catalog()["transforms"]
    return known


def excluded_transforms() -> dict[str, str]:
    """Classes of torchvision.transforms.v2 that a recipe cannot name, and why."""
    reasons: dict[str, str] = catalog()["excluded_transforms"]
    return reasons


def optimizers() -> dict[str, dict[str, Any]]:
    """Optimisers by name: ``args`` (names and defaults), ``momentum`` (whether they take one), ``description``."""
    known: dict[str, dict[str, Any]] = catalog()["optimizers"]
    return known


def excluded_optimizers() -> dict[str, str]:
    """timm optimisers that a recipe cannot name, and why."""
    reasons: dict[str, str] = catalog()["excluded_optimizers"]
    return reasons
