"""Agreement between a study's measured and published metrics: rank correlation and differences per column."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.metrics import MEASURES, SPLITS, metric_of
from toolkit.study.results import ResultRow
from toolkit.study.text_table import MISSING, TextTable, number


@dataclass(frozen=True)
class Agreement:
    """Agreement in one column, over the rows that can be compared with published metrics."""

    metric: str
    rows: int
    rank_correlation: float | None
    """Spearman's rank correlation; None for fewer than three rows or if all values are equal."""
    mean_difference: float
    """Mean absolute difference between the measured and the published values."""
    within: float | None
    """Fraction of the rows whose difference is at most twice the noise of one run; None if the noise is unknown."""
    noise: str
    """Sources of the estimates of the noise, comma-separated: ``seeds``, ``published seeds``, ``test images``."""


def agreements(rows: Sequence[ResultRow], columns: Sequence[str]) -> list[Agreement]:
    """Return the agreement of each accuracy or loss column for which at least two rows have published metrics."""
    found = []
    for column in columns:
        compared = [r for r in rows if not r.not_comparable and column in r.published and column in r.metrics]
        if len(compared) > 1 and metric_of(column).model:
            found.append(_agreement(column, compared))
    return found


def _agreement(column: str, rows: Sequence[ResultRow]) -> Agreement:
    measured, published = [row.metrics[column].mean for row in rows], [row.published[column] for row in rows]
    differences = [abs(a - b) for a, b in zip(measured, published, strict=True)]
    noises = [_noise(row, column) for row in rows]
    known = [(d, *noise) for d, noise in zip(differences, noises, strict=True) if noise is not None]
    return Agreement(
        column,
        len(rows),
        _spearman(measured, published),
        sum(differences) / len(differences),
        sum(d <= 2 * noise for d, noise, _ in known) / len(known) if len(known) == len(rows) else None,
        ", ".join(dict.fromkeys(name for *_, name in known)),
    )


def _noise(row: ResultRow, column: str) -> tuple[float, str] | None:
    """Return an estimate of the standard deviation between runs, and its source; None if unknown.

    An estimate from the number of images alone is a lower bound, since it ignores the variation between seeds.
    """
    measured, published = row.metrics[column], row.published_spread.get(column)
    if measured.std is not None:
        return measured.std, "seeds"
    if published is not None and published.std is not None:
        return published.std, "published seeds"
    split = SPLITS[metric_of(column).split][0]
    images = next((r.images[split] for r in row.finished if r.images.get(split)), 0)
    if metric_of(column).measure != MEASURES["accuracy"] or split == "training" or not images:
        return None
    return math.sqrt(measured.mean * (1 - measured.mean) / images), f"{split} images"


def _spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    if len(one) < 3:
        return None
    from scipy.stats import spearmanr  # slow to load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for constant input, which gives nan
        found = float(spearmanr(one, other).statistic)
    return None if math.isnan(found) else found


def build_agreement_table(found: Sequence[Agreement]) -> TextTable:
    """Build the text table of agreements."""
    head = ["column", "rows", "rank correlation", "mean abs. diff.", "within noise", "noise from"]
    rows = [
        [
            metric_of(one.metric).heading,
            str(one.rows),
            number("val_loss", one.rank_correlation, signed=True),
            number(one.metric, one.mean_difference, mean=True),
            MISSING if one.within is None else f"{100 * one.within:.0f} %",
            one.noise or MISSING,
        ]
        for one in found
    ]
    notes = [
        "Rank correlation: Spearman's, between measured and published metrics, over the rows that can be compared.",
        "Within noise: fraction of rows that differ by at most two standard deviations of one run: over its seeds if "
        "it has several, else as published, else binomial over the images, which ignores the variation between seeds.",
    ]
    return TextTable("Agreement with the published metrics", head, rows, notes=notes, left=frozenset({0, 5}))
