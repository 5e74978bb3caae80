"""Plots of a study: selects them and prepares their data; drawn by :mod:`toolkit.study.plot_types`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.metrics import best_of, curves_of, higher_is_better, metric_of
from toolkit.report.plot_style import CYCLE, plot_style, save
from toolkit.study import plot_types
from toolkit.study.bohb import BohbScheduler, budgets
from toolkit.study.optuna_tpe import TrialHistory, optuna_study
from toolkit.study.plot_types import Curve, ParallelAxis
from toolkit.study.results import ResultRow, RunResult, short_key, short_value, varied_keys
from toolkit.study.search_space import SearchParameter, SearchSpace, read_parameters
from toolkit.study.study_results import StudyResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_CONFIGURATIONS = 8
"""Minimum number of configurations for estimating the importance of parameters."""
MAX_COLORINGS = 6
"""Maximum number of keys for which a figure with curves colored by the key's value is drawn."""


class StudyFigure(NamedTuple):
    """A figure of a study."""

    name: str
    """File name without suffix."""
    figure: Figure
    caption: str
    has_color_scale: bool = False
    """Whether the colors range from light to dark, which requires a white background."""


def draw(found: StudyResults, folder: Path, log: Callable[[str], None]) -> list[Path]:
    """Write all plots of a study to ``folder`` as SVG and PDF and return the paths. Raises UserError on failure."""
    paths: list[Path] = []
    with plot_style(log):
        for drawn in study_figures(found):
            paths += save(drawn.figure, folder, drawn.name)
    return paths


def study_figures(found: StudyResults) -> Iterator[StudyFigure]:
    """Yield each figure for which the study has results."""
    if not found.trials:
        yield from row_curves(found)
    yield from curves_by_parameter(found)
    yield from level_plot(found)
    if found.trials:
        yield from best_against_cost(found)
    yield from parallel(found)
    yield from importances(found)


# -- curves -----------------------------------------------------------------------------------------------------------


def row_curves(found: StudyResults) -> Iterator[StudyFigure]:
    """Yield one figure with all rows of the study for each of :func:`~toolkit.metrics.curves_of`."""
    for metric in curves_of(record for result in found.results for record in result.epochs):
        plotted = [_curve(row, metric) for row in found.rows if row.finished]
        plotted = [curve for curve in plotted if curve.mean]
        if plotted:
            figure = plot_types.curves(plotted, metric, found.title)
            caption = f"{metric_of(metric).title} by epoch"
            yield StudyFigure(f"curves-{metric.replace('/', '-')}", figure, caption, len(found.rows) > len(CYCLE))


def _curve(row: ResultRow, metric: str) -> Curve:
    """Return a row's curve, up to the last epoch of its shortest finished run, so that every point covers all runs."""
    curves = [result.values(metric) for result in row.finished]
    columns = list(zip(*curves, strict=False))
    std = [statistics.stdev(column) for column in columns] if len(curves) > 1 else []
    return Curve(row.name, [statistics.fmean(column) for column in columns], std)


def curves_by_parameter(found: StudyResults) -> Iterator[StudyFigure]:
    """Yield figures with the curves of all runs for the study's metric, each colored by one parameter."""
    results = [result for result in found.results if result.epochs and (found.trials or result.is_finished)]
    keys = varied_keys(results)
    metric = found.table.metric
    for key in keys[:MAX_COLORINGS]:
        with_it = [result for result in results if key in result.member.changes]
        values = [result.member.changes[key] for result in with_it]
        if len({short_value(value) for value in values}) > 1:
            shown = values if plot_types.is_numeric(values) else [short_value(value) for value in values]
            plotted = list(zip(shown, (result.values(metric) for result in with_it), strict=True))
            is_log = _is_logarithmic(found, key, values)
            figure = plot_types.colored_curves(plotted, metric, key, found.title, log=is_log)
            name = short_key(key, keys).replace(".", "-")
            yield StudyFigure(f"curves-by-{name}", figure, f"Curves of all runs by {name}", has_color_scale=True)


def _is_logarithmic(found: StudyResults, key: str, values: Sequence[Any]) -> bool:
    """Return whether to plot a key on a logarithmic scale: as in the search space, or if its range is wide.

    Batch sizes always use one, since they are usually powers of two.
    """
    kind = next((parameter.kind for parameter in space_of(found).parameters if parameter.key == key), "choice")
    is_doubled = key == "train.batch_size"
    return plot_types.is_numeric(values) and (
        kind == "log_uniform" or is_doubled or (kind == "choice" and plot_types.is_wide(values))
    )


def level_plot(found: StudyResults) -> Iterator[StudyFigure]:
    """Yield a plot of validation and test metrics against a numeric key, such as a dropout rate, if only it varies."""
    rows = [row for row in found.rows if row.finished]
    keys = varied_keys([row.results[0] for row in rows])
    if len(keys) != 1 or found.trials or not all(keys[0] in row.results[0].member.changes for row in rows):
        return
    values = [row.results[0].member.changes[keys[0]] for row in rows]
    if not plot_types.is_numeric(values) or len(set(values)) < 3:
        return
    metric = found.table.output.best_by
    order = sorted(range(len(rows)), key=lambda index: values[index])
    figure = plot_types.levels(
        [values[i] for i in order],
        _points([rows[i] for i in order], metric.replace("/", "_")),
        _points([rows[i] for i in order], metric.replace("val/", "test_")),
        keys[0], metric, found.title, log=_is_logarithmic(found, keys[0], values),
    )  # fmt: skip
    name = keys[0].rsplit(".", 1)[-1]
    yield StudyFigure(f"levels-{name}", figure, f"Best epoch against {name}")


def _points(rows: Sequence[ResultRow], metric: str) -> list[tuple[float, float]]:
    found = [row.metrics.get(metric) for row in rows]
    return [(each.mean, each.std or 0.0) for each in found if each] if all(found) else []


# -- searches ---------------------------------------------------------------------------------------------------------


def best_against_cost(found: StudyResults) -> Iterator[StudyFigure]:
    """Yield a plot of the best value so far against the number of epochs trained."""
    points = incumbents(found)
    metric = found.table.metric
    if points:
        figure = plot_types.incumbent_curve({found.name: points}, metric, found.title)
        yield StudyFigure("best-so-far", figure, "Best value so far against the epochs trained")


def incumbents(found: StudyResults) -> list[tuple[float, float]]:
    """Return (epochs trained, best value so far) after each assignment of the search.

    Run directories do not record when an epoch was trained; the order is that of a single worker.
    """
    metric = found.table.metric
    best: float | None = None
    spent, points = 0, []
    for result, before, until in training_order(found):
        spent += until - before
        candidates = [value for value in (best, result.best(metric, until)) if value is not None]
        best = best_of(candidates, metric)
        if best is not None:
            points.append((float(spent), best))
    return points


def training_order(found: StudyResults) -> list[tuple[RunResult, int, int]]:
    """Return (run, epochs before, epochs after) for a search, in the order in which a single worker would train."""
    results, metric = found.results, found.table.metric
    if found.table.bohb is None:
        return [(result, 0, len(result.epochs)) for result in results]
    search = _ReplayedSearch(found, results)
    order, reached = [], [0] * len(results)
    while (assignment := search.ask()) is not None:
        values = results[assignment.trial].values(metric)
        until = min(assignment.until_epoch, len(values))
        if until > reached[assignment.trial]:
            order.append((results[assignment.trial], reached[assignment.trial], until))
            reached[assignment.trial] = until
        search.tell(assignment.trial, values[:until], ended=until < assignment.until_epoch)
    rest = [(r, before, len(r.epochs)) for r, before in zip(results, reached, strict=True) if len(r.epochs) > before]
    return order + rest


class _ReplayedSearch(BohbScheduler):
    """A search that proposes the recorded configurations again."""

    def __init__(self, found: StudyResults, results: Sequence[RunResult]) -> None:
        assert found.table.bohb is not None
        super().__init__(found.table.bohb.model_copy(update={"trials": len(results)}), space_of(found))
        self.results = results

    def _new_configuration(self) -> dict[str, Any] | None:
        return self.results[len(self.trials)].member.changes


# -- parameters -------------------------------------------------------------------------------------------------------


def space_of(found: StudyResults) -> SearchSpace:
    """Return the space of a search, without conditions; for other studies, the values that occur in their runs."""
    if found.table.space:
        return SearchSpace(tuple(read_parameters(found.table.space)[0]), {})
    values: dict[str, list[Any]] = {}
    for result in found.results:
        for key, value in result.member.changes.items():
            if value not in values.setdefault(key, []):
                values[key].append(value)
    return SearchSpace(tuple(SearchParameter(key, "choice", tuple(known)) for key, known in values.items()), {})


def comparable(found: StudyResults) -> tuple[list[tuple[RunResult, float]], str]:
    """Return the runs whose values can be compared, with these values, and a description of them.

    For BOHB, the value is the best within the smallest budget, which all configurations have reached; those trained
    further are a biased selection.
    """
    metric, bohb = found.table.metric, found.table.bohb
    if bohb is None:
        limit, runs, what = None, [result for result in found.results if result.is_finished], "finished runs"
    else:
        limit = budgets(bohb.min_epochs, bohb.max_epochs, bohb.eta)[0]
        runs = [result for result in found.results if len(result.epochs) >= limit]
        what = f"configurations, within {limit} epochs"
    values = [(result, result.best(metric, limit)) for result in runs]
    return [(result, value) for result, value in values if value is not None], what


def importances(found: StudyResults) -> Iterator[StudyFigure]:
    """Yield a plot of the importance of the parameters."""
    runs, what = comparable(found)
    shares = parameter_importance(found, runs)
    if shares:
        figure = plot_types.importance(shares, f"{found.title}: {len(runs)} {what}")
        yield StudyFigure("importance", figure, "Importance of the parameters")


def parameter_importance(found: StudyResults, runs: Sequence[tuple[RunResult, float]]) -> dict[str, float]:
    """Return Optuna's fANOVA importance (Hutter et al. 2014) per parameter, from 0 to 1; empty with too few runs.

    A parameter that only some runs have is evaluated on those runs; their number is appended to its name.
    """
    everywhere = {key for key in _varied(runs) if all(key in result.member.changes for result, _ in runs)}
    shares = _shares(found, runs, sorted(everywhere)) if len(runs) >= MIN_CONFIGURATIONS else {}
    for key in _varied(runs):
        with_it = [(result, value) for result, value in runs if key in result.member.changes]
        if key not in everywhere and len(with_it) >= MIN_CONFIGURATIONS:
            share = _shares(found, with_it, sorted({*everywhere, key})).get(key)
            if share is not None:
                shares[f"{key} (in {len(with_it)} of {len(runs)})"] = share
    return shares


def _shares(found: StudyResults, runs: Sequence[tuple[RunResult, float]], keys: list[str]) -> dict[str, float]:
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    if len(keys) < 2 or len({value for _, value in runs}) < 2:
        return {}
    trials = [TrialHistory(result.member.changes, {1: value}, "complete") for result, value in runs]
    maximise = higher_is_better(found.table.metric)
    study = optuna_study(space_of(found), trials, maximise=maximise, sampler=None)
    evaluator = FanovaImportanceEvaluator(n_trees=64, max_depth=64, seed=0)
    return dict(get_param_importances(study, evaluator=evaluator, params=keys))


def _varied(runs: Sequence[tuple[RunResult, float]]) -> list[str]:
    """Return the keys with at least two values among the runs."""
    keys = varied_keys([result for result, _ in runs])
    return [k for k in keys if len({repr(r.member.changes[k]) for r, _ in runs if k in r.member.changes}) > 1]


def parallel(found: StudyResults) -> Iterator[StudyFigure]:
    """Yield a parallel coordinates plot of all runs with comparable values."""
    runs, what = comparable(found)
    keys = _varied(runs)
    if len(runs) < 3 or len(keys) < 2:
        return
    metric = found.table.metric
    parameters = {parameter.key: parameter for parameter in space_of(found).parameters}
    axes = [_axis(parameters[key], short_key(key, keys), [result for result, _ in runs]) for key in keys]
    outcome = [value * metric_of(metric).measure.scale for _, value in runs]
    figure = plot_types.parallel_coordinates(axes, outcome, metric, f"{found.title}: {len(runs)} {what}")
    yield StudyFigure("parallel-coordinates", figure, "Parameters and result of each run", has_color_scale=True)


def _axis(parameter: SearchParameter, name: str, results: Sequence[RunResult]) -> ParallelAxis:
    """Build an axis: numbers are positioned by value (or its logarithm), other values at equal distances."""
    key = parameter.key
    values = [result.member.changes.get(key) for result in results]
    given = [value for value in values if value is not None]
    if parameter.kind == "choice" or not plot_types.is_numeric(given):
        options = [value for value in parameter.values if value in given]
        options = sorted(options) if plot_types.is_numeric(options) else options
        positions = {short_value(value): i / max(len(options) - 1, 1) for i, value in enumerate(options)}
        return ParallelAxis(name, [None if v is None else positions[short_value(v)] for v in values],
                    {position: text for text, position in positions.items()})  # fmt: skip
    change = math.log10 if parameter.kind == "log_uniform" else float
    low, high = change(min(given)), change(max(given))
    ticks = {0.0: short_value(min(given)), 1.0: short_value(max(given))}
    return ParallelAxis(name, [None if v is None else (change(v) - low) / (high - low) for v in values], ticks)
