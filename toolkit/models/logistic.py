"""Multinomial logistic regression on features, fitted for several strengths of regularization.

The objective is that of scikit-learn's LogisticRegression: the sum of the cross-entropies plus ||W||^2 / (2 C); the
intercept is not penalized.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

HISTORY = 20
"""Number of earlier steps from which L-BFGS approximates the curvature."""
TOLERANCE = 1e-4
"""Largest component of the gradient of the mean loss at which a fit ends, on features of mean 0 and overall standard
deviation 1; scikit-learn's default, whose gradient is on unscaled features."""
MAX_ITERATIONS = 1000

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Steps of L-BFGS, and the changes of the gradient along them, from old to new."""


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    strengths: Sequence[float],
    *,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor, list[bool]]:
    """Fit one logistic regression for each value of C by L-BFGS (Liu & Nocedal 1989).

    ``features``: [N, D]; ``labels``: int64 [N] below ``classes``; ``strengths``: values of C, the inverse of the
    regularization strength; ``start``: weights [classes, D] and intercepts [classes] to begin with, else 0. Returns
    weights [G, classes, D], intercepts [G, classes] of the type of ``features``, and whether each fit reached
    ``tolerance`` within MAX_ITERATIONS.

    The features are shifted to mean 0, divided by one number and rotated to their principal axes, which changes neither
    the optimum (the intercept is free, and the penalty is scaled too) nor the penalty; the result is converted back.
    The fits follow one another from the strongest regularization to the weakest, each from the one before.
    """
    mean = features.mean(0)
    x = features - mean
    scale = x.pow(2).mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    variances, axes = torch.linalg.eigh(x.T @ x / (len(x) * scale**2))
    x = F.pad(x @ (axes / scale), (0, 1), value=1.0)  # the last column is for the intercept
    variances = F.pad(variances.clamp_min(0), (0, 1), value=1.0)

    point, before = x.new_zeros(classes, x.shape[1]), 0.0
    pairs: list[tuple[Tensor, Tensor]] = []
    if start is not None:
        weight, intercept = (one.to(x) for one in start)
        point = torch.cat([scale * weight @ axes, (intercept + weight @ mean)[:, None]], 1)
    points: dict[float, Tensor] = {}
    converged: dict[float, bool] = {}
    for strength in sorted(set(strengths)):
        penalty = 1 / (strength * float(scale) ** 2 * len(x))
        # Only the penalty changes, so the steps of the last fit also tell this one about the curvature.
        pairs = [(s, y + (penalty - before) * _penalized(s)) for s, y in pairs]
        point, pairs, converged[strength] = _minimize(point, pairs, x, labels, penalty, variances, axes, tolerance)
        points[strength], before = point, penalty
    found = torch.stack([points[strength] for strength in strengths])
    weights = found[..., :-1] @ (axes.T / scale)
    return weights, found[..., -1] - weights @ mean, [converged[strength] for strength in strengths]


def _minimize(
    point: Tensor,
    pairs: Pairs,
    x: Tensor,
    labels: Tensor,
    penalty: float,
    variances: Tensor,
    axes: Tensor,
    tolerance: float,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], bool]:
    """Return the minimizer, [classes, D + 1], the last steps, and whether the fit converged.

    ``x``: features along their principal ``axes``, [D, D], and a column of ones; ``variances``: mean square of each
    column, [D + 1]. The steps are shortened until they fulfill Armijo's condition.
    """
    recent = deque(pairs, maxlen=HISTORY)
    penalties = torch.full_like(variances, penalty)
    penalties[-1] = 0
    value, gradient, curvature = _objective(point, x, labels, penalty)
    for _ in range(MAX_ITERATIONS):
        if _is_small(gradient, axes, tolerance):
            return point, list(recent), True
        # The Hessian's diagonal, if the probabilities were the same for all examples: scales the columns of x.
        diagonal = (curvature * variances + penalties).clamp_min(1e-6)
        direction = _direction(gradient, recent, diagonal)
        slope, length = _dot(direction, gradient), 1.0
        for _ in range(30):
            new_point = point + length * direction
            new_value, new_gradient, curvature = _objective(new_point, x, labels, penalty)
            if new_value <= value + 1e-4 * length * slope + 4 * torch.finfo(x.dtype).eps:
                break
            length /= 2
        recent.append((new_point - point, new_gradient - gradient))
        point, value, gradient = new_point, new_value, new_gradient
    return point, list(recent), False


def _objective(point: Tensor, x: Tensor, labels: Tensor, penalty: float) -> tuple[float, Tensor, float]:
    """Return the objective divided by the number of examples, its gradient [classes, D + 1], and the mean of p (1 - p).

    The mean of p (1 - p) is over the probabilities p of all classes and examples.
    """
    log_probabilities = (x @ point.T).log_softmax(1)
    at = labels[:, None]
    loss = -log_probabilities.gather(1, at).mean()
    errors = log_probabilities.exp_()
    curvature = float((1 - errors.pow(2).sum(1)).mean()) / len(point)
    errors.scatter_add_(1, at, errors.new_full(at.shape, -1.0))
    penalized = penalty * _penalized(point)
    gradient = errors.T @ x / len(x) + penalized
    return float(loss + _dot(penalized, point) / 2), gradient, curvature


def _is_small(gradient: Tensor, axes: Tensor, tolerance: float) -> bool:
    """Return whether no component of a gradient along ``axes`` exceeds ``tolerance`` once it is along the features."""
    if float(gradient.abs().max()) > 10 * tolerance:  # usually too large; saves a product
        return False
    largest = torch.maximum((gradient[:, :-1] @ axes.T).abs().max(), gradient[:, -1].abs().max())
    return float(largest) <= tolerance


def _penalized(point: Tensor) -> Tensor:
    """Return the weights, with 0 in place of the intercepts."""
    return F.pad(point[:, :-1], (0, 1))


def _direction(gradient: Tensor, pairs: Pairs, diagonal: Tensor) -> Tensor:
    """Return L-BFGS's direction of descent by the two-loop recursion.

    ``diagonal``: the initial Hessian up to a factor, [D + 1]. A pair without positive curvature is left out.
    """
    direction, steps = -gradient, []
    for s, y in reversed(pairs):
        if (curvature := _dot(s, y)) > 1e-20:
            alpha = _dot(s, direction) / curvature
            direction = direction - alpha * y
            steps.append((s, y, curvature, alpha))
    direction = direction / diagonal
    if steps:
        _, y, curvature, _ = steps[0]
        direction = direction * (curvature / _dot(y, y / diagonal))
    for s, y, curvature, alpha in reversed(steps):
        direction = direction + (alpha - _dot(y, direction) / curvature) * s
    return direction


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
