"""Comparison of a run's metrics with those that its recipe states in [expected_metrics]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.metrics import EXPECTED_METRICS
from toolkit.recipe.resolve import leaves, resolved_content
from toolkit.recipe.schema import Expectation, Recipe

CONDITIONS = (
    "data.dataset",
    "data.name",
    "data.args",
    "data.class_folders",
    "data.background_class",
    "data.split.method",
    "data.split.validation",
    "data.split.test",
    "model.weights",
    "transfer.mode",
    "train.epochs",
    "train.steps",
)
"""Recipe keys whose values must equal those of the publication for a comparison to be meaningful."""


@dataclass(frozen=True)
class ExpectationResult:
    """An expected metric and the measured one."""

    metric: str
    expected: str
    measured: float | None
    verdict: str
    """Result of the comparison: met, missed, or not comparable."""
    reason: str
    source: str

    def line(self) -> str:
        """Format the comparison as one line."""
        measured = "-" if self.measured is None else f"{self.measured:.4f}"
        reason = f" ({self.reason})" if self.reason else ""
        found = f"measured {measured}: {self.verdict}{reason}"
        return f"expected {self.metric} {self.expected}, {found}; source: {self.source}"


def check_expectations(recipe: Recipe, summary: dict[str, Any]) -> list[ExpectationResult]:
    """Compare a run with [expected_metrics]; runs with other seeds or on a subset of the data are not comparable."""
    return [_judge(recipe, summary, name, expected) for name, expected in recipe.expected_metrics.items()]


def _judge(recipe: Recipe, summary: dict[str, Any], name: str, expected: Expectation) -> ExpectationResult:
    metric = EXPECTED_METRICS.get(name)
    measured = metric.read(summary) if metric else None
    reason = _not_comparable(recipe, expected, measured)
    if reason:
        verdict = "not comparable"
    else:
        assert measured is not None
        verdict = "met" if _is_met(expected, measured) else "missed"
    return ExpectationResult(name, _format_bounds(expected), measured, verdict, reason, expected.source)


def _not_comparable(recipe: Recipe, expected: Expectation, measured: float | None) -> str:
    if measured is None:
        return "the run has no such metric"
    if reason := different_conditions(recipe):
        return reason
    if expected.seeds and recipe.recipe.seed not in expected.seeds:
        return f"stated for seed {', '.join(map(str, expected.seeds))}, but this run has seed {recipe.recipe.seed}"
    return ""


def different_conditions(recipe: Recipe, stated: Recipe | None = None) -> str:
    """Return why a recipe's metrics cannot be compared with a published one; empty if they can.

    ``stated`` is the recipe of the published metric. Without it only the number of images is checked.
    """
    if recipe.data.images_per_class or recipe.data.test_images_per_class:
        return "the run used part of the images"
    if stated is None:
        return ""
    now, then = (dict(leaves(resolved_content(one))) for one in (recipe, stated))
    paths = [tuple(key.split(".")) for key in CONDITIONS]
    if {"imagefolder", "table", "shards"} & {recipe.data.dataset, stated.data.dataset}:
        paths += [("data", "root"), ("data", "table")]
    now[("data", "args")], then[("data", "args")] = recipe.data.args, stated.data.args
    changed = [path for path in paths if now.get(path) != then.get(path)]
    return ", ".join(f"{'.'.join(p)} is {now.get(p, 'unset')}, not {then.get(p, 'unset')}" for p in changed)


def _is_met(expected: Expectation, measured: float) -> bool:
    return (
        (expected.at_least is None or measured >= expected.at_least)
        and (expected.at_most is None or measured <= expected.at_most)
        and (expected.value is None or abs(measured - expected.value) <= expected.tolerance)
    )


def _format_bounds(expected: Expectation) -> str:
    parts = []
    if expected.at_least is not None:
        parts.append(f">= {expected.at_least:g}")
    if expected.at_most is not None:
        parts.append(f"<= {expected.at_most:g}")
    if expected.value is not None:
        parts.append(f"= {expected.value:g} +- {expected.tolerance:g}")
    return " and ".join(parts)
