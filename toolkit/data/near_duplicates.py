"""Detection of near-duplicates: the same photograph rescaled, recompressed or cropped.

No library is used: imagehash does not match a crop with its source image, and features of a network would require
pretrained weights. Each image is reduced to a gray thumbnail. Its whole area, as 6 x 6 means, is compared with many
windows of every other image by normalized cross-correlation. The best candidates are aligned and compared again at
16 x 16, where different photographs of the same subject differ.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SIDE = 64
"""Width and height of a thumbnail in pixels."""
SMALLEST = 32
"""Images with a side below this (pixels) have too little detail to be distinguished, and are skipped."""
MOST_CROPS, MOST = 20_000, 60_000
"""Maximum number of images for the search for crops, and for rescaled images; the time grows quadratically."""
COARSE, FINE = 6, 16
SHARES = (1.0, 0.85, 0.7, 0.58, 0.48, 0.4)
"""Widths and heights of the windows, as fractions of the image's width and height."""
STRIDE = 0.2
"""Distance of neighboring windows as a fraction of their length."""
ASPECT = 1.15
"""Maximum factor between the aspect ratios of a window and the image that it is compared with."""
LIKELY, PROMISING = 0.9, 0.7
"""Minimum correlation of a candidate window, and minimum correlation at 16 x 16 of a window that is then aligned."""
KEPT = 6
"""Number of candidates per image that are examined further."""
SAME, SAME_DETAIL, SAME_CROP, CROP = 0.9, 0.95, 0.8, 0.7
"""Minimum correlation of near-duplicates after alignment, and of their detail (after subtracting the mean of 3 x 3
cells): 0.95, or 0.8 for crops (windows below 0.7 of the area). Crops are aligned less accurately; whole images are more
often similar by chance."""
FLAT = 3.0
"""Images whose coarse means have a smaller standard deviation (gray levels, 0..255) are too uniform to compare."""


def thumbnail(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Resize the whole image to gray uint8 [64, 64], whatever its aspect ratio."""
    gray = image.convert("RGB").convert("L") if image.mode in ("P", "RGBA", "LA", "CMYK") else image.convert("L")
    return np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BOX))


def near_pairs(thumbnails: npt.NDArray[np.uint8], aspects: Floats) -> list[tuple[int, int]]:
    """Find pairs (i, j), i < j, of images that match, or of which one is a crop of at least 40 % of each side.

    ``thumbnails`` is uint8 [n, 64, 64]; ``aspects`` is width / height of the images, [n].
    """
    images = thumbnails.astype(np.float32)
    if len(thumbnails) == 0:
        return []
    found = _candidates(images, np.log(aspects), SHARES if len(images) <= MOST_CROPS else SHARES[:1])
    outer, inner, boxes = _promising(images, *found)
    if len(outer) == 0:
        return []
    boxes = _align(images, outer, inner, boxes)
    parts, wholes = _cells(images[outer], boxes), _wholes(images[inner])
    needed = np.where(boxes[:, 2] * boxes[:, 3] < CROP * SIDE * SIDE, SAME_CROP, SAME_DETAIL)
    is_same = (_correlation(parts, wholes) >= SAME) & (_correlation(_detail(parts), _detail(wholes)) >= needed)
    return sorted({(int(min(pair)), int(max(pair))) for pair in zip(outer[is_same], inner[is_same], strict=True)})


def groups(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Return the connected components of the pairs, each sorted."""
    of: dict[int, list[int]] = {}
    for one, other in pairs:
        first, second = of.setdefault(one, [one]), of.setdefault(other, [other])
        if first is not second:
            first += second
            of.update(dict.fromkeys(second, first))
    return sorted({id(group): sorted(group) for group in of.values()}.values())


def _candidates(images: Floats, log_aspects: Floats, shares: tuple[float, ...]) -> tuple[Ints, Ints, Floats]:
    """Return outer image, inner image and window (top, left, height, width in pixels) of each candidate pair."""
    order = np.argsort(log_aspects, kind="stable")
    ordered = log_aspects[order]
    starts = {f: np.linspace(0, 1 - f, 1 + int(np.ceil((1 - f) / (f * STRIDE)))) * SIDE for f in shares}
    pools = {f: _pool(starts[f], f * SIDE) for f in shares}
    means = np.stack([pools[1.0][0] @ image @ pools[1.0][0].T for image in images]).reshape(len(images), -1)
    is_flat = means.std(axis=1) < FLAT
    wanted = _normalized(means)
    wanted[is_flat] = 0
    wanted = wanted[order]
    found: list[tuple[Ints, Ints, Floats]] = []
    scores: list[Floats] = []
    for index in np.flatnonzero(~is_flat):
        for height in shares:
            rows = pools[height].reshape(-1, SIDE) @ images[index]
            for width in shares:
                aspect = log_aspects[index] + np.log(width / height)
                low, high = np.searchsorted(ordered, [aspect - np.log(ASPECT), aspect + np.log(ASPECT)])
                if width == height == 1:
                    low, high = 0, len(images)  # a rescaled image may have been squashed
                if high <= low:
                    continue
                parts = (rows @ pools[width].reshape(-1, SIDE).T).reshape(len(starts[height]), COARSE, -1, COARSE)
                parts = _normalized(parts.transpose(0, 2, 1, 3).reshape(-1, COARSE * COARSE))
                all_scores = wanted[low:high] @ parts.T
                best = all_scores.max(axis=1)
                hits = np.flatnonzero(best > LIKELY)
                hits = hits[order[low + hits] != index]
                if len(hits) == 0:
                    continue
                row, column = np.divmod(all_scores[hits].argmax(axis=1), len(starts[width]))
                ends = np.broadcast_to([height * SIDE, width * SIDE], (len(hits), 2))
                boxes = np.column_stack([starts[height][row], starts[width][column], ends]).astype(np.float32)
                found.append((np.full(len(hits), index), order[low + hits], boxes))
                scores.append(best[hits])
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4), np.float32)
    outer, inner, boxes = (np.concatenate(column) for column in zip(*found, strict=True))
    return _best_of_each(outer, inner, boxes, np.concatenate(scores))


def _best_of_each(outer: Ints, inner: Ints, boxes: Floats, scores: Floats) -> tuple[Ints, Ints, Floats]:
    """Keep the best window of each pair, for the KEPT best outer images of each inner one."""
    order = np.lexsort((-scores, outer, inner))
    order = order[np.r_[True, (np.diff(inner[order]) != 0) | (np.diff(outer[order]) != 0)]]
    order = order[np.lexsort((-scores[order], inner[order]))]
    firsts = np.flatnonzero(np.r_[True, np.diff(inner[order]) != 0])
    rank = np.arange(len(order)) - np.repeat(firsts, np.diff(np.r_[firsts, len(order)]))
    order = order[rank < KEPT]
    return outer[order], inner[order], boxes[order]


def _promising(images: Floats, outer: Ints, inner: Ints, boxes: Floats) -> tuple[Ints, Ints, Floats]:
    kept = _scores(images, outer, inner, boxes) >= PROMISING
    return outer[kept], inner[kept], boxes[kept]


def _align(images: Floats, outer: Ints, inner: Ints, boxes: Floats) -> Floats:
    """Move and resize the windows by coordinate ascent to maximize the correlation."""
    best = _scores(images, outer, inner, boxes)
    for step in (2.0, 1.0, 1.0, 0.5):
        for change in np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32) * step:
            moved = boxes + change
            moved[:, 2:] = np.clip(moved[:, 2:], SIDE / 4, SIDE)
            moved[:, :2] = np.clip(moved[:, :2], 0, SIDE - moved[:, 2:])
            scores = _scores(images, outer, inner, moved)
            better = scores > best
            boxes = np.where(better[:, None], moved, boxes)
            best = np.maximum(scores, best)
    return boxes


def _scores(images: Floats, outer: Ints, inner: Ints, boxes: Floats) -> Floats:
    """Return the correlation of windows with whole images at 16 x 16, [pairs], in blocks that bound the memory."""
    block = 4096
    parts = [slice(start, start + block) for start in range(0, len(outer), block)]
    return np.concatenate([np.zeros(0, np.float32)] + [
        _correlation(_cells(images[outer[p]], boxes[p]), _wholes(images[inner[p]])) for p in parts
    ])  # fmt: skip


def _wholes(images: Floats) -> Floats:
    return _cells(images, np.broadcast_to(np.array([0, 0, SIDE, SIDE], np.float32), (len(images), 4)))


def _cells(images: Floats, boxes: Floats) -> Floats:
    """Interpolate images [n, 64, 64] at the centers of the 16 x 16 cells of each image's window, [n, 16, 16]."""
    centers = (np.arange(FINE, dtype=np.float32) + 0.5) / FINE
    y = np.clip(boxes[:, :1] + boxes[:, 2:3] * centers - 0.5, 0, SIDE - 1)
    x = np.clip(boxes[:, 1:2] + boxes[:, 3:] * centers - 0.5, 0, SIDE - 1)
    top, left = np.minimum(y.astype(np.int64), SIDE - 2), np.minimum(x.astype(np.int64), SIDE - 2)
    down, right = (y - top)[:, :, None], (x - left)[:, None, :]
    n = np.arange(len(images))[:, None, None]
    rows, columns = top[:, :, None], left[:, None, :]
    above = images[n, rows, columns] * (1 - right) + images[n, rows, columns + 1] * right
    below = images[n, rows + 1, columns] * (1 - right) + images[n, rows + 1, columns + 1] * right
    cells: Floats = above * (1 - down) + below * down
    return cells


def _detail(cells: Floats) -> Floats:
    """Subtract the mean of 3 x 3 cells: [n, 16, 16] -> [n, 14, 14]."""
    windows = np.lib.stride_tricks.sliding_window_view(cells, (3, 3), axis=(1, 2))
    detail: Floats = cells[:, 1:-1, 1:-1] - windows.mean(axis=(3, 4))
    return detail


def _correlation(one: Floats, other: Floats) -> Floats:
    first, second = _normalized(one.reshape(len(one), -1)), _normalized(other.reshape(len(other), -1))
    found: Floats = (first * second).sum(axis=1)
    return found


def _normalized(rows: Floats) -> Floats:
    """Subtract each row's mean and scale the row to unit length."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    scaled: Floats = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-3)).astype(np.float32)
    return scaled


def _pool(starts: npt.NDArray[np.float64], length: float) -> Floats:
    """Return matrices [windows, 6, 64] that compute the means of 6 equal cells of each window of ``length`` pixels."""
    edges = starts[:, None] + length * np.arange(COARSE + 1) / COARSE
    pixel = np.arange(SIDE)
    overlap = np.minimum(edges[:, 1:, None], pixel + 1) - np.maximum(edges[:, :-1, None], pixel)
    matrices: Floats = (np.clip(overlap, 0, None) / (length / COARSE)).astype(np.float32)
    return matrices
