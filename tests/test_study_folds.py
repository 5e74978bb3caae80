"""Folds as an axis of a study: rows with mean and spread over folds, and out-of-fold predictions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from cli import toolkit
from studies import BASE, study_folder
from study_folders import FakeRun, write_study
from two_digits import write_two_digits

from toolkit.recipe.diagnostics import RecipeError
from toolkit.study.directory import FOLD, StudyDirectory
from toolkit.study.expand import expand, read_study

FOLDS = 3


def write(folder: Path, study: str, split: str = f"{{ folds = {FOLDS}, validation = 0.3 }}") -> Path:
    """Write a study on all digits, of which few are for training."""
    text = BASE.replace("split = {{ validation = 0.3, test = 0.2 }}", "").replace("test_images_per_class = 5", "")
    text = text.format(root=folder / "runs", epochs=1).replace("[model]", f"split = {split}\n\n[model]", 1)
    path = folder / "study.toml"
    path.write_text(text + study)
    return path


def grid(**values: object) -> str:
    return "[study.grid]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def test_folds_are_no_part_of_the_names_of_rows(tmp_path: Path) -> None:
    """Folds and seeds of the same values are runs of one row, wherever the key is in the grid."""
    for keys in ({FOLD: [0, 1, 2], "optimizer.lr": [0.1, 0.2]}, {"optimizer.lr": [0.1, 0.2], FOLD: [0, 1, 2]}):
        runs = expand(read_study(write(tmp_path, "[study]\nseeds = 2\n" + grid(**keys)))).runs
        found = [(run.member.row, run.member.seed, run.member.fold) for run in runs]
        rows = [(row, seed, fold) for row in ("lr 0.1", "lr 0.2") for seed in (0, 1) for fold in range(FOLDS)]
        assert sorted(found) == rows
        assert len({run.member.hash for run in runs}) == 12
    path = write(tmp_path, grid(**{FOLD: [0, 1]}))
    (row,) = {run.member.row for run in expand(read_study(path)).runs}
    assert row == "small"
    outcome = toolkit("study", path, "--plan")
    assert outcome.stdout.splitlines()[4].split(maxsplit=5)[-1] == "data.split.fold = 0 | 1"


def test_a_fold_that_does_not_exist_or_is_searched_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="3 is not one of the 3 folds"):
        expand(read_study(write(tmp_path, grid(**{FOLD: [0, 3]}))))
    space = "[study.random]\nruns = 2\n[study.space]\ndata.split.fold = { choice = [0, 1] }\n"
    with pytest.raises(RecipeError, match=r"data\.split\.fold cannot be a search parameter"):
        read_study(write(tmp_path, space))


@pytest.fixture
def fake(tmp_path: Path) -> StudyDirectory:
    """Return a study of two rows and three folds, in which the second row is better by 0.1 in every fold."""
    runs = [
        FakeRun(f"lr {lr}", 0, {"optimizer.lr": lr, FOLD: fold}, test_accuracy=0.5 + 0.1 * fold + better)
        for lr, better in ((0.1, 0.0), (0.2, 0.1))
        for fold in range(FOLDS)
    ]
    table = {"grid": {"optimizer.lr": [0.1, 0.2], FOLD: [0, 1, 2]}}
    return write_study(tmp_path / "study", table, runs)


def test_the_table_has_mean_and_spread_over_folds(fake: StudyDirectory) -> None:
    found = json.loads(toolkit("table", fake.path, "--json").stdout)
    assert [row["finished"] for row in found["rows"]] == [3, 3]
    assert [row["test_accuracy"] for row in found["rows"]] == pytest.approx([0.6, 0.7])
    assert [row["test_accuracy_std"] for row in found["rows"]] == pytest.approx([0.1, 0.1])
    assert any("different folds" in note and "Nadeau and Bengio" in note for note in found["notes"])
    by_fold = json.loads(toolkit("table", fake.path, "--by", FOLD, "--json").stdout)
    assert [row["row"] for row in by_fold["rows"]] == ["fold 0", "fold 1", "fold 2"]


def test_rows_are_compared_fold_by_fold(fake: StudyDirectory) -> None:
    arguments = ("--compare", "lr 0.2", "lr 0.1", "--columns", "test_accuracy", "--json")
    found = json.loads(toolkit("table", fake.path, *arguments).stdout)["comparison"]["test_accuracy"]
    assert (found["pairs"], found["difference"]) == (3, pytest.approx(0.1))
    assert found["std"] == pytest.approx(0, abs=1e-9)


def test_figures_do_not_take_the_fold_for_a_parameter(fake: StudyDirectory) -> None:
    outcome = toolkit("table", fake.path, "--figures")
    assert outcome.status == 0, outcome.stderr
    assert "curves-by-lr" in outcome.stderr
    assert "fold" not in outcome.stderr


@pytest.mark.long
def test_each_image_is_predicted_once_out_of_its_fold(tmp_path: Path) -> None:
    path = write(tmp_path, grid(**{FOLD: [0, 1, 2]}))
    outcome = toolkit("study", path, "--yes")
    assert outcome.status == 0, outcome.stderr
    study, file = study_folder(tmp_path), tmp_path / "oof.csv"
    outcome = toolkit("table", study.path, "--out-of-fold", file)
    assert "oof.csv: 1,797 predictions" in outcome.stderr
    rows = list(csv.DictReader(file.open(newline="")))
    assert sorted(row["path"] for row in rows) == sorted(f"digits/{i}" for i in range(1797))
    for member in study.members:
        run = study.run(member)
        assert run is not None
        own = [row for row in rows if row["fold"] == str(member.fold)]
        assert [row["path"] for row in own] == run.split["test"]
        assert [row["prediction"] for row in own] == [row["prediction"] for row in run.prediction_records()]
        assert not {row["path"] for row in own} & {*run.split["train"], *run.split["validation"]}
        last = run
    (last.path / "summary.json").unlink()
    outcome = toolkit("table", study.path, "--out-of-fold", file)
    assert outcome.status == 2
    assert "row 'small', seed 0 need all 3 folds, but fold 2 is paused" in outcome.stderr


MULTI_LABEL = """
[recipe]
name = "small"
run_root = {runs}

[task]
kind = "multi_label"

[data]
dataset = "table"
table = {table}
label_separator = ";"
image_size = [8, 16]
workers = 0
split = {{ folds = 2 }}

[model]
source = "toolkit"
convnet = {{ blocks = [{{ channels = 4, pool = 2 }}] }}

[optimizer]
name = "sgd"
lr = 0.5

[train]
epochs = 1
batch_size = 32

[tracking]
trackers = []

[study.grid]
data.split.fold = [0, 1]
"""


@pytest.mark.long
def test_images_with_several_labels_are_predicted_once(tmp_path: Path) -> None:
    table = write_two_digits(tmp_path / "digits", 60, 30, 30)
    path, file = tmp_path / "study.toml", tmp_path / "oof.csv"
    path.write_text(MULTI_LABEL.format(runs=json.dumps(str(tmp_path / "runs")), table=json.dumps(str(table))))
    assert toolkit("study", path, "--yes").status == 0
    outcome = toolkit("table", study_folder(tmp_path).path, "--out-of-fold", file)
    assert outcome.status == 0, outcome.stderr
    rows, labels = (list(csv.DictReader(each.open(newline=""))) for each in (file, table))
    assert {row["path"]: set(row["labels"].split(";")) for row in rows} == {
        row["image"]: set(row["label"].split(";")) for row in labels
    }
    assert len(rows) == 120


@pytest.mark.long
def test_folds_that_are_validation_splits_have_no_out_of_fold_predictions(tmp_path: Path) -> None:
    split = "{ folds = 2, test = 20 }"
    assert toolkit("study", write(tmp_path, grid(**{FOLD: [0, 1]}), split), "--yes").status == 0
    outcome = toolkit("table", study_folder(tmp_path).path, "--out-of-fold", tmp_path / "oof.csv")
    assert outcome.status == 2
    assert "the folds are validation splits, whose predictions are not kept" in outcome.stderr


def test_a_study_without_folds_has_no_out_of_fold_predictions(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", {"grid": {"optimizer.lr": [0.1]}}, [FakeRun("lr 0.1", 0)])
    outcome = toolkit("table", study.path, "--out-of-fold", tmp_path / "oof.csv")
    assert outcome.status == 2
    assert "the study has no folds" in outcome.stderr
    assert not (tmp_path / "oof.csv").exists()
