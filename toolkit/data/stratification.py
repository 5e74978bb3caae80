"""Dividing examples into parts of given sizes that all have, as nearly as possible, the same fraction of every label.

Results depend only on the arguments; randomness is keyed by ``key``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.data.sampling import IntArray, keyed_permutation

Labels = npt.NDArray[Any]
"""One label per example, int64 [n]; or uint8 [n, labels], 1 for each label of an example, else 0."""


def label_pairs(labels: Labels) -> tuple[IntArray, IntArray]:
    """Return all pairs of an example and one of its labels as two arrays of indices, int64 [pairs], in order."""
    if labels.ndim == 1:
        return np.arange(len(labels)), labels
    examples, columns = np.nonzero(labels)
    return examples, columns


def stratified_folds(labels: IntArray, folds: int, *key: int) -> IntArray:
    """Return the fold of each example, int64 [n].

    The sizes of the folds, and their numbers of examples of any class, differ by at most 1.
    """
    order = keyed_permutation(len(labels), *key)
    parts = np.empty(len(labels), dtype=np.int64)
    parts[order[np.argsort(labels[order], kind="stable")]] = np.arange(len(labels)) % folds
    return parts


def iterative_stratification(labels: npt.NDArray[np.uint8], shares: Sequence[float], *key: int) -> IntArray:
    """Return the part of each example of a multi-label data set, int64 [n] (Sechidis et al. 2011, algorithm 1).

    ``shares``: fraction of the examples for each part, with sum 1; the sizes may differ from it by a few examples.
    Labels are handled one at a time, next the one with the fewest remaining examples. Each of its examples goes to the
    part that still needs the most examples of this label, or, among equals, the most examples of any kind.
    """
    fractions = np.array(shares)
    totals = labels.sum(0, dtype=np.int64)
    lacking = fractions[:, None] * totals
    lacking_examples = fractions * len(labels)
    order = keyed_permutation(len(labels), *key)
    members = [order[labels[order, label] > 0] for label in range(labels.shape[1])]
    parts, remaining = np.full(len(labels), -1, dtype=np.int64), totals.copy()
    while remaining.any():
        label = int(np.argmin(np.where(remaining > 0, remaining, len(labels) + 1)))
        for i in members[label][parts[members[label]] < 0]:
            wanted = np.flatnonzero(lacking[:, label] == lacking[:, label].max())
            part = wanted[np.argmax(lacking_examples[wanted])]
            own = np.flatnonzero(labels[i])
            parts[i] = part
            lacking[part, own] -= 1
            lacking_examples[part] -= 1
            remaining[own] -= 1
    for i in order[parts[order] < 0]:
        parts[i] = np.argmax(lacking_examples)
        lacking_examples[parts[i]] -= 1
    return parts


def group_parts(groups: IntArray, labels: Labels | None, shares: Sequence[float], *key: int) -> IntArray:
    """Return the part of each example, int64 [n], so that all examples of a group are in the same part.

    ``groups``: group of each example, int64 [n]. ``shares``: fraction of the examples for each part, with sum 1. Groups
    are assigned from the largest to the smallest, each to the part where it adds least to the sum over parts and labels
    of (examples - expected)^2 / expected, divided by the label's total number of examples. All examples together count
    as one more label; without ``labels`` it is the only one.
    """
    _, of_group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(of_group)
    examples, columns = label_pairs(labels) if labels is not None else (np.array([], np.int64), np.array([], np.int64))
    everything = int(columns.max()) + 1 if len(columns) else 0
    width = everything + 1  # encodes (group, label) as one integer, which sorts faster
    pairs, counts = np.unique(of_group[examples] * width + columns, return_counts=True)
    pairs = np.append(pairs, np.arange(len(sizes)) * width + everything)
    counts = np.append(counts, sizes)
    order = np.argsort(pairs, kind="stable")
    of_pair, label_of_pair, counts = pairs[order] // width, pairs[order] % width, counts[order]
    starts = np.searchsorted(of_pair, np.arange(len(sizes) + 1))
    totals = np.bincount(label_of_pair, weights=counts, minlength=width)
    fractions = np.array(shares)[:, None]
    found = np.zeros((len(shares), width))
    placed = np.zeros(len(sizes), dtype=np.int64)
    order = keyed_permutation(len(sizes), *key)
    # Groups of similar size are in random order, so that different keys give different parts.
    for group in order[np.argsort(-np.frexp(sizes[order])[1], kind="stable")]:
        own = slice(starts[group], starts[group + 1])
        label, count = label_of_pair[own], counts[own]
        excess = found[:, label] - fractions * totals[label]
        changes = (2 * excess + count) * count / totals[label] ** 2 / fractions
        # An exact sum, because the last bit of NumPy's sum may differ between processors and would break ties there.
        part = int(np.argmin([math.fsum(row) for row in changes.tolist()]))
        placed[group] = part
        found[part, label] += count
    return placed[of_group]
