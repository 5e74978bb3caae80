"""All tables of a study: as text, as JSON and as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.metrics import metric_of
from toolkit.study.agreement import Agreement, agreements, build_agreement_table
from toolkit.study.claims import JudgedClaim, build_claims_table, claim_records
from toolkit.study.compare import build_comparison_table, comparison_records
from toolkit.study.epoch_tables import build_epoch_tables, epoch_metrics, epoch_records
from toolkit.study.results import RunResult
from toolkit.study.results_table import build_results_table, row_records
from toolkit.study.soup_results import soup_record
from toolkit.study.study_results import StudyResults
from toolkit.study.text_table import TextTable, csv_text, latex, markdown, text
from toolkit.study.trial_table import build_trial_table, trial_records
from toolkit.writing import write_atomically


def main_table(found: StudyResults) -> TextTable:
    """Return the table of trials or of rows, sorted and truncated as the options request."""
    table = build_trial_table(found) if found.trials else build_results_table(found)
    if found.options.sort is None:
        return table
    shown, count = len(table.rows), len(found.trials or found.rows) + len(found.soups)
    cut = f"; the first {shown} of {count} rows" if shown < count else ""
    note = f"Sorted by {metric_of(found.options.sort).heading}, the best first{cut}."
    return replace(table, notes=[note, *table.notes])


def main_records(found: StudyResults) -> list[dict[str, object]]:
    """Return the main table as records, sorted and truncated like the text table."""
    return trial_records(found) if found.trials else row_records(found)


def agreement(found: StudyResults) -> list[Agreement]:
    """Return the agreement between measured and published metrics, per column."""
    return [] if found.trials else agreements(found.rows, found.columns)


def judged_tables(found: Sequence[Agreement], claims: Sequence[JudgedClaim], confidence: float) -> list[TextTable]:
    """Return the tables of agreements and of claims; empty without published metrics and claims."""
    tables = [build_agreement_table(found)] if found else []
    return [*tables, *([build_claims_table(claims, confidence)] if claims else [])]


def all_tables(found: StudyResults) -> list[TextTable]:
    """Return the main table and all other tables for which the study has results."""
    judged = judged_tables(agreement(found), found.claims, found.confidence)
    compare = found.options.compare
    compared = [build_comparison_table(found.comparison, *compare, found.confidence)] if compare else []
    return [main_table(found), *judged, *build_epoch_tables(found), *compared]


def terminal_text(found: StudyResults) -> str:
    """Format all tables for a terminal."""
    return "\n\n".join(text(part) for part in all_tables(found))


def to_json(found: StudyResults) -> dict[str, Any]:
    """Return all tables as JSON values."""
    return {
        "name": found.name,
        "description": found.table.description,
        "source": found.table.source,
        "note": found.table.note,
        "notes": list(main_table(found).notes),
        "trials" if found.trials else "rows": main_records(found),
        "assumptions": dict(found.assumptions),
        "agreement": [asdict(one) for one in agreement(found)],
        "claims": claim_records(found.claims),
        "epochs": epoch_records(found.rows, epoch_metrics(found)),
        "comparison": comparison_records(found.comparison),
        "soups": [soup_record(soup, found.confidence) for soup in found.soups],
    }


def overall(studies: Sequence[StudyResults], columns: Sequence[str]) -> tuple[list[TextTable], dict[str, Any]]:
    """Return the agreement of all rows of several studies and the verdicts on all their claims: as tables, and as JSON.

    ``columns`` are the metrics compared; if empty, those of the studies' tables.
    """
    shown = columns or list(dict.fromkeys(name for study in studies for name in study.columns))
    found = agreements([row for study in studies if not study.trials for row in study.rows], shown)
    claims = [claim for study in studies for claim in study.claims]
    content = {"studies": [study.name for study in studies], "agreement": [asdict(one) for one in found]}
    return judged_tables(found, claims, studies[0].confidence), content | {"claims": claim_records(claims)}


def write_tables(found: StudyResults, folder: Path) -> list[Path]:
    """Write table.csv, table.md, table.tex, runs.csv and, if the study has them, claims.csv and epochs.csv.

    Raises UserError if they cannot be written.
    """
    parts = all_tables(found)
    files = {
        "table.csv": csv_text(main_records(found)),
        "table.md": f"# {found.name}\n\n" + "\n\n".join(markdown(part) for part in parts) + "\n",
        "table.tex": "\n\n".join(latex(part) for part in parts) + "\n",
        "runs.csv": csv_text(run_records(found.results)),
    }
    if found.claims:
        files["claims.csv"] = csv_text(claim_records(found.claims))
    if metrics := epoch_metrics(found):
        files["epochs.csv"] = csv_text(epoch_records(found.rows, metrics))
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
