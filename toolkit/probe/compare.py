"""Comparison of backbones: compute features once, train several heads on them, choose by validation, and test."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from toolkit.distributed.process import autocast_dtype, init_accelerator
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import UserError, first_line
from toolkit.models.frozen_backbone import prefix_features
from toolkit.models.neighbors import NearestNeighbors
from toolkit.probe.backbones import Backbone, is_non_commercial, license_of
from toolkit.probe.heads import grid, linear_scores, train_heads
from toolkit.probe.recipes import EPOCHS, Head, ProbedData, recipe_of
from toolkit.recipe.schema import Recipe, TransferConfig
from toolkit.report.prediction_metrics import wilson_interval
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.finalize import peak_memory_gib
from toolkit.training.knn_head import knn_scores
from toolkit.training.logistic_head import split_features, split_labels
from toolkit.training.trainer import Trainer

SPEED_BATCH, SPEED_REPEATS = 16, 3
"""Images in a batch and repetitions for measuring speed and memory."""


@dataclass(frozen=True)
class Row:
    """Results of one backbone."""

    backbone: Backbone
    license: str
    failure: str = ""
    """Why the backbone could not be compared; the fields that follow are then not set."""
    head: str = ""
    """Chosen kind of head with its chosen value: "logistic, C = 1"."""
    validation: dict[str, float] = field(default_factory=dict)
    """Highest validation accuracy of each kind of head, 0..1."""
    val_accuracy: float = 0.0
    """Validation accuracy of the chosen head."""
    val_loss: float = 0.0
    correct: int = 0
    """Number of correctly classified test images."""
    images: int = 0
    """Number of test images."""
    parameters: int = 0
    """Number of parameters of the backbone, without a head."""
    images_per_s: float = 0.0
    """Images per second through the backbone in batches of SPEED_BATCH, without loading them."""
    memory_gib: float | None = None
    """Peak memory in this measurement: allocated on a GPU, or resident in the process; None if it is unknown."""
    recipe: str = ""
    """Text of the recipe with the chosen kind of head."""

    @property
    def accuracy(self) -> float | None:
        """Test accuracy, 0..1; None without test images."""
        return self.correct / self.images if self.images else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the test accuracy (Wilson); None without test images."""
        return wilson_interval(self.correct, self.images) if self.images else None

    @property
    def is_non_commercial(self) -> bool:
        """Whether the license's name says that it excludes commercial use."""
        return is_non_commercial(self.license)

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        more = {"accuracy": self.accuracy, "interval": self.interval, "non_commercial": self.is_non_commercial}
        return {**asdict(self), **self.backbone._asdict(), "backbone": self.backbone.label, **more}


class _Candidate(NamedTuple):
    """A head with its validation accuracy and negative validation loss."""

    val_accuracy: float
    negative_loss: float
    head: Head
    text: str


def compare(data: ProbedData, backbones: Sequence[Backbone], log: Callable[[str], None]) -> list[Row]:
    """Compare backbones and return a row for each, the highest validation accuracy first, failures last.

    ``log`` is called with a line for each backbone. Raises UserError if there are several processes, or if none of the
    backbones can be compared.
    """
    rows: list[Row] = []
    accelerator = None
    for number, backbone in enumerate(backbones, 1):
        label = f"{number}/{len(backbones)} {backbone.label}"
        try:
            stated = license_of(backbone)
            _, recipe = recipe_of(data, backbone, Head("logistic"))
            accelerator = accelerator or init_accelerator(recipe.train)
            if accelerator.num_processes > 1:
                raise UserError("toolkit probe runs in one process")
            row = _probe(data, backbone, stated, accelerator)
        except UserError as error:
            row = Row(backbone, stated, failure=first_line(error))
            log(f"{label}: {row.failure}")
        else:
            log(f"{label}: {row.head}, validation accuracy {row.val_accuracy:.4f}")
        rows.append(row)
    if all(row.failure for row in rows):
        raise UserError(f"none of the backbones can be compared: {rows[0].failure}")
    return sorted(rows, key=lambda row: (bool(row.failure), -row.val_accuracy, row.val_loss))


def _probe(data: ProbedData, backbone: Backbone, stated: str, accelerator: Accelerator) -> Row:
    """Compare the kinds of heads on one backbone by their validation accuracy, and test the chosen one."""
    text, recipe = recipe_of(data, backbone, Head("logistic"))
    with contextlib.ExitStack() as stack:
        trainer = _trainer(recipe, accelerator, stack)
        built = trainer.setup.built
        layer = built.module.get_submodule(built.head)
        assert isinstance(layer, nn.Linear)
        parameters = sum(p.numel() for p in built.module.parameters()) - sum(p.numel() for p in layer.parameters())
        speed, memory = _speed(trainer)
        candidates = [_linear(trainer, layer), _knn(trainer, layer)]
        trainer.run_epochs()  # fits the logistic regression
        assert trainer.progress.best is not None
        best = trainer.progress.best
        found = f"logistic, C = {trainer.progress.chosen_C:g}"
        candidates.insert(0, _Candidate(best["val/accuracy"], -best["val/loss"], Head("logistic"), found))
        chosen = _choose(candidates, len(trainer.setup.splits["validation"]))
        if chosen.head.mode != "logistic":
            text, recipe = recipe_of(data, backbone, chosen.head)
            trainer = _trainer(recipe, accelerator, stack)
            trainer.run_epochs()
        correct, images = 0, len(trainer.setup.splits["test"])
        if images:
            result = trainer.evaluate("test")
            correct = int((trainer.setup.task.predictions(result) == result.labels).sum())
    return Row(
        backbone, stated, "", chosen.text, {one.head.mode: one.val_accuracy for one in candidates},
        chosen.val_accuracy, -chosen.negative_loss, correct, images, parameters, speed, memory, text,
    )  # fmt: skip


def _choose(candidates: Sequence[_Candidate], images: int) -> _Candidate:
    """Return the first candidate whose accuracy on ``images`` validation images is within a standard error of the best.

    Differences of an image or two are chance, so the order decides: heads that are refitted with the validation images
    first (the rule of one standard error: Breiman et al. 1984; Hastie et al. 2009, section 7.10).
    """
    best = max(one.val_accuracy for one in candidates)
    error = math.sqrt(best * (1 - best) / images)
    return next(one for one in candidates if one.val_accuracy >= best - error)


def _trainer(recipe: Recipe, accelerator: Accelerator, stack: contextlib.ExitStack) -> Trainer:
    """Return the trainer of a recipe, which writes no run directory."""
    display = Console(is_main=True, shows=False)
    trainer = Trainer(build_context(recipe, accelerator, display), None, None, GracefulStop(), None)
    stack.callback(trainer.loaders.close)
    return trainer


def _linear(trainer: Trainer, layer: nn.Linear) -> _Candidate:
    heads = grid(split_features(trainer, "train"))
    scores = linear_scores(trainer, *train_heads(trainer, layer, heads, EPOCHS))
    best = max(range(len(heads)), key=scores.__getitem__)
    text = f"linear_probe, lr = {heads[best].lr:g}, weight decay = {heads[best].weight_decay:g}"
    return _Candidate(*scores[best], heads[best], text)


def _knn(trainer: Trainer, layer: nn.Linear) -> _Candidate:
    x, labels = split_features(trainer, "train"), split_labels(trainer, "train")
    head = NearestNeighbors(layer.in_features, layer.out_features).to(x.device)
    ks = sorted({min(k, len(x)) for k in TransferConfig().k})
    head.use(x, labels, ks[0])
    scores = knn_scores(head, split_features(trainer, "validation"), split_labels(trainer, "validation"), ks)
    best = max(range(len(ks)), key=scores.__getitem__)
    return _Candidate(*scores[best], Head("knn"), f"knn, k = {ks[best]}")


@torch.no_grad()
def _speed(trainer: Trainer) -> tuple[float, float | None]:
    """Return images per second through the backbone, median of SPEED_REPEATS batches, and the peak memory in GiB."""
    setup, device = trainer.setup, trainer.accelerator.device
    inputs = setup.preprocessing
    images = torch.rand(SPEED_BATCH, inputs.channels, *inputs.image_size, device=device)
    dtype = autocast_dtype(trainer.accelerator.mixed_precision)
    module, seconds = setup.built.module.eval(), []
    is_reset = _reset_peak_memory(device)
    for _ in range(1 + SPEED_REPEATS):
        began = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            prefix_features(module, setup.built.head, images).cpu()
        seconds.append(time.perf_counter() - began)
    return SPEED_BATCH / statistics.median(seconds[1:]), _peak_memory(device) if is_reset else None


def _reset_peak_memory(device: torch.device) -> bool:
    """Reset the record of the peak memory, and return whether that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    except OSError:
        return False
    return True


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory since the last reset, in GiB."""
    if device.type == "cuda":
        return peak_memory_gib(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20
