"""`toolkit report STUDY --wandb` with W&B's real client and library, and a local server in place of W&B's.

The tests check the uploaded data, not how W&B displays them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from cli import Outcome, toolkit
from report_runs import small_study, write_run
from wandb_server import KEY, ServerRun, WandbServer, logged_in_here, wandb_server, without_login

from toolkit.report import run_report
from toolkit.report import study_report as written_study
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _a_machine_without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_login(monkeypatch, tmp_path)
    for name in ("WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(written_study, "save", lambda figure, folder, name: [])
    monkeypatch.setattr(written_study, "page_svg", lambda figure, label, is_light: "<svg></svg>")
    monkeypatch.setattr(run_report, "_figures", lambda data: {})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with logged_in_here(monkeypatch) as server:
        yield server
        wandb.teardown()


@pytest.fixture
def study(tmp_path: Path) -> StudyDirectory:
    """Write a study of four runs tracked by W&B, of which one failed in its second epoch."""
    study = small_study(tmp_path / "study")
    for key in ids(study):
        folder = study.path / key / "wandb" / f"offline-run-20260101_000000-{key}"
        folder.mkdir(parents=True)
        (folder / f"run-{key}.wandb").touch()
    return study


def ids(study: StudyDirectory) -> list[str]:
    return [str(member.run) for member in study.members]


def report(study: StudyDirectory, *arguments: str) -> Outcome:
    return toolkit("report", str(study.path), "--wandb", *arguments)


def uploaded(server: WandbServer, keys: list[str]) -> None:
    server.runs.update({key: ServerRun() for key in keys})


def spec(server: WandbServer) -> dict[str, Any]:
    (view,) = server.views.values()
    found: dict[str, Any] = json.loads(view["spec"])
    return found


def blocks(server: WandbServer, kind: str) -> list[dict[str, Any]]:
    return [block for block in spec(server)["blocks"] if block["type"] == kind]


def test_a_report_has_table_curves_comparison_and_notes_of_the_studys_runs(
    study: StudyDirectory, server: WandbServer
) -> None:
    uploaded(server, [*ids(study), "somebody-elses"])
    outcome = report(study)
    assert outcome.status == 0, outcome.stderr
    (view,) = server.views.values()
    assert (view["displayName"], view["project"]["name"], view["project"]["entityName"]) == (
        "Two b rates b", "toolkit", "me"
    )  # fmt: skip
    link = outcome.stdout.splitlines()[-1]
    assert link.startswith(f"{server.url}/me/toolkit/reports/")
    assert link.endswith(view["id"])
    assert (study.path / "report.html").exists(), "the local HTML report is written too"

    texts = [block["content"] for block in blocks(server, "markdown-block")]
    assert any("70.00 ± 7.07" in text and "74.00" in text for text in texts), "the table, with the published metrics"
    assert any("mereu, table 14" in text for text in texts), "notes"
    grids = blocks(server, "panel-grid")
    panels = [panel for grid in grids for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]]
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert [line["metrics"] for line in lines] == [
        ["train/loss"], ["train/accuracy"], ["val/loss"], ["val/accuracy"], ["lr"],
    ]  # fmt: skip
    assert {line["xAxis"] for line in lines} == {"epoch"}
    assert lines[0]["overrideSeriesTitles"][f"{ids(study)[1]}:train/loss"] == "lr 0.1, seed 1"
    kinds = [panel["viewType"] for panel in panels]
    assert kinds.count("Bar Chart") == 2
    assert {"Parallel Coordinates Plot", "Run Comparer"} <= set(kinds)
    for grid in grids:
        (runset,) = grid["metadata"]["runSets"]
        assert (runset["project"]["entityName"], runset["project"]["name"]) == ("me", "toolkit")
        assert _values(runset["filters"]) == [(("run", "name"), "IN", ids(study))], (
            "the runs are pinned: later runs are not included"
        )


def _values(node: Any) -> list[tuple[tuple[str, str], str, Any]]:
    """Return key, operation and value of each nested filter."""
    if isinstance(node, list):
        return [found for part in node for found in _values(part)]
    if not isinstance(node, dict):
        return []
    if "key" in node and "value" in node:
        return [((node["key"]["section"], node["key"]["name"]), node["op"], node["value"])]
    return [found for part in node.values() for found in _values(part)]


def test_a_second_call_updates_the_same_report(study: StudyDirectory, server: WandbServer) -> None:
    uploaded(server, ids(study)[:2])
    first = report(study)
    assert "2 of 4 runs: not uploaded; toolkit sync" in first.stderr
    uploaded(server, ids(study))
    second = report(study)
    assert second.stderr.count("not uploaded") == 0
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]
    assert len(server.views) == 1
    (runset,) = blocks(server, "panel-grid")[0]["metadata"]["runSets"]
    assert _values(runset["filters"])[0][2] == ids(study)
    server.views.clear()
    assert report(study).status == 0, "after deletion on the server a new report is created"
    assert len(server.views) == 1


def test_json_output_has_the_link_in_every_tracking_mode(
    study: StudyDirectory, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    uploaded(server, ids(study))
    outcome = report(study, "--json")
    assert json.loads(outcome.stdout)["wandb"].startswith(server.url)


# Errors


def test_a_report_without_a_login_is_one_message(study: StudyDirectory) -> None:
    outcome = report(study)
    assert outcome.status == 2
    assert outcome.stderr.splitlines()[-1].startswith("no W&B report: there is no W&B login. Log in with: wandb login")
    assert "Traceback" not in outcome.stderr
    assert not (study.path / "report.html").exists(), "refused before anything is drawn"


def test_a_report_without_a_server_is_one_message(study: StudyDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with wandb_server() as gone:
        url = gone.url
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    outcome = report(study)
    assert outcome.status == 2
    assert "no W&B report: its server 127.0.0.1 cannot be reached" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_report_without_runs_on_the_server_is_one_message(study: StudyDirectory, server: WandbServer) -> None:
    outcome = report(study)
    assert outcome.status == 2
    assert f"none of the study's runs is on W&B; toolkit sync {study.path} uploads them" in outcome.stderr


def test_a_report_that_the_server_rejects_is_one_message(
    study: StudyDirectory, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded(server, ids(study))
    monkeypatch.setattr(server, "_upsert_view", lambda variables: None)
    outcome = report(study)
    assert outcome.status == 1
    assert "W&B rejected the report (" in outcome.stderr
    assert "Traceback" not in outcome.stderr


# Runs


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Write a finished run tracked by W&B."""
    run = write_run(tmp_path, images=False)
    folder = run.path / "wandb" / "offline-run-20260101_000000-known-1"
    folder.mkdir(parents=True)
    (folder / "run-known-1.wandb").touch()
    return run


def test_the_report_of_a_run_has_what_was_uploaded(run: Run, server: WandbServer) -> None:
    outcome = toolkit("report", run.path, "--wandb", "--figures-only")
    assert outcome.status == 2
    assert outcome.stderr.endswith(f"no W&B report: the run is not on W&B; toolkit sync {run.path} uploads it\n")
    uploaded(server, ["known-1", "somebody-elses"])
    assert toolkit("report", run.path, "--wandb", "--figures-only").status == 0
    assert f"W&B has no charts, tables and images of this run; `toolkit sync {run.path}`." in blocks(
        server, "markdown-block"
    )[1]["content"]  # fmt: skip
    server.runs["known-1"].summary = dict.fromkeys(
        ("confusion_matrix_table", "roc_table", "filters", "training_samples", "predictions", "val/loss"), 1
    )
    outcome = toolkit("report", run.path, "--wandb")
    assert outcome.status == 0, outcome.stderr
    (view,) = server.views.values()
    assert view["displayName"] == f"known {run.id}"
    assert outcome.stdout.splitlines()[-1].startswith(f"{server.url}/me/toolkit/reports/")
    (table,) = [block["content"] for block in blocks(server, "markdown-block")]
    assert "| test accuracy (%) | 71.43 |" in table
    curves, results = blocks(server, "panel-grid")
    for grid in (curves, results):
        (runset,) = grid["metadata"]["runSets"]
        assert _values(runset["filters"]) == [(("run", "name"), "IN", ["known-1"])]
    assert len(curves["metadata"]["panelBankSectionConfig"]["panels"]) == 5, "four metrics and the learning rate"
    panels = results["metadata"]["panelBankSectionConfig"]["panels"]
    charts = [panel["config"] for panel in panels if panel["viewType"] == "Vega2"]
    assert [chart["panelDefId"] for chart in charts] == ["wandb/confusion_matrix/v1", "wandb/area-under-curve/v0"]
    assert "roc_table" in json.dumps(charts[1])
    media = [panel["config"]["mediaKeys"] for panel in panels if panel["viewType"] == "Media Browser"]
    assert media == [["filters"], ["training_samples"]]
    (weave,) = [panel for panel in panels if panel["viewType"] == "Weave"]
    assert '"predictions"' in json.dumps(weave)


def test_the_report_of_an_untracked_run_is_one_message(tmp_path: Path, server: WandbServer) -> None:
    outcome = toolkit("report", write_run(tmp_path, images=False).path, "--wandb", "--figures-only")
    assert outcome.status == 2
    assert outcome.stderr.splitlines()[-1].endswith("was not tracked by W&B")
