"""The training loop of a run: train, validate, keep the best weights, checkpoint, stop."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from toolkit.data.splits import split_hash
from toolkit.distributed.batchnorm import average_statistics, local_statistics, replace_batch_norms, restore_statistics
from toolkit.distributed.process import StepConsensus, autocast_dtype, broadcast_object, gather_objects
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import Interrupted, RunFailed, UserError
from toolkit.formatting import duration
from toolkit.metrics import higher_is_better
from toolkit.recipe import recipe_hash
from toolkit.runs import Run
from toolkit.trackers import Tracking
from toolkit.training.build_trainer import build_train_step, state_tensors, unfreeze
from toolkit.training.checkpoint import CheckpointStep, best_path, first_not_finite, load_weights
from toolkit.training.console import ProgressBar, epoch_line
from toolkit.training.context import TrainingContext
from toolkit.training.evaluation import EvalResult, evaluate
from toolkit.training.loaders import CachePolicy, DataLoaders, build_loaders
from toolkit.training.lr_schedule import MetricMonitor, ReduceLROnPlateau, epoch_rank, learning_rate
from toolkit.training.optimizer import load_state
from toolkit.training.progress import TrainProgress, random_state, restore_random_state
from toolkit.training.resume import stored_recipe
from toolkit.training.run_writer import RunWriter
from toolkit.training.train_step import RunningMetrics, TrainCallbacks

ADVICE = "Try a smaller optimizer.lr, train.max_grad_norm, or scheduler.warmup_epochs"


class Trainer:
    """Training and evaluation of one run. ``run`` and ``tracking`` are None in a dry run, which writes nothing."""

    def __init__(
        self,
        setup: TrainingContext,
        run: Run | None,
        tracking: Tracking | None,
        stop: GracefulStop,
        checkpoint: dict[str, Any] | None,
        shortcuts: CachePolicy = "all",
    ) -> None:
        self.setup, self.run, self.tracking, self.stop = setup, run, tracking, stop
        self.recipe, self.accelerator, self.display = setup.recipe, setup.accelerator, setup.display
        self.position = TrainProgress()
        table = self.recipe.early_stopping
        self.patience = MetricMonitor(higher_is_better(table.metric), table.min_delta)
        self.plateau = ReduceLROnPlateau(self.recipe.scheduler)
        self.control = StepConsensus()
        self.bar = ProgressBar(None, 0)
        self.saved_at = time.monotonic()
        self.startup_seconds = 0.0
        self.first_image: tuple[float, int] | None = None
        """Time of the first estimate of the time left, and the number of images trained by then."""
        self.is_saved = checkpoint is not None
        """Whether the last attempt to write a checkpoint succeeded."""
        self.resumed_under_changes: CheckpointStep | None = None
        self.journal = RunWriter(run if self.accelerator.is_main_process else None, self.recipe.checkpoint.keep)
        self._place_model()
        if checkpoint is not None:
            self._restore_model(checkpoint)
        self.loaders: DataLoaders = build_loaders(setup, self.stop_aware, shortcuts)
        self.trainer = build_train_step(setup, self.loaders, self.position.epochs_begun)
        if checkpoint is not None:
            self._restore_rest(checkpoint)
        self.journal.begin(self.position.metrics_bytes, self.display.log)

    def _place_model(self) -> None:
        module, train = self.setup.built.module, self.recipe.train
        synchronized = self.accelerator.num_processes > 1 and train.sync_batch_norm
        if synchronized or self.accelerator.device.type == "cpu":  # on CPUs it also sums more exactly than torch's
            replace_batch_norms(module, synchronized=synchronized)
        module.to(self.accelerator.device)
        if train.channels_last:
            module.to(memory_format=torch.channels_last)

    # -- epochs -------------------------------------------------------------------------------------------------------

    def run_epochs(self, until: int | None = None) -> bool:
        """Train until the recipe's last epoch or early stopping, and return True.

        If epoch ``until`` comes first, return False: its checkpoint is written, and the run can be resumed.
        """
        position, epochs = self.position, self.recipe.train.epochs
        last = epochs if until is None else min(until, epochs)
        while position.epoch < last and not position.stopped_early:
            self._epoch(position.epoch)
        self._refuse_stop()
        return position.epoch >= epochs or position.stopped_early

    def _epoch(self, epoch: int) -> None:
        if unfreeze(self.setup, self.trainer, epoch):
            count = len(self.setup.transfer.trainable)
            self.display.log(f"epoch {epoch + 1}: {count} parameter tensors are trained from now on")
        self.setup.transfer.train_mode()
        sums = self._sums_so_far()
        started, images_before = time.perf_counter(), self.position.train_images
        with self._progress(epoch) as self.bar:
            hooks = TrainCallbacks(self._set_lr, lambda step, sums: self._after_step(epoch, step, sums), self._log_step)
            done = self.trainer.train_epoch(self.loaders.train, epoch, self.position.step, sums, hooks)
        self.position.train_seconds += time.perf_counter() - started
        if not done:
            self._interrupt(sums)
        speed = (self.position.train_images - images_before) / max(time.perf_counter() - started, 1e-9)
        self._check_finite(epoch)
        loss, accuracy = sums.figures(self.accelerator)
        record = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.setup.steps,
            "lr": self._learning_rate(epoch),
            "train/loss": loss,
            "train/accuracy": accuracy,
        }
        try:
            if self.setup.has("validation"):
                record |= self.evaluate("validation").figures("val/")
            else:
                self._average_statistics()
        except StopTraining:
            self.position.step = self.setup.steps
            self._interrupt(sums)
        self._close_epoch(epoch, record, speed)

    def _close_epoch(self, epoch: int, record: dict[str, Any], speed: float) -> None:
        """Update the best epoch, early stopping and schedule; write the epoch's metrics and a checkpoint."""
        position, recipe = self.position, self.recipe
        if not math.isfinite(record.get("val/loss", 0.0)):
            reason = f"the validation loss is {record['val/loss']} at epoch {epoch + 1}"
            raise self._not_finite(reason, (epoch, self.setup.steps))
        is_best = self._is_best(record)
        if is_best:
            position.best = record
        if recipe.early_stopping.metric in record:
            self.patience.update(record[recipe.early_stopping.metric])
        limit = recipe.early_stopping.patience
        position.stopped_early = limit is not None and self.patience.waited >= limit
        if recipe.scheduler.name == "plateau":
            self.plateau.update(record[recipe.scheduler.metric])
        position.epoch, position.step, position.sums, position.last = epoch + 1, 0, [], record
        if is_best:
            with self.averaged_weights():
                self.journal.stage_best_weights(epoch + 1, self.setup.built.module.state_dict())
        self.journal.add_line(record)
        if self.tracking is not None:
            self.tracking.log(record, record["step"])
        self.save()
        marked = is_best and recipe.train.best_metric != "last"
        self.display.log(epoch_line(record, recipe.train.epochs, best=marked, images_per_s=speed))
        if position.stopped_early:
            self.display.log(
                f"stopped: {recipe.early_stopping.metric} has not improved by more than "
                f"{recipe.early_stopping.min_delta:g} for {limit} epochs"
            )

    def _is_best(self, record: dict[str, Any]) -> bool:
        """Return whether an epoch is the best so far; with train.best_metric = "last", only the final epoch is."""
        best_metric, best = self.recipe.train.best_metric, self.position.best
        if best_metric == "last":
            return bool(record["epoch"] >= self.recipe.train.epochs)
        return best is None or epoch_rank(record, best_metric) > epoch_rank(best, best_metric)

    def _average_statistics(self) -> None:
        """Average unsynchronized batch norm statistics over all processes (a collective)."""
        if self.accelerator.num_processes > 1 and not self.recipe.train.sync_batch_norm:
            average_statistics(self.setup.built.module)

    def evaluate(self, split: str) -> EvalResult:
        """Evaluate the current model on a split, with EMA weights if the recipe has them (a collective)."""
        self._average_statistics()
        with self.averaged_weights():
            return self.evaluate_network(self.trainer.network, split)

    def evaluate_network(self, network: nn.Module, split: str) -> EvalResult:
        """Evaluate a module with the architecture of the trained one on a split (a collective).

        Raises StopTraining if a stop was requested.
        """
        loader, rounds = self.loaders.evaluation(split)
        labels = self.setup.labels(split)
        with self.display.bar(f"evaluating on {split}", len(labels)) as bar:
            return evaluate(
                network,
                self._shown(bar, self.stop_aware(loader, rounds)),
                labels,
                self.accelerator.device,
                autocast_dtype=autocast_dtype(self.accelerator.mixed_precision),
                channels_last=self.recipe.train.channels_last,
            )

    def dry_run_step(self) -> float:
        """Run one batch forward and backward, and return its loss."""
        self.setup.transfer.train_mode()
        sums = RunningMetrics.zero(self.accelerator.device)
        hooks = TrainCallbacks(self._set_lr, lambda step, sums: True, lambda *_: None)
        self.trainer.train_epoch(self.loaders.train, 0, 0, sums, hooks)
        return sums.figures(self.accelerator)[0]

    def close(self) -> None:
        """Stop the data workers and leave the process group (a collective)."""
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

    def _after_step(self, epoch: int, step: int, sums: RunningMetrics) -> bool:
        """Count the step, agree with the other processes, and checkpoint if due. Return True to stop training."""
        position, batch_size = self.position, self.recipe.train.batch_size
        count = min(batch_size, len(self.setup.splits["train"]) - (step - 1) * batch_size)
        position.step = step
        position.train_images += count
        self.bar.advance(count, lambda: self._progress_note(epoch, step, sums))
        table = self.recipe.checkpoint
        due = bool(table.every_minutes) and time.monotonic() - self.saved_at > table.every_minutes * 60
        stop, save, non_finite = self.control.exchange(
            stop=self.stop.is_wanted(),
            save=due and self.accelerator.is_main_process,
            non_finite=self.trainer.finite.first_nonfinite_step() is not None,
        )
        if non_finite:
            self._check_finite(epoch)
        if stop:
            return True
        if (save or (table.every_steps and step % table.every_steps == 0)) and step < self.setup.steps:
            self.save(sums)
        return False

    def _check_finite(self, epoch: int) -> None:
        """Raise RunFailed if the loss of any step so far was not finite (a collective)."""
        self.control.settle()
        self._fail_where_bad(epoch, gather_objects(self.trainer.finite.first_nonfinite_step(wait=True)))

    def _fail_where_bad(self, epoch: int, steps: list[int | None]) -> None:
        """Raise RunFailed if any process has a step with a non-finite loss; ``steps`` has the first one of each."""
        step = min((step for step in steps if step is not None), default=None)
        if step is None:
            return
        lr = self._learning_rate(epoch + (step - 1) / self.setup.steps)
        reason = (
            f"the loss is not finite at epoch {epoch + 1}, step {step} of {self.setup.steps}, learning rate {lr:.3g}"
        )
        raise self._not_finite(reason, (epoch, step - 1))

    def _not_finite(self, reason: str, place: CheckpointStep) -> RunFailed:
        """Mark the checkpoint at ``place``, whose weights led to the failure, as refused; return the error to raise.

        A collective. Two checkpoints are not marked: one at the end of an epoch, because its validation loss was
        finite, and the one that this process resumed from with changes, because they may be the cause.
        """
        if place[1] and place != self.resumed_under_changes:
            self.journal.refuse(place, reason)
        return RunFailed(f"{reason}; {self.kept_text()}. {ADVICE}")

    def kept_text(self) -> str:
        """Return a phrase that names the checkpoint to resume from, for messages (a collective)."""
        place = broadcast_object(self.journal.latest())
        if place is None:
            return "there is no checkpoint to resume from"
        epoch, step = place
        where = f"epoch {epoch + 1}, step {step}" if step else f"the end of epoch {epoch}"
        return f"the checkpoint of {where} is kept"

    def _log_step(self, step: int, loss: float, accuracy: float) -> None:
        """Write a log line and a metrics record; called every ``train.log_every`` steps."""
        epoch = self.position.epoch + step / self.setup.steps
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": self.position.epoch * self.setup.steps + step,
            "lr": self._learning_rate(self.position.epoch + (step - 1) / self.setup.steps),
            "train/step_loss": loss,
            "train/step_accuracy": accuracy,
        }
        self.display.log(
            f"epoch {self.position.epoch + 1} step {step}/{self.setup.steps}  loss {loss:.4f} accuracy {accuracy:.4f}"
        )
        self.journal.add_line(record)
        if self.tracking is not None:
            self.tracking.log(record, record["step"])

    def _shown(self, bar: ProgressBar, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield evaluation batches and advance the progress bar, assuming that all processes advance equally."""
        for batch in batches:
            yield batch
            bar.advance(len(batch[0]) * self.accelerator.num_processes)

    def _progress_note(self, epoch: int, step: int, sums: RunningMetrics) -> str:
        """Return this process's mean loss in the epoch so far, and the estimated time left for the whole run."""
        loss, _, count = sums.values.tolist()
        images, train = len(self.setup.splits["train"]), self.recipe.train
        done = epoch * images + min(step * train.batch_size, images)
        if self.first_image is None:
            self.first_image = (time.perf_counter(), done)
        began, before = self.first_image
        shown = f"loss {loss / count:.4f}"
        if done == before:
            return shown
        left = (train.epochs * images - done) * (time.perf_counter() - began) / (done - before)
        return f"{shown}, {duration(left)} left for all epochs"

    @contextlib.contextmanager
    def _progress(self, epoch: int) -> Iterator[ProgressBar]:
        total, done = len(self.setup.splits["train"]), self.position.step * self.recipe.train.batch_size
        with self.display.bar(f"epoch {epoch + 1}/{self.recipe.train.epochs}", total, done) as bar:
            yield bar

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has its EMA weights, if the recipe has an EMA."""
        ema = self.trainer.ema
        return contextlib.nullcontext() if ema is None else ema.swapped_in(self.trainer.network)

    # -- stopping and resuming ----------------------------------------------------------------------------------------

    def stop_aware(self, batches: Iterable[Any], rounds: int) -> Iterator[Any]:
        """Yield ``batches``; raise StopTraining on all processes if a stop is requested on any of them (a collective).

        The processes agree ``rounds`` times, which must be equal on all of them; numbers of batches may differ.
        """
        waiting = iter(batches)
        for _ in range(rounds):
            batch = next(waiting, None)
            if batch is not None:
                yield batch
            stop, _, _ = self.control.exchange(stop=self.stop.is_wanted(), save=False, non_finite=False)
            if stop:
                raise StopTraining
        stop, _, _ = self.control.settle()
        if stop:
            raise StopTraining

    def accept_changes(self) -> None:
        """Adopt a changed recipe or changed data after resuming: validate again and write a checkpoint with them."""
        position = self.position
        self.resumed_under_changes = (position.epoch, position.step)
        if position.best is not None and self.setup.has("validation"):
            self._score_again(position.best)
        self._take_last_if_best()
        self.save(self._sums_so_far() if position.step else None)

    def _score_again(self, best: dict[str, Any]) -> None:
        """Validate the best and the last epoch again under the changes, so that later epochs compare with them."""
        position, module = self.position, self.setup.built.module
        now = self.evaluate("validation").figures("val/") if position.step == 0 else {}
        if position.step == 0 and best["epoch"] == position.epoch:
            scored = best | now
        else:
            assert self.run is not None
            state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            module.load_state_dict(load_weights(best_path(self.run.checkpoints, best["epoch"])))
            scored = best | self.evaluate_network(self.trainer.network, "validation").figures("val/")
            module.load_state_dict(state)
        if position.last is not None and position.step == 0:
            position.last = position.last | now
        if scored != best:
            position.best = scored
            self.patience.best, self.patience.waited = scored.get(self.recipe.early_stopping.metric), 0
            self.display.log(
                f"validated again under the changes: epoch {best['epoch']}, the best so far, has "
                f"loss {scored['val/loss']:.4f} and accuracy {scored['val/accuracy']:.4f}; patience starts over"
            )

    def _interrupt(self, sums: RunningMetrics) -> None:
        """Write a checkpoint and raise Interrupted (exit status 3)."""
        self.control.settle()
        self.save(sums)
        raise Interrupted(self._stopped_message())

    def _refuse_stop(self) -> None:
        """Raise Interrupted if a stop was requested; the checkpoint of the last epoch exists already."""
        if any(gather_objects(self.stop.is_wanted())):
            raise Interrupted(self._stopped_message())

    def _stopped_message(self) -> str:
        path = self.run.path if self.run else ""
        reason = next((r for r in gather_objects(self.stop.reason) if r), "a request")
        saved = "after a checkpoint was written" if self.is_saved else f"without a new checkpoint; {self.kept_text()}"
        return f"stopped by {reason} {saved}; resume with: toolkit train --resume {path}"

    def save(self, sums: RunningMetrics | None = None) -> None:
        """Write a checkpoint (a collective). ``sums``: running metrics of an unfinished epoch.

        Raises RunFailed if weights or optimizer state are not finite; earlier checkpoints are kept.
        """
        self.saved_at = time.monotonic()
        if self.run is None:
            return
        mine = {
            "bad_step": self.trainer.finite.first_nonfinite_step(wait=True),
            "not_finite": first_not_finite(state_tensors(self.setup.built.module, self.trainer)),
            "sums": [] if sums is None else sums.state(),
            "random": random_state(),
            "statistics": {} if self.recipe.train.sync_batch_norm else local_statistics(self.setup.built.module),
        }
        everyone = gather_objects(mine)
        self._fail_where_bad(self.position.epoch, [each["bad_step"] for each in everyone])
        if (name := next((each["not_finite"] for each in everyone if each["not_finite"]), None)) is not None:
            where = f"epoch {self.position.epochs_begun}" + (
                f", step {self.position.step}" if self.position.step else ""
            )
            reason = f"{name} is not finite after {where}, so no checkpoint of it is written"
            raise RunFailed(f"{reason}; {self.kept_text()}. {ADVICE}")
        self.position.sums = [each["sums"] for each in everyone] if sums is not None else []
        self.is_saved = self._written(lambda: self._write_checkpoint(everyone), "a checkpoint could not be written")

    def finish_writing(self) -> None:
        """Write all results still held in memory (a collective). Raises RunFailed if they cannot be written."""
        self._written(self.journal.flush, "results could not be written", must=True)

    def _written(self, write: Callable[[], None], trouble: str, *, must: bool = False) -> bool:
        """Call ``write()`` on the main process and return whether it succeeded on all processes (a collective).

        On failure, raise RunFailed if ``must`` or if checkpoint.on_write_error is "stop"; otherwise log a warning.
        """
        error = None
        if self.accelerator.is_main_process:
            try:
                write()
            except OSError as failure:
                error = f"{trouble} in {self.run.path if self.run else ''} ({failure.strerror or failure})"
        error = broadcast_object(error)
        if error and (must or self.recipe.checkpoint.on_write_error == "stop"):
            raise RunFailed(f"{error}; {self.kept_text()}. Free disk space, then continue with --resume")
        if error:
            self.display.log(f"warning: {error}; {self.kept_text()}, and the run continues")
        return not error

    def _write_checkpoint(self, everyone: list[dict[str, Any]]) -> None:
        self.journal.flush()
        self.position.metrics_bytes = self.journal.length
        scaler = self.accelerator.scaler
        content = {
            "recipe_hash": recipe_hash(self.recipe),
            "recipe": stored_recipe(self.recipe),
            "batches": self._batches,
            "drawn": self.setup.drawn,
            "classes": list(self.setup.dataset.classes),
            "optimizer_name": self.recipe.optimizer.name,
            "best_epoch": self.position.best["epoch"] if self.position.best else None,
            "best_weights": self.journal.best_weights,
            "position": asdict(self.position),
            "metrics_sha256": self.journal.digest.hexdigest(),
            "patience": self.patience.state(),
            "plateau": self.plateau.state(),
            "model": self.setup.built.module.state_dict(),
            "ema": {} if self.trainer.ema is None else self.trainer.ema.averages,
            "optimizer": self.trainer.optimizer.state_dict(),
            "scaler": {} if scaler is None else scaler.state_dict(),
            "random": [each["random"] for each in everyone],
            "statistics": [each["statistics"] for each in everyone],
        }
        self.journal.save((self.position.epoch, self.position.step), content)

    @functools.cached_property
    def _batches(self) -> list[str | int | bool]:
        """Everything that determines an epoch's batches; a run resumes mid-epoch only if all of it is unchanged."""
        setup, train = self.setup, self.recipe.train
        images = split_hash(setup.dataset, setup.splits)
        return [images, self.recipe.recipe.seed, train.batch_size, train.drop_last, train.sampling]

    def _restore_model(self, checkpoint: dict[str, Any]) -> None:
        """Restore the model and the training progress, which must precede the loaders and the optimizer."""
        if checkpoint["optimizer_name"] != self.recipe.optimizer.name:
            raise UserError(
                f"the run was trained with optimizer.name = {checkpoint['optimizer_name']!r}, and its state does not "
                f"fit {self.recipe.optimizer.name!r}: resume with the former, or start a new run"
            )
        try:
            self.setup.built.module.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the checkpoint's model does not match the recipe: {reason:.300}") from None
        self.position = TrainProgress(**checkpoint["position"])
        self.journal.best_weights = checkpoint.get("best_weights")
        if self.position.step and checkpoint["batches"] != self._batches:
            self.position.step, self.position.sums = 0, []
            self.display.log(f"the batches have changed: epoch {self.position.epoch + 1} starts over")

    def _restore_rest(self, checkpoint: dict[str, Any]) -> None:
        """Restore everything except the model and the training progress, which were restored earlier."""
        self.patience.load(checkpoint["patience"])
        self.plateau.load(checkpoint["plateau"])
        try:
            load_state(self.trainer.optimizer, checkpoint["optimizer"])
        except ValueError as error:
            raise UserError(f"the checkpoint's optimizer state does not fit the recipe: {error}") from None
        if self.trainer.ema is not None:
            for name, value in checkpoint["ema"].items():
                self.trainer.ema.averages[name].copy_(value)
        if self.accelerator.scaler is not None and checkpoint["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        if len(checkpoint["random"]) == self.accelerator.num_processes:
            restore_random_state(checkpoint["random"][self.accelerator.process_index])
            restore_statistics(self.setup.built.module, checkpoint["statistics"][self.accelerator.process_index])
        if checkpoint.get("best_lost"):
            self._choose_best_anew()
        self.display.log(f"resuming after epoch {self.position.epoch}, step {self.position.step}")

    def _take_last_if_best(self) -> None:
        """Stage the current weights as the best ones if they end an epoch that is the best under the current recipe."""
        position = self.position
        if position.step == 0 and position.last is not None and self._is_best(position.last):
            position.best = position.last
            with self.averaged_weights():
                self.journal.stage_best_weights(position.epoch, self.setup.built.module.state_dict())

    def _choose_best_anew(self) -> None:
        """Select the best epoch again after its weights were lost: the last epoch, if its weights are the current ones.

        Otherwise there is no best epoch until the next one ends.
        """
        position = self.position
        position.best, self.journal.best_weights = None, None
        self._take_last_if_best()
        self.display.log(f"the best epoch is chosen from epoch {position.epoch + (position.step > 0)} onwards")

    def _sums_so_far(self) -> RunningMetrics:
        """Restore the running metrics of an unfinished epoch; if the number of processes changed, rank 0 takes all."""
        sums, saved = RunningMetrics.zero(self.accelerator.device), self.position.sums
        if len(saved) == self.accelerator.num_processes:
            sums.add_state(saved[self.accelerator.process_index])
        elif self.accelerator.is_main_process:
            for state in saved:
                sums.add_state(state)
        return sums


class StopTraining(Exception):
    """Raised on all processes if a stop is requested during evaluation or precomputation."""
