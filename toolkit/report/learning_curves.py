"""Learning curves of a run: loss, accuracy and learning rate by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.figure import Figure

from toolkit.metrics import MEASURES
from toolkit.report.plot_style import BLUE, INK, SPLIT_COLORS, fitted, labeled_axes
from toolkit.report.run_data import Record, RunData

SIZE = (6.3, 3.6)
"""Width and height of a figure in inches; the width is that of a text column."""


def learning_curves(
    data: RunData, metric: Literal["loss", "accuracy", "map"], size: tuple[float, float] = SIZE
) -> Figure:
    """Plot the training and validation metric of each epoch, and mark the best and the last epoch.

    ``size``: width and height in inches.
    """
    measure, loss = MEASURES[metric], f"{'binary ' if data.is_multi_label else ''}cross-entropy"
    scale, label = measure.scale, f"{loss if metric == 'loss' else measure.label} ({measure.unit})"
    figure, axes = labeled_axes("epoch", label, fitted(f"{data.name}: {measure.label}", size[0] - 1), size)
    for split, key, style in (("train", f"train/{metric}", "--"), ("validation", f"val/{metric}", "-")):
        xs, ys = points(data.epochs, key, scale)
        if xs:
            axes.plot(xs, ys, style, color=SPLIT_COLORS[split], linewidth=1.6, label=split, **_markers(len(xs)))
    best, last = data.best_epoch, data.last_epoch
    axes.axvline(best, color=INK, linewidth=1.0, linestyle="-", label=f"{data.best_label}: epoch {best}")
    if last != best:
        axes.axvline(last, color=INK, linewidth=1.0, linestyle=":", label=f"{data.end_label}: epoch {last}")
    axes.legend(loc="best")
    return figure


def learning_rate_curve(data: RunData) -> Figure:
    """Plot the learning rate over the completed epochs."""
    title = fitted(f"{data.name}: learning rate", SIZE[0] - 1)
    figure, axes = labeled_axes("completed epochs", "learning rate", title, SIZE)
    xs, ys = learning_rates(data)
    axes.plot(xs, ys, color=BLUE, linewidth=1.6, **_markers(len(xs)))
    if data.decays_by_factors:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    return figure


def learning_rates(data: RunData) -> tuple[list[float], list[float]]:
    """Return the logged learning rates, at the start of epochs and within, as (completed epochs, learning rates)."""
    begun = [(float(record["epoch"]) - 1, float(record["lr"])) for record in data.epochs if "lr" in record]
    within = [(float(record["epoch"]), float(record["lr"])) for record in data.steps if "lr" in record]
    found = sorted(begun + within)
    return [x for x, _ in found], [y for _, y in found]


def points(epochs: Sequence[Record], key: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """Return the epochs for which a metric was logged, and its values multiplied by ``scale``."""
    records = [record for record in epochs if key in record]
    return [int(record["epoch"]) for record in records], [scale * record[key] for record in records]


def _markers(count: int) -> dict[str, Any]:
    """Return marker settings: few points get markers, since a single point would otherwise be invisible."""
    return {"marker": "o", "markersize": 3.0} if count <= 40 else {}
