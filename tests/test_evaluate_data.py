"""`toolkit evaluate RUN --data`: a run's model on another labeled data set, and the report that shows both."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli import Outcome, toolkit
from distributed import launch
from finished import CONVNET, train_on_files

from toolkit.metrics import measures_of
from toolkit.report.run_data import load_run_data
from toolkit.report.run_page import write_run_page
from toolkit.runs import Run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_on_files(tmp_path_factory.mktemp("elsewhere"), CONVNET, epochs=2)


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    return Run(shutil.copytree(trained.path, tmp_path / "run"))


@pytest.fixture
def images(run: Run, tmp_path: Path) -> Path:
    """Return a copy of the run's test images, with one folder per class."""
    return Path(shutil.copytree(Path(run.recipe.data.root) / "test", tmp_path / "photos"))


def evaluation(outcome: Outcome) -> dict[str, Any]:
    assert outcome.status == 0, outcome.stderr
    return dict(json.loads(outcome.stdout))


def predictions(run: Run, name: str) -> list[list[str]]:
    with open(run.path / "evaluations" / name / "predictions.csv", newline="") as file:
        return list(csv.reader(file))


def test_a_copy_of_the_test_images_gives_the_run_s_own_test_metrics(run: Run, images: Path) -> None:
    found = evaluation(toolkit("evaluate", run.path, "--data", images, "--json"))
    own = {name: run.summary["best"][f"test_{name}"] for name in measures_of("single_label")}
    assert found["metrics"] == found["own"]["metrics"] == own
    assert (found["name"], found["images"], found["missing_classes"], found["notes"]) == ("photos", 50, [], [])
    own_rows = [list(row.values()) for row in run.prediction_records()]
    assert predictions(run, "photos")[1:] == [[row[0].removeprefix("test/"), *row[1:]] for row in own_rows]


def test_a_recipe_gives_one_of_its_splits_or_all_its_images(run: Run, tmp_path: Path) -> None:
    recipe = run.path / "recipe.toml"
    found = evaluation(toolkit("evaluate", run.path, "--data", recipe, "--split", "validation", "--json"))
    own = {name: run.summary["best"][f"val_{name}"] for name in measures_of("single_label")}
    assert (found["name"], found["metrics"]) == ("recipe-validation", own)
    found = evaluation(toolkit("evaluate", run.path, "--data", recipe, "--json"))
    assert found["images"] == sum(len(run.split[split]) for split in ("train", "validation", "test"))
    assert found["notes"] == ["72 of these images were training images of the run"]


def test_classes_are_matched_by_name_and_missing_ones_are_named(run: Run, images: Path) -> None:
    for digit in "012456":
        shutil.rmtree(images / digit)
    outcome = toolkit("evaluate", run.path, "--data", images)
    assert "no images of 6 of the model's 10 classes: 0, 1, 2, 4, 5, 6" in outcome.stdout
    own = {row["path"].removeprefix("test/"): list(row.values())[1:] for row in run.prediction_records()}
    rows = predictions(run, "photos")[1:]
    assert len(rows) == 20
    assert all(own[path] == rest for path, *rest in rows)


def test_a_table_gives_the_metrics_of_the_folder(run: Run, images: Path) -> None:
    folder = evaluation(toolkit("evaluate", run.path, "--data", images, "--json"))
    lines = ["path,label,split", *(f"{path},{label},test" for path, label, *_ in predictions(run, "photos")[1:])]
    lines.append("0/missing.png,0,train")
    table = images / "labels.csv"
    table.write_text("\n".join(lines))
    found = evaluation(toolkit("evaluate", run.path, "--data", table, "--split", "test", "--json"))
    assert (found["name"], found["split"]) == ("labels-test", "test")
    assert found["metrics"] == folder["metrics"]
    refused = toolkit("evaluate", run.path, "--data", table, "--split", "validation")
    assert "the data set has no validation images, only train, test; without --split, all images are" in refused.stderr


def test_a_table_may_have_test_images_of_one_class_only(run: Run, images: Path) -> None:
    table = images / "threes.csv"
    paths = [path.relative_to(images).as_posix() for path in sorted((images / "3").iterdir())]
    table.write_text("path,label,split\n" + "".join(f"{path},3,test\n" for path in paths))
    found = evaluation(toolkit("evaluate", run.path, "--data", table, "--split", "test", "--json"))
    own = [row["prediction"] for row in run.prediction_records() if row["label"] == "3"]
    assert found["metrics"]["accuracy"] == own.count("3") / len(own)
    assert (found["images"], len(found["missing_classes"])) == (5, 9)


def test_a_folder_may_have_one_class_only(run: Run, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "3", tmp_path / "threes" / "3")
    found = evaluation(toolkit("evaluate", run.path, "--data", tmp_path / "threes", "--json"))
    assert (found["images"], len(found["missing_classes"])) == (5, 9)


def test_unknown_classes_are_refused_or_left_out(run: Run, images: Path) -> None:
    before = evaluation(toolkit("evaluate", run.path, "--data", images, "--name", "before", "--json"))
    shutil.copytree(images / "3", images / "33")
    refused = toolkit("evaluate", run.path, "--data", images)
    assert refused.status == 2
    assert "has 1 class that the model does not have: 33 (for 33: did you mean 3?). Rename them" in refused.stderr
    assert not (run.path / "evaluations" / "photos").exists()
    found = evaluation(toolkit("evaluate", run.path, "--data", images, "--ignore-unknown-classes", "--json"))
    assert found["unknown_classes"] == {"33": 5}
    assert found["metrics"] == before["metrics"]
    for folder in images.iterdir():
        folder.rename(images / f"digit{folder.name}")
    refused = toolkit("evaluate", run.path, "--data", images, "--name", "renamed", "--ignore-unknown-classes")
    assert refused.status == 2
    assert "has the name of a class of the model" in refused.stderr


def test_two_processes_write_the_same_evaluation(run: Run, images: Path) -> None:
    one = evaluation(toolkit("evaluate", run.path, "--data", images, "--json"))
    rows = predictions(run, "photos")
    first, second = launch(2, toolkit, "evaluate", str(run.path), "--data", str(images), "--json")
    assert evaluation(first) == one
    assert predictions(run, "photos") == rows
    assert second.stdout == ""


def test_the_report_shows_other_data_sets_beside_the_run_s_own(run: Run, images: Path, tmp_path: Path) -> None:
    shutil.rmtree(images / "7")
    found = evaluation(toolkit("evaluate", run.path, "--data", images, "--json"))
    damaged = run.path / "evaluations" / "broken" / "evaluation.json"
    damaged.parent.mkdir()
    damaged.write_text("{}")
    data = load_run_data(run)
    assert any("evaluation broken" in line for line in data.missing)
    text = write_run_page(tmp_path / "page.html", data, {}, []).read_text()
    section = text[text.index('<section id="evaluations">') :].partition("</section>")[0]
    for accuracy in (found["metrics"]["accuracy"], run.summary["best"]["test_accuracy"]):
        assert f"{100 * accuracy:.2f} %" in section
    assert "photos: no images of 1 of the model&#39;s classes" in section


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "--data nowhere does not exist: expected a recipe"),
        (("--name", "x"), "need --data, which selects another data set"),
        (("--data", "{images}", "--data-root", "."), "which are not read with --data"),
        (("--data", "{images}", "--name", "a/b"), "'a/b' cannot be the name of a folder"),
        (("--data", "{images}", "--split", "val"), "did you mean validation?"),
    ],
)
def test_wrong_arguments_are_refused(run: Run, images: Path, arguments: tuple[str, ...], message: str) -> None:
    outcome = toolkit("evaluate", run.path, *(part.format(images=images) for part in arguments))
    assert outcome.status == 2
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_an_evaluation_is_not_replaced_by_that_of_other_data(run: Run, images: Path) -> None:
    assert toolkit("evaluate", run.path, "--data", images).status == 0
    assert toolkit("evaluate", run.path, "--data", images).status == 0
    other = Path(shutil.copytree(images, images.parent / "other" / "photos"))
    outcome = toolkit("evaluate", run.path, "--data", other)
    assert outcome.status == 2
    assert f"contains the evaluation on --data {images}; choose another name with --name" in outcome.stderr


def test_an_unreadable_image_is_named(run: Run, images: Path) -> None:
    bad = images / "3" / "bad.png"
    bad.write_bytes(b"no image")
    outcome = toolkit("evaluate", run.path, "--data", images)
    assert outcome.status == 2
    assert "1 of 51 images cannot be read: 3/bad.png" in outcome.stderr
