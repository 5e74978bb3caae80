"""Train a recipe into a run directory; :func:`fit` is the main function."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate import Accelerator
from torch import nn

from toolkit.data.sampling import check_batch_size
from toolkit.data.splits import SPLITS, split_hash
from toolkit.distributed.failure_detection import close_failure_detector
from toolkit.distributed.launcher import check_accelerate_launch, unused_precision_line, unused_tasks_line
from toolkit.distributed.precision import precision_line
from toolkit.distributed.process import (
    StopTraining,
    describe_processes,
    init_accelerator,
    leave,
    main_only,
    out_of_memory_explained,
)
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import Interrupted, RunFailed, UserError
from toolkit.expectations import check_expectations
from toolkit.recipe import Recipe, diff, resolved_toml
from toolkit.runs import Run, create_run, open_run, runs_of
from toolkit.trackers import Tracking, require_packages
from toolkit.training.console import Console, summary_table
from toolkit.training.context import TrainingContext, build_context, describe
from toolkit.training.data_changes import write_file_facts
from toolkit.training.env_info import describe_environment
from toolkit.training.finalize import finish, write_summary
from toolkit.training.given_plugins import Object, recipe_with
from toolkit.training.l2_sp import write_starting_weights
from toolkit.training.resume import Resumption, accept_changes, find_resumption
from toolkit.training.trained_model import model_card
from toolkit.training.trainer import EpochCallback, Trainer
from toolkit.writing import write_atomically


def fit(
    recipe: Recipe | str | os.PathLike[str],
    *,
    model: Object | None = None,
    dataset: Any = None,
    transforms: Sequence[Object] = (),
    loss: Object | None = None,
    metrics: Sequence[Object] = (),
    optimizer: Object | None = None,
    schedule: Object | None = None,
    callbacks: Sequence[EpochCallback] = (),
    resume: str | os.PathLike[str] | None = None,
    until: int | None = None,
    allow_changes: bool = False,
    show_module: bool = False,
    quiet: bool = False,
    origins: dict[str, Any] | None = None,
    written_recipe: str | None = None,
    began: float | None = None,
) -> Run:
    """Train a recipe or its file on the processes that a launcher started (or on this one alone) and return the run.

    ``model``, ``dataset``, ``loss``, ``optimizer``, ``schedule``: factories of your own, in place of what the recipe
    names (docs/plugins.md says what they are called with and must return). ``transforms`` (of training images) and
    ``metrics`` are added to those in the recipe. Each process calls the factories itself. Each is registered under its
    ``__name__``, and the recipe that is trained and recorded names it; arguments in the recipe are kept if it already
    names it. An nn.Module is copied by each call of fit; the recipe's seed does not determine its weights. A data set,
    or a dictionary with one for each split, may be given in place of its factory. ``callbacks``: called on the main
    process after each epoch with the run and the epoch's line of metrics.jsonl; training ends if one returns True.
    ``resume``: a run directory, or ``"auto"`` for the recipe's most recent unfinished run (a new run if there is none;
    a requeued SLURM job that had already finished its run returns that run without training).
    ``until``: pause after this epoch; a later ``fit(resume=run)`` continues as if there had been no pause. None trains
    to the last epoch. ``allow_changes``: allow resuming with a recipe that differs from the one the run was started
    with, and with data that changed since; images that were trained on then stay out of validation and test.
    ``quiet``: write messages to the run's log.txt only. ``origins``: where the recipe's values came from
    (:meth:`toolkit.recipe.load.LoadedRecipe.origins_dict`), stored in a new run for its report. ``written_recipe``:
    text of a recipe that was written for this run, kept in a new run with its comments. ``began``: when the command was
    started, as a time.monotonic() value, to report the time to the first step; None means now.

    Raises UserError (bad input, before training), RunFailed (e.g. a non-finite loss) and Interrupted (stopped on
    request, with a checkpoint written).
    """
    called = time.monotonic()
    given = {
        "model": model, "dataset": dataset, "transform": transforms, "loss": loss, "metric": metrics,
        "optimizer": optimizer, "schedule": schedule,
    }  # fmt: skip
    recipe = recipe_with(recipe, given)
    if not isinstance(callbacks, list | tuple):
        raise UserError(f"fit(callbacks={callbacks!r}): give a list")
    check_accelerate_launch(recipe.train)  # the command has done this, but not a program that calls fit
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(GracefulStop())
        accelerator, display = _join_processes(recipe, stop, quiet=quiet)
        if (finished := _finished_before_requeue(recipe, accelerator, display, resume)) is not None:
            leave(accelerator)
            return finished
        run = _run_to_resume(recipe, accelerator, display, resume, allow_changes)
        resumption = None
        if run is not None:
            stack.enter_context(_locked(run, accelerator, display))
            resumption = find_resumption(run, recipe, accelerator, display, allow_changes)
        choose_splits = None if resumption is None else resumption.choose_splits
        setup = build_context(
            recipe, accelerator, display, load_weights=resumption is None, choose_splits=choose_splits
        )
        if resumption is not None:
            resumption.compare_teacher(None if setup.teacher is None else setup.teacher.record)
        if run is None:
            run = _new_run(recipe, accelerator, origins, written_recipe)
            stack.enter_context(_locked(run, accelerator, display))
        stop.watch(run.path)
        if accelerator.is_main_process:
            _write_initial_files(setup, run, resumption)
            display.set_log_file(run.log_file)
        display.log(describe(setup, accelerator.mixed_precision, whole=show_module))
        display.log(f"run directory {run.path}")
        with _errors_logged(display):
            with (
                _tracked(recipe, accelerator, run, display) as tracking,
                out_of_memory_explained(recipe.train, accelerator.num_processes),
            ):
                training = _training(setup, run, tracking, stop, resumption, callbacks)
                stack.callback(lambda: training.loaders.close())  # those of the last phase
                if recipe.train.grad_accum_steps == "auto" and accelerator.is_main_process:
                    run.write_json("environment.json", run.environment | {"grad_accum_steps": setup.accum_steps})
                training.startup_seconds = _log_startup(display, called, called if began is None else began)
                summary = finish(training) if training.run_epochs(until) else None
                if summary is not None:
                    tracking.summarize(summary)
                    display.note(closing_text(recipe, summary))
                    write_summary(training, summary)
                    tracking.send_results(run, stop.is_wanted)
            if summary is None:
                display.log(f"paused after epoch {training.progress.epoch}, as requested")
        leave(accelerator)
    return run


def _new_run(
    recipe: Recipe, accelerator: Accelerator, origins: dict[str, Any] | None, written_recipe: str | None
) -> Run:
    """Create a run directory, the same on every process (a collective)."""
    run = Run(Path(main_only(accelerator, lambda: str(create_run(recipe.recipe.run_root, recipe.recipe.name).path))))
    if origins is not None and accelerator.is_main_process:
        run.write_json("origins.json", origins)
    if written_recipe is not None and accelerator.is_main_process:
        run.write_text(run.written_recipe.name, written_recipe)
    return run


@contextlib.contextmanager
def _errors_logged(display: Console) -> Iterator[None]:
    """Write errors that occur in this context to log.txt too, because the terminal that shows them may be closed."""
    try:
        yield
    except Exception as error:
        display.note(_error_text(error))
        if isinstance(error, Interrupted):
            close_failure_detector()
        raise


def _error_text(error: Exception) -> str:
    """Return an error's message, with its stack trace if it is not one of the project's own exceptions."""
    is_explained = isinstance(error, UserError | RunFailed | Interrupted)
    return str(error) if is_explained else "".join(traceback.format_exception(error))


def _log_startup(display: Console, called: float, began: float) -> float:
    """Log and return the seconds from the start of the command (``began``) until training begins."""
    seconds = time.monotonic() - began
    imports = f", including {called - began:.1f} s of imports" if called > began else ""
    display.log(f"ready for the first step after {round(seconds, 2):.1f} s{imports}")
    return round(seconds, 2)


def dry_run(recipe: Recipe, *, load_weights: bool = True, show_module: bool = False) -> None:
    """Build everything and run one batch forward and backward, without writing anything."""
    accelerator, display = _join_processes(recipe)
    setup = build_context(recipe, accelerator, display, load_weights=load_weights)
    display.log(describe(setup, accelerator.mixed_precision, whole=show_module))
    with out_of_memory_explained(recipe.train, accelerator.num_processes):
        training = Trainer(setup, None, None, GracefulStop(), None, "none")
        loss = training.dry_run_step()
    training.close()
    display.log(f"dry run: one batch forward and backward, loss {loss:.4f}; nothing was written")


def _training(
    setup: TrainingContext,
    run: Run,
    tracking: Tracking,
    stop: GracefulStop,
    resumption: Resumption | None,
    callbacks: Sequence[EpochCallback],
) -> Trainer:
    """Build the trainer. Raises Interrupted if a stop is requested while features of frozen layers are precomputed."""
    try:
        checkpoint = None if resumption is None else resumption.checkpoint
        training = Trainer(setup, run, tracking, stop, checkpoint, callbacks=callbacks)
        if resumption is not None and resumption.changed:
            accept_changes(training)
        return training
    except StopTraining:
        raise Interrupted(f"stopped before training; resume with: toolkit train --resume {run.path}") from None


def _join_processes(
    recipe: Recipe, stop: GracefulStop | None = None, *, quiet: bool = False
) -> tuple[Accelerator, Console]:
    """Initialize distributed training, check batch size and trackers, and log ranks and precision."""
    accelerator = init_accelerator(recipe.train, stop)
    require_packages(recipe.tracking.trackers)
    check_batch_size(recipe.train, accelerator.num_processes)
    display = Console(is_main=accelerator.is_main_process, shows=not quiet)
    if line := unused_tasks_line():
        display.log(line)
    for line in describe_processes(accelerator):
        display.log(line)
    display.log(precision_line(recipe.train.precision, accelerator.mixed_precision))
    if accelerator.is_main_process and (line := unused_precision_line(accelerator.mixed_precision)):
        display.log(line)
    return accelerator, display


def _finished_before_requeue(
    recipe: Recipe, accelerator: Accelerator, display: Console, resume: str | os.PathLike[str] | None
) -> Run | None:
    """Return the run that this SLURM job finished before it was requeued, if any (a collective).

    A job whose node fails while the job ends is requeued; without this check it would train a second run.
    """
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if str(resume) != "auto" or not job or restarts == "0":
        return None

    def find() -> str | None:
        for run in runs_of(recipe.recipe.run_root, recipe.recipe.name):
            if run.is_finished and run.environment.get("slurm_job") == job and not _changes(run, recipe):
                display.log(f"{run.path} was finished by this job before it was requeued: nothing is left to do")
                return str(run.path)
        return None

    path = main_only(accelerator, find)
    return None if path is None else Run(Path(path))


def _run_to_resume(
    recipe: Recipe,
    accelerator: Accelerator,
    display: Console,
    resume: str | os.PathLike[str] | None,
    allow_changes: bool,
) -> Run | None:
    """Return the run to resume, the same on every process (a collective); None for a new run."""
    if resume is None:
        return None

    def choose() -> str | None:
        if str(resume) == "auto":
            where = recipe.recipe.run_root, recipe.recipe.name
            run = next((run for run in runs_of(*where) if not run.is_finished), None)
            if run is None and (finished := runs_of(*where)):
                display.log(f"{finished[0].path} is finished, so this is a new run")
        else:
            run = open_run(resume)
        if run is None:
            return None
        if run.is_finished:
            raise UserError(f"{run.path} is finished: there is nothing to resume")
        changes = _changes(run, recipe)
        if changes and not allow_changes:
            listed = "; ".join(f"{'.'.join(map(str, key))}: {old!r} -> {new!r}" for key, old, new in changes)
            raise UserError(
                f"{run.path} was started with another recipe ({listed}). To resume it with its own recipe: "
                f"toolkit train --resume {run.path}. To resume it with the edited one: add --allow-changes. To start a "
                "new run: leave out --resume"
            )
        return str(run.path)

    path = main_only(accelerator, choose)
    return None if path is None else Run(Path(path))


def _changes(run: Run, recipe: Recipe) -> list[tuple[tuple[str | int, ...], Any, Any]]:
    """Return the differences between a run's recipe and this one, except in [slurm]."""
    return [change for change in diff(run.recipe, recipe) if change[0][0] != "slurm"]


@contextlib.contextmanager
def _locked(run: Run, accelerator: Accelerator, display: Console) -> Iterator[None]:
    """Lock the run directory in this context. Only the main process holds the lock, because only it writes there."""
    lock = main_only(accelerator, lambda: run.lock(display.log), share=False)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def _tracked(recipe: Recipe, accelerator: Accelerator, run: Run, display: Console) -> Iterator[Tracking]:
    """Open the trackers, which get all messages of the run, and close them with its exit status."""
    tracking = Tracking(accelerator, recipe, run.path, f"{recipe.recipe.name}-{run.id}", display.log)
    display.follow(tracking.log_text)
    status = 1
    try:
        yield tracking
        status = 0
    except Exception as error:
        tracking.log_text(_error_text(error))
        if isinstance(error, Interrupted):
            status = Interrupted.exit_status
        raise
    finally:
        tracking.finish(status)


def _write_initial_files(setup: TrainingContext, run: Run, resumption: Resumption | None) -> None:
    """Write the files known before training: recipe, environment, splits, and how to rebuild the model."""
    names = {split: [setup.dataset.images.name(int(i)) for i in setup.splits[split]] for split in SPLITS}
    run.checkpoints.mkdir(exist_ok=True)  # it may have been removed
    # An equal recipe is not rewritten: checkpoints of earlier versions hold the hash of its text, without newer keys.
    if resumption is None or diff(run.recipe, setup.recipe):
        run.write_text("recipe.toml", resolved_toml(setup.recipe))
    run.write_json("environment.json", describe_environment(setup.accelerator, setup.recipe))
    split = {
        "hash": split_hash(setup.dataset, setup.splits),
        "left_out": setup.bad_images,
        "images_per_class": {name: setup.dataset.class_counts(setup.splits[name]).tolist() for name in SPLITS},
        **names,
    }
    if resumption is not None and resumption.data_changed:
        run.keep_split()
    run.write_json("split.json", split)
    if resumption is None or resumption.data_changed or not resumption.files_known:
        write_file_facts(run, setup.dataset, setup.splits)
    card = model_card(
        setup.recipe.model,
        setup.dataset.classes,
        setup.task,
        setup.preprocessing,
        setup.recipe.augment.test,
        setup.recipe.recipe.name,
        setup.stages[-1],
        is_knn=setup.recipe.transfer.mode == "knn",
    )
    run.write_json("checkpoints/model.json", card)
    if resumption is None:
        _keep_first_layer(setup, run)
        if setup.recipe.transfer.l2_sp:
            write_starting_weights(setup, run)


def _keep_first_layer(setup: TrainingContext, run: Run) -> None:
    """Save the first convolution's initial weights, so that the report can show how training changed them."""
    for name, layer in setup.built.module.named_modules():
        if isinstance(layer, nn.Conv2d):
            weights = {f"{name}.weight": layer.weight.detach().float().contiguous()}
            write_atomically(run.first_layer, safetensors.torch.save(weights))
            return


def closing_text(recipe: Recipe, summary: dict[str, Any]) -> str:
    """Return the summary table, and one line per metric that the recipe expects."""
    return "\n".join([summary_table(summary), *(v.line() for v in check_expectations(recipe, summary))])
