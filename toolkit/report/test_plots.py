"""Plots of the test results: confusion matrix, accuracy by class, reliability diagram, worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from toolkit.calibration import TemperatureScaling
from toolkit.formatting import plural
from toolkit.report.data_plots import paste
from toolkit.report.html import percent
from toolkit.report.plot_style import BLUE, GRID, INK, ORANGE, SKY, VERMILION, fitted, grid, short
from toolkit.report.prediction_metrics import (
    Calibration,
    Ints,
    RunPredictions,
    accuracy_by_class,
    confusion_matrix,
    support,
)
from toolkit.report.run_data import Mistake

MAX_COUNTED = 25
"""Maximum number of classes for which the cells of a confusion matrix show their counts."""

MAX_LABELED = 250
"""Maximum number of classes for which their names are shown."""

MAX_MATRIX = 2000
"""Maximum number of classes in a plotted confusion matrix; with more, cells would be smaller than a pixel."""

MISTAKES, COLUMNS = 24, 6
"""Number of mistakes in the figure, and in each of its rows."""
TILE, GAP, CAPTION = 176, 14, 56
"""Side of a mistake's image, space next to it, and height of the text above it, in pixels."""
HEADER = 0.4
"""Height reserved for the title of the mistakes, in inches."""


def confusion_figure(title: str, found: RunPredictions) -> Figure:
    """Plot the confusion matrix; colors show the fraction of the true class's images."""
    matrix = confusion_matrix(found)
    count = len(matrix)
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 0.45 * count if count <= MAX_COUNTED else 0.125 * min(count, MAX_LABELED)
    longest = min(max(len(name) for name in found.classes), 24) if count <= MAX_LABELED else 0
    room = 1.0 + 0.075 * longest
    figure = Figure(figsize=(max(side, 2.6) + room + 0.9, max(side, 2.6) + room), layout="constrained")
    axes = figure.subplots()
    seen = np.ma.masked_equal(share, 0)  # zero has the background color
    image = axes.imshow(seen, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="none")
    if count <= MAX_LABELED:
        size = 8 if count <= MAX_COUNTED else 5.5
        names = [short(name, 24) for name in found.classes]
        axes.set_xticks(range(count), names, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(count), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    if count <= MAX_COUNTED:
        _write_counts(axes, matrix, share)
    axes.spines[:].set_visible(False)
    between = np.arange(count + 1) - 0.5
    for lines in (axes.hlines, axes.vlines):
        lines(between, -0.5, count - 0.5, color=GRID, linewidth=0.5 if count <= MAX_LABELED else 0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(fitted(title, figure.get_figwidth() - room - 1.4), parse_math=False)
    bar = figure.colorbar(image, ax=axes, ticks=[1, 5, 20, 50, 100], fraction=0.03, pad=0.01, aspect=30, shrink=0.6)
    bar.set_label("images of the true class (%)")
    bar.outline.set_visible(False)
    return figure


def _write_counts(axes: Axes, matrix: Ints, share: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(matrix), strict=True):
        color = "white" if share[row, column] > 40 else INK
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7.5, color=color)


def class_accuracy_figure(title: str, found: RunPredictions) -> Figure:
    """Plot the accuracy of each class, sorted, with its number of test images."""
    accuracy, images = accuracy_by_class(found), support(found)
    order = [int(i) for i in np.argsort(-np.nan_to_num(accuracy, nan=-1), kind="stable") if images[i] > 0]
    labeled = len(order) <= MAX_LABELED
    height = 0.16 * len(order) if labeled else 12.0
    figure = Figure(figsize=(6.3, 1.2 + height), layout="constrained")
    axes = figure.subplots()
    if labeled:
        axes.barh(range(len(order)), 100 * accuracy[order], 0.72, color=BLUE)
    else:  # one outline, because thousands of rectangles would take minutes
        edges = np.arange(len(order) + 1) - 0.5
        axes.stairs(100 * accuracy[order], edges, orientation="horizontal", fill=True, color=BLUE)
    mean = 100 * float(np.nanmean(accuracy))
    axes.axvline(mean, color=VERMILION, linewidth=1.2, label=f"mean over classes: {mean:.1f} %")
    if labeled:
        names = [f"{short(found.classes[i], 28)}  ({images[i]})" for i in order]
        axes.set_yticks(range(len(order)), names, fontsize=7, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    grid(axes, "x")
    axes.set_xlabel("accuracy (%)")
    axes.set_ylabel("class (test images)" if labeled else plural(len(order), "class", "classes"))
    figure.legend(loc="outside lower right")
    axes.set_title(fitted(title, 3.8), parse_math=False)  # the axes are to the right of the names
    return figure


def reliability_figure(title: str, found: Calibration) -> Figure:
    """Plot accuracy against confidence per bin, and the number of images in each bin."""
    figure = Figure(figsize=(3.9, 4.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _plot_reliability(upper, lower, found)
    upper.set_ylabel("accuracy")
    upper.set_title(
        f"{fitted(title, 3.4)}\nexpected calibration error {percent(found.expected_error)}", parse_math=False
    )
    lower.set_ylabel("images")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def temperature_figure(title: str, scaling: TemperatureScaling, *, multi_label: bool) -> Figure:
    """Plot the reliability diagrams before and after temperature scaling, of the test images if there are any."""
    split = "test" if "test" in scaling.splits else "validation"
    found = scaling.splits[split]
    figure = Figure(figsize=(7.0, 4.8), layout="constrained")
    upper, lower = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    states = {"before": found.before, f"with temperature {scaling.temperature:.3f}": found.after}
    for column, (state, each) in enumerate(states.items()):
        _plot_reliability(upper[column], lower[column], each.bins)
        upper[column].set_title(f"{state}\nexpected calibration error {percent(each.ece)}", parse_math=False)
    if multi_label:
        lower[0].set_xlabel("probability of a label")
        lower[1].set_xlabel("probability of a label")
    upper[0].set_ylabel("labels present" if multi_label else "accuracy")
    lower[0].set_ylabel("labels" if multi_label else "images")
    figure.suptitle(fitted(f"{title}: {split} images", 6.5), parse_math=False)
    figure.legend(*upper[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _plot_reliability(upper: Axes, lower: Axes, found: Calibration) -> None:
    left, width = found.edges[:-1], np.diff(found.edges)
    filled = found.counts > 0
    upper.bar(left[filled], found.accuracy[filled], width[filled], align="edge", color=BLUE, edgecolor="white",
              linewidth=0.5, label="accuracy in the bin")  # fmt: skip
    gap = (found.confidence - found.accuracy)[filled]
    upper.bar(left[filled], gap, width[filled], bottom=found.accuracy[filled], align="edge", color=ORANGE,
              edgecolor="white", linewidth=0.5, alpha=0.75, label="gap to mean confidence")  # fmt: skip
    upper.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1.0, label="perfectly calibrated")
    upper.set_ylim(0, 1)
    lower.bar(left, found.counts, width, align="edge", color=SKY, edgecolor="white", linewidth=0.5)
    lower.set_xlabel("probability of the predicted class")
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        grid(axes)


def mistakes_figure(title: str, mistakes: Sequence[Mistake]) -> Figure:
    """Draw the first of the mistakes, each with its image, true class, predicted class and probability."""
    worst, cell = mistakes[:MISTAKES], (CAPTION + TILE, TILE + GAP)
    rows = -(-len(worst) // COLUMNS)
    sheet = np.full((rows * cell[0], COLUMNS * cell[1], 3), 255, dtype=np.uint8)
    width = 9.0
    height = width * sheet.shape[0] / sheet.shape[1] + HEADER
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1 - HEADER / height))
    for number, one in enumerate(worst):
        top, left = number // COLUMNS * cell[0], number % COLUMNS * cell[1] + GAP // 2
        text = f"{short(one.label, 24)}\n\N{RIGHTWARDS ARROW} {short(one.prediction, 18)} {one.probability:.2f}"
        axes.text(left, top + CAPTION - 8, text, fontsize=6.5, va="bottom", parse_math=False)
        if one.image is not None:
            paste(sheet, one.image, top + CAPTION, left, TILE)
        else:
            axes.text(left, top + CAPTION + TILE // 2, "image not available", fontsize=6.5)
    axes.imshow(sheet, interpolation="none")
    axes.set_axis_off()
    what = "worst mistakes: true class \N{RIGHTWARDS ARROW} prediction and its probability"
    text = fitted(f"{title}: {what}", width, 9)
    figure.text(0.5, 1 - 0.2 / height, text, ha="center", va="center", fontsize=9, parse_math=False)
    return figure
