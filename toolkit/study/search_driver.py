"""The controller's part of a search: proposes configurations, assigns them to workers, and reports results to BOHB.

The complete state of a search is in study.json (its configurations, in order) and in the run directories (their
progress), so a controller that died can be replaced without loss.
"""

from __future__ import annotations

from toolkit.runs import Run
from toolkit.study.bohb import BohbScheduler, RestoredTrial, TrialBudget
from toolkit.study.directory import (
    StudyDirectory,
    StudyRun,
    count_external_workers,
    failure_of,
    is_claimed,
    set_target_epoch,
)
from toolkit.study.expand import StudySpec
from toolkit.study.init import RunIndex, study_record


class SearchDriver:
    """BOHB over the runs of a study directory. Trial n is the n-th member of study.json."""

    def __init__(self, study: StudySpec, folder: StudyDirectory) -> None:
        assert study.table.bohb is not None
        self.study, self.folder, self.table = study, folder, study.table.bohb
        self.bohb = BohbScheduler(self.table, study.space)
        self.members = folder.members
        self.known = RunIndex(folder, study.path)
        self.under_way: dict[int, int] = {}
        """Epoch to which each assigned trial is to be trained."""
        for assignment in self.bohb.replay([self._replayed(member) for member in self.members]):
            self._assign(assignment)

    def step(self, workers: int, in_all: int = 0) -> bool:
        """Report new results, and assign enough work for ``workers`` and any external workers.

        ``in_all``: how many workers may join in all; one assignment is kept ready for the next of them. Returns False
        when the search is finished.
        """
        for trial in list(self.under_way):
            self._tell(trial)
        busy = sum(is_claimed(self._run(trial)) for trial in self.under_way)
        ready = min(busy + 1, in_all)
        while len(self.under_way) < max(workers + count_external_workers(self.folder), ready):
            assignment = self.bohb.ask()
            if assignment is None:
                break
            self._assign(assignment)
        if self.bohb.is_done:
            self.folder.write(study_record(self.study, complete=True), self.members)
            return False
        return True

    def _run(self, trial: int) -> Run:
        run = self.folder.run(self.members[trial])
        assert run is not None, "a trial has a run directory from its beginning"
        return run

    def _replayed(self, member: StudyRun) -> RestoredTrial:
        run = self.folder.run(member)
        assert run is not None, "a trial has a run directory from its beginning"
        state = "failed" if failure_of(run) is not None else "ended" if run.is_finished else "open"
        return RestoredTrial(member.changes, self._values(run), state)  # type: ignore[arg-type]

    def _values(self, run: Run) -> list[float]:
        return [float(record[self.table.metric]) for record in run.epochs()]

    def _tell(self, trial: int) -> None:
        run = self._run(trial)
        if failure_of(run) is not None:
            if not is_claimed(run):
                self.bohb.fail(trial)
                del self.under_way[trial]
            return
        values, ended = self._values(run), run.is_finished
        if ended or (len(values) >= self.under_way[trial] < self.table.max_epochs):
            self.bohb.tell(trial, values, ended=ended)
            del self.under_way[trial]

    def _assign(self, assignment: TrialBudget) -> None:
        """Make a trial available to workers. A new configuration gets its run directory before it enters study.json."""
        is_new = assignment.trial == len(self.members)
        if is_new:
            self.members.append(self.known.member(self.study.drawn(assignment.changes)))
        is_whole = assignment.until_epoch >= self.table.max_epochs
        set_target_epoch(self._run(assignment.trial), None if is_whole else assignment.until_epoch)
        if is_new:
            self.folder.write(study_record(self.study, complete=False), self.members)
        self.under_way[assignment.trial] = assignment.until_epoch


def check_search(study: StudySpec) -> None:
    """Check the settings of a search before it starts. Raises UserError."""
    if study.table.bohb is not None:
        BohbScheduler(study.table.bohb, study.space)
