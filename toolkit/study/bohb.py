"""BOHB (Falkner et al. 2018): what to train next and to which epoch, as a function of the results so far.

This module does not train or write anything. The caller asks for assignments, trains them, and reports the results:

    search = BohbScheduler(table, space)
    while (assignment := search.ask()) is not None:
        values = ...train configuration ``assignment.changes`` until epoch ``assignment.until_epoch``...
        search.tell(assignment.trial, values)

Trials are numbered from 0 in the order in which they are proposed. Given the same results, trial n is always the same
configuration, so a search can be rebuilt from its trials at any time (:meth:`BohbScheduler.restore`).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from toolkit.errors import UserError
from toolkit.metrics import higher_is_better
from toolkit.recipe.study_schema import BohbSearchConfig
from toolkit.study.optuna_tpe import TrialHistory, optuna_study, suggest, tpe_sampler
from toolkit.study.search_space import MAX_MISSES, SearchSpace

if TYPE_CHECKING:
    from optuna.study import Study

TrialState = Literal["training", "waiting", "ended", "failed"]
"""training: assigned to a worker. waiting: has reached its budget, may be promoted. ended: nothing left to train."""

MIN_TRIALS = 10
"""A bracket needs more trials than this for a useful model of the search space."""


@dataclass(frozen=True)
class TrialBudget:
    """An assignment: train a configuration to an epoch, resuming from its last checkpoint if it has one."""

    trial: int
    changes: dict[str, Any]
    until_epoch: int


@dataclass(frozen=True)
class RestoredTrial:
    """State of a trial as recorded in its run directory."""

    changes: dict[str, Any]
    until_epoch: int | None
    """The epoch to which the trial was to be trained; None: the largest budget."""
    values: Sequence[float] = ()
    """Value of the metric after each epoch so far, in order."""
    state: Literal["open", "ended", "failed"] = "open"
    """ended: the run finished, at the largest budget or by early stopping. failed: the run is not retried."""


@dataclass
class Trial:
    """A configuration and its progress."""

    number: int
    bracket: int
    changes: dict[str, Any]
    rung: int
    """Index of the budget up to which the trial is being trained, or was last trained."""
    state: TrialState = "training"
    values: list[float] = field(default_factory=list)
    """Value of the metric after each epoch so far, in order."""


class BohbScheduler:
    """Scheduler of one search. Not thread-safe."""

    def __init__(self, table: BohbSearchConfig, space: SearchSpace) -> None:
        self.table, self.space = table, space
        self.budgets = budgets(table.min_epochs, table.max_epochs, table.eta)
        self.brackets = bracket_sizes(table)
        self.maximise = higher_is_better(table.metric)
        self.trials: list[Trial] = []
        self.is_used_up = False
        """Whether every configuration of the space has been tried."""

    # -- public interface ---------------------------------------------------------------------------------------------

    def ask(self) -> TrialBudget | None:
        """Return what to train next; None if the search is done or must wait for more results.

        Promotions come before new configurations, and those to the largest budget come first. A promoted trial that
        had stopped early has nothing left to train; only its ``rung`` is raised.
        """
        while (promoted := self._promotable()) is not None:
            promoted.rung += 1
            if promoted.state != "ended":
                promoted.state = "training"
                return self._assignment(promoted)
        if self._may_propose:
            changes = self._new_configuration()
            if changes is not None:
                return self._assignment(self._add(changes))
            self.is_used_up = True
            return self.ask()
        return None

    def tell(self, trial: int, values: Sequence[float], *, ended: bool = False) -> None:
        """Report a trial's results: the metric after each epoch, starting at the first.

        ``ended``: the run has finished, possibly with fewer epochs than requested (early stopping). Otherwise a trial
        that has not reached its budget stays assigned.
        """
        tried = self.trials[trial]
        tried.values = list(values)
        if ended:
            tried.state = "ended"
        elif len(values) >= self.budgets[tried.rung]:
            tried.state = "ended" if tried.rung == len(self.budgets) - 1 else "waiting"
        else:
            tried.state = "training"

    @property
    def is_done(self) -> bool:
        """Whether no trial is being trained and no further trial will be proposed."""
        return not (self._is_training or self._may_propose or self._promotable() is not None)

    def restore(self, known: Iterable[RestoredTrial]) -> None:
        """Add the trials known so far, in order, to a search that has none yet."""
        largest = len(self.budgets) - 1
        for trial in known:
            tried = self._add(trial.changes)
            tried.values = list(trial.values)
            if trial.until_epoch is None:
                tried.rung = largest
            else:
                tried.rung = min(bisect.bisect_left(self.budgets, trial.until_epoch), largest)
            if trial.state != "open":
                tried.state = trial.state
            elif tried.rung < largest and len(tried.values) >= self.budgets[tried.rung]:
                tried.state = "waiting"

    def value(self, tried: Trial, budget: int | None = None) -> float | None:
        """Return a trial's best value within ``budget`` epochs (None: all): a run keeps the model of its best epoch."""
        return (max if self.maximise else min)(tried.values[:budget], default=None)

    # -- successive halving, asynchronous (after Li et al. 2020, ASHA) -------------------------------------------------

    @property
    def _may_propose(self) -> bool:
        return len(self.trials) < self.table.trials and not self.is_used_up

    @property
    def _is_training(self) -> bool:
        return any(tried.state == "training" for tried in self.trials)

    def _promotable(self) -> Trial | None:
        """Return the next trial to promote: among all brackets, the one with the largest next budget."""
        for rung in reversed(range(len(self.budgets) - 1)):
            for bracket in range(len(self.brackets)):
                found = self._promotable_from(bracket, rung)
                if found is not None:
                    return found
        return None

    def _promotable_from(self, bracket: int, rung: int) -> Trial | None:
        """Return the best trial of a rung not yet promoted, if fewer than 1/eta of its trials have been promoted.

        Unlike this, ASHA promotes every trial that is among the best 1/eta at that moment. If the model's proposals
        keep improving, that applies to nearly every trial, and most would be trained to the end. The limit on
        promotions makes the cost known in advance.
        """
        ranked = self._ranked(bracket, rung)
        quota = len(ranked) // self.table.eta
        if not quota and self._is_last_chance(bracket, rung):
            quota = 1
        if sum(tried.rung > rung for tried in ranked) >= quota:
            return None
        return next((tried for tried in ranked if tried.rung == rung and tried.state in ("waiting", "ended")), None)

    def _is_last_chance(self, bracket: int, rung: int) -> bool:
        """Return whether a rung can receive no more results, so that its best trial is promoted in any case."""
        coming = any(t.state == "training" and t.rung <= rung for t in self.trials if t.bracket == bracket)
        below = any(self._promotable_from(bracket, lower) for lower in range(bracket, rung))
        return not (self._may_propose or coming or below)

    def _ranked(self, bracket: int, rung: int) -> list[Trial]:
        """Return the trials of a bracket that have a result at a rung or failed before it, best first."""
        scored = []
        for tried in self.trials:
            if tried.bracket == bracket and tried.rung >= rung:
                value = self._result(tried, rung)
                if value is not None:
                    scored.append((-value if self.maximise else value, tried.number, tried))
        return [tried for *_, tried in sorted(scored, key=lambda item: item[:2])]

    def _result(self, tried: Trial, rung: int) -> float | None:
        """Return a trial's value at a rung, or None if it has none yet. Failed trials get the worst possible value."""
        if tried.state == "failed" and len(tried.values) < self.budgets[rung]:
            return float("-inf") if self.maximise else float("inf")
        if len(tried.values) >= self.budgets[rung] or tried.state == "ended":
            return self.value(tried, self.budgets[rung])
        return None

    # -- proposals ----------------------------------------------------------------------------------------------------

    def _add(self, changes: dict[str, Any]) -> Trial:
        number = len(self.trials)
        bracket = self._bracket(number)
        self.trials.append(Trial(number, bracket, dict(changes), rung=bracket))
        return self.trials[-1]

    def _assignment(self, tried: Trial) -> TrialBudget:
        return TrialBudget(tried.number, dict(tried.changes), self.budgets[tried.rung])

    def _bracket(self, number: int) -> int:
        return allocate_brackets(self.brackets, number + 1)[number]

    def _new_configuration(self) -> dict[str, Any] | None:
        """Return a configuration that has not been tried; None after :data:`MAX_MISSES` attempts without one."""
        known = [tried.changes for tried in self.trials]
        for attempt in range(MAX_MISSES):
            changes = self._propose(attempt)
            if changes not in known:
                return changes
        return None

    def _propose(self, attempt: int) -> dict[str, Any]:
        """Return a configuration proposed by the model of the next trial's bracket. Each attempt has its own seed."""
        number = len(self.trials)
        seed = int(np.random.SeedSequence([self.table.seed, number, attempt]).generate_state(1)[0])
        trial = self._study(self._bracket(number), seed).ask()
        return self.space.configuration(lambda parameter: suggest(trial, parameter))

    def _study(self, bracket: int, seed: int) -> Study:
        """Build an in-memory Optuna study with all measurements of a bracket."""
        trials = [self._measured(tried) for tried in self.trials if tried.bracket == bracket]
        return optuna_study(self.space, trials, maximise=self.maximise, sampler=tpe_sampler(self.table, seed))

    def _measured(self, tried: Trial) -> TrialHistory:
        """Convert a trial to the form for Optuna, with its value at each budget that it has reached."""
        values = {self.budgets[rung]: self._result(tried, rung) for rung in range(tried.bracket, tried.rung + 1)}
        known = {budget: value for budget, value in values.items() if value is not None}
        if tried.state == "failed":
            return TrialHistory(tried.changes, {}, "cut short")
        if not known:
            return TrialHistory(tried.changes, {}, "running")
        is_complete = tried.state == "ended" or max(known) == self.table.max_epochs
        return TrialHistory(tried.changes, known, "complete" if is_complete else "cut short")


def budgets(least: int, most: int, eta: int) -> list[int]:
    """Return the successive budgets of a configuration, in epochs: most / eta^k for every k for which it is >= least.

    They are computed down from the largest, as in Hyperband, so that the last budget is exactly ``most``: 3..30 with
    eta = 3 gives 3 (3.33 rounded), 10 and 30.
    """
    count = 1
    while most / eta**count >= least:
        count += 1
    return sorted({round(most / eta**k) for k in range(count)})


def bracket_sizes(table: BohbSearchConfig) -> list[int]:
    """Return the relative sizes of Hyperband's brackets; bracket b begins at the b-th budget.

    With n budgets, the bracket with s promotions has size ceil(n / (s + 1) * eta^s) (Li et al. 2018). With ``auto``,
    brackets that begin at large budgets are dropped until each has more than :data:`MIN_TRIALS` trials.
    """
    count = len(budgets(table.min_epochs, table.max_epochs, table.eta))
    sizes = [math.ceil(count / (s + 1) * table.eta**s) for s in reversed(range(count))]
    if table.brackets != "auto":
        if table.brackets > count:
            raise UserError(
                f"study.bohb.brackets = {table.brackets}: {table.min_epochs} to {table.max_epochs} epochs with eta = "
                f"{table.eta} have {count} budgets, hence {count} brackets at most"
            )
        return sizes[: table.brackets]
    while len(sizes) > 1 and table.trials * sizes[-1] / sum(sizes) <= MIN_TRIALS:
        sizes.pop()
    return sizes


def allocate_brackets(sizes: Sequence[int], trials: int) -> list[int]:
    """Return the bracket of each trial, in order: the one that is furthest below its share when the trial is added."""
    brackets: list[int] = []
    for number in range(1, trials + 1):
        behind = [size * number / sum(sizes) - brackets.count(bracket) for bracket, size in enumerate(sizes)]
        brackets.append(behind.index(max(behind)))
    return brackets


def search_epochs(table: BohbSearchConfig) -> int:
    """Return the total number of epochs that a search trains if no run fails or stops early."""
    steps, brackets = (
        budgets(table.min_epochs, table.max_epochs, table.eta),
        allocate_brackets(bracket_sizes(table), table.trials),
    )
    total = 0
    for bracket in set(brackets):
        count, before = brackets.count(bracket), 0
        for step in steps[bracket:]:
            total += count * (step - before)
            count, before = max(1, count // table.eta), step
    return total
