"""Plots of the report by `toolkit data`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from toolkit.augment.transforms import build_transform
from toolkit.data.dataset_report import DatasetReport
from toolkit.data.image_sources import to_shown
from toolkit.recipe.schema import AugmentConfig
from toolkit.report import data_plots
from toolkit.report.plot_style import plot_style, save

SHEET_CLASSES = 200
"""Maximum number of classes on a contact sheet: more are hard to view and take longer to draw."""


def draw(report: DatasetReport, folder: Path, log: Callable[[str], None]) -> list[Path]:
    """Write all plots to ``folder`` and return their paths. Raises UserError if that fails."""
    with plot_style(log):
        bars, sheet = histogram(report), contact_sheet(report)
        title = f"{report.recipe.recipe.name}: images per class of {report.dataset.name}, all splits together"
        totals = data_plots.class_totals(title, report.classes, np.sum(list(report.counts.values()), axis=0))
        return [
            *save(bars, folder, "class-histogram", ("png", "svg")),
            *save(totals, folder, "class-totals", ("png", "svg")),
            *save(sheet, folder, "contact-sheet", ("png",)),
        ]


def histogram(report: DatasetReport) -> Figure:
    """Plot the images per class: training and validation stacked above, test below."""
    title = f"{report.recipe.recipe.name}: images per class of {report.dataset.name}"
    return data_plots.class_histogram(title, report.classes, report.counts)


def contact_sheet(report: DatasetReport) -> Figure:
    """Plot the first training image of each class, raw (left) and preprocessed for the model (right).

    If there are more than SHEET_CLASSES classes, that many are shown, evenly spaced in the order of the data set.
    """
    labels = sorted(report.examples)
    title = f"{report.recipe.recipe.name}: one image per class"
    if len(labels) > SHEET_CLASSES:
        title += f", of {SHEET_CLASSES} of {len(labels):,} classes"
        labels = [labels[number * len(labels) // SHEET_CLASSES] for number in range(SHEET_CLASSES)]
    raw = [report.dataset.images.load(report.examples[label]) for label in labels]
    transform = build_transform("test", AugmentConfig(), report.preprocessing)
    inputs, scale = data_plots.to_images([transform(pixels).numpy() for pixels in raw])
    return data_plots.contact_sheet(
        title, [report.classes[label] for label in labels], [to_shown(pixels) for pixels in raw], inputs, scale
    )
