"""The training loop of a run: train, validate, keep the best weights, checkpoint, stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from toolkit.distributed.batchnorm import average_statistics
from toolkit.distributed.process import (
    StepConsensus,
    StopTraining,
    autocast_dtype,
    broadcast_object,
    gather_objects,
    leave,
    main_only,
)
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import Interrupted, RunFailed
from toolkit.formatting import duration
from toolkit.metrics import higher_is_better
from toolkit.models.pretrained import pack_state
from toolkit.runs import Run
from toolkit.trackers import Tracking
from toolkit.training.accum_steps import settle_accum_steps
from toolkit.training.batch_norm_statistics import update_average_statistics
from toolkit.training.build_trainer import build_train_step, place_model, unfreeze
from toolkit.training.checkpoint import CheckpointStep, first_not_finite, load_weights
from toolkit.training.console import ProgressBar, epoch_line
from toolkit.training.context import TrainingContext
from toolkit.training.evaluation import evaluate
from toolkit.training.knn_head import refit_knn_head, train_knn_head
from toolkit.training.l2_sp import build_l2_sp
from toolkit.training.loaders import CachePolicy, DataLoaders, build_loaders
from toolkit.training.logistic_head import refit_logistic_head, train_logistic_head
from toolkit.training.lp_ft import setup_of_phase
from toolkit.training.lr_schedule import MetricMonitor, ReduceLROnPlateau, epoch_rank, scheduled_rate
from toolkit.training.resume import choose_best_again
from toolkit.training.run_writer import RunWriter
from toolkit.training.state import (
    TrainProgress,
    checkpoint_content,
    process_state,
    restore_model,
    restore_rest,
    state_tensors,
)
from toolkit.training.task import EvalResult, Task
from toolkit.training.train_step import RunningMetrics, TrainCallbacks, TrainStep
from toolkit.writing import write_atomically

EpochCallback = Callable[[Run, dict[str, Any]], object]
"""Called on the main process at the end of each epoch, with the run and the epoch's line of metrics.jsonl.

Returning True ends the training, as early stopping does. A resumed run calls it again for an epoch that was not saved.
"""

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
        cache_policy: CachePolicy = "all",
        callbacks: Sequence[EpochCallback] = (),
    ) -> None:
        self.callbacks = callbacks
        self.setup, self.run, self.tracking, self.stop = setup, run, tracking, stop
        self.recipe, self.accelerator, self.display = setup.recipe, setup.accelerator, setup.display
        self.progress = TrainProgress()
        table = self.recipe.early_stopping
        self.patience = MetricMonitor(higher_is_better(table.metric), table.min_delta)
        self.plateau = ReduceLROnPlateau(self.recipe.scheduler)
        self.consensus = StepConsensus(stop)
        self.bar = ProgressBar(None, 0)
        self.saved_at = time.monotonic()
        self.startup_seconds = 0.0
        self.first_image: tuple[float, int] | None = None
        """Time of the first estimate of the time left, and the number of images trained by then."""
        self.is_saved = checkpoint is not None
        """Whether the last attempt to write a checkpoint succeeded."""
        self.resumed_under_changes: CheckpointStep | None = None
        self.writer = RunWriter(run if self.accelerator.is_main_process else None, self.recipe.checkpoint.keep)
        place_model(setup)
        if checkpoint is not None:
            restore_model(self, checkpoint)
        self.cache_policy: CachePolicy = cache_policy
        self.loaders: DataLoaders
        self.train_step: TrainStep
        self._build_phase(self.progress.epochs_begun)
        self.train_step.l2_sp = build_l2_sp(setup, None if checkpoint is None else run)
        if self.recipe.train.grad_accum_steps == "auto":
            settle_accum_steps(self, checkpoint)
        if checkpoint is not None:
            restore_rest(self, checkpoint)
            if checkpoint.get("best_lost"):
                choose_best_again(self)
            if self.recipe.transfer.wise and self.progress.epochs_begun > self.recipe.transfer.epochs_of_probe:
                assert run is not None
                load_weights(
                    run.probed_weights
                )  # raises an error now if it is damaged, because the end of the run needs it
            self.display.log(f"resuming after epoch {self.progress.epoch}, step {self.progress.step}")
        self.writer.begin(self.progress.metrics_bytes, self.display.log)

    def _build_phase(self, epochs_begun: int) -> None:
        """Build loaders, optimizer and wrapped model for a run that has begun ``epochs_begun`` epochs (a collective).

        Training has one phase, or with transfer.mode = "lp_ft" two.
        """
        setup = setup_of_phase(self.setup, epochs_begun)
        if setup.recipe.transfer.mode == "lp_ft":
            setup.transfer.unfreeze_for_epoch(epochs_begun)
        self.loaders = build_loaders(setup, self.consensus.stop_aware, self.cache_policy)
        self.train_step = build_train_step(setup, self.loaders, epochs_begun)

    def begin_fine_tuning(self) -> None:
        """Begin the second phase of transfer.mode = "lp_ft" (a collective). Raises StopTraining on request."""
        self.loaders.close()
        step = self.train_step
        self.accelerator.unwrap_model(step.wrapped, keep_fp32_wrapper=False)
        step.wrapped = step.network  # removes the last reference to DDP, whose hooks must not remain on the head
        self.accelerator.free_memory()
        if self.recipe.transfer.wise:
            self._written(self._write_probed_weights, "the weights after the probe could not be written", must=True)
        self._build_phase(self.recipe.transfer.epochs_of_probe + 1)
        self.train_step.l2_sp = step.l2_sp
        self.first_image = None

    def _write_probed_weights(self) -> None:
        if self.run is not None:
            write_atomically(self.run.probed_weights, pack_state(self.setup.built.module.state_dict()))

    # -- epochs -------------------------------------------------------------------------------------------------------

    def run_epochs(self, until: int | None = None) -> bool:
        """Train until the run's last epoch or early stopping, and return True.

        If epoch ``until`` comes first, return False: its checkpoint is written, and the run can be resumed.
        """
        progress, epochs = self.progress, self.setup.length.epochs
        last = epochs if until is None else min(until, epochs)
        while progress.epoch < last and not progress.stopped_early:
            self._epoch(progress.epoch)
        self._raise_if_stopped()
        return progress.epoch >= epochs or progress.stopped_early

    def _epoch(self, epoch: int) -> None:
        if self._unfreeze(epoch):
            count = len(self.setup.transfer.trainable)
            self.display.log(f"epoch {epoch + 1}: {count} parameter tensors are trained from now on")
        self.setup.transfer.train_mode()
        sums = RunningMetrics.restored(self.progress.sums, self.accelerator, self.recipe.train.virtual_processes)
        started, images_before = time.perf_counter(), self.progress.train_images
        length, batch_size = self.setup.length, self.recipe.train.batch_size
        total = min(len(self.setup.splits["train"]), length.steps_in(epoch) * batch_size)
        with self.display.bar(f"epoch {epoch + 1}/{length.epochs}", total, self.progress.step * batch_size) as self.bar:
            hooks = TrainCallbacks(self._set_lr, lambda step, sums: self._after_step(epoch, step, sums), self._log_step)
            if self.recipe.transfer.is_fitted:
                is_knn = self.recipe.transfer.mode == "knn"
                (train_knn_head if is_knn else train_logistic_head)(self, sums)
                is_complete = True
            else:
                is_complete = self.train_step.train_epoch(self.loaders.train, epoch, self.progress.step, sums, hooks)
        self.progress.train_seconds += time.perf_counter() - started
        if not is_complete:
            self._interrupt(sums)
        speed = (self.progress.train_images - images_before) / max(time.perf_counter() - started, 1e-9)
        self._check_finite(epoch)
        loss, accuracy = sums.means(self.accelerator)
        record = {
            "epoch": epoch + 1,
            "step": length.steps_until(epoch + 1),
            **({} if self.recipe.transfer.is_fitted else {"lr": self._learning_rate(epoch)}),
            "train/loss": loss,
            "train/accuracy": accuracy,
        }
        try:
            update_average_statistics(self, epoch)
            if self.setup.has("validation"):
                validated = self.evaluate("validation")
                record |= self.setup.task.with_thresholds_of(validated).metrics(validated, "val/")
            else:
                self._average_statistics()
        except StopTraining:
            self.progress.step = length.steps_in(epoch)
            self._interrupt(sums)
        if self.recipe.transfer.refit and self.setup.has("validation"):
            (refit_knn_head if self.recipe.transfer.mode == "knn" else refit_logistic_head)(self)
        self._close_epoch(epoch, record, speed)

    def _unfreeze(self, epoch: int) -> bool:
        """Train more parameters from this epoch on, if the transfer mode says so; return whether it does."""
        if self.recipe.transfer.mode != "lp_ft":
            return unfreeze(self.setup, self.train_step, epoch)
        if not self.setup.transfer.unfreeze_for_epoch(epoch + 1):
            return False
        try:
            self.begin_fine_tuning()
        except StopTraining:
            self.consensus.wait()
            raise Interrupted(self._stopped_message()) from None
        return True

    def _close_epoch(self, epoch: int, record: dict[str, Any], speed: float) -> None:
        """Update the best epoch, early stopping and schedule; write the epoch's metrics and a checkpoint."""
        progress, recipe = self.progress, self.recipe
        if not math.isfinite(record.get("val/loss", 0.0)):
            reason = f"the validation loss is {record['val/loss']} at epoch {epoch + 1}"
            raise self._not_finite(reason, (epoch, self.setup.length.steps_in(epoch)))
        is_probe = epoch < recipe.transfer.epochs_of_probe
        if recipe.early_stopping.metric in record and not is_probe:
            self.patience.update(record[recipe.early_stopping.metric])
        limit = recipe.early_stopping.patience
        has_converged = limit is not None and self.patience.waited >= limit and not is_probe
        progress.stopped_early = self._end_of_callbacks(record) or has_converged
        is_best = self._is_best(record)
        if is_best:
            progress.best = record
        if recipe.scheduler.name == "plateau" and not is_probe:
            self.plateau.update(record[recipe.scheduler.metric])
        progress.epoch, progress.step, progress.sums, progress.last = epoch + 1, 0, [], record
        if is_best:
            with self.averaged_weights():
                self.writer.stage_best_weights(epoch + 1, self.setup.built.module.state_dict())
        self.writer.add_line(record)
        self.writer.add_speed(epoch + 1, speed)
        if self.tracking is not None:
            self.tracking.log(record, record["step"])
        self.save()
        marked = is_best and recipe.train.best_metric != "last"
        self.display.log(epoch_line(record, self.setup.length.epochs, best=marked, images_per_s=speed))
        if progress.stopped_early and not has_converged:
            self.display.log("stopped by a callback")
        elif has_converged:
            self.display.log(
                f"stopped: {recipe.early_stopping.metric} has not improved by more than "
                f"{recipe.early_stopping.min_delta:g} for {limit} epochs"
            )

    def _end_of_callbacks(self, record: dict[str, Any]) -> bool:
        """Call the callbacks on the main process; return whether one of them ends the training (a collective)."""
        run = self.run
        if run is None or not self.callbacks:
            return False
        return main_only(self.accelerator, lambda: True in [callback(run, record) for callback in self.callbacks])

    def _is_best(self, record: dict[str, Any]) -> bool:
        """Return whether an epoch is the best so far; with train.best_metric = "last", only the final epoch is."""
        best_metric, best = self.recipe.train.best_metric, self.progress.best
        if best_metric == "last":
            return self.progress.stopped_early or bool(record["epoch"] >= self.setup.length.epochs)
        probe = self.recipe.transfer.epochs_of_probe
        if self.recipe.transfer.wise and best is not None and best["epoch"] <= probe < record["epoch"]:
            return True  # interpolation is between the probe and the best epoch of fine-tuning
        return best is None or epoch_rank(record, best_metric) > epoch_rank(best, best_metric)

    def _average_statistics(self) -> None:
        """Average unsynchronized batch norm statistics over all processes (a collective)."""
        train = self.recipe.train
        if self.accelerator.num_processes > 1 and not train.sync_batch_norm and not train.virtual_processes:
            average_statistics(self.setup.built.module)

    def evaluate(self, split: str) -> EvalResult:
        """Evaluate the current model on a split, with averaged weights if the recipe has them (a collective)."""
        self._average_statistics()
        with self.averaged_weights():
            return self.evaluate_network(self.train_step.network, split)

    def evaluate_network(self, network: nn.Module, split: str, task: Task | None = None) -> EvalResult:
        """Evaluate a module with the architecture of the trained one on a split (a collective).

        ``task``: determines the outcomes, in place of the run's task.
        Raises StopTraining if a stop was requested.
        """
        loader, rounds = self.loaders.evaluation(split)
        labels = self.setup.labels(split)
        with self.display.bar(f"evaluating on {split}", len(labels)) as bar:
            return evaluate(
                network,
                self._with_progress(bar, self.consensus.stop_aware(loader, rounds)),
                labels,
                task or self.setup.task,
                self.accelerator.device,
                autocast_dtype=autocast_dtype(self.accelerator.mixed_precision),
                channels_last=self.recipe.train.channels_last,
            )

    def dry_run_step(self) -> float:
        """Run one batch forward and backward, with transfer.mode = "lp_ft" in each phase, and return the last loss."""
        loss = self._dry_run_epoch(0)
        if probe := self.recipe.transfer.epochs_of_probe:
            self.begin_fine_tuning()
            loss = self._dry_run_epoch(probe)
        return loss

    def _dry_run_epoch(self, epoch: int) -> float:
        self.setup.transfer.train_mode()
        sums = RunningMetrics.zero(self.accelerator.device, self.recipe.train.virtual_processes)
        hooks = TrainCallbacks(self._set_lr, lambda step, sums: True, lambda *_: None)
        self.train_step.train_epoch(self.loaders.train, epoch, 0, sums, hooks)
        return sums.means(self.accelerator)[0]

    def close(self) -> None:
        """Leave the process group and stop the data workers (a collective)."""
        leave(self.accelerator)
        self.loaders.close()

    # -- within an epoch ----------------------------------------------------------------------------------------------

    def _learning_rate(self, epoch: float, scale: float = 1.0) -> float:
        return scheduled_rate(self.recipe, epoch, self.setup.length, scale, self.plateau.factor)

    def _set_lr(self, epoch: float) -> None:
        for group in self.train_step.optimizer.param_groups:
            group["lr"] = self._learning_rate(epoch, group["lr_scale"])

    def _after_step(self, epoch: int, step: int, sums: RunningMetrics) -> bool:
        """Count the step, synchronize with the other processes, and checkpoint if due. Return True to stop training."""
        progress, batch_size = self.progress, self.recipe.train.batch_size
        count = min(batch_size, len(self.setup.splits["train"]) - (step - 1) * batch_size)
        progress.step = step
        progress.train_images += count
        self.bar.advance(count, lambda: self._progress_notes(epoch, step, sums))
        table = self.recipe.checkpoint
        due = bool(table.every_minutes) and time.monotonic() - self.saved_at > table.every_minutes * 60
        stop, save, non_finite = self.consensus.exchange(
            save=due and self.accelerator.is_main_process,
            non_finite=self.train_step.finite.first_nonfinite_step() is not None,
        )
        if non_finite:
            self._check_finite(epoch)
        if stop:
            return True
        if (save or (table.every_steps and step % table.every_steps == 0)) and step < self.setup.length.steps_in(epoch):
            self.save(sums)
        return False

    def _check_finite(self, epoch: int) -> None:
        """Raise RunFailed if the loss of any step so far was not finite (a collective)."""
        self.consensus.wait()
        self._raise_if_nonfinite(epoch, gather_objects(self.train_step.finite.first_nonfinite_step(wait=True)))

    def _raise_if_nonfinite(self, epoch: int, steps: list[int | None]) -> None:
        """Raise RunFailed if any process has a step with a non-finite loss; ``steps`` has the first one of each."""
        step = min((step for step in steps if step is not None), default=None)
        if step is None:
            return
        lr = self._learning_rate(epoch + (step - 1) / self.setup.steps)
        where = f"epoch {epoch + 1}, step {step} of {self.setup.length.steps_in(epoch)}"
        reason = f"the loss is not finite at {where}, learning rate {lr:.3g}"
        raise self._not_finite(reason, (epoch, step - 1))

    def _not_finite(self, reason: str, position: CheckpointStep) -> RunFailed:
        """Mark the checkpoint at ``position``, whose weights led to the failure, as refused; return the error to raise.

        A collective. Two checkpoints are not marked: one at the end of an epoch, because its validation loss was
        finite, and the one that this process resumed from with changes, because they may be the cause.
        """
        if position[1] and position != self.resumed_under_changes:
            self.writer.refuse(position, reason)
        return RunFailed(f"{reason}; {self.kept_text()}. {ADVICE}")

    def kept_text(self) -> str:
        """Return a phrase for messages that names the checkpoint from which the run can be resumed (a collective)."""
        position = broadcast_object(self.writer.latest())
        if position is None:
            return "there is no checkpoint to resume from"
        epoch, step = position
        where = f"epoch {epoch + 1}, step {step}" if step else f"the end of epoch {epoch}"
        return f"the checkpoint of {where} is kept"

    def _log_step(self, step: int, loss: float, accuracy: float) -> None:
        """Write a log line and a metrics record; called every ``train.log_every`` steps."""
        epoch = self.progress.epoch + step / self.setup.steps
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": self.progress.epoch * self.setup.steps + step,
            "lr": self._learning_rate(self.progress.epoch + (step - 1) / self.setup.steps),
            "train/step_loss": loss,
            "train/step_accuracy": accuracy,
        }
        steps = self.setup.length.steps_in(self.progress.epoch)
        self.display.log(
            f"epoch {self.progress.epoch + 1} step {step}/{steps}  loss {loss:.4f} accuracy {accuracy:.4f}"
        )
        self.writer.add_line(record)
        if self.tracking is not None:
            self.tracking.log(record, record["step"])

    def _with_progress(self, bar: ProgressBar, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield evaluation batches and advance the progress bar, assuming that all processes are equally fast."""
        for batch in batches:
            yield batch
            bar.advance(len(batch[0]) * self.accelerator.num_processes)

    def _progress_notes(self, epoch: int, step: int, sums: RunningMetrics) -> list[str]:
        """Return this process's mean loss in the epoch so far, the best epoch's metric, and the time left for all."""
        loss, _, count = sums.values.sum(0).tolist()
        images, train = len(self.setup.splits["train"]), self.recipe.train
        probe = self.recipe.transfer.epochs_of_probe
        epochs, what = (probe, "the probe") if epoch < probe else (self.setup.length.exact_epochs, "all epochs")
        done = epoch * images + min(step * train.batch_size, images)
        if self.first_image is None:
            self.first_image = (time.perf_counter(), done)
        (began, before), shown = self.first_image, [f"loss {loss / count:.4f}"]
        if self.progress.best is not None and train.best_metric in self.progress.best:
            shown.append(f"best {self.progress.best[train.best_metric]:.4f}")
        if done == before:
            return shown
        left = (epochs * images - done) * (time.perf_counter() - began) / (done - before)
        return [*shown, f"{duration(left)} left for {what}"]

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has its averaged weights, if the recipe has an average of them."""
        average = self.train_step.average
        if average is None or not average.is_evaluated:
            return contextlib.nullcontext()
        return average.swapped_in(self.train_step.network)

    # -- stopping and resuming ----------------------------------------------------------------------------------------

    def _interrupt(self, sums: RunningMetrics) -> None:
        """Write a checkpoint and raise Interrupted (exit status 3)."""
        self.consensus.wait()
        self.save(sums)
        raise Interrupted(self._stopped_message())

    def _raise_if_stopped(self) -> None:
        """Raise Interrupted if a stop was requested; the last epoch's checkpoint is already written."""
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
            "bad_step": self.train_step.finite.first_nonfinite_step(wait=True),
            "not_finite": first_not_finite(state_tensors(self)),
            "sums": [] if sums is None else sums.state(),
            **process_state(self),
        }
        everyone = gather_objects(mine)
        self._raise_if_nonfinite(self.progress.epoch, [each["bad_step"] for each in everyone])
        if (name := next((each["not_finite"] for each in everyone if each["not_finite"]), None)) is not None:
            step = f", step {self.progress.step}" if self.progress.step else ""
            where = f"epoch {self.progress.epochs_begun}{step}"
            reason = f"{name} is not finite after {where}, so no checkpoint is written"
            raise RunFailed(f"{reason}; {self.kept_text()}. {ADVICE}")
        self.progress.sums = [each["sums"] for each in everyone] if sums is not None else []
        self.is_saved = self._written(lambda: self._write_checkpoint(everyone), "a checkpoint could not be written")

    def finish_writing(self) -> None:
        """Write all results that are still in memory (a collective). Raises RunFailed if they cannot be written."""
        self._written(self.writer.flush, "results could not be written", must=True)

    def _written(self, write: Callable[[], None], problem: str, *, must: bool = False) -> bool:
        """Call ``write()`` on the main process and return whether it succeeded on all processes (a collective).

        On failure, raise RunFailed if ``must`` or if checkpoint.on_write_error is "stop"; otherwise log a warning.
        """
        error = None
        if self.accelerator.is_main_process:
            try:
                write()
            except OSError as failure:
                error = f"{problem} in {self.run.path if self.run else ''} ({failure.strerror or failure})"
        error = broadcast_object(error)
        if error and (must or self.recipe.checkpoint.on_write_error == "stop"):
            raise RunFailed(f"{error}; {self.kept_text()}. Free disk space, then continue with --resume")
        if error:
            self.display.log(f"warning: {error}; {self.kept_text()}, and the run continues")
        return not error

    def _write_checkpoint(self, processes: list[dict[str, Any]]) -> None:
        self.writer.flush()
        self.progress.metrics_bytes = self.writer.length
        self.writer.save((self.progress.epoch, self.progress.step), checkpoint_content(self, processes))

    def stage_last_if_best(self) -> None:
        """Stage the current weights as the best ones if the last epoch is the best under the current recipe."""
        progress = self.progress
        if progress.step == 0 and progress.last is not None and self._is_best(progress.last):
            progress.best = progress.last
            with self.averaged_weights():
                self.writer.stage_best_weights(progress.epoch, self.setup.built.module.state_dict())
