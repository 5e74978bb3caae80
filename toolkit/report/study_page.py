"""Content of a study's report page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from toolkit.formatting import duration
from toolkit.metrics import CURVES, best_of, higher_is_better, metric_of
from toolkit.recipe import Recipe
from toolkit.recipe.diagnostics import printable
from toolkit.report.html import (
    HtmlCell,
    HtmlColumn,
    HtmlReport,
    HtmlRow,
    HtmlTable,
    integer,
    name,
    number,
    percent,
    share,
)
from toolkit.report.recipe_section import BASE, OWN, recipe_table
from toolkit.report.run_data import Record
from toolkit.report.run_page import environment_table
from toolkit.runs import Run
from toolkit.study.export_tables import StudyResults
from toolkit.study.results import RunResult
from toolkit.study.results_table import best_row, short_value
from toolkit.study.results_table import title as title_of
from toolkit.study.text_table import BEST, DECLINE, MINUS, TextTable
from toolkit.study.trial_table import search_metric, varied_keys

COLOURS = ("blue", "vermilion", "green", "purple", "orange", "sky", "ink")
DASHES = ("", "6 4", "2 3", "9 3 2 3")
"""Rows use all colors first, then dashes; 28 combinations are distinct."""

SHOWN = 4
"""Maximum number of different values shown for one key."""

SummaryCard = dict[str, str]


@dataclass(frozen=True)
class StudyReportData:
    """Data about a study in addition to its results."""

    path: Path
    recipe: Recipe | None
    """Recipe of one of its runs."""
    origins: Record
    """Origins of the recipe's values in the same run."""
    environments: Sequence[Record]
    """Environments of all runs that recorded one."""
    missing: Sequence[str]
    """What cannot be shown, and why."""


def study_page(
    found: StudyResults, facts: StudyReportData, drawn: Sequence[tuple[str, str]], files: Sequence[str]
) -> HtmlReport:
    """Build the report page of a study. ``drawn`` holds the figures as SVG elements with their descriptions."""
    sheet = found.main
    content = {
        "cards": list(_cards(found)),
        "table": as_table(sheet),
        "notes": [printable(note) for note in sheet.notes],
        "judged": [{**vars(as_table(one)), "notes": [printable(n) for n in one.notes]} for one in found.judged],
        "by_epoch": [{**vars(as_table(one)), "notes": [printable(n) for n in one.notes]} for one in found.by_epoch],
        "charts": [(key.replace("/", "-"), metric_of(key).label.capitalize()) for key in CURVES],
        "drawn": [{"svg": Markup(svg), "label": label} for svg, label in drawn],
        "runs": run_table(found, facts.path),
        "recipe": study_recipe(facts, found.results),
        "environment": environment_table(merged(facts.environments)),
        "path": str(facts.path),
        "figures": files,
    }
    names = ("Summary", "Table", "Curves", *(["Figures"] if drawn else []), "Runs", "Recipe", "Environment", "Files")
    sections = [(section.lower(), section) for section in names]
    data = {"charts": {key.replace("/", "-"): bundle(found, key) for key in CURVES}, "cells": {}}
    return HtmlReport("study.html", title_of(found.table, found.name), _subtitles(found, facts), sections,
                [*facts.missing], data, content)  # fmt: skip


def _subtitles(found: StudyResults, facts: StudyReportData) -> list[str]:
    lines = [f"Source: {found.table.source}"] if found.table.source else []
    return [*lines, f"study {found.name} in {facts.path}"]


def _cards(found: StudyResults) -> Iterator[SummaryCard]:
    """Yield cards with the most important metrics."""
    results, finished = found.results, [result for result in found.results if result.is_finished]
    metric = metric_of(search_metric(found.table)).name
    best = best_row(found.rows, metric)
    if best is not None:
        for figure in dict.fromkeys((metric, metric.replace("val", "test", 1))):
            if (estimate := best.figures.get(figure)) is not None:
                is_share = metric_of(figure).measure.unit == "%"
                value = percent(estimate.mean) if is_share else f"{estimate.mean:.4f}"
                yield {"name": f"best row: {figure.replace('_', ' ')}", "value": value, "hint": best.name}
    rows = f"{len(found.rows)} {'configurations' if found.trials else 'rows'}"
    yield {"name": "runs finished", "value": f"{len(finished)} of {len(results)}", "hint": rows}
    epochs = sum(len(result.epochs) for result in results)
    yield {"name": "epochs trained", "value": f"{epochs:,}", "hint": "in all runs together"}
    seconds = [result.figures["seconds"] for result in finished if "seconds" in result.figures]
    if seconds:
        yield {"name": "training time", "value": duration(sum(seconds)), "hint": "of the finished runs together"}


# -- tables -----------------------------------------------------------------------------------------------------------


def as_table(sheet: TextTable) -> HtmlTable:
    """Convert a text table of the study to a sortable HTML table."""
    columns = [HtmlColumn(head, index not in sheet.left) for index, head in enumerate(sheet.head)]
    rows = []
    for index, cells in enumerate(sheet.rows):
        shown = [_cell(text, is_number=i not in sheet.left) for i, text in enumerate(cells)]
        rows.append(HtmlRow(shown, "best" if index in sheet.marked else ""))
    return HtmlTable(columns, rows, printable(sheet.title))


def _cell(text: str, *, is_number: bool) -> HtmlCell:
    text = printable(text)
    found = (
        re.match(r"[+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?", text.lstrip(f"{BEST}{DECLINE} ").replace(MINUS, "-"))
        if is_number
        else None
    )
    return HtmlCell(text, float(found[0].replace(",", "")) if found else None, name=not is_number)


def run_table(found: StudyResults, folder: Path) -> HtmlTable:
    """Return a table with one row per run: progress, results and a link to its report."""
    metric = search_metric(found.table)
    is_share = metric_of(metric).measure.unit == "%"
    columns = [HtmlColumn("row"), HtmlColumn("seed", True), HtmlColumn("state"), HtmlColumn("epochs", True)]
    columns += [
        HtmlColumn(f"best {metric}", True),
        HtmlColumn("test accuracy", True),
        HtmlColumn("training time, s", True),
    ]
    columns += [HtmlColumn("run")]
    rows = []
    for result in found.results:
        best = best_of(result.values(metric), metric)
        cells = [
            name(result.member.row),
            integer(result.member.seed),
            HtmlCell(result.state),
            integer(len(result.epochs)),
        ]
        cells += [share(best) if is_share else number(best), share(result.figures.get("test_accuracy"))]
        cells += [number(result.figures.get("seconds"), ".1f"), _link(result, folder)]
        rows.append(HtmlRow(cells, result.state))
    states = dict.fromkeys(result.state for result in found.results)
    buttons = [("all", ""), *((state, state) for state in states)] if len(states) > 1 else []
    return HtmlTable(columns, rows, buttons=buttons)


def _link(result: RunResult, folder: Path) -> HtmlCell:
    run = result.member.run
    if run is None:
        return HtmlCell("-")
    report = Run(folder / run).report_file
    return HtmlCell(run, link=quote(f"{run}/{report.name}") if report.exists() else "", name=True)


def study_recipe(facts: StudyReportData, results: Sequence[RunResult]) -> HtmlTable:
    """Return the recipe shared by all runs, with the varied keys highlighted and their values."""
    if facts.recipe is None:
        return HtmlTable([], [])
    values: dict[str, list[str]] = {}
    for result in results:
        for key, value in {**result.member.changes, "recipe.seed": result.member.seed}.items():
            text = short_value(value)
            if text not in values.setdefault(key, []):
                values[key].append(text)
    varied = [key for key in ("recipe.seed", *varied_keys(results)) if len(values.get(key, ())) > 1]
    table = recipe_table(facts.recipe, dict(facts.origins))
    rows = [_marked(row, values, varied) for row in table.rows]
    text = "Highlighted: keys that vary between runs, with their values. All others are from the first readable run."
    return HtmlTable(
        table.columns, rows, text, [("all", ""), ("varies", OWN), ("differs from the defaults", f"{OWN} {BASE}")]
    )


def _marked(row: HtmlRow, values: Mapping[str, Sequence[str]], varied: Sequence[str]) -> HtmlRow:
    key = row.cells[0].text
    if key not in varied:
        return HtmlRow(row.cells, BASE if row.kind in (OWN, BASE) else row.kind)
    some = ", ".join(values[key][:SHOWN]) + (f", ... ({len(values[key])} values)" if len(values[key]) > SHOWN else "")
    return HtmlRow([row.cells[0], HtmlCell(printable(some), name=True, code=True), *row.cells[2:]], OWN)


def merged(environments: Sequence[Record]) -> Record:
    """Merge the runs' environments; entries that differ list the different values."""
    flat: dict[str, list[str]] = {}
    for environment in environments:
        for key, value in environment.items():
            for inner, item in value.items() if isinstance(value, dict) else [("", value)]:
                text = "-" if item is None else str(item)
                known = flat.setdefault(f"{key} {inner}".strip(), [])
                known += [text] if text not in known else []
    return {key: _listed(values) for key, values in flat.items()}


def _listed(values: Sequence[str]) -> str:
    return " | ".join(values[:SHOWN]) + (f" | ... ({len(values)} values)" if len(values) > SHOWN else "")


# -- curves -----------------------------------------------------------------------------------------------------------


def bundle(found: StudyResults, metric: str) -> dict[str, Any]:
    """Return the curves of all runs for the page's script."""
    scale = metric_of(metric).measure.scale
    rows = list(dict.fromkeys(result.member.row for result in found.results))
    series = []
    for result in found.results:
        points = [(r["epoch"], float(f"{r[metric] * scale:.5g}")) for r in result.epochs if metric in r]
        if not points:
            continue
        index = rows.index(result.member.row)
        row = printable(result.member.row)
        series.append({
            "name": f"{row}, seed {result.member.seed}", "group": row,
            "x": [x for x, _ in points], "y": [y for _, y in points],
            "colour": f"var(--{COLOURS[index % len(COLOURS)]})", "dash": DASHES[index // len(COLOURS) % len(DASHES)],
        })  # fmt: skip
    return {"xLabel": "epoch", "whole": True, "yLabel": metric_of(metric).axis_label, "series": series, "many": True,
            "canLog": not higher_is_better(metric)}  # fmt: skip
