"""Build the parts that training updates: parameter groups, optimizer, weight average, wrapped model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.augment.mixup import is_mixed
from toolkit.distributed.batchnorm import replace_batch_norms
from toolkit.distributed.virtual_processes import VirtualProcesses
from toolkit.errors import UserError
from toolkit.filenames import encode_name
from toolkit.models.transfer import param_groups
from toolkit.plugins import PREFIX
from toolkit.similar_names import did_you_mean
from toolkit.training.context import TrainingContext
from toolkit.training.ema import Lookahead, ModelEma, ScheduleFree, Swa, WeightAverage
from toolkit.training.loaders import DataLoaders
from toolkit.training.losses import Loss, check_loss, plugin_loss
from toolkit.training.optimizer import build_optimizer
from toolkit.training.train_step import TrainStep, TrainStepConfig


def place_model(setup: TrainingContext) -> None:
    """Move the model to its device, with the batch norm and memory format that the recipe specifies."""
    module, accelerator, train = setup.built.module, setup.accelerator, setup.recipe.train
    synchronized = accelerator.num_processes > 1 and train.sync_batch_norm and train.virtual_processes is None
    if synchronized or accelerator.device.type == "cpu":  # on CPUs its sums are also more accurate than torch's
        replace_batch_norms(module, synchronized=synchronized)
    module.to(accelerator.device)
    if train.channels_last:
        module.to(memory_format=torch.channels_last)


def build_train_step(setup: TrainingContext, loaders: DataLoaders, epochs_begun: int) -> TrainStep:
    """Build the train step of a run that has begun ``epochs_begun`` epochs (a collective).

    The model must be on its device.
    """
    recipe, module, accelerator = setup.recipe, setup.built.module, setup.accelerator
    network = module if loaders.tail is None else module.get_submodule(loaders.tail)
    groups = _groups(setup, max(epochs_begun, 1))
    later = module.parameters() if recipe.transfer.mode == "gradual" else ()
    optimizer = accelerator.prepare_optimizer(build_optimizer(recipe.optimizer, groups, later))
    if recipe.train.compile or recipe.train.cuda_graphs:
        network.compile(mode="reduce-overhead" if recipe.train.cuda_graphs else None)
    settings = TrainStepConfig(
        seed=recipe.recipe.seed,
        task=setup.task,
        loss=_loss(setup),
        augment=recipe.augment,
        max_grad_norm=recipe.train.max_grad_norm,
        channels_last=recipe.train.channels_last,
        cuda_graphs=recipe.train.cuda_graphs,
        steps_per_epoch=setup.steps,
        log_every=recipe.train.log_every,
        example_weights=_tensor(setup, example_weights(setup)),
        first_epoch=probe if (probe := recipe.transfer.epochs_of_probe) < epochs_begun else 0,
        has_unkeyed_randomness=bool(setup.built.unkeyed),
        sam_radius=recipe.optimizer.sam,
        sam_adaptive=recipe.optimizer.sam_adaptive,
    )
    average, virtual = _weight_average(setup, network, settings), None
    if recipe.train.virtual_processes is not None:
        world, rank = accelerator.num_processes, accelerator.process_index
        virtual = VirtualProcesses(network, recipe.train.virtual_processes, world, rank)
    wrapped = accelerator.prepare_model(network, evaluation_mode=virtual is not None)  # without a DDP wrapper
    return TrainStep(
        accelerator,
        network,
        wrapped,
        optimizer,
        setup.stochastic,
        average,
        settings,
        virtual=virtual,
        teacher=setup.teacher,
    )


def _weight_average(setup: TrainingContext, network: nn.Module, settings: TrainStepConfig) -> WeightAverage | None:
    """Return the average of the weights that is evaluated in place of the weights; None if the recipe has none."""
    train, optimizer = setup.recipe.train, setup.recipe.optimizer
    if train.ema is not None:
        return ModelEma(network, train.ema, every=train.ema_steps, warmup=train.ema_warmup)
    if train.swa_start is not None:  # steps are counted from first_epoch on
        first, per_epoch = settings.first_epoch, settings.steps_per_epoch
        return Swa(network, train.swa_start - first, per_epoch, setup.length.steps - first * per_epoch)
    if optimizer.lookahead is not None:
        return Lookahead(network, optimizer.lookahead, optimizer.lookahead_alpha)
    if optimizer.schedule_free is not None:
        return ScheduleFree(network, optimizer.schedule_free)
    return None


def _loss(setup: TrainingContext) -> Loss:
    """Return the training loss. A plugin is tried first; if it is not exact, this is logged."""
    recipe, device, classes = setup.recipe, setup.accelerator.device, len(setup.dataset.classes)
    weights, name = _tensor(setup, class_weights(setup)), recipe.train.loss
    if not name.startswith(PREFIX):
        return setup.task.loss(recipe, weights)
    loss = plugin_loss(recipe.train, recipe.augment.label_smoothing, weights, classes, device)
    is_multi_label, mixed = setup.dataset.is_multi_label, is_mixed(recipe.augment)
    fault = check_loss(loss, name, classes, device, multi_label=is_multi_label, mixed=mixed)
    if fault is not None and fault not in setup.not_exact:
        setup.not_exact.append(fault)
        setup.display.log(f"warning: {fault}")
    return loss


def unfreeze(setup: TrainingContext, trainer: TrainStep, epoch: int) -> bool:
    """Unfreeze the layer groups due at ``epoch`` (0-based) with transfer.mode = "gradual" (a collective).

    Returns whether there were any.
    """
    if not setup.transfer.unfreeze_for_epoch(epoch + 1):
        return False
    known = trainer.optimizer.param_groups
    for group in param_groups(setup.built, setup.recipe.transfer, setup.recipe.optimizer, known):
        trainer.optimizer.add_param_group(group)
    if trainer.average is not None:
        trainer.average.follow(trainer.network)
    # DDP checks requires_grad only when it wraps a module.
    if trainer.virtual is None:
        trainer.wrapped = setup.accelerator.prepare_model(setup.accelerator.unwrap_model(trainer.wrapped))
    return True


def _groups(setup: TrainingContext, epochs_begun: int) -> list[dict[str, Any]]:
    """Return the parameter groups in the order of unfreezing, which is the order of a checkpoint's optimizer state."""
    groups: list[dict[str, Any]] = []
    for epoch in range(epochs_begun):
        setup.transfer.unfreeze_for_epoch(epoch + 1)
        groups += param_groups(setup.built, setup.recipe.transfer, setup.recipe.optimizer, groups)
    return groups


def _tensor(setup: TrainingContext, weights: np.ndarray | None) -> Tensor | None:
    return None if weights is None else torch.tensor(weights, dtype=torch.float32, device=setup.accelerator.device)


def class_weights(setup: TrainingContext) -> np.ndarray | None:
    """Return the class weights of the loss in the form that :func:`training_loss` expects; None: all are equal.

    Raises UserError if the recipe's weights do not fit the classes.
    """
    given, classes = setup.recipe.train.class_weights, setup.dataset.classes
    if given == "none":
        return None
    if given == "balanced":
        return setup.task.balanced_weights(setup.labels("train"))
    if isinstance(given, list):
        if len(given) != len(classes):
            raise UserError(f"train.class_weights has {len(given)} values, but there are {len(classes)} classes")
        return np.array(given)
    named = {encode_name(name): weight for name, weight in given.items()}
    if unknown := next((name for name in named if name not in classes), None):
        known = f"; it has {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
        hint = did_you_mean(unknown, classes, prefix="; ", otherwise=known)
        raise UserError(f"train.class_weights contains {unknown!r}, which is not a class of the data set{hint}")
    return np.array([named.get(name, 1.0) for name in classes])


def example_weights(setup: TrainingContext) -> np.ndarray | None:
    """Return the loss weights of the training images, divided by their mean, [N]; None if the data set has none."""
    if setup.dataset.weights is None:
        return None
    weights = setup.dataset.weights[setup.splits["train"]]
    if not weights.sum() > 0:
        raise UserError("all training images have weight 0, so there is nothing to train on")
    scaled: np.ndarray = weights / weights.mean()
    return scaled
