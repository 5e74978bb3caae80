"""Catalog of names that a recipe can use: models, weights, transforms and optimizers, with their arguments.

Read from ``catalog.json``, so that a recipe is checked without importing torch. ``python -m toolkit.recipe.catalog``
regenerates that file from the installed versions of torch, torchvision and timm.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent.parent / "catalog.json"


class PretrainedInput(NamedTuple):
    """Preprocessing that pretrained weights were trained with, as stated by their publisher."""

    image_size: int
    """Height and width of the input, in pixels; only the width if ``height`` is set."""
    resize: int
    """Side length before the center crop, in pixels; ``crop_mode`` determines which side."""
    interpolation: str
    """Interpolation of the resize: nearest, bilinear or bicubic."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"
    """center: resize the shorter side to ``resize``. squash: both sides, whatever the aspect ratio. border: the longer
    side, and pad the image to the input's size with the mean color."""
    height: int | None = None
    """Height of an input that is not square, in pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input, in pixels."""
        return self.height or self.image_size, self.image_size


@cache
def catalog() -> dict[str, Any]:
    """Return the content of catalog.json."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def model_names(source: str) -> list[str]:
    """Return the architectures of ``torchvision`` or ``timm``."""
    return list(catalog()[source]["models"])


def excluded_models() -> dict[str, str]:
    """Return the timm architectures that a recipe cannot use, and why."""
    reasons: dict[str, str] = catalog()["excluded_models"]
    return reasons


def weights_names(source: str, model: str) -> list[str]:
    """Return the names of an architecture's pretrained weights, the default first; empty if there are none."""
    return list(catalog()[source]["models"][model])


def weights_input(source: str, model: str, weights: str) -> PretrainedInput | None:
    """Return the input configuration of named weights (or DEFAULT); None if they are unknown."""
    known = catalog()[source]["models"].get(model, {})
    if weights == "DEFAULT" and known:
        weights = next(iter(known))
    if weights not in known:
        return None
    size, resize, interpolation, mean, std, *rest = catalog()["inputs"][known[weights]]
    return PretrainedInput(size, resize, interpolation, tuple(mean), tuple(std), *rest)


def transforms() -> dict[str, dict[str, dict[str, Any]]]:
    """Return transforms by name; arguments have ``kinds`` (of TOML value), ``required``, ``default``, ``choices``."""
    known: dict[str, dict[str, dict[str, Any]]] = catalog()["transforms"]
    return known


def excluded_transforms() -> dict[str, str]:
    """Return the classes of torchvision.transforms.v2 that a recipe cannot use, and why."""
    reasons: dict[str, str] = catalog()["excluded_transforms"]
    return reasons


def datasets() -> dict[str, dict[str, dict[str, Any]]]:
    """Return torchvision's classification data sets by name, with their arguments in the same form as transforms'."""
    known: dict[str, dict[str, dict[str, Any]]] = catalog()["datasets"]
    return known


def excluded_datasets() -> dict[str, str]:
    """Return the data sets of torchvision that a recipe cannot use, with the reason for each."""
    reasons: dict[str, str] = catalog()["excluded_datasets"]
    return reasons


def optimizers() -> dict[str, dict[str, Any]]:
    """Return optimizers by name: ``args`` (with defaults), ``momentum`` (whether supported), ``description``."""
    known: dict[str, dict[str, Any]] = catalog()["optimizers"]
    return known


def excluded_optimizers() -> dict[str, str]:
    """Return the timm optimizers that a recipe cannot use, and why."""
    reasons: dict[str, str] = catalog()["excluded_optimizers"]
    return reasons
