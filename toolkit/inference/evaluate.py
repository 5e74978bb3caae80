"""Evaluate a run's model again on the run's own images, to reproduce the metrics of summary.json.

The images are found by their names in split.json and evaluated in exactly the batches of the run's own evaluation,
independently of the current number of processes, so all metrics are bitwise equal on the same kind of machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.augment.transforms import build_transform
from toolkit.data.dataloader import EvaluationLoader, SplitDataset, WorkerBatches, worker_count
from toolkit.data.datasets import Dataset
from toolkit.data.sampling import IntArray, plan_evaluation
from toolkit.data.splits import SPLITS, split_hash
from toolkit.distributed.process import autocast_dtype, local_processes, main_only
from toolkit.errors import UserError
from toolkit.inference.tta import with_tta
from toolkit.reading import UnreadableFile
from toolkit.report.run_images import open_run_images
from toolkit.runs import Run
from toolkit.similar_names import did_you_mean
from toolkit.study.significance import McNemar
from toolkit.training.checkpoint import find_latest, load_checkpoint
from toolkit.training.console import table
from toolkit.training.evaluation import Outcomes, evaluate
from toolkit.training.resume import check_recipe
from toolkit.training.task import EvalResult, Task, task_from_dict
from toolkit.training.trained_model import TrainedModel, load_model, load_state
from toolkit.tta import TtaResult, write_tta

PREFIXES = {"validation": "val_", "test": "test_"}
"""Prefix of each split's metrics in summary.json; there are none for training images without augmentation."""

ROUNDING = {"no": 1e-5, "bf16": 2e-2, "fp16": 1e-2}
"""Maximum relative difference that another machine or order of summation can cause, by precision."""


@dataclass(frozen=True)
class MetricComparison:
    """A metric as computed now and as recorded by the run."""

    model: str
    """Which model: best or last."""
    name: str
    evaluated: float
    recorded: float | None
    verdict: str
    """Result of the comparison: equal, rounding, differs, or not recorded."""


@dataclass
class ReevaluationReport:
    """Result of a re-evaluation."""

    split: str
    images: int
    metrics: list[MetricComparison] = field(default_factory=list)
    predictions_equal: int | None = None
    """Number of rows of predictions.csv with the same prediction as now; None if not compared."""
    notes: list[str] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """Whether a metric differs from the recorded one by more than rounding can explain."""
        return any(metric.verdict == "differs" for metric in self.metrics)

    def text(self) -> str:
        """Format as a table and a sentence that says whether the run was reproduced."""
        rows = [
            (m.model, m.name, f"{m.evaluated:.9g}", "-" if m.recorded is None else f"{m.recorded:.9g}", m.verdict)
            for m in self.metrics
        ]
        header = ("model", "metric", "evaluated", "recorded", "verdict")
        lines = [f"{self.split}: {self.images} images", table(rows, header, frozenset((2, 3))), *self.notes]
        if self.predictions_equal is not None:
            lines.append(f"predictions.csv: {self.predictions_equal} of {self.images} rows are the same")
        return "\n".join([*lines, self.conclusion])

    @property
    def best(self) -> dict[str, float]:
        """Metrics of the best model with its temperature, if it is calibrated, without the prefix of the split."""
        prefix = PREFIXES.get(self.split, f"{self.split}_")
        models = [each.model for each in self.metrics if each.model != "last"]
        return {each.name.removeprefix(prefix): each.evaluated for each in self.metrics if each.model == models[-1]}

    @property
    def conclusion(self) -> str:
        """Whether the recorded metrics were reproduced, in one sentence."""
        compared = [metric for metric in self.metrics if metric.recorded is not None]
        other = [metric for metric in compared if metric.verdict != "equal"]
        if not compared:
            return "nothing to compare with: the run has no recorded metrics of this split"
        if not other:
            return f"all {len(compared)} metrics equal those of summary.json"
        names = ", ".join(f"{metric.model} {metric.name}" for metric in other)
        how = "differ" if self.differs else "differ by rounding"
        return f"{len(other)} of {len(compared)} metrics {how} from summary.json: {names}"

    def json(self, run: Run) -> str:
        """Format as JSON."""
        metrics: dict[str, dict[str, Any]] = {}
        for each in self.metrics:
            content = {"evaluated": each.evaluated, "recorded": each.recorded, "verdict": each.verdict}
            metrics.setdefault(each.model, {})[each.name] = content
        return json.dumps({"run": str(run.path), **vars(self), "metrics": metrics}, indent=2)


def check_split(split: str) -> None:
    """Raise UserError if ``split`` is not the name of a split."""
    if split not in SPLITS:
        hint = did_you_mean("validation" if split.startswith("val") else split, SPLITS, prefix="; ")
        raise UserError(f"there is no split {split!r}: a run has {', '.join(SPLITS)}{hint}")


def split_images(
    run: Run, split: str, trained: TrainedModel, data_root: Path | None = None
) -> tuple[Dataset, IntArray]:
    """Open a run's data set and return it with the indices of one split's images, found by the names in split.json.

    Nothing is downloaded. ``data_root`` overrides the recipe's data.root. Raises UserError if images are missing or
    differ from the run's.
    """
    names = run.split
    try:
        images = open_run_images(run.recipe, trained.preprocessing, trained.classes, data_root)
    except UserError as error:
        raise UserError(
            f"the images of {run.path} are not available: {error}. If they were moved, use --data-root FOLDER"
        ) from None
    found = images.indices(names[split], f"{split} images of {run.path}")
    if all(name in images.index for other in SPLITS for name in names[other]):
        splits = {other: images.indices(names[other], other) for other in SPLITS}
        if split_hash(images.dataset, splits) != names["hash"]:
            raise UserError(
                f"some images of {run.path} now have other classes than when the run was trained (the hash in "
                "split.json differs); restore the original data set"
            )
    return images.dataset, found


def evaluate_run(
    run: Run,
    split: str,
    accelerator: Accelerator,
    data_root: Path | None = None,
    *,
    last: bool = True,
    tta: Sequence[str] | None = None,
) -> ReevaluationReport:
    """Evaluate a run's best model on a split and, with ``last``, the last one if its checkpoint exists. Collective.

    With test-time augmentation (``tta``, as for :func:`toolkit.inference.tta.with_tta`), the best model is evaluated
    without and with it, and both accuracies are written to tta.json.
    """
    check_split(split)
    if not run.split[split]:
        others = [other for other in SPLITS if run.split[other]]
        raise UserError(
            f"{run.path} has no {split} images (data.split.{split}); "
            f"choose another split: --split {' or '.join(others)}"
        )
    trained = load_model(run.path, model=run.factory)
    summary: dict[str, Any] = {}
    if run.is_finished:
        check_recipe(run)
        summary = run.summary
    dataset, indices = split_images(run, split, trained, data_root)
    report = ReevaluationReport(split, len(indices))
    prefix = PREFIXES.get(split, f"{split}_")
    allowed = max(ROUNDING[accelerator.mixed_precision or "no"], ROUNDING[summary.get("precision") or "no"])
    images = (dataset, indices)
    best, used = _measure_best(run, trained, split, images, accelerator, tta)
    plain = replace(trained.task, temperature=1.0)
    report.metrics += _compare("best", plain.metrics(best, prefix), summary.get("best", {}), allowed)
    for model, (result, note) in used.items():
        report.metrics += _compare(model, trained.task.metrics(result, prefix), {}, allowed)
        report.notes.append(note)
    if split == "test" and summary:
        report.predictions_equal = _equal_rows(run, plain, best, trained.classes)
    has_last = summary and (summary["last"]["epoch"] != summary["best"]["epoch"] or "wise" in summary)
    if last and has_last:
        epoch = summary["last"]["epoch"]
        if load_last_model(run, trained.module, epoch):
            entry = plain.to_dict() | {"thresholds": summary.get("last_thresholds")}
            last_task = task_from_dict(entry, plain.classes)
            found = measure(run, trained, split, images, last_task, accelerator)
            report.metrics += _compare("last", last_task.metrics(found, prefix), summary["last"], allowed)
        else:
            report.notes.append(f"the last model was not evaluated: no intact checkpoint of epoch {epoch} is left")
    report.notes += _notes(trained, summary, accelerator)
    return report


def measure(
    run: Run,
    trained: TrainedModel,
    split: str,
    images: tuple[Dataset, IntArray],
    outcomes: Outcomes,
    accelerator: Accelerator,
) -> EvalResult:
    """Evaluate a model on a split in the same batches as in training. Collective.

    ``images``: data set and indices, from :func:`split_images`. ``outcomes``: what to compute, such as the task.
    """
    (dataset, indices), recipe = images, run.recipe
    transform = build_transform(split, recipe.augment, trained.preprocessing)
    chosen = SplitDataset(dataset.images, dataset.labels, indices, transform, recipe.recipe.seed)
    processes = run.summary.get("processes") if run.is_finished else None
    loader = split_loader(run, chosen, processes or run.processes, accelerator)
    module = trained.module.to(accelerator.device)
    if recipe.train.channels_last:
        module.to(memory_format=torch.channels_last)
    try:
        return evaluate(
            module,
            loader,
            dataset.labels[indices],
            outcomes,
            accelerator.device,
            autocast_dtype=autocast_dtype(accelerator.mixed_precision),
            channels_last=recipe.train.channels_last,
        )
    finally:
        loader.close()


@dataclass(frozen=True)
class _Both:
    """The outcomes of two tasks next to each other, from the same logits."""

    first: Task
    second: Task

    @property
    def width(self) -> int:
        return self.first.width + self.second.width

    def outcomes(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([self.first.outcomes(logits, labels), self.second.outcomes(logits, labels)], 1)


def _measure_best(
    run: Run,
    trained: TrainedModel,
    split: str,
    images: tuple[Dataset, IntArray],
    accelerator: Accelerator,
    tta: Sequence[str] | None,
) -> tuple[EvalResult, dict[str, tuple[EvalResult, str]]]:
    """Evaluate the best model as in training and, if it is calibrated or augmented, also with temperature and TTA.

    Returns the first result and, if there is one, the second by the name of the model, with a note. Collective.
    """
    plain, used, augmented = replace(trained.task, temperature=1.0), trained.task, with_tta(trained, tta)
    divided = f"logits divided by {used.temperature:.4g}"
    if augmented.module is trained.module:
        if used.temperature == 1:
            return measure(run, trained, split, images, plain, accelerator), {}
        both, width = measure(run, trained, split, images, _Both(plain, used), accelerator), plain.width
        best, calibrated = (EvalResult(part, both.labels) for part in np.split(both.outcomes, [width], axis=1))
        return best, {"calibrated": (calibrated, f"calibrated: the best model with its {divided}")}
    best = measure(run, trained, split, images, plain, accelerator)
    found = measure(run, augmented, split, images, used, accelerator)
    names = [*(trained.tta if tta is None else tta)]
    right, right_with = plain.correct(best), used.correct(found)
    result = TtaResult(
        tta=names,
        split=split,
        images=len(right),
        accuracy=float(right.mean()),
        accuracy_with_tta=float(right_with.mean()),
        only_without=int((right & ~right_with).sum()),
        only_with=int((right_with & ~right).sum()),
    )
    main_only(accelerator, lambda: write_tta(run, result))
    name = "TTA" if used.temperature == 1 else "TTA, calibrated"
    test = McNemar(result.only_with, result.only_without, result.images)
    low, high = (100 * bound for bound in test.interval(0.95))
    how = f"--tta {' --tta '.join(names)}" + (f", {divided}" if used.temperature != 1 else "")
    note = f"{name}: the best model with {how}; accuracy {100 * test.difference:+.2f} points"
    note += f", 95 % interval {low:+.2f} to {high:+.2f}"
    return best, {name: (found, note)}


def split_loader(run: Run, images: SplitDataset, processes: int, accelerator: Accelerator) -> EvaluationLoader:
    """Return a loader that distributes the batches of the run's own evaluation over the current processes."""
    recipe, count = run.recipe, len(images.indices)
    size = run.images_per_evaluation
    world = recipe.train.virtual_processes or processes
    batches = [batch for rank in range(world) for batch in plan_evaluation(count, size, world, rank)]
    own = batches[accelerator.process_index :: accelerator.num_processes]
    workers = min(worker_count(recipe.data.workers, images.images, local_processes()), len(own))
    return EvaluationLoader(WorkerBatches(images, workers, pin_memory=accelerator.device.type == "cuda"), own)


def _compare(
    model: str, metrics: dict[str, float], recorded: dict[str, float], allowed: float
) -> list[MetricComparison]:
    """Compare a model's metrics with those that the run recorded.

    If the losses agree up to rounding, other metrics may still differ, since an image close to the boundary between two
    classes may be assigned to the other one.
    """
    loss = next(name for name in metrics if name.endswith("loss"))
    is_close = loss in recorded and abs(metrics[loss] - recorded[loss]) <= allowed * abs(recorded[loss])
    found = []
    for name, value in metrics.items():
        if name not in recorded:
            verdict = "not recorded"
        elif value == recorded[name]:
            verdict = "equal"
        else:
            verdict = "rounding" if is_close else "differs"
        found.append(MetricComparison(model, name, value, recorded.get(name), verdict))
    return found


def _equal_rows(run: Run, task: Task, found: EvalResult, classes: list[str]) -> int:
    """Return the number of rows of predictions.csv whose prediction was reproduced."""
    column, rows = task.prediction_columns(classes)[2], run.prediction_records()
    if len(rows) != len(found.labels):
        raise UnreadableFile(run.path / "predictions.csv", f"{len(rows)} rows of {len(found.labels)} test images")
    now = task.prediction_rows(found, [row["path"] for row in rows], classes)
    return sum(row[column] == cells[2] for row, cells in zip(rows, now, strict=True))


def load_last_model(run: Run, module: nn.Module, epoch: int) -> bool:
    """Load the weights after ``epoch``, the run's last one, into ``module``; return False if the checkpoint is missing.

    With train.ema, train.swa_start or optimizer.lookahead these are the averaged weights, which the run evaluates.
    """
    path = find_latest(run.checkpoints, lambda warning: None)  # its warnings matter only when resuming
    content = None if path is None else load_checkpoint(path)
    if content is None or content["position"]["epoch"] != epoch or content["position"]["step"]:
        return False
    load_state(module, content["model"] | content["ema"])
    return True


def _notes(trained: TrainedModel, summary: dict[str, Any], accelerator: Accelerator) -> list[str]:
    """Return notes on conditions, such as another device or precision, that may explain differences."""
    notes = [trained.caution] if trained.caution else []
    then = (summary.get("device"), summary.get("precision"))
    now = (accelerator.device.type, accelerator.mixed_precision)
    if summary and then != now:
        notes.append(
            f"the run was evaluated on {then[0]} with precision {then[1]}, now on {now[0]} with precision {now[1]}"
        )
    return notes
