"""Studies: the Python interface to the folder of a study."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.data_frames import data_frame
from toolkit.errors import UserError
from toolkit.metrics import higher_is_better, metric_of
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory
from toolkit.study.export_tables import main_records, run_records
from toolkit.study.results import RunResult
from toolkit.study.study_results import StudyResults, TableOptions, read_outcomes

if TYPE_CHECKING:
    from pandas import DataFrame


class Study:
    """A study, as returned by :func:`open_study`: its runs, tables and report.

    Everything is read from the folder on each access, so it also shows the progress of a study that is still being
    trained. Imports torch and pandas only when they are needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory = StudyDirectory(path)

    def __repr__(self) -> str:
        return f"Study({str(self.path)!r})"

    @property
    def name(self) -> str:
        """Name of the study and of its recipe."""
        return self.directory.name

    @property
    def results(self) -> StudyResults:
        """The results so far, from which all tables and figures are made."""
        return read_outcomes(self.directory, TableOptions())

    @property
    def table(self) -> DataFrame:
        """The results table: one row per setting, indexed by ``row``; for a search, one per ``trial``, best first.

        The columns are those of table.csv, which `toolkit table` writes: for each metric the mean over the seeds and
        folds, its standard deviation and its confidence interval; accuracies are fractions. Needs pandas.
        """
        found = self.results
        return data_frame(main_records(found), "trial" if found.trials else "row")

    @property
    def run_table(self) -> DataFrame:
        """Row, seed, varied keys, state and metrics of each run, indexed by ``run`` (its id). Needs pandas."""
        return data_frame(run_records(self.results.results), "run")

    @property
    def runs(self) -> list[Run]:
        """The runs that have been started, in the order of the table; rows with the same recipe share a run."""
        return self.directory.runs

    @property
    def best(self) -> Run:
        """The finished run with the best validation metric, of the best row or, in a search, of all trials.

        The best row is the one marked in tables. Raises UserError if no run has finished.
        """
        found = self.results
        metric = metric_of(found.table.output.best_by).name
        finished = [result for row in found.rows if row.is_best for result in row.finished]
        if found.trials:
            finished = [trial.result for trial in found.trials[:1] if trial.result.is_finished]
        if not finished:
            raise UserError(f"no run of {self.path} has finished, so there is no best run")

        def value(result: RunResult) -> float:
            sign = 1 if higher_is_better(metric) else -1
            return sign * result.metrics.get(metric, 0.0)

        run = self.directory.run(max(finished, key=value).member)
        assert run is not None
        return run

    def report(self, output: str | os.PathLike[str] | None = None, *, runs: bool = False) -> Path:
        """Write the figures and the report (one HTML file) and return its path; a warning lists missing parts.

        ``output``: the file; None: report.html in the study's folder. ``runs``: also write the reports of all runs.
        Raises UserError if no run has a finished epoch.
        """
        from toolkit.report.study_report import read_study, write_study_report

        file = None if output is None else Path(output)
        written = write_study_report(read_study(self.path), self.path, file, runs=runs, log=warnings.warn)
        if written.missing:
            warnings.warn("not shown: " + "; ".join(written.missing), stacklevel=2)
        assert written.report is not None
        return written.report

    def _repr_html_(self) -> str:
        from toolkit.report.notebook import study_html

        return study_html(self)


def open_study(path: str | os.PathLike[str]) -> Study:
    """Open the folder of a study. Raises UserError if it is not the folder of a study."""
    study = Study(Path(path))
    _ = study.directory.record  # raises UserError
    return study
