"""report: what a run or a study came to, as figures and as one HTML file. Does not import torch without need."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.errors import EXIT_OK, UserError
from toolkit.train import AsJson, Debug, end, report_errors

if TYPE_CHECKING:
    from toolkit.report.write import Written


def report(
    path: Annotated[Path, typer.Argument(metavar="RUN|STUDY", help="Run directory, or folder of a study.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file; report.html in the folder by default.")
    ] = None,
    figures_only: Annotated[bool, typer.Option("--figures-only", help="Only the figures for print.")] = False,
    data_root: Annotated[
        str | None, typer.Option(help="Where the images are, if not where the recipe says.", metavar="FOLDER")
    ] = None,
    filters: Annotated[
        str | None, typer.Option(help="First-layer filters to show on an image, by number: 3,17.", metavar="NUMBERS")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Draw a run or a study.

    Figures for print as SVG and PDF in its folder figures/, and everything in one HTML file that needs no network. What
    the folder lacks is named, and the rest is shown.

    Example: toolkit report runs/quickstart/20260102-030405-abcd
    """

    def work() -> int:
        from toolkit.report.write import write_report
        from toolkit.runs import open_run

        written = write_report(
            open_run(path),
            output,
            figures_only=figures_only,
            data_root=data_root,
            filters=_numbers(filters),
            say=lambda line: print(line, file=sys.stderr),
        )
        _tell(written, as_json)
        return EXIT_OK

    end(report_errors(work, debug=debug))


def _tell(written: Written, as_json: bool) -> None:
    """The files on stdout; what could not be shown on stderr."""
    for line in written.missing:
        print(f"not shown: {line}", file=sys.stderr)
    if as_json:
        figures = [str(file) for file in written.figures]
        report = None if written.report is None else str(written.report)
        print(json.dumps({"report": report, "figures": figures, "missing": written.missing}, indent=2))
        return
    for file in (*written.figures, *([written.report] if written.report else [])):
        print(file)


def _numbers(text: str | None) -> list[int]:
    """Whole numbers by comma."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--filters {text!r}: give numbers of filters by comma, such as 3,17")
    return [int(part) for part in parts]
