"""What W&B gets of a finished run besides its metrics: read back from what its real client writes to disk, and from a
local server in place of W&B's. No real account was used."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli import toolkit
from finished import CONVNET, train_on_files
from PIL import Image
from report_runs import small_study
from sklearn import metrics as oracle
from test_sync import copy, sync
from test_tracking import LIMIT_S, history
from test_train import wandb_records
from trainers import Trainers, only_run, write_recipe
from wandb_server import WandbServer, logged_in_here, without_login

import toolkit.trackers
from toolkit import wandb_artifacts
from toolkit.report.prediction_metrics import RunPredictions
from toolkit.report.run_data import RunData
from toolkit.report.run_images import model_inputs, open_run_images
from toolkit.runs import Run
from toolkit.training.classification_metrics import MAX_CURVE_POINTS, MAX_CURVES, curve_rows, ranking_curves
from toolkit.training.trained_model import TrainedModel, load_model
from toolkit.wandb_artifacts import log_data
from toolkit.wandb_results import CHARTS, LARGEST_SIDE, MAX_MATRIX, MAX_PREDICTIONS, _confusion, uploads

pytestmark = pytest.mark.long

MODEL = """
[model]
source = "toolkit"
convnet = { blocks = [{ channels = 4, pool = 2 }] }

[augment]
train = [{ name = "RandomAffine", degrees = 20 }]
"""
SETTINGS = ("--set", "train.epochs=2", "--set", 'tracking.trackers=["wandb"]')
REGISTRY = ("--set", 'tracking.registry="model"')
BEST_IS_FIRST = (
    "--set",
    "optimizer.lr=0.4",
    "--set",
    "train.max_grad_norm=1.0",
    "--set",
    'train.best_metric="val/loss"',
)
"""Settings with which the validation loss increases after the first epoch."""
SHOWN = {"predictions", "class_metrics", "confusion_matrix_table", "precision_recall_table", "roc_table",
         "images_per_s_table", "filters", "training_samples", "epoch"}  # fmt: skip


def recipe_in(folder: Path) -> Path:
    return write_recipe(folder, MODEL.replace("{", "{{").replace("}", "}}"))


def train(folder: Path, *settings: str, world: int = 1) -> tuple[Run, str]:
    """Train in processes of their own, which W&B's client needs; return the run and the output."""
    trainers = Trainers(world, folder, recipe_in(folder), *SETTINGS, *settings)
    assert trainers.wait() == [0] * world, trainers.text()
    return only_run(folder), trainers.text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train offline, as WANDB_MODE requests, with the model for a registry; the best epoch is not the last one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        return train(tmp_path_factory.mktemp("runs"), *REGISTRY, *BEST_IS_FIRST)[0]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, seconds in (("CONNECT_SECONDS", 30), ("INIT_SECONDS", 60), ("FINISH_SECONDS", 60), ("LEAVE_SECONDS", 61)):
        monkeypatch.setattr(toolkit.trackers, name, seconds)  # for slow machines
    without_login(monkeypatch, tmp_path)
    with logged_in_here(monkeypatch) as server:
        yield server


class Offline:
    """An offline run as W&B's client has written it."""

    def __init__(self, run: Run) -> None:
        (self.folder,) = run.path.glob("wandb/offline-run-*")
        records = list(wandb_records(run.path))
        self.run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        self.files = {one.path for record in records for one in record.files.files}
        artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
        self.artifacts = {one.name.replace(self.run.run_id, "ID"): one for one in artifacts if one.type != "model"}
        self.models = [one for one in artifacts if one.type == "model"]
        self.console = "".join(
            record.output_logger.line for record in records if record.WhichOneof("record_type") == "output_logger"
        )
        config = [item for record in records for item in record.config.update]
        self.charts = {
            item.nested_key[2]: json.loads(item.value_json) for item in config if "visualize" in item.nested_key
        }
        self.results = history(run, self.folder.name)[-1]

    def table(self, name: str) -> list[list[Any]]:
        rows: list[list[Any]] = json.loads((self.folder / "files" / self.results[f"{name}.path"]).read_text())["data"]
        return rows


@pytest.fixture(scope="module")
def offline(run: Run) -> Offline:
    return Offline(run)


# -- what the client writes to disk -----------------------------------------------------------------------------------


def test_metrics_learning_rate_and_results_are_one_history(run: Run, offline: Offline) -> None:
    assert history(run, offline.folder.name)[:-1] == run.metric_records()
    assert "lr" in run.metric_records()[0]
    assert {key.split(".")[0] for key in offline.results} == SHOWN


def test_the_table_of_predictions_begins_with_the_worst_mistakes(run: Run, offline: Offline) -> None:
    rows, predictions = offline.table("predictions"), {row["path"]: row for row in run.prediction_records()}
    wrong = [row for row in predictions.values() if row["label"] != row["prediction"]]
    wrong.sort(key=lambda row: -float(row["probability"]))
    count = min(len(predictions), MAX_PREDICTIONS)
    assert 0 < len(wrong) < count == len(rows)
    assert [row[1] for row in rows[: len(wrong)]] == [row["path"] for row in wrong]
    for _, path, label, prediction, probability, is_correct in rows:
        known = predictions[path]
        assert (label, prediction, is_correct) == (known["label"], known["prediction"], label == prediction)
        assert probability == float(known["probability"])
    confidence = [row[4] for row in rows[len(wrong) :]]
    assert confidence == sorted(confidence), "then those that were least certain"
    files = {one.path: run.path / one.local_path for one in offline.artifacts["run-ID-predictions"].manifest.contents}
    table = json.loads(files.pop("predictions.table.json").read_text())
    shown = [row[0]["path"] for row in table["data"]]
    assert len(shown) == count
    assert set(shown) == set(files)
    for path in files.values():
        with Image.open(path) as image:
            assert (image.format, max(image.size) <= LARGEST_SIDE) == ("JPEG", True)
    assert all(path.is_relative_to(run.path) for path in files.values()), "nothing is left in the home directory"


def test_the_confusion_matrix_and_the_table_of_classes_are_those_of_the_run(run: Run, offline: Offline) -> None:
    cells = {(label, prediction): count for label, prediction, count in offline.table("confusion_matrix_table")}
    counted = Counter((row["label"], row["prediction"]) for row in run.prediction_records())
    assert {cell: count for cell, count in cells.items() if count} == counted
    assert len(cells) == 100
    with open(run.path / "class_metrics.csv", newline="") as file:
        _, *rows = csv.reader(file)
    assert offline.table("class_metrics") == [[row[0], *map(float, row[1:])] for row in rows]


def test_the_curves_are_charts_of_w_and_bs_own_kinds(run: Run, offline: Offline) -> None:
    assert set(offline.charts) == set(CHARTS) - {"label_errors"}
    for name, chart in offline.charts.items():
        assert chart["panel_config"]["panelDefId"] == CHARTS[name].spec
        assert chart["panel_config"]["fieldSettings"] == CHARTS[name].fields
    for name in ("precision_recall", "roc"):
        points = offline.table(f"{name}_table")
        assert {point[2] for point in points} == set(run.model_card["classes"])
        assert all(0 <= x <= 1 and 0 <= y <= 1 for x, y, _ in points)
    assert [row[0] for row in offline.table("images_per_s_table")] == [1, 2]
    assert all(speed > 0 for _, speed in offline.table("images_per_s_table"))


def test_images_and_files_are_logged_and_small(run: Run, offline: Offline) -> None:
    classes = run.model_card["classes"]
    assert offline.results["training_samples.captions"] == classes
    assert offline.results["filters.format"] == "png"
    media = {offline.results["filters.path"], *offline.results["training_samples.filenames"]}
    assert media | {"report.html", "environment.json", "recipe.toml", "output.log"} <= offline.files
    assert all((offline.folder / "files" / name).is_file() for name in offline.files)
    for name, original in (
        ("recipe.toml", run.path / "recipe.toml"),
        ("environment.json", run.path / "environment.json"),
    ):
        assert (offline.folder / "files" / name).read_bytes() == original.read_bytes()
    console = (offline.folder / "files" / "output.log").read_text()
    assert run.log_file.read_text().startswith(console)
    assert "test accuracy" in console, "up to the closing table"
    assert offline.console.splitlines() == run.log_file.read_text().splitlines(), "each message once, also live"
    assert "Confusion" in (offline.folder / "files" / "report.html").read_text()
    size = sum(path.stat().st_size for path in offline.folder.rglob("*") if path.is_file())
    assert size < 1_000_000


def test_the_data_set_is_a_list_of_images_without_them(run: Run, offline: Offline) -> None:
    data = offline.artifacts["data-digits"]
    assert data.type == "dataset"
    counts = {name: len(run.split[name]) for name in ("train", "validation", "test")}
    assert json.loads(data.metadata) == {"dataset": "digits", "split_hash": run.split["hash"], "images": counts,
                                         "classes": 10}  # fmt: skip
    (file,) = data.manifest.contents
    assert (file.path, file.digest) == ("split.json", digest(run.path / "split.json"))


class Target:
    """An offline W&B run that keeps its artifacts."""

    offline = True

    def __init__(self) -> None:
        self.artifacts: list[Any] = []
        self.log_artifact = self.artifacts.append


def test_the_images_are_added_if_the_recipe_asks_for_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    on_files, target, output = train_on_files(tmp_path, CONVNET, size=8), Target(), list[str]()
    log_data(target, on_files, with_images=True, log=output.append)
    log_data(target, run, with_images=True, log=output.append)
    assert output == []
    files, in_memory = (
        {name: one.local_path for name, one in artifact.manifest.entries.items()} for artifact in target.artifacts
    )
    assert files == {
        "split.json": str(on_files.path / "split.json"),
        **{f"images/{name}": str(tmp_path / "data" / name) for name in names_of(on_files)},
    }, "files as they are"
    assert set(in_memory) == {"split.json", *(f"images/{name}.png" for name in names_of(run))}
    name = names_of(run)[0]
    pixels = open_run_images(run.recipe, None, []).load(name)
    assert pixels is not None
    with Image.open(in_memory[f"images/{name}.png"]) as image:
        assert np.array_equal(np.asarray(image), pixels[..., 0])


def names_of(run: Run) -> list[str]:
    return [name for split in ("train", "validation", "test") for name in run.split[split]]


def test_too_many_images_are_left_out_with_a_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    target, output = Target(), list[str]()
    for name, limit in (("MAX_IMAGES", 100), ("MAX_IMAGE_BYTES", 1_000)):
        with monkeypatch.context() as patch:
            patch.setattr(wandb_artifacts, name, limit)
            log_data(target, run, with_images=True, log=output.append)
    count = len(names_of(run))
    assert output == [
        f"W&B gets the data set without its images: there are {count} of them, and at most 100 are uploaded",
        f"W&B gets the data set without its images: they have {count * 64 / 1e6:.2f} MB, and at most 0 MB are uploaded",
    ]
    assert [set(artifact.manifest.entries) for artifact in target.artifacts] == [{"split.json"}, {"split.json"}]


def digest(path: Path) -> str:
    """Return a file's digest as W&B's manifests have it."""
    return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()


def test_the_models_of_the_last_and_the_best_epoch_are_versions_of_an_artifact(run: Run, offline: Offline) -> None:
    last, best = offline.models
    assert last.name == best.name == f"model-{offline.run.run_id}"
    assert (set(last.aliases), set(best.aliases)) == ({"latest", "last"}, {"latest", "best"})
    for name, model, weights in (("last", last, "last.safetensors"), ("best", best, "best.safetensors")):
        assert json.loads(model.metadata) == {"recipe": "small", **run.summary[name]}
        files = {one.path: one for one in model.manifest.contents}
        assert set(files) == {weights, "model.json", "README.md"}
        assert json.loads((run.path / files["model.json"].local_path).read_text()) == run.model_card
        card = (run.path / files["README.md"].local_path).read_text()
        assert f"wandb artifact get {model.name}:{name} --root model" in card
        assert f"weights of epoch {run.summary[name]['epoch']}" in card
    assert files["best.safetensors"].digest == digest(run.best_weights)


def test_the_model_artifact_has_no_folders_of_this_machine(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    trained = load_model(run.path)
    table = trained.table.model_copy(update={"weights": "file:/home/ann/backbone.pth"})
    trained = dataclasses.replace(trained, table=table)
    files = wandb_artifacts._version(SimpleNamespace(id="1"), run, trained, "best").manifest.entries
    assert json.loads(Path(files["model.json"].local_path).read_text())["model"]["weights"] == "file:backbone.pth"


def test_the_run_has_git_state_job_type_and_group(run: Run, offline: Offline) -> None:
    git = run.environment["git"] or {"commit": ""}
    assert offline.run.git.commit == git["commit"]
    assert (offline.run.job_type, offline.run.run_group) == ("train", "small")
    assert offline.run.display_name == f"small {run.id}"


def test_runs_of_a_study_are_named_after_row_and_seed(tmp_path: Path) -> None:
    study = small_study(tmp_path / "study")
    found = [toolkit_settings(run, tmp_path) for run in study.runs]
    assert [one["job_type"] for one in found] == [member.row for member in study.members]
    assert found[0]["name"] == f"known: {study.members[0].row}, seed {study.members[0].seed}"
    assert len({one["name"] for one in found}) == len(study.members)
    assert [uploads(run) for run in study.runs] == [{"results"}] * len(study.members), "not their models"


def toolkit_settings(run: Run, folder: Path) -> dict[str, Any]:
    return toolkit.trackers.wandb_settings(run.recipe, run, run.id, "offline", folder)


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_the_confusion_matrix_of_many_classes_has_those_with_the_most_errors() -> None:
    size = 20_000
    classes = [str(k) for k in range(size)]
    labels = np.arange(size).repeat(2)
    predictions = labels.copy()
    predictions[2 * 700 : 2 * 800] = 19_999
    found = RunPredictions(classes, classes, labels, predictions, np.ones(len(labels)))
    data = RunData(Run(Path()), card={"classes": classes}, predictions=found)
    cells = {(label, prediction): count for label, prediction, count in _confusion(data)}
    assert len(cells) == MAX_MATRIX**2
    assert cells["700", "19999"] == 2
    assert cells["19999", "19999"] == 2
    assert sum(cells.values()) == 2 * MAX_MATRIX


def test_curves_are_those_of_scikit_learn_and_bounded() -> None:
    random = np.random.default_rng(0)
    labels = (random.random((400, MAX_CURVES + 10)) < 0.3).astype(np.uint8)
    scores = np.clip(labels * 0.3 + random.random(labels.shape) * 0.7, 0, 1)
    labels[:, 3] = 0
    classes = [f"c{k}" for k in range(labels.shape[1])]
    rows: dict[str, list[list[float]]] = {}
    for name, *values in curve_rows(ranking_curves(labels, scores), classes):
        rows.setdefault(name, []).append([float(value) for value in values])
    precisions = {
        name: oracle.average_precision_score(labels[:, k], scores[:, k]) for k, name in enumerate(classes) if k != 3
    }
    assert set(rows) == set(sorted(precisions, key=lambda name: precisions[name])[:MAX_CURVES]), "the hardest labels"
    name = next(iter(rows))
    column = classes.index(name)
    assert len(rows[name]) == MAX_CURVE_POINTS
    for threshold, precision, recall, false_rate in rows[name]:
        decided, present = scores[:, column] >= threshold - 1e-6, labels[:, column] == 1
        assert precision == pytest.approx(oracle.precision_score(present, decided), abs=0.02)
        assert recall == pytest.approx(oracle.recall_score(present, decided), abs=0.02)
        assert false_rate == pytest.approx((decided & ~present).sum() / (~present).sum(), abs=0.02)
    assert rows[name][-1][1:] == [pytest.approx(labels[:, column].mean(), abs=1e-5), 1.0, 1.0]


# -- a server ---------------------------------------------------------------------------------------------------------


def lines(server: WandbServer, run: Run) -> tuple[list[dict[str, Any]], list[set[str]]]:
    """Return the run's metrics on the server, and the names in each other line of its history."""
    (found,) = server.runs.values()
    metrics = [line for line in found.lines() if "step" in line]
    return metrics, [set(line) for line in found.lines() if "step" not in line]


def test_sync_uploads_everything_once(run: Run, server: WandbServer, tmp_path: Path) -> None:
    run = copy(run, tmp_path)
    assert sync(run.path).status == 0
    assert lines(server, run) == (run.metric_records(), [SHOWN])
    store = server.artifacts
    (data,), (last, model) = store.versions("dataset"), store.versions("model")
    assert data.files["split.json"] == (run.path / "split.json").read_bytes()
    assert store.used == ["data-digits"], "the run's input"
    assert store.links == [(model.name, "wandb-registry-model", "small")]
    assert {"output.log", "report.html", "environment.json", "recipe.toml"} <= set(server.files)
    assert server.files["report.html"] == (run.path / "report.html").read_bytes()
    assert "already uploaded" in sync(run.path).stdout
    (run.path / "wandb" / "synced.json").unlink()
    assert "0 lines uploaded" in sync(run.path).stdout
    assert lines(server, run) == (run.metric_records(), [SHOWN])
    assert (set(last.aliases), set(model.aliases)) == ({"last", "latest"}, {"best", "latest"})
    for name, artifact in (("last", last), ("best", model)):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in artifact.files.items():
            (folder / file).write_bytes(content)
        assert accuracy_of(load_model(folder), run) == pytest.approx(run.summary[name]["test_accuracy"])
    assert run.summary["last"]["test_accuracy"] != run.summary["best"]["test_accuracy"]


def accuracy_of(trained: TrainedModel, run: Run) -> float:
    images, rows = open_run_images(run.recipe, trained.preprocessing, trained.classes), run.prediction_records()
    pixels = [found for row in rows if (found := images.load(row["path"])) is not None]
    with torch.no_grad():
        scores = trained.module(torch.from_numpy(np.stack(model_inputs(trained.preprocessing, pixels))))
    predicted = [trained.classes[k] for k in scores.argmax(1).tolist()]
    return float(np.mean([row["label"] == name for row, name in zip(rows, predicted, strict=True)]))


@pytest.mark.extended
def test_an_interrupted_upload_is_completed_without_a_second_version(
    run: Run, server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(run, tmp_path)
    answer = server.artifacts.answer
    with monkeypatch.context() as patch:
        patch.setattr(
            server.artifacts, "answer", lambda name, given: None if name == "LinkArtifact" else answer(name, given)
        )
        outcome = sync(run.path)
    assert (outcome.status, len(outcome.stderr.splitlines())) == (1, 1)
    assert "the upload is incomplete (" in outcome.stderr
    assert server.artifacts.links == []
    assert sync(run.path).status == 0
    metrics, others = lines(server, run)
    assert metrics == run.metric_records(), "each line once"
    assert others in ([SHOWN], [SHOWN, SHOWN]), "at a later step again, if the server had the first already"
    assert len(server.artifacts.links) == 1
    versions = Counter(artifact.name for artifact in server.artifacts.artifacts.values() if artifact.is_committed)
    assert versions.pop(server.artifacts.links[0][0]) == 2, "the models of the best and the last epoch"
    assert set(versions.values()) == {1}, "equal content is the same version"


def test_a_run_trained_online_needs_no_sync(server: WandbServer, tmp_path: Path) -> None:
    run, output = train(tmp_path, world=2)
    assert "warning" not in output
    assert lines(server, run) == (run.metric_records(), [SHOWN])
    assert len(server.artifacts.versions("dataset")) == 1
    (model,) = server.artifacts.versions("model")
    assert run.summary["best"]["epoch"] == run.summary["last"]["epoch"]
    assert set(model.aliases) == {"best", "last", "latest"}, "one version"
    (found,) = server.runs.values()
    assert found.console == run.log_file.read_text().splitlines(), "each message once"
    assert run.log_file.read_bytes().startswith(server.files["output.log"])
    asked = set(server.artifacts.artifacts)
    assert "0 lines uploaded" in sync(run.path).stdout
    assert lines(server, run) == (run.metric_records(), [SHOWN])
    assert set(server.artifacts.artifacts) == asked


def test_a_server_that_rejects_artifacts_is_one_warning(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = server.artifacts.answer
    refused = ("CreateArtifact",)
    with monkeypatch.context() as patch:
        patch.setattr(server.artifacts, "answer", lambda name, given: None if name in refused else answer(name, given))
        run, output = train(tmp_path)
    assert run.is_finished
    assert output.count("warning") == 1
    assert f"toolkit sync {run.path} tries again" in output


def test_a_stop_during_the_upload_ends_it(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit.trackers, "FINISH_SECONDS", 1)
    monkeypatch.setattr(toolkit.trackers, "LEAVE_SECONDS", 1.5)
    answer, is_waiting, goes_on = server.artifacts.answer, threading.Event(), threading.Event()

    def wait(name: str, given: dict[str, Any]) -> dict[str, Any] | None:
        if name == "CreateArtifact":
            is_waiting.set()
            goes_on.wait(60)
        return answer(name, given)

    monkeypatch.setattr(server.artifacts, "answer", wait)
    trainers = Trainers(1, tmp_path, recipe_in(tmp_path), *SETTINGS)
    trainers.wait_until(is_waiting.is_set)
    trainers.signal(signal.SIGTERM)
    began = time.monotonic()
    assert trainers.wait(60) == [0], trainers.text()
    assert time.monotonic() - began < LIMIT_S
    run = only_run(tmp_path)
    assert run.is_finished
    assert f"W&B has not received everything; to upload the rest: toolkit sync {run.path}" in trainers.text()
    goes_on.set()
