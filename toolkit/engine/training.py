"""The epochs of a run: train, validate, keep the best, checkpoint, stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.engine.batchnorm import average_statistics, synchronise
from toolkit.engine.checkpoint import save_best, save_checkpoint
from toolkit.engine.display import Bar, epoch_line
from toolkit.engine.ema import WeightAverage
from toolkit.engine.evaluate import Evaluation, evaluate
from toolkit.engine.loaders import Loaders, build_loaders
from toolkit.engine.loop import Hooks, Sums, Trainer, TrainSettings
from toolkit.engine.optim import build_optimizer
from toolkit.engine.position import Position, random_state, restore_random_state
from toolkit.engine.process import Control, autocast_dtype, broadcast_object, gather_objects
from toolkit.engine.schedule import Patience, Plateau, higher_is_better, learning_rate
from toolkit.engine.setup import Setup
from toolkit.engine.signals import StopRequest
from toolkit.errors import Interrupted, RunFailed
from toolkit.models.transfer import new_groups
from toolkit.recipe import recipe_hash
from toolkit.runs import Run
from toolkit.tracking import Tracking


class Training:
    """A run under way. ``run`` and ``tracking`` are None in a dry run, which writes nothing."""

    def __init__(
        self,
        setup: Setup,
        run: Run | None,
        tracking: Tracking | None,
        stop: StopRequest,
        checkpoint: dict[str, Any] | None,
    ) -> None:
        self.setup, self.run, self.tracking, self.stop = setup, run, tracking, stop
        self.recipe, self.accelerator, self.display = setup.recipe, setup.accelerator, setup.display
        self.position = Position()
        table = self.recipe.early_stopping
        self.patience = Patience(higher_is_better(table.metric), table.min_delta)
        self.best = Patience(higher_is_better(self.recipe.train.select))
        self.plateau = Plateau(self.recipe.scheduler)
        self.control = Control()
        self.bar = Bar(None, 0)
        self.saved_at = time.monotonic()
        if self.accelerator.num_processes > 1 and self.recipe.train.sync_batch_norm:
            synchronise(setup.built.module)
        setup.built.module.to(self.accelerator.device)
        if self.recipe.train.channels_last:
            setup.built.module.to(memory_format=torch.channels_last)
        if checkpoint is not None:
            setup.built.module.load_state_dict(checkpoint["model"])
            self.position = Position(**checkpoint["position"])
        self.loaders: Loaders = build_loaders(setup, self.guarded, shortcuts=run is not None)
        self.trainer = self._build_trainer()
        if checkpoint is not None:
            self._restore(checkpoint)

    # -- building -----------------------------------------------------------------------------------------------------

    def _build_trainer(self) -> Trainer:
        recipe, module = self.recipe, self.setup.built.module
        network = module if self.loaders.tail is None else module.get_submodule(self.loaders.tail)
        groups = self._groups()
        optimizer = self.accelerator.prepare_optimizer(build_optimizer(recipe.optimizer, groups))
        if recipe.train.compile:
            network.compile()
        settings = TrainSettings(
            seed=recipe.recipe.seed,
            classes=len(self.setup.dataset.classes),
            label_smoothing=recipe.augment.label_smoothing,
            mixing=self.loaders.mixing,
            clip_norm=recipe.train.clip_norm,
            channels_last=recipe.train.channels_last,
            class_weights=self._class_weights(),
            steps_per_epoch=self.setup.steps,
            log_every=recipe.train.log_every,
        )
        ema = None if recipe.train.ema is None else WeightAverage(network, recipe.train.ema)
        wrapped = self.accelerator.prepare_model(network)
        return Trainer(self.accelerator, network, wrapped, optimizer, self.setup.stochastic, ema, settings)

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups in the order in which they began to train, the same for a run that goes on."""
        built, recipe = self.setup.built, self.recipe
        groups: list[dict[str, Any]] = []
        for epoch in range(self.position.epoch + 1):
            self.setup.transfer.unfreeze_for_epoch(epoch + 1)
            groups += new_groups(built, recipe.transfer, recipe.optimizer, groups)
        return groups

    def _class_weights(self) -> Tensor | None:
        """Inverse class frequency, scaled so that the mean weight over the training images is 1."""
        if self.recipe.train.class_weights == "none":
            return None
        counts = np.bincount(self.setup.labels("train"), minlength=len(self.setup.dataset.classes))
        weights = len(self.setup.labels("train")) / (len(counts) * counts)
        return torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)

    def _unfreeze(self, epoch: int) -> None:
        """gradual: let more stages train from epoch ``epoch`` (0-based) on. DDP must be told, hence a new wrapping."""
        if not self.setup.transfer.unfreeze_for_epoch(epoch + 1):
            return
        trainer = self.trainer
        known = trainer.optimizer.param_groups
        for group in new_groups(self.setup.built, self.recipe.transfer, self.recipe.optimizer, known):
            trainer.optimizer.add_param_group(group)
        if trainer.ema is not None:
            trainer.ema.follow(trainer.network)
        trainer.wrapped = self.accelerator.prepare_model(self.accelerator.unwrap_model(trainer.wrapped))
        self.display.say(
            f"epoch {epoch + 1}: {len(self.setup.transfer.trainable)} parameter tensors train from here on"
        )

    # -- epochs -------------------------------------------------------------------------------------------------------

    def run_epochs(self) -> None:
        """Train until the recipe's epochs are done or early stopping ends them."""
        position = self.position
        while position.epoch < self.recipe.train.epochs and not position.stopped_early:
            self._epoch(position.epoch)
        self._refuse_stop()

    def _epoch(self, epoch: int) -> None:
        self._unfreeze(epoch)
        self.setup.transfer.train_mode()
        sums = self._sums_so_far()
        started, images_before = time.perf_counter(), self.position.train_images
        with self._progress(epoch) as self.bar:
            hooks = Hooks(self._set_lr, lambda step, sums: self._after_step(epoch, step, sums), self._log_step)
            done = self.trainer.train_epoch(self.loaders.train, epoch, self.position.step, sums, hooks)
        self.position.train_seconds += time.perf_counter() - started
        if not done:
            self._interrupt(sums)
        speed = (self.position.train_images - images_before) / max(time.perf_counter() - started, 1e-9)
        self._check_finite(epoch, self.setup.steps)
        loss, accuracy = sums.figures(self.accelerator)
        record = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.setup.steps,
            "lr": self._learning_rate(epoch),
            "train/loss": loss,
            "train/accuracy": accuracy,
        }
        try:
            record |= self.evaluate("validation").figures("val/")
        except StopWanted:
            self.position.step = self.setup.steps
            self._interrupt(sums)
        self._close_epoch(epoch, record, speed)

    def _close_epoch(self, epoch: int, record: dict[str, Any], speed: float) -> None:
        """Judge the epoch, write its line and a checkpoint."""
        position, recipe = self.position, self.recipe
        is_best = self.best.update(record[recipe.train.select])
        if is_best:
            position.best = record
        self.patience.update(record[recipe.early_stopping.metric])
        limit = recipe.early_stopping.patience
        position.stopped_early = limit is not None and self.patience.waited >= limit
        if recipe.scheduler.name == "plateau":
            self.plateau.update(record[recipe.scheduler.metric])
        position.epoch, position.step, position.sums, position.last = epoch + 1, 0, [], record
        if self.run is not None and self.accelerator.is_main_process:
            if is_best:
                with self._averaged_weights():
                    save_best(self.run.checkpoints, epoch + 1, self.setup.built.module.state_dict())
            position.metrics_bytes = self.run.append_metrics(record)
        if self.tracking is not None:
            self.tracking.log(record, record["step"])
        self.save()
        self.display.say(epoch_line(record, recipe.train.epochs, best=is_best, images_per_s=speed))
        if position.stopped_early:
            self.display.say(
                f"stopped: {recipe.early_stopping.metric} has not improved by more than "
                f"{recipe.early_stopping.min_delta:g} for {limit} epochs"
            )

    def evaluate(self, split: str) -> Evaluation:
        """Evaluate the current model (with averaged weights, where the recipe asks for them) on a split (a collective)."""
        module = self.setup.built.module
        if self.accelerator.num_processes > 1 and not self.recipe.train.sync_batch_norm:
            average_statistics(module)
        with self._averaged_weights():
            if split == "validation":
                network = module if self.loaders.tail is None else self.trainer.network
                return self.evaluate_network(network, self.loaders.validation, split)
            return self.evaluate_network(module, self.loaders.images[split], split)

    def evaluate_network(self, network: nn.Module, loader: Any, split: str) -> Evaluation:
        """Evaluate any module on a split (a collective); StopWanted where somebody wants the run to stop."""
        return evaluate(
            network,
            self.guarded(loader, self.loaders.rounds[split]),
            self.setup.labels(split),
            self.accelerator.device,
            autocast_dtype=autocast_dtype(self.accelerator.mixed_precision),
            channels_last=self.recipe.train.channels_last,
        )

    def try_one_batch(self) -> float:
        """One batch forward and backward; its loss."""
        self.setup.transfer.train_mode()
        sums = Sums.zero(self.accelerator.device)
        hooks = Hooks(self._set_lr, lambda step, sums: True, lambda *_: None)
        self.trainer.train_epoch(self.loaders.train, 0, 0, sums, hooks)
        return sums.figures(self.accelerator)[0]

    def close(self) -> None:
        """Let workers go and leave the process group, all together."""
        self.loaders.close()
        self.accelerator.wait_for_everyone()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    # -- within an epoch ----------------------------------------------------------------------------------------------

    def _learning_rate(self, epoch: float, scale: float = 1.0) -> float:
        table, peak = self.recipe.scheduler, self.recipe.optimizer.lr * scale
        return learning_rate(table, peak, epoch, self.recipe.train.epochs, self.plateau.factor)

    def _set_lr(self, epoch: float) -> None:
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self._learning_rate(epoch, group["lr_scale"])

    def _after_step(self, epoch: int, step: int, sums: Sums) -> bool:
        """After each step: count, agree with the other processes, save where it is time. True: stop here."""
        position, batch_size = self.position, self.recipe.train.batch_size
        count = min(batch_size, len(self.setup.splits["train"]) - (step - 1) * batch_size)
        position.step = step
        position.train_images += count
        self.bar.advance(count)
        table = self.recipe.checkpoint
        due = bool(table.every_minutes) and time.monotonic() - self.saved_at > table.every_minutes * 60
        stop, save, non_finite = self.control.exchange(
            stop=self.stop.is_wanted(),
            save=due and self.accelerator.is_main_process,
            non_finite=not self.trainer.loss_was_finite(),
        )
        if non_finite:
            self._fail_non_finite(epoch, step)
        if stop:
            return True
        if (save or (table.every_steps and step % table.every_steps == 0)) and step < self.setup.steps:
            self.save(sums)
        return False

    def _check_finite(self, epoch: int, step: int) -> None:
        """The last step's loss, which no later step has looked at (a collective)."""
        _, _, earlier = self.control.settle()
        mine = not self.trainer.loss_was_finite()
        if earlier or any(gather_objects(mine)):
            self._fail_non_finite(epoch, step)

    def _fail_non_finite(self, epoch: int, step: int) -> None:
        lr = self._learning_rate(epoch + (step - 1) / self.setup.steps)
        raise RunFailed(
            f"the loss is not finite at epoch {epoch + 1}, step {step} of {self.setup.steps}, learning rate {lr:.3g}; "
            "the last good checkpoint is kept. Try a smaller optimizer.lr, train.clip_norm, or scheduler.warmup_epochs"
        )

    def _log_step(self, step: int, loss: float, accuracy: float) -> None:
        """Every train.log_every steps: one line, one record."""
        epoch = self.position.epoch + step / self.setup.steps
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": self.position.epoch * self.setup.steps + step,
            "lr": self._learning_rate(self.position.epoch + (step - 1) / self.setup.steps),
            "train/step_loss": loss,
            "train/step_accuracy": accuracy,
        }
        self.display.say(
            f"epoch {self.position.epoch + 1} step {step}/{self.setup.steps}  loss {loss:.4f} accuracy {accuracy:.4f}"
        )
        if self.run is not None and self.accelerator.is_main_process:
            self.position.metrics_bytes = self.run.append_metrics(record)
        if self.tracking is not None:
            self.tracking.log(record, record["step"])

    @contextlib.contextmanager
    def _progress(self, epoch: int) -> Iterator[Bar]:
        total, done = len(self.setup.splits["train"]), self.position.step * self.recipe.train.batch_size
        with self.display.bar(f"epoch {epoch + 1}/{self.recipe.train.epochs}", total, done) as bar:
            yield bar

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        ema = self.trainer.ema
        return contextlib.nullcontext() if ema is None else ema.swapped_in(self.trainer.network)

    # -- stopping and going on ----------------------------------------------------------------------------------------

    def guarded(self, batches: Iterable[Any], rounds: int) -> Iterator[Any]:
        """``batches``, with all processes asking ``rounds`` times whether to stop, however many batches each has."""
        waiting = iter(batches)
        for _ in range(rounds):
            batch = next(waiting, None)
            if batch is not None:
                yield batch
            stop, _, _ = self.control.exchange(stop=self.stop.is_wanted(), save=False, non_finite=False)
            if stop:
                raise StopWanted
        stop, _, _ = self.control.settle()
        if stop:
            raise StopWanted

    def _interrupt(self, sums: Sums) -> None:
        """Save and leave with exit status 3."""
        self.control.settle()
        self.save(sums)
        raise Interrupted(self._stopped_message())

    def _refuse_stop(self) -> None:
        """Between the last epoch and the final evaluation: nothing to save, the checkpoint is there."""
        if any(gather_objects(self.stop.is_wanted())):
            raise Interrupted(self._stopped_message())

    def _stopped_message(self) -> str:
        path = self.run.path if self.run else ""
        reason = next((r for r in gather_objects(self.stop.reason) if r), "a request")
        return f"stopped by {reason} after a checkpoint was written; go on with: toolkit train --resume {path}"

    def save(self, sums: Sums | None = None) -> None:
        """Write a checkpoint (a collective); ``sums`` are those of an epoch under way."""
        self.saved_at = time.monotonic()
        if self.run is None:
            return
        mine = {"sums": [] if sums is None else sums.values.tolist(), "random": random_state()}
        everyone = gather_objects(mine)
        self.position.sums = [each["sums"] for each in everyone] if sums is not None else []
        error = None
        if self.accelerator.is_main_process:
            try:
                self._write_checkpoint([each["random"] for each in everyone])
            except OSError as failure:
                error = f"a checkpoint could not be written ({failure}); the one before it is kept"
        error = broadcast_object(error)
        if error and self.recipe.checkpoint.on_write_error == "stop":
            raise RunFailed(error)
        if error:
            self.display.say(f"warning: {error}")

    def _write_checkpoint(self, random_states: list[Any]) -> None:
        assert self.run is not None
        scaler = self.accelerator.scaler
        content = {
            "recipe_hash": recipe_hash(self.recipe),
            "best_epoch": self.position.best["epoch"] if self.position.best else None,
            "position": asdict(self.position),
            "patience": self.patience.state(),
            "best": self.best.state(),
            "plateau": self.plateau.state(),
            "model": self.setup.built.module.state_dict(),
            "ema": {} if self.trainer.ema is None else self.trainer.ema.averages,
            "optimizer": self.trainer.optimizer.state_dict(),
            "scaler": {} if scaler is None else scaler.state_dict(),
            "random": random_states,
        }
        position = self.position
        save_checkpoint(self.run.checkpoints, position.epoch, position.step, content, self.recipe.checkpoint.keep)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Everything but the model and the position, which came earlier."""
        self.patience.load(checkpoint["patience"])
        self.best.load(checkpoint["best"])
        self.plateau.load(checkpoint["plateau"])
        self.trainer.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.trainer.ema is not None:
            for name, value in checkpoint["ema"].items():
                self.trainer.ema.averages[name].copy_(value)
        if self.accelerator.scaler is not None and checkpoint["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        if len(checkpoint["random"]) == self.accelerator.num_processes:
            restore_random_state(checkpoint["random"][self.accelerator.process_index])
        position = self.position
        if self.run is not None and self.accelerator.is_main_process:
            self.run.truncate_metrics(position.metrics_bytes)
        self.display.say(f"going on after epoch {position.epoch}, step {position.step}")

    def _sums_so_far(self) -> Sums:
        """What this process had counted in the epoch under way; with another number of processes, rank 0 takes all."""
        sums, saved = Sums.zero(self.accelerator.device), self.position.sums
        if len(saved) == self.accelerator.num_processes:
            sums.values += torch.tensor(saved[self.accelerator.process_index]).to(sums.values)
        elif saved and self.accelerator.is_main_process:
            sums.values += torch.tensor(saved, dtype=torch.float64).sum(0).to(sums.values)
        return sums


class StopWanted(Exception):
    """Somebody wants the run to stop while it evaluates; all processes agree."""
