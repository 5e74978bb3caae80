"""The state of a training run: the content of a checkpoint, collected from a trainer and restored into it."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from toolkit.data.sampling import RunLength
from toolkit.distributed.batchnorm import local_statistics, restore_statistics
from toolkit.errors import UserError
from toolkit.plugins import records
from toolkit.recipe import recipe_hash
from toolkit.training.ema import ScheduleFree, Swa
from toolkit.training.optimizer import load_state
from toolkit.training.resume import stored_recipe

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer


@dataclass
class TrainProgress:
    """Training progress of a run, saved in every checkpoint."""

    epoch: int = 0
    """Number of completed epochs."""
    step: int = 0
    """Number of completed steps of the current epoch."""
    best: dict[str, Any] | None = None
    """Record in metrics.jsonl of the best epoch by train.best_metric."""
    last: dict[str, Any] | None = None
    """Record in metrics.jsonl of the last completed epoch."""
    stopped_early: bool = False
    metrics_bytes: int = 0
    """Length of metrics.jsonl in bytes."""
    train_seconds: float = 0.0
    """Total time of training steps in seconds, including sessions before a resume."""
    train_images: int = 0
    """Number of images trained on by all processes, including sessions before a resume."""
    chosen_C: float | None = None
    """The value of transfer.C that was chosen, with transfer.mode = "logistic"."""
    chosen_k: int | None = None
    """The value of transfer.k that was chosen, with transfer.mode = "knn"."""
    sums: list[list[float]] = field(default_factory=list)
    """Running metrics of each process, see :meth:`toolkit.training.train_step.RunningMetrics.state`."""

    @property
    def epochs_begun(self) -> int:
        """Number of completed epochs, plus one if an epoch is in progress."""
        return self.epoch + (self.step > 0)


def process_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state that differs between processes: random states, and batch norm statistics if unsynchronized."""
    train = trainer.recipe.train
    synchronized = train.sync_batch_norm or train.virtual_processes is not None
    return {
        "random": random_state(),
        "statistics": {} if synchronized else local_statistics(trainer.setup.built.module),
    }


def checkpoint_content(trainer: Trainer, processes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a checkpoint. ``processes``: :func:`process_state` of each process."""
    recipe, progress, step = trainer.recipe, trainer.progress, trainer.train_step
    scaler = trainer.accelerator.scaler
    return {
        "recipe_hash": recipe_hash(recipe),
        "recipe": stored_recipe(recipe),
        "plugins": records(recipe),
        "teacher": None if trainer.setup.teacher is None else trainer.setup.teacher.record,
        "batches": trainer.setup.batches_key,
        "drawn": trainer.setup.drawn,
        "classes": list(trainer.setup.dataset.classes),
        "accum_steps": trainer.setup.accum_steps,
        "length": asdict(trainer.setup.length),
        "optimizer_name": recipe.optimizer.name,
        "best_epoch": progress.best["epoch"] if progress.best else None,
        "best_weights": trainer.writer.best_weights,
        "position": asdict(progress),
        "metrics_sha256": trainer.writer.digest.hexdigest(),
        "patience": trainer.patience.state(),
        "plateau": trainer.plateau.state(),
        "model": trainer.setup.built.module.state_dict(),
        "ema": {}
        if step.average is None or not step.average.is_evaluated
        else {_prefix(trainer) + name: v for name, v in step.average.averages.items()},
        "averaged_models": step.average.count if isinstance(step.average, Swa) else None,
        "schedule_free": {
            "base": {_prefix(trainer) + name: value for name, value in step.average.base.items()},
            "sum_of_squares": step.average.sum_of_squares,
        }
        if isinstance(step.average, ScheduleFree)
        else None,
        "optimizer": step.optimizer.state_dict(),
        "scaler": {} if scaler is None else scaler.state_dict(),
        "random": [each["random"] for each in processes],
        "statistics": [each["statistics"] for each in processes],
    }


def _prefix(trainer: Trainer) -> str:
    """Return what precedes a parameter's name in the whole model, if only its tail is trained, on cached features."""
    return f"{trainer.loaders.tail}." if trainer.loaders.tail else ""


def restore_model(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Restore the model and the training progress; call before building the loaders and the optimizer."""
    if checkpoint["optimizer_name"] != trainer.recipe.optimizer.name:
        raise UserError(
            f"the run was trained with optimizer.name = {checkpoint['optimizer_name']!r}, and its state does not "
            f"fit {trainer.recipe.optimizer.name!r}: resume with the former, or start a new run"
        )
    try:
        trainer.setup.built.module.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint's model does not match the recipe: {reason:.300}") from None
    progress = trainer.progress = TrainProgress(**checkpoint["position"])
    _check_length(trainer, checkpoint.get("length"))
    trainer.writer.best_weights = checkpoint.get("best_weights")
    if progress.step and checkpoint["batches"] != trainer.setup.batches_key:
        progress.step, progress.sums = 0, []
        trainer.display.log(f"the batches have changed: epoch {progress.epoch + 1} starts over")


def _check_length(trainer: Trainer, before: dict[str, int] | None) -> None:
    """Raise UserError if the length of a run was changed although the completed steps do not allow it.

    ``before``: the length with which the checkpoint was written; None in checkpoints of earlier versions.
    """
    progress, length = trainer.progress, trainer.setup.length
    if before is None or before == asdict(length):
        return
    if RunLength(**before).steps_until(progress.epoch) < progress.epoch * before["steps_per_epoch"]:
        raise UserError(
            f"the run has ended after {before['steps']} steps, within an epoch, so its length cannot be changed: "
            "restore it, or start a new run"
        )
    if progress.step > length.steps_in(progress.epoch):
        done = progress.epoch * length.steps_per_epoch + progress.step
        raise UserError(
            f"the run already has {done} steps, more than {trainer.recipe.train.length_text}: make it longer, or start "
            "a new run"
        )


def restore_rest(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Restore everything except the model and the training progress, which were restored earlier."""
    accelerator, step = trainer.accelerator, trainer.train_step
    trainer.patience.load(checkpoint["patience"])
    trainer.plateau.load(checkpoint["plateau"])
    try:
        load_state(step.optimizer, checkpoint["optimizer"])
    except ValueError as error:
        raise UserError(f"the checkpoint's optimizer state does not fit the recipe: {error}") from None
    if step.average is not None:
        averages, device = step.average.averages, accelerator.device
        for full, value in checkpoint["ema"].items():
            name = full.removeprefix(_prefix(trainer))
            if name in averages:
                averages[name].copy_(value)
            else:  # batch norm statistics of averaged weights
                averages[name] = value.to(device, copy=True)
    if isinstance(step.average, Swa):
        step.average.count = checkpoint.get("averaged_models") or 0
    if isinstance(step.average, ScheduleFree):
        step.average.sum_of_squares = checkpoint["schedule_free"]["sum_of_squares"]
        for name, value in checkpoint["schedule_free"]["base"].items():
            step.average.base[name.removeprefix(_prefix(trainer))].copy_(value)
    if accelerator.scaler is not None and checkpoint["scaler"]:
        accelerator.scaler.load_state_dict(checkpoint["scaler"])
    if len(checkpoint["random"]) == accelerator.num_processes:
        restore_random_state(checkpoint["random"][accelerator.process_index])
        restore_statistics(trainer.setup.built.module, checkpoint["statistics"][accelerator.process_index])


def state_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return the tensors that must be finite in a checkpoint, by a readable name.

    Of the buffers, only batch norm statistics: others may be infinite by design, such as attention masks.
    """
    module, step = trainer.setup.built.module, trainer.train_step
    names = {parameter: name for name, parameter in module.named_parameters()}
    tensors = {name: parameter.detach() for parameter, name in names.items()}
    tensors |= {name: b for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
    if step.average is not None:
        tensors |= {f"the average of {name}": value for name, value in step.average.averages.items()}
    for parameter, state in step.optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"the optimizer's {key} of {names.get(parameter, 'a parameter')}"] = value
    return tensors


def random_state() -> dict[str, Any]:
    """Return the states of this process's random number generators, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the generators from :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
