"""Checks that a recipe's loss, sampling, thresholds and metrics suit its kind of task."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.metrics import EPOCH_METRICS, EXPECTED_METRICS, METRICS, is_measured, measures_of, metric_of, plugin_of
from toolkit.plugins import PREFIX
from toolkit.recipe.diagnostics import Issue, error, warning
from toolkit.recipe.earlier_versions import renamed_metric
from toolkit.recipe.schema import Recipe
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value
from toolkit.recipe.type_descriptions import shown
from toolkit.similar_names import did_you_mean


def task(recipe: Recipe) -> Iterator[Issue]:
    """Check that loss, sampling, thresholds and all metrics suit the kind of task."""
    kind, table = recipe.task.kind, recipe.train
    here = f"task.kind = {toml_value(kind)}"
    if kind == "single_label":
        if recipe.task.threshold != "validation":
            yield warning("task.threshold", f"has no effect with {here}", "task.kind", at="key")
    else:
        if table.loss == "cross_entropy":
            text = f"cross-entropy needs images with exactly one class, but {here}"
            yield error("train.loss", text, "task.kind", hint='set "bce", "focal" or "asymmetric"')
        if table.sampling == "balanced":
            text = f"balanced sampling needs images with exactly one class, but {here}"
            yield error("train.sampling", text, "task.kind", hint='set train.class_weights = "balanced"')
        if recipe.task.threshold == "validation" and recipe.data.split.validation == 0:
            text = "the thresholds are chosen on validation images, but data.split.validation is 0"
            hint = "set task.threshold = 0.5"
            yield error("task.threshold", text, "data.split.validation", hint=hint, at="table")
    for key, name in _metrics_of(recipe):
        if not is_measured(name, kind):
            text = f"{metric_of(name).measure.label} is not computed with {here}"
            yield error(key, text, "task.kind", hint=f"available metrics: {', '.join(measures_of(kind))}")


def unknown_metrics(recipe: Recipe) -> Iterator[Issue]:
    """Check that the metrics which are not built in are those of a plugin in ``train.metrics``."""
    own = recipe.train.own_metrics
    for key, name in _metrics_of(recipe):
        if (plugin := plugin_of(name)) is None or plugin in own:
            continue
        known = EPOCH_METRICS if "/" in name else tuple(METRICS)
        if (new := renamed_metric(name)) in known:
            hint: str | None = f"renamed to {toml_value(new)}"
        else:
            similar = [*known, *(name.removesuffix(plugin) + one for one in own)]
            hint = did_you_mean(name, similar, otherwise=f'or add "{PREFIX}{plugin}" to train.metrics, if it is yours')
        yield error(key, f"the run has no metric {shown(name)}", "train.metrics", hint=hint)


def _metrics_of(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yield every metric in a recipe, with the key that contains it."""
    if recipe.train.best_metric != "last":
        yield ("train", "best_metric"), recipe.train.best_metric
    yield ("scheduler", "metric"), recipe.scheduler.metric
    yield ("early_stopping", "metric"), recipe.early_stopping.metric
    for name in recipe.expected_metrics:
        if name in EXPECTED_METRICS:  # another check reports unknown metrics
            yield ("expected_metrics", name), EXPECTED_METRICS[name].name
    if recipe.study is None:
        return
    output = recipe.study.output
    yield ("study", "output", "best_by"), output.best_by
    if output.per_epoch is not None:
        yield ("study", "output", "per_epoch"), output.per_epoch
    for index, name in enumerate(output.columns):
        yield ("study", "output", "columns", index), name
    for index, row in enumerate(recipe.study.rows):
        for name in row.published:
            yield ("study", "rows", index, "published", name), name
    for index, claim in enumerate(recipe.study.claims):
        yield ("study", "claims", index, "metric"), claim.metric
    if recipe.study.bohb is not None:
        yield ("study", "bohb", "metric"), recipe.study.bohb.metric
