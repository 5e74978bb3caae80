"""The runs of an array as a table: one row a run, and for each recipe mean and spread over its seeds."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

from toolkit.runs import Run, read_json, write_atomically
from toolkit.slurm.job import queue, state_of

FIGURES = ("val_accuracy", "test_accuracy", "test_class_accuracy", "test_loss")
"""Of the best epoch, in summary.json."""
OTHERS = ("epochs_run", "seconds")


def write_table(folder: Path) -> Path:
    """Write table.csv and table.md from the runs of ``folder``/runs.json; failed and open runs are rows too."""
    jobs = queue()
    rows = [_row(item, jobs) for item in read_json(folder / "runs.json")["runs"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "table.csv", text.getvalue().encode())
    path = folder / "table.md"
    write_atomically(path, _markdown(rows, folder.name).encode())
    return path


def _row(item: dict[str, Any], jobs: Any) -> dict[str, Any]:
    run = Run(Path(item["run"]))
    state = state_of(run, jobs)
    best: dict[str, Any] = run.summary.get("best", {}) if run.is_finished else {}
    summary = run.summary if run.is_finished else {}
    return {
        "recipe": item["name"],
        "seed": item["seed"],
        "state": state.state,
        "best_epoch": best.get("epoch", ""),
        **{name: best.get(name, "") for name in FIGURES},
        **{name: summary.get(name, "") for name in OTHERS},
        "run": item["run"],
        "message": "" if run.is_finished else state.detail,
    }


def _markdown(rows: list[dict[str, Any]], title: str) -> str:
    finished = [row for row in rows if row["state"] == "finished"]
    lines = [f"# {title}", "", f"{len(finished)} of {len(rows)} runs finished.", ""]
    shown = [name for name in rows[0] if name not in ("run", "message")]
    lines += _table(shown, [[_cell(row[name]) for name in shown] for row in rows])
    lines += ["", "Mean and standard deviation over the seeds of each recipe, and their number:", ""]
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    lines += _table(
        ["recipe", "runs", *FIGURES],
        [[name, *_spread([row for row in finished if row["recipe"] == name])] for name in recipes],
    )
    failed = [row for row in rows if row["message"]]
    if failed:
        lines += [
            "",
            "Not finished:",
            "",
            *(f"- {row['recipe']}, seed {row['seed']}: {row['message']}" for row in failed),
        ]
    return "\n".join([*lines, ""])


def _message(row: dict[str, Any]) -> str:
    return f"- {row['recipe']}, seed {row['seed']}: {row['message']}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def _spread(rows: list[dict[str, Any]]) -> list[str]:
    cells = [str(len(rows))]
    for name in FIGURES:
        values = [float(row[name]) for row in rows if row[name] != ""]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.4f}{spread}" if values else "-")
    return cells


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value) if value != "" else "-"
