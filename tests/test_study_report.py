"""`toolkit report STUDY`: the files it writes, and its messages about incomplete or damaged studies."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cli import Outcome, toolkit
from report_runs import TABLE, small_study, write_run
from study_folders import FakeRun, write_study

from toolkit.report import plot_style, run_report
from toolkit.report import study_report as written_study
from toolkit.study import plot_types
from toolkit.study.directory import StudyDirectory

pytestmark = pytest.mark.usefixtures("pdf_figures")


@pytest.fixture
def study(tmp_path: Path) -> StudyDirectory:
    """Write a study of two learning rates and two seeds, of which one run failed."""
    return small_study(tmp_path / "study")


@pytest.fixture(autouse=True)
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures as objects, without writing or rendering them."""
    monkeypatch.setattr(written_study, "save", lambda figure, folder, name: [folder / f"{name}.svg"])
    monkeypatch.setattr(written_study, "page_svg", lambda figure, label, is_light: "<svg></svg>")
    monkeypatch.setattr(run_report, "save", lambda figure, folder, name, kinds: [])
    monkeypatch.setattr(run_report, "page_svg", lambda figure, label: "<svg></svg>")


def report(*arguments: object) -> Outcome:
    return toolkit("report", *(str(argument) for argument in arguments))


def page(outcome: Outcome) -> str:
    assert outcome.status == 0, outcome.stderr
    return Path(outcome.stdout.splitlines()[-1]).read_text()


class _Table(HTMLParser):
    """Collects the text of a table's cells row by row."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        start = text.index(f'<table id="{name}"')
        self.feed(text[start : text.index("</table>", start)])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_a_study_report_has_figures_for_print_and_one_page(
    study: StudyDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written_study, "save", plot_style.save)
    monkeypatch.setattr(written_study, "page_svg", plot_style.page_svg)
    outcome = report(study.path)
    text = page(outcome)
    expected = {"curves-train-loss", "curves-train-accuracy", "curves-val-loss", "curves-val-accuracy", "curves-by-lr"}
    assert {path.name for path in (study.path / "figures").iterdir()} == {
        f"{n}.{k}" for n in expected for k in ("svg", "pdf")
    }
    assert outcome.stdout.splitlines()[-1] == str(study.path / "report.html")
    assert text.count('<svg class="drawn') == len(expected)
    assert text.count('<svg class="drawn light"') == 1, "color scales keep a white background"


def test_the_table_shows_published_values_next_to_measured_ones(study: StudyDirectory) -> None:
    head, *rows = _Table(page(report(study.path)), "study-table").rows
    where = head.index("test acc. %")
    assert head[where : where + 3] == ["test acc. %", "published", "diff."]
    assert {row[0]: row[where : where + 3] for row in rows} == {
        "lr 0.1": ["70.00 ± 7.07", "74.00", "\N{MINUS SIGN}4.00"],
        "lr 0.01": ["35.00", "30.00", "+5.00"],
    }


def test_numbers_of_the_table_sort_by_their_value(study: StudyDirectory) -> None:
    text = page(report(study.path))
    for shown, value in (("70.00 ± 7.07", "70.0"), ("\N{MINUS SIGN}4.00", "-4.0"), ("1 of 2", "1.0")):
        assert re.search(rf'data-value="{re.escape(value)}">{re.escape(shown)}<', text), shown


def test_every_run_has_a_table_row_and_a_curve(study: StudyDirectory) -> None:
    text = page(report(study.path))
    _, *rows = _Table(text, "run-table").rows
    assert [row[:6] for row in rows] == [
        ["lr 0.1", "0", "finished", "3", "80.00 %", "75.00 %"],
        ["lr 0.1", "1", "finished", "3", "70.00 %", "65.00 %"],
        ["lr 0.01", "0", "finished", "3", "40.00 %", "35.00 %"],
        ["lr 0.01", "1", "failed", "1", "20.00 %", "-"],
    ]
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', text)
    assert found is not None
    chart = json.loads(found[1])["charts"]["val-accuracy"]
    assert [(one["name"], one["group"], one["y"]) for one in chart["series"]] == [
        ("lr 0.1, seed 0", "lr 0.1", [30, 60, 80]), ("lr 0.1, seed 1", "lr 0.1", [30, 50, 70]),
        ("lr 0.01, seed 0", "lr 0.01", [20, 30, 40]), ("lr 0.01, seed 1", "lr 0.01", [20]),
    ]  # fmt: skip
    looks = {one["group"]: (one["color"], one["dash"]) for one in chart["series"]}
    assert len(set(looks.values())) == 2, "one line style per row"


def test_varied_keys_are_highlighted_and_equal_environments_are_merged(study: StudyDirectory) -> None:
    text = page(report(study.path))
    _, *rows = _Table(text, "recipe-table").rows
    assert {row[0]: row[1] for row in rows}["optimizer.lr"] == "0.1, 0.01"
    marked = re.findall(r'<tr class="changed"[^>]*><td[^>]*><code>(.*?)</code>', text)
    assert marked == ["recipe.seed", "optimizer.lr"]
    assert ["host", "node0 | node1"] in _Table(text, "environment-table").rows
    assert ["packages torch", "2.15.0"] in _Table(text, "environment-table").rows


def test_the_page_links_to_the_reports_of_its_runs(study: StudyDirectory) -> None:
    assert '<a href="2026' not in page(report(study.path)), "no run has a report yet"
    outcome = report(study.path, "--runs")
    links = re.findall(r'<a href="(2026[^"]*)"', page(outcome))
    assert len(links) == 4, "the failed run has a report up to its last epoch"
    assert all((study.path / link).is_file() for link in links)
    assert "run 1 of 4: " in outcome.stderr


def test_failures_are_listed(study: StudyDirectory) -> None:
    outcome = report(study.path)
    assert "not shown: lr 0.01, seed 1: the loss is <nan>" in outcome.stderr
    text = page(outcome)
    assert "the loss is &lt;nan&gt;" in text
    assert "Two &lt;b&gt;rates&lt;/b&gt;" in text


def test_the_options_figures_only_and_json_of_a_study_report(study: StudyDirectory, tmp_path: Path) -> None:
    found = json.loads(report(study.path, "--figures-only", "--json").stdout)
    assert found["report"] is None
    assert not (study.path / "report.html").exists()
    found = json.loads(report(study.path, "-o", tmp_path / "a" / "b.html", "--json").stdout)
    assert found["report"] == str(tmp_path / "a" / "b.html")
    assert [Path(file).name for file in found["figures"]][-1] == "curves-by-lr.svg"


# Incomplete and damaged studies


def test_a_study_without_a_finished_epoch_is_refused(tmp_path: Path) -> None:
    write_study(
        tmp_path / "study", TABLE, [FakeRun("a", state="missing"), FakeRun("b", val_accuracy=(), state="paused")]
    )
    outcome = report(tmp_path / "study")
    assert outcome.status == 2
    assert f"no run of the study in {tmp_path / 'study'} has a finished epoch" in outcome.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "name": "x", "study": {"rows": 3}, '
                                     '"search": null, "complete": true, "members": []}'])  # fmt: skip
def test_a_damaged_study_is_refused(study: StudyDirectory, content: str) -> None:
    (study.path / "study.json").write_text(content)
    outcome = report(study.path)
    assert outcome.status == 2
    assert str(study.path / "study.json") in outcome.stderr
    assert "Traceback" not in outcome.stderr


GARBAGE = {
    "summary.json": ["{", '{"best": 3}', "[]"],
    "metrics.jsonl": ["{\n{}\n", '{"val/loss": 1}\n'],
    "environment.json": ["", "[1]"],
    "recipe.toml": ["", "x = "],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_damaged_runs_are_named_and_the_rest_is_reported(study: StudyDirectory, name: str) -> None:
    run = study.run(study.members[0])
    assert run is not None
    for content in (*GARBAGE[name], None):
        if content is None:
            (run.path / name).unlink()
        else:
            (run.path / name).write_text(content)
        outcome = report(study.path)
        text = page(outcome)
        assert "Traceback" not in outcome.stderr
        if (name, content) not in (("summary.json", None), ("metrics.jsonl", None), ("recipe.toml", None)):
            assert "not shown: " in outcome.stderr, (name, content)
        rows = {tuple(row[:2]): row[2] for row in _Table(text, "run-table").rows}
        assert rows["lr 0.1", "1"] == "finished"


def test_a_path_that_is_neither_run_nor_study_is_refused(tmp_path: Path) -> None:
    outcome = report(tmp_path)
    assert outcome.status == 2
    assert f"{tmp_path} is not a run directory (no recipe.toml) or a study's folder (no study.json)" in outcome.stderr
    write_run(tmp_path / "deep", images=False)
    outcome = report(tmp_path / "deep")
    assert outcome.status == 2
    assert f"it has run directories, the newest is {tmp_path / 'deep' / 'run'}" in outcome.stderr


def test_options_for_runs_are_refused_for_studies_and_vice_versa(study: StudyDirectory, tmp_path: Path) -> None:
    assert "--filters is for runs" in report(study.path, "--filters", "1").stderr
    outcome = report(write_run(tmp_path / "deep", images=False).path, "--runs")
    assert (outcome.status, "--runs is for studies" in outcome.stderr) == (2, True)


def test_a_long_title_is_not_cut() -> None:
    title = (
        "Optimizer x learning rate x weight decay x momentum x dropout on a frozen EfficientNet-Lite0: 23 finished runs"
    )
    drawn = plot_types.importance({"optimizer.learning_rate": 0.9, "optimizer.weight_decay": 0.1}, title)
    drawn.draw_without_rendering()
    box = drawn._suptitle.get_window_extent()  # type: ignore[union-attr]
    assert box.x0 >= 0
    assert box.x1 <= drawn.bbox.x1
