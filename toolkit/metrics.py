"""The only definition of each metric: name, label, unit, direction, and its key in a run's files. Imports no torch.

``training/evaluation.py`` computes the :data:`MEASURES` of a model on a split. The names in the recipe schema, columns
of tables, axes of plots and the direction of *best* are derived from this module.

A plugin's metric NAME is ``val/NAME`` in metrics.jsonl, and ``val_NAME`` and ``test_NAME`` elsewhere. Such names follow
from the recipe; only the direction is not in them, so that it is set with :func:`set_direction`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SPLITS = {"train": ("training", "train"), "val": ("validation", "val."), "test": ("test", "test")}
"""Prefixes of metrics, with the split's full name and its name in column headings."""


TASKS = ("single_label", "multi_label")
"""Values of ``task.kind``."""


@dataclass(frozen=True)
class Measure:
    """A measured quantity: how it is labeled and formatted, and which direction is better."""

    label: str
    heading: str
    """Short label for column headings, including the unit."""
    unit: str = "%"
    """Unit in which the measure is shown; empty for a count."""
    decimals: int = 2
    scale: float = 100.0
    """Factor from the stored to the shown value; accuracies are stored as fractions and shown in percent."""
    higher_is_better: bool = True
    splits: tuple[str, ...] = ("val", "test")
    """Splits on which the measure is computed."""
    tasks: tuple[str, ...] = TASKS
    """The kinds of task for which the measure is computed."""
    varies: bool = True
    """Whether the measure may differ between runs of the same recipe with different seeds."""


MEASURES = {
    "loss": Measure("loss", "loss", "nats", 4, 1.0, higher_is_better=False, splits=tuple(SPLITS)),
    "accuracy": Measure("accuracy", "acc. %", splits=tuple(SPLITS)),
    "top5_accuracy": Measure("top-5 accuracy", "top-5 acc. %", tasks=TASKS[:1]),
    "balanced_accuracy": Measure("balanced accuracy", "balanced acc. %", tasks=TASKS[:1]),  # mean recall over classes
    "macro_f1": Measure("macro F1", "macro F1 %"),  # the mean F1 over the classes
    "micro_f1": Measure("micro F1", "micro F1 %", tasks=TASKS[1:]),  # F1 over the predictions of all labels together
    "map": Measure("mAP", "mAP %", tasks=TASKS[1:]),  # average precision, averaged over the labels
    "auroc": Measure("AUROC", "AUROC %", tasks=TASKS[1:]),  # area under the ROC curve, averaged over the labels
}
"""Measures of a model on a split, defined in ``training/classification_metrics.py``. For multi-label classification,
accuracy is the subset accuracy: the fraction of images whose labels are all predicted correctly."""


@dataclass(frozen=True)
class Metric:
    """One value of a run, as a column of a study's table: a measure of its best or last model, or a cost of the run."""

    name: str
    measure: Measure
    key: str
    """Name in summary.json; for the training split, in metrics.jsonl."""
    split: str = ""
    model: Literal["best", "last", ""] = ""
    """Which model of the run is measured; empty for a cost of the whole run, such as its duration."""

    @property
    def heading(self) -> str:
        """Heading of the column, such as ``last val. acc. %``."""
        last = "last" if self.model == "last" else ""
        return " ".join(filter(None, (last, self.split and SPLITS[self.split][1], self.measure.heading)))

    @property
    def label(self) -> str:
        """Full label without the unit, such as ``validation accuracy``."""
        return " ".join(filter(None, (self.split and SPLITS[self.split][0], self.measure.label)))

    @property
    def title(self) -> str:
        """The label with a capital letter at the start."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def axis_label(self) -> str:
        """Label of an axis, with the unit: ``validation accuracy (%)``."""
        return f"{self.label} ({self.measure.unit})" if self.measure.unit else self.label

    @property
    def expected_name(self) -> str | None:
        """Name in [expected_metrics], which refers to values in summary.json; None for other values."""
        return None if self.split == "train" else f"last_{self.key}" if self.model == "last" else self.key

    def read(self, summary: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]] = ()) -> float | None:
        """Return the value of a finished run; None if it has none.

        ``summary`` is the content of summary.json. ``epochs`` are the epoch records of metrics.jsonl, which only
        metrics of the training split need.
        """
        model = summary.get(self.model, {}) if self.model else summary
        if self.split == "train":
            epoch = epochs[-1]["epoch"] if epochs and self.model == "last" else model.get("epoch")
            model = next((record for record in epochs if record["epoch"] == epoch), {})
        value = model.get(self.key)
        if value is not None and self.name == ALL_IMAGES:
            value = _of_all_images(value, summary)
        return float(value) if isinstance(value, int | float) else None


ALL_IMAGES = "train_accuracy_all_images"
"""Correct predictions of an epoch divided by all training images, including those of a dropped last batch."""


def _of_all_images(accuracy: float, summary: Mapping[str, Any]) -> float | None:
    seen, images = summary.get("images_per_epoch"), summary.get("images", {}).get("train")
    return accuracy * seen / images if seen and images else None


def _of_models() -> list[Metric]:
    found = []
    for model, prefix in (("best", ""), ("last", "last_")):
        for split in SPLITS:
            for name, measure in MEASURES.items():
                if split in measure.splits:
                    key = f"train/{name}" if split == "train" else f"{split}_{name}"
                    found.append(Metric(f"{prefix}{split}_{name}", measure, key, split, model))  # type: ignore[arg-type]
    return found


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *_of_models(),
        Metric(ALL_IMAGES, Measure("accuracy", "acc. of all images %"), "train/accuracy", "train", "best"),
        Metric("epochs", Measure("epochs", "epochs", "", 0, 1.0, higher_is_better=False), "epochs_run"),
        Metric("seconds", Measure("training time", "seconds", "s", 1, 1.0, higher_is_better=False), "seconds"),
        Metric("images_per_second", Measure("speed", "images/s", "images/s", 0, 1.0), "images_per_s"),
        *(
            Metric(key, Measure(label, label, "", 0, 1.0, higher_is_better=False, varies=False), key)
            for key, label in (("parameters", "parameters"), ("trainable_parameters", "trainable parameters"))
        ),
    )
}
"""All metrics by name. Without a prefix they belong to the best epoch's model, with ``last_`` to the last epoch's."""

MODEL_METRICS = tuple(name for name, metric in METRICS.items() if metric.model)
"""The metrics of a model, which claims can compare."""

EXPECTED_METRICS = {name: metric for metric in METRICS.values() if (name := metric.expected_name)}
"""The metrics that [expected_metrics] can refer to, by their names there."""

EPOCH_METRICS = tuple(
    f"{split}/{name}" for split in ("train", "val") for name, measure in MEASURES.items() if split in measure.splits
)
"""Metrics logged every epoch, named as in metrics.jsonl and the trackers."""

VALIDATION_METRICS = tuple(name for name in EPOCH_METRICS if name.startswith("val/"))

CURVES = tuple(f"{split}/{name}" for split in ("train", "val") for name in ("loss", "accuracy"))
"""The metrics that are plotted by epoch for every kind of task."""


def curves_of(records: Iterable[Container[str]]) -> tuple[str, ...]:
    """Return the metrics to plot by epoch: :data:`CURVES`, and mAP if epoch records have it."""
    return (*CURVES, *(["val/map"] if any("val/map" in record for record in records) else []))


def headline(metrics: Container[str], prefix: str) -> str:
    """Return the most important metric with a prefix, such as ``test_``: mAP if it is in ``metrics``, else accuracy."""
    return f"{prefix}map" if f"{prefix}map" in metrics else f"{prefix}accuracy"


PLUGIN_NAME = r"[^\W\d][\w.-]*"
"""Pattern of the names of plugins."""

_PLUGIN_COLUMN = re.compile(rf"(?P<last>last_)?(?P<split>val|test)_(?P<name>{PLUGIN_NAME})")

_lower_is_better: set[str] = set()
"""Names of plugins' metrics of which lower values are better."""


def set_direction(name: str, *, higher_is_better: bool) -> None:
    """Set which values of a plugin's metric are better, by the name of the plugin; without it, higher ones are."""
    (_lower_is_better.discard if higher_is_better else _lower_is_better.add)(name)


def plugin_of(name: str) -> str | None:
    """Return the plugin to which a metric's name belongs, such as ``val/NAME``; None if it is built in or no name."""
    column = name.replace("/", "_")
    found = None if column in METRICS else _PLUGIN_COLUMN.fullmatch(column)
    return found and found["name"]


def metric_of(name: str) -> Metric:
    """Return a metric by its name in a table or, as ``val/accuracy``, in metrics.jsonl.

    Names that are not built in are those of a plugin's metric. Raises KeyError for other names.
    """
    column = name.replace("/", "_")
    if column in METRICS:
        return METRICS[column]
    if (found := _PLUGIN_COLUMN.fullmatch(column)) is None:
        raise KeyError(name)
    own, split = found["name"], found["split"]
    measure = Measure(own, own, "", 4, 1.0, higher_is_better=own not in _lower_is_better)
    return Metric(column, measure, f"{split}_{own}", split, "last" if found["last"] else "best")


def metrics_in(summary: Mapping[str, Any]) -> list[Metric]:
    """Return :data:`METRICS`, and the metrics of plugins in a run's summary.json."""
    models = (("best", ""), ("last", "last_"))
    named = [f"{prefix}{key}" for model, prefix in models for key in summary.get(model) or ()]
    return [*METRICS.values(), *(metric_of(name) for name in named if plugin_of(name))]


def measures_of(task: str) -> dict[str, Measure]:
    """Return the measures that are computed for a kind of task."""
    return {name: measure for name, measure in MEASURES.items() if task in measure.tasks}


def is_measured(name: str, task: str) -> bool:
    """Return whether a metric is computed for a kind of task; the costs of a run always are."""
    return task in metric_of(name).measure.tasks


def higher_is_better(name: str) -> bool:
    """Return whether higher values of a metric are better. Accepts ``val/loss`` and ``val_loss``."""
    return metric_of(name).measure.higher_is_better


def best_of(values: Sequence[float], name: str) -> float | None:
    """Return the best of a metric's values; None if there are none."""
    return (max if higher_is_better(name) else min)(values, default=None)
