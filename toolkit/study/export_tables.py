"""All results of a study, and their export to files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.metrics import METRICS, higher_is_better, metric_of
from toolkit.recipe.study_schema import StudyConfig
from toolkit.runs import write_atomically
from toolkit.study.agreement import Agreement, agreements, build_agreement_table
from toolkit.study.claims import JudgedClaim, build_claims_table, claim_records, judge_claims
from toolkit.study.compare import build_comparison_table, compare_rows, comparison_records
from toolkit.study.directory import StudyDirectory
from toolkit.study.epoch_tables import build_epoch_tables, epoch_metrics, epoch_records
from toolkit.study.results import RunResult, read_results
from toolkit.study.results_table import (
    ResultRow,
    best_first,
    build_results_table,
    build_rows,
    check_columns,
    nearest,
    records,
)
from toolkit.study.significance import PairedComparison
from toolkit.study.text_table import TextTable, csv_text, latex, markdown, text
from toolkit.study.trial_table import TrialResult, build_trial_table, outcomes, trial_records


@dataclass(frozen=True)
class TableOptions:
    """Options of `toolkit table`, which override the study's file."""

    columns: Sequence[str] = ()
    by: Sequence[str] = ()
    compare: tuple[str, str] | None = None
    intervals: bool = False
    sort: str | None = None
    """Metric by which the main table is sorted, best first; rows without it come last."""
    top: int | None = None
    """Maximum number of rows in the main table; implies sorting by the study's output.best_by if ``sort`` is None."""


@dataclass(frozen=True)
class StudyResults:
    """The results of a study so far, and its tables."""

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

    @property
    def main(self) -> TextTable:
        """The main results table."""
        if self.trials:
            found = build_trial_table(self.trials, self.table, self.name, self.columns)
        else:
            found = build_results_table(
                self.rows, self.table, self.name, self.columns, intervals=self.options.intervals
            )
            found = replace(found, notes=[*found.notes, *_assumption_note(self.assumptions)])
        if self.options.sort is None:
            return found
        order = self._order
        rows = [found.rows[index] for index in order]
        marked = frozenset(position for position, index in enumerate(order) if index in found.marked)
        cut = f"; the first {len(rows)} of {len(found.rows)} rows" if len(rows) < len(found.rows) else ""
        note = f"Sorted by {METRICS[self.options.sort].heading}, the best first{cut}."
        return replace(found, rows=rows, marked=marked, notes=[note, *found.notes])

    @property
    def _order(self) -> list[int]:
        """Indices of the rows shown in the main table, in display order."""
        metric, records = self.options.sort, self._all_records
        if metric is None:
            return list(range(len(records)))
        sign = -1 if higher_is_better(metric) else 1

        def rank(index: int) -> float:
            value = records[index].get(metric)
            return math.inf if not isinstance(value, int | float) or math.isnan(value) else sign * value

        return sorted(range(len(records)), key=rank)[: self.options.top]

    @property
    def agreement(self) -> list[Agreement]:
        """Agreement between measured and published metrics, per column."""
        return [] if self.trials else agreements(self.rows, self.columns)

    @property
    def judged(self) -> list[TextTable]:
        """The tables of agreements and of claims; empty without published metrics and claims."""
        found = [build_agreement_table(self.agreement)] if self.agreement else []
        return [*found, *([build_claims_table(self.claims, self.table.output.confidence)] if self.claims else [])]

    @property
    def by_epoch(self) -> list[TextTable]:
        """The per-epoch tables, if the study has any."""
        return build_epoch_tables(self.rows, self.table, self.name, self.epoch_metrics)

    @property
    def epoch_metrics(self) -> list[str]:
        """The metrics of the per-epoch tables."""
        return [] if self.trials or self.options.by else epoch_metrics(self.rows, self.table)

    @property
    def compared(self) -> list[TextTable]:
        """The comparison of two rows, if requested."""
        if self.options.compare is None:
            return []
        return [build_comparison_table(self.comparison, *self.options.compare, self.table.output.confidence)]

    @property
    def records(self) -> list[dict[str, object]]:
        """The main table as records, sorted and truncated like :attr:`main`."""
        records = self._all_records
        return [records[index] for index in self._order]

    @property
    def _all_records(self) -> list[dict[str, object]]:
        if self.trials:
            return trial_records(self.trials, self.table, self.columns)
        return records(self.rows, self.columns)


def read_outcomes(folder: StudyDirectory, options: TableOptions) -> StudyResults:
    """Read the results of the study in ``folder``. Raises UserError if it is missing or a column or key is unknown."""
    table, results = folder.table, read_results(folder)
    columns = options.columns or _measured(table.output.columns, results)
    check_columns(columns)
    if options.sort is not None and options.sort not in METRICS:
        raise UserError(f"--sort {options.sort}: there is no such column{nearest(options.sort, METRICS)}")
    if options.sort is None and options.top is not None:
        options = replace(options, sort=metric_of(table.output.best_by).name)
    if options.sort is not None and options.sort not in columns:
        columns = [*columns, options.sort]
    rows = build_rows(results, table, options.by)
    is_search = table.bohb is not None or table.random is not None
    if is_search:
        rows = best_first(rows, table.output.best_by)
    single = all(len(row.results) == 1 for row in rows) and not options.by
    trials = outcomes(results, table) if is_search and single else []
    compared = compare_rows(rows, *options.compare, columns, table.output.confidence) if options.compare else {}
    claims = judge_claims(folder, table, results)
    return StudyResults(
        folder.name, table, results, rows, trials, columns, options, compared, folder.assumptions, claims
    )  # fmt: skip


def _assumption_note(assumptions: Mapping[str, str]) -> list[str]:
    """Return a note that lists the keys whose values the publication does not state; empty if there are none."""
    assumed = {key: value.partition(": ")[2] for key, value in assumptions.items() if value.partition(":")[0] == "ours"}
    keys = "; ".join(f"{key} ({note})" if note else key for key, note in assumed.items())
    return [f"Not stated in the publication, assumed here: {keys}."] if keys else []


def _measured(columns: Sequence[str], results: Sequence[RunResult]) -> Sequence[str]:
    """Return the study's columns without validation and test metrics that no finished run has."""
    finished = [result for result in results if result.is_finished]

    def has(column: str) -> bool:
        return METRICS[column].split not in ("val", "test") or any(column in result.metrics for result in finished)

    return [column for column in columns if has(column)] if finished else columns


def terminal_text(found: StudyResults) -> str:
    """Format all tables for a terminal."""
    return "\n\n".join(text(part) for part in (found.main, *found.judged, *found.by_epoch, *found.compared))


def to_json(found: StudyResults) -> dict[str, Any]:
    """Return all tables as JSON values."""
    return {
        "name": found.name,
        "description": found.table.description,
        "source": found.table.source,
        "note": found.table.note,
        "notes": list(found.main.notes),
        "trials" if found.trials else "rows": found.records,
        "assumptions": dict(found.assumptions),
        "agreement": [asdict(one) for one in found.agreement],
        "claims": claim_records(found.claims),
        "epochs": epoch_records(found.rows, found.epoch_metrics),
        "comparison": comparison_records(found.comparison),
    }


def overall(studies: Sequence[StudyResults], columns: Sequence[str]) -> tuple[list[TextTable], dict[str, Any]]:
    """Return the agreement of all rows of several studies and the verdicts on all their claims: as tables, and as JSON.

    ``columns`` are the metrics compared; if empty, those of the studies' tables.
    """
    shown = columns or list(dict.fromkeys(name for study in studies for name in study.columns))
    found = agreements([row for study in studies if not study.trials for row in study.rows], shown)
    claims = [claim for study in studies for claim in study.claims]
    tables = [build_agreement_table(found)] if found else []
    tables += [build_claims_table(claims, studies[0].table.output.confidence)] if claims else []
    content = {"studies": [study.name for study in studies], "agreement": [asdict(one) for one in found]}
    return tables, content | {"claims": claim_records(claims)}


def write_tables(found: StudyResults, folder: Path) -> list[Path]:
    """Write table.csv, table.md, table.tex, runs.csv and, if the study has them, claims.csv and epochs.csv.

    Raises UserError if they cannot be written.
    """
    parts = [found.main, *found.judged, *found.by_epoch, *found.compared]
    files = {
        "table.csv": csv_text(found.records),
        "table.md": f"# {found.name}\n\n" + "\n\n".join(markdown(part) for part in parts) + "\n",
        "table.tex": "\n\n".join(latex(part) for part in parts) + "\n",
        "runs.csv": csv_text(run_records(found.results)),
    }
    if found.claims:
        files["claims.csv"] = csv_text(claim_records(found.claims))
    if found.epoch_metrics:
        files["epochs.csv"] = csv_text(epoch_records(found.rows, found.epoch_metrics))
    try:
        for name, content in files.items():
            write_atomically(folder / name, content.encode())
    except OSError as error:
        raise UserError(f"the tables cannot be written to {folder}: {error.strerror}") from None
    return [folder / name for name in files]


def run_records(results: Sequence[RunResult]) -> list[dict[str, object]]:
    """Return one record per run, with the values that the study varies and all metrics."""
    return [
        {
            "row": result.member.row,
            "seed": result.member.seed,
            **result.member.changes,
            "state": result.state,
            **result.metrics,
            "run": result.member.run,
        }
        for result in results
    ]
