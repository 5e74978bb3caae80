"""Both kinds of task through everything that follows a recipe: training, caches, resuming, studies, commands."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import toolkit
from finished import CONVNET
from huggingface_hub import ModelCard
from sklearn import metrics as oracle
from test_tracking import history
from trainers import Trainers, at_call, kill_self
from two_digits import write_two_digits

from toolkit.inference.export import PROBABILITIES
from toolkit.metrics import measures_of
from toolkit.report.kept_columns import tables_by_value
from toolkit.report.run_data import load_run_data
from toolkit.runs import Run, open_run
from toolkit.training.train_step import TrainStep
from toolkit.training.trained_model import load_model

pytestmark = pytest.mark.long

KINDS = ("single_label", "multi_label")
MULTI_LABEL_FIRST = [pytest.param("single_label", marks=pytest.mark.extended), "multi_label"]
"""Kinds for what other files test with a single label."""
SITES = ("north", "=south", "-2.5")
RECIPE = """
[recipe]
name = "small"
run_root = {runs}

[task]
kind = "{kind}"

[data]
dataset = "table"
table = {table}
channels = 1
image_size = [8, 16]
workers = 0

[data.columns]
split = "split"
label = {label}
keep = ["site"]

[optimizer]
name = "sgd"
lr = 0.5

[train]
epochs = 2
batch_size = 32
precision = "no"

[checkpoint]
every_steps = 2

[tracking]
trackers = []
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 200 images of two digits, with columns for their labels, the first of these, and where they are from."""
    path = write_two_digits(tmp_path_factory.mktemp("digits"), 96, 50, 54)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "label", "split", "first", "site"])
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow({**row, "first": row["label"].partition(";")[0], "site": SITES[number % 3]})
    return path


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def write_recipe(folder: Path, kind: str, table: Path, more: str = CONVNET) -> Path:
    path, column = folder / f"{kind}.toml", "label" if kind == "multi_label" else "first"
    text = RECIPE.format(
        kind=kind, runs=json.dumps(str(folder / "runs")), table=json.dumps(str(table)), label=json.dumps(column)
    )
    separator = 'label_separator = ";"\n' if kind == "multi_label" else ""
    path.write_text(text.replace("channels = 1\n", f"channels = 1\n{separator}") + more)
    return path


def train(path: Path, *values: str) -> Run:
    found = toolkit("train", path, "--no-report", *settings(*values))
    assert found.status == 0, found.stderr
    return open_run(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, table: Path) -> Run:
    """Train a run of each kind for two epochs, the second of which is worse."""
    folder = tmp_path_factory.mktemp(request.param)
    path = write_recipe(folder, request.param, table)
    worse = 'scheduler={ name = "one_cycle", pct_start = 0.9, start_factor = 0.001 }'
    return train(path, worse, "optimizer.lr=40.0", "train.epochs=3", "train.ema=0.5")


def kind_of(run: Run) -> str:
    return run.recipe.task.kind


def is_multi_label(run: Run) -> bool:
    return kind_of(run) == "multi_label"


# -- a trained run ----------------------------------------------------------------------------------------------------


def test_the_summary_has_the_metrics_of_the_kind_of_task(run: Run) -> None:
    names = {f"{split}_{name}" for split in ("val", "test") for name in measures_of(kind_of(run))}
    assert set(run.summary["best"]) == {"epoch", *names}
    assert run.summary["best"]["epoch"] < run.summary["last"]["epoch"], "the two models must differ"


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluate_reproduces_both_models(run: Run, split: str) -> None:
    found = toolkit("evaluate", run.path, "--split", split)
    assert found.status == 0
    assert (
        found.stdout.splitlines()[-1] == f"all {2 * len(measures_of(kind_of(run)))} metrics equal those of summary.json"
    )
    if split == "test":
        assert "predictions.csv: 54 of 54 rows are the same" in found.stdout


def test_predictions_and_class_metrics_equal_scikit_learn_s(run: Run) -> None:
    """Everything is computed from the files alone."""
    best, classes = run.summary["best"], run.model_card["classes"]
    with (run.path / "class_metrics.csv").open(newline="") as file:
        of_class = list(csv.DictReader(file))
    if kind_of(run) == "single_label":
        rows = run.prediction_records()
        labels, decided = ([row[column] for row in rows] for column in ("label", "prediction"))
        expected = oracle.precision_recall_fscore_support(labels, decided, labels=classes, zero_division=0)
        assert best["test_accuracy"] == pytest.approx(oracle.accuracy_score(labels, decided), abs=1e-9)
    else:
        rows = run.prediction_records()
        truth, found = (
            np.array([[name in row[column].split(";") for name in classes] for row in rows])
            for column in ("labels", "predictions")
        )
        scores = np.array([[float(row[f"probability of {name}"]) for name in classes] for row in rows])
        thresholds = np.array(run.model_card["task"]["thresholds"])
        assert (found == (scores >= thresholds)).all()
        assert not np.allclose(thresholds, 0.5), "they are chosen on the validation images"
        expected = oracle.precision_recall_fscore_support(truth, found, zero_division=0)
        precisions = [oracle.average_precision_score(truth[:, k], scores[:, k]) for k in range(10)]
        areas = [oracle.roc_auc_score(truth[:, k], scores[:, k]) for k in range(10)]
        assert best["test_map"] == pytest.approx(np.mean(precisions), abs=1e-9)
        assert best["test_auroc"] == pytest.approx(np.mean(areas), abs=1e-9)
        assert best["test_micro_f1"] == pytest.approx(oracle.f1_score(truth, found, average="micro"), abs=1e-9)
        assert best["test_accuracy"] == pytest.approx(oracle.accuracy_score(truth, found), abs=1e-9)
        np.testing.assert_allclose([float(row["average_precision"]) for row in of_class], precisions, atol=1e-8)
    for column, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose([float(row[column]) for row in of_class], values, atol=1e-8)


def test_kept_columns_are_in_the_predictions_and_the_report_has_metrics_by_their_values(run: Run) -> None:
    rows = run.prediction_records()
    encoded = ["north", "%3Dsouth", "-2.5"]  # text that a spreadsheet would take for a formula, and a number
    assert [row["site"] for row in rows] == [encoded[(146 + i) % 3] for i in range(54)]
    data = load_run_data(run)
    ((column, by_site),) = tables_by_value(data.predictions or data.label_predictions)
    assert column == "site"
    assert {row.cells[0].text for row in by_site.rows} == set(encoded)
    for row in by_site.rows:
        own = [each for each in rows if each["site"] == row.cells[0].text]
        label, prediction = ("labels", "predictions") if is_multi_label(run) else ("label", "prediction")
        truth, found = ([each[name].split(";") for each in own] for name in (label, prediction))
        assert row.cells[1].text == str(len(own)) == "18"
        assert row.cells[2].value == np.mean([set(a) == set(b) for a, b in zip(truth, found, strict=True)])
        if is_multi_label(run):
            classes = run.model_card["classes"]
            masks = [np.array([[name in one for name in classes] for one in each]) for each in (truth, found)]
            expected = oracle.f1_score(*masks, average="micro")
        else:
            expected = oracle.recall_score(truth, found, labels=np.unique(truth), average="macro", zero_division=0)
        assert row.cells[4].value == pytest.approx(expected, abs=1e-9)


def test_the_report_shows_what_the_kind_of_task_has(run: Run) -> None:
    assert toolkit("report", run.path).status == 0
    page, drawn = run.report_file.read_text(), {path.stem for path in run.figures.iterdir()}
    shown, hidden = {"precision-recall", "map"}, {"confusion", "class-accuracy", "reliability"}
    if kind_of(run) == "single_label":
        shown, hidden = hidden, shown
    assert shown <= drawn
    assert not hidden & drawn
    assert "cannot be shown" not in page
    assert ("average precision" in page) == (kind_of(run) == "multi_label")
    assert ("Calibration" in page) == (kind_of(run) == "single_label")
    assert 'id="by-value-1"' in page
    assert re.search(r"<br>site: (north|%3Dsouth|-2\.5)</span></li>", page)


def test_damaged_predictions_are_named_and_the_rest_is_reported(run: Run, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(run.path, tmp_path / "copy"))
    file = copy.path / "predictions.csv"
    lines = file.read_text().splitlines()
    for damage in (lines[0].replace("one", "uno").replace("label", "lable"), lines[0]):
        file.write_text("\n".join([damage, "x,a;b,c,2.0", *lines[2:]]))
        data = load_run_data(copy)
        assert data.epochs
        assert any("predictions.csv is damaged" in text for text in data.missing)
        assert toolkit("explain", copy.path).status == 2


def test_predict_lists_the_class_or_all_labels_above_their_thresholds(run: Run, table: Path) -> None:
    found = toolkit("predict", run.path, table.parent / "test", "--format", "json")
    assert found.status == 0, found.stderr
    listed = {Path(each["path"]).name: each["predictions"] for each in json.loads(found.stdout)}
    column = "predictions" if is_multi_label(run) else "prediction"
    for row in run.prediction_records():
        predictions = listed[Path(row["path"]).name]
        assert {each["class"] for each in predictions} == set(filter(None, row[column].split(";")))
        probabilities = [each["probability"] for each in predictions]
        assert probabilities == sorted(probabilities, reverse=True)
    for one in run.predict(table.parent / "test"):
        expected = [(each["class"], f"{each['probability']:.6g}") for each in listed[Path(str(one.path)).name]]
        assert [(name, f"{probability:.6g}") for name, probability in one.top] == expected
        assert (one.prediction, one.probability) == (one.top[0] if one.top else (None, None))
    lines = toolkit("predict", run.path, table.parent / "test").stdout.splitlines()
    columns = "path,predictions,probabilities" if is_multi_label(run) else "path,prediction,probability"
    assert (lines[0], len(lines)) == (columns, 55)
    two = json.loads(toolkit("predict", run.path, table.parent / "test", "-k", "2", "--json").stdout)
    assert {len(each["predictions"]) for each in two} == {2}, "regardless of thresholds"


def test_an_exported_model_carries_kind_and_thresholds(run: Run, tmp_path: Path, table: Path) -> None:
    for name in ("safetensors", "torch-export"):
        assert toolkit("export", run.path, "--format", name, "--out", tmp_path / name).status == 0
        card = json.loads((tmp_path / name / "preprocessing.json").read_text())
        assert card["task"] == run.model_card["task"]
        assert card["probabilities"] == PROBABILITIES[kind_of(run)]
    images = table.parent / "test"
    own, exported = (
        json.loads(toolkit("predict", model, images, "--json").stdout) for model in (run.path, tmp_path / "safetensors")
    )
    assert [predicted(each) for each in own] == [predicted(each) for each in exported]
    trained, program = load_model(run.path), torch.export.load(tmp_path / "torch-export" / "model.pt2").module()
    inputs = torch.rand(5, 1, 8, 16)
    with torch.inference_mode():
        torch.testing.assert_close(trained.module(inputs), program(inputs), atol=1e-4, rtol=1e-4)


def predicted(image: dict[str, Any]) -> set[str]:
    return {each["class"] for each in image["predictions"]}


def test_a_published_model_s_card_names_the_metrics_of_its_kind(run: Run) -> None:
    assert toolkit("publish", run.path, "lab/digits").status == 0
    card = (run.path / "publish" / "README.md").read_text()
    assert ("| mAP |" in card, "| top-1 accuracy |" in card) == (
        (True, False) if is_multi_label(run) else (False, True)
    )
    assert ("threshold of each label" in card) == is_multi_label(run)
    metadata, best = ModelCard(card).data, run.summary["best"]
    assert ("multi-label" in metadata.tags) == is_multi_label(run)
    found = {(r.metric_name, r.metric_type, (r.metric_args or {}).get("average")): r for r in metadata.eval_results}
    expected = {("macro F1", "f1", "macro"): "test_macro_f1"}
    if is_multi_label(run):
        expected |= {
            ("subset accuracy", "accuracy", None): "test_accuracy",
            ("micro F1", "f1", "micro"): "test_micro_f1",
            ("mAP", "average_precision", "macro"): "test_map",
            ("AUROC", "roc_auc", "macro"): "test_auroc",
        }
        assert {r.task_name for r in found.values()} == {"multi-label image classification"}
        assert found.keys() == expected.keys()
    assert {key: found[key].metric_value for key in expected} == {k: round(best[v], 6) for k, v in expected.items()}


def test_explain_shows_the_prediction_or_each_label_predicted_or_missed(run: Run, tmp_path: Path) -> None:
    found = toolkit("explain", run.path, "--worst", "2", "--out", tmp_path, "--json")
    assert found.status == 0, found.stderr
    rows = json.loads(found.stdout)
    assert len({row["path"] for row in rows}) == 2
    if kind_of(run) == "single_label":
        assert len(rows) == 2
        assert all(row["prediction"] != row["label"] for row in rows)
    else:
        recorded = {row["path"]: row for row in run.prediction_records()}
        for path in {row["path"] for row in rows}:
            wanted = {*recorded[path]["labels"].split(";"), *recorded[path]["predictions"].split(";")} - {""}
            assert {row["prediction"] for row in rows if row["path"] == path} == wanted
    assert len(list(tmp_path.glob("*.png"))) == len(rows)


def test_evaluate_data_on_a_copy_of_the_test_images_gives_the_test_metrics(run: Run, table: Path) -> None:
    found = toolkit("evaluate", run.path, "--data", table, "--split", "test", "--json")
    assert found.status == 0, found.stderr
    metrics = json.loads(found.stdout)["metrics"]
    assert {f"test_{name}": value for name, value in metrics.items()} == {
        name: value for name, value in run.summary["best"].items() if name.startswith("test_")
    }
    written = (run.path / "evaluations" / "labels-test" / "predictions.csv").read_bytes()
    assert written == (run.path / "predictions.csv").read_bytes(), "with the column site"
    shutil.rmtree(run.path / "evaluations")


@pytest.mark.parametrize("run", ["multi_label"], indirect=True)
def test_labels_of_other_data_that_are_unknown_or_never_vary(run: Run, table: Path) -> None:
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    name, other = str(rows[0]["first"]), table.parent / "other.csv"
    for label, message in (
        ("new", "has the name of a class of the model"),
        ("", "no image of"),
        (name, "no label is present in some of the 200 given images"),
    ):
        other.write_text("image,label\n" + "".join(f"{row['image']},{label}\n" for row in rows))
        refused = toolkit("evaluate", run.path, "--data", other)
        assert refused.status == 2
        assert message in refused.stderr
    texts = [f"{row['image']},{name};new\n" if row["first"] == name else f"{row['image']},\n" for row in rows]
    other.write_text("image,label\n" + "".join(texts))
    count = sum(row["first"] == name for row in rows)
    assert "or leave out these labels with" in toolkit("evaluate", run.path, "--data", other).stderr
    found = toolkit("evaluate", run.path, "--data", other, "--ignore-unknown-classes")
    assert f"left out: {count} labels that the model does not have: new" in found.stdout
    assert f"{other}: 200 images" in found.stdout
    shutil.rmtree(run.path / "evaluations")
    other.unlink()


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more",
    [
        ("augment={ mixup = 0.4, cutmix = 1.0, label_smoothing = 0.1 }", 'train.class_weights="balanced"'),
        ('early_stopping={ patience = 1, metric = "val/macro_f1" }', 'scheduler={ name = "plateau", patience = 0 }',
         'train.loss="asymmetric"', "train.class_weights={ one = 2.0 }", 'train.best_metric="val/macro_f1"'),
        ('train.loss="focal"', "data.split.validation=0", 'train.best_metric="last"', "task.threshold=0.4"),
    ],
    ids=["mixing and weights", "stopping and plateau", "no validation"],
)  # fmt: skip
def test_training_options_work_with_both_kinds(tmp_path: Path, table: Path, kind: str, more: tuple[str, ...]) -> None:
    run = train(write_recipe(tmp_path, kind, table), *more)
    assert np.isfinite([record["train/loss"] for record in run.epoch_records()]).all()
    if kind == "multi_label" and "task.threshold=0.4" in more:
        assert set(run.model_card["task"]["thresholds"]) == {0.4}
        rows = run.prediction_records()
        for row in rows:
            above = [name for name in run.model_card["classes"] if float(row[f"probability of {name}"]) >= 0.4]
            assert row["predictions"] == ";".join(above)


def test_equal_weights_of_images_change_nothing_and_unequal_ones_the_loss(tmp_path: Path, table: Path) -> None:
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {}
    for name in ("none", "equal", "unequal"):
        path, column = table.with_name(f"{name}.csv"), "none" if name == "none" else "weight"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "split", column, "site"])
            for row in rows:
                weight = 2.0 if name == "equal" else float("one" in row["label"])
                writer.writerow([row["image"], row["label"], row["split"], weight, row["site"]])
        weights = () if name == "none" else ('data.columns.weight="weight"',)
        losses[name] = train(write_recipe(tmp_path, "multi_label", path), *weights).epoch_records()[0]["train/loss"]
    assert losses["equal"] == losses["none"]
    assert abs(losses["unequal"] - losses["none"]) > 1e-4


@pytest.mark.parametrize("kind", MULTI_LABEL_FIRST)
def test_a_killed_run_is_resumed_to_the_same_bytes_and_two_processes_give_the_same_metrics(
    tmp_path: Path, table: Path, kind: str
) -> None:
    path, runs = write_recipe(tmp_path, kind, table), [tmp_path / name for name in ("one", "killed", "two")]
    roots = [settings(f"recipe.run_root={json.dumps(str(root))}") for root in runs]
    for processes, root, prepare in zip((1, 1, 2), roots, (None, kill_at_fifth_step, None), strict=True):
        trainers = Trainers(processes, tmp_path, path, *root, prepare=prepare)
        assert set(trainers.wait()) == {0 if prepare is None else -9}, trainers.text()
    plain, killed, two = (open_run(next((root / "small").iterdir())) for root in runs)
    assert Trainers(1, tmp_path, path, *roots[1], "--resume", killed.path).wait() == [0]
    assert killed.model_card["task"] == plain.model_card["task"]
    for name in ("metrics.jsonl", "predictions.csv", "class_metrics.csv"):
        assert (killed.path / name).read_bytes() == (plain.path / name).read_bytes(), name
    for record, other in zip(plain.epoch_records(), two.epoch_records(), strict=True):
        assert other == pytest.approx(record, rel=1e-3, abs=1e-3)


def kill_at_fifth_step(rank: int) -> None:
    at_call(TrainStep, "_update", 5, kill_self)


@pytest.mark.parametrize("kind", MULTI_LABEL_FIRST)
def test_cached_features_give_the_metrics_of_images(tmp_path: Path, table: Path, kind: str) -> None:
    first = train(write_recipe(tmp_path, kind, table), "train.epochs=1")
    linear = (f"model.weights={json.dumps(f'file:{first.best_weights}')}", 'transfer.mode="linear_probe"')
    path = tmp_path / f"{kind}.toml"
    cached, plain = (train(path, *linear, f'data.cache="{cache}"') for cache in ("auto", "off"))
    assert "computed once" in cached.summary["cached"][0]
    assert plain.summary["cached"] == []
    for name, value in plain.summary["best"].items():
        assert cached.summary["best"][name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("kind", MULTI_LABEL_FIRST)
def test_a_study_has_a_table_and_a_page(tmp_path: Path, table: Path, kind: str) -> None:
    path = write_recipe(tmp_path, kind, table, CONVNET + '\n[study.grid]\n"optimizer.lr" = [0.1, 0.5]\n')
    folder = tmp_path / "runs" / "small"
    assert toolkit("study", path).status == 0
    printed = toolkit("table", folder).stdout
    assert ("val. mAP %" in printed) == (kind == "multi_label")
    assert ("val. acc. %" in printed) == (kind == "single_label")
    assert toolkit("report", folder).status == 0
    page = (folder / "report.html").read_text()
    assert ("Validation mAP" in page) == (kind == "multi_label")


def _missed_and_wrong(row: dict[str, str]) -> Iterator[tuple[str, str]]:
    labels, predictions = ({name for name in row[key].split(";") if name} for key in ("labels", "predictions"))
    yield from itertools.product(labels - predictions, predictions - labels)


@pytest.mark.parametrize("kind", MULTI_LABEL_FIRST)
def test_w_and_b_gets_the_metrics_of_both_kinds_offline(tmp_path: Path, table: Path, kind: str) -> None:
    offline = 'tracking={ trackers = ["wandb"], mode = "offline" }'
    path = write_recipe(tmp_path, kind, table)
    trainers = Trainers(1, tmp_path, path, *settings(offline, "train.epochs=1"))  # W&B needs a process of its own
    assert trainers.wait() == [0], trainers.text()
    (folder,) = (tmp_path / "runs" / "small").iterdir()
    run = open_run(folder)
    measures = {"loss", *measures_of(kind)}
    assert {f"val/{name}" for name in measures} <= set(run.epoch_records()[0])
    *lines, results = history(run, "offline-run-*")
    assert lines == run.metric_records()
    errors = "label_errors" if kind == "multi_label" else "confusion_matrix"
    assert {key.split(".")[0] for key in results} == {
        "epoch", "predictions", "class_metrics", f"{errors}_table", "precision_recall_table", "roc_table",
        "images_per_s_table", "filters", "training_samples",
    }  # fmt: skip
    if kind == "single_label":
        return  # more in test_wandb_results.py
    (files,) = run.path.glob("wandb/offline-run-*/files")
    predictions = json.loads((files / results["predictions.path"]).read_text())
    assert predictions["columns"][2:5] == ["labels", "predictions", "largest error"]
    correct = run.correct_predictions()
    assert [row[5] for row in predictions["data"]] == sorted(correct.values())[: len(predictions["data"])]
    cells = json.loads((files / results["label_errors_table.path"]).read_text())["data"]
    together = [one for row in run.prediction_records() for one in _missed_and_wrong(row)]
    assert {(a, b): count for a, b, count in cells if count} == Counter(together)


def test_the_data_report_counts_labels(tmp_path: Path, table: Path) -> None:
    found = toolkit("data", write_recipe(tmp_path, "multi_label", table), "--json")
    assert found.status == 0, found.stderr
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with_one = sum("one" in row["label"].split(";") for row in rows if row["split"] == "train")
    assert json.loads(found.stdout)["images_per_class"]["one"]["train"] == with_one
    assert json.loads(found.stdout)["images"]["train"] == 96
