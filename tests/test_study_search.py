"""BOHB's logic on formulas instead of training: budgets, promotions, proposals, and rebuilding a search."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from toolkit.errors import UserError
from toolkit.recipe.study_schema import BohbSearchConfig
from toolkit.study import bohb as search_module
from toolkit.study.bohb import BohbScheduler, RestoredTrial, TrialBudget, bracket_sizes, budgets, search_epochs
from toolkit.study.search_space import SearchSpace, random_configurations, read_space

SPACE: dict[str, Any] = {
    "optimizer": {
        "lr": {"log_uniform": [1e-6, 1e-1]},
        "weight_decay": {"log_uniform": [1e-6, 1e-1]},
        "name": {"choice": ["sgd", "adamw"]},
        "momentum": {"uniform": [0, 0.99], "when": {"optimizer": {"name": "sgd"}}},
    }
}
"""mereu's."""

Objective = Callable[[dict[str, Any]], list[float]]


def mereus_space() -> SearchSpace:
    return read_space(SPACE, {})


def losses(changes: dict[str, Any]) -> list[float]:
    """Return the losses of 30 epochs: lowest at lr 10^-1.5 with SGD, 10^-3 with AdamW, and weight decay 1e-4."""
    best = -1.5 if changes["optimizer.name"] == "sgd" else -3.0
    off = abs(math.log10(changes["optimizer.lr"]) - best) + 0.2 * abs(math.log10(changes["optimizer.weight_decay"]) + 4)
    return [0.1 + 0.1 * off + math.exp(-epoch / (5 + 2 * off)) for epoch in range(1, 31)]


def bohb(trials: int = 27, **settings: Any) -> BohbScheduler:
    return BohbScheduler(
        BohbSearchConfig(trials=trials, **{"brackets": 1, "metric": "val/loss", **settings}), mereus_space()
    )


def finish(search: BohbScheduler, objective: Objective = losses, limit: int = 10_000) -> list[TrialBudget]:
    """Run all assignments in one worker; return them in order."""
    done = []
    while len(done) < limit and (assignment := search.ask()) is not None:
        done.append(assignment)
        search.tell(assignment.trial, objective(assignment.changes)[: assignment.until_epoch])
    return done


# -- space ------------------------------------------------------------------------------------------------------------


def test_a_conditional_parameter_is_sampled_only_if_its_condition_holds() -> None:
    drawn = random_configurations(mereus_space(), 200, seed=0)
    assert all(("optimizer.momentum" in c) == (c["optimizer.name"] == "sgd") for c in drawn)
    assert {c["optimizer.name"] for c in drawn} == {"sgd", "adamw"}
    searched = bohb(40)
    finish(searched)
    assert all(("optimizer.momentum" in t.changes) == (t.changes["optimizer.name"] == "sgd") for t in searched.trials)


def test_samples_stay_in_range_and_follow_the_given_distribution() -> None:
    space = read_space(
        {
            "a": {"log_uniform": [1e-6, 1e-1]},
            "b": {"uniform": [0.2, 0.4]},
            "c": {"integers": [1, 3]},
            "d": {"choice": ["x", "y"]},
        },
        {},
    )
    drawn = random_configurations(space, 3000, seed=1)
    a = np.array([c["a"] for c in drawn])
    assert a.min() >= 1e-6
    assert a.max() <= 1e-1
    # Each of five decades of a logarithmic range gets a fifth; 3 standard deviations are 2.2 %.
    assert abs(np.mean(a < 1e-5) - 0.2) < 0.025
    assert abs(np.mean([c["b"] for c in drawn]) - 0.3) < 0.005
    counts = Counter(c["c"] for c in drawn)
    assert set(counts) == {1, 2, 3}
    assert max(counts.values()) < 1100
    assert all(isinstance(c["c"], int) for c in drawn)


def test_random_search_is_seeded_and_a_longer_one_starts_with_the_shorter() -> None:
    space = mereus_space()
    assert random_configurations(space, 8, seed=3) == random_configurations(space, 20, seed=3)[:8]
    assert random_configurations(space, 8, seed=3) != random_configurations(space, 8, seed=4)


def test_random_search_repeats_no_configuration_and_ends_when_the_space_is_exhausted() -> None:
    space = read_space({"a": {"choice": [1, 2]}, "b": {"integers": [1, 3]}}, {})
    drawn = random_configurations(space, 50, seed=0)
    assert sorted((c["a"], c["b"]) for c in drawn) == [(a, b) for a in (1, 2) for b in (1, 2, 3)]


def test_a_condition_may_refer_to_a_fixed_key_or_to_an_inactive_one() -> None:
    ranges = {"momentum": {"uniform": [0, 1], "when": {"name": ["sgd", "nag"]}}}
    assert list(read_space(ranges, {"name": "nag"}).draw(np.random.default_rng(0))) == ["momentum"]
    assert read_space(ranges, {"name": "adamw"}).draw(np.random.default_rng(0)) == {}
    chain = {
        "c": {"choice": [1, 2], "when": {"b": [True]}},
        "b": {"choice": [True, False], "when": {"a": ["on"]}},
        "a": {"choice": ["on", "off"]},
    }
    for drawn in random_configurations(read_space(chain, {"b": True}), 6, seed=0):
        assert ("b" in drawn) == (drawn["a"] == "on")
        assert ("c" in drawn) == (drawn.get("b") is True)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "study.space is empty"),
        ({"lr": [1, 2]}, "study.space.lr: expected { uniform = [a, b] }, { log_uniform"),
        ({"lr": {"log_unifrom": [1e-3, 1e-1]}}, "did you mean log_uniform?"),
        ({"lr": {"log_uniform": [0, 1]}}, "study.space.lr: log_uniform: expected two numbers above 0, found [0, 1]"),
        ({"lr": {"uniform": [2, 1]}}, "uniform: expected two numbers, the lower one first, found [2, 1]"),
        ({"lr": {"uniform": [0, 1], "choice": [1]}}, "expected one of"),
        ({"n": {"integers": [1, 2.5]}}, "integers: expected two whole numbers"),
        ({"n": {"integers": [False, True]}}, "integers: expected two whole numbers"),
        ({"n": {"choice": []}}, "choice: expected at least one value and no duplicates"),
        ({"n": {"choice": [1, 2, 1]}}, "choice: expected at least one value and no duplicates"),
        ({"m": {"uniform": [0, 1], "when": {"optimizer": {"nam": "sgd"}}}}, "did you mean optimizer.name?"),
        (
            {"name": {"choice": ["sgd"]}, "m": {"uniform": [0, 1], "when": {"name": "sdg"}}},
            "study.space.m: when name = 'sdg': the space never gives it that value",
        ),
        (
            {"a": {"choice": [1, 2], "when": {"b": 1}}, "b": {"choice": [1, 2], "when": {"a": 1}}},
            "conditions are circular: a on b on a",
        ),
    ],
)
def test_an_invalid_space_is_refused_with_the_key(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_space(space, {"optimizer.name": "sgd"})
    assert message in str(caught.value)


def test_all_errors_of_a_space_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        read_space({"a": {"uniform": [1, 0]}, "b": {"choice": []}}, {})
    assert len(str(caught.value).splitlines()) == 2


# -- budgets and brackets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "most", "eta", "expected"),
    [(3, 30, 3, [3, 10, 30]), (1, 27, 3, [1, 3, 9, 27]), (4, 30, 3, [10, 30]), (5, 5, 2, [5]), (1, 4, 3, [1, 4])],
)
def test_budgets_are_counted_from_the_largest(least: int, most: int, eta: int, expected: list[int]) -> None:
    assert budgets(least, most, eta) == expected


def test_trials_are_distributed_over_brackets_as_in_hyperband() -> None:
    # Three budgets, eta 3: ceil(3/3 * 9), ceil(3/2 * 3), ceil(3/1 * 1).
    assert bracket_sizes(BohbSearchConfig(trials=100, brackets=3)) == [9, 5, 3]
    assert bracket_sizes(BohbSearchConfig(trials=100, min_epochs=1, max_epochs=27, brackets=4)) == [27, 12, 6, 4]


def test_there_is_one_bracket_if_more_would_get_ten_trials_or_fewer() -> None:
    assert bracket_sizes(BohbSearchConfig(trials=28)) == [9]  # 28 * 5 / 14 = 10
    assert bracket_sizes(BohbSearchConfig(trials=29)) == [9, 5]
    assert bracket_sizes(BohbSearchConfig(trials=56)) == [9, 5]  # 56 * 3 / 17 < 10
    assert bracket_sizes(BohbSearchConfig(trials=57)) == [9, 5, 3]


def test_more_brackets_than_budgets_are_refused() -> None:
    with pytest.raises(UserError, match="have 3 budgets, hence 3 brackets at most"):
        bracket_sizes(BohbSearchConfig(trials=24, brackets=4))


def test_trials_of_each_bracket_start_at_its_budget() -> None:
    search = bohb(34, brackets=3)
    first = {a.trial: a.until_epoch for a in reversed(finish(search))}
    assert Counter(first.values()) == {3: 18, 10: 10, 30: 6}


# -- promotions -------------------------------------------------------------------------------------------------------


def fixed(values: dict[int, float]) -> Callable[[TrialBudget], list[float]]:
    """Return an objective that gives each trial a constant loss."""
    return lambda assignment: [values[assignment.trial]] * assignment.until_epoch


def test_the_best_third_is_promoted_as_soon_as_possible() -> None:
    search = bohb(9)
    train = fixed({0: 0.5, 1: 0.3, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.1, 6: 0.6, 7: 0.4, 8: 0.2})
    assigned = []
    while (assignment := search.ask()) is not None:
        assigned.append((assignment.trial, assignment.until_epoch))
        search.tell(assignment.trial, train(assignment))
    # One of three may be promoted: 1 is the best of three, 5 of six, 8 of nine, and 5 of the three at 10 epochs.
    assert assigned == [(0, 3), (1, 3), (2, 3), (1, 10), (3, 3), (4, 3), (5, 3), (5, 10), (6, 3), (7, 3), (8, 3),
                        (8, 10), (5, 30)]  # fmt: skip
    assert search.is_done


def test_a_promoted_configuration_continues_and_is_not_trained_again() -> None:
    """27 trials: 9 continue from 3 to 10 epochs, 3 from 10 to 30; trained again they would cost 9 * 3 + 3 * 10 more."""
    search = bohb(27)
    trained, again, reached = 0, 0, Counter[int]()
    for assignment in finish(search):
        trained += assignment.until_epoch - reached[assignment.trial]
        again += assignment.until_epoch
        reached[assignment.trial] = assignment.until_epoch
    assert Counter(reached.values()) == {3: 18, 10: 6, 30: 3}
    assert trained == 27 * 3 + 9 * 7 + 3 * 20 == 204
    assert again == trained + 9 * 3 + 3 * 10


def test_at_most_one_of_eta_trials_is_promoted_however_good_later_trials_are() -> None:
    """Each trial is better than all earlier ones, so that it is among the best third when its result arrives."""
    search, running = bohb(27), Counter[int]()
    while (assignment := search.ask()) is not None:
        search.tell(assignment.trial, [1 / (1 + assignment.trial)] * assignment.until_epoch)
        running[assignment.until_epoch] += 1
        assert running[10] <= running[3] / 3
        assert running[30] <= running[10] / 3
    assert running == {3: 27, 10: 9, 30: 3}


@pytest.mark.parametrize("settings", [{}, {"trials": 10}, {"trials": 60, "brackets": "auto"}, {"brackets": 3},
                                      {"trials": 2}, {"min_epochs": 1, "max_epochs": 16, "eta": 2}])  # fmt: skip
def test_the_total_epochs_of_a_search_are_known_in_advance(settings: dict[str, Any]) -> None:
    search = bohb(**{"trials": 34, **settings})
    finish(search)
    assert sum(len(t.values) for t in search.trials) == search_epochs(search.table)


def test_workers_do_not_wait_for_a_rung_to_fill() -> None:
    """With three workers, one very slow, the others always get an assignment while trials remain."""
    search = bohb(12)
    slow = search.ask()
    assert slow is not None
    for _ in range(11):
        assignment = search.ask()
        assert assignment is not None
        search.tell(assignment.trial, losses(assignment.changes)[: assignment.until_epoch])
    while (assignment := search.ask()) is not None:
        search.tell(assignment.trial, losses(assignment.changes)[: assignment.until_epoch])
    assert not search.is_done, "the slow trial is still training"
    search.tell(slow.trial, losses(slow.changes)[: slow.until_epoch])
    finish(search)
    assert search.is_done


@pytest.mark.parametrize("trials", [1, 2, 3, 5])
def test_a_small_search_also_trains_its_best_trial_to_the_end(trials: int) -> None:
    search = bohb(trials)
    finish(search)
    whole = [t for t in search.trials if len(t.values) == 30]
    at_three = {t.number: min(losses(t.changes)[:3]) for t in search.trials}
    assert min(at_three, key=at_three.__getitem__) in [t.number for t in whole]


def test_accuracy_is_maximized() -> None:
    search = bohb(9, metric="val/accuracy")
    finish(search, lambda changes: [1 - loss for loss in losses(changes)])
    best = max(search.trials, key=lambda t: 1 - losses(t.changes)[29])
    assert len(best.values) == 30


def test_a_trials_value_is_that_of_its_best_epoch_so_far() -> None:
    search = bohb(3)
    curves = [[0.1, 0.9, 0.9], [0.5, 0.5, 0.5], [0.6, 0.6, 0.2]]
    for curve in curves:
        assignment = search.ask()
        assert assignment is not None
        search.tell(assignment.trial, curve)
    promoted = search.ask()
    assert promoted is not None
    assert (promoted.trial, promoted.until_epoch) == (0, 10)


def test_an_early_stopped_run_is_not_assigned_again_and_counts_at_higher_budgets() -> None:
    search = bohb(3)
    for loss in (0.1, 0.5, 0.6):
        assignment = search.ask()
        assert assignment is not None
        search.tell(assignment.trial, [loss] * 3, ended=loss == 0.1)
    assert search.ask() is None
    assert search.is_done
    assert search.trials[0].rung == 2


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_trial_counts_as_worse_than_all_others() -> None:
    search = bohb(6)
    for trial in range(3):
        assert search.ask() is not None
        if trial:
            search.tell(trial, [0.9] * 3)
        else:
            search.trials[trial].state = "failed"
    promoted = search.ask()
    assert promoted is not None
    assert (promoted.trial, promoted.until_epoch) == (1, 10)
    search.trials[1].state = "failed"
    finish(search)
    assert search.is_done
    assert search.trials[0].state == search.trials[1].state == "failed"


def test_a_search_ends_if_every_trial_fails() -> None:
    search = bohb(20)
    count = 0
    while (assignment := search.ask()) is not None:
        search.trials[assignment.trial].state = "failed"
        count += 1
    assert count == 20
    assert search.is_done


def test_the_model_avoids_regions_where_trials_fail() -> None:
    """All trials above lr 1e-4, 3/5 of the space, diverge: 60 of 100 proposals by chance, under half by the model."""
    high = 0
    for seed in range(4):
        search = bohb(40, startup_trials=15, seed=seed)
        while (assignment := search.ask()) is not None:
            if assignment.changes["optimizer.lr"] > 1e-4:
                search.trials[assignment.trial].state = "failed"
            else:
                decay = abs(math.log10(assignment.changes["optimizer.weight_decay"]) + 4)
                search.tell(assignment.trial, [decay] * assignment.until_epoch)
        high += sum(t.changes["optimizer.lr"] > 1e-4 for t in search.trials[15:])
    assert high < 30


def test_a_failed_trial_can_be_retried() -> None:
    search = bohb(3)
    first = search.ask()
    assert first is not None
    search.trials[first.trial].state = "failed"
    search.tell(first.trial, [0.1] * 3)
    finish(search)
    assert search.is_done
    assert len(search.trials[0].values) == 3 or search.trials[0].rung > 0


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_model_proposes_after_the_startup_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another objective gives the same startup configurations and different ones once the model proposes."""

    def other(changes: dict[str, Any]) -> list[float]:
        return [abs(math.log10(changes["optimizer.lr"]) + 6.0)] * 30

    one, two = bohb(30, startup_trials=12), bohb(30, startup_trials=12)
    # Without promotions both searches have the same number of results at each proposal.
    monkeypatch.setattr(BohbScheduler, "_promotable_from", lambda *_: None)
    finish(one)
    finish(two, other)
    assert [t.changes for t in one.trials[:12]] == [t.changes for t in two.trials[:12]]
    assert all(a.changes != b.changes for a, b in zip(one.trials[12:], two.trials[12:], strict=True))
    # If a small lr is best, the mean exponent of the proposals is far below -3.5, the middle of the space.
    assert np.mean([math.log10(t.changes["optimizer.lr"]) for t in two.trials[12:]]) < -4.5


def test_the_model_beats_random_search_at_equal_epochs() -> None:
    """Of six searches at least five beat a random search that trains the same number of epochs."""
    wins = 0
    for seed in range(6):
        search = bohb(60, seed=seed)
        finish(search)
        epochs = sum(len(t.values) for t in search.trials)
        found = min(min(t.values) for t in search.trials if len(t.values) == 30)
        drawn = random_configurations(mereus_space(), round(epochs / 30), 1000 + seed)
        wins += found < min(min(losses(changes)) for changes in drawn)
    assert wins >= 5


def test_every_option_of_the_sampler_is_given() -> None:
    """Optuna has changed defaults before, so a new option must be reviewed. Unset ones serve other problems."""
    import inspect

    from optuna.samplers import TPESampler

    from toolkit.study.optuna_tpe import tpe_sampler

    source = inspect.getsource(tpe_sampler)
    options = set(inspect.signature(TPESampler.__init__).parameters) - {"self"}
    assert {name for name in options if f"{name}=" not in source} <= {"constraints_func", "categorical_distance_func"}


def test_an_exhausted_space_ends_the_search() -> None:
    space = read_space({"a": {"choice": [1, 2]}, "b": {"integers": [1, 2]}}, {})
    search = BohbScheduler(BohbSearchConfig(trials=50, brackets=1), space)
    finish(search, lambda changes: [changes["a"] / 10 + changes["b"] / 20] * 30)
    assert len(search.trials) == 4
    assert search.is_used_up
    assert search.is_done


# -- rebuilding an interrupted search ---------------------------------------------------------------------------------


def known(search: BohbScheduler) -> list[RestoredTrial]:
    """Return the records that run directories keep of a search."""
    states: dict[str, Any] = {"failed": "failed", "ended": "ended"}
    return [
        RestoredTrial(t.changes, search.budgets[t.rung], list(t.values), states.get(t.state, "open"))
        for t in search.trials
    ]


def in_training(search: BohbScheduler) -> list[tuple[int, int]]:
    """Return assigned trials without a result yet, with their target epochs."""
    return [(t.number, search.budgets[t.rung]) for t in search.trials if t.state == "training"]


@pytest.mark.parametrize("brackets", [1, 2])
def test_a_search_rebuilt_at_any_moment_continues_as_if_uninterrupted(brackets: int) -> None:
    whole = finish(bohb(29, brackets=brackets, seed=5))
    moments = random.Random(0).sample(range(1, len(whole)), 8)
    for moment in moments:
        first = bohb(29, brackets=brackets, seed=5)
        finish(first, limit=moment)
        second = bohb(29, brackets=brackets, seed=5)
        second.restore(known(first))
        assert in_training(second) == []
        assert finish(second) == whole[moment:]


def test_trials_in_training_are_continued_first() -> None:
    first = bohb(27)
    finish(first, limit=20)
    unfinished = first.ask()
    assert unfinished is not None
    half = losses(unfinished.changes)[: unfinished.until_epoch - 1]
    rebuilt = bohb(27)
    records = known(first)
    records[unfinished.trial] = RestoredTrial(unfinished.changes, unfinished.until_epoch, half)
    rebuilt.restore(records)
    assert in_training(rebuilt) == [(unfinished.trial, unfinished.until_epoch)]
    # Meanwhile other trials are assigned, but not the one in training.
    other = rebuilt.ask()
    assert other is not None
    assert other.trial != unfinished.trial


def test_a_trial_without_any_epoch_is_continued_too() -> None:
    first = bohb(5)
    assignment = first.ask()
    assert assignment is not None
    rebuilt = bohb(5)
    rebuilt.restore([RestoredTrial(assignment.changes, assignment.until_epoch)])
    assert in_training(rebuilt) == [(assignment.trial, assignment.until_epoch)]


def test_failed_trials_stay_failed() -> None:
    first = bohb(6)
    for _ in range(2):
        assert first.ask() is not None
    first.trials[0].state = "failed"
    rebuilt = bohb(6)
    rebuilt.restore(known(first))
    assert [trial for trial, _ in in_training(rebuilt)] == [1]
    assert rebuilt.trials[0].state == "failed"


def test_a_completed_search_continues_with_more_trials() -> None:
    first = bohb(12)
    finish(first)
    longer = bohb(18)
    longer.restore(known(first))
    finish(longer)
    assert [t.changes for t in longer.trials[:12]] == [t.changes for t in first.trials]
    assert len(longer.trials) == 18


def test_different_seeds_differ_and_equal_seeds_repeat() -> None:
    assert finish(bohb(15, seed=1)) == finish(bohb(15, seed=1))
    assert finish(bohb(15, seed=1)) != finish(bohb(15, seed=2))


def test_no_two_workers_get_the_same_configuration() -> None:
    """Results arrive in any order; no configuration is proposed twice or lost."""
    search, order = bohb(40, seed=2), random.Random(1)
    unfinished: list[TrialBudget] = []
    while not search.is_done:
        while len(unfinished) < 3 and (assignment := search.ask()) is not None:
            unfinished.append(assignment)
        done = unfinished.pop(order.randrange(len(unfinished)))
        search.tell(done.trial, losses(done.changes)[: done.until_epoch])
    proposals = [repr(sorted(t.changes.items())) for t in search.trials]
    assert len(set(proposals)) == len(proposals) == 40


def test_a_brackets_model_uses_only_its_own_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a bracket ignores trials of other brackets, whose values are from other budgets."""
    seen: list[int] = []
    monkeypatch.setattr(
        search_module, "optuna_study",
        lambda space, trials, **named: (seen.append(len(trials)), original(space, trials, **named))[1],
    )  # fmt: skip
    search = bohb(28, brackets=2)
    finish(search)
    sizes = Counter(t.bracket for t in search.trials)
    assert sorted(seen[-2:]) == sorted([sizes[0] - 1, sizes[1] - 1])


original = search_module.optuna_study
