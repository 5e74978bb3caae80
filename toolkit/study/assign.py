"""Assignments of a search: which configuration is trained next, and to which epoch. Any worker may make them.

BOHB is a pure function of the results so far, which are in the study's directory: study.json lists the configurations
in order, and the run directories contain their progress. No process keeps state or coordinates the others: a worker
that finds no run to train acquires the directory's lock, rebuilds the search, and writes the next assignment.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from toolkit.errors import UserError
from toolkit.locks import try_acquire
from toolkit.recipe.study_schema import BohbSearchConfig
from toolkit.runs import Run
from toolkit.study.bohb import BohbScheduler, RestoredTrial
from toolkit.study.directory import (
    STUDY_COPY,
    WRITING,
    StudyDirectory,
    StudyRun,
    failure_of,
    is_claimed,
    set_target_epoch,
    target_epoch,
)
from toolkit.study.expand import StudySpec, read_study
from toolkit.study.init import RunIndex


class SearchAssigner:
    """Assigns the runs of a BOHB search to workers. Trial n is the n-th member of study.json."""

    def __init__(self, folder: StudyDirectory) -> None:
        self.folder = folder
        self._exhausted: tuple[BohbSearchConfig, list[RestoredTrial]] | None = None
        """Settings and results of the last call that found nothing to assign; equal ones need no new search."""

    @cached_property
    def study(self) -> StudySpec:
        """The study as it was started; its space and the recipes of its runs do not change."""
        return replace(read_study(self.folder.path / STUDY_COPY), path=self.folder.record["file"])

    def assign(self) -> bool:
        """Assign a run to be trained, or mark the search as complete if nothing is left.

        Returns False if there is nothing to train at present, or if another process is making assignments.
        """
        lock = try_acquire(self.folder.path / WRITING)
        if lock is None:
            return False
        try:
            return not self.folder.is_complete and self._assign()
        finally:
            lock.release()

    def _assign(self) -> bool:
        # Read again, since the study may have been restarted with more trials; self.study has the original number.
        table, members = self.folder.table.bohb, self.folder.members
        assert table is not None
        trials = [self._trial(member, table) for member in members]
        if (table, trials) == self._exhausted:
            return False
        search = BohbScheduler(table, self.study.space)
        search.restore(trials)
        rungs = [trial.rung for trial in search.trials]
        assignment = search.ask()
        for trial, rung in zip(search.trials, rungs, strict=False):
            if trial.rung != rung:  # a run that stopped early is promoted too, but not trained further
                self._set_target(members[trial.number], search.budgets[trial.rung], table)
        if assignment is not None and assignment.trial == len(members):
            # The run directory is created before the entry in study.json. After a crash in between, the same
            # configuration is proposed again, and the directory is found by the hash of its recipe.
            known = RunIndex(self.folder, self.study.path, members)
            members = [*members, known.member(self.study.configuration_run(assignment.changes))]
            self._set_target(members[-1], assignment.until_epoch, table)
            self.folder.write(self.folder.record, members)
        if assignment is None:
            self._exhausted = table, trials
            if search.is_done:
                self.folder.write(self.folder.record | {"complete": True}, members)
        return assignment is not None

    def _run(self, member: StudyRun) -> Run:
        run = self.folder.run(member)
        assert run is not None, "every trial is created with a run directory"
        return run

    def _trial(self, member: StudyRun, table: BohbSearchConfig) -> RestoredTrial:
        """Restore a trial from its run directory; a trial with damaged files counts as failed."""
        run = self._run(member)
        try:
            has_failed = failure_of(run) is not None and not is_claimed(run)
            values = [float(record[table.metric]) for record in run.epoch_records()]
            state = "failed" if has_failed else "ended" if run.is_finished else "open"
            return RestoredTrial(member.changes, target_epoch(run), values, state)  # type: ignore[arg-type]
        except UserError:
            return RestoredTrial(member.changes, None, (), "failed")

    def _set_target(self, member: StudyRun, until: int, table: BohbSearchConfig) -> None:
        set_target_epoch(self._run(member), None if until >= table.max_epochs else until)
