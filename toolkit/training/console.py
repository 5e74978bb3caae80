"""Console output of a run: messages on stderr and in log.txt, and a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.filenames import escape_control_characters
from toolkit.formatting import duration
from toolkit.metrics import headline, metric_of

NOTE_EVERY_S = 0.5
"""Seconds between updates of the progress bar's notes; computing them reads the loss, which waits for the device."""


class Console:
    """Output to stderr and log.txt. ``is_main``: whether this is the main process; the others write nothing.

    If ``shows`` is False, messages are written to log.txt only.
    """

    def __init__(self, *, is_main: bool, shows: bool = True) -> None:
        self.is_main, self.shows = is_main, shows
        self.log_file: Path | None = None
        self.early_lines: list[str] = []
        self.listener: Callable[[str], None] | None = None
        self.not_passed_on: list[str] = []
        """Messages before there is a listener."""
        self.progress: Any = None

    def log(self, text: str = "") -> None:
        """Print text and write it to log.txt; lines logged before log.txt exists are added once it does."""
        if not self.is_main:
            return
        text = escape_control_characters(text)
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.shows and sys.stderr is not None:
            with contextlib.suppress(OSError):  # stderr was closed; log.txt still gets the text
                print(text, file=sys.stderr, flush=True)
        self._log(text)

    def note(self, text: str) -> None:
        """Write text to log.txt only."""
        if self.is_main:
            self._log(escape_control_characters(text))

    def set_log_file(self, path: Path) -> None:
        """Write all messages, including earlier ones, to this file as well."""
        if self.is_main:
            self.log_file = path
            for line in self.early_lines:
                self._write(line)
            self.early_lines = []

    def follow(self, listener: Callable[[str], None]) -> None:
        """Also pass every message to ``listener``, beginning with the first one."""
        for text in self.not_passed_on:
            listener(text)
        self.listener, self.not_passed_on = listener, []

    def _log(self, text: str) -> None:
        (self.not_passed_on.append if self.listener is None else self.listener)(text)
        self._write(text)

    def _write(self, text: str) -> None:
        if self.log_file is None:
            self.early_lines.append(text)
            return
        with contextlib.suppress(OSError), open(self.log_file, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    @contextlib.contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        """Show a progress bar if stderr is a terminal, otherwise nothing."""
        if not self.is_main or not self.shows or sys.stderr is None or not sys.stderr.isatty():
            yield ProgressBar(None, 0)
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        console = Console(stderr=True)
        text, facts = (
            TextColumn(field, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
            for field in ("{task.description}", "{task.fields[facts]}")
        )
        bar_width = _bar_width(console.width)
        columns = [text, BarColumn(bar_width), facts] if bar_width else [text, facts]
        with Progress(*columns, console=console, transient=True) as progress:
            self.progress = progress
            try:
                yield ProgressBar(progress, progress.add_task(title, total=total, completed=done, facts=""))
            finally:
                self.progress = None


def _bar_width(columns: int) -> int:
    """Return the width of the bar on a terminal of this width; 0: too narrow for one."""
    return 40 if columns >= 140 else 10 if columns >= 60 else 0


class ProgressBar:
    """One line of progress that counts images; does nothing if ``progress`` is None.

    On a narrow terminal, what stands at its end is left out.
    """

    def __init__(self, progress: Any, task: int) -> None:
        self.progress, self.task = progress, task
        self.started, self.seen = time.perf_counter(), 0
        self.noted = 0.0
        self.notes: list[str] = []

    def advance(self, images: int, notes: Callable[[], list[str]] | None = None) -> None:
        """Advance by ``images``. ``notes`` returns texts for the end of the line; called at most every half second."""
        if self.progress is None:
            return
        self.seen += images
        if notes is not None and time.perf_counter() - self.noted > NOTE_EVERY_S:
            self.notes, self.noted = notes(), time.perf_counter()
        task, width = self.progress.tasks[self.task], self.progress.console.width
        total = max(task.total, 1)
        done = min(task.completed + images, total)
        speed = self.seen / max(time.perf_counter() - self.started, 1e-9)
        left = duration(math.ceil((total - done) / max(speed, 1e-9)))
        facts = [f"{done / total:4.0%}", f"{speed:,.0f} images/s", f"{left} left", *self.notes]
        while len("  ".join(facts)) > width - len(task.description) - _bar_width(width) - 3 and len(facts) > 1:
            facts.pop()
        self.progress.update(self.task, advance=images, facts="  ".join(facts))


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...], right: frozenset[int] = frozenset()) -> str:
    """Format rows as a plain text table; columns in ``right`` (numbers) are right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = tuple("-" * width for width in widths)

    def line(row: tuple[str, ...]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in [header, rule, *rows])


def epoch_line(record: dict[str, Any], epochs: int, *, best: bool, images_per_s: float) -> str:
    """Format an epoch's log line: learning rate, metrics of training and validation, speed, BEST for the best epoch."""
    validation = ""
    if "val/loss" in record:
        best_known = headline(record, "val/")
        name = metric_of(best_known).measure.label
        validation = f"  val loss {record['val/loss']:.4f} {name} {record[best_known]:.4f}"
    lr = f"  lr {record['lr']:.3g}" if "lr" in record else ""  # absent if the last layer is fitted
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}{lr}"
        f"  train loss {record['train/loss']:.4f} accuracy {record['train/accuracy']:.4f}"
        f"{validation}  {images_per_s:,.0f} images/s" + ("  BEST" if best else "")
    )


SUMMARY_METRICS = ("val_loss", "val_accuracy", "val_map", "test_loss", "test_accuracy", "test_balanced_accuracy",
                   "test_map", "test_micro_f1")  # fmt: skip
"""Metrics in the summary table, if the run has them."""


def summary_table(summary: dict[str, Any]) -> str:
    """Format the summary table: validation and test metrics of the best and the last model, if the run has them."""
    metrics = [metric for metric in SUMMARY_METRICS if metric in summary["best"]]
    rows = [
        (name, str(summary[name]["epoch"]), *(f"{summary[name][metric]:.4f}" for metric in metrics))
        for name in ("best", "last")
    ]
    header = ("model", "epoch", *(metric.replace("_", " ") for metric in metrics))
    return table(rows, header, frozenset(range(1, len(header))))


def final_card(summary: dict[str, Any], path: Path, lines: Sequence[str]) -> str:
    """Format the result for a terminal of any width: metrics, ``lines``, where the run is, and the next commands."""
    best, last = summary["best"], summary["last"]
    rows = [
        (metric.replace("_", " "), f"{best[metric]:.4f}", f"{last[metric]:.4f}")
        for metric in SUMMARY_METRICS
        if metric in best
    ]
    header = ("", f"best (epoch {best['epoch']})", f"last (epoch {last['epoch']})")
    run = shlex.quote(str(path))
    report = path / "report.html"
    return "\n".join(
        [
            table(rows, header, frozenset((1, 2))),
            "",
            *lines,
            f"run      {path}",
            f"report   {report}" if report.exists() else f"report   toolkit report {run}",
            f"predict  toolkit predict {run} IMAGE...",
            f"share    toolkit publish {run} USER/NAME",
        ]
    )
