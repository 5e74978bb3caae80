"""Checks of [optimizer], [scheduler], [train] and [distillation] across keys."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import ceil

from toolkit.plugins import PREFIX
from toolkit.recipe.diagnostics import Issue, error, warning
from toolkit.recipe.optimizer_schema import SCHEDULE_KEYS
from toolkit.recipe.schema import OptimizerConfig, Recipe, SchedulerConfig
from toolkit.recipe.toml_writer import toml_value
from toolkit.recipe.training_schema import LOSS_KEYS


def optimizer(recipe: Recipe) -> Iterator[Issue]:
    """Check that SAM and Schedule-Free fit the other settings; warn about keys that have no effect without them."""
    table, default = recipe.optimizer, OptimizerConfig.model_fields
    for key, needed in (("sam_adaptive", "sam"), ("lookahead_alpha", "lookahead")):
        if getattr(table, needed) is None and getattr(table, key) != default[key].default:
            yield warning(f"optimizer.{key}", f"has no effect without {needed}", f"optimizer.{needed}", at="key")
    if table.sam is not None and recipe.train.precision == "fp16":
        text = "cannot be combined with fp16, whose loss scaling does not check the first of the two gradients"
        yield error("optimizer.sam", text, "train.precision", hint='set train.precision = "bf16" or "no"', at="key")
    if table.schedule_free is not None:
        yield from _schedule_free(recipe)


def _schedule_free(recipe: Recipe) -> Iterator[Issue]:
    """Check that nothing else decays the learning rate or has momentum."""
    table, train, key = recipe.optimizer, recipe.train, "optimizer.schedule_free"
    if recipe.scheduler.name != "constant":
        text = f"replaces the decay of the learning rate, but scheduler.name is {toml_value(recipe.scheduler.name)}"
        yield error(key, text, "scheduler.name", hint='set scheduler.name = "constant", with warmup_epochs', at="key")
    if train.virtual_processes is not None:
        text = "cannot be combined with virtual_processes, which cannot recompute batch norm statistics"
        yield error(key, text, "train.virtual_processes", at="key")
    betas = table.args.get("betas", [0.9])
    if table.momentum:
        text = f"replaces momentum, but optimizer.momentum is {table.momentum:g}"
        yield error(key, text, "optimizer.momentum", hint="set momentum = 0", at="key")
    elif table.name in ("adam", "adamw") and isinstance(betas, list) and betas[0]:
        text = f"replaces momentum, but the first of {table.name}'s betas is {betas[0]:g}"
        yield error(key, text, "optimizer.args", hint="set args = { betas = [0.0, 0.999] }", at="key")


def scheduler(recipe: Recipe) -> Iterator[Issue]:
    """Check that the schedule fits the run; warn about keys that it does not use."""
    table, epochs, default = recipe.scheduler, recipe.scheduled_epochs, SchedulerConfig()
    if table.warmup_epochs >= epochs:
        text = f"a warm-up of {table.warmup_epochs:g} epochs is not shorter than the run of {epochs:g}"
        yield error("scheduler.warmup_epochs", text, "train.epochs")
    if table.warmup_steps is not None and recipe.train.steps is not None and table.warmup_steps >= recipe.train.steps:
        text = f"a warm-up of {table.warmup_steps:,} steps is not shorter than the run of {recipe.train.steps:,}"
        yield error("scheduler.warmup_steps", text, "train.steps")
    if table.name == "step" and table.step_size is not None and table.step_size >= epochs:
        text = f"a period of {table.step_size} epochs has no effect in a run of {epochs:g}"
        yield warning("scheduler.step_size", text, "train.epochs", "scheduler.name")
    if table.name == "multi_step" and max(table.milestones) >= epochs:
        text = f"a milestone at epoch {max(table.milestones):g} has no effect in a run of {epochs:g}"
        yield warning("scheduler.milestones", text, "train.epochs", "scheduler.name")
    if table.T_0 is not None and table.name == "cosine_restarts" and table.warmup_epochs + table.T_0 >= epochs:
        end = table.warmup_epochs + table.T_0
        text = f"the first cycle ends at epoch {end:g}, so that there is no restart in a run of {epochs:g}"
        yield warning("scheduler.T_0", text, "train.epochs", "scheduler.warmup_epochs", "scheduler.name")
    for key, users in SCHEDULE_KEYS.items():
        if table.name not in users and getattr(table, key) != getattr(default, key):
            text = f'has no effect with name = "{table.name}"; it is for {", ".join(users)}'
            yield warning(f"scheduler.{key}", text, "scheduler.name", at="key")
    if table.args and not table.name.startswith(PREFIX):
        yield warning("scheduler.args", f'has no effect with name = "{table.name}"', "scheduler.name", at="key")
    if table.min_lr > recipe.optimizer.lr and table.name in SCHEDULE_KEYS["min_lr"]:
        text = f"{table.min_lr:g} is above optimizer.lr, {recipe.optimizer.lr:g}"
        yield error("scheduler.min_lr", text, "optimizer.lr", "scheduler.name")


def train(recipe: Recipe) -> Iterator[Issue]:
    """Check that the batch can be divided; warn if both sampling and loss are weighted by class."""
    batch, parts, virtual = recipe.train.batch_size, recipe.train.min_accum_steps, recipe.train.virtual_processes
    for key, divisor in (("grad_accum_steps", parts), ("virtual_processes", virtual or 1)):
        if batch % divisor:
            below, above = batch // divisor * divisor, (batch // divisor + 1) * divisor
            hint = f"for example batch_size = {f'{below} or ' if below else ''}{above}"
            text = f"{batch} is not divisible by train.{key} = {divisor}"
            yield error("train.batch_size", text, f"train.{key}", hint=hint)
    if virtual is not None and recipe.train.grad_accum_steps != 1:
        text, hint = "must be 1 with train.virtual_processes, which divide the batch already", "remove it"
        yield error("train.grad_accum_steps", text, "train.virtual_processes", hint=hint)
    args, defaults = recipe.train.loss_args, type(recipe.train.loss_args)()
    for key, loss in LOSS_KEYS.items() if not recipe.train.loss.startswith(PREFIX) else ():
        if recipe.train.loss != loss and getattr(args, key) != getattr(defaults, key):
            text = f"has no effect with train.loss = {toml_value(recipe.train.loss)}, only with {toml_value(loss)}"
            yield warning(f"train.loss_args.{key}", text, "train.loss", at="key")
    if recipe.train.sampling == "balanced" and recipe.train.class_weights == "balanced":
        text = 'train.sampling = "balanced" already compensates for rare classes: this weights them twice'
        yield warning("train.class_weights", text, "train.sampling")


def distillation(recipe: Recipe) -> Iterator[Issue]:
    """Check that the loss has the form of [distillation] and that the teacher gets the images it was trained for."""
    if recipe.distillation is None:
        return
    loss, mode, teacher = recipe.train.loss, recipe.transfer.mode, recipe.distillation.teacher
    if not isinstance(teacher, str) and teacher.weights == "none":
        yield error("distillation.teacher.weights", '"none" is not a trained teacher', hint='for example "DEFAULT"')
    unfit = {
        "task.kind": (recipe.task.kind != "single_label", "the softmax needs exactly one class per image"),
        "transfer.mode": (recipe.transfer.is_fitted, f'"{mode}" is fitted to the labels only'),
        "data.progressive_sizes": (bool(recipe.data.progressive_sizes), "the teacher gets images of one size"),
    }
    for key, (is_unfit, reason) in unfit.items():
        if is_unfit:
            yield error(key, f"cannot be combined with [distillation]: {reason}", "distillation.teacher")
    if not unfit["task.kind"][0] and loss != "cross_entropy" and not loss.startswith(PREFIX):
        text = f"{toml_value(loss)} cannot be combined with [distillation], which needs a softmax"
        yield error("train.loss", text, "distillation.teacher", hint='set train.loss = "cross_entropy"')


def averages(recipe: Recipe) -> Iterator[Issue]:
    """Check that only one average of weights is evaluated and that it fits the run; warn about keys without effect."""
    train, table, start = recipe.train, recipe.optimizer, recipe.train.swa_start
    evaluated = {"optimizer.schedule_free": table.schedule_free, "train.swa_start": start,
                 "optimizer.lookahead": table.lookahead, "train.ema": train.ema}  # fmt: skip
    for key, other in combinations([key for key, value in evaluated.items() if value is not None], 2):
        text = f"cannot be combined with {other}: each determines the weights that are evaluated and saved"
        yield error(key, text, other, hint="remove one of them", at="key")
    for key, default in (("ema_steps", 1), ("ema_warmup", True)):
        if train.ema is None and getattr(train, key) != default:
            yield warning(f"train.{key}", "has no effect without train.ema", "train.ema", at="key")
    if start is None:
        if train.swa_lr is not None:
            yield warning("train.swa_lr", "has no effect without train.swa_start", "train.swa_start", at="key")
        return
    if train.epochs is not None and start > ceil(train.epochs):
        text = f"epoch {start} is beyond the run's {train.epochs:g} epochs"
        hint = f"for example swa_start = {ceil(train.epochs * 3 / 4)}: three quarters of the run"
        yield error("train.swa_start", text, "train.epochs", hint=hint)
    if train.virtual_processes is not None:
        text = "cannot be combined with virtual_processes, which cannot recompute batch norm statistics"
        yield error("train.swa_start", text, "train.virtual_processes", at="key")
    if (probe := recipe.transfer.epochs_of_probe) >= start:
        text = f"epoch {start} is in the probe of {probe} epochs, in which only the head is trained"
        yield error("train.swa_start", text, "transfer.probe_epochs", hint=f"set {probe + 1} or more")
    if (last := max(recipe.transfer.unfreeze_at, default=0)) > start:
        text = f"epoch {start} is before epoch {last}, in which the last layer group is unfrozen"
        yield error("train.swa_start", text, "transfer.unfreeze_at", hint=f"set {last} or more")
