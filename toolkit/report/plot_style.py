"""Shared Matplotlib style of all figures: colors, fonts, and export formats for print and screen."""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.writing import write_atomically

BLACK, ORANGE, SKY, GREEN = "#000000", "#e69f00", "#56b4e9", "#009e73"
BLUE, VERMILION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"
"""Colors that remain distinguishable with color vision deficiencies (Okabe & Ito 2008)."""

CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
"""Line colors, the most visible ones on white first; without yellow, which is hardly visible."""

SPLIT_COLORS = {"train": BLUE, "validation": VERMILION, "test": GREEN}

INK, GRID = "#1a1a1a", "#d9d9d9"
"""Colors of text and axes, and of grid lines."""

FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans")
"""Fonts tried in this order for each character, if installed."""

PAGE_COLORS = {
    INK: "var(--ink)", BLACK: "var(--ink)", GRID: "var(--line)", "#ffffff": "var(--paper)", BLUE: "var(--blue)",
    GREEN: "var(--green)", ORANGE: "var(--orange)", VERMILION: "var(--vermilion)", PURPLE: "var(--purple)",
    SKY: "var(--sky)",
}  # fmt: skip
"""CSS variables that replace the colors on HTML pages, which may use a dark theme."""

NARROW = 290
"""Figures up to this width, in points, are shrunk to fit a phone; wider ones scroll, to remain legible."""

PRINT = ("svg", "pdf")
DPI = 150
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"


@contextlib.contextmanager
def plot_style(log: Callable[[str], None]) -> Iterator[None]:
    """Apply the style to figures drawn and saved in the context; on exit, log characters missing from all fonts."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    settings: Any = {
        "font.family": [name for name in FONTS if name in installed],
        "svg.fonttype": "path",
        "svg.hashsalt": "toolkit",  # equal figures give equal files
        "pdf.fonttype": 42,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
    with warnings.catch_warnings(record=True) as caught, matplotlib.rc_context(settings):
        warnings.simplefilter("always")
        yield
    glyphs = {int(found[1]) for item in caught if (found := re.match(r"Glyph (\d+)", str(item.message)))}
    if glyphs:
        shown = " ".join(chr(glyph) for glyph in sorted(glyphs)[:20])
        log(f"the figures lack these characters, which no installed font has: {shown} (Noto Sans CJK has most)")


def save(figure: Figure, folder: Path, name: str, kinds: tuple[str, ...] = PRINT) -> list[Path]:
    """Write a figure to ``folder`` in each format and return the paths. Raises UserError if it cannot be written."""
    paths = [folder / f"{name}.{kind}" for kind in kinds]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            write_atomically(path, _bytes(figure, path.suffix[1:]))
            figure.set_layout_engine("none")  # keep the layout of the first format
    except OSError as error:
        raise UserError(f"the figures cannot be written to {folder}: {error.strerror}") from None
    return paths


def page_svg(figure: Figure, label: str, *, is_light: bool = False) -> str:
    """Render the figure as an SVG element for an HTML page, with real text and the page's colors and font.

    ``label`` is the accessible description. With ``is_light``, the figure has a white background in both themes, as
    color scales require.
    """
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = _bytes(figure, "svg", transparent=True).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)
    width = figure.get_figwidth() * 72
    size = f"min-width:{1.22 * width if width > NARROW else 0:.0f}px;max-width:{1.6 * width:.0f}px"
    kind = "drawn light" if is_light else "drawn"
    text = text.replace("<svg ", f'<svg class="{kind}" style="{size}" role="img" aria-label="{html.escape(label)}" ', 1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids must be unique on a page
    text = re.sub(r"font-family: [^;\"]*; ", "", text)
    return text if is_light else re.sub(r"#[0-9a-f]{6}\b", lambda found: PAGE_COLORS.get(found[0], found[0]), text)


def _bytes(figure: Figure, kind: str, **settings: Any) -> bytes:
    data = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    figure.savefig(data, format=kind, dpi=DPI, metadata=metadata, **settings)
    return data.getvalue()


def labeled_axes(
    x: str, y: str, title: str, size: tuple[float, float], *, integers: bool = True
) -> tuple[Figure, Axes]:
    """Return a figure of ``size`` in inches and its labeled axes; ``integers``: x has ticks at integers only."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel(y)
    axes.set_title(title, parse_math=False)
    if integers:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    grid(axes)
    return figure, axes


def grid(axes: Axes, axis: str = "y") -> None:
    """Draw grid lines for one axis, behind the data."""
    axes.grid(axis=axis)  # type: ignore[arg-type]


def fitted(title: str, inches: float, size: float = 10.0) -> str:
    """Wrap a title to a figure ``inches`` wide; ``size`` is the font size in points."""
    return textwrap.fill(title, max(12, int(inches * 72 / (0.62 * size))))  # width is about 0.6 of the size


def short(name: str, length: int) -> str:
    """Truncate a name to ``length`` characters, with an ellipsis."""
    return name if len(name) <= length else name[: length - 1] + ELLIPSIS


def columns_for(count: int, aspect: float) -> int:
    """Return the number of columns for a sheet of ``count`` cells, each ``aspect`` times as wide as high.

    The sheet is somewhat wider than high; among similar numbers of columns, the one with the fullest last row is
    chosen.
    """
    wanted = max(1, min(count, round(math.sqrt(count / aspect * 1.3))))
    return min(range(wanted, min(count, wanted + 2) + 1), key=lambda columns: -count % columns)
