"""Plot types of studies: each function takes plain values and returns a labeled Matplotlib figure with units."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from toolkit.metrics import higher_is_better, metric_of
from toolkit.report.plot_style import BLUE, CYCLE, INK, SKY, VERMILION, labeled_axes, short

WIDTH, HEIGHT = 6.3, 3.8
"""Size of a figure in inches; the width is that of a text column."""
DASHES = ("-", "--", ":", "-.")
"""Line styles that distinguish curves without color."""
TITLE_LINE = 64
"""Maximum number of characters per title line."""
LEGEND_ROWS = 14
"""Maximum number of curves with a legend; a longer one would be illegible."""
TICKS = 8
"""Maximum number of distinct values on a logarithmic color scale for which each value has a tick label."""
LOG_RATIO = 50.0
"""Values are plotted on a logarithmic scale if the ratio of the largest to the smallest exceeds this."""


@dataclass(frozen=True)
class Curve:
    """A curve: a metric after each epoch, starting at the first."""

    name: str
    mean: Sequence[float]
    std: Sequence[float] = ()
    """Standard deviation over seeds, if there are several; as long as the mean."""


@dataclass(frozen=True)
class ParallelAxis:
    """One vertical axis of a parallel coordinates plot."""

    name: str
    positions: Sequence[float | None]
    """Position of each configuration's line on this axis, from 0 to 1; None if the parameter is not active for it."""
    ticks: Mapping[float, str]


def lightness_colormap() -> Colormap:
    """Return viridis from light to dark, which suits any color vision, without its yellow end, invisible on white."""
    return LinearSegmentedColormap.from_list("ramp", colormaps["viridis"](np.linspace(0.92, 0.0, 256)))


def curves(curves: Sequence[Curve], metric: str, title: str) -> Figure:
    """Plot one curve per row of the study, with a band of one standard deviation if the row has several seeds."""
    figure, axes = _axes("epoch", metric_of(metric).axis_label, title)
    scale = metric_of(metric).measure.scale
    shades = [lightness_colormap()(x) for x in np.linspace(0, 1, len(curves))] if len(curves) > len(CYCLE) else CYCLE
    for index, (curve, color) in enumerate(zip(curves, shades, strict=False)):
        mean = np.asarray(curve.mean) * scale
        dash = DASHES[index % len(DASHES)] if len(curves) > 1 else "-"
        epochs = _plot_curve(axes, mean, dash, color=color, linewidth=1.5, label=short(curve.name, 40))
        if curve.std:
            std = np.asarray(curve.std) * scale
            axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    if len(curves) <= LEGEND_ROWS:
        _legend(figure, axes, len(curves))
    return figure


def colored_curves(
    curves: Sequence[tuple[Any, Sequence[float]]], metric: str, key: str, title: str, *, log: bool
) -> Figure:
    """Plot the curves of many runs, colored by a parameter; ``curves`` holds pairs of its value and the curve."""
    figure, axes = _axes("epoch", metric_of(metric).axis_label, title)
    scale = metric_of(metric).measure.scale
    values = [value for value, _ in curves]
    color = _color_scale(values, log=log) if is_numeric(values) else None
    names = list(dict.fromkeys(str(value) for value in values))
    for value, curve in curves:
        index = names.index(str(value))
        shade = color.to_rgba(value) if color else CYCLE[index % len(CYCLE)]
        dash = "-" if color else DASHES[index // len(CYCLE) % len(DASHES)]
        _plot_curve(axes, np.asarray(curve) * scale, dash, color=shade, linewidth=1.1)
    if color:
        bar = figure.colorbar(color, ax=axes)
        if log and len(set(values)) <= TICKS:  # by default, Matplotlib labels only powers of ten
            bar.set_ticks(sorted(set(values)), labels=[f"{value:g}" for value in sorted(set(values))])
            bar.minorticks_off()
        bar.set_label(key, parse_math=False)
    else:
        for index, name in enumerate(names[:LEGEND_ROWS]):
            dash = DASHES[index // len(CYCLE) % len(DASHES)]
            axes.plot([], [], dash, color=CYCLE[index % len(CYCLE)], label=short(name, 40))
        _legend(figure, axes, len(names))
    return figure


def levels(
    values: Sequence[float], validation: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]],
    key: str, metric: str, title: str, *, log: bool,
) -> Figure:  # fmt: skip
    """Plot the best epoch's metric, as (mean, standard deviation) over the seeds, against the varied parameter."""
    measure = metric_of(metric).measure
    figure, axes = _axes(key, f"{measure.label} ({measure.unit})", title, integers=False)
    for points, name, color, mark in ((validation, "validation", BLUE, "o"), (test, "test", VERMILION, "s")):
        if not points:
            continue
        mean, std = (np.asarray(column) * measure.scale for column in zip(*points, strict=True))
        axes.errorbar(values, mean, std if std.any() else None, color=color, marker=mark, markersize=4,
                      linewidth=1.4, capsize=3, label=name)  # fmt: skip
    if log:
        axes.set_xscale("log")
    axes.legend()
    return figure


def importance(shares: Mapping[str, float], title: str) -> Figure:
    """Plot the fraction of the metric's variance that each parameter explains, largest on top."""
    ordered = sorted(shares.items(), key=lambda item: item[1])
    figure = Figure(figsize=(WIDTH, 1.2 + 0.32 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([short(name, 45) for name, _ in ordered], [share * 100 for _, share in ordered], color=SKY)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set_xlabel("share of the metric's variance (%), by fANOVA")
    axes.set_xlim(0, 108)
    _set_title(figure, title)
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    return figure


def parallel_coordinates(axes_: Sequence[ParallelAxis], outcome: Sequence[float], metric: str, title: str) -> Figure:
    """Plot one line per configuration through its parameter values, colored by ``outcome``; the best is on top."""
    figure = Figure(figsize=(max(WIDTH, 1.3 * len(axes_) + 1), HEIGHT), layout="constrained")
    axes = figure.subplots()
    color = ScalarMappable(Normalize(min(outcome), max(outcome)), lightness_colormap())
    order = np.argsort(outcome, kind="stable")
    for index in order if higher_is_better(metric) else order[::-1]:
        points = [(x, axis.positions[index]) for x, axis in enumerate(axes_)]
        shown = [(x, y) for x, y in points if y is not None]
        axes.plot(*zip(*shown, strict=True), color=color.to_rgba(outcome[index]), linewidth=1.2, alpha=0.85)
    for x, axis in enumerate(axes_):
        axes.axvline(x, color=INK, linewidth=0.8)
        for y, text in axis.ticks.items():
            axes.text(x + 0.03, y, short(text, 22), fontsize=7, va="center", parse_math=False,
                      bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.6})  # fmt: skip
    axes.set_xticks(range(len(axes_)), [short(axis.name, 24) for axis in axes_], parse_math=False)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.margins(x=0.08)
    figure.colorbar(color, ax=axes).set_label(metric_of(metric).axis_label)
    _set_title(figure, title)
    return figure


def incumbent_curve(
    searches: Mapping[str, Sequence[tuple[float, float]]], metric: str, title: str, *, cost: str = "epochs trained"
) -> Figure:
    """Plot the best value so far against the cost; ``searches`` holds a list of (cost, best value) per search."""
    figure, axes = _axes(cost, f"best {metric_of(metric).axis_label}", title, integers=False)
    scale = metric_of(metric).measure.scale
    for index, (name, points) in enumerate(searches.items()):
        spent, best = zip(*points, strict=True)
        axes.step(spent, np.asarray(best) * scale, DASHES[index // len(CYCLE) % len(DASHES)], where="post",
                  color=CYCLE[index % len(CYCLE)], linewidth=1.5, label=short(name, 40))  # fmt: skip
    if len(searches) > 1:
        axes.legend()
    return figure


def is_numeric(values: Sequence[Any]) -> bool:
    """Return whether all values are finite numbers and at least two differ."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return numbers and len(set(values)) > 1


def is_wide(values: Sequence[float]) -> bool:
    """Return whether the values suit a logarithmic scale: positive, and with a wide range."""
    return min(values) > 0 and max(values) > LOG_RATIO * min(values)


def _color_scale(values: Sequence[float], *, log: bool) -> ScalarMappable:
    norm = (LogNorm if log else Normalize)(min(values), max(values))
    return ScalarMappable(norm, lightness_colormap())


def _set_title(figure: Figure, title: str) -> None:
    """Set a wrapped title for the whole figure, since the axes may be too narrow for it."""
    figure.suptitle(textwrap.fill(title, TITLE_LINE), fontsize=10, parse_math=False)


def _axes(x: str, y: str, title: str, *, integers: bool = True) -> tuple[Figure, Axes]:
    return labeled_axes(x, y, textwrap.fill(title, TITLE_LINE), (WIDTH, HEIGHT), integers=integers)


def _plot_curve(axes: Axes, values: np.ndarray, dash: str, **style: Any) -> np.ndarray:
    """Plot values by epoch, a single one with a marker, as it is otherwise invisible; return the epochs."""
    epochs = np.arange(1, len(values) + 1)
    axes.plot(epochs, values, dash, marker="o" if len(values) == 1 else None, **style)
    return epochs


def _legend(figure: Figure, axes: Axes, count: int) -> None:
    """Place the legend inside the axes if it is small, else next to them."""
    legend = axes.legend() if count <= 4 else figure.legend(loc="outside right upper")
    for text in legend.get_texts():
        text.set_parse_math(False)
