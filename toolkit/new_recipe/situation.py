"""What the rules of :mod:`toolkit.new_recipe.rules` look at, and the numbers that they compute from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from toolkit.new_recipe.facts import DataFacts
from toolkit.new_recipe.machine import Machine
from toolkit.recipe.catalog import weights_input

Goal = Literal["accuracy", "fast", "small"]
Approach = Literal["convnet", "resnet", "probe", "finetune"]
"""convnet, resnet: trained from scratch on small images. probe: a linear classifier on frozen pretrained features."""

KORNBLITH = "Kornblith et al. 2019, arXiv:1805.08974"
"""Fixed features against fine-tuning, by the number of images."""

SMALL = 64
"""Images with a median shorter side of at most this many pixels are small."""
TINY = 16
"""Images of at most this size hold nothing that a pretrained network's 224 pixels would show."""
FEW, MANY = 20, 100
"""Images of a class: below the first there are few, from the second on many."""
UNEQUAL, VERY_UNEQUAL = 3, 10
"""Largest class divided by the smallest one."""
LONG = 1.5
"""Aspect ratio from which a center crop would cut off more than a third of the image."""


@dataclass(frozen=True)
class Situation:
    """Everything that rules look at; it grows with the choices made."""

    facts: DataFacts
    machine: Machine
    goal: Goal
    processes: int
    images: dict[str, int]
    """Images of each split, as chosen; the official lists while the split is chosen."""
    approach: Approach = "probe"
    model: tuple[str, str] = ("", "")
    """Architecture and weights of a pretrained network."""
    epochs: int = 1
    batch: int = 1

    @property
    def n(self) -> int:
        """Training images."""
        return self.images["train"]

    @property
    def is_pretrained(self) -> bool:
        return self.approach in ("probe", "finetune")

    @property
    def counted(self) -> str:
        """The numbers of images, for reasons."""
        facts = self.facts
        what = "label" if facts.is_multi_label else "class"
        return f"{sum(facts.images.values()):,} images, {facts.smallest:,} of the smallest {what}"

    @property
    def input(self) -> int:
        """Height and width of the pretrained network's input."""
        name, weights = self.model
        expected = weights_input("timm", name, "DEFAULT" if weights.startswith("package:") else weights)
        return expected.image_size if expected else 224


class Rule(NamedTuple):
    """A row: the first of its topic whose ``when`` holds is taken."""

    when: Callable[[Situation], bool]
    sets: Callable[[Situation], dict[str, Any]]
    """Values by dotted recipe key."""
    why: Callable[[Situation], str]
    source: str


class Choice(NamedTuple):
    """What a rule set."""

    topic: str
    keys: dict[str, Any]
    why: str
    source: str


def always(s: Situation) -> bool:
    """Hold in every situation: the condition of a topic's last row."""
    return True


def conv_blocks(s: Situation) -> list[dict[str, Any]]:
    """Return blocks that halve the image until it has 2 to 4 pixels; the number of channels doubles, up to 256."""
    size = s.facts.side if s.facts.common_size is None else min(s.facts.common_size)
    pools = within(math.ceil(math.log2(max(size, 8) / 4)) if size > 8 else 2, 2, 4)
    width = 16 if s.goal == "small" else 32
    blocks: list[dict[str, Any]] = [{"channels": width, "batch_norm": True}]
    for number in range(1, pools + 1):
        blocks.append({"channels": min(256, width * 2**number), "batch_norm": True, "pool": 2})
    return blocks


def batch_size(s: Situation, most: int) -> int:
    """Return a power of two, 8 to ``most``, that gives 20 steps in an epoch; then a multiple of the processes."""
    wanted = 2 ** int(math.log2(max(s.n / 20, 8)))
    size = min(wanted, most, 2 ** int(math.log2(max(s.n, 1))))
    return int(max(1, round(size / s.processes)) * s.processes)


def scaled_lr(lr: float, batch: int, s: Situation) -> float:
    """Return a learning rate that was found for another batch size, with two digits."""
    return float(f"{lr * math.sqrt(s.batch / batch):.2g}")


def within(value: int, low: int, high: int) -> int:
    """Return the value, or the bound that it is beyond."""
    return min(max(value, low), high)


def shortest(size: tuple[int, int] | None) -> int | list[int]:
    """Return [height, width], or one number for a square."""
    assert size is not None
    return size[0] if size[0] == size[1] else list(size)
