"""Results table of a study: one row per setting, with its metrics over the seeds and the published values."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.metrics import metric_of
from toolkit.study.results import ResultRow
from toolkit.study.significance import welch
from toolkit.study.soup_results import soup_notes
from toolkit.study.study_results import StudyResults
from toolkit.study.text_table import MINUS, MISSING, Column, TextTable, interval_text, number, p_value


def build_results_table(found: StudyResults) -> TextTable:
    """Build the table of results; metrics with published values are followed by columns for these."""
    rows = found.shown(found.rows_and_soups)
    columns = [Column("setting", [row.name for row in rows], is_left=True)]
    if any(len(row.results) > 1 for row in found.rows):
        columns.append(Column("runs", [_count(row) for row in rows]))
    for metric in found.columns:
        columns.append(Column(metric_of(metric).heading, [_measured(row, metric, found) for row in rows]))
        if _is_compared(found, metric):
            columns.append(Column("published", [_published(row, metric) for row in rows]))
            if not found.table.not_comparable:
                columns.append(Column("diff.", [_difference(row, metric) for row in rows]))
    if any(row.open for row in found.rows):
        columns.append(Column("open", [row.open for row in rows], is_left=True))
    marked = frozenset(index for index, row in enumerate(rows) if row.is_best)
    return TextTable.of_columns(found.title, columns, marked, _notes(found))


def _is_compared(found: StudyResults, metric: str) -> bool:
    return any(metric in row.published for row in found.rows)


def _measured(row: ResultRow, metric: str, found: StudyResults) -> str:
    measured = row.metrics.get(metric)
    if measured is None:
        return MISSING
    mean = number(metric, measured.mean, mean=measured.n > 1)
    if measured.std is None or not metric_of(metric).measure.varies:
        return mean
    if found.options.intervals:
        return f"{mean} {interval_text(metric, measured.interval, signed=False)}"
    return f"{mean} ± {number(metric, measured.std, mean=True)}"


def _published(row: ResultRow, metric: str) -> str:
    if metric not in row.published:
        return ""
    several = row.published_spread.get(metric)
    spread = f" ± {number(metric, several.std, mean=True)}" if several is not None and several.std is not None else ""
    return number(metric, row.published[metric]) + spread


def _difference(row: ResultRow, metric: str) -> str:
    if metric not in row.published:
        return ""
    if row.not_comparable:
        return f"not comparable: {row.not_comparable}"
    mean = row.measured(metric)
    return MISSING if mean is None else number(metric, mean - row.published[metric], signed=True, mean=True)


def _against_several(row: ResultRow, column: str, confidence: float) -> list[str]:
    """Return a note that compares a measured mean with a published mean over several runs, by Welch's t-test."""
    published, found = row.published_spread.get(column), row.metrics.get(column)
    if published is None or row.not_comparable:
        return []
    what = f"{row.name}, {metric_of(column).heading}: the published mean is over {published.n} runs"
    if found is None:
        return [f"{what}."]
    test = welch(found, published)
    if test is None:
        return [f"{what}; Welch's t-test needs at least two measured runs, and values that vary."]
    interval = interval_text(column, test.interval(confidence))
    return [
        f"{what}. Welch's t-test, measured {MINUS} published over {found.n} and {published.n} runs: "
        f"{number(column, test.difference, signed=True, mean=True)}, "
        f"{confidence * 100:g} % interval {interval}, p {p_value(test.p)}."
    ]


def _count(row: ResultRow) -> str:
    done, wanted = len(row.finished), len(row.results)
    return str(done) if done == wanted else f"{done} of {wanted}"


def _notes(found: StudyResults) -> list[str]:
    """Return the notes below the table: finished runs, best row, spread over seeds, sources of published metrics."""
    table, rows, results = found.table, found.rows, [result for row in found.rows for result in row.results]
    finished = sum(result.is_finished for result in results)
    notes = [f"{finished} of {len(results)} runs finished; only these are counted."]
    for best in (row for row in rows if row.is_best):
        so_far = "" if finished == len(results) else " so far"
        notes.append(f"Best{so_far} by {table.output.best_by} (never by a test metric): {best.name}.")
    notes += _about_spread(rows, found.confidence, found.options.intervals)
    if any(_is_compared(found, metric) for metric in found.columns):
        difference = f"; diff.: measured {MINUS} published."
        conditions = f". Not comparable: {table.not_comparable}." if table.not_comparable else difference
        notes.append(f"Published: {table.source or 'see the study'}{conditions}")
    notes += [table.note] if table.note else []
    members = {row.name: row.results[0].member for row in rows}
    for note in dict.fromkeys(member.note for member in members.values() if member.note):
        notes.append(f"{'; '.join(name for name, member in members.items() if member.note == note)}: {note}")
    notes += [f"{name}: published in {m.source}." for name, m in members.items() if m.source not in ("", table.source)]
    notes += [f"{r.title}: {r.state}: {r.failure_reason}" for r in results if r.failure_reason]
    notes += [
        line for row in rows for metric in found.columns for line in _against_several(row, metric, found.confidence)
    ]
    assumed = {
        key: value.partition(": ")[2] for key, value in found.assumptions.items() if value.partition(":")[0] == "ours"
    }
    keys = "; ".join(f"{key} ({note})" if note else key for key, note in assumed.items())
    notes += soup_notes(found.soups, found.soup_faults, found.confidence)
    return [*notes, f"Not stated in the publication, assumed here: {keys}."] if keys else notes


def _about_spread(rows: Sequence[ResultRow], confidence: float, intervals: bool) -> list[str]:
    most = max((len(row.finished) for row in rows), default=0)
    least = min((len(row.finished) for row in rows if row.finished), default=0)
    if most == 0:
        return []
    found = []
    if most > 1:
        what = (
            f"[{confidence * 100:g} % confidence interval, Student's t]"
            if intervals
            else f"± standard deviation (n {MINUS} 1)"
        )
        found.append(f"Mean {what} over the runs of a row.")
    if least == 1:
        which = "Rows with one run" if most > 1 else "One run per row"
        found.append(f"{which}: the spread over seeds is not known, so differences may be due to chance.")
    if any(len({result.member.fold for result in row.finished}) > 1 for row in rows):
        found.append(
            "The runs of a row have different folds. Their training images overlap, so intervals are too narrow and p "
            "values too small (Nadeau and Bengio 2003)."
        )
    return found


# -- records ----------------------------------------------------------------------------------------------------------


def row_records(found: StudyResults) -> list[dict[str, object]]:
    """Return one record per row of the table; accuracies are fractions, and missing metrics are None."""
    soups = {soup.name: soup.content.method for soup in found.soups}
    return [
        _record(row, found.columns) | ({"soup": soups[row.name]} if row.name in soups else {})
        for row in found.shown(found.rows_and_soups)
    ]


def _record(row: ResultRow, columns: Sequence[str]) -> dict[str, object]:
    record: dict[str, object] = {
        "row": row.name,
        "runs": len(row.results),
        "finished": len(row.finished),
        "best": row.is_best,
        "open": row.open,
        **({"not_comparable": row.not_comparable} if row.published and row.not_comparable else {}),
    }
    for column in columns:
        found = row.metrics.get(column)
        low, high = (found.interval if found else None) or (None, None)
        record |= {
            column: found.mean if found else None,
            f"{column}_std": found.std if found else None,
            f"{column}_low": low,
            f"{column}_high": high,
        }
        if column in row.published:
            published = row.published[column]
            record[f"{column}_published"] = published
            record[f"{column}_difference"] = found.mean - published if found and not row.not_comparable else None
        several = row.published_spread.get(column)
        if several is not None:
            test = welch(found, several) if found and not row.not_comparable else None
            record |= {
                f"{column}_published_std": several.std,
                f"{column}_published_n": several.n,
                f"{column}_welch_p": test.p if test else None,
            }
    return record
