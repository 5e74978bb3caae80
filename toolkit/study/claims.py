"""Claims of a publication, tested on the runs of a study: reproduced, not reproduced or undecidable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.errors import UserError
from toolkit.metrics import higher_is_better, metric_of
from toolkit.recipe.study_schema import Claim, StudyConfig
from toolkit.study.directory import StudyDirectory
from toolkit.study.results import RunResult
from toolkit.study.search_space import conditions
from toolkit.study.significance import McNemar, estimate, pairs_needed, welch
from toolkit.study.text_table import MISSING, TextTable, interval_text, number
from toolkit.study.validation import in_group

Outcome = Literal["reproduced", "not reproduced", "undecidable"]
Interval = tuple[float, float]
CorrectImages = Callable[[RunResult], dict[str, bool]]
"""Maps a run to whether it classified each test image correctly, by path; empty if predictions cannot be read."""


@dataclass(frozen=True)
class Contrast:
    """Difference between two groups of runs; positive means the first is better, also for losses."""

    than: str
    effect: float | None = None
    """Difference between the groups' means; None if one group has no finished run."""
    runs: str = ""
    """Number of runs compared: ``3 pairs``, ``2 and 3 runs``, ``1 run each``."""
    over_seeds: Interval | None = None
    over_images: Interval | None = None
    refuting: Interval | None = None
    """The interval that can refute the claim; wider if there are several contrasts."""
    needed: int | None = None
    """Seeds needed for a decision with 80 % power if the observed effect and spread are the true ones."""
    reason: str = ""


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with its verdict and the contrast that decides it."""

    claim: Claim
    verdict: Outcome
    contrast: Contrast


def judge_claims(folder: StudyDirectory, table: StudyConfig, results: Sequence[RunResult]) -> list[JudgedClaim]:
    """Judge each claim of the study. Reads predictions.csv if a row has one run."""

    def correct(result: RunResult) -> dict[str, bool]:
        run = folder.run(result.member)
        try:
            return run.correct_predictions() if run else {}
        except (UserError, OSError):
            return {}

    return [judge(claim, results, table.output.confidence, correct) for claim in table.claims]


def judge(claim: Claim, results: Sequence[RunResult], confidence: float, correct: CorrectImages) -> JudgedClaim:
    """Judge one claim.

    A claim about several rows is reproduced if every contrast confirms it. It is not reproduced if one contrast refutes
    it at a significance level divided by the number of contrasts (Bonferroni).
    """
    one = [r for r in results if _is_in(r, claim.better)]
    others = _others(claim, results)
    strict = 1 - (1 - confidence) / max(1, len(others))
    contrasts = [_contrast(claim, one, name, runs, (confidence, strict), correct) for name, runs in others]
    verdicts = [_verdict(claim, contrast) for contrast in contrasts]
    wanted: Outcome = (
        "not reproduced" if "not reproduced" in verdicts
        else "undecidable" if "undecidable" in verdicts or not verdicts
        else "reproduced"
    )  # fmt: skip
    deciding = [c for c, verdict in zip(contrasts, verdicts, strict=True) if verdict == wanted] or [Contrast("")]
    sign = 1 if claim.holds else -1
    weakest = min(deciding, key=lambda c: math.inf if c.effect is None else sign * c.effect)
    return JudgedClaim(claim, wanted, weakest)


def _is_in(result: RunResult, group: str | dict[str, Any]) -> bool:
    return result.member.row == group if isinstance(group, str) else in_group(result.member, group)


def _others(claim: Claim, results: Sequence[RunResult]) -> list[tuple[str, list[RunResult]]]:
    """Return the names and runs of the groups that the claim's first group is compared with."""
    if isinstance(claim.than, dict):
        name = ", ".join(f"{key} {' or '.join(map(str, values))}" for key, values in conditions(claim.than).items())
        return [(name, [r for r in results if _is_in(r, claim.than)])]
    names = claim.than or dict.fromkeys(r.member.row for r in results if r.member.row != claim.better)
    return [(name, [r for r in results if r.member.row == name]) for name in names]


def _values(claim: Claim, runs: Sequence[RunResult]) -> dict[tuple[Any, ...], float]:
    """Return the metric of finished runs by pairing key: seed, fold and, for groups defined by keys, other varied keys.

    Values are negated if lower is better.
    """
    found = {}
    for run in runs:
        keys = set() if isinstance(claim.better, str) else {*conditions(claim.better), *conditions(_keys(claim.than))}
        changes = run.member.changes.items() if keys else ()
        others = sorted((key, repr(value)) for key, value in changes if key not in keys)
        pair = (run.member.seed, run.member.fold, *others)
        if claim.metric in run.metrics:
            found[pair] = run.metrics[claim.metric] * (1 if higher_is_better(claim.metric) else -1)
    return found


def _keys(group: list[str] | dict[str, Any]) -> dict[str, Any]:
    return group if isinstance(group, dict) else {}


def _contrast(
    claim: Claim,
    one: Sequence[RunResult],
    name: str,
    other: Sequence[RunResult],
    levels: tuple[float, float],
    correct: CorrectImages,
) -> Contrast:
    a, b = _values(claim, one), _values(claim, other)
    if not a or not b:
        missing = "the first group" if not a else name
        return Contrast(name, reason=f"{missing} has no finished run with this metric")
    not_comparable = next((r.member.not_comparable for r in (*one, *other) if r.member.not_comparable), "")
    if not_comparable:
        return Contrast(name, reason=f"not comparable: {not_comparable}")
    shared = [pair for pair in a if pair in b]
    if len(shared) > 1:
        return _paired(claim, name, [a[pair] - b[pair] for pair in shared], levels)
    if len(a) > 1 and len(b) > 1:
        return _unpaired(claim, name, list(a.values()), list(b.values()), levels)
    pair = shared[0] if shared else None
    effect = (a[pair] - b[pair]) if pair else sum(a.values()) / len(a) - sum(b.values()) / len(b)
    if len(a) == len(b) == 1 and claim.metric == "test_accuracy":
        first, second = (next(r for r in runs if claim.metric in r.metrics) for runs in (one, other))
        return _over_images(name, effect, correct(first), correct(second), levels)
    what = "1 run each" if len(a) == len(b) == 1 else f"{len(a)} and {len(b)} runs"
    return Contrast(name, effect, what, reason="at least two seeds per row are needed")


def _paired(claim: Claim, name: str, differences: Sequence[float], levels: tuple[float, float]) -> Contrast:
    found, wider = (estimate(differences, level) for level in levels)
    runs = f"{found.n} pairs"
    if not found.std:
        return Contrast(name, found.mean, runs, reason="all differences are equal")
    needed = pairs_needed(found.mean - claim.margin, found.std, levels[0])
    return Contrast(name, found.mean, runs, found.interval, None, wider.interval, needed)


def _unpaired(
    claim: Claim, name: str, one: Sequence[float], other: Sequence[float], levels: tuple[float, float]
) -> Contrast:
    a, b = estimate(one, levels[0]), estimate(other, levels[0])
    runs, test = f"{a.n} and {b.n} runs", welch(a, b)
    if test is None:
        return Contrast(name, a.mean - b.mean, runs, reason="all values within each group are equal")
    spread = math.hypot(a.std or 0.0, b.std or 0.0)
    needed = pairs_needed(test.difference - claim.margin, spread, levels[0], samples=2)
    return Contrast(name, test.difference, runs, test.interval(levels[0]), None, test.interval(levels[1]), needed)


def _over_images(
    name: str,
    effect: float,
    first_correct: dict[str, bool],
    second_correct: dict[str, bool],
    levels: tuple[float, float],
) -> Contrast:
    """Compare two single runs by McNemar's test. It applies to these two models, not to their recipes in general."""
    if not first_correct or first_correct.keys() != second_correct.keys():
        return Contrast(name, effect, "1 run each", reason="no predictions on the same test images")
    test = McNemar(
        sum(right and not second_correct[path] for path, right in first_correct.items()),
        sum(not right and second_correct[path] for path, right in first_correct.items()),
        len(first_correct),
    )
    reason = (
        f"McNemar's exact test: p {test.p:.4f}; it applies to these two models only, since the spread over seeds is "
        "not known"
    )
    found, wider = (test.interval(level) for level in levels)
    return Contrast(name, test.difference, "1 run each", None, found, wider, None, reason)


def _verdict(claim: Claim, contrast: Contrast) -> Outcome:
    interval = contrast.over_seeds or contrast.over_images
    if interval is None or contrast.refuting is None:
        return "undecidable"
    if claim.holds:
        confirmed, refuted = interval[0] > claim.margin, contrast.refuting[1] < claim.margin
    else:
        confirmed, refuted = interval[1] <= claim.margin, contrast.refuting[0] > claim.margin
    return "reproduced" if confirmed else "not reproduced" if refuted else "undecidable"


# -- tables and records -----------------------------------------------------------------------------------------------


def build_claims_table(judged: Sequence[JudgedClaim], confidence: float) -> TextTable:
    """Build the text table of the verdicts on a study's claims."""
    level = f"{confidence * 100:g} %"
    head = ["claim", "verdict", "column", "compared with", "effect", "runs", f"{level} over seeds",
            f"{level} over test images", "seeds to decide"]  # fmt: skip
    rows, notes = [], []
    for one in judged:
        claim, found = one.claim, one.contrast
        effect = number(claim.metric, found.effect, signed=True, mean=True)
        needed = MISSING if found.needed is None or one.verdict != "undecidable" else str(found.needed)
        intervals = [interval_text(claim.metric, found.over_seeds), interval_text(claim.metric, found.over_images)]
        heading = metric_of(claim.metric).heading
        cells = [claim.statement, one.verdict, heading, found.than, effect, found.runs or MISSING, *intervals, needed]
        rows.append(cells)
        if claim.source or found.reason:
            notes.append(f"{claim.statement}: {'; '.join(filter(None, (claim.source, found.reason)))}.")
    about = (
        "Effect: how much better the claim's first row is (for a loss, how much lower); negative if it is worse. Among "
        "several rows, the deciding one is shown. Paired t-test if the seeds match (for groups, also the other varied "
        "keys); otherwise Welch's t-test."
    )
    notes.insert(0, about)
    notes.append(
        "Seeds to decide: for a t-test with 80 % power, if the effect and spread observed here are the true ones."
    )
    return TextTable("Claims", head, rows, notes=notes, left=frozenset({0, 1, 2, 3}))


def claim_records(judged: Sequence[JudgedClaim]) -> list[dict[str, object]]:
    """Return the verdicts as records; effects and intervals of accuracies are fractions, not percentages."""
    records: list[dict[str, object]] = []
    for one in judged:
        found = one.contrast
        seeds, images = found.over_seeds or (None, None), found.over_images or (None, None)
        records.append({
            "claim": one.claim.statement, "source": one.claim.source, "verdict": one.verdict,
            "metric": one.claim.metric, "compared_with": found.than, "effect": found.effect, "runs": found.runs,
            "seeds_low": seeds[0], "seeds_high": seeds[1], "images_low": images[0], "images_high": images[1],
            "seeds_to_decide": found.needed if one.verdict == "undecidable" else None, "reason": found.reason,
        })  # fmt: skip
    return records
