"""The rules for splits, input, augmentation and the kind of task, in the form of :mod:`toolkit.new_recipe.rules`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from toolkit.new_recipe.situation import KORNBLITH, LONG, SMALL, TINY, Rule, Situation, always, shortest


def _augmentation(*names: Mapping[str, Any]) -> Callable[[Situation], dict[str, Any]]:
    return lambda s: {"augment.train": list(names)}


FLIP = {"name": "RandomHorizontalFlip"}
AFFINE = {"name": "RandomAffine", "degrees": 10, "translate": [0.1, 0.1], "scale": [0.9, 1.1]}
CROP = {"name": "RandomResizedCrop", "scale": [0.5, 1.0], "stage": "resize_crop"}
COLORS = {"name": "TrivialAugmentWide"}
FLIP_NOTE = "remove the flip if left and right differ in meaning, as in text"


def _held_out(s: Situation, share: float) -> int:
    """Return the number of validation images if ``share`` of the images remaining after the test split are held out."""
    return int(share * (1.0 if "test" in s.facts.images else 0.8) * s.facts.images["train"])


def _drawn(validation: float) -> Callable[[Situation], dict[str, Any]]:
    """Return a function for the keys that draw validation images, and test images if there is no official test list."""

    def split(s: Situation) -> dict[str, Any]:
        test = {} if "test" in s.facts.images else {"test": 0.2}
        return {"data.split": {"validation": validation, **test}}

    return split


def _how_drawn(s: Situation) -> str:
    facts = s.facts
    rule = f"none of the {facts.groups:,} groups is divided" if facts.groups else "the same share of each class"
    given = f"{facts.images['test']:,} test images are given" if "test" in facts.images else "20 % for the test"
    return f"{s.counted}: {rule}; {given}"


SPLIT = (
    Rule(
        lambda s: "validation" in s.facts.images and "test" in s.facts.images,
        lambda s: {"data.split": {"method": "official"}},
        lambda s: (
            f"the data have {s.facts.images['validation']:,} validation and {s.facts.images['test']:,} test images "
            "of their own"
        ),
        "published splits make results comparable",
    ),
    Rule(
        lambda s: "validation" in s.facts.images,
        lambda s: {"data.split": {"method": "official", "test": 0}},
        lambda s: f"the data have {s.facts.images['validation']:,} validation images of their own, but no test images",
        "published splits make results comparable",
    ),
    Rule(
        lambda s: _held_out(s, 0.1) >= 100,
        _drawn(0.1),
        lambda s: f"{_how_drawn(s)}, 10 % of the others for validation",
        "stratified as in Kohavi 1995",
    ),
    Rule(
        lambda s: _held_out(s, 0.2) >= 30,
        _drawn(0.2),
        lambda s: (
            f"{_how_drawn(s)}, 20 % of the others for validation, because 10 % would be {_held_out(s, 0.1)} images"
        ),
        "stratified as in Kohavi 1995",
    ),
    Rule(
        always,
        _drawn(0),
        lambda s: f"{_how_drawn(s)}, none for validation, because 20 % would be only {_held_out(s, 0.2)} images",
        "with fewer than 30 images the accuracy has a standard error of up to 9 points",
    ),
)


INPUT = (
    Rule(
        lambda s: not s.is_pretrained and s.facts.common_size is not None and max(s.facts.common_size) <= SMALL,
        lambda s: {"data.image_size": shortest(s.facts.common_size)},
        lambda s: f"all {s.facts.sampled:,} inspected images have this size" if s.facts.sampled else "the images' size",
        "no resize loses nothing",
    ),
    Rule(
        lambda s: not s.is_pretrained and s.facts.aspect <= LONG,
        lambda s: {"data.image_size": max(8, 4 * math.ceil(s.facts.side / 4))},
        lambda s: f"the median of the shorter side of {s.facts.sampled:,} images, rounded up to a multiple of 4",
        "our convention",
    ),
    Rule(
        lambda s: not s.is_pretrained,
        lambda s: {"data.image_size": max(8, 4 * math.ceil(s.facts.side / 4)), "data.resize": "letterbox"},
        lambda s: f"median shorter side {s.facts.side}, aspect ratio {s.facts.aspect:.1f}: a crop would cut off much",
        "letterboxing as in Darknet (Redmon & Farhadi 2018, arXiv:1804.02767)",
    ),
    Rule(
        lambda s: s.facts.aspect > LONG,
        lambda s: {"data.image_size": s.input, "data.resize": "letterbox"},
        lambda s: (
            f"the weights' size; with a median aspect ratio of {s.facts.aspect:.1f} ({s.facts.sampled:,} images) a "
            "center crop would cut off more than a third"
        ),
        "letterboxing as in Darknet (Redmon & Farhadi 2018, arXiv:1804.02767)",
    ),
    Rule(
        always,
        lambda s: {"data.image_size": s.input},
        lambda s: (
            f"the size that the weights expect; median shorter side {s.facts.side}"
            + (f" ({s.facts.sampled:,} images)" if s.facts.sampled else "")
        ),
        "the weights' own configuration",
    ),
)


CHANNELS = (
    Rule(
        lambda s: s.facts.stored_channels == 1 and not s.is_pretrained,
        lambda s: {"data.channels": 1},
        lambda s: "all inspected images are gray",
        "nothing is repeated",
    ),
    Rule(
        lambda s: s.facts.stored_channels == 1,
        lambda s: {"data.channels": 3},
        lambda s: "all inspected images are gray; they are repeated, because the weights expect 3 channels",
        "timm and torchvision's references: convert to RGB",
    ),
    Rule(
        lambda s: s.facts.stored_channels == 3,
        lambda s: {"data.channels": 3},
        lambda s: f"color, {s.facts.channels[1]:,} of {s.facts.channels.total():,} images are gray and are repeated"
        if s.facts.channels[1] else "color",
        "timm and torchvision's references: convert to RGB",
    ),
    Rule(
        always,
        lambda s: {"data.channels": s.facts.stored_channels, "data.normalize": "dataset"},
        lambda s: f"{s.facts.stored_channels} channels in every image; mean and std of each are computed",
        "timm: adapt_input_conv",
    ),
)  # fmt: skip


AUGMENT = (
    Rule(
        lambda s: s.approach == "probe",
        lambda s: {"augment.train": []},
        lambda s: "none, so that the features of each image are computed only once (data.fixed_views = 4 allows some)",
        KORNBLITH,
    ),
    Rule(
        lambda s: s.facts.stored_channels == 1 or s.facts.side <= TINY,
        _augmentation(AFFINE),
        lambda s: "small rotations, shifts and scales; no flip, because small gray images are often characters",
        "recipes/quickstart.toml",
    ),
    Rule(
        lambda s: not s.is_pretrained,
        lambda s: {"augment.train": [{**AFFINE, "degrees": 0, "translate": [0.125, 0.125]}, FLIP]},
        lambda s: f"shifts by up to an eighth, and flips; {FLIP_NOTE}",
        "He et al. 2016, arXiv:1512.03385, section 4.2 (4 of 32 pixels)",
    ),
    Rule(
        lambda s: s.facts.aspect > LONG,
        _augmentation(AFFINE, FLIP),
        lambda s: f"no random crop, because the whole image is shown; {FLIP_NOTE}",
        "our convention",
    ),
    Rule(
        lambda s: s.goal == "accuracy" and s.facts.stored_channels == 3,
        lambda s: {"augment.train": [CROP, FLIP, COLORS], "augment.label_smoothing": 0.1},
        lambda s: f"random crops, flips and colors, and smoothed labels; {FLIP_NOTE}",
        "torchvision's references (TrivialAugment: Müller & Hutter 2021, arXiv:2103.10158)",
    ),
    Rule(
        always,
        _augmentation(CROP, FLIP),
        lambda s: f"random crops and flips; {FLIP_NOTE}",
        "torchvision's references",
    ),
)


TASK = (
    Rule(
        lambda s: s.facts.is_multi_label and s.images["validation"] == 0,
        lambda s: {"task.kind": "multi_label", "task.threshold": 0.5},
        lambda s: (
            f"an image has {s.facts.labels_per_image:.1f} labels on average; no validation images to choose "
            "thresholds with"
        ),
        "docs/tasks.md",
    ),
    Rule(
        lambda s: s.facts.is_multi_label,
        lambda s: {"task.kind": "multi_label"},
        lambda s: f"an image has {s.facts.labels_per_image:.1f} of {s.facts.classes} labels on average",
        "docs/tasks.md",
    ),
)
