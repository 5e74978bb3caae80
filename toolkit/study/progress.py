"""Progress display of a study: a live table on a terminal, otherwise one line per finished run."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError
from toolkit.formatting import duration, plural
from toolkit.metrics import best_of, higher_is_better
from toolkit.runs import Run
from toolkit.study.bohb import search_epochs
from toolkit.study.directory import RunState, StudyDirectory, StudyRun, failure_of, state_of

REFRESH_S = 1.0
MAX_SHOWN = 16
"""Maximum number of running runs in the table."""


@dataclass(frozen=True)
class RunStatus:
    """Status of one run."""

    row: str
    seed: int
    state: RunState
    epoch: int
    epochs: int
    """Number of epochs that the recipe sets."""
    value: float | None
    """Best value of the validation metric so far."""
    test_accuracy: float | None = None
    reason: str = ""

    @property
    def title(self) -> str:
        """Row name and seed."""
        return f"{self.row}, seed {self.seed}"

    @property
    def done(self) -> int:
        """Number of epochs that need no further training."""
        return self.epochs if self.state in ("finished", "failed") else self.epoch


class StudyProgress:
    """Progress display of a running study."""

    def __init__(self, folder: StudyDirectory) -> None:
        self.folder = folder
        table = folder.table
        self.metric = table.metric
        self.search_epochs = None if table.bohb is None else search_epochs(table.bohb)
        self.started = time.monotonic()
        self.epochs: dict[str, int] = {}
        self.known: dict[str, tuple[Any, RunStatus]] = {}
        self.logged: dict[str, RunState] = {}
        self.live: Any = None
        runs = self.read()
        self.done_before, _ = self._epochs(runs)
        self.logged = {name: status.state for name, status in runs.items()}

    def read(self) -> dict[str, RunStatus]:
        """Return the status of all runs by directory name; unchanged runs are not reread."""
        found = {}
        for member in self.folder.members:
            if member.run is not None and member.run not in found:
                found[member.run] = self._status(member, Run(self.folder.path / member.run))
        return found

    def _status(self, member: StudyRun, run: Run) -> RunStatus:
        """Return a run's status from its files; a run with damaged files counts as failed."""
        try:
            return self._read_run(member, run)
        except UserError as error:
            reason = str(error).strip().splitlines()[0]
            return RunStatus(member.row, member.seed, "failed", 0, self.epochs.get(run.id, 0), None, None, reason)

    def _read_run(self, member: StudyRun, run: Run) -> RunStatus:
        state = state_of(run)
        size = run.metrics_file.stat().st_size if run.metrics_file.exists() else 0
        known = self.known.get(run.id)
        if known is not None and known[0] == (state, size):
            return known[1]
        if run.id not in self.epochs:
            self.epochs[run.id] = run.recipe.train.epochs
        records = run.epochs()
        values = [float(record[self.metric]) for record in records if self.metric in record]
        epoch = int(records[-1]["epoch"]) if records else 0
        failure = failure_of(run) if state == "failed" else None
        test = None
        if state == "finished":
            test = run.summary["best"].get("test_accuracy")
        status = RunStatus(
            member.row, member.seed, state, epoch, self.epochs[run.id], best_of(values, self.metric), test,
            failure.line if failure else "",
        )  # fmt: skip
        self.known[run.id] = ((state, size), status)
        return status

    def log_ended(self) -> None:
        """Log the runs that have ended since the last call, one line per run."""
        runs = self.read()
        ended = {name: status.state for name, status in runs.items() if status.state in ("finished", "failed")}
        new = [name for name, state in ended.items() if self.logged.get(name) != state]
        for number, name in enumerate(new, len(ended) - len(new) + 1):
            self.log(f"[{number}/{len(runs)}] {self._ended_line(runs[name])}")
        self.logged = {name: status.state for name, status in runs.items()}

    def _ended_line(self, status: RunStatus) -> str:
        if status.state == "failed":
            return f"{status.title}: failed: {status.reason}"
        test = "" if status.test_accuracy is None else f", test accuracy {status.test_accuracy:.4f}"
        return f"{status.title}: {self.metric} {_number(status.value)}{test}, {plural(status.epoch, 'epoch')}"

    def log(self, text: str) -> None:
        """Print one line, above the live table if it is shown."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def headline(self, runs: dict[str, RunStatus]) -> str:
        """Return a summary: runs by state, time left, best value so far."""
        states = Counter(status.state for status in runs.values())
        counts = [f"{states[state]} {state}" for state in ("finished", "failed", "running", "paused") if states[state]]
        parts = [f"{len(runs)} runs: {', '.join(counts)}", *self._time_left(runs), *self._best(runs)]
        return "; ".join(parts)

    def _time_left(self, runs: dict[str, RunStatus]) -> list[str]:
        done, total = self._epochs(runs)
        trained, spent = done - self.done_before, time.monotonic() - self.started
        if trained <= 0 or done >= total:
            return []
        return [f"{duration((total - done) * spent / trained)} left"]

    def _epochs(self, runs: dict[str, RunStatus]) -> tuple[int, int]:
        """Return the number of epochs that need no further training, and the total number."""
        if self.search_epochs is not None:
            return sum(status.epoch for status in runs.values()), self.search_epochs
        return sum(status.done for status in runs.values()), sum(status.epochs for status in runs.values())

    def _best(self, runs: dict[str, RunStatus]) -> list[str]:
        values = [(status.value, status) for status in runs.values() if status.value is not None]
        if not values:
            return []
        choose = max if higher_is_better(self.metric) else min
        value, status = choose(values, key=lambda item: item[0])
        return [f"best so far {self.metric} {_number(value)}: {status.title}"]

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
        running = [status for status in runs.values() if status.state == "running"]
        for status in running[:MAX_SHOWN]:
            table.add_row(Text(status.title), f"{status.epoch}/{status.epochs}", _number(status.value))
        if len(running) > MAX_SHOWN:
            table.add_row(f"and {len(running) - MAX_SHOWN} more", "", "")
        return Group(Text(self.headline(runs)), table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
