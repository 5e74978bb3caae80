"""The results of `toolkit probe`: a table as text, a report page, and the recipe of the first row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from toolkit.probe.compare import SPEED_BATCH, Row
from toolkit.probe.recipes import ProbedData
from toolkit.report.html import HtmlCell, HtmlRow, HtmlTable, integer, name, percent, share, write_page
from toolkit.training.console import table
from toolkit.writing import write_atomically

PAGE, RECIPE, JSON = "probe.html", "best.toml", "probe.json"
HEAD = ("backbone", "test", "95 % interval", "validation", "head", "parameters", "images/s", "memory", "license")
NUMBERS = frozenset((1, 2, 3, 5, 6, 7))


def results_text(rows: Sequence[Row]) -> str:
    """Return the table as text, and a line for each backbone that could not be compared."""
    lines = [tuple(cell.text for cell in _cells(row)) for row in rows if not row.failure]
    failures = [f"{row.backbone.label}: {row.failure}" for row in rows if row.failure]
    return "\n".join([table(lines, HEAD, NUMBERS), *(["", "not compared:", *failures] if failures else [])])


def write_results(folder: Path, data: ProbedData, rows: Sequence[Row]) -> list[Path]:
    """Write page, JSON and the first row's recipe; return their paths. Raises UserError if one cannot be written."""
    page = HtmlTable(
        HEAD,
        [HtmlRow(_cells(row)) for row in rows if not row.failure],
        NUMBERS,
        "Backbones, the highest validation accuracy first",
        notes=[f"{row.backbone.label}: {row.failure}" for row in rows if row.failure],
    )
    kinds = sorted({kind for row in rows for kind in row.validation})
    heads = HtmlTable(
        ["backbone", *kinds],
        [HtmlRow([name(r.backbone.label), *(share(r.validation[k]) for k in kinds)]) for r in rows if not r.failure],
        range(1, 1 + len(kinds)),
        "Validation accuracy of each kind of head",
    )
    files = [folder / PAGE, folder / RECIPE, folder / JSON]
    write_page(
        files[0], "probe.html", {}, title=f"Backbones on {data.name}", subtitles=[], missing=[],
        table=page, heads=heads,
        recipe=rows[0].recipe, winner=rows[0].backbone.label, recipe_file=RECIPE, batch=SPEED_BATCH,
    )  # fmt: skip
    write_atomically(files[1], rows[0].recipe.encode())
    write_atomically(files[2], (json.dumps([row.to_json() for row in rows], indent=2) + "\n").encode())
    return files


def _cells(row: Row) -> list[HtmlCell]:
    interval = "-" if row.interval is None else f"{100 * row.interval[0]:.1f} to {percent(row.interval[1], 1)}"
    memory = HtmlCell("-") if row.memory_gib is None else HtmlCell(f"{row.memory_gib:.2f} GiB", row.memory_gib)
    return [
        name(row.backbone.label),
        share(row.accuracy),
        HtmlCell(interval, None if row.interval is None else row.interval[0]),
        share(row.val_accuracy),
        HtmlCell(row.head),
        integer(row.parameters),
        HtmlCell(f"{row.images_per_s:,.0f}", row.images_per_s),
        memory,
        HtmlCell(row.license + (" (non-commercial)" if row.is_non_commercial else "")),
    ]
