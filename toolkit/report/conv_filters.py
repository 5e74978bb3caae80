"""Plots of the first convolution's filters before and after training, and of their responses to an image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from toolkit.errors import UserError
from toolkit.report.plot_style import columns_for, short
from toolkit.report.run_data import ConvFilters, FilterEffect

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

MAX_SHOWN = 256
"""Maximum number of filters drawn."""
DEFAULT_COUNT = 8
"""Default number of filters applied to an image."""
TILE, GAP, NUMBER = 48, 6, 16
"""Side length of a drawn filter, space between filters, and height of the number above each filter, in pixels."""
CELL = (TILE + GAP + NUMBER, TILE + GAP)
"""Height and width of a filter's cell, in pixels."""
MAX_SIDE = 128
"""Maximum side of a drawn response in pixels; larger responses are subsampled, as by a strided convolution."""
TITLE_CHARACTERS = 12
"""Number of characters of a 9-point title that fit in one inch."""
HEADER = 0.6
"""Height reserved for the titles, in inches."""


def filters_figure(title: str, filters: ConvFilters) -> Figure:
    """Draw all filters before (left) and after training (right), numbered from 1.

    Each filter is scaled to its own full range so that its pattern is visible; gray is 0. Three input channels are
    drawn as red, green and blue; for any other number of channels the mean is drawn in gray.
    """
    count = min(len(filters.after), MAX_SHOWN)
    columns = columns_for(count, CELL[1] / CELL[0])
    sheets = [_sheet(weights[:count], columns) for weights in (filters.before, filters.after)]
    side, gap = 4.4, 0.3
    width, height = 2 * side + gap, side * sheets[0].shape[0] / sheets[0].shape[1] + HEADER
    figure = Figure(figsize=(width, height))
    for number, (sheet, when) in enumerate(zip(sheets, ("before training", "after training"), strict=True)):
        position = (number * (side + gap) / width, 0, side / width, 1 - HEADER / height)
        axes = figure.add_axes(position)
        axes.imshow(sheet, interpolation="none")
        axes.set_axis_off()
        axes.set_title(when, fontsize=8, pad=3)
        for index in range(count):
            top, left = _cell_corner(index, columns)
            axes.text(left, top + NUMBER - 4, str(index + 1), fontsize=min(7.0, 70 / columns))
    some = f", first {count} of {len(filters.after)}" if count < len(filters.after) else ""
    change = 100 * float(relative_change(filters).mean())
    what = f"filters of {filters.layer.removesuffix('.weight')}{some}; mean change {change:.2g} %"
    figure.text(
        0.5, 1 - 0.15 / height, f"{short(title, 60)}: {what}", ha="center", va="center", fontsize=9, parse_math=False
    )
    return figure


def _sheet(weights: Floats, columns: int) -> Pixels:
    """Draw all filters in a grid; return an RGBA image with a transparent background."""
    rows = -(-len(weights) // columns)
    sheet = np.zeros((rows * CELL[0], columns * CELL[1], 4), dtype=np.uint8)
    for index, one in enumerate(weights):
        top, left = _cell_corner(index, columns)
        tile = sheet[top + NUMBER : top + NUMBER + TILE, left : left + TILE]
        tile[..., :3], tile[..., 3] = filter_image(one, TILE), 255
    return sheet


def _cell_corner(index: int, columns: int) -> tuple[int, int]:
    """Return the top and left coordinates of a filter's cell, in pixels."""
    return index // columns * CELL[0], index % columns * CELL[1] + GAP // 2


def filter_image(weights: Floats, side: int) -> Pixels:
    """Draw a filter [C, h, w] as an image [side, side, 3]: 0 is gray, the largest absolute weight is black or white."""
    channels = weights if len(weights) == 3 else weights.mean(0, keepdims=True)
    scaled = 0.5 + 0.5 * channels / max(float(np.abs(channels).max()), 1e-12)
    pixels = np.rint(255 * scaled).astype(np.uint8).transpose(1, 2, 0)
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST))


def relative_change(filters: ConvFilters) -> Floats:
    """Return the norm of each filter's change by training, relative to its initial norm, [filters]."""
    axes = (1, 2, 3)
    moved = np.sqrt(((filters.after - filters.before) ** 2).sum(axes))
    lengths = np.sqrt((filters.before**2).sum(axes))
    change: Floats = moved / np.maximum(lengths, 1e-12)
    return change


def choose(filters: ConvFilters, wanted: Sequence[int] = ()) -> tuple[list[int], str]:
    """Return the indices of the filters to show, and a description of the selection.

    By default, these are the filters that training has changed most, or those with the largest norm if none changed.
    ``wanted`` holds numbers from 1; the indices start at 0. Raises UserError for a number out of range.
    """
    count = len(filters.after)
    wrong = [number for number in wanted if not 1 <= number <= count]
    if wrong:
        raise UserError(f"--filters {wrong[0]}: {filters.layer} has {count} filters, numbered from 1 to {count}")
    if wanted:
        return [number - 1 for number in wanted], "the requested filters"
    change = relative_change(filters)
    is_changed = bool(change.max() > 0)
    rank = change if is_changed else (filters.after**2).sum((1, 2, 3))
    which = "the filters that training has changed most" if is_changed else "the strongest filters (none has changed)"
    return [int(i) for i in np.argsort(-rank, kind="stable")[:DEFAULT_COUNT]], which


def channel_products(weights: Floats, image: Floats) -> Floats:
    """Filter each channel of an image [C, H, W] with the same channel of a filter [C, h, w]; stride 1, no padding.

    Returns float32 [C, H - h + 1, W - w + 1]; the sum over the channels is the filter's response.
    """
    windows = np.lib.stride_tricks.sliding_window_view(image, weights.shape[1:], axis=(1, 2))
    out: Floats = np.einsum("cyxij,cij->cyx", windows, weights, optimize=True)
    return out


def tinted(products: Floats) -> Floats:
    """Convert the filtered red, green and blue channels [3, H, W] to an image [H, W, 3] in 0..1; 0 becomes gray."""
    limit = max(float(np.abs(products).max()), 1e-12)
    image: Floats = (0.5 + 0.5 * products / limit).transpose(1, 2, 0)
    return image


def effect_figure(title: str, filters: ConvFilters, effect: FilterEffect) -> Figure:
    """Draw an image, and each chosen filter with its responses to the image before and after training.

    The color scale of a response is symmetric around 0 (white), up to its largest absolute value. For three channels,
    the per-channel products are also shown as an image, whose tint reveals filters that pass one color more than the
    others; the response, their sum, does not show that.
    """
    chosen, image = effect.filters, effect.input
    labels = ["response\nbefore\ntraining", "response\nafter\ntraining"]
    if len(image) == 3:
        labels += ["red, green,\nblue products\nbefore", "red, green,\nblue products\nafter"]
    columns, rows = len(chosen) + 2, len(labels) + 1
    width = 1.2 * columns
    figure = Figure(figsize=(width, 1.1 * rows + 0.8), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False, height_ratios=[0.7, *(1 for _ in labels)])
    for cell in cells.flat:
        cell.set_axis_off()
    for row, label in enumerate(["filter after\ntraining", *labels]):
        cells[row, 0].text(0.5, 0.5, label, ha="center", va="center", fontsize=8, transform=cells[row, 0].transAxes)
    is_small = max(effect.image.size) <= MAX_SIDE
    enlarged = effect.image.convert("RGB").resize((160, 160), Image.Resampling.NEAREST if is_small else None)
    cells[1, 1].imshow(enlarged, interpolation="none")
    cells[1, 1].set_title("image", fontsize=8)
    for column, index in enumerate(chosen, 2):
        cells[0, column].imshow(filter_image(filters.after[index], TILE), interpolation="none")
        cells[0, column].set_title(f"filter {index + 1}", fontsize=8)
        for row, weights in ((1, filters.before), (2, filters.after)):
            products = channel_products(weights[index], image)
            step = -(-max(products.shape[1:]) // MAX_SIDE)
            products = products[:, ::step, ::step]
            found = products.sum(0)
            limit = max(float(np.abs(found).max()), 1e-12)
            cells[row, column].imshow(found, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="none")
            if len(image) == 3:
                cells[row + 2, column].imshow(tinted(products), interpolation="none")
    scale = "responses: orange -, white 0, purple +" + ("; products: gray 0" if len(image) == 3 else "")
    what = f"{title}: filters of the first layer on an image ({scale})"
    figure.suptitle(textwrap.fill(what, int(width * TITLE_CHARACTERS)), fontsize=9, parse_math=False)
    return figure
