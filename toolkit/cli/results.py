"""The table command: results of a study. Does not import torch."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, output
from toolkit.errors import UserError


@command
def table(
    studies: Annotated[
        list[Path],
        typer.Argument(metavar="STUDY...", help="Folder of a study. With several: compare all with publications."),
    ],
    columns: Annotated[
        str | None, typer.Option(metavar="METRICS", help="Metrics separated by commas, such as val_loss,test_accuracy.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="KEYS", help="Recipe keys separated by commas; one row for each of their values."),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(metavar="ROW ROW", help="Compare two rows over the same seeds and folds.")
    ] = None,
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Show confidence intervals instead of standard deviations.")
    ] = False,
    sort: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Sort the rows by a metric, such as val_accuracy, best first.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Show only the N best rows by --sort or output.best_by.")
    ] = None,
    out_of_fold: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=output,
            help="Also write the test predictions of all folds, one per image, to a CSV file.",
        ),
    ] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Also draw figures, SVG and PDF.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a study's results table.

    Shows mean and standard deviation over seeds and folds next to published metrics, and marks the best row by
    validation. Also writes table.csv, table.md, table.tex and runs.csv to the folder. With several studies, prints the
    agreement of all their rows with the published metrics, and the verdicts on all their claims.

    Example: toolkit table runs/giunta-dropout
    """
    from toolkit.study.directory import StudyDirectory
    from toolkit.study.export_tables import overall, terminal_text, to_json, write_tables
    from toolkit.study.study_results import TableOptions, read_outcomes
    from toolkit.study.text_table import text

    options = TableOptions(_split_list(columns), _split_list(by), compare, intervals, sort, top)
    if len(studies) > 1:
        if by or compare or intervals or sort or top or figures or out_of_fold:
            raise UserError("with several studies, only --columns and --json are possible: there is no table of rows")
        tables, content = overall([read_outcomes(StudyDirectory(study), options) for study in studies], options.columns)
        shown = "\n\n".join(text(part) for part in tables) or "no two rows can be compared with published metrics"
        print(json.dumps(content, indent=2, ensure_ascii=False) if as_json else shown)
        return
    (study,) = studies
    found = read_outcomes(StudyDirectory(study), options)
    print(json.dumps(to_json(found), indent=2, ensure_ascii=False) if as_json else terminal_text(found))
    try:
        write_tables(replace(found, options=replace(options, sort=None, top=None)), study)  # the files hold all rows
    except UserError as error:  # a study in a read-only folder can still be printed
        print(f"warning: {error}", file=sys.stderr)
    if out_of_fold is not None:
        from toolkit.study.out_of_fold import write_out_of_fold

        print(f"{out_of_fold}: {write_out_of_fold(StudyDirectory(study), out_of_fold):,} predictions", file=sys.stderr)
    if figures:
        from toolkit.study.plots import draw

        for path in draw(found, study / "figures", lambda line: print(line, file=sys.stderr)):
            print(path, file=sys.stderr)


def _split_list(text: str | None) -> list[str]:
    """Split a comma-separated list."""
    return [] if text is None else [part.strip() for part in text.split(",") if part.strip()]
