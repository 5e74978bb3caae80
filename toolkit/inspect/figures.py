"""Figures of a data set: the class histogram, and a contact sheet of one image a class, raw and normalised."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from toolkit.data.images import MODES, to_mode
from toolkit.data.transforms import build_transform
from toolkit.errors import UserError
from toolkit.inspect.data import Report
from toolkit.recipe.schema import AugmentTable

COLOURS = {"train": "#0072b2", "validation": "#56b4e9", "test": "#d55e00"}
"""Told apart by people with any colour vision (Okabe & Ito 2008)."""

FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans")
"""Tried in this order for each character, as far as they are installed."""

LABELLED = 250
"""More classes are drawn without their names."""

TILE, GAP = 96, 8
"""Width and height of an image on the contact sheet, and the room around it; pixels."""
CAPTION = 22
"""Height of a class's name above its images, pixels."""
DPI = 150


def draw(report: Report, folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Write all figures into ``folder`` and return their paths. Raises UserError where that cannot be done."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    settings: Any = {"font.family": [name for name in FONTS if name in installed], "svg.fonttype": "path"}
    with warnings.catch_warnings(record=True) as caught, matplotlib.rc_context(settings):
        warnings.simplefilter("always")
        files = _draw(report, folder)
    glyphs = {int(found[1]) for item in caught if (found := re.match(r"Glyph (\d+)", str(item.message)))}
    if glyphs:
        shown = " ".join(chr(glyph) for glyph in sorted(glyphs)[:20])
        say(f"the figures lack these characters, which no installed font has: {shown} (Noto Sans CJK has most)")
    return files


def _draw(report: Report, folder: Path) -> list[Path]:
    bars, sheet = histogram(report), contact_sheet(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [_save(bars, folder / f"class-histogram.{kind}") for kind in ("png", "svg")]
        return [*written, _save(sheet, folder / "contact-sheet.png")]
    except OSError as error:
        raise UserError(f"the figures cannot be written to {folder}: {error.strerror}") from None


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def histogram(report: Report) -> Figure:
    """Images per class: training and validation, stacked, above; test below."""
    names = report.classes
    count, positions = len(names), np.arange(len(names))
    width = min(max(7.0, 1.2 + 0.17 * count), 40.0)
    longest = max(len(name) for name in names) if count <= LABELLED else 0
    upright = count > 12 or count * longest > 90
    labels_height = (0.075 * min(longest, 40) if upright else 0.3) + 0.2
    figure = Figure(figsize=(width, 4.6 + labels_height), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    train, validation, test = (report.counts[split] for split in ("train", "validation", "test"))
    _bars(upper, positions, train, "train")
    _bars(upper, positions, validation, "validation", train)
    _bars(lower, positions, test, "test")
    for axes in (upper, lower):
        axes.set_ylabel("images")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper right", frameon=False, ncols=2)
        axes.margins(x=0.6 / max(count, 1), y=0.18)
    if count <= LABELLED:
        small = {"fontsize": 7 if count > 40 else 9}
        shown = [name if len(name) <= 40 else name[:39] + "\N{HORIZONTAL ELLIPSIS}" for name in names]
        lower.set_xticks(positions, shown, rotation=90 if upright else 0, parse_math=False, **small)
    else:
        lower.set_xlabel(f"{count} classes, in the order of the data set")
    upper.set_title(f"{report.recipe.recipe.name}: images per class of {report.dataset.name}", parse_math=False)
    return figure


def _bars(axes: Any, positions: Any, heights: Any, split: str, bottom: Any = None) -> None:
    total = int(heights.sum())
    axes.bar(positions, heights, 0.8, bottom=bottom, color=COLOURS[split], label=f"{split} ({total:,})")


def contact_sheet(report: Report) -> Figure:
    """For each class its first training image, raw (left) and as the model gets it (right)."""
    labels = sorted(report.examples)
    normalised = _normalised(report, [report.examples[label] for label in labels])
    cell = (2 * TILE + 3 * GAP, TILE + CAPTION + GAP)
    columns = _columns(len(labels), cell[0] / cell[1])
    rows = -(-len(labels) // columns)
    sheet = np.full((rows * cell[1] + GAP, columns * cell[0], 3), 255, dtype=np.uint8)
    header = 0.75
    inches = (max(sheet.shape[1] / DPI, 4.5), sheet.shape[0] / DPI + header)
    figure = Figure(figsize=inches)
    across = sheet.shape[1] / DPI / inches[0]
    axes = figure.add_axes(((1 - across) / 2, 0, across, 1 - header / inches[1]))
    for number, (label, picture) in enumerate(zip(labels, normalised[0], strict=True)):
        top, left = number // columns * cell[1], number % columns * cell[0] + GAP
        axes.text(left, top + CAPTION - 5, _short(report.classes[label]), fontsize=6.5, parse_math=False)
        raw = report.dataset.images.load(report.examples[label])
        for offset, tile in ((0, raw.convert("RGB")), (TILE + GAP // 2, picture)):
            _paste(sheet, tile, top + CAPTION, left + offset)
    axes.imshow(sheet, interpolation="none")
    axes.set_axis_off()
    low, high = normalised[1]
    figure.text(0.5, 1 - 0.28 / inches[1], f"{report.recipe.recipe.name}: one image a class", ha="center",
                va="center", fontsize=9, parse_math=False)  # fmt: skip
    figure.text(0.5, 1 - 0.52 / inches[1], f"left raw, right normalised ({low:.2f} black, {high:.2f} white)",
                ha="center", va="center", fontsize=7)  # fmt: skip
    return figure


def _normalised(report: Report, indices: Sequence[int]) -> tuple[list[Image.Image], tuple[float, float]]:
    """The model's input for each image, as a picture; one scale for all, which is returned too."""
    transform = build_transform("test", AugmentTable(), report.preprocessing)
    mode = MODES[report.preprocessing.channels]
    inputs = [transform(to_mode(report.dataset.images.load(i), mode)).numpy() for i in indices]
    low, high = min(float(x.min()) for x in inputs), max(float(x.max()) for x in inputs)
    scale = 255 / max(high - low, 1e-9)
    pictures = [np.rint((x - low) * scale).astype(np.uint8).transpose(1, 2, 0) for x in inputs]
    return [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p).convert("RGB") for p in pictures], (low, high)


def _paste(sheet: npt.NDArray[np.uint8], image: Image.Image, top: int, left: int) -> None:
    """Put an image in the middle of a tile, as large as fits; small ones are enlarged pixel by pixel."""
    factor = TILE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    shown = np.asarray(image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS))
    y, x = top + (TILE - size[1]) // 2, left + (TILE - size[0]) // 2
    sheet[y : y + size[1], x : x + size[0]] = shown


def _columns(count: int, aspect: float) -> int:
    """Columns of a sheet that is somewhat wider than high; of such numbers, one that fills the last row."""
    wanted = max(1, min(count, round(math.sqrt(count / aspect * 1.3))))
    return min(range(wanted, min(count, wanted + 2) + 1), key=lambda columns: -count % columns)


def _short(name: str) -> str:
    """A class's name that fits above two tiles."""
    return name if len(name) <= 30 else name[:29] + "\N{HORIZONTAL ELLIPSIS}"
