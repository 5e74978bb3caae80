"""Publish a study as a W&B report with W&B's own library: table, curves, comparison and notes of its runs only."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import RunFailed, UserError, first_line
from toolkit.metrics import CURVES, metric_of
from toolkit.reading import read_json
from toolkit.report.plot_style import CYCLE
from toolkit.runs import Run, write_atomically
from toolkit.study.export_tables import StudyResults
from toolkit.study.results import RunResult
from toolkit.study.results_table import title
from toolkit.study.text_table import markdown
from toolkit.study.trial_table import search_metric, varied_keys
from toolkit.trackers import offline_reason
from toolkit.wandb_sync import id_at_wandb

FILE = "wandb-report.json"
"""File in the study's folder that records the report, so that the next call updates it."""
TITLE = 128
"""Maximum length of a title on W&B."""
UNFIT = r"[/?#%\\<>]"
"""Characters that the library does not escape in the link, which breaks it."""
SHOWN = 100
"""Maximum number of runs in one panel; W&B's default is ten."""

SavedReport = tuple[str, str]
"""Entity and project."""


@dataclass(frozen=True)
class TrackedRun:
    """A run of the study that is on W&B."""

    id: str
    """Id of the run on W&B."""
    result: RunResult

    @property
    def name(self) -> str:
        """Label of the run's line in the plots."""
        return f"{self.result.member.row}, seed {self.result.member.seed}"


@dataclass(frozen=True)
class WandbReport:
    """A report on W&B."""

    url: str
    missing: list[str]
    """Messages about runs that are not on W&B."""


def create_wandb_report(found: StudyResults, folder: Path) -> WandbReport:
    """Create the report of a study on W&B, or update it if it exists.

    The report selects the study's runs by id, so later runs do not appear in it. Raises UserError if there is no login,
    the server does not answer, or no run of the study is on it; RunFailed if the server rejects the report.
    """
    reports = _library()
    if why := offline_reason():
        raise UserError(
            f"no W&B report: {why}. Log in with: wandb login (or set WANDB_API_KEY, and WANDB_BASE_URL for a server of "
            "your own). The report in one HTML file needs neither"
        )
    import wandb

    try:
        api = wandb.Api()
        tracked, missing = _tracked(found, folder, api)
        if not tracked:
            raise UserError(f"no W&B report: none of the study's runs is on W&B; toolkit sync {folder} uploads them")
        report = _saved(reports, found, folder, tracked, missing)
    except UserError:
        raise
    except Exception as error:  # from the client, its HTTP library or its schema
        raise RunFailed(f"W&B rejected the report ({first_line(error)}); try again later") from error
    return WandbReport(report.url, missing)


def _library() -> Any:
    logging.getLogger("wandb_workspaces").setLevel(logging.ERROR)
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError:
        raise UserError("--wandb needs W&B's library for reports: pip install wandb-workspaces") from None
    return reports


def _tracked(found: StudyResults, folder: Path, api: Any) -> tuple[dict[SavedReport, list[TrackedRun]], list[str]]:
    """Return the study's runs that are on the server, by project, and messages about those that are not."""
    asked: dict[SavedReport, dict[str, TrackedRun]] = {}
    untracked, seen = 0, set()
    for result in found.results:
        name = result.member.run
        if name is None or name in seen or not result.epochs:
            continue
        seen.add(name)
        run = Run(folder / name)
        known = id_at_wandb(run)
        if known is None:
            untracked += 1
            continue
        table = run.recipe.tracking
        place = (table.entity or str(api.default_entity), table.project)
        asked.setdefault(place, {})[known] = TrackedRun(known, result)
    there = {place: _on_server(api, place, list(runs)) for place, runs in asked.items()}
    tracked = {place: [runs[key] for key in runs if key in there[place]] for place, runs in asked.items()}
    absent = sum(len(runs) for runs in asked.values()) - sum(len(runs) for runs in tracked.values())
    missing = [f"{untracked} of {len(seen)} runs: they were not tracked by W&B"] if untracked else []
    missing += [f"{absent} of {len(seen)} runs: not uploaded; toolkit sync {folder}"] if absent else []
    return {place: runs for place, runs in tracked.items() if runs}, missing


def _on_server(api: Any, place: SavedReport, ids: Sequence[str]) -> set[str]:
    """Return the ids of the runs that the server has."""
    try:
        runs = api.runs("/".join(place), filters={"name": {"$in": list(ids)}}, per_page=min(max(len(ids), 1), 500))
        return {str(run.id) for run in runs} & set(ids)
    except ValueError as error:
        if "not find project" not in str(error):
            raise
        return set()


def _saved(
    reports: Any, found: StudyResults, folder: Path, tracked: dict[SavedReport, list[TrackedRun]], missing: list[str]
) -> Any:
    entity, project = next(iter(tracked))
    name = " ".join(re.sub(UNFIT, " ", title(found.table, found.name)).split())[:TITLE]
    report = reports.Report(entity=entity, project=project, title=name)
    report.description = f"{sum(map(len, tracked.values()))} runs of the study {found.name}"
    report.blocks = _blocks(reports, found, tracked, missing)
    report.id = _id_before(reports, folder, (entity, project))
    report.save()
    content = {"id": report.id, "entity": entity, "project": project, "url": report.url}
    write_atomically(folder / FILE, (json.dumps(content, indent=2) + "\n").encode())
    return report


def _id_before(reports: Any, folder: Path, place: SavedReport) -> str:
    """Return the id of the existing report; "" if there is none, which creates a new one."""
    if not (folder / FILE).exists():
        return ""
    try:
        before = read_json(folder / FILE)
        if (before["entity"], before["project"]) != place:
            return ""
        return str(reports.Report.from_url(before["url"]).id)
    except Exception:  # the report was deleted or is not accessible; the library may raise anything
        return ""


def _blocks(
    reports: Any, found: StudyResults, tracked: dict[SavedReport, list[TrackedRun]], missing: Sequence[str]
) -> list[Any]:
    rows = list(dict.fromkeys(result.member.row for result in found.results))
    runsets = [_runset(reports, place, runs, rows) for place, runs in tracked.items()]
    every = [run for runs in tracked.values() for run in runs]
    captions = {**{metric: metric_of(metric).label.capitalize() for metric in CURVES}, "lr": "Learning rate"}
    curves = [_curve(reports, metric, caption, every) for metric, caption in captions.items()]
    return [
        reports.H1("Table"),
        reports.MarkdownBlock(markdown(found.main)),
        reports.H1("Curves"),
        reports.PanelGrid(runsets=runsets, panels=curves),
        reports.H1("Comparison"),
        reports.PanelGrid(runsets=runsets, panels=_comparison(reports, found)),
        reports.H1("Notes"),
        reports.MarkdownBlock(_notes(found, missing)),
    ]


def _runset(reports: Any, place: SavedReport, runs: Sequence[TrackedRun], rows: Sequence[str]) -> Any:
    """Build a run set of exactly these runs; the seeds of a row share a color."""
    colours = {run.id: CYCLE[rows.index(run.result.member.row) % len(CYCLE)] for run in runs}
    return reports.Runset(
        entity=place[0],
        project=place[1],
        name="Runs of the study",
        filters=f"Metric('ID') in {[run.id for run in runs]!r}",
        run_settings={key: reports.RunSettings(color=colour) for key, colour in colours.items()},
    )


def _curve(reports: Any, metric: str, caption: str, runs: Sequence[TrackedRun]) -> Any:
    return reports.LinePlot(
        title=caption,
        x="epoch",
        y=[metric],
        title_x="epoch",
        max_runs_to_show=SHOWN,
        smoothing_type="none",
        line_titles={f"{run.id}:{metric}": run.name for run in runs},
    )


def _comparison(reports: Any, found: StudyResults) -> list[Any]:
    metric = metric_of(search_metric(found.table)).name
    figures = dict.fromkeys((metric, metric.replace("val_", "test_")))
    bars = [
        reports.BarPlot(
            title=f"Best epoch: {figure.replace('_', ' ')}",
            metrics=[reports.SummaryMetric(f"best.{figure}")],
            max_runs_to_show=SHOWN,
            max_bars_to_show=SHOWN,
        )
        for figure in figures
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
        "The table was made by `toolkit report` from the run directories. Curves and bars are W&B's, of the study's "
        "runs only. Each row of the table has its own color, as long as there are enough colors."
    )
    return "\n\n".join(lines)
