"""Re-evaluation of a run's model on the run's own images, to reproduce the metrics of summary.json.

The images are found by the names in split.json, and are evaluated in exactly the batches of the run's own evaluation,
whatever the number of processes now: on the same kind of machine all metrics are equal bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from toolkit.augment.transforms import build_transform
from toolkit.data.dataloader import EvaluationLoader, SplitDataset, WorkerBatches, worker_count
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.preprocessing import as_trained, resolve_channels
from toolkit.data.sampling import IntArray, plan_evaluation
from toolkit.data.splits import SPLITS, split_hash
from toolkit.distributed.process import autocast_dtype, local_processes
from toolkit.errors import UserError
from toolkit.reading import DamagedFile
from toolkit.recipe import Recipe
from toolkit.runs import Run
from toolkit.similar_names import did_you_mean
from toolkit.training.checkpoint import find_latest, load_checkpoint
from toolkit.training.console import table
from toolkit.training.evaluation import EvalResult, evaluate
from toolkit.training.resume import check_recipe
from toolkit.training.trained_model import TrainedModel, load_model

PREFIXES = {"validation": "val_", "test": "test_"}
"""Prefix of a split's metrics in summary.json, which has none for training images without augmentation."""

ROUNDING = {"no": 1e-5, "bf16": 2e-2, "fp16": 1e-2}
"""Largest relative difference that another machine or another order of summation can explain, by precision."""


@dataclass(frozen=True)
class MetricComparison:
    """A metric as evaluated now and as recorded by the run."""

    model: str
    """best or last."""
    name: str
    evaluated: float
    recorded: float | None
    verdict: str
    """equal, rounding, differs, or not recorded."""


@dataclass
class ReevaluationReport:
    """Result of a re-evaluation."""

    split: str
    images: int
    figures: list[MetricComparison] = field(default_factory=list)
    predictions_equal: int | None = None
    """Rows of predictions.csv with the same prediction as now; None if not compared."""
    remarks: list[str] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """Whether a metric differs from the recorded one by more than rounding can explain."""
        return any(figure.verdict == "differs" for figure in self.figures)

    def text(self) -> str:
        """Format as a table and a sentence that says whether the run was reproduced."""
        rows = [(f.model, f.name, f"{f.evaluated:.9g}", _shown(f.recorded), f.verdict) for f in self.figures]
        header = ("model", "metric", "evaluated", "recorded", "verdict")
        lines = [f"{self.split}: {self.images} images", table(rows, header, frozenset((2, 3))), *self.remarks]
        if self.predictions_equal is not None:
            lines.append(f"predictions.csv: {self.predictions_equal} of {self.images} rows are the same")
        return "\n".join([*lines, self._sentence()])

    def _sentence(self) -> str:
        compared = [figure for figure in self.figures if figure.recorded is not None]
        other = [figure for figure in compared if figure.verdict != "equal"]
        if not compared:
            return "nothing to compare with: the run has recorded no metrics of this split"
        if not other:
            return f"all {len(compared)} metrics equal those of summary.json"
        names = ", ".join(f"{figure.model} {figure.name}" for figure in other)
        how = "differ" if self.differs else "differ by rounding"
        return f"{len(other)} of {len(compared)} metrics {how} from summary.json: {names}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"


def check_split(split: str) -> None:
    """Raise UserError if ``split`` is not the name of a split."""
    if split in SPLITS:
        return
    hint = did_you_mean("validation" if split.startswith("val") else split, SPLITS, prefix="; ")
    raise UserError(f"there is no split {split!r}: a run has {', '.join(SPLITS)}{hint}")


def images_of(run: Run, split: str, trained: TrainedModel, data_root: Path | None = None) -> tuple[Dataset, IntArray]:
    """Open a run's data set and return it with the indices of one split's images, found by the names in split.json.

    Nothing is downloaded. ``data_root`` overrides the recipe's data.root. Raises UserError if images are missing or
    differ from the run's.
    """
    check_split(split)
    recipe, names, classes = run.recipe, run.split, trained.classes
    moved = {} if data_root is None else {"root": str(data_root)}
    wanted = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")
    wanted = as_trained(wanted, trained.preprocessing)
    try:
        dataset = open_dataset(wanted.model_copy(update={"download": False, **moved}))
    except UserError as error:
        raise UserError(
            f"the images of {run.path} are not here: {error}. If they have moved, use --data-root FOLDER"
        ) from None
    if dataset.classes != classes:
        raise UserError(
            f"the data set now has different classes ({len(dataset.classes)}) than {run.path} was trained on "
            f"({len(classes)}): {_first_difference(dataset.classes, classes)}"
        )
    index = {dataset.images.name(i): i for i in range(len(dataset.images))}
    missing = [name for name in names[split] if name not in index]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names[split])} {split} images of {run.path} are no longer in the data set: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    _check_hash(run, dataset, names, index)
    return dataset, _places(names[split], index)


def _first_difference(now: list[str], then: list[str]) -> str:
    new, gone = [c for c in now if c not in then], [c for c in then if c not in now]
    return f"{'new' if new else 'gone'}: {(new or gone)[0]}" if new or gone else "in another order"


def _places(names: list[str], index: dict[str, int]) -> IntArray:
    return torch.tensor([index[name] for name in names], dtype=torch.int64).numpy()


def _check_hash(run: Run, dataset: Dataset, names: dict[str, Any], index: dict[str, int]) -> None:
    """Check that names and classes of all splits are those of the run, unless some images are missing."""
    if any(name not in index for split in SPLITS for name in names[split]):
        return
    splits = {split: _places(names[split], index) for split in SPLITS}
    if split_hash(dataset, splits) != names["hash"]:
        raise UserError(
            f"the data set gives images of {run.path} other classes than it had when the run was trained (the hash in "
            "split.json differs); restore the data as they were"
        )


def evaluate_run(
    run: Run,
    split: str,
    accelerator: Accelerator,
    data_root: Path | None = None,
) -> ReevaluationReport:
    """Evaluate a run's best model on a split, and the last one if its checkpoint exists. Collective."""
    check_split(split)
    if not run.split[split]:
        others = [other for other in SPLITS if run.split[other]]
        raise UserError(
            f"{run.path} has no {split} images (data.split.{split}); evaluate others: --split {' or '.join(others)}"
        )
    trained, recipe = load_model(run.path), run.recipe
    if run.is_finished:
        check_recipe(run)
    summary = run.summary if run.is_finished else {}
    dataset, indices = images_of(run, split, trained, data_root)
    outcome = ReevaluationReport(split, len(indices))
    loader = _loader(run, recipe, summary, trained, dataset, indices, split, accelerator)

    def measure(module: nn.Module) -> EvalResult:
        module.to(accelerator.device)
        if recipe.train.channels_last:
            module.to(memory_format=torch.channels_last)
        return evaluate(
            module,
            loader,
            dataset.labels[indices],
            accelerator.device,
            autocast_dtype=autocast_dtype(accelerator.mixed_precision),
            channels_last=recipe.train.channels_last,
        )

    allowed = max(ROUNDING[accelerator.mixed_precision or "no"], ROUNDING[summary.get("precision") or "no"])
    try:
        best = measure(trained.module)
        _compare(outcome, "best", best, summary, allowed)
        if split == "test" and run.is_finished:
            outcome.predictions_equal = _same_rows(run, best, trained.classes)
        if _last_differs(summary) and _load_last(run, trained.module, summary, outcome):
            _compare(outcome, "last", measure(trained.module), summary, allowed)
    finally:
        loader.close()
    outcome.remarks += _remarks(trained, summary, accelerator)
    return outcome


def _loader(
    run: Run,
    recipe: Recipe,
    summary: dict[str, Any],
    trained: TrainedModel,
    dataset: Dataset,
    indices: IntArray,
    split: str,
    accelerator: Accelerator,
) -> EvaluationLoader:
    """Return a loader of the batches of the run's own evaluation, distributed over the current processes."""
    processes = summary.get("processes") or run.processes
    size = recipe.train.images_per_evaluation
    batches = [b for rank in range(processes) for b in plan_evaluation(len(indices), size, processes, rank)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    transform = build_transform(split, recipe.augment, trained.preprocessing)
    images = SplitDataset(dataset.images, dataset.labels, indices, transform, recipe.recipe.seed)
    workers = min(worker_count(recipe.data.workers, dataset.images, local_processes()), len(mine))
    source = WorkerBatches(images, workers, pin_memory=accelerator.device.type == "cuda")
    return EvaluationLoader(source, mine)


def _compare(
    outcome: ReevaluationReport, model: str, found: EvalResult, summary: dict[str, Any], allowed: float
) -> None:
    """Add the comparison of a model's metrics with those that the run recorded."""
    figures = found.figures(PREFIXES.get(outcome.split, f"{outcome.split}_"))
    recorded: dict[str, float] = summary[model] if summary else {}
    loss = next(name for name in figures if name.endswith("loss"))
    is_close = loss in recorded and abs(figures[loss] - recorded[loss]) <= allowed * abs(recorded[loss])
    for name, value in figures.items():
        was = recorded.get(name)
        outcome.figures.append(MetricComparison(model, name, value, was, _verdict(value, was, is_close)))


def _verdict(value: float, recorded: float | None, loss_is_close: bool) -> str:
    """Return the verdict on one metric.

    If the losses agree up to rounding, other metrics may still differ, since an image close to the boundary between two
    classes may be assigned to the other one.
    """
    if recorded is None:
        return "not recorded"
    if value == recorded:
        return "equal"
    return "rounding" if loss_is_close else "differs"


def _same_rows(run: Run, found: EvalResult, classes: list[str]) -> int:
    """Return the number of rows of predictions.csv with the same prediction as now."""
    rows, predicted = run.predictions(), [classes[int(index)] for index in found.predictions]
    if len(rows) != len(predicted):
        raise DamagedFile(run.path / "predictions.csv", f"{len(rows)} rows of {len(predicted)} test images")
    return sum(row["prediction"] == now for row, now in zip(rows, predicted, strict=True))


def _last_differs(summary: dict[str, Any]) -> bool:
    """Return whether the run's last epoch is not its best one."""
    return bool(summary) and summary["last"]["epoch"] != summary["best"]["epoch"]


def _load_last(run: Run, module: nn.Module, summary: dict[str, Any], outcome: ReevaluationReport) -> bool:
    """Load the last epoch's weights into the module; add a note and return False if its checkpoint is missing."""
    epoch = summary["last"]["epoch"]
    if not load_last_model(run, module, epoch):
        outcome.remarks.append(f"the last model was not evaluated: no whole checkpoint of epoch {epoch} is left")
        return False
    return True


def load_last_model(run: Run, module: nn.Module, epoch: int) -> bool:
    """Load the weights after ``epoch``, the run's last one, into ``module``; return False if the checkpoint is missing.

    With train.ema these are the averaged weights, which the run evaluates.
    """
    path = find_latest(run.checkpoints, lambda warning: None)  # the warnings only matter for resuming
    content = None if path is None else load_checkpoint(path)
    if content is None or content["position"]["epoch"] != epoch or content["position"]["step"]:
        return False
    module.load_state_dict(content["model"])
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, average in content["ema"].items():
            named[name].copy_(average)
    return True


def _remarks(trained: TrainedModel, summary: dict[str, Any], accelerator: Accelerator) -> list[str]:
    """Return notes that may explain differences."""
    remarks = [trained.caution] if trained.caution else []
    then = (summary.get("device"), summary.get("precision"))
    now = (accelerator.device.type, accelerator.mixed_precision)
    if summary and then != now:
        remarks.append(f"the run evaluated on {then[0]} with precision {then[1]}, this is {now[0]} with {now[1]}")
    return remarks


def as_json(run: Run, outcome: ReevaluationReport) -> str:
    """Format the result as JSON."""
    figures: dict[str, dict[str, Any]] = {}
    for each in outcome.figures:
        content = {"evaluated": each.evaluated, "recorded": each.recorded, "verdict": each.verdict}
        figures.setdefault(each.model, {})[each.name] = content
    return json.dumps(
        {
            "run": str(run.path),
            "split": outcome.split,
            "images": outcome.images,
            "figures": figures,
            "predictions_equal": outcome.predictions_equal,
            "remarks": outcome.remarks,
        },
        indent=2,
    )
