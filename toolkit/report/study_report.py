"""Write a study's figures (for print) and its report (one HTML file), from the study's folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from toolkit.errors import UserError
from toolkit.formatting import duration
from toolkit.metrics import curves_of, headline, higher_is_better, metric_of
from toolkit.report.html import HtmlCell, HtmlRow, HtmlTable, integer, metric_cell, name, write_page
from toolkit.report.learning_curves import points
from toolkit.report.plot_style import page_svg, plot_style, save
from toolkit.report.recipe_table import environment_table, recipe_table
from toolkit.report.run_data import DAMAGE, Record, try_load
from toolkit.report.run_page import SummaryCard
from toolkit.report.run_report import ReportResult, write_report
from toolkit.runs import Run
from toolkit.study.directory import FILE, FOLD, StudyDirectory
from toolkit.study.epoch_tables import build_epoch_tables
from toolkit.study.export_tables import agreement, judged_tables, main_table
from toolkit.study.plots import study_figures
from toolkit.study.results import RunResult, best_row, short_value, varied_keys
from toolkit.study.study_results import StudyResults, TableOptions, read_outcomes
from toolkit.study.text_table import BEST, DECLINE, MINUS, TextTable

COLORS = ("blue", "vermilion", "green", "purple", "orange", "sky", "ink")
DASHES = ("", "6 4", "2 3", "9 3 2 3")
"""Line styles of rows, which vary after the colors; there are 28 combinations."""


def write_study_report(
    found: StudyResults,
    folder: Path,
    output: Path | None = None,
    *,
    figures_only: bool = False,
    runs: bool = False,
    data_root: Path | None = None,
    log: Callable[[str], None],
) -> ReportResult:
    """Write a study's figures, and its page to ``output`` (by default report.html in the study's folder).

    With ``runs``, first write the report of each run with a finished epoch; ``data_root`` overrides the recipe's
    location of their images. Raises UserError if the files cannot be written.
    """
    if runs:
        _write_runs(found, folder, data_root, log)
    drawn: list[tuple[str, str]] = []
    files: list[Path] = []
    with plot_style(log):
        for name, figure, caption, has_color_scale in study_figures(found):
            if not figures_only:
                drawn.append((page_svg(figure, caption, is_light=has_color_scale), caption))
            files += save(figure, folder / "figures", name)
    # Failed runs are also named in the notes below the table.
    missing = [f"{r.title}: {r.failure_reason}" for r in found.results if r.failure_reason]
    if figures_only:
        return ReportResult(None, files, missing)
    page = _write_page(output or folder / "report.html", found, folder, drawn, files, missing)
    return ReportResult(page, files, missing)


def read_study(folder: Path) -> StudyResults:
    """Read a study's results so far. Raises UserError if none of its runs has a finished epoch."""
    try:
        found = read_outcomes(StudyDirectory(folder), TableOptions())
    except DAMAGE as error:
        raise UserError(f"{folder / FILE} is damaged ({type(error).__name__}: {error})") from None
    if not any(result.epochs for result in found.results):
        raise UserError(
            f"no run of the study in {folder} has a finished epoch, so there is nothing to report; "
            f"toolkit status {folder} shows their progress"
        )
    return found


def _write_runs(found: StudyResults, folder: Path, data_root: Path | None, log: Callable[[str], None]) -> None:
    members = dict.fromkeys(result.member.run for result in found.results if result.epochs and result.member.run)
    for number, run in enumerate(members, 1):
        log(f"run {number} of {len(members)}: {folder / run}")
        for line in write_report(Run(folder / run), data_root=data_root, log=log).missing:
            log(f"not shown: {line}")


# -- page -------------------------------------------------------------------------------------------------------------


def _write_page(
    path: Path,
    found: StudyResults,
    folder: Path,
    drawn: Sequence[tuple[str, str]],
    files: Sequence[Path],
    missing: list[str],
) -> Path:
    """Write the report page of the study in ``folder``.

    ``drawn`` holds figures as SVG elements with their captions, ``files`` the figures for print. Messages about what
    cannot be shown are added to ``missing``.
    """
    started = dict.fromkeys(r.member.run for r in found.results if r.member.run and (r.epochs or r.is_finished))
    runs = [Run(folder / name) for name in started]
    environments = _environments(runs, missing)
    curves = curves_of(record for result in found.results for record in result.epochs)
    return write_page(
        path,
        "study.html",
        {"charts": {key.replace("/", "-"): _chart(found, key) for key in curves}},
        title=found.title,
        subtitles=[
            *([f"Source: {found.table.source}"] if found.table.source else []),
            f"study {found.name} in {folder}",
        ],
        recipe=_recipe(found.results, runs, missing),
        missing=missing,
        cards=list(_cards(found)),
        table=html_table(main_table(found)),
        judged=[html_table(table) for table in judged_tables(agreement(found), found.claims, found.confidence)],
        by_epoch=[html_table(table) for table in build_epoch_tables(found)],
        charts=[(key.replace("/", "-"), metric_of(key).title) for key in curves],
        drawn=[(Markup(svg), caption) for svg, caption in drawn],
        runs=_run_table(found, folder),
        environment=environment_table(environments),
        folder=folder,
        files=[file.name for file in files],
    )


def _cards(found: StudyResults) -> Iterator[SummaryCard]:
    """Yield the summary cards of a study: its best row and its costs."""
    results, finished = found.results, [result for result in found.results if result.is_finished]
    metric = metric_of(found.table.metric).name
    best = best_row(found.rows, metric)
    for key in dict.fromkeys((metric, metric.replace("val", "test", 1))):
        if best is not None and (estimate := best.metrics.get(key)) is not None:
            value = metric_cell(metric_of(key), estimate.mean).text
            yield f"best row: {key.replace('_', ' ')}", value, best.name
    rows = f"{len(found.rows)} {'configurations' if found.trials else 'rows'}"
    yield "runs finished", f"{len(finished)} of {len(results)}", rows
    yield "epochs trained", f"{sum(len(result.epochs) for result in results):,}", "total of all runs"
    if seconds := [result.metrics["seconds"] for result in finished if "seconds" in result.metrics]:
        yield "training time", duration(sum(seconds)), "total of the finished runs"


# -- tables -----------------------------------------------------------------------------------------------------------


def html_table(table: TextTable) -> HtmlTable:
    """Convert a text table of the study to a sortable HTML table."""
    numbers = [index for index in range(len(table.head)) if index not in table.left]
    rows = [
        HtmlRow([_cell(text) if i in numbers else name(text) for i, text in enumerate(cells)],
                "best" if index in table.marked else "")
        for index, cells in enumerate(table.rows)
    ]  # fmt: skip
    return HtmlTable(table.head, rows, numbers, table.title, notes=table.notes)


def _cell(text: str) -> HtmlCell:
    """Return a cell with a formatted number, sorted by the number's value."""
    number = re.match(r"[+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?", text.lstrip(f"{BEST}{DECLINE} ").replace(MINUS, "-"))
    return HtmlCell(text, float(number[0].replace(",", "")) if number else None)


def _run_table(found: StudyResults, folder: Path) -> HtmlTable:
    """Return a table with one row per run: progress, results and a link to its report."""
    metric, rows = found.table.metric, []
    test = headline({key for result in found.results for key in result.metrics}, "test_")
    for result in found.results:
        cells = [
            name(result.member.row + ("" if result.member.fold is None else f", fold {result.member.fold}")),
            integer(result.member.seed),
            HtmlCell(result.state),
            integer(len(result.epochs)),
            metric_cell(metric_of(metric), result.best(metric)),
            *(metric_cell(metric_of(key), result.metrics.get(key)) for key in (test, "seconds")),
            _link(result, folder),
        ]
        rows.append(HtmlRow(cells, result.state))
    states = dict.fromkeys(result.state for result in found.results)
    buttons = [("all", ""), *((state, state) for state in states)] if len(states) > 1 else []
    head = ["row", "seed", "state", "epochs", f"best {metric}", metric_of(test).label, "training time, s", "run"]
    return HtmlTable(head, rows, (1, 3, 4, 5, 6), buttons=buttons)


def _link(result: RunResult, folder: Path) -> HtmlCell:
    run = result.member.run
    if run is None:
        return HtmlCell("-")
    report = Run(folder / run).report_file
    return HtmlCell(run, kind="name", link=quote(f"{run}/{report.name}") if report.exists() else "")


def _recipe(results: Sequence[RunResult], runs: Sequence[Run], missing: list[str]) -> HtmlTable | None:
    """Return the table of the recipe shared by all runs, highlighting the varied keys; None if it cannot be read."""
    first = next((run for run in runs if (run.path / "recipe.toml").exists()), None)
    if first is None:
        missing.append("the recipe: no run has a recipe.toml")
        return None
    recipe = try_load(missing, f"the recipe of {first.id}", lambda: first.recipe)
    origins = try_load(missing, f"the origins of {first.id}'s values", lambda: first.origins) or {}
    if recipe is None:
        return None
    values: dict[str, dict[str, None]] = {}
    for result in results:
        for key, value in {**result.member.changes, "recipe.seed": result.member.seed}.items():
            values.setdefault(key, {})[short_value(value)] = None
    keys = ("recipe.seed", FOLD, *varied_keys(results))
    varied = {key: [*values[key]] for key in keys if len(values.get(key, ())) > 1}
    return recipe_table(recipe, origins, varied)


def _environments(runs: Sequence[Run], missing: list[str]) -> list[Record]:
    """Return the environments that can be read."""
    reasons: list[str] = []
    found = [try_load(reasons, run.id, lambda run=run: run.environment) for run in runs]  # type: ignore[misc]
    if reasons:
        missing.append(f"the environment of {len(reasons)} of {len(runs)} runs; {reasons[0]}")
    return [environment for environment in found if environment is not None]


# -- curves -----------------------------------------------------------------------------------------------------------


def _chart(found: StudyResults, metric: str) -> dict[str, Any]:
    """Return the curves of all runs for the page's script."""
    rows = list(dict.fromkeys(result.member.row for result in found.results))
    series = []
    for result in found.results:
        xs, ys = points(result.epochs, metric, metric_of(metric).measure.scale)
        if xs:
            index = rows.index(result.member.row)
            color, dash = COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]
            series.append({
                "name": result.title, "group": result.member.row, "x": xs,
                "y": [float(f"{y:.5g}") for y in ys], "color": f"var(--{color})", "dash": dash,
            })  # fmt: skip
    label, can_log = metric_of(metric).axis_label, not higher_is_better(metric)
    return {"xLabel": "epoch", "integerTicks": True, "yLabel": label, "series": series, "many": True, "canLog": can_log}
