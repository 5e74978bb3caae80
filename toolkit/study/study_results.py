"""All results of a study so far, the input of its tables, figures and reports. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from toolkit.errors import UserError
from toolkit.metrics import METRICS, higher_is_better, metric_of
from toolkit.recipe.study_schema import StudyConfig
from toolkit.study.claims import JudgedClaim, judge_claims
from toolkit.study.compare import compare_rows
from toolkit.study.directory import StudyDirectory
from toolkit.study.results import (
    ResultRow,
    RunResult,
    TrialResult,
    best_first,
    build_rows,
    nearest,
    ranked_trials,
    read_results,
)
from toolkit.study.significance import PairedComparison
from toolkit.study.soup_results import Soup, read_soups

Shown = TypeVar("Shown", ResultRow, TrialResult)


@dataclass(frozen=True)
class TableOptions:
    """Options of `toolkit table`, which override the study's file."""

    columns: Sequence[str] = ()
    by: Sequence[str] = ()
    compare: tuple[str, str] | None = None
    intervals: bool = False
    """Whether to show confidence intervals instead of standard deviations."""
    sort: str | None = None
    """Metric by which the main table is sorted, best first; rows without it come last."""
    top: int | None = None
    """Maximum number of rows in the main table; implies sorting by the study's output.best_by if ``sort`` is None."""


@dataclass(frozen=True)
class StudyResults:
    """The results of a study so far, and the options that select what is shown."""

    name: str
    table: StudyConfig
    results: Sequence[RunResult]
    rows: Sequence[ResultRow]
    trials: Sequence[TrialResult]
    """Trials of a search in which each configuration is one run; otherwise empty."""
    columns: Sequence[str]
    options: TableOptions
    comparison: dict[str, PairedComparison]
    assumptions: Mapping[str, str] = field(default_factory=dict)
    """Source of each key's value, from [assumptions]."""
    claims: Sequence[JudgedClaim] = ()
    soups: Sequence[Soup] = ()
    """Averages of the runs' weights that `toolkit soup` wrote: shown in the main table, and used for nothing else."""
    soup_faults: Sequence[str] = ()
    """Messages about soups that cannot be read."""

    @property
    def title(self) -> str:
        """Title of tables and figures."""
        return self.table.description or self.name

    @property
    def confidence(self) -> float:
        """Confidence level of all intervals."""
        return self.table.output.confidence

    @property
    def rows_and_soups(self) -> list[ResultRow]:
        """The rows, followed by the soups as rows."""
        return [*self.rows, *(soup.row(self.confidence) for soup in self.soups)]

    def shown(self, items: Sequence[Shown]) -> list[Shown]:
        """Return the rows or trials in the main table, sorted and truncated as the options request."""
        metric = self.options.sort
        if metric is None:
            return list(items)
        sign = -1 if higher_is_better(metric) else 1

        def rank(item: Shown) -> float:
            value = item.measured(metric)
            return math.inf if value is None or math.isnan(value) else sign * value

        return sorted(items, key=rank)[: self.options.top]


def read_outcomes(folder: StudyDirectory, options: TableOptions) -> StudyResults:
    """Read the results of the study in ``folder``. Raises UserError if it is missing or a column or key is unknown."""
    table, results = folder.table, read_results(folder)
    columns = options.columns or _measured(table.output.columns, results)
    known = dict.fromkeys([*METRICS, *table.output.columns, *(name for result in results for name in result.metrics)])
    for column in columns:
        if column not in known:
            raise UserError(f"--columns {column}: there is no such metric{nearest(column, known)}")
    if options.sort is not None and options.sort not in known:
        raise UserError(f"--sort {options.sort}: there is no such column{nearest(options.sort, known)}")
    if options.sort is None and options.top is not None:
        options = replace(options, sort=metric_of(table.output.best_by).name)
    if options.sort is not None and options.sort not in columns:
        columns = [*columns, options.sort]
    rows = build_rows(results, table, options.by)
    is_search = table.bohb is not None or table.random is not None
    if is_search:
        rows = best_first(rows, table.output.best_by)
    single = all(len(row.results) == 1 for row in rows) and not options.by
    trials = ranked_trials(results, table.metric) if is_search and single else []
    compared = compare_rows(rows, *options.compare, columns, table.output.confidence) if options.compare else {}
    claims = judge_claims(folder, table, results)
    soups, faults = read_soups(folder)
    return StudyResults(
        folder.name, table, results, rows, trials, columns, options, compared, folder.assumptions, claims, soups, faults
    )  # fmt: skip


def _measured(columns: Sequence[str], results: Sequence[RunResult]) -> Sequence[str]:
    """Return the study's columns, except validation and test metrics that no finished run has."""
    finished = [result for result in results if result.is_finished]

    def has(column: str) -> bool:
        return metric_of(column).split not in ("val", "test") or any(column in result.metrics for result in finished)

    return [column for column in columns if has(column)] if finished else columns
