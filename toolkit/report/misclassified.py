"""Plot of the misclassified test images with the highest confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from toolkit.report.data_plots import paste
from toolkit.report.plot_style import fitted, short
from toolkit.report.prediction_metrics import Predictions

COUNT = 24
"""Number of mistakes in the figure."""
COLUMNS = 6
TILE, GAP, CAPTION = 176, 14, 56
"""Side of an image, space next to it, height of the text above it; in pixels."""
CELL = (CAPTION + TILE, TILE + GAP)
HEADER = 0.4
"""Height reserved for the title, in inches."""


@dataclass(frozen=True)
class Misclassification:
    """A misclassified test image."""

    name: str
    label: str
    prediction: str
    probability: float
    image: Image.Image | None
    """None if the image is not available."""


def misclassifications(found: Predictions, images: dict[str, Image.Image], count: int) -> list[Misclassification]:
    """Return the ``count`` mistakes predicted with the highest probability, worst first."""
    return [
        Misclassification(
            found.names[i],
            found.classes[found.labels[i]],
            found.classes[found.predictions[i]],
            float(found.probabilities[i]),
            images.get(found.names[i]),
        )
        for i in found.worst(count)
    ]


def misclassified_figure(title: str, worst: Sequence[Misclassification]) -> Figure:
    """Draw each mistake with its image, true class, predicted class and probability."""
    rows = -(-len(worst) // COLUMNS)
    sheet = np.full((rows * CELL[0], COLUMNS * CELL[1], 3), 255, dtype=np.uint8)
    width = 9.0
    height = width * sheet.shape[0] / sheet.shape[1] + HEADER
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1 - HEADER / height))
    for number, one in enumerate(worst):
        top, left = number // COLUMNS * CELL[0], number % COLUMNS * CELL[1] + GAP // 2
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
