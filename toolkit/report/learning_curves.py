"""Learning curves of a run: loss, accuracy and learning rate by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.report.plot_style import BLUE, INK, SPLIT_COLOURS, fitted, grid
from toolkit.report.run_data import Record, RunData

SIZE = (6.3, 3.6)
"""Width and height in inches; as wide as a page of text."""

DECAYS = ("step", "exponential", "plateau")
"""Schedules that decay the learning rate multiplicatively; drawn on a logarithmic scale."""


def loss_curves(facts: RunData) -> Figure:
    """Plot the training and validation loss of each epoch."""
    figure, axes = _empty("epoch", "cross-entropy (nats)")
    _lines(axes, facts.epochs, "loss", 1.0)
    _finish(axes, facts, f"{facts.name}: loss")
    return figure


def accuracy_curves(facts: RunData) -> Figure:
    """Plot the training and validation accuracy of each epoch."""
    figure, axes = _empty("epoch", "accuracy (%)")
    _lines(axes, facts.epochs, "accuracy", 100.0)
    _finish(axes, facts, f"{facts.name}: accuracy")
    return figure


def learning_rate_curve(facts: RunData) -> Figure:
    """Plot the learning rate over the completed epochs."""
    figure, axes = _empty("epochs done", "learning rate")
    points = learning_rates(facts)
    axes.plot([x for x, _ in points], [y for _, y in points], color=BLUE, linewidth=1.6, **_marks(len(points)))
    if facts.recipe and facts.recipe.scheduler.name in DECAYS:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(fitted(f"{facts.name}: learning rate", SIZE[0] - 1), parse_math=False)
    return figure


def learning_rates(facts: RunData) -> list[tuple[float, float]]:
    """Return (completed epochs, learning rate) for each logged value: at the start of epochs and within them."""
    begun = [(float(record["epoch"]) - 1, float(record["lr"])) for record in facts.epochs if "lr" in record]
    within = [(float(record["epoch"]), float(record["lr"])) for record in facts.steps if "lr" in record]
    return sorted(begun + within)


def _empty(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    grid(axes)
    return figure, axes


def _lines(axes: Axes, epochs: Sequence[Record], figure: str, scale: float) -> None:
    for split, prefix, style in (("train", "train", "--"), ("validation", "val", "-")):
        points = [(r["epoch"], r[f"{prefix}/{figure}"] * scale) for r in epochs if f"{prefix}/{figure}" in r]
        if not points:
            continue
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, style, color=SPLIT_COLOURS[split], linewidth=1.6, label=split, **_marks(len(points)))


def _marks(count: int) -> dict[str, Any]:
    """Return marker settings: points are marked if there are few, since a single one would otherwise be invisible."""
    return {"marker": "o", "markersize": 3.0} if count <= 40 else {}


def _finish(axes: Axes, facts: RunData, title: str) -> None:
    """Add markers for the best and last epoch, the legend and the title."""
    best, last = facts.best_epoch, facts.last_epoch
    axes.axvline(best, color=INK, linewidth=1.0, linestyle="-", label=f"{facts.best_label}: epoch {best}")
    if last != best:
        word = "stopped early" if facts.stopped_early else "last"
        axes.axvline(last, color=INK, linewidth=1.0, linestyle=":", label=f"{word}: epoch {last}")
    axes.legend(loc="best")
    axes.set_title(fitted(title, SIZE[0] - 1), parse_math=False)
