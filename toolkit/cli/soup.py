"""The soup command: averages of the weights of a study's runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson
from toolkit.distributed.launcher import is_distributed
from toolkit.errors import UserError


@command
def soup(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of a study.")],
    row: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW", help="Average only the runs of this row of the table; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Average the weights of a study's finished runs.

    These are the model soups of Wortsman et al. (2022). Writes a uniform soup of all runs and a greedy one, which is
    never worse on validation than its best member, to soup/uniform and soup/greedy in the study's folder, and prints
    their comparison with the best run on the test images. All commands for runs accept these folders, and
    `toolkit table` shows them below the study's rows.

    Example: toolkit soup runs/giunta-dropout
    """
    from toolkit.study.directory import StudyDirectory
    from toolkit.study.soup_results import read_soups, soup_notes, soup_record

    if is_distributed():
        raise UserError("toolkit soup evaluates in one process: run it without a launcher")
    folder = StudyDirectory(study)
    confidence = folder.table.output.confidence
    from toolkit.study.soup import make_soups  # imports torch, so only after the check that the folder is a study

    make_soups(folder, row or [], lambda line: print(line, file=sys.stderr))
    soups, faults = read_soups(folder)
    if as_json:
        print(json.dumps([soup_record(each, confidence) for each in soups], indent=2, ensure_ascii=False))
        return
    for note in soup_notes(soups, faults, confidence)[1:]:
        print(note)
    for each in soups:
        print(study / "soup" / each.content.method)
