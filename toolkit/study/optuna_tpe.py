"""Interface to Optuna for the search and the analysis; its studies are in memory, rebuilt from run directories."""

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
    """A configuration and its results."""

    changes: Mapping[str, Any]
    values: Mapping[int, float]
    """Value of the metric by number of epochs trained; may be empty."""
    state: Literal["running", "cut short", "complete"]


def optuna_study(
    space: SearchSpace, trials: Iterable[TrialHistory], *, maximise: bool, sampler: BaseSampler | None
) -> Study:
    """Build an in-memory Optuna study that contains ``trials`` in order."""
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
    """Return the Optuna distribution of a parameter; for a choice, over option indices, since options may be tables."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.kind == "choice":
        return CategoricalDistribution(tuple(range(len(parameter.values))))
    low, high = parameter.values
    if parameter.kind == "integers":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=parameter.kind == "log_uniform")


def suggest(trial: Trial, parameter: SearchParameter) -> Any:
    """Return the value that Optuna's sampler suggests for a parameter."""
    key, ends = parameter.key, parameter.values
    if parameter.kind == "choice":
        return ends[trial.suggest_categorical(key, tuple(range(len(ends))))]
    if parameter.kind == "integers":
        return trial.suggest_int(key, *ends)
    return parameter.rounded(trial.suggest_float(key, *ends, log=parameter.kind == "log_uniform"))


def _to_optuna(parameter: SearchParameter, value: Any) -> Any:
    return parameter.position(value) if parameter.kind == "choice" else value


def tpe_sampler(table: BohbSearchConfig, seed: int) -> BaseSampler:
    """Build a tree-structured Parzen estimator (Bergstra et al. 2011) that models all parameters jointly, as in BOHB.

    ``group``: conditional parameters are modeled separately. ``constant_liar``: configurations in training count as
    poor, so that workers do not all get similar ones. Every option is set explicitly, since Optuna's defaults have
    changed; deprecation warnings are suppressed, since pyproject.toml bounds the version.
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
    """Return the number of trials that the model treats as good: 15 %, rounded up."""
    return max(1, -(-15 * trials // 100))


def equal_weights(trials: int) -> npt.NDArray[np.float64]:
    """Return equal weights, so that old and new trials count the same in the model."""
    return np.ones(trials)
