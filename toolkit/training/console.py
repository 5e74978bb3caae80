"""Console output of a run: messages on stderr and in log.txt, and a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.filenames import escape_control_characters
from toolkit.metrics import headline, metric_of

NOTE_EVERY_S = 0.5
"""Seconds between updates of the progress bar's note; computing it reads the loss, which waits for the device."""


class Console:
    """Output to stderr and log.txt. ``is_main``: whether this is the main process; the others write nothing.

    If ``shows`` is False, messages are written to log.txt only.
    """

    def __init__(self, *, is_main: bool, shows: bool = True) -> None:
        self.is_main, self.shows = is_main, shows
        self.log_file: Path | None = None
        self.early_lines: list[str] = []
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
                self._log(line)
            self.early_lines = []

    def _log(self, text: str) -> None:
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
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            self.progress = progress
            try:
                yield ProgressBar(progress, progress.add_task(title, total=total, completed=done, speed="", note=""))
            finally:
                self.progress = None


class ProgressBar:
    """A progress bar that counts images; does nothing if ``progress`` is None."""

    def __init__(self, progress: Any, task: int) -> None:
        self.progress, self.task = progress, task
        self.started, self.seen = time.perf_counter(), 0
        self.noted = 0.0

    def advance(self, images: int, note: Callable[[], str] | None = None) -> None:
        """Advance by ``images``. ``note`` returns a text for the end of the line; called at most every half second."""
        if self.progress is None:
            return
        self.seen += images
        speed = self.seen / max(time.perf_counter() - self.started, 1e-9)
        self.progress.update(self.task, advance=images, speed=f"{speed:,.0f} images/s")
        if note is not None and time.perf_counter() - self.noted > NOTE_EVERY_S:
            self.progress.update(self.task, note=note())
            self.noted = time.perf_counter()


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
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  lr {record['lr']:.3g}"
        f"  train loss {record['train/loss']:.4f} accuracy {record['train/accuracy']:.4f}"
        f"{validation}  {images_per_s:,.0f} images/s" + ("  BEST" if best else "")
    )


def summary_table(summary: dict[str, Any]) -> str:
    """Format the summary table: validation and test metrics of the best and the last model, if the run has them."""
    known = ("val_loss", "val_accuracy", "val_map", "test_loss", "test_accuracy", "test_balanced_accuracy", "test_map",
             "test_micro_f1")  # fmt: skip
    metrics = [metric for metric in known if metric in summary["best"]]
    rows = [
        (name, str(summary[name]["epoch"]), *(f"{summary[name][metric]:.4f}" for metric in metrics))
        for name in ("best", "last")
    ]
    header = ("model", "epoch", *(metric.replace("_", " ") for metric in metrics))
    return table(rows, header, frozenset(range(1, len(header))))
