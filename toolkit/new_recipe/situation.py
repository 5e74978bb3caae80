"""The input of the rules in :mod:`toolkit.new_recipe.rules`, and the numbers that they compute from it."""

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
"""Source of the choice between a linear probe and fine-tuning by the number of images."""

SMALL = 64
"""Maximum median length of the shorter side, in pixels, for images to count as small."""
TINY = 16
"""The same for images so small that a pretrained network's input of 224 pixels would not show more detail."""
FEW = 20
"""Number of images per class below which there are few."""
ENOUGH_GRAY, ENOUGH_COLOR = 100, 2000
"""Number of small images per class from which a network is trained from scratch. Grayscale ones are often characters,
which pretrained networks have not seen; color ones are often photographs, which they have."""
UNEQUAL, VERY_UNEQUAL = 3, 10
"""Thresholds for the size of the largest class divided by that of the smallest class."""
LONG = 1.5
"""Minimum aspect ratio at which a center crop cuts off more than a third of the image."""


@dataclass(frozen=True)
class Situation:
    """Everything that the rules depend on; later rules also see the choices of earlier ones."""

    facts: DataFacts
    machine: Machine
    goal: Goal
    processes: int
    images: dict[str, int]
    """Number of images in each split; while the split is being chosen, in each official list."""
    approach: Approach = "probe"
    model: tuple[str, str] = ("", "")
    """Architecture and weights of a pretrained network."""
    epochs: int = 1
    batch: int = 1

    @property
    def n(self) -> int:
        """Number of training images."""
        return self.images["train"]

    @property
    def is_pretrained(self) -> bool:
        return self.approach in ("probe", "finetune")

    @property
    def suits_scratch(self) -> bool:
        """Whether there are enough small images for a network of their size."""
        enough = ENOUGH_GRAY if self.facts.stored_channels == 1 else ENOUGH_COLOR
        return self.facts.side <= SMALL and self.facts.per_class >= enough

    @property
    def counted(self) -> str:
        """The number of images, as text for reasons."""
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
    """A row of the rules: for each topic, the first rule whose ``when`` is true applies."""

    when: Callable[[Situation], bool]
    sets: Callable[[Situation], dict[str, Any]]
    """Values by dotted recipe key."""
    why: Callable[[Situation], str]
    source: str


class Choice(NamedTuple):
    """The keys that a rule has set, with the reason and the source."""

    topic: str
    keys: dict[str, Any]
    why: str
    source: str


def always(s: Situation) -> bool:
    """Return true in every situation: the condition of a topic's last rule."""
    return True


def conv_blocks(s: Situation) -> list[dict[str, Any]]:
    """Return blocks that halve the image until its side is 2 to 4 pixels; the channels double, up to 256."""
    size = s.facts.side if s.facts.common_size is None else min(s.facts.common_size)
    pools = within(math.ceil(math.log2(max(size, 8) / 4)) if size > 8 else 2, 2, 4)
    width = 16 if s.goal == "small" else 32
    blocks: list[dict[str, Any]] = [{"channels": width, "batch_norm": True}]
    for number in range(1, pools + 1):
        blocks.append({"channels": min(256, width * 2**number), "batch_norm": True, "pool": 2})
    return blocks


def batch_size(s: Situation, most: int) -> int:
    """Return a power of two, 8 to ``most``, that gives 20 steps per epoch, as a multiple of the number of processes."""
    wanted = 2 ** int(math.log2(max(s.n / 20, 8)))
    size = min(wanted, most, 2 ** int(math.log2(max(s.n, 1))))
    return int(max(1, round(size / s.processes)) * s.processes)


def scaled_lr(lr: float, batch: int, s: Situation) -> float:
    """Scale a learning rate for batches of ``batch`` images to the chosen batch size; round it to two digits."""
    return float(f"{lr * math.sqrt(s.batch / batch):.2g}")


def within(value: int, low: int, high: int) -> int:
    """Limit ``value`` to the range from ``low`` to ``high``."""
    return min(max(value, low), high)


def shortest(size: tuple[int, int] | None) -> int | list[int]:
    """Return [height, width], or one number for a square."""
    assert size is not None
    return size[0] if size[0] == size[1] else list(size)
