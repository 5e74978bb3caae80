"""Publish a run as a W&B report: metrics, curves, and the charts, tables and images that were uploaded."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from toolkit.errors import UserError
from toolkit.metrics import metrics_in
from toolkit.report.run_data import RunData, load_run_data
from toolkit.report.wandb_report import curve_panels, on_server, open_library, save_report, server_errors
from toolkit.runs import Run
from toolkit.study.text_table import TextTable, markdown
from toolkit.wandb_results import CHARTS, IMAGES, TABLES
from toolkit.wandb_sync import wandb_run_id


def create_wandb_run_report(run: Run) -> str:
    """Create the report of a run on W&B, or update it if it exists; return its URL.

    Raises UserError if there is no login, the server does not answer or does not have the run; RunFailed if the server
    rejects the report.
    """
    reports, run_id, data = open_library(), wandb_run_id(run), load_run_data(run)
    if run_id is None:
        raise UserError(f"no W&B report: {run.path} was not tracked by W&B")
    import wandb

    with server_errors():
        api, tracking = wandb.Api(), run.recipe.tracking
        project = tracking.entity or str(api.default_entity), tracking.project
        if not on_server(api, project, [run_id]):
            raise UserError(f"no W&B report: the run is not on W&B; toolkit sync {run.path} uploads it")
        uploaded = api.run("/".join((*project, run_id))).summary
        runset = reports.Runset(
            entity=project[0], project=project[1], name="The run", filters=f"Metric('ID') in {[run_id]!r}"
        )
        blocks = [
            reports.H1("Metrics"),
            reports.MarkdownBlock(markdown(_metrics(data))),
            reports.H1("Curves"),
            reports.PanelGrid(runsets=[runset], panels=curve_panels(reports, data.epochs, {run_id: data.name})),
            reports.H1("Results"),
            _results(reports, runset, uploaded, run),
        ]
        description = data.recipe.recipe.description if data.recipe else ""
        return save_report(reports, run.path, project, f"{data.name} {run.id}", description, blocks)


def _metrics(data: RunData) -> TextTable:
    """Return a table of the metrics of the best and the last model; without values for an unfinished run."""
    best, last = (data.summary[model] if data.summary else {} for model in ("best", "last"))
    shown = [metric for metric in metrics_in(data.summary or {}) if metric.model == "best" and metric.key in best]
    rows = [("epoch", str(best["epoch"]), str(last["epoch"]))] if data.summary else []
    for metric in shown:
        measure = metric.measure
        values = (f"{measure.scale * model[metric.key]:.{measure.decimals}f}" for model in (best, last))
        rows.append((metric.axis_label, *values))  # type: ignore[arg-type]
    return TextTable(data.name, ["metric", "best model", "last model"], rows)


def _results(reports: Any, runset: Any, uploaded: Container[str], run: Run) -> Any:
    """Return the panels of what W&B has of the run besides metrics; a note if there is nothing."""
    panels = [
        reports.CustomChart(
            query={"summaryTable": {"tableKey": f"{name}_table"}},
            chart_name=chart.spec,
            chart_fields=chart.fields,
            chart_strings=chart.texts,
        )
        for name, chart in CHARTS.items()
        if f"{name}_table" in uploaded
    ]
    panels += [
        reports.MediaBrowser(title=title, media_keys=[name]) for name, title in IMAGES.items() if name in uploaded
    ]
    panels += [reports.WeavePanelSummaryTable(table_name=name) for name in TABLES if name in uploaded]
    if not panels:
        return reports.MarkdownBlock(f"W&B has no charts, tables and images of this run; `toolkit sync {run.path}`.")
    return reports.PanelGrid(runsets=[runset], panels=panels)
