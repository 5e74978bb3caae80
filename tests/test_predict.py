"""`toolkit predict`: each image is predicted once, in order, as in the run's evaluation; bad files are skipped."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from cli import toolkit
from distributed import launch, run_on
from finished import CONVNET, train_on_files
from PIL import Image
from typer.testing import CliRunner

from toolkit.cli.main import app
from toolkit.data.preprocessing import Preprocessing
from toolkit.filenames import decode_name
from toolkit.inference.predict import Predictions, collect, predict
from toolkit.models.build import build_model
from toolkit.recipe.schema import ModelConfig
from toolkit.runs import Run
from toolkit.training.task import SingleLabel
from toolkit.training.trained_model import load_model, model_card

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run that inverts its images, so that predictions are right only with the run's preprocessing."""
    folder = tmp_path_factory.mktemp("predict")
    negative = 'augment.test=[{ name = "RandomInvert", p = 1.0 }]'
    return train_on_files(folder, CONVNET, negative, 'augment.validation=[{ name = "Grayscale" }]', epochs=3)


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    """Copy the run, so that a test can damage it."""
    return Run(shutil.copytree(run.path, tmp_path / "copy"))


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def folder_of_test(run: Run) -> Path:
    return Path(run.recipe.data.root) / "test"


def expected_csv(run: Run) -> list[dict[str, str]]:
    """Return the run's predictions.csv in the format of `toolkit predict`."""
    root = Path(run.recipe.data.root)
    return [
        {"path": str(root / row["path"]), "prediction": row["prediction"], "probability": row["probability"]}
        for row in run.prediction_records()
    ]


def test_the_test_images_are_predicted_as_in_predictions_csv(run: Run) -> None:
    outcome = toolkit("predict", run.path, folder_of_test(run))
    assert outcome.status == 0, outcome.stderr
    assert rows(outcome.stdout) == expected_csv(run)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_write_every_row_once_and_in_order(run: Run, world: int) -> None:
    first, *others = launch(world, toolkit, "predict", str(run.path), str(folder_of_test(run)), "--workers", "1")
    assert rows(first.stdout) == expected_csv(run)
    assert {other.stdout for other in others} == {""}


def test_batch_size_and_workers_change_no_prediction(run: Run) -> None:
    outcome = toolkit("predict", run.path, folder_of_test(run), "--batch-size", "7", "--workers", "2")
    expected = expected_csv(run)
    found = rows(outcome.stdout)
    assert [row["prediction"] for row in found] == [row["prediction"] for row in expected]
    assert [float(row["probability"]) for row in found] == pytest.approx(
        [float(row["probability"]) for row in expected], rel=1e-4
    )


def test_all_classes_are_ranked_and_their_probabilities_add_up(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "predictions.json"
    outcome = toolkit("predict", run.path, folder_of_test(run), "--top-k", "99", "--format", "json", "-o", out)
    assert outcome.status == 0
    assert outcome.stdout == ""
    found = json.loads(out.read_text())
    assert [(one["path"], one["predictions"][0]["class"]) for one in found] == [
        (row["path"], row["prediction"]) for row in expected_csv(run)
    ]
    for one in found:
        probabilities = [each["probability"] for each in one["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert {each["class"] for each in one["predictions"]} == {str(digit) for digit in range(10)}


def test_all_formats_have_the_same_content(run: Run) -> None:
    arguments = ("predict", run.path, folder_of_test(run), "-k", "2", "--format")
    csv_text, json_text, jsonl_text = (toolkit(*arguments, style).stdout for style in ("csv", "json", "jsonl"))
    assert json.loads(json_text) == [json.loads(line) for line in jsonl_text.splitlines()]
    for row, entry in zip(rows(csv_text), json.loads(json_text), strict=True):
        first, second = entry["predictions"]
        assert list(row) == ["path", "prediction", "probability", "prediction_2", "probability_2"]
        assert (row["path"], row["prediction"], row["prediction_2"]) == (entry["path"], first["class"], second["class"])
        assert float(row["probability_2"]) == second["probability"]


def test_lists_standard_input_and_single_files_select_the_same_images(run: Run, tmp_path: Path) -> None:
    expected = expected_csv(run)[:3]
    paths = [row["path"] for row in expected]
    listed = tmp_path / "list.txt"
    listed.write_text("\r\n".join([paths[0], "", *paths[1:]]) + "\n")
    alone = toolkit("predict", run.path, *paths).stdout
    assert [row["path"] for row in rows(alone)] == paths
    assert toolkit("predict", run.path, f"@{listed}").stdout == alone
    assert toolkit("predict", run.path, "--list", listed).stdout == alone
    piped = CliRunner().invoke(app, ["predict", str(run.path), "-"], input=listed.read_bytes())
    assert piped.stdout == alone


def test_bad_files_are_named_skipped_and_counted(run: Run, tmp_path: Path) -> None:
    good = sorted((folder_of_test(run) / "5").iterdir())[:2]
    truncated, empty, text = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:900])
    empty.touch()
    text.write_text("no image")
    named = [good[0], truncated, empty, tmp_path / "missing.png", text, good[1]]
    outcome = toolkit("predict", run.path, *named, "--batch-size", "2")
    assert outcome.status == 1
    assert [row["path"] for row in rows(outcome.stdout)] == [str(path) for path in good]
    lines = outcome.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines[:4]] == [str(path) for path in named[1:5]]
    reasons = [line.split(": ", 1)[1] for line in lines[:4]]
    assert reasons[0].startswith("damaged")
    assert reasons[1:] == ["an empty file", "no such file", "not an image of a known format"]
    assert lines[4] == "4 of 6 files could not be predicted; skipped"


def predict_with_gaps(path: str, images: list[str]) -> Predictions:
    trained = load_model(path)
    return predict(trained, trained.files(images), torch.device("cpu"), top_k=1, batch_size=2, workers=0)


def test_all_processes_receive_the_list_of_all_bad_files(run: Run) -> None:
    images = [str(path) for path in sorted((folder_of_test(run) / "5").iterdir())]
    gaps = [*images[:2], "nowhere/1", *images[2:], "nowhere/2", "nowhere/3"]
    one, two = run_on(2, predict_with_gaps, str(run.path), gaps)
    assert one.failed == two.failed == [(2, "no such file"), (6, "no such file"), (7, "no such file")]
    assert [path for path, _ in one.rows()] == images
    assert list(one.rows()) == list(two.rows())


def test_images_that_the_preprocessing_rejects_are_bad_files(tmp_path: Path) -> None:
    run = train_on_files(tmp_path, CONVNET, 'data.resize="none"', 'data.crop="none"', "data.image_size=8")
    large = tmp_path / "large.png"
    Image.new("L", (30, 20)).save(large)
    outcome = toolkit("predict", run.path, large, folder_of_test(run) / "1")
    assert outcome.status == 1
    assert f"{large}: " in outcome.stderr
    assert "20 x 30 pixels" in outcome.stderr
    assert len(rows(outcome.stdout)) == 5


def test_folders_are_searched_recursively_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/deep/2.JPG", "a.png", ".hidden/x.png", "b/.y.png", "b/notes.txt", "c/3.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = collect([str(tmp_path)], bytes)
    assert found == [str(tmp_path / name) for name in ("a.png", "b/deep/2.JPG", "c/3.webp")]


def test_names_that_are_not_utf8_can_be_decoded_from_the_file(run: Run, tmp_path: Path) -> None:
    odd = tmp_path / "caf\udce9.png"
    shutil.copy(next((folder_of_test(run) / "2").iterdir()), odd)
    out = tmp_path / "out.csv"
    assert toolkit("predict", run.path, tmp_path, "-o", out).status == 0
    with open(out, newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["path"].endswith("/caf%E9.png")
    assert decode_name(row["path"]) == str(odd)


def test_a_run_that_was_killed_predicts_with_its_best_epoch_so_far(copy: Run) -> None:
    copy.best_weights.unlink()
    outcome = toolkit("predict", copy.path, folder_of_test(copy))
    assert outcome.status == 0
    assert "the run has not finished: best-000" in outcome.stderr
    assert rows(outcome.stdout) == expected_csv(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no images given"),
        (["--format", "jason", "x.png"], "--format jason: expected csv, json, jsonl; did you mean json?"),
        (["@nowhere.txt"], "the list nowhere.txt cannot be read: No such file"),
        (["-o", "nowhere/out.csv", "IMAGES"], "nowhere/out.csv cannot be written: No such file"),
        (["EMPTY"], "holds no image (.jpg"),
        (["@BINARY"], "is not a text file with one path per line"),
    ],
)
def test_a_users_mistake_is_one_message(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\x89PNG\r\n\x00\x00")
    paths = {
        "IMAGES": str(folder_of_test(run)),
        "EMPTY": str(tmp_path / "empty"),
        "@BINARY": f"@{tmp_path / 'binary'}",
    }
    outcome = toolkit("predict", run.path, *(paths.get(argument, argument) for argument in arguments))
    assert outcome.status == 2
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_a_model_that_checks_the_version_of_its_layers_is_loaded(tmp_path: Path) -> None:
    table = ModelConfig(source="torchvision", name="mnasnet0_5")
    module = build_model(table, 3, 3, 32).module
    plain = Preprocessing(3, (32, 32), 32, True, "bilinear", (0.5,) * 3, (0.5,) * 3)
    (tmp_path / "model.json").write_text(
        json.dumps(model_card(table, ["a", "b", "c"], SingleLabel(3), plain, (), "none"))
    )
    safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path).module(images), module.eval()(images))


def test_a_model_card_of_an_earlier_version_gives_a_convnet_with_biases(tmp_path: Path) -> None:
    layers = {"convnet": {"blocks": [{"channels": 4, "batch_norm": True}], "bias": True}, "head": {"bias": True}}
    table = ModelConfig.model_validate({"source": "toolkit", **layers})
    module = build_model(table, 3, 3, 8).module
    plain = Preprocessing(3, (8, 8), 8, True, "bilinear", (0.5,) * 3, (0.5,) * 3)
    card = model_card(table, ["a", "b", "c"], SingleLabel(3), plain, (), "none")
    del card["model"]["convnet"]["bias"], card["model"]["head"]["bias"]
    (tmp_path / "model.json").write_text(json.dumps(card))
    safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
    assert load_model(tmp_path).table == table


def no_model(path: Path) -> Any:
    (path / "recipe.toml").unlink()
    shutil.rmtree(path / "checkpoints")


def no_epoch(path: Path) -> Any:
    for file in (path / "checkpoints").glob("*.safetensors"):
        file.unlink()


def wrong_classes(path: Path) -> Any:
    card = json.loads((path / "checkpoints" / "model.json").read_text())
    card["classes"].append("another")
    (path / "checkpoints" / "model.json").write_text(json.dumps(card))


def old_card(path: Path) -> Any:
    (path / "checkpoints" / "model.json").write_text('{"format": 0}')


def cut_card(path: Path) -> Any:
    (path / "checkpoints" / "model.json").write_text('{"format": 1, "classes": ["a"]}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no such folder"),
        (no_model, "holds no model: neither recipe.toml"),
        (no_epoch, "the run has not finished an epoch yet, so it has no model"),
        (wrong_classes, "does not belong to"),
        (old_card, "was written by another version of this toolkit"),
        (cut_card, "model.json is damaged"),
    ],
)
def test_an_incomplete_model_is_refused_in_one_message(copy: Run, damage: Any, message: str) -> None:
    images = folder_of_test(copy)
    damage(copy.path)
    outcome = toolkit("predict", copy.path, images)
    assert outcome.status == 2
    assert message in outcome.stderr
