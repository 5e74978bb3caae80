"""Linear layers trained by SGD on the same features, all in one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.probe.recipes import Head
from toolkit.training.logistic_head import split_features, split_labels
from toolkit.training.lr_schedule import learning_rate
from toolkit.training.trainer import Trainer

LEARNING_RATES = (10.0, 30.0, 100.0)
"""Learning rates, multiples of 1 / (mean squared L2 norm of the features), so that they suit features of any scale."""
WEIGHT_DECAYS = (1e-4, 1e-3)
MOMENTUM = 0.9


def grid(features: Tensor) -> list[Head]:
    """Return the heads to compare for training features [N, D]; learning rates are rounded to two digits."""
    scale = 1 / features.pow(2).sum(1).mean().item()
    return [
        Head("linear_probe", float(f"{factor * scale:.2g}"), decay)
        for factor in LEARNING_RATES
        for decay in WEIGHT_DECAYS
    ]


@torch.no_grad()
def train_heads(trainer: Trainer, layer: nn.Linear, heads: Sequence[Head], recipe_epochs: int) -> tuple[Tensor, Tensor]:
    """Train one linear layer for each head, as ``transfer.mode = "linear_probe"`` does with torch's SGD.

    ``trainer`` gives features, batches and schedule (cosine); ``layer`` gives the initial weights. The layers share
    each product of features and weights. Returns weights [H, classes, D] and biases [H, classes].
    """
    x = split_features(trainer, "train")
    first = torch.cat([layer.weight, layer.bias[:, None]], 1).to(x.device)
    classes, steps = len(first), trainer.setup.steps
    point = first.repeat(len(heads), 1)  # the last column is for the bias
    velocity = torch.zeros_like(point)
    rates, decays = (
        torch.tensor(values, device=x.device, dtype=x.dtype).repeat_interleave(classes)[:, None]
        for values in ([head.lr for head in heads], [head.weight_decay for head in heads])
    )
    schedule = trainer.recipe.scheduler.model_copy(update={"name": "cosine"})
    for epoch in range(recipe_epochs):
        for micro, batch in trainer.loaders.train.epoch(epoch):
            inputs = F.pad(batch.images.to(x.device).flatten(1), (0, 1), value=1.0)
            labels = batch.labels.to(x.device)
            errors = (inputs @ point.T).view(len(inputs), len(heads), classes).softmax(2)
            at = labels[:, None, None].expand(-1, len(heads), 1)
            errors.scatter_add_(2, at, errors.new_full(at.shape, -1.0))
            gradient = errors.flatten(1).T @ inputs / micro.step_count
            velocity.mul_(MOMENTUM).add_(gradient).add_(decays * point)
            factor = learning_rate(schedule, 1.0, epoch + micro.step / steps, recipe_epochs)
            point.sub_(factor * rates * velocity)
    found = point.view(len(heads), classes, -1)
    return found[..., :-1], found[..., -1]


def linear_scores(trainer: Trainer, weights: Tensor, biases: Tensor) -> list[tuple[float, float]]:
    """Return accuracy and negative loss on the validation images of linear layers [H, classes, D] and [H, classes]."""
    x, scores = split_features(trainer, "validation"), []
    labels = split_labels(trainer, "validation").to(x.device)
    for weight, bias in zip(weights, biases, strict=True):
        logits = F.linear(x, weight, bias)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        scores.append((accuracy, -F.cross_entropy(logits, labels).item()))
    return scores
