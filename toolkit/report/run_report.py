"""Write a run's figures (for print) and its report (one HTML file), from its run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from toolkit.data.image_sources import to_shown
from toolkit.errors import UserError
from toolkit.recipe.diagnostics import printable
from toolkit.recipe.gpu_support import is_random
from toolkit.report.conv_filters import choose, effect_figure, filters_figure
from toolkit.report.data_plots import class_histogram, contact_sheet, to_images
from toolkit.report.kept_columns import values_of
from toolkit.report.label_predictions import precision_recall_figure
from toolkit.report.learning_curves import learning_curves, learning_rate_curve, learning_rates
from toolkit.report.plot_style import PRINT, page_svg, plot_style, save
from toolkit.report.prediction_metrics import Counts
from toolkit.report.run_data import (
    SPLITS,
    FilterEffect,
    Mistake,
    RunData,
    TrainingSamples,
    load_run_data,
)
from toolkit.report.run_images import RunImages, model_inputs, open_run_images
from toolkit.report.run_page import write_run_page
from toolkit.report.test_plots import (
    MAX_MATRIX,
    class_accuracy_figure,
    confusion_figure,
    mistakes_figure,
    reliability_figure,
    temperature_figure,
)
from toolkit.runs import Run

ON_PAGE = {
    "precision-recall": "Precision and recall of each label",
    "reliability": "Reliability diagram",
    "temperature": "Reliability diagrams before and after temperature scaling",
    "class-histogram": "Images per class",
    "filters": "Filters of the first layer before and after training",
    "filter-effect": "Responses of single filters to an image",
}
"""Figures embedded in the page, with their accessible descriptions."""

PHOTO_FIGURES = ("mistakes", "samples")
"""Figures that consist mostly of images, written as PNG instead of SVG."""

MAX_MISTAKES = 60
"""Maximum number of mistakes on the page."""
MAX_SAMPLES = 200
"""Maximum number of classes for which a training image is shown."""


@dataclass(frozen=True)
class ReportResult:
    """Files written by a report."""

    report: Path | None
    figures: list[Path]
    missing: list[str]
    """Messages about what could not be shown, and why."""
    url: str = ""
    """URL of the W&B report, if one was requested."""


def write_report(
    run: Run,
    output: Path | None = None,
    *,
    figures_only: bool = False,
    data_root: Path | None = None,
    filters: Sequence[int] = (),
    log: Callable[[str], None],
) -> ReportResult:
    """Write a run's figures, and its page to ``output`` (by default report.html in the run directory).

    ``data_root`` overrides the recipe's location of the images; ``filters`` are the numbers, from 1, of the filters
    applied to an image. Raises UserError if the run has no finished epoch or the files cannot be written.
    """
    data = load_run_data(run)
    load_images(data, data_root, filters)
    return write_report_of(data, output, figures_only=figures_only, log=log)


def write_report_of(
    data: RunData,
    output: Path | None = None,
    *,
    figures_only: bool = False,
    page_only: bool = False,
    log: Callable[[str], None],
) -> ReportResult:
    """Write the figures and the page of a run whose data have been loaded; see :func:`write_report`.

    ``page_only``: draw only what the page embeds, which is several times as fast.
    """
    run = data.run
    svg: dict[str, str] = {}
    files: list[Path] = []
    with plot_style(log):
        for name, draw in _figures(data).items():
            if page_only and name not in ON_PAGE:
                continue
            figure = data.try_load(f"figure {name}", draw)
            if figure is None:
                continue
            if name in ON_PAGE and not figures_only:
                svg[name] = page_svg(figure, ON_PAGE[name])
            if not page_only:
                kinds = ("png", "pdf") if name in PHOTO_FIGURES else PRINT
                files += save(figure, run.figures, name, kinds)
    page = None if figures_only else write_run_page(output or run.report_file, data, svg, files)
    return ReportResult(page, files, data.missing)


def _figures(data: RunData) -> dict[str, Callable[[], Figure]]:
    """Return the functions that draw figures, by figure name, for all figures for which there is data."""
    name = data.name
    figures: dict[str, Callable[[], Figure]] = {
        "loss": lambda: learning_curves(data, "loss"),
        **({"map": lambda: learning_curves(data, "map")} if data.is_multi_label else {}),
        "accuracy": lambda: learning_curves(data, "accuracy"),
        **({"learning-rate": lambda: learning_rate_curve(data)} if learning_rates(data)[0] else {}),
    }
    if (found := data.predictions) is not None and (measured := data.calibration) is not None:
        if len(found.classes) <= MAX_MATRIX:
            figures["confusion"] = lambda: confusion_figure(f"{name}: test images", found)
        figures["class-accuracy"] = lambda: class_accuracy_figure(f"{name}: test accuracy by class", found)
        figures["reliability"] = lambda: reliability_figure(name, measured)
    if (scaling := data.scaling) is not None:
        figures["temperature"] = lambda: temperature_figure(name, scaling, multi_label=data.is_multi_label)
    if (labels := data.label_predictions) is not None:
        figures["precision-recall"] = lambda: precision_recall_figure(f"{name}: test images", labels)
    if data.mistakes:
        figures["mistakes"] = lambda: mistakes_figure(name, data.mistakes)
    if (filters := data.filters) is not None:
        figures["filters"] = lambda: filters_figure(name, filters)
        if (effect := data.effect) is not None:
            figures["filter-effect"] = lambda: effect_figure(name, filters, effect)
    if (counts := data.counts) is not None:
        classes = [printable(each) for each in data.classes]
        figures["class-histogram"] = lambda: class_histogram(f"{name}: images per class", classes, counts)
    if (samples := data.samples) is not None:
        title, shown = f"{name}: one training image per class", [printable(each) for each in samples.classes]
        figures["samples"] = lambda: contact_sheet(
            title, shown, samples.files, samples.inputs, samples.scale, samples.augmented
        )
    return figures


# -- figures of the data set ------------------------------------------------------------------------------------------


def load_images(data: RunData, data_root: Path | None, filters: Sequence[int]) -> RunImages | None:
    """Add to ``data`` everything that requires the data set's images, and return them; None if it is not available.

    ``filters``: numbers, from 1, of filters to apply to an image.
    """
    images = data.try_load("images", lambda: _open(data, data_root))
    data.counts = data.try_load("images per class", lambda: _counts(data, images))
    data.mistakes = _mistakes(data, images)
    if images is not None and data.filters is not None:
        data.effect = data.try_load("figure filter-effect", lambda: _filter_effect(data, images, filters))
    if images is not None and data.split:
        data.samples = data.try_load("figure samples", lambda: _samples(data, images))
    return images


def _open(data: RunData, data_root: Path | None) -> RunImages:
    if data.recipe is None:
        raise UserError("the recipe, which contains their location, cannot be read")
    preprocessing = None
    with contextlib.suppress(UserError):  # model.json is damaged: use the recipe's settings
        preprocessing = data.preprocessing
    return open_run_images(data.recipe, preprocessing, data.classes, data_root)


def _counts(data: RunData, images: RunImages | None) -> dict[str, Counts]:
    """Return the number of images of each class by split, as recorded by the run or counted in the data set."""
    if recorded := data.split.get("images_per_class"):
        counts = {split: np.array(recorded[split], dtype=np.int64) for split in SPLITS}
        if any(len(numbers) != len(data.classes) for numbers in counts.values()):
            raise ValueError("images_per_class does not fit the classes")
        return counts
    if images is None or not data.split:
        raise UserError("the run did not record them, and the data set is not available")
    indices = {split: images.indices(data.split[split], f"{split} images") for split in SPLITS}
    return {split: images.dataset.class_counts(found) for split, found in indices.items()}


def _mistakes(data: RunData, images: RunImages | None) -> list[Mistake]:
    rows: list[tuple[str, str, str, float, str]] = []
    if (found := data.predictions) is not None:
        classes, true, predicted = found.classes, found.labels, found.predictions
        rows = [
            (found.names[i], classes[true[i]], classes[predicted[i]], found.probabilities[i], values_of(found.kept, i))
            for i in found.worst(MAX_MISTAKES).tolist()
        ]
    elif (several := data.label_predictions) is not None:
        errors, text = several.largest_errors, several.text
        rows = [
            (several.names[i], text(several.labels[i]), text(several.predictions[i]), errors[i],
             values_of(several.kept, i))
            for i in several.worst(MAX_MISTAKES).tolist()
        ]  # fmt: skip
    mistakes = [
        Mistake(
            name,
            label,
            prediction,
            float(probability),
            to_shown(pixels) if images and (pixels := images.load(name)) is not None else None,
            kept,
        )
        for name, label, prediction, probability, kept in rows
    ]
    unreadable = sum(mistake.image is None for mistake in mistakes)
    if images is not None and unreadable:
        data.missing.append(f"{unreadable} of {len(mistakes)} images of the worst mistakes: missing or damaged")
    return mistakes


def _filter_effect(data: RunData, images: RunImages, wanted: Sequence[int]) -> FilterEffect:
    """Choose filters and an image: the first readable test image, or another one if there are no test images."""
    assert data.filters is not None
    chosen, description = choose(data.filters, wanted)
    names = data.predictions.names if data.predictions else data.split.get("test", [])
    for name in names or [*data.split.get("validation", []), *data.split.get("train", [])]:
        if (pixels := images.load(name)) is not None:
            caption = f"{description.capitalize()}, on {name}: orange is negative, purple positive."
            return FilterEffect(chosen, caption, to_shown(pixels), model_inputs(data.preprocessing, [pixels])[0])
    raise UserError("no image can be read")


def _samples(data: RunData, images: RunImages) -> TrainingSamples:
    """Load the first training image of each class."""
    assert data.recipe is not None
    first: dict[int, str] = {}
    for name in data.split["train"]:
        if name in images.index:
            for label in images.dataset.labels_of(images.index[name]):
                first.setdefault(label, name)
    loaded = {label: images.load(name) for label, name in sorted(first.items())[:MAX_SAMPLES]}
    files = {images.dataset.classes[label]: image for label, image in loaded.items() if image is not None}
    if not files:
        raise UserError("no training image can be read")
    augment = data.recipe.augment if is_random("train", data.recipe.augment) else None
    inputs = model_inputs(data.train_preprocessing, files.values())
    inputs += model_inputs(data.train_preprocessing, files.values(), augment) if augment else []
    shown, scale = to_images(inputs)
    raw = [to_shown(pixels) for pixels in files.values()]
    return TrainingSamples([*files], raw, shown[: len(files)], shown[len(files) :], scale)
