"""Modules with plugins that tests write to their folder."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit import plugins

WriteModule = Callable[..., Path]


TRAINING = """
import math

import timm
import torch

from toolkit.plugins import register


@register("model")
def net(num_classes: int, channels: int, architecture: str = "test_resnet"):
    return timm.create_model(architecture, num_classes=num_classes, in_chans=channels)


register("optimizer", "own_sgd")(torch.optim.SGD)


@register("loss")
def own_ce(class_weights=None, label_smoothing: float = 0.0):
    return torch.nn.CrossEntropyLoss(weight=class_weights, label_smoothing=label_smoothing, reduction="none")


@register("schedule")
def own_cosine(epochs: int, warmup_epochs: float):
    def factor(epoch: float) -> float:
        share = min(max((epoch - warmup_epochs) / (epochs - warmup_epochs), 0.0), 1.0)
        return 0.5 * (1 + math.cos(math.pi * share))

    return factor
"""
"""A plugin of each kind that equals a built-in one."""


NAMES = ("own", "other", "unused", "own_nets")
"""Modules that tests write."""


def unload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unload all plugins, as in a new process, until the test ends."""
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv(plugins.VARIABLE, "")


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteModule:
    """Return a function that writes a module to tmp_path; no plugin is loaded before, and none stays loaded."""
    unload(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "own") -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text))
        return path

    return write
