"""Write a study's figures for print and its report as one HTML file, from the study's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from toolkit.errors import UserError
from toolkit.report.plot_style import CYCLE, page_svg, plot_style, save
from toolkit.report.run_data import DAMAGE
from toolkit.report.run_report import ReportResult, write_report
from toolkit.report.study_page import write_study_page
from toolkit.runs import Run
from toolkit.study.directory import FILE, StudyDirectory
from toolkit.study.export_tables import StudyResults, TableOptions, read_outcomes
from toolkit.study.plots import study_figures

LABELS = {
    "curves-train-loss": "Training loss by epoch",
    "curves-train-accuracy": "Training accuracy by epoch",
    "curves-val-loss": "Validation loss by epoch",
    "curves-val-accuracy": "Validation accuracy by epoch",
    "best-so-far": "Best value found against the epochs trained",
    "parallel-coordinates": "Parameters and result of each run",
    "importance": "Importance of the parameters",
}
"""Captions of figures on the page."""


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
        for name, figure in study_figures(found):
            if not figures_only:
                drawn.append((page_svg(figure, _label(name), is_light=_has_scale(found, name)), _label(name)))
            files += save(figure, folder / "figures", name)
    # Failed runs are also named in the notes below the table.
    missing = [f"{r.member.row}, seed {r.member.seed}: {r.trouble}" for r in found.results if r.trouble]
    if figures_only:
        return ReportResult(None, files, missing)
    page = write_study_page(output or folder / "report.html", found, folder, drawn, files, missing)
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


def _label(name: str) -> str:
    """Return the accessible description of a figure."""
    if name.startswith("curves-by-"):
        return f"Curves of all runs by {name.removeprefix('curves-by-')}"
    return LABELS.get(name) or f"Best epoch against {name.removeprefix('levels-')}"


def _has_scale(found: StudyResults, name: str) -> bool:
    """Whether the figure uses a color scale from light to dark, which needs a white background."""
    is_scale = name.startswith(("curves-by-", "parallel-"))
    return is_scale or (name.startswith("curves-") and len(found.rows) > len(CYCLE))


def _write_runs(found: StudyResults, folder: Path, data_root: Path | None, log: Callable[[str], None]) -> None:
    members = dict.fromkeys(result.member.run for result in found.results if result.epochs and result.member.run)
    for number, run in enumerate(members, 1):
        log(f"run {number} of {len(members)}: {folder / run}")
        for line in write_report(Run(folder / run), data_root=data_root, log=log).missing:
            log(f"not shown: {line}")
