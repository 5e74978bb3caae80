"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531): a trained model's outputs as soft targets.

The teacher gets the same augmented and mixed images as the student ("consistent teaching", Beyer et al. 2022,
arXiv:2106.05237). It is in evaluation mode, has no gradients and no DDP wrapper, and is not part of checkpoints. If the
training images are the same in every epoch, its outputs are computed once
(:mod:`toolkit.cache.teacher_outputs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.data.preprocessing import Preprocessing
from toolkit.distributed.process import autocast_dtype, main_first
from toolkit.errors import UserError
from toolkit.models.build import build_model, expected_input
from toolkit.models.pretrained import state_hash
from toolkit.recipe.image_size import size_text
from toolkit.recipe.schema import DistillationConfig, ModelConfig, Recipe
from toolkit.training.trained_model import load_model


@dataclass
class Teacher:
    """A frozen model and how its outputs enter the loss."""

    table: DistillationConfig
    module: nn.Module
    """Maps its own normalized images to logits, in the order of its own classes."""
    record: dict[str, Any]
    """Values that identify the teacher, JSON-serializable; stored in the run and compared when it is resumed."""
    rescale: tuple[Tensor, Tensor] | None = None
    """Factor and offset, each [C, 1, 1], from the student's normalization to the teacher's; None: they are equal."""
    columns: Tensor | None = None
    """Index of the teacher's output for each class of the data set, int64 [K]; None: the order is the same."""
    autocast: torch.dtype | None = None
    """Type of the run's mixed precision, which also applies to the teacher."""
    computed: list[Tensor] | None = None
    """Logits of the training images for each fixed view, float32 [N, K]; None: they are computed for each batch."""

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """Map the student's inputs, [n, C, H, W], to logits of the data set's classes, float32 [n, K]."""
        if self.rescale is not None:
            inputs = inputs * self.rescale[0] + self.rescale[1]
        with torch.autocast(inputs.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits: Tensor = self.module(inputs)
        return (logits if self.columns is None else logits[:, self.columns]).float()

    def targets(self, inputs: Tensor, positions: Tensor, epoch: int) -> Tensor:
        """Return the logits for a batch, [n, K]; ``positions``: of its images in the training split, int64 [n]."""
        if self.computed is None:
            return self.logits(inputs)
        rows = self.computed[epoch % len(self.computed)]
        return rows[positions.to(rows.device)].to(inputs.device, non_blocking=True)

    def distilled(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Return (1 - alpha) x losses + alpha x T^2 x KL(teacher || student), [n].

        ``losses``: loss by the labels, [n]; ``logits``: the student's, ``targets``: the teacher's, [n, K].
        """
        temperature, alpha = self.table.temperature, self.table.alpha
        student = F.log_softmax(logits.float() / temperature, 1)
        teacher = F.log_softmax(targets / temperature, 1)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return (1 - alpha) * losses + alpha * temperature**2 * divergence


def build_teacher(
    recipe: Recipe, accelerator: Accelerator, classes: list[str], preprocessing: Preprocessing
) -> Teacher | None:
    """Load the teacher of a recipe onto the device; None without [distillation] (a collective).

    ``preprocessing``: that of the training images. Raises UserError if the teacher is missing, or if its classes, image
    size or channels are not those of the data.
    """
    table = recipe.distillation
    if table is None:
        return None

    def load() -> Teacher:
        try:
            if isinstance(table.teacher, str):
                return _from_folder(table, table.teacher, classes, preprocessing)
            model = ModelConfig(**table.teacher.model_dump())
            return _pretrained(table, model, len(classes), preprocessing)
        except UserError as error:
            raise UserError(f"distillation.teacher: {error}") from None

    teacher = main_first(accelerator, load)
    module, device = teacher.module.requires_grad_(False).eval().to(accelerator.device), accelerator.device
    if recipe.train.channels_last:
        module.to(memory_format=torch.channels_last)
    teacher.module = module
    teacher.autocast = autocast_dtype(accelerator.mixed_precision)
    teacher.columns = None if teacher.columns is None else teacher.columns.to(device)
    if teacher.rescale is not None:
        teacher.rescale = teacher.rescale[0].to(device), teacher.rescale[1].to(device)
    return teacher


def _from_folder(table: DistillationConfig, path: str, classes: list[str], ours: Preprocessing) -> Teacher:
    """Load the model of a run directory or of an export."""
    found = load_model(path)
    if found.task.kind != "single_label":
        raise UserError(f"{path} was trained with several labels per image")
    missing = [name for name in classes if name not in found.classes]
    others = [name for name in found.classes if name not in classes]
    if missing or others:
        listed = "; ".join(
            f"{text} {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for text, names in (("the teacher lacks", missing), ("only the teacher has", others))
            if names
        )
        raise UserError(f"the classes of {path} are not those of the data set: {listed}")
    theirs = found.train_preprocessing or found.preprocessing
    for key, name, own, other in (
        ("channels", "channels", ours.channels, theirs.channels),
        ("image_size", "image size", size_text(ours.image_size), size_text(theirs.image_size)),
    ):
        if own != other:
            raise UserError(f"{path} was trained with {name} {other}, but data.{key} is {own} here: use the same")
    order = [found.classes.index(name) for name in classes]
    columns = None if order == sorted(order) else torch.tensor(order)
    record = {"teacher": path, "recipe": found.recipe, "model": found.table.name}
    return _teacher(table, found.module, record, ours, theirs.mean, theirs.std, columns)


def _pretrained(table: DistillationConfig, model: ModelConfig, classes: int, ours: Preprocessing) -> Teacher:
    """Build a pretrained model with its own last layer."""
    built = build_model(model, classes, ours.channels, ours.image_size)
    if built.has_new_head:
        raise UserError(
            f"the weights {model.weights} of {model.name} are not for {classes} classes, as the data set has"
        )
    expected = expected_input(model)
    mean, std = (ours.mean, ours.std) if expected is None else (expected.mean, expected.std)
    if len(mean) != ours.channels:
        raise UserError(
            f"{model.name} was trained with {len(mean)} channels, but data.channels is {ours.channels} here"
        )
    record = {"teacher": f"{model.source} {model.name}, weights {model.weights}", "model": model.name}
    return _teacher(table, built.module, record, ours, mean, std, None)


def _teacher(
    table: DistillationConfig,
    module: nn.Module,
    record: dict[str, Any],
    ours: Preprocessing,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    columns: Tensor | None,
) -> Teacher:
    """Return the teacher, for which images are normalized by ``mean`` and ``std`` of each channel."""
    record |= {"weights_sha256": state_hash(module.state_dict()), "mean": list(mean), "std": list(std)}
    rescale = None
    if (mean, std) != (ours.mean, ours.std):
        own_mean, own_std, mean_, std_ = (
            torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (ours.mean, ours.std, mean, std)
        )
        rescale = (own_std / std_).float(), ((own_mean - mean_) / std_).float()
    return Teacher(table, module, record, rescale, columns)
