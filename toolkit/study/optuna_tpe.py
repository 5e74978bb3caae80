"""Optuna as the search and the analysis use it: always in memory, made anew from what run directories say."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from toolkit.recipe.study_schema import BohbSearchConfig
from toolkit.study.search_space import SearchParameter, SearchSpace

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial


@dataclass(frozen=True)
class TrialHistory:
    """What is known of a configuration."""

    changes: Mapping[str, Any]
    values: Mapping[int, float]
    """Epochs -> the metric; may be empty."""
    state: Literal["running", "cut short", "complete"]


def optuna_study(
    space: SearchSpace, trials: Iterable[TrialHistory], *, maximise: bool, sampler: BaseSampler | None
) -> Study:
    """An Optuna study in memory that has seen ``trials``, in their order."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(),
        direction="maximize" if maximise else "minimize",
        sampler=sampler,
        pruner=optuna.pruners.NopPruner(),
        study_name="study",
    )
    study.add_trials([_frozen(space, trial) for trial in trials])
    return study


def _frozen(space: SearchSpace, trial: TrialHistory) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    states = {"running": TrialState.RUNNING, "cut short": TrialState.PRUNED, "complete": TrialState.COMPLETE}
    varied = [parameter for parameter in space.parameters if parameter.key in trial.changes]
    return create_trial(
        state=states[trial.state],
        value=list(trial.values.values())[-1] if trial.state == "complete" else None,
        params={parameter.key: _to_optuna(parameter, trial.changes[parameter.key]) for parameter in varied},
        distributions={parameter.key: distribution(parameter) for parameter in varied},
        intermediate_values=dict(trial.values),
    )


def distribution(parameter: SearchParameter) -> BaseDistribution:
    """Optuna's distribution of a parameter; of a choice, over the positions of its options (which may be tables)."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.kind == "choice":
        return CategoricalDistribution(tuple(range(len(parameter.values))))
    low, high = parameter.values
    if parameter.kind == "integers":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=parameter.kind == "log_uniform")


def suggest(trial: Trial, parameter: SearchParameter) -> Any:
    """The value that Optuna's sampler proposes for a parameter."""
    key, ends = parameter.key, parameter.values
    if parameter.kind == "choice":
        return ends[trial.suggest_categorical(key, tuple(range(len(ends))))]
    if parameter.kind == "integers":
        return trial.suggest_int(key, *ends)
    return parameter.rounded(trial.suggest_float(key, *ends, log=parameter.kind == "log_uniform"))


def _to_optuna(parameter: SearchParameter, value: Any) -> Any:
    return parameter.position(value) if parameter.kind == "choice" else value


def tpe_sampler(table: BohbSearchConfig, seed: int) -> BaseSampler:
    """The tree-structured Parzen estimator (Bergstra et al. 2011), over all parameters jointly as BOHB's is.

    ``group``: parameters that only some configurations have get a model of their own. ``constant_liar``: configurations
    that are still being trained count as poor, so that workers do not all get the same one. Every option is given,
    since Optuna's defaults have changed; it warns of some that they will go, which pyproject.toml's bounds provide for.
    """
    from optuna.samplers import TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TPESampler(
            n_startup_trials=table.startup_trials,
            n_ei_candidates=64,
            multivariate=True,
            group=True,
            constant_liar=True,
            consider_prior=True,
            prior_weight=1.0,
            consider_magic_clip=True,
            consider_endpoints=False,
            gamma=n_good_trials,
            weights=equal_weights,
            warn_independent_sampling=False,
            seed=seed,
        )


def n_good_trials(trials: int) -> int:
    """How many of so many trials the model takes for good ones."""
    return max(1, -(-15 * trials // 100))


def equal_weights(trials: int) -> npt.NDArray[np.float64]:
    """What each trial weighs in the model: an old one as much as a new one."""
    return np.ones(trials)
