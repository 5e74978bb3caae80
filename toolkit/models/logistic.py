"""Multinomial logistic regression on features, fitted for several strengths of regularization at once.

The objective is that of scikit-learn's LogisticRegression: the sum of the cross-entropies plus ||W||^2 / (2 C); the
intercept is not penalized.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

HISTORY = 10
"""Number of earlier steps from which L-BFGS approximates the curvature."""
TOLERANCE = 1e-4
"""Largest component of the gradient of the mean loss at which a fit ends, on features of mean 0 and overall standard
deviation 1; scikit-learn's default, whose gradient is on unscaled features."""
MAX_ITERATIONS = 1000


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, strengths: Sequence[float], *, tolerance: float = TOLERANCE
) -> tuple[Tensor, Tensor, list[bool]]:
    """Fit one logistic regression for each value of C by L-BFGS (Liu & Nocedal 1989), all in the same matrix products.

    ``features``: [N, D]; ``labels``: int64 [N] below ``classes``; ``strengths``: values of C, the inverse of the
    regularization strength. Returns weights [G, classes, D], intercepts [G, classes] of the type of ``features``, and
    whether each fit reached ``tolerance`` within MAX_ITERATIONS.

    The features are shifted to mean 0 and divided by one number, which improves the condition of the problem; the
    result is converted back. Since the intercept is free and the penalty is scaled too, the optimum is the same.
    """
    mean = features.mean(0)
    x = features - mean
    scale = x.pow(2).mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    x = F.pad(x / scale, (0, 1), value=1.0)  # the last column is for the intercept
    penalties = 1 / (torch.tensor(strengths, dtype=x.dtype, device=x.device) * scale**2 * len(x))
    found, converged = _minimize(x, labels, classes, penalties, tolerance)
    weights = found[..., :-1] / scale
    intercepts = found[..., -1] - weights @ mean
    return weights, intercepts, converged.tolist()


def _minimize(x: Tensor, labels: Tensor, classes: int, penalties: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the minimizers, [G, classes, D + 1], and whether each converged, bool [G]. Those that have are left out.

    The steps are shortened until they fulfill Armijo's condition.
    """
    point = x.new_zeros(len(penalties), classes, x.shape[1])
    result, converged = point.clone(), torch.zeros(len(penalties), dtype=torch.bool, device=x.device)
    active = torch.arange(len(penalties), device=x.device)
    value, gradient = _objective(point, x, labels, penalties)
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=HISTORY)
    for _ in range(MAX_ITERATIONS):
        is_done = gradient.abs().amax((1, 2)) <= tolerance
        result[active] = point
        converged[active[is_done]] = True
        if bool(is_done.all()):
            break
        if bool(is_done.any()):
            rest = ~is_done
            active, penalties, point = active[rest], penalties[rest], point[rest]
            value, gradient = value[rest], gradient[rest]
            pairs = deque(((s[rest], y[rest]) for s, y in pairs), maxlen=HISTORY)
        direction = _direction(gradient, pairs)
        slope = _dot(direction, gradient)
        length = torch.ones_like(slope) if pairs else 1 / gradient.norm(dim=(1, 2), keepdim=True).clamp_min(1)
        for _ in range(30):
            new_point = point + length * direction
            new_value, new_gradient = _objective(new_point, x, labels, penalties)
            is_lower = new_value <= value + 1e-4 * (length * slope).flatten() + 4 * torch.finfo(x.dtype).eps
            if bool(is_lower.all()):
                break
            length = torch.where(is_lower[:, None, None], length, length / 2)
        pairs.append((new_point - point, new_gradient - gradient))
        point, value, gradient = new_point, new_value, new_gradient
    return result, converged


def _objective(point: Tensor, x: Tensor, labels: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
    """Return the objective divided by the number of examples, [G], and its gradient, [G, classes, D + 1]."""
    count, classes = len(x), point.shape[1]
    logits = (x @ point.flatten(0, 1).T).view(count, -1, classes)
    log_probabilities = logits.log_softmax(2)
    at = labels[:, None, None].expand(-1, len(point), 1)
    loss = -log_probabilities.gather(2, at).squeeze(2).mean(0)
    errors = log_probabilities.exp_()
    errors.scatter_add_(2, at, errors.new_full(at.shape, -1.0))
    gradient = (errors.flatten(1).T @ x).view_as(point) / count
    weights = point[..., :-1]
    gradient[..., :-1] += penalties[:, None, None] * weights
    return loss + penalties / 2 * weights.pow(2).sum((1, 2)), gradient


def _direction(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return L-BFGS's direction of descent by the two-loop recursion, for each problem on its own.

    A pair without positive curvature is left out.
    """
    direction, steps = -gradient, []
    for s, y in reversed(pairs):
        curvature = _dot(s, y)
        rho = torch.where(curvature > 1e-20, 1 / curvature, 0)
        alpha = rho * _dot(s, direction)
        direction = direction - alpha * y
        steps.append((s, y, rho, alpha))
    if steps:
        _, y, rho, _ = steps[0]
        size = rho * _dot(y, y)
        direction = torch.where(size > 0, direction / size, direction)
    for s, y, rho, alpha in reversed(steps):
        direction = direction + (alpha - rho * _dot(y, direction)) * s
    return direction


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each problem, [G, 1, 1]."""
    return (a * b).sum((1, 2), keepdim=True)
