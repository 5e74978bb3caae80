"""What notebooks show of runs and studies, and the tables of studies in Python."""

from __future__ import annotations

import html.parser
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import VAL_ACCURACY, write_run
from study_folders import FakeRun, write_study

from toolkit import open_run, open_study
from toolkit.errors import UserError
from toolkit.locks import acquire
from toolkit.report.notebook import MAX_ROWS

STUDY = {"description": "<script>alert(1)</script> & more", "grid": {"optimizer.lr": [0.1, 0.2]}}


class Page(html.parser.HTMLParser):
    """Collects the elements and the text of an HTML fragment."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.elements.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.elements[-1] in ("td", "th", "strong") and self.cells:
            self.cells[-1] += data.strip()


def study_runs() -> list[FakeRun]:
    """Return two finished rows of two seeds, the second of which is better, and one that has not been started."""
    return [
        *(
            FakeRun(f"lr {lr}", seed, {"optimizer.lr": lr}, (0.2, 0.3 + lr + seed / 10), lr)
            for lr in (0.1, 0.2)
            for seed in (0, 1)
        ),
        FakeRun("<img src=x>", 0, {"optimizer.lr": 0.3}, state="missing"),
    ]


def test_a_finished_run_shows_its_state_both_models_and_two_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    page = Page(run._repr_html_())
    assert f"run {run.path}: finished, stopped early after epoch 5" in page.text
    assert page.elements.count("svg") == 2
    epoch = page.cells.index("epoch")
    assert page.cells[epoch - 3 : epoch + 3] == ["", "best", "last", "epoch", "3", "5"]
    accuracy = page.cells.index("validation accuracy")
    assert page.cells[accuracy + 1 : accuracy + 3] == ["90.00 %", "70.00 %"]
    assert "71.43 %" in page.cells, "of the test images"


def test_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    recipe = run.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("A run whose metrics are known", "<script>alert(1)</script>"))
    page = Page(run._repr_html_())
    assert "<script>alert(1)</script>" in page.text
    assert not {"script", "img", "b"}.intersection(page.elements)


def test_a_run_that_has_not_finished_shows_its_best_epoch_so_far(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run.path / "summary.json").unlink()
    page = Page(run._repr_html_())
    assert f"not finished; {len(VAL_ACCURACY)} epochs done" in page.text
    assert "90.00 %" in page.cells
    assert "test accuracy" not in page.cells
    lock = acquire(run.path / ".lock")
    assert "being trained; 5 epochs done" in run._repr_html_()
    lock.release()


def test_missing_and_damaged_files_do_not_prevent_the_display(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    run.metrics_file.write_text("{broken\n" + run.metrics_file.read_text())
    assert "lines of metrics.jsonl: damaged (line 1)" in run._repr_html_()
    run.metrics_file.unlink()
    page = Page(run._repr_html_())
    assert "0 epochs done" in page.text
    assert "svg" not in page.elements


def test_a_study_shows_its_table_and_the_curves_of_its_rows(tmp_path: Path) -> None:
    write_study(tmp_path / "study", STUDY, study_runs())
    study = open_study(tmp_path / "study")
    page = Page(study._repr_html_())
    assert f"study {study.path}: 5 runs, 4 finished, 1 missing" in page.text
    assert "<script>alert(1)</script> & more" in page.text
    assert "<img src=x>" in page.cells
    assert not {"script", "img"}.intersection(page.elements)
    assert "45.00 ± 7.07" in page.cells, "the mean of val. accuracy 0.4 and 0.5"
    assert page.elements.count("svg") == 1


def test_a_long_table_is_cut(tmp_path: Path) -> None:
    write_study(tmp_path, STUDY, [FakeRun(f"row {number}") for number in range(MAX_ROWS + 7)])
    page = Page(open_study(tmp_path)._repr_html_())
    assert page.elements.count("tr") == 1 + MAX_ROWS
    assert "7 more rows" in page.text


def test_the_table_of_a_study_has_a_row_per_setting_and_its_run_table_one_per_run(tmp_path: Path) -> None:
    write_study(tmp_path, STUDY, study_runs())
    study = open_study(tmp_path)
    assert list(study.table.index) == ["lr 0.1", "lr 0.2", "<img src=x>"]
    assert study.table.loc["lr 0.2", "val_accuracy"] == pytest.approx(0.55)
    assert study.table.loc["lr 0.1", "val_accuracy_std"] == pytest.approx(0.005**0.5)
    assert study.table["best"].tolist() == [False, True, False]
    assert [run.id for run in study.runs] == list(study.run_table.index)[:4]
    assert study.run_table["optimizer.lr"].tolist() == [0.1, 0.1, 0.2, 0.2, 0.3]
    assert study.run_table["state"].tolist() == ["finished"] * 4 + ["missing"]


def test_the_best_run_of_a_study_is_the_best_of_its_best_row(tmp_path: Path) -> None:
    runs = study_runs()
    runs[0].val_accuracy, runs[1].val_accuracy = (0.9,), (0.1,)  # the best run is not in the best row
    write_study(tmp_path, STUDY, runs)
    assert open_study(tmp_path).best == open_study(tmp_path).runs[3]


def test_a_study_without_finished_runs_has_no_best_one(tmp_path: Path) -> None:
    write_study(tmp_path, STUDY, [FakeRun("a", state="missing")])
    study = open_study(tmp_path)
    with pytest.raises(UserError, match="has finished, so there is no best run"):
        _ = study.best
    assert "1 missing" in study._repr_html_()


def test_runs_and_studies_are_not_confused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_study(tmp_path / "b", STUDY, study_runs())
    with pytest.raises(UserError, match=r"is not a run directory: .* study's folder \(toolkit\.open_study\)"):
        open_run(tmp_path / "b")
    with pytest.raises(UserError, match="is not a study directory"):
        open_study(run.path)


@pytest.mark.long
def test_opening_and_showing_runs_and_studies_imports_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_study(tmp_path / "b", STUDY, study_runs())
    code = (
        "import sys, toolkit\n"
        f"run, study = toolkit.open_run({str(run.path)!r}), toolkit.open_study({str(tmp_path / 'b')!r})\n"
        "assert not {'torch', 'pandas', 'matplotlib'}.intersection(sys.modules)\n"
        "run._repr_html_(), study._repr_html_(), run.metrics, study.table\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
