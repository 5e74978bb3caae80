"""Evaluate a run's model on another labeled data set; its classes are matched with the model's by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from toolkit.data.dataloader import SplitDataset
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.image_sources import check_images
from toolkit.data.preprocessing import as_trained
from toolkit.data.sampling import IntArray
from toolkit.data.splits import split_dataset
from toolkit.data.table_files import FORMATS, open_table_file
from toolkit.distributed.cpu_count import available_cpus
from toolkit.distributed.process import autocast_dtype, local_processes, main_first, main_only
from toolkit.errors import UserError
from toolkit.evaluations import Evaluation, check_name, write_evaluation
from toolkit.formatting import plural
from toolkit.inference.evaluate import split_loader
from toolkit.inference.tta import with_tta
from toolkit.metrics import MEASURES
from toolkit.recipe import Recipe, load_recipe
from toolkit.recipe.data_schema import ColumnsConfig, DataConfig
from toolkit.recipe.resolve import with_defaults
from toolkit.runs import Run
from toolkit.similar_names import did_you_mean
from toolkit.training.console import table
from toolkit.training.evaluation import evaluate
from toolkit.training.task import check_label_splits, check_labels
from toolkit.training.trained_model import TrainedModel, load_model

SHOWN = 10
"""Maximum number of class names in a message."""


@dataclass(frozen=True)
class DataEvaluation:
    """Result of an evaluation on another data set."""

    evaluation: Evaluation
    own: tuple[str, dict[str, float]] | None
    """Name and metrics (without a prefix) of the run's own test split, or else its validation split; None if the run
    recorded neither."""
    notes: list[str]

    def text(self, run: Run) -> str:
        """Format as a table of the metrics, next to those on the run's own images, with notes."""
        found = self.evaluation
        own, recorded = self.own or ("", {})
        rows = [
            (measure.label, f"{found.metrics[key]:.6g}", f"{recorded[key]:.6g}" if key in recorded else "-")
            for key, measure in MEASURES.items()
            if key in found.metrics
        ]
        header = ("metric", found.name, f"run's {own}")
        if self.own is None:
            rows, header = [row[:2] for row in rows], header[:2]  # type: ignore[misc, assignment]
        part = f", split {found.split}" if found.split else ""
        title = f"{found.data}{part}: {plural(found.images, 'image')}"
        files = f"{run.path / found.folder}: evaluation.json, predictions.csv"
        return "\n".join([title, table(rows, header, frozenset((1, 2))), *self.notes, files])

    def json(self, run: Run) -> str:
        """Format as JSON."""
        own = {"split": self.own[0], "metrics": self.own[1]} if self.own else None
        content = {"run": str(run.path), **asdict(self.evaluation), "own": own, "notes": self.notes}
        return json.dumps(content, indent=2)


def evaluate_data(
    run: Run,
    data: str,
    accelerator: Accelerator,
    *,
    split: str | None = None,
    name: str | None = None,
    ignore_unknown_classes: bool = False,
    tta: Sequence[str] | None = None,
) -> DataEvaluation:
    """Evaluate a run's best model on a data set and write the result to the run directory. Collective.

    ``data``: a recipe, whose [data] is used, a folder or a table of images. ``split``: split to evaluate; None: all
    images. ``name``: name of the folder in RUN/evaluations; None: derived from ``data``. ``tta``: test-time
    augmentation, as for :func:`toolkit.inference.tta.with_tta`. The images are preprocessed
    like the run's test images, and evaluated in batches that do not depend on the number of processes.

    Raises UserError if the data have classes that the model does not have, unless ``ignore_unknown_classes`` leaves
    their images out.
    """
    path = Path(data).resolve()
    name = name or "-".join(filter(None, (path.name if path.is_dir() else path.stem, split)))
    check_name(run, name, data, split)
    trained, recipe = with_tta(load_model(run.path, model=run.factory), tta), run.recipe
    config, dataset, indices = open_data(recipe, trained, data, split, accelerator)
    indices, labels, unknown = match_classes(dataset, indices, trained, data, ignore=ignore_unknown_classes)
    if dataset.is_multi_label:
        check_label_splits(replace(dataset, classes=trained.classes, labels=labels), {"given": indices})
    indices, notes = _readable(dataset, config, indices, accelerator)
    images = SplitDataset(dataset.images, labels, indices, trained.transform, recipe.recipe.seed)
    loader = split_loader(run, images, run.processes, accelerator)
    module, channels_last = trained.module.to(accelerator.device), recipe.train.channels_last
    if channels_last:
        module.to(memory_format=torch.channels_last)
    try:
        result = evaluate(
            module,
            loader,
            labels[indices],
            trained.task,
            accelerator.device,
            autocast_dtype=autocast_dtype(accelerator.mixed_precision),
            channels_last=channels_last,
        )
    finally:
        loader.close()
    counts = replace(dataset, classes=trained.classes, labels=labels).class_counts(indices)
    missing = [each for each, count in zip(trained.classes, counts, strict=True) if not count]
    summary = run.summary if run.is_finished else None
    found = Evaluation(
        name=name,
        data=data,
        split=split,
        images=len(indices),
        metrics=trained.task.metrics(result, ""),
        missing_classes=missing,
        unknown_classes=unknown,
        epoch=summary["best"]["epoch"] if summary else None,
    )
    names = [dataset.images.name(int(i)) for i in indices]
    rows = dataset.with_kept(trained.task.prediction_rows(result, names, trained.classes), indices)
    columns = [*trained.task.prediction_columns(trained.classes), *dataset.kept]
    main_only(accelerator, lambda: write_evaluation(run, found, columns, rows), share=False)
    notes += _notes(run, config, trained, found, names)
    return DataEvaluation(found, own_metrics(summary["best"] if summary else {}), notes)


def open_data(
    recipe: Recipe, trained: TrainedModel, data: str, split: str | None, accelerator: Accelerator
) -> tuple[DataConfig, Dataset, IntArray]:
    """Open a data set given on the command line, whose images are then decoded as the run's. Collective.

    ``recipe``: that of the run. Returns the [data] table, the data set, and the indices of all images or of ``split``.
    """
    config = data_config(data, recipe, split)
    channels = trained.preprocessing.channels
    config = as_trained(config, trained.preprocessing).model_copy(update={"channels": channels})
    dataset = main_first(accelerator, lambda: open_dataset(config, for_training=False))
    return config, dataset, _indices(dataset, config, split, draw=Path(data).suffix == ".toml")


def own_metrics(best: dict[str, float]) -> tuple[str, dict[str, float]] | None:
    """Return the name of the run's test split, or else its validation split, and the best model's metrics on it."""
    for split, prefix in (("test", "test_"), ("validation", "val_")):
        found = {key: best[prefix + key] for key in MEASURES if prefix + key in best}
        if found:
            return split, found
    return None


def data_config(data: str, recipe: Recipe, split: str | None) -> DataConfig:
    """Return the [data] table for a data set given on the command line. ``recipe``: the recipe of the run.

    A table is read with the column names of the run's own table, if it has one; a split column only if ``split`` is
    given.
    """
    path = Path(data)
    if path.suffix == ".toml":
        return with_defaults(load_recipe(path, with_plugins=False)).data
    if path.is_dir() or path.suffix.lower() in (".zip", ".tar"):
        return DataConfig(dataset="imagefolder", root=data, class_folders=recipe.data.class_folders)
    if path.suffix.lower() in FORMATS:
        own = recipe.data.columns
        keep = [name for name in own.keep if name in open_table_file(path).columns]
        split_column = (own.split or "split") if split else None
        columns = ColumnsConfig(image=own.image, label=own.label, split=split_column, keep=keep)
        return DataConfig(
            dataset="table",
            table=data,
            root=str(path.parent),
            columns=columns,
            class_names=recipe.data.class_names,
            label_separator=recipe.data.label_separator,
        )
    state = "is none of these" if path.exists() else "does not exist"
    raise UserError(
        f"--data {data} {state}: expected a recipe (.toml), whose [data] is used, a folder, zip or tar file "
        f"with one folder per class, or a table ({', '.join(FORMATS)})"
    )


def _indices(dataset: Dataset, config: DataConfig, split: str | None, *, draw: bool) -> IntArray:
    """Return the indices of all images, or of a split: an official one or, with ``draw``, the recipe's split."""
    if split is None:
        return np.sort(np.concatenate(list(dataset.lists.values())))
    splits = split_dataset(dataset, config) if draw else dataset.lists
    if not len(splits.get(split, ())):
        found = ", ".join(name for name in splits if len(splits[name]))
        raise UserError(f"the data set has no {split} images, only {found}; without --split, all images are evaluated")
    return splits[split]


def match_classes(
    dataset: Dataset, indices: IntArray, trained: TrainedModel, data: str, *, ignore: bool
) -> tuple[IntArray, npt.NDArray[Any], dict[str, int]]:
    """Match the classes of a data set with those of a model, by name.

    Returns the indices of the images to evaluate, the labels of all images as the model's class indices (-1 for an
    unknown class), and the number of images of each unknown class, which are left out. In multi-label data only the
    unknown labels are left out, not the images. Raises UserError if there are unknown classes and ``ignore`` is false,
    or if all are unknown.
    """
    check_labels(dataset, trained.task.kind)
    classes = trained.classes
    known = {name: number for number, name in enumerate(classes)}
    places = np.array([known.get(name, -1) for name in dataset.classes], dtype=np.int64)
    is_known = np.ones(len(indices), dtype=bool)
    if dataset.is_multi_label:
        labels = np.zeros((len(dataset.labels), len(classes)), dtype=np.uint8)
        labels[:, places[places >= 0]] = dataset.labels[:, places >= 0]
    else:
        labels = places[dataset.labels]
        is_known = labels[indices] >= 0
    counts = dataset.class_counts(indices)
    unknown = {name: int(counts[i]) for i, name in enumerate(dataset.classes) if places[i] < 0 and counts[i]}
    if not dataset.classes:
        raise UserError(f"no image of {data} has a label")
    if not (places[counts > 0] >= 0).any():
        raise UserError(
            f"no class of {data} has the name of a class of the model: {_shown(unknown)}; "
            f"the model has {_shown(classes)}"
        )
    if unknown and not ignore:
        first = next(iter(unknown))
        hint = did_you_mean(first, classes, prefix=f" (for {first}: ")
        raise UserError(
            f"{data} has {plural(len(unknown), 'class', 'classes')} that the model does not have: {_shown(unknown)}"
            f"{hint and hint + ')'}. Rename them, or leave out "
            f"{'these labels' if dataset.is_multi_label else 'their ' + plural(sum(unknown.values()), 'image')} with "
            "--ignore-unknown-classes"
        )
    return indices[is_known], labels, unknown


def _shown(names: list[str] | dict[str, int]) -> str:
    shown = list(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _readable(
    dataset: Dataset, config: DataConfig, indices: IntArray, accelerator: Accelerator
) -> tuple[IntArray, list[str]]:
    """Return the indices without unreadable images, if data.on_bad_image permits leaving them out, and notes."""
    decode, threads = config.on_bad_image == "skip", available_cpus(local_processes())
    bad = main_only(accelerator, lambda: check_images(dataset.images, indices, decode=decode, threads=threads).bad)
    if not bad:
        return indices, []
    named = "; ".join(f"{dataset.images.name(i)}: {reason}" for i, reason in bad[:5])
    text = f"{len(bad)} of {plural(len(indices), 'image')} cannot be read: {named}{'; ...' if len(bad) > 5 else ''}"
    if not decode:
        raise UserError(f'{text}. Repair or remove them, or evaluate a recipe with data.on_bad_image = "skip"')
    if len(bad) > config.max_bad_fraction * len(indices):
        raise UserError(f"{text}: more than data.max_bad_fraction = {config.max_bad_fraction:g} allows")
    return indices[~np.isin(indices, [i for i, _ in bad])], [f"left out: {text}"]


def _notes(run: Run, config: DataConfig, trained: TrainedModel, found: Evaluation, names: list[str]) -> list[str]:
    """Return notes on missing and unknown classes, and on limits of the comparison with the run's own metrics."""
    notes = [trained.caution] if trained.caution else []
    if found.missing_classes:
        count = f"{len(found.missing_classes)} of the model's {len(trained.classes)} classes"
        notes.append(f"no images of {count}: {_shown(found.missing_classes)}")
    if found.unknown_classes:
        number = sum(found.unknown_classes.values())
        is_multi_label = trained.task.kind == "multi_label"
        left_out = plural(number, "label") if is_multi_label else f"{plural(number, 'image')} of classes"
        notes.append(f"left out: {left_out} that the model does not have: {_shown(found.unknown_classes)}")
    own = run.recipe.data
    if (config.dataset, config.name, config.root) == (own.dataset, own.name, own.root):
        trained_on = len(set(run.split["train"]).intersection(names))
        if trained_on:
            notes.append(f"{trained_on} of these images were training images of the run")
    return notes
