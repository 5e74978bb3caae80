"""Mean and standard deviation over seeds, and significance tests of the difference between two rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, betaincinv, nctdtr, stdtr, stdtrit

MAX_EXACT_PAIRS = 16
"""Maximum number n of pairs for which all 2^n sign assignments are enumerated."""


@dataclass(frozen=True)
class MeanWithInterval:
    """A metric over the seeds of a row."""

    mean: float
    n: int
    """Number of runs."""
    std: float | None
    """Standard deviation of one run (n - 1 in the denominator); None for one run."""
    half_width: float | None
    """Half-width of the confidence interval of the mean, by Student's t; None for one run."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the mean."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


def estimate(values: Sequence[float], confidence: float) -> MeanWithInterval:
    """Return the mean, standard deviation and confidence interval of at least one value."""
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return MeanWithInterval(mean, 1, None, None)
    std = statistics.stdev(values)
    return MeanWithInterval(mean, n, std, t_quantile(confidence, n - 1) * std / math.sqrt(n))


def t_quantile(confidence: float, freedom: float) -> float:
    """Return t such that P(|T| <= t) = ``confidence`` for ``freedom`` degrees of freedom."""
    return float(stdtrit(freedom, (1 + confidence) / 2))


@dataclass(frozen=True)
class Welch:
    """Difference of the means (first minus second) of two independent samples with unequal variances (Welch 1947)."""

    difference: float
    error: float
    """Standard error of the difference."""
    freedom: float
    """Degrees of freedom (Welch and Satterthwaite)."""
    p: float
    """Two-sided p-value."""

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the confidence interval of the difference."""
        half_width = t_quantile(confidence, self.freedom) * self.error
        return self.difference - half_width, self.difference + half_width


def welch(first: MeanWithInterval, second: MeanWithInterval) -> Welch | None:
    """Perform Welch's t-test of two means; return None if either sample has a single value, or if neither varies."""
    if first.std is None or second.std is None:
        return None
    a, b = first.std**2 / first.n, second.std**2 / second.n
    if a + b == 0:
        return None
    error = math.sqrt(a + b)
    freedom = (a + b) ** 2 / (a**2 / (first.n - 1) + b**2 / (second.n - 1))
    difference = first.mean - second.mean
    return Welch(difference, error, freedom, float(2 * stdtr(freedom, -abs(difference) / error)))


@dataclass(frozen=True)
class PairedComparison:
    """Paired difference of two rows (first minus second) over their common seeds."""

    difference: MeanWithInterval
    t_test: float | None
    """Two-sided p-value of the paired t-test; None for one pair, or if all differences are equal."""
    exact: float | None
    """Two-sided p-value of the exact permutation test of the mean difference (each pair's sign may flip); None for one
    pair or more than :data:`MAX_EXACT_PAIRS`."""

    @property
    def least_exact(self) -> float:
        """The smallest p-value possible with this number of pairs, when all differences have the same sign."""
        return float(min(1.0, 2.0 ** (1 - self.difference.n)))


def compare(first: Sequence[float], second: Sequence[float], confidence: float) -> PairedComparison:
    """Compare two rows pair by pair; the i-th values of both belong to the same seed."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    difference = estimate(differences, confidence)
    return PairedComparison(difference, _t_test(difference), _exact(differences))


def _t_test(difference: MeanWithInterval) -> float | None:
    if not difference.std:
        return None
    t = difference.mean / (difference.std / math.sqrt(difference.n))
    return float(2 * stdtr(difference.n - 1, -abs(t)))


def _exact(differences: Sequence[float]) -> float | None:
    """Return the share of sign assignments whose sum is at least as far from 0 as the observed one (Fisher 1935)."""
    n = len(differences)
    if not 2 <= n <= MAX_EXACT_PAIRS:
        return None
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    rounding = 1e-9 * sum(abs(value) for value in differences)
    return float(np.mean(np.abs(sums) >= abs(math.fsum(differences)) - rounding))


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of two models on the same test images: accuracy of the first minus that of the second."""

    first_only: int
    """Images that only the first model classifies correctly."""
    second_only: int
    images: int

    @property
    def difference(self) -> float:
        """Difference of the two accuracies."""
        return (self.first_only - self.second_only) / self.images

    @property
    def p(self) -> float:
        """Two-sided p-value of the exact test (McNemar 1947), binomial over the discordant images."""
        n = self.first_only + self.second_only
        return min(1.0, 2 * float(bdtr(min(self.first_only, self.second_only), n, 0.5)))

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the Clopper-Pearson (1934) interval of the difference, given the number of discordant images.

        It excludes 0 exactly if p is below 1 - confidence. Without discordant images it is [0, 0].
        """
        k, n, tail = self.first_only, self.first_only + self.second_only, (1 - confidence) / 2
        low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
        high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
        return (2 * low - 1) * n / self.images, (2 * high - 1) * n / self.images


POWER = 0.8
"""Power required by :func:`pairs_needed`."""

MAX_PAIRS = 1000
"""Largest number of seeds returned by :func:`pairs_needed`."""


def pairs_needed(effect: float, std: float, confidence: float, *, samples: int = 1) -> int | None:
    """Return the number of seeds for a two-sided t-test to detect ``effect`` with power :data:`POWER`.

    ``std`` is the standard deviation of a paired difference; for two independent samples (``samples = 2``), the square
    root of the sum of their variances. None if more than :data:`MAX_PAIRS` are needed.
    """
    if effect == 0:
        return None
    for n in range(2, MAX_PAIRS + 1):
        freedom = samples * (n - 1)
        shift = abs(effect) * math.sqrt(n) / std if std else math.inf
        if math.isinf(shift) or 1 - float(nctdtr(freedom, shift, t_quantile(confidence, freedom))) >= POWER:
            return n
    return None
