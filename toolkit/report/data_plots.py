"""Plots of a data set: the class histogram, and a contact sheet with one image per class, raw and normalized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from toolkit.data.image_sources import to_shown
from toolkit.formatting import plural
from toolkit.report.plot_style import DPI, SKY, SPLIT_COLORS, columns_for, fitted, grid, short
from toolkit.report.prediction_metrics import Counts

MAX_LABELED = 250
"""Maximum number of classes whose names are shown; more classes are drawn as one outline without names."""

TILE, GAP = 96, 8
"""Side of an image on a contact sheet, and the space around it, in pixels."""
CAPTION = 22
"""Height of a class's name above its images, in pixels."""


def class_histogram(title: str, names: Sequence[str], counts: Mapping[str, Counts]) -> Figure:
    """Plot the images per class: training and validation stacked in the upper panel, test in the lower one.

    ``counts`` maps "train", "validation" and "test" to the number of images of each class, int64 [classes].
    """
    train, validation, test = (counts[split] for split in ("train", "validation", "test"))
    return _class_panels(title, names, [{"train": train, "validation": validation}, {"test": test}])


def class_totals(title: str, names: Sequence[str], totals: Counts) -> Figure:
    """Plot the images per class of the whole data set, all splits in one panel; ``totals`` is int64 [classes]."""
    return _class_panels(title, names, [{"all splits": totals}])


def _class_panels(title: str, names: Sequence[str], panels: Sequence[Mapping[str, Counts]]) -> Figure:
    """Plot one panel of bars per mapping, from top to bottom; the counts of a mapping are stacked."""
    count, positions = len(names), np.arange(len(names))
    width = min(max(7.0, 1.2 + 0.17 * count), 40.0)
    longest = max(len(name) for name in names) if count <= MAX_LABELED else 0
    upright = count > 12 or count * longest > 90
    labels_height = (0.075 * min(longest, 40) if upright else 0.3) + 0.2
    shares = (3, 2)[: len(panels)]
    figure = Figure(figsize=(width, 0.92 * sum(shares) + labels_height), layout="constrained")
    cells = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=shares)[:, 0]
    for axes, stacked in zip(cells, panels, strict=True):
        bottom = None
        for split, heights in stacked.items():
            _bars(axes, positions, heights, split, bottom)
            bottom = heights
        axes.set_ylabel("images")
        grid(axes)
        axes.legend(loc="upper right", ncols=2)
        axes.margins(x=0.6 / max(count, 1), y=0.18)
    lowest = cells[-1]
    if count <= MAX_LABELED:
        small = {"fontsize": 7 if count > 40 else 9}
        shown = [short(name, 40) for name in names]
        lowest.set_xticks(positions, shown, rotation=90 if upright else 0, parse_math=False, **small)
    else:
        lowest.set_xlabel(f"{plural(count, 'class', 'classes')}, in the order of the data set")
    cells[0].set_title(fitted(title, figure.get_figwidth() - 1), parse_math=False)
    return figure


def _bars(axes: Axes, positions: Any, heights: Counts, split: str, bottom: Any = None) -> None:
    style: dict[str, Any] = {"color": SPLIT_COLORS.get(split, SKY), "label": f"{split} ({int(heights.sum()):,})"}
    if len(heights) <= MAX_LABELED:
        axes.bar(positions, heights, 0.8, bottom=bottom, **style)
        return
    # One outline for all classes, since thousands of rectangles would take minutes.
    base = np.zeros_like(heights) if bottom is None else bottom
    axes.stairs(base + heights, np.arange(len(heights) + 1) - 0.5, baseline=base, fill=True, **style)


def contact_sheet(
    title: str,
    names: Sequence[str],
    raw: Sequence[Image.Image],
    inputs: Sequence[Image.Image],
    scale: tuple[float, float],
    augmented: Sequence[Image.Image] = (),
) -> Figure:
    """Draw per class one image as in its file, as model input in evaluation and, if given, as augmented training input.

    ``scale`` holds the input values shown as black and as white.
    """
    rows_of_images = [raw, inputs, *([augmented] if augmented else [])]
    cell = (len(rows_of_images) * (TILE + GAP) + GAP, TILE + CAPTION + GAP)
    columns = columns_for(len(names), cell[0] / cell[1])
    rows = -(-len(names) // columns)
    sheet = np.full((rows * cell[1] + GAP, columns * cell[0], 3), 255, dtype=np.uint8)
    header = 1.0
    kinds = "file, model input, augmented input" if augmented else "file, model input"
    inches = (max(sheet.shape[1] / DPI, 4.5), sheet.shape[0] / DPI + header)
    figure = Figure(figsize=inches)
    across = sheet.shape[1] / DPI / inches[0]
    axes = figure.add_axes(((1 - across) / 2, 0, across, 1 - header / inches[1]))
    for number, name in enumerate(names):
        top, left = number // columns * cell[1], number % columns * cell[0] + GAP
        axes.text(left, top + CAPTION - 5, short(name, 30), fontsize=6.5, parse_math=False)
        for column, images in enumerate(rows_of_images):
            paste(sheet, images[number], top + CAPTION, left + column * (TILE + GAP // 2))
    axes.imshow(sheet, interpolation="none")
    axes.set_axis_off()
    figure.text(
        0.5, 1 - 0.68 / inches[1], fitted(title, inches[0], 9), ha="center", va="bottom", fontsize=9, parse_math=False
    )
    figure.text(0.5, 1 - 0.8 / inches[1], f"{kinds} ({scale[0]:.2f} black, {scale[1]:.2f} white)",
                ha="center", va="center", fontsize=7)  # fmt: skip
    return figure


def to_images(inputs: Sequence[npt.NDArray[np.float32]]) -> tuple[list[Image.Image], tuple[float, float]]:
    """Convert model inputs, float [C, H, W], to images on a common scale; also return the values of black and white.

    With more than three channels, the first three are shown as RGB; with two, the first one is shown.
    """
    low, high = min(float(x.min()) for x in inputs), max(float(x.max()) for x in inputs)
    scale = 255 / max(high - low, 1e-9)
    pixels = [np.rint((x - low) * scale).astype(np.uint8).transpose(1, 2, 0) for x in inputs]
    return [to_shown(image).convert("RGB") for image in pixels], (low, high)


def paste(sheet: npt.NDArray[np.uint8], image: Image.Image, top: int, left: int, side: int = TILE) -> None:
    """Paste an image centered in a square, scaled to fit; small images are enlarged with nearest-neighbor sampling."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    resampling = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    shown = np.asarray(image.convert("RGB").resize(size, resampling))
    y, x = top + (side - size[1]) // 2, left + (side - size[0]) // 2
    sheet[y : y + size[1], x : x + size[0]] = shown
