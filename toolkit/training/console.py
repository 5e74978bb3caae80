"""What one sees while a run goes on: talk on stderr, the same lines in log.txt, a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.filenames import escape_control_characters

NOTE_EVERY_S = 0.5
"""Reading a loss waits for the device, so that it is shown only so often."""


class Console:
    """Speaks for the main process only; silent on the others. What it does not show goes to log.txt all the same."""

    def __init__(self, *, speaks: bool, shows: bool = True) -> None:
        self.speaks, self.shows = speaks, shows
        self.log_file: Path | None = None
        self.early_lines: list[str] = []
        self.progress: Any = None

    def log(self, text: str = "") -> None:
        """Show text and keep it in log.txt (from the moment there is one; earlier lines are added then)."""
        if not self.speaks:
            return
        text = escape_control_characters(text)
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.shows and sys.stderr is not None:
            with contextlib.suppress(OSError):  # nobody reads it any more: log.txt has it
                print(text, file=sys.stderr, flush=True)
        self._log(text)

    def note(self, text: str) -> None:
        """Keep text in log.txt only."""
        if self.speaks:
            self._log(escape_control_characters(text))

    def set_log_file(self, path: Path) -> None:
        """Keep what was and will be said in this file too."""
        if self.speaks:
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
        """A progress bar where stderr is a terminal; nothing elsewhere."""
        if not self.speaks or not self.shows or sys.stderr is None or not sys.stderr.isatty():
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
    """Progress in images."""

    def __init__(self, progress: Any, task: int) -> None:
        self.progress, self.task = progress, task
        self.started, self.seen = time.perf_counter(), 0
        self.noted = 0.0

    def advance(self, images: int, note: Callable[[], str] | None = None) -> None:
        """Count images. ``note`` gives a text for the end of the line; it is called every half second at most."""
        if self.progress is None:
            return
        self.seen += images
        speed = self.seen / max(time.perf_counter() - self.started, 1e-9)
        self.progress.update(self.task, advance=images, speed=f"{speed:,.0f} images/s")
        if note is not None and time.perf_counter() - self.noted > NOTE_EVERY_S:
            self.progress.update(self.task, note=note())
            self.noted = time.perf_counter()


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...], right: frozenset[int] = frozenset()) -> str:
    """Plain text columns, numbers (columns in ``right``) aligned at the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = tuple("-" * width for width in widths)

    def line(row: tuple[str, ...]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in [header, rule, *rows])


def epoch_line(record: dict[str, Any], epochs: int, *, best: bool, images_per_s: float) -> str:
    """epoch, learning rate, train loss and accuracy, validation loss and accuracy (if any), BEST where it is."""
    validation = ""
    if "val/loss" in record:
        validation = f"  val loss {record['val/loss']:.4f} accuracy {record['val/accuracy']:.4f}"
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  lr {record['lr']:.3g}"
        f"  train loss {record['train/loss']:.4f} accuracy {record['train/accuracy']:.4f}"
        f"{validation}  {images_per_s:,.0f} images/s" + ("  BEST" if best else "")
    )


def summary_table(summary: dict[str, Any]) -> str:
    """The closing table: best and last model by validation and test, as far as the run has these splits."""
    known = ("val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_balanced_accuracy")
    figures = [figure for figure in known if figure in summary["best"]]
    rows = [
        (name, str(summary[name]["epoch"]), *(f"{summary[name][figure]:.4f}" for figure in figures))
        for name in ("best", "last")
    ]
    header = ("model", "epoch", *(figure.replace("_", " ") for figure in figures))
    return table(rows, header, frozenset(range(1, len(header))))
