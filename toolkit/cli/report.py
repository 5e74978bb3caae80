"""The report command: figures and an HTML file for a run or a study. Imports torch only if needed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, DataRoot, RunOrStudyPath, output
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.report.run_report import ReportResult


@command
def report(
    path: RunOrStudyPath,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", parser=output, help="HTML file. Default: report.html in the folder."
        ),
    ] = None,
    figures_only: Annotated[bool, typer.Option("--figures-only", help="Write only the figures for print.")] = False,
    data_root: DataRoot = None,
    filters: Annotated[
        str | None,
        typer.Option(help="RUN: numbers of first-layer filters to apply to an image, such as 3,17.", metavar="NUMBERS"),
    ] = None,
    runs: Annotated[bool, typer.Option("--runs", help="STUDY: also write the reports of all its runs.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Also create a W&B report and print its link.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run or a study.

    Writes figures for print (SVG and PDF) to its folder figures/, and one HTML file that needs no network. Missing or
    damaged files are listed; everything else is shown.

    Example: toolkit report runs/quickstart/20260102-030405-abcd
    """
    numbers = _numbers(filters)
    if wandb:
        from toolkit.report.wandb_report import open_library

        open_library()  # raises now, not after the figures were drawn
    if _is_study(path):
        if filters is not None:
            raise UserError("--filters is for runs: specify one of the study's run directories")
        from toolkit.report.study_report import read_study, write_study_report

        found = read_study(path)
        written = write_study_report(
            found, path, out, figures_only=figures_only, runs=runs, data_root=data_root, log=_log
        )
        if wandb:
            from toolkit.report.wandb_report import create_wandb_report

            url, missing = create_wandb_report(found, path)
            written = replace(written, missing=[*written.missing, *missing], url=url)
    else:
        if runs:
            raise UserError(f"--runs is for studies; {path} is a run directory")
        from toolkit.report.run_report import write_report
        from toolkit.runs import Run

        written = write_report(
            Run(path), out, figures_only=figures_only, data_root=data_root, filters=numbers, log=_log
        )
        if wandb:
            from toolkit.report.wandb_run_report import create_wandb_run_report

            written = replace(written, url=create_wandb_run_report(Run(path)))
    _print_result(written, as_json)


def _log(line: str) -> None:
    print(line, file=sys.stderr)


def _is_study(path: Path) -> bool:
    """Return True for a study's folder, False for a run directory. Raises UserError for anything else."""
    from toolkit.study.directory import FILE

    if (path / FILE).is_file():
        return True
    if (path / "recipe.toml").is_file():
        return False
    within = sorted(path.glob("*/recipe.toml"), reverse=True) if path.is_dir() else []
    hint = f"; it has run directories, the newest is {within[0].parent}" if within else ""
    raise UserError(f"{path} is not a run directory (no recipe.toml) or a study's folder (no {FILE}){hint}")


def _print_result(written: ReportResult, as_json: bool) -> None:
    """Print the files to stdout, and what could not be shown to stderr."""
    for line in written.missing:
        print(f"not shown: {line}", file=sys.stderr)
    if as_json:
        figures = [str(file) for file in written.figures]
        report = None if written.report is None else str(written.report)
        content = {"report": report, "figures": figures, "missing": written.missing, "wandb": written.url or None}
        print(json.dumps(content, indent=2))
        return
    for file in (*written.figures, *filter(None, (written.report, written.url))):
        print(file)


def _numbers(text: str | None) -> list[int]:
    """Parse integers separated by commas."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--filters {text!r}: give filter numbers separated by commas, such as 3,17")
    return [int(part) for part in parts]
