"""End a run: verify the saved weights, evaluate on the test set once, and write the summary last.

Without validation images, or if they were trained on (transfer.refit), the saved weights are compared with those in
memory instead. Without test images, there are no test metrics and no predictions.csv.
"""

from __future__ import annotations

import hashlib
import resource
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.distributed.process import StopTraining, broadcast_object
from toolkit.errors import Interrupted, RunFailed
from toolkit.models.lora import merge_lora
from toolkit.models.pretrained import pack_state
from toolkit.runs import Run
from toolkit.training.checkpoint import best_path, link_best, load_weights
from toolkit.training.classification_metrics import CURVE_COLUMNS, curve_rows
from toolkit.training.task import EvalResult, Task
from toolkit.training.trained_model import load_model
from toolkit.training.trainer import Trainer
from toolkit.training.wise import choose_interpolation
from toolkit.writing import csv_text, write_atomically

TOLERANCE = {"no": 1e-4, "bf16": 2e-2, "fp16": 1e-2}
"""Allowed relative difference between the logged loss and that of the saved weights, by precision.

The order of summation differs between the two evaluations.
"""


def finish(training: Trainer) -> dict[str, Any]:
    """Evaluate the best and the last model on the test set, write predictions, return the summary (a collective)."""
    try:
        models = _evaluate_both(training)
    except StopTraining:
        raise Interrupted(
            f"stopped in the final evaluation; {training.kept_text()}. Resume with: toolkit train --resume "
            f"{training.run.path if training.run else ''}"
        ) from None
    if training.run is not None and training.accelerator.is_main_process:
        _write_results(training, training.run, models)
    training.accelerator.wait_for_everyone()
    return _summary(training, models)


def write_summary(training: Trainer, summary: dict[str, Any]) -> None:
    """Write summary.json, which marks the run as finished, so it is written last (a collective)."""
    if training.run is not None and training.accelerator.is_main_process:
        training.run.write_json("summary.json", summary)
    training.accelerator.wait_for_everyone()


@dataclass(frozen=True)
class _FinalModels:
    """Metrics of the best and the last model, and the predictions of the best one."""

    best: dict[str, Any]
    last: dict[str, Any]
    task: Task
    """The task with the thresholds of the best model."""
    last_task: Task
    test: EvalResult | None
    """Results of the best model; None for a run without test images."""
    wise: dict[str, Any] | None = None
    """Entry of summary.json with transfer.wise."""


def _evaluate_both(training: Trainer) -> _FinalModels:
    """Evaluate the best model (from its file) and the last one (from memory)."""
    progress, run = training.progress, training.run
    assert progress.best is not None
    assert progress.last is not None
    assert run is not None
    training.finish_writing()
    epoch = progress.best["epoch"]
    if fault := broadcast_object(training.writer.best_fault(epoch)):
        raise RunFailed(
            f"there is no best model to test: {best_path(run.checkpoints, epoch)} is damaged ({fault}). Restore the "
            f"file if you have a copy, then run: toolkit train --resume {run.path}. Without a copy, the run resumes "
            "from the newest checkpoint whose best weights are intact"
        )
    if training.accelerator.is_main_process:
        link_best(run.checkpoints, epoch)
    training.accelerator.wait_for_everyone()
    written = load_model(run.checkpoints).module.to(training.accelerator.device)
    if training.recipe.train.channels_last:
        written.to(memory_format=torch.channels_last)
    features = training.loaders.features
    if features is not None:
        features.check_backbone(written)
    network = written if features is None else written.get_submodule(features.tail)
    task = training.setup.task
    if training.setup.has("validation") and not training.recipe.transfer.refit:
        validated = training.evaluate_network(network, "validation")
        task = task.with_thresholds_of(validated)
        _verify(training, task, validated)
    else:
        _verify_equal(training, written)
    record, wise = progress.best, None
    if training.recipe.transfer.wise and epoch > training.recipe.transfer.epochs_of_probe:
        record, wise, task = _interpolate(training, run, written, network)
    has_test = training.setup.has("test")
    scored = training.setup.task.with_scores(len(training.setup.splits["test"]))
    test = training.evaluate_network(network, "test", scored) if has_test else None
    best = _model_metrics(record, task, test)
    if epoch == progress.last["epoch"] and wise is None:
        return _FinalModels(best, dict(best), task, task, test)
    last_task = training.setup.task
    if last_task.is_tuned:
        last_task = last_task.with_thresholds_of(training.evaluate("validation"))
    last = _model_metrics(progress.last, last_task, training.evaluate("test") if has_test else None)
    return _FinalModels(best, last, task, last_task, test, wise)


def _interpolate(
    training: Trainer, run: Run, written: nn.Module, network: nn.Module
) -> tuple[dict[str, Any], dict[str, Any], Task]:
    """Replace the best weights by those of transfer.wise, in best.safetensors and in ``written`` (a collective).

    Return the record of the best epoch with their validation metrics, the entry of summary.json, and the task with
    their thresholds. ``network``: the part of ``written`` that is evaluated.
    """
    assert training.progress.best is not None
    chosen, tried = choose_interpolation(training, written.state_dict())
    data = pack_state(chosen.state, epoch=training.progress.best["epoch"], alpha=chosen.alpha)
    if training.accelerator.is_main_process:
        write_atomically(run.best_weights, data)
    training.accelerator.wait_for_everyone()
    written.load_state_dict(load_weights(run.best_weights))
    training.display.log(f"best.safetensors: alpha {chosen.alpha:g} between the probe and the best epoch after it")
    task = training.setup.task
    if training.setup.has("validation"):
        task = task.with_thresholds_of(training.evaluate_network(network, "validation"))
    entry = {"alpha": chosen.alpha, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tried": tried}
    return training.progress.best | chosen.validation, entry, task


def _verify_equal(training: Trainer, written: nn.Module) -> None:
    """Raise RunFailed unless the saved weights exactly equal those in memory; for runs without validation."""
    with training.averaged_weights():
        state = {name: value.cpu() for name, value in training.setup.built.module.state_dict().items()}
    found = written.state_dict()
    unlike = [name for name, value in merge_lora(state).items() if not torch.equal(value, found[name].cpu())]
    if unlike:
        raise RunFailed(
            f"best.safetensors does not hold the weights of the last epoch: {', '.join(unlike[:3])} "
            f"{'differs' if len(unlike) == 1 else 'differ'}"
        )
    training.display.log("best.safetensors read again: it holds the weights of the last epoch")


def _verify(training: Trainer, task: Task, again: EvalResult) -> None:
    """Raise RunFailed unless the saved weights reproduce the validation metrics logged for their epoch."""
    logged = training.progress.best
    assert logged is not None
    measured = task.metrics(again, "val/")
    allowed = TOLERANCE[training.accelerator.mixed_precision or "no"]
    off = abs(measured["val/loss"] - logged["val/loss"]) / max(abs(logged["val/loss"]), 1e-6)
    right = abs(measured["val/accuracy"] - logged["val/accuracy"]) * len(again.labels)
    if off > allowed or ("accuracy" in task.reproduced and right > 1 + allowed * len(again.labels)):
        raise RunFailed(
            f"best.safetensors gives validation loss {measured['val/loss']:.6f} and accuracy "
            f"{measured['val/accuracy']:.4f}, but {logged['val/loss']:.6f} and "
            f"{logged['val/accuracy']:.4f} were logged for epoch {logged['epoch']}: the file does "
            "not hold the model of that epoch"
        )
    training.display.log(
        f"best.safetensors evaluated again: validation loss {measured['val/loss']:.4f}, accuracy "
        f"{measured['val/accuracy']:.4f}, as logged at epoch {logged['epoch']}"
    )


def _model_metrics(record: dict[str, Any], task: Task, test: EvalResult | None) -> dict[str, Any]:
    """Return summary.json's entry for one model; ``test`` is None without test images."""
    validation = {key.replace("/", "_"): value for key, value in record.items() if key.startswith("val/")}
    return {"epoch": record["epoch"], **validation, **({} if test is None else task.metrics(test, "test_"))}


def _write_results(training: Trainer, run: Run, models: _FinalModels) -> None:
    """Write thresholds and alpha to model.json; for test images predictions.csv, class_metrics.csv and curves.csv."""
    task, test, dataset = models.task, models.test, training.setup.dataset
    card = {"task": task.to_dict()} if task.is_tuned else {}
    if models.wise is not None:
        card["wise"] = models.wise["alpha"]
    if card:
        run.write_json("checkpoints/model.json", run.model_card | card)
    if test is None:
        return
    indices = training.setup.splits["test"]
    names = [dataset.images.name(int(index)) for index in indices]
    rows = dataset.with_kept(task.prediction_rows(test, names, dataset.classes), indices)
    run.write_predictions(rows, [*task.prediction_columns(dataset.classes), *dataset.kept])
    of_class, others = task.class_metrics(test)
    shares = {"precision": of_class.precision, "recall": of_class.recall, "f1": of_class.f1, **others}
    columns = zip(dataset.classes, of_class.support.tolist(), *shares.values(), strict=True)
    texts = ((name, support, *(f"{value:.9g}" for value in values)) for name, support, *values in columns)
    run.write_text("class_metrics.csv", csv_text(("class", "support", *shares), texts))
    run.write_text("curves.csv", csv_text(CURVE_COLUMNS, curve_rows(task.curves(test), dataset.classes)))


def _summary(training: Trainer, models: _FinalModels) -> dict[str, Any]:
    progress, setup = training.progress, training.setup
    parameters = list(setup.built.module.parameters())
    thresholds = models.last_task.to_dict().get("thresholds")
    return {
        "best": models.best,
        "last": models.last,
        **({} if thresholds is None else {"last_thresholds": thresholds}),
        **({} if progress.chosen_C is None else {"C": progress.chosen_C}),
        **({} if progress.chosen_k is None else {"k": progress.chosen_k}),
        **({} if models.wise is None else {"wise": models.wise}),
        **({} if setup.teacher is None else {"teacher": setup.teacher.record}),
        "train_loss": progress.last["train/loss"] if progress.last else None,
        "train_accuracy": progress.last["train/accuracy"] if progress.last else None,
        "epochs_run": progress.epoch,
        "stopped_early": progress.stopped_early,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "seconds": round(progress.train_seconds, 3),
        "startup_seconds": training.startup_seconds,
        "images_per_s": round(progress.train_images / max(progress.train_seconds, 1e-9), 2),
        "peak_memory_gib": round(peak_memory_gib(training.accelerator.device), 3),
        "cached": training.loaders.cached,
        "images": {name: len(indices) for name, indices in setup.splits.items()},
        "images_per_epoch": min(len(setup.splits["train"]), setup.steps * training.recipe.train.batch_size),
        "images_left_out": len(setup.bad_images),
        "not_exact": setup.not_exact,
        "grad_accum_steps": setup.accum_steps,
        "processes": training.accelerator.num_processes,
        "device": str(training.accelerator.device.type),
        "precision": training.accelerator.mixed_precision,
        "seed": training.recipe.recipe.seed,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Return the main process's peak memory so far in GiB: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
