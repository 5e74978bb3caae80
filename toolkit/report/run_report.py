"""Write a run's figures for print and its report as one HTML file, from the run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from toolkit.errors import UserError
from toolkit.recipe.diagnostics import printable
from toolkit.recipe.gpu_support import is_random
from toolkit.report import learning_curves, test_plots
from toolkit.report.conv_filters import choose, effect_figure, filters_figure
from toolkit.report.data_plots import as_pictures, class_histogram, contact_sheet
from toolkit.report.dataset_images import (
    SMALL,
    DatasetImages,
    augmented_input,
    data_uri,
    model_input,
    open_dataset_images,
    preprocessing_of,
)
from toolkit.report.html import render
from toolkit.report.misclassified import COUNT, misclassifications, misclassified_figure
from toolkit.report.plot_style import PRINT, page_svg, plot_style, save
from toolkit.report.prediction_metrics import calibration
from toolkit.report.run_data import SPLITS, RunData, load_run_data
from toolkit.report.run_page import ReportExtras, count_by_class, run_page
from toolkit.runs import Run, write_atomically

ON_PAGE = {
    "reliability": "Reliability diagram",
    "class-histogram": "Images per class",
    "filters": "Filters of the first layer before and after training",
    "filter-effect": "Responses of single filters to an image",
}
"""Figures embedded in the page, with their accessible descriptions."""

PHOTOGRAPHS = ("mistakes", "samples")
"""Figures that consist of photographs, written as PNG instead of SVG."""

GALLERY = 60
"""Maximum number of mistakes on the page."""
THUMBNAIL = 180
"""Longer side of a mistake's image on the page, in pixels."""
SAMPLES, SAMPLE = 200, 112
"""Maximum number of classes shown by a sample image, and its longer side in pixels."""


@dataclass(frozen=True)
class ReportResult:
    """Files written by a report."""

    report: Path | None
    figures: list[Path]
    missing: list[str]
    """What could not be shown, and why."""
    url: str = ""
    """URL of the W&B report, if one was requested."""


def write_report(
    run: Run,
    output: Path | None = None,
    *,
    figures_only: bool = False,
    data_root: str | None = None,
    filters: Sequence[int] = (),
    log: Callable[[str], None],
) -> ReportResult:
    """Write a run's figures, and its page to ``output`` (by default report.html in the run directory).

    ``data_root`` overrides the recipe's location of the images; ``filters`` are the numbers, from 1, of the filters
    applied to an image. Raises UserError if the run has no finished epoch or the files cannot be written.
    """
    facts = load_run_data(run)
    shown = ReportExtras()
    pictures = facts.try_load("images", lambda: open_dataset_images(facts, data_root))
    files: list[Path] = []
    with plot_style(log):
        for name, draw in _figures(facts, pictures, shown, filters):
            figure = facts.try_load(f"figure {name}", draw)
            if figure is None:
                continue
            if name in ON_PAGE and not figures_only:
                shown.svg[name] = page_svg(figure, ON_PAGE[name])
            files += save(figure, run.figures, name, ("png", "pdf") if name in PHOTOGRAPHS else PRINT)
    if figures_only:
        return ReportResult(None, files, facts.missing)
    shown.files = [file.name for file in files]
    report = write_page(render(run_page(facts, shown)), output or run.report_file)
    return ReportResult(report, files, facts.missing)


def write_page(text: str, path: Path) -> Path:
    """Write a page and return its path. Raises UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"the report cannot be written to {path}: {error.strerror}") from None
    return path


Draw = tuple[str, Callable[[], Figure]]


def _figures(
    facts: RunData, pictures: DatasetImages | None, shown: ReportExtras, chosen: Sequence[int]
) -> Iterator[Draw]:
    """Yield the name and draw function of each figure; also fill ``shown`` with the other content of the page."""
    yield "loss", lambda: learning_curves.loss_curves(facts)
    yield "accuracy", lambda: learning_curves.accuracy_curves(facts)
    yield "learning-rate", lambda: learning_curves.learning_rate_curve(facts)
    if (found := facts.predictions) is not None:
        shown.calibration = measured = calibration(found.probabilities, found.right)
        yield "confusion", lambda: test_plots.confusion_figure(f"{facts.name}: test images", found)
        yield (
            "class-accuracy",
            lambda: test_plots.balanced_accuracy_figure(f"{facts.name}: test accuracy by class", found),
        )
        yield "reliability", lambda: test_plots.reliability_figure(facts.name, measured)
        yield from _mistakes(facts, pictures, shown)
    if (filters := facts.filters) is not None:
        yield "filters", lambda: filters_figure(facts.name, filters)
        if pictures is not None:
            yield "filter-effect", lambda: _effect(facts, pictures, shown, chosen)
    shown.counts = counts = _counts(facts, pictures)
    if counts is not None:
        title = f"{facts.name}: images per class"
        yield "class-histogram", lambda: class_histogram(title, _printable(facts.classes), counts)
    if pictures is not None and facts.split:
        yield "samples", lambda: _samples(facts, pictures, shown)


def _mistakes(facts: RunData, pictures: DatasetImages | None, shown: ReportExtras) -> Iterator[Draw]:
    assert facts.predictions is not None
    names = [facts.predictions.names[row] for row in facts.predictions.worst(GALLERY)]
    images = {name: image for name in names if pictures and (image := pictures.load(name)) is not None}
    worst = misclassifications(facts.predictions, images, GALLERY)
    shown.mistakes = [
        {
            "uri": data_uri(one.image, THUMBNAIL) if one.image else None,
            "small": one.image is not None and max(one.image.size) <= SMALL,
            "name": printable(one.name),
            "label": printable(one.label),
            "prediction": printable(one.prediction),
            "probability": one.probability,
        }
        for one in worst
    ]
    if pictures is not None and (gone := len(names) - len(images)):
        facts.missing.append(f"{gone} of {len(names)} images of the worst mistakes: gone or damaged")
    if worst:
        yield "mistakes", lambda: misclassified_figure(facts.name, worst[:COUNT])


def _effect(facts: RunData, pictures: DatasetImages, shown: ReportExtras, chosen: Sequence[int]) -> Figure:
    """Draw the chosen filters' responses to the first readable test image, or another image if there is none."""
    assert facts.filters is not None
    numbers, which = choose(facts.filters, chosen)
    names = facts.predictions.names if facts.predictions else facts.split.get("test", [])
    for name in names or [*facts.split.get("validation", []), *facts.split.get("train", [])]:
        image = pictures.load(name)
        if image is not None:
            shown.effect_caption = f"{which.capitalize()}, on {printable(name)}: orange is negative, purple positive."
            given = model_input(preprocessing_of(facts), image)
            return effect_figure(facts.name, facts.filters, numbers, image, given)
    raise UserError("no image can be read")


def _counts(facts: RunData, pictures: DatasetImages | None) -> Any:
    """Return the images per class by split, as recorded by the run or else counted in the data set."""
    if "images_per_class" in facts.split:
        return facts.try_load("images per class", lambda: count_by_class(facts))
    if pictures is None or not facts.split:
        facts.missing.append("images per class: the run did not record them, and the data set is not available")
        return None
    return facts.try_load("images per class", lambda: {s: pictures.counts(facts.split[s]) for s in SPLITS})


def _samples(facts: RunData, pictures: DatasetImages, shown: ReportExtras) -> Figure:
    """Draw the first training image of each class, as in the file and as the model's input; add it to the page."""
    preprocessing = preprocessing_of(facts)
    names: list[str] = []
    raw: list[Image.Image] = []
    for label, name in list(pictures.first_of_each_class(facts.split["train"]).items())[:SAMPLES]:
        if (image := pictures.load(name)) is not None:
            names.append(printable(pictures.dataset.classes[label]))
            raw.append(image)
    if not raw:
        raise UserError("no training image can be read")
    arrays = [model_input(preprocessing, image) for image in raw]
    is_augmented = facts.recipe is not None and is_random("train", facts.recipe.augment)
    if is_augmented:
        arrays += [augmented_input(facts, preprocessing, image, seed) for seed, image in enumerate(raw)]
    found, shown.scale = as_pictures(arrays)
    inputs, augmented = found[: len(raw)], found[len(raw) :]
    shown.samples = [
        {
            "name": name,
            "raw": data_uri(image, SAMPLE),
            "input": data_uri(inputs[number], SAMPLE),
            "augmented": data_uri(augmented[number], SAMPLE) if is_augmented else None,
            "small": max(image.size) <= SMALL,
        }
        for number, (name, image) in enumerate(zip(names, raw, strict=True))
    ]
    title = f"{facts.name}: one training image per class"
    return contact_sheet(title, names, raw, inputs, shown.scale, augmented)


def _printable(names: Sequence[str]) -> list[str]:
    return [printable(name) for name in names]
