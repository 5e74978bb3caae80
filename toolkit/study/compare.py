"""Comparison of two rows of a study over the same seeds: paired difference and significance tests."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.errors import UserError
from toolkit.metrics import metric_of
from toolkit.study.results import ResultRow, nearest
from toolkit.study.significance import PairedComparison, compare
from toolkit.study.text_table import MINUS, TextTable, interval_text, number, p_value


def compare_rows(
    rows: Sequence[ResultRow], first: str, second: str, columns: Sequence[str], confidence: float
) -> dict[str, PairedComparison]:
    """Compare two rows: first minus second for each metric, over the seeds and folds of which both have a finished run.

    Raises UserError if a row is unknown or they have no seed and fold in common.
    """
    one, other = _row(rows, first), _row(rows, second)
    a, b = _by_seed_and_fold(one), _by_seed_and_fold(other)
    shared = [pair for pair in a if pair in b]
    if not shared:
        raise UserError(f"--compare: {first!r} and {second!r} have no finished runs with the same seed")
    found = {}
    for column in columns:
        pairs = [(a[s][column], b[s][column]) for s in shared if column in a[s] and column in b[s]]
        if pairs and metric_of(column).measure.varies:
            found[column] = compare([x for x, _ in pairs], [y for _, y in pairs], confidence)
    return found


def _row(rows: Sequence[ResultRow], name: str) -> ResultRow:
    found = next((row for row in rows if row.name == name), None)
    if found is None:
        raise UserError(f"--compare {name!r}: the table has no such row{nearest(name, [row.name for row in rows])}")
    return found


def _by_seed_and_fold(row: ResultRow) -> dict[tuple[int, int | None], dict[str, float]]:
    found = {(result.member.seed, result.member.fold): result.metrics for result in row.finished}
    if len(found) < len(row.finished):
        raise UserError(f"--compare {row.name!r}: the row has several runs of one seed; compare without --by")
    return found


def build_comparison_table(found: dict[str, PairedComparison], first: str, second: str, confidence: float) -> TextTable:
    """Build the text table of the comparison."""
    interval = f"{confidence * 100:g} % interval"
    head = ["metric", "pairs", "mean difference", interval, "t-test p", "permutation p"]
    cells = [
        [
            metric_of(column).heading,
            str(comparison.difference.n),
            number(column, comparison.difference.mean, signed=True, mean=True),
            interval_text(column, comparison.difference.interval),
            p_value(comparison.t_test),
            p_value(comparison.exact),
        ]
        for column, comparison in found.items()
    ]
    return TextTable(f"{first} {MINUS} {second}", head, cells, notes=_notes(list(found.values())))


def _notes(found: Sequence[PairedComparison]) -> list[str]:
    pairs = min((comparison.difference.n for comparison in found), default=0)
    if pairs < 2:
        return ["One seed: significance cannot be tested; the difference may be due to chance."]
    least = max(comparison.least_exact for comparison in found)
    notes = [
        "Paired over the same seeds. t-test: two-sided, assumes normally distributed differences.",
        f"Permutation: exact, two-sided; with {pairs} pairs it cannot be below {p_value(least)}.",
    ]
    return (
        [*notes, "Each metric is tested separately: without any true difference, one test in twenty has p < 0.05."]
        if len(found) > 1
        else notes
    )


def comparison_records(found: dict[str, PairedComparison]) -> dict[str, dict[str, object]]:
    """Return the comparison as records, one per metric."""
    return {
        column: {
            "pairs": comparison.difference.n,
            "difference": comparison.difference.mean,
            "std": comparison.difference.std,
            "interval": comparison.difference.interval,
            "t_test_p": comparison.t_test,
            "permutation_p": comparison.exact,
            "least_permutation_p": comparison.least_exact,
        }
        for column, comparison in found.items()
    }
