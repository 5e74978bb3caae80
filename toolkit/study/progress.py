"""Progress display of a study: a live table on a terminal, otherwise one line per finished run."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from toolkit.errors import UserError
from toolkit.formatting import duration, plural
from toolkit.metrics import headline, higher_is_better, metric_of
from toolkit.runs import Run
from toolkit.study.bohb import search_epochs
from toolkit.study.directory import RunState, StudyDirectory, StudyRun, state_of
from toolkit.study.results import RunResult, read_result

REFRESH_S = 1.0
MAX_SHOWN = 16
"""Maximum number of running runs in the table."""


class StudyProgress:
    """Progress display of a running study."""

    def __init__(self, folder: StudyDirectory) -> None:
        self.folder = folder
        table = folder.table
        self.metric = table.metric
        self.search_epochs = None if table.bohb is None else search_epochs(table.bohb)
        self.started = time.monotonic()
        self.planned: dict[str, int | None] = {}
        """Number of epochs of each run; None if it is not known yet."""
        self.known: dict[str, tuple[Any, RunResult]] = {}
        self.logged: dict[str, RunState] = {}
        self.live: Any = None
        runs = self.read()
        self.done_before, _ = self._epochs(runs)
        self.logged = {name: result.state for name, result in runs.items()}

    def read(self) -> dict[str, RunResult]:
        """Return the results of all runs by directory name; unchanged runs are not reread."""
        found: dict[str, RunResult] = {}
        for member in self.folder.members:
            if member.run is not None and member.run not in found:
                found[member.run] = self._read_run(member, Run(self.folder.path / member.run))
        return found

    def _read_run(self, member: StudyRun, run: Run) -> RunResult:
        size = run.metrics_file.stat().st_size if run.metrics_file.exists() else 0
        known = self.known.get(run.id)
        if known is not None and known[0] == (state_of(run), size):
            return known[1]
        try:
            if self.planned.get(run.id) is None:
                self.planned[run.id] = run.planned_epochs()
        except UserError as error:
            return RunResult(member, "failed", failure_reason=str(error).strip().splitlines()[0])
        result = read_result(self.folder, member)
        self.known[run.id] = ((result.state, size), result)
        return result

    def log_ended(self) -> None:
        """Log the runs that have ended since the last call, one line per run."""
        runs = self.read()
        ended = {name: result.state for name, result in runs.items() if result.state in ("finished", "failed")}
        new = [name for name, state in ended.items() if self.logged.get(name) != state]
        for number, name in enumerate(new, len(ended) - len(new) + 1):
            self.log(f"[{number}/{len(runs)}] {self._ended_line(runs[name])}")
        self.logged = {name: result.state for name, result in runs.items()}

    def _ended_line(self, result: RunResult) -> str:
        if result.state == "failed":
            return f"{result.title}: failed: {result.failure_reason}"
        key = headline(result.metrics, "test_")
        test = f", {metric_of(key).label} {result.metrics[key]:.4f}" if key in result.metrics else ""
        return f"{result.title}: {self.metric} {self._value(result)}{test}, {plural(len(result.epochs), 'epoch')}"

    def log(self, text: str) -> None:
        """Print one line, above the live table if it is shown."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def headline(self, runs: dict[str, RunResult]) -> str:
        """Return a summary: runs by state, time left, best value so far."""
        states = Counter(result.state for result in runs.values())
        counts = [f"{states[state]} {state}" for state in ("finished", "failed", "running", "paused") if states[state]]
        parts = [f"{len(runs)} runs: {', '.join(counts)}", *self._time_left(runs), *self._best(runs)]
        return "; ".join(parts)

    def _time_left(self, runs: dict[str, RunResult]) -> list[str]:
        done, total = self._epochs(runs)
        trained, spent = done - self.done_before, time.monotonic() - self.started
        if trained <= 0 or done >= total:
            return []
        return [f"{duration((total - done) * spent / trained)} left"]

    def _epochs(self, runs: dict[str, RunResult]) -> tuple[int, int]:
        """Return the number of epochs that need no further training, and the total number."""
        if self.search_epochs is not None:
            return sum(len(result.epochs) for result in runs.values()), self.search_epochs
        known = [epochs for name in runs if (epochs := self.planned.get(name)) is not None]
        usual = (
            round(sum(known) / len(known)) if known else 0
        )  # not known for runs with train.steps that have not begun
        planned = {name: self.planned.get(name) or usual for name in runs}
        done = (
            planned[name] if result.state in ("finished", "failed") else len(result.epochs)
            for name, result in runs.items()
        )
        return sum(done), sum(planned.values())

    def _best(self, runs: dict[str, RunResult]) -> list[str]:
        values = {name: value for name, result in runs.items() if (value := result.best(self.metric)) is not None}
        if not values:
            return []
        best = (max if higher_is_better(self.metric) else min)(values, key=lambda name: values[name])
        return [f"best so far {self.metric} {self._value(runs[best])}: {runs[best].title}"]

    def _value(self, result: RunResult) -> str:
        value = result.best(self.metric)
        return "-" if value is None else f"{value:.4f}"

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live table while the context is active, if stderr is a terminal."""
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.live import Live

        console, rate = Console(stderr=True), 1 / REFRESH_S
        with Live(get_renderable=self._table, console=console, refresh_per_second=rate, transient=True) as live:
            self.live = live
            try:
                yield
            finally:
                self.live = None

    def _table(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        runs = self.read()
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
        for name, justify in (("running", "left"), ("epoch", "right"), (self.metric, "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        running = [(name, result) for name, result in runs.items() if result.state == "running"]
        for name, result in running[:MAX_SHOWN]:
            table.add_row(Text(result.title), f"{len(result.epochs)}/{self.planned[name] or '?'}", self._value(result))
        if len(running) > MAX_SHOWN:
            table.add_row(f"and {len(running) - MAX_SHOWN} more", "", "")
        return Group(Text(self.headline(runs)), table)
