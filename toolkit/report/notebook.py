"""The display of runs and studies in notebooks: state, metrics and learning curves, as HTML without scripts."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING

from markupsafe import Markup

from toolkit.errors import UserError
from toolkit.report.html import HtmlCell, HtmlRow, HtmlTable, render
from toolkit.report.learning_curves import learning_curves
from toolkit.report.plot_style import page_svg, plot_style
from toolkit.report.run_data import RunData, load_progress
from toolkit.report.run_page import models_table
from toolkit.report.study_report import html_table
from toolkit.study.export_tables import main_table
from toolkit.study.plots import curves_by_parameter, row_curves
from toolkit.study.study_results import StudyResults

if TYPE_CHECKING:
    from toolkit.runs import Run
    from toolkit.studies import Study

SIZE = (4.0, 2.8)
"""Width and height of a learning curve in inches: two of them fit side by side."""
MAX_ROWS = 30
"""Maximum number of rows in a table."""

Drawing = tuple[Markup, bool]
"""An SVG element, and whether it needs a white background."""


def run_html(run: Run) -> str:
    """Render a run as HTML: name, state, metrics of the best and the last epoch, learning curves."""
    data = load_progress(run)
    table = data.try_load("the metrics", lambda: _transposed(models_table(data))) if data.epochs else None
    figures = data.try_load("the learning curves", lambda: _run_figures(data)) if data.epochs else None
    description = [data.recipe.recipe.description] if data.recipe and data.recipe.recipe.description else []
    lines = [*description, f"run {run.path}: {data.state}"]
    return _html(data.name, lines, data.missing, table, figures or [])


def study_html(study: Study) -> str:
    """Render a study as HTML: title, states of its runs, results table, curves of its metric."""
    try:
        found = study.results
        name = found.title
    except UserError as error:
        return _html(study.path.name, [f"study {study.path}"], [str(error)], None, [])
    counts = Counter(result.state for result in found.results)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    lines = [f"study {study.path}: {len(found.results)} runs, {states}"]
    return _html(name, lines, [], html_table(main_table(found)), _study_figures(found))


def _transposed(table: HtmlTable) -> HtmlTable:
    """Return the transposed table, with one row per column of ``table``, which is narrow enough for a notebook."""
    head, *rows = zip(*(row.cells for row in table.rows), strict=True)
    shown = [HtmlRow([HtmlCell(name), *cells]) for name, cells in zip(table.head[1:], rows, strict=True)]
    return HtmlTable(["", *(cell.text for cell in head)], shown, range(1, len(head) + 1))


def _html(title: str, lines: list[str], missing: list[str], table: HtmlTable | None, figures: list[Drawing]) -> str:
    content = {"title": title, "lines": lines, "missing": missing, "table": table, "figures": figures}
    return render("notebook.html", max_rows=MAX_ROWS, **content)


def _run_figures(data: RunData) -> list[Drawing]:
    with plot_style(warnings.warn):
        return [
            (Markup(page_svg(learning_curves(data, metric, SIZE), f"{metric} by epoch")), False)
            for metric in ("loss", "map" if data.is_multi_label else "accuracy")
        ]


def _study_figures(found: StudyResults) -> list[Drawing]:
    """Draw the curves of the study's metric, by row or, in a search, for all runs by the first varied key."""
    with plot_style(warnings.warn):
        drawn = curves_by_parameter(found) if found.trials else row_curves(found)
        name = f"curves-{found.table.metric.replace('/', '-')}"
        chosen = next((each for each in drawn if found.trials or each.name == name), None)
        if chosen is None:
            return []
        svg = page_svg(chosen.figure, chosen.caption, is_light=chosen.has_color_scale)
        return [(Markup(svg), chosen.has_color_scale)]
