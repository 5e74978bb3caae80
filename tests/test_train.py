"""From a recipe to a run directory, on the embedded digits and on real images."""

from __future__ import annotations

import json
import re
import struct
import tarfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import toolkit
from two_digits import write_two_digits

from toolkit.augment.transforms import build_transform
from toolkit.data.datasets import open_dataset
from toolkit.data.splits import split_dataset
from toolkit.metrics import EPOCH_METRICS, EXPECTED_METRICS, METRICS, Metric, measures_of, metric_of
from toolkit.runs import Run, open_run
from toolkit.training.trained_model import load_model

pytestmark = pytest.mark.long

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = ("--set", "data.images_per_class=8", "--set", "data.test_images_per_class=5", "--set", "train.batch_size=16")
"""A run on the digits that takes a second or two."""


def train(tmp_path: Path, *arguments: str, recipe: str = "quickstart.toml") -> Run:
    outcome = toolkit("train", RECIPES / recipe, "--set", f"recipe.run_root={json.dumps(str(tmp_path))}", *arguments)
    assert outcome.status == 0, outcome.stderr
    return open_run(outcome.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a short run with W&B offline, step-level logging and TensorBoard."""
    settings = ["train.epochs=3", "train.log_every=2", 'tracking.trackers=["wandb", "tensorboard"]',
                "tracking.upload=[]", 'tracking.tags=["tried"]', 'tracking.notes="a note"',
                'tracking.project="testing"']  # fmt: skip
    return train(tmp_path_factory.mktemp("runs"), *SMALL, *(part for s in settings for part in ("--set", s)))


def test_the_run_directory_contains_all_documented_files(run: Run) -> None:
    names = {path.name for path in run.path.iterdir()}
    assert {"recipe.toml", "environment.json", "split.json", "metrics.jsonl", "summary.json", "predictions.csv",
            "log.txt", "checkpoints", "wandb"} <= names  # fmt: skip
    assert run.recipe.train.epochs == 3, "the resolved recipe contains the override"
    assert run.environment["processes"] == 1
    assert "device cpu" in run.log_file.read_text()
    assert not list(run.path.rglob("*.tmp"))


def test_every_computed_metric_is_in_metrics_py(run: Run) -> None:
    summary, epochs = run.summary, run.epoch_records()
    values = {name: metric.read(summary, epochs) for name, metric in METRICS.items() if _is_single_label(metric)}
    assert [name for name, value in values.items() if value is None] == []
    assert {"last_train_loss": epochs[-1]["train/loss"], "test_accuracy": summary["best"]["test_accuracy"],
            "last_val_loss": summary["last"]["val_loss"], "epochs": 3}.items() <= values.items()  # fmt: skip
    computed = {key.removeprefix("test_") for key in summary["best"] if key.startswith("test_")}
    assert computed == set(measures_of("single_label"))
    expected = [metric for metric in EXPECTED_METRICS.values() if _is_single_label(metric)]
    assert all(metric.read(summary) is not None for metric in expected), "without metrics.jsonl"


def _is_single_label(metric: Metric) -> bool:
    return "single_label" in metric.measure.tasks


def test_metrics_and_summary_use_the_documented_names(run: Run) -> None:
    epochs = run.epoch_records()
    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/top5_accuracy", "val/balanced_accuracy",
            "lr"} <= set(epochs[0])  # fmt: skip
    assert {key for key in epochs[0] if key.startswith(("train/", "val/"))} == {
        name for name in EPOCH_METRICS if _is_single_label(metric_of(name))
    }
    steps = [record for record in run.metric_records() if "train/step_loss" in record]
    assert [record["step"] for record in steps] == [2, 4, 7, 9, 12, 14], "every two of the five steps of an epoch"
    summary = run.summary
    for model in ("best", "last"):
        assert {"epoch", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_balanced_accuracy"} <= set(
            summary[model]
        )
    assert {"parameters", "seconds", "images_per_s", "peak_memory_gib", "cached"} <= set(summary)
    assert summary["images_per_epoch"] == summary["images"]["train"], "no batch is dropped"
    assert summary["startup_seconds"] > 0
    assert f"ready for the first step after {summary['startup_seconds']:.1f} s" in (run.path / "log.txt").read_text()
    assert summary["parameters"] == 98_026
    best = max(epochs, key=lambda record: record["val/accuracy"])
    assert summary["best"]["epoch"] == best["epoch"]
    assert summary["last"]["epoch"] == 3


def test_predictions_are_in_dataset_order_and_give_the_summarys_accuracy(run: Run) -> None:
    rows = run.prediction_records()
    assert len(rows) == 50
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right / len(rows) == pytest.approx(run.summary["best"]["test_accuracy"])
    assert [row["path"] for row in rows] == json.loads((run.path / "split.json").read_text())["test"]


def test_the_run_directory_is_all_that_prediction_needs(run: Run) -> None:
    trained = load_model(run.checkpoints)
    recipe = run.recipe
    dataset = open_dataset(recipe.data)
    transform = build_transform("test", recipe.augment, trained.preprocessing)
    indices = split_dataset(dataset, recipe.data)["test"]
    with torch.inference_mode():
        logits = trained.module(torch.stack([transform(dataset.images.load(int(i))) for i in indices]))
    predicted = [trained.classes[int(i)] for i in logits.argmax(1)]
    assert predicted == [row["prediction"] for row in run.prediction_records()]


def wandb_records(folder: Path, fragment: str = "offline-run-*") -> Iterator[Any]:
    """Yield the records of an offline run's log, protobuf messages in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob(f"wandb/{fragment}/run-*.wandb")
    data, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        _, size, kind = struct.unpack("<IHB", data[position : position + 7]) if left >= 7 else (0, 0, 0)
        if kind == 0:
            position += left
            continue
        message += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def test_wandb_gets_every_line_of_metrics_jsonl(run: Run) -> None:
    history, config, runs = [], {}, []
    for record in wandb_records(run.path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            history.append({key: value for key, value in items.items() if not key.startswith("_")})
        elif kind == "config":
            config |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.config.update}
        elif kind == "run":
            runs.append(record.run)
            config |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.run.config.update}
    assert history == run.metric_records()
    assert config["train.epochs"] == 3
    assert config["optimizer.lr"] == 0.004
    assert runs[0].project == "testing"
    assert runs[0].run_group == "quickstart"
    assert list(runs[0].tags) == ["tried"]
    assert runs[0].notes == "a note"


def test_tensorboard_gets_the_losses(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in run.path.glob("tensorboard/*/events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    logged = [event.value for event in events.Scalars("val/loss")]
    assert logged == pytest.approx([record["val/loss"] for record in run.epoch_records()], rel=1e-5)


def test_a_token_in_the_environment_is_written_to_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "5ec12e7" * 5 + "abcde"
    monkeypatch.setenv("WANDB_API_KEY", token)
    monkeypatch.setenv("HF_TOKEN", "hf_" + token)
    run = train(tmp_path, *SMALL, "--set", "train.epochs=1")
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if token.encode() in path.read_bytes()]


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    fast = (*SMALL, "--no-report", "--set", "train.epochs=1", "--set", "tracking.trackers=[]")
    assert train(tmp_path, *fast).path != train(tmp_path, *fast).path


def test_expected_metrics_are_met_missed_or_not_comparable(tmp_path: Path) -> None:
    fast = (*SMALL, "--no-report", "--set", "train.epochs=1", "--set", "tracking.trackers=[]")
    run = train(tmp_path, *fast, "--set", "data.test_images_per_class=5",
                "--set", 'expected_metrics.parameters={ value = 98026, source = "counted" }')  # fmt: skip
    assert "not comparable" in toolkit("check", run.path).stdout
    whole = ("--no-report", "--set", "train.epochs=1", "--set", "tracking.trackers=[]", "--set", "augment.train=[]")
    expectations = (
        'expected_metrics.parameters={ value = 98026, source = "counted" }',
        'expected_metrics.val_loss={ at_most = 0.0, source = "a wish" }',
        'expected_metrics.test_loss={ at_least = 0.0, seeds = [7], source = "another seed" }',
    )
    run = train(tmp_path, *whole, *(part for expectation in expectations for part in ("--set", expectation)))
    outcome = toolkit("check", run.path, "--json")
    verdicts = {verdict["metric"]: verdict["verdict"] for verdict in json.loads(outcome.stdout)}
    assert verdicts["parameters"] == "met"
    assert verdicts["val_loss"] == "missed"
    assert verdicts["test_loss"] == "not comparable"
    assert outcome.status == 1, "a missed metric sets the exit status"


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    outcome = toolkit("train", RECIPES / "quickstart.toml", *SMALL, "--set", "optimizer.lr=1e30",
                      "--set", 'optimizer.name="sgd"', "--set", 'scheduler.name="constant"',
                      "--set", f"recipe.run_root={json.dumps(str(tmp_path))}")  # fmt: skip
    assert outcome.status == 1
    assert "not finite at epoch 1, step" in outcome.stderr
    assert "1e+30" in outcome.stderr


# -- real images ------------------------------------------------------------------------------------------------------


def test_a_linear_probe_on_real_images_with_real_weights(tmp_path: Path, caltech_subset: Path) -> None:
    """Features computed once equal features computed per epoch, and six images per class reach 70 % accuracy."""
    settings = ("--set", f"data.root={json.dumps(str(caltech_subset))}", "--set", "data.split.validation=0.25",
                "--set", "train.batch_size=20", "--set", 'scheduler={ name = "constant" }',
                "--set", "tracking.trackers=[]", "--no-report")  # fmt: skip
    recipe = "efficientnet_lite0_caltech.toml"
    once = train(tmp_path, *settings, "--set", "train.epochs=40", recipe=recipe)
    plain = train(tmp_path, *settings, "--set", "train.epochs=1", "--set", 'data.cache="off"', recipe=recipe)
    assert "computed once" in once.summary["cached"][0]
    assert plain.summary["cached"] == []
    for cached, uncached in zip(once.epoch_records()[:1], plain.epoch_records(), strict=True):
        assert cached == pytest.approx(uncached, rel=1e-5)
    assert once.summary["best"]["test_accuracy"] >= 0.7, "chance is 0.1"


@pytest.fixture(scope="session")
def cifar_subset(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write twenty training and five test images of each class of CIFAR-10 as folders of JPEGs."""
    root = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared_data / "cifar10.tar.xz", "r:xz") as archive:
        for member in archive:
            _, split, *rest = member.name.split("/")
            limit = 20 if split == "train" else 5
            if member.isfile() and int(Path(member.name).stem) < limit:
                target = root / split / "/".join(rest)
                target.parent.mkdir(parents=True, exist_ok=True)
                file = archive.extractfile(member)
                assert file is not None
                target.write_bytes(file.read())
    return root


SHIPPED = sorted(path.name for path in RECIPES.glob("*.toml"))


def test_every_shipped_recipe_is_in_the_list_of_dry_runs() -> None:
    wanted = {"quickstart", "resnet50_caltech", "resnet18_caltech", "alexnet_caltech_scratch",
              "alexnet_caltech_finetune", "alexnet_caltech_feature_extractor", "alexnet_caltech_frozen_classifier",
              "vgg16_caltech", "vgg11bn_cifar10_frozen", "vgg11bn_cifar10_finetune", "vgg11bn_cifar10_scratch",
              "convnet_cifar10", "convnet_cifar10_batchnorm", "convnet_cifar10_dropout", "convnet_cifar10_augment",
              "colbertaldo_fast", "colbertaldo_best", "efficientnet_lite0_caltech",
              "efficientnet_lite0_caltech_finetune", "vit_small_caltech", "two_digits"}  # fmt: skip
    assert {Path(name).stem for name in SHIPPED} >= wanted


IN_DEFAULT_LANE = {"quickstart.toml", "resnet50_caltech.toml", "two_digits.toml"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_DEFAULT_LANE else pytest.mark.extended) for name in SHIPPED]
)
def test_every_shipped_recipe_passes_a_dry_run(
    name: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caltech_subset: Path,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["train.batch_size=4", "train.drop_last=false"]
    if "caltech" in name:
        settings += [f"data.root={json.dumps(str(caltech_subset))}"]
    elif name == "two_digits.toml":
        table = write_two_digits(tmp_path_factory.mktemp("digits"), 40, 20, 20)
        settings += [f"data.table={json.dumps(str(table))}"]
    elif name != "quickstart.toml":
        # torchvision's CIFAR10 needs the original files, which are unavailable here; folders have the same images.
        root = request.getfixturevalue("cifar_subset")
        settings += ['data.dataset="imagefolder"', f"data.root={json.dumps(str(root))}", "data.split.validation=0.2"]
    if "images_per_class" in (RECIPES / name).read_text():
        settings += ["data.images_per_class=6"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    outcome = toolkit("train", RECIPES / name, "--dry-run", "--random-weights", *arguments)
    assert outcome.status == 0, outcome.stderr
    assert "one batch forward and backward, loss" in outcome.stderr
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_documentation_lists_every_file_of_a_run(run: Run) -> None:
    table = (RECIPES.parent / "docs" / "runs.md").read_text(encoding="utf-8").split("\n\n")
    (rows,) = [block for block in table if block.startswith("| file |")]
    documented = [name for row in rows.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    documented += [f"checkpoints/{name}" for name in documented if name.startswith("*")]
    left = [path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()]
    assert any(name.startswith("figures/") for name in left), "the report's figures are listed"
    for name in left:
        folders = [pattern for pattern in documented if pattern.endswith("/") and name.startswith(pattern)]
        assert folders or any(fnmatch(name, pattern) for pattern in documented), name
