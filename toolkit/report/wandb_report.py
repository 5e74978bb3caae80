"""Publish a study as a W&B report, with its table, curves, comparison and notes, using W&B's own library."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import RunFailed, UserError, first_line, missing_package
from toolkit.metrics import curves_of, metric_of
from toolkit.reading import read_json
from toolkit.report.plot_style import CYCLE
from toolkit.runs import Run
from toolkit.study.export_tables import main_table
from toolkit.study.results import RunResult, varied_keys
from toolkit.study.study_results import StudyResults
from toolkit.study.text_table import markdown
from toolkit.trackers import offline_reason
from toolkit.wandb_sync import wandb_run_id
from toolkit.writing import write_atomically

FILE = "wandb-report.json"
"""File in the folder of a study or run that records the report, so that the next call updates it."""
MAX_TITLE = 128
"""Maximum length of a title on W&B."""
UNSAFE = r"[/?#%\\<>]"
"""Characters in a title that break the report's URL, since the library does not escape them."""
MAX_RUNS = 100
"""Maximum number of runs in one panel; W&B's default is ten."""

Project = tuple[str, str]
"""Entity and project on W&B."""

TrackedRuns = dict[Project, dict[str, RunResult]]
"""The study's runs that are on W&B, by project and W&B id."""


def create_wandb_report(found: StudyResults, folder: Path) -> tuple[str, list[str]]:
    """Create the report of a study on W&B, or update it if it exists.

    Returns its URL and messages about runs that are not on W&B. The report selects the study's runs by id, so later
    runs do not appear in it. Raises UserError if there is no login, the server does not answer, or it has none of the
    study's runs; RunFailed if the server rejects the report.
    """
    reports = open_library()
    import wandb

    with server_errors():
        tracked, missing = _tracked(found, folder, wandb.Api())
        if not tracked:
            raise UserError(f"no W&B report: none of the study's runs is on W&B; toolkit sync {folder} uploads them")
        description = f"{sum(map(len, tracked.values()))} runs of the study {found.name}"
        blocks = _blocks(reports, found, tracked, missing)
        return save_report(reports, folder, next(iter(tracked)), found.title, description, blocks), missing


@contextlib.contextmanager
def server_errors() -> Iterator[None]:
    """Raise RunFailed in place of whatever the client, its HTTP library or its schema raises in this context."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise RunFailed(f"W&B rejected the report ({first_line(error)}); try again later") from error


def open_library() -> Any:
    """Return W&B's library for reports. Raises UserError if it is not installed, or W&B cannot be used."""
    reports = _library()
    if why := offline_reason():
        raise UserError(
            f"no W&B report: {why}. Log in with: wandb login (or set WANDB_API_KEY, and WANDB_BASE_URL for your own "
            "server). The HTML report requires neither"
        )
    return reports


def _library() -> Any:
    logging.getLogger("wandb_workspaces").setLevel(logging.ERROR)
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError:
        raise missing_package("--wandb", "wandb-workspaces", "wandb-report") from None
    return reports


def _tracked(found: StudyResults, folder: Path, api: Any) -> tuple[TrackedRuns, list[str]]:
    """Return the study's runs that are on the server, and messages about those that are not."""
    begun: dict[str, RunResult] = {}
    for result in found.results:
        if result.member.run is not None and result.epochs:
            begun.setdefault(result.member.run, result)
    local: TrackedRuns = {}
    for name, result in begun.items():
        run = Run(folder / name)
        if (run_id := wandb_run_id(run)) is not None:
            config = run.recipe.tracking
            local.setdefault((config.entity or str(api.default_entity), config.project), {})[run_id] = result
    tracked: TrackedRuns = {}
    for project, runs in local.items():
        uploaded = on_server(api, project, list(runs))
        if present := {run_id: result for run_id, result in runs.items() if run_id in uploaded}:
            tracked[project] = present
    known, present_count = (sum(map(len, runs.values())) for runs in (local, tracked))
    missing = []
    if untracked := len(begun) - known:
        missing.append(f"{untracked} of {len(begun)} runs: they were not tracked by W&B")
    if absent := known - present_count:
        missing.append(f"{absent} of {len(begun)} runs: not uploaded; toolkit sync {folder}")
    return tracked, missing


def on_server(api: Any, project: Project, ids: Sequence[str]) -> set[str]:
    """Return the ids of those runs that are on the server."""
    try:
        runs = api.runs("/".join(project), filters={"name": {"$in": list(ids)}}, per_page=min(max(len(ids), 1), 500))
        return {str(run.id) for run in runs} & set(ids)
    except ValueError as error:
        if "not find project" not in str(error):
            raise
        return set()


def save_report(
    reports: Any, folder: Path, project: Project, title: str, description: str, blocks: Sequence[Any]
) -> str:
    """Create or update the report of a study or run, record it in its folder, and return its URL."""
    name = " ".join(re.sub(UNSAFE, " ", title).split())[:MAX_TITLE]
    report = reports.Report(entity=project[0], project=project[1], title=name)
    report.description = description
    report.blocks = list(blocks)
    report.id = _existing_id(reports, folder, project)
    report.save()
    content = {"id": report.id, "entity": project[0], "project": project[1], "url": report.url}
    write_atomically(folder / FILE, (json.dumps(content, indent=2) + "\n").encode())
    return str(report.url)


def _existing_id(reports: Any, folder: Path, project: Project) -> str:
    """Return the id of the existing report; "" if there is none, in which case a new one is created."""
    if not (folder / FILE).exists():
        return ""
    try:
        before = read_json(folder / FILE)
        if (before["entity"], before["project"]) != project:
            return ""
        return str(reports.Report.from_url(before["url"]).id)
    except Exception:  # the report was deleted or is not accessible; the library may raise anything
        return ""


def _blocks(reports: Any, found: StudyResults, tracked: TrackedRuns, missing: Sequence[str]) -> list[Any]:
    rows = list(dict.fromkeys(result.member.row for result in found.results))
    runsets = [_runset(reports, project, runs, rows) for project, runs in tracked.items()]
    labels = {run_id: result.title for runs in tracked.values() for run_id, result in runs.items()}
    records = [record for result in found.results for record in result.epochs]
    return [
        reports.H1("Table"),
        reports.MarkdownBlock(markdown(main_table(found))),
        reports.H1("Curves"),
        reports.PanelGrid(runsets=runsets, panels=curve_panels(reports, records, labels)),
        reports.H1("Comparison"),
        reports.PanelGrid(runsets=runsets, panels=_comparison(reports, found)),
        reports.H1("Notes"),
        reports.MarkdownBlock(_notes(found, missing)),
    ]


def curve_panels(reports: Any, records: Sequence[Container[str]], labels: Mapping[str, str]) -> list[Any]:
    """Return a panel for each metric that epoch records have, and the learning rate; ``labels``: titles by W&B id."""
    captions = {**{metric: metric_of(metric).title for metric in curves_of(records)}, "lr": "Learning rate"}
    return [
        reports.LinePlot(
            title=caption,
            x="epoch",
            y=[metric],
            title_x="epoch",
            max_runs_to_show=MAX_RUNS,
            smoothing_type="none",
            line_titles={f"{run_id}:{metric}": label for run_id, label in labels.items()},
        )
        for metric, caption in captions.items()
    ]


def _runset(reports: Any, project: Project, runs: dict[str, RunResult], rows: Sequence[str]) -> Any:
    """Build a run set of exactly these runs; the seeds of a row share a color."""
    return reports.Runset(
        entity=project[0],
        project=project[1],
        name="Runs of the study",
        filters=f"Metric('ID') in {list(runs)!r}",
        run_settings={
            run_id: reports.RunSettings(color=CYCLE[rows.index(result.member.row) % len(CYCLE)])
            for run_id, result in runs.items()
        },
    )


def _comparison(reports: Any, found: StudyResults) -> list[Any]:
    metric = metric_of(found.table.metric).name
    bars = [
        reports.BarPlot(
            title=f"Best epoch: {name.replace('_', ' ')}",
            metrics=[reports.SummaryMetric(f"best.{name}")],
            max_runs_to_show=MAX_RUNS,
            max_bars_to_show=MAX_RUNS,
        )
        for name in dict.fromkeys((metric, metric.replace("val_", "test_")))
    ]
    columns = [reports.ParallelCoordinatesPlotColumn(metric=reports.Config(key), display_name=key)
               for key in varied_keys(found.results)]  # fmt: skip
    outcome = reports.ParallelCoordinatesPlotColumn(metric=reports.SummaryMetric(f"best.{metric}"), display_name=metric)
    parallel = [reports.ParallelCoordinatesPlot(columns=[*columns, outcome])] if columns else []
    return [*bars, *parallel, reports.RunComparer(diff_only="split")]


def _notes(found: StudyResults, missing: Sequence[str]) -> str:
    lines = [f"Published results: {found.table.source}."] if found.table.source else []
    lines += [found.table.note] if found.table.note else []
    lines += [f"Not in this report: {line}." for line in missing]
    lines.append(
        "`toolkit report` created the table from the run directories. W&B draws the curves and bars from the study's "
        "runs only. The runs of a row share a color; rows beyond the seventh repeat the colors."
    )
    return "\n\n".join(lines)
