"""A study as a W&B sweep: W&B's server chooses the values, and its agents start `toolkit.train` with them.

Format of the configuration: https://docs.wandb.ai/models/sweeps/define-sweep-configuration
"""

from __future__ import annotations

from typing import Any

from toolkit.errors import UserError
from toolkit.metrics import metric_of
from toolkit.recipe.base import NAME_LENGTH
from toolkit.recipe.layers import LayeredConfig
from toolkit.recipe.toml_writer import toml_document
from toolkit.study.expand import StudySpec, expand
from toolkit.study.grid import read_variables
from toolkit.study.search_space import SearchParameter, random_configurations

DISTRIBUTIONS = {"uniform": "uniform", "log_uniform": "log_uniform_values", "integers": "int_uniform"}
"""W&B's names of distributions over a range, by the kind of parameter."""

SAMPLES = 50
"""Number of configurations of a search that are checked before the sweep is written."""


def sweep_config(study: StudySpec, recipe: str, processes: int | None = None) -> dict[str, Any]:
    """Return the configuration of the sweep.

    ``recipe``: path of the file with :func:`sweep_recipe`. ``processes``: training processes of each run; None:
    study.gpus_per_run. Raises UserError if a sweep cannot express the study; RecipeError if its runs are not valid.
    """
    table, tracking = study.table, study.base.tracking
    parameters = _parameters(study)
    _check_expressible(study, parameters)
    _check_runs(study)
    config: dict[str, Any] = {
        "name": study.name,
        "description": table.description or study.base.recipe.description,
        "project": tracking.project,
        "entity": tracking.entity,
        "program": "toolkit.train",
        "command": _command(recipe, processes or table.gpus_per_run),
        "method": "bayes" if table.bohb else "random" if table.random else "grid",
    }
    metric = metric_of(table.metric)
    if not (metric.split == "val" and study.base_values.get("data.split.validation") == 0):
        goal = "maximize" if metric.measure.higher_is_better else "minimize"
        config["metric"] = {"name": table.metric, "goal": goal}
    config["parameters"] = {parameter.key: _parameter(parameter) for parameter in parameters}
    if table.seeds is not None:
        first = study.base.recipe.seed
        seeds = list(range(first, first + table.seeds)) if isinstance(table.seeds, int) else table.seeds
        config["parameters"]["recipe.seed"] = {"values": seeds}
    if table.random:
        config["run_cap"] = table.random.runs
    if table.bohb:
        config["run_cap"] = table.bohb.trials
        config["parameters"]["train.epochs"] = {"value": table.bohb.max_epochs}
        if table.bohb.min_epochs < table.bohb.max_epochs:
            config["early_terminate"] = {
                "type": "hyperband", "min_iter": table.bohb.min_epochs, "eta": table.bohb.eta
            }  # fmt: skip
    return {key: value for key, value in config.items() if value not in (None, "")}


def sweep_recipe(study: StudySpec) -> str:
    """Return the recipe that the runs change, as TOML: the study without [study], logged to W&B.

    Values that the study does not give are left out, because defaults may depend on the values that W&B chooses;
    except that, as in a study, W&B does not get the models unless the recipe says so.
    """
    merged = LayeredConfig()
    for source in study.sources:
        merged.add(source)
    content = {key: value for key, value in merged.data.items() if key != "expected_metrics"}
    content["recipe"] = {**content["recipe"], "name": f"{study.name[: NAME_LENGTH - 6]}-sweep"}
    trackers = list(dict.fromkeys(["wandb", *study.base.tracking.trackers]))
    content["tracking"] = {"upload": ["results"], **content.get("tracking", {}), "trackers": trackers}
    return f"# The recipe of the runs of a W&B sweep, written by toolkit sweep {study.path}\n\n{toml_document(content)}"


def _parameters(study: StudySpec) -> list[SearchParameter]:
    if study.table.random or study.table.bohb:
        return list(study.space.parameters)
    return read_variables(study.table.grid, ("study", "grid"))[0]


def _check_expressible(study: StudySpec, parameters: list[SearchParameter]) -> None:
    table = study.table
    conditional = [parameter.key for parameter in parameters if parameter.when]
    problems = [
        *(f"study.{form} changes several keys together" for form in ("rows", "zip") if getattr(table, form)),
        *([f"{', '.join(conditional)} depends on other keys (when)"] if conditional else []),
        *(["study.seeds repeats each configuration of study.random"] if table.seeds and table.random else []),
    ]
    if problems:
        raise UserError(
            f"{study.path} cannot be a W&B sweep, which chooses each key independently of the others: "
            f"{'; '.join(problems)}. Remove it, or run the study here: toolkit study {study.path}"
        )
    if study.base.tracking.mode in ("offline", "disabled"):
        raise UserError(
            f'tracking.mode = "{study.base.tracking.mode}": W&B chooses values by the metrics that it receives during '
            "training; add --set 'tracking.mode=\"auto\"'"
        )


def _check_runs(study: StudySpec) -> None:
    """Raise RecipeError if a run of the grid, or one of some random configurations of the search, is not valid."""
    if not study.table.space:
        expand(study)
        return
    for changes in random_configurations(study.space, SAMPLES, seed=0):
        study.configuration_run(changes)


def _command(recipe: str, processes: int) -> list[str]:
    """Return the command of each run; the agent replaces ``${...}``, the last one by a JSON object of all values."""
    launcher = ["${interpreter}"]
    if processes > 1:
        launcher = ["torchrun", "--standalone", f"--nproc-per-node={processes}"]
    return ["${env}", *launcher, "-m", "${program}", recipe, "--set", "${args_json}"]


def _parameter(parameter: SearchParameter) -> dict[str, Any]:
    if parameter.kind == "choice":
        return {"values": list(parameter.values)}
    low, high = parameter.values
    return {"distribution": DISTRIBUTIONS[parameter.kind], "min": low, "max": high}
