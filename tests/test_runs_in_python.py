"""Runs and studies as objects in Python: data frames, predictions, evaluation, reports, display in notebooks."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cli import toolkit
from distributed import launch, run_on
from finished import CONVNET, train_on_files
from PIL import ExifTags, Image

from toolkit.errors import UserError
from toolkit.evaluations import read_evaluation
from toolkit.inference.predict import predict
from toolkit.runs import Run, open_run
from toolkit.training.trained_model import load_model

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run of two epochs that logs every other step."""
    return train_on_files(tmp_path_factory.mktemp("python"), CONVNET, "train.log_every=2", epochs=2)


def folder_of_test(run: Run) -> Path:
    return Path(run.recipe.data.root) / "test"


def test_metrics_are_data_frames_with_a_row_per_epoch_and_per_logged_step(run: Run) -> None:
    epochs = run.epoch_records()
    assert list(run.metrics.index) == [1, 2]
    assert run.metrics.index.name == "epoch"
    for name in ("step", "lr", "train/loss", "train/accuracy"):
        assert list(run.metrics[name]) == [record[name] for record in epochs]
    assert list(run.steps.index) == [record["step"] for record in run.metric_records() if "train/loss" not in record]
    assert len(run.steps) >= 4
    assert run.steps["train/step_loss"].notna().all()


def test_predictions_are_a_data_frame_with_numbers(run: Run) -> None:
    found, rows = run.predictions, run.prediction_records()
    assert list(found.index) == [row["path"] for row in rows]
    assert list(found["probability"]) == [float(row["probability"]) for row in rows]
    accuracy = (found["label"] == found["prediction"]).mean()
    assert accuracy == pytest.approx(run.summary["best"]["test_accuracy"])


def test_without_pandas_the_message_names_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pip install 'image-classification-toolkit\[pandas\]'"):
        _ = run.metrics


def test_predictions_of_files_equal_those_of_the_command_to_the_last_bit(run: Run) -> None:
    images, found = folder_of_test(run), run.predict(folder_of_test(run), top_k=3)
    rows = csv.DictReader(io.StringIO(toolkit("predict", run.path, images, "-k", "3").stdout))
    for one, row in zip(found, rows, strict=True):
        assert (one.path, one.prediction, f"{one.probability:.6g}") == (
            row["path"],
            row["prediction"],
            row["probability"],
        )
        assert [(name, f"{p:.6g}") for name, p in one.top] == [
            (row[f"prediction{rank}"], row[f"probability{rank}"]) for rank in ("", "_2", "_3")
        ]
    paths = [str(path) for path in sorted(images.rglob("*.png"))]
    trained = load_model(run.path)
    exact = predict(trained, trained.files(paths), torch.device("cpu"), top_k=3, batch_size=run.images_per_process)
    assert [[p for _, p in one.top] for one in found] == exact.probabilities.tolist()


def test_paths_images_and_arrays_give_equal_predictions_in_any_mixture(run: Run) -> None:
    paths = sorted(folder_of_test(run).rglob("*.png"))[:9]
    expected = [one.top for one in run.predict([str(path) for path in paths], top_k=10)]
    arrays = [np.array(Image.open(path)) for path in paths]
    colored = np.stack([np.repeat(array[..., None], 3, axis=2) for array in arrays])
    opened = [Image.open(path) for path in paths]
    mixed = [*paths[:2], *(Image.open(path) for path in paths[2:4]), *arrays[4:]]
    for images in (iter(paths), opened, arrays, colored, mixed):
        assert [one.top for one in run.predict(images, top_k=10)] == expected
    assert [one.path for one in run.predict(mixed)] == [str(paths[0]), str(paths[1]), *[None] * 7]
    (one,) = run.predict(Image.open(paths[0]))
    assert one.prediction == expected[0][0][0]
    assert len(run.predict(arrays[0])) == len(run.predict(colored[0])) == 1


def test_a_pillow_image_is_turned_scaled_and_converted_as_its_file_is(run: Run, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(noise).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 256).save(tmp_path / "16-bits.png")
    Image.fromarray(noise).quantize(16).save(tmp_path / "palette.png", transparency=3)
    Image.fromarray(np.dstack([noise, noise[..., :1]])).save(tmp_path / "alpha.png")
    paths = sorted(tmp_path.iterdir())
    files, opened = (run.predict(images, top_k=10) for images in (paths, [Image.open(path) for path in paths]))
    assert [one.top for one in opened] == [one.top for one in files]
    assert len({one.top for one in files}) == 4, "the images differ"


def test_predictions_make_a_data_frame(run: Run) -> None:
    found = run.predict(folder_of_test(run))
    frame = pd.DataFrame(found)
    assert list(frame.columns) == ["path", "prediction", "probability", "top", "error"]
    assert frame["prediction"].tolist() == run.predictions["prediction"].tolist()


def test_images_that_cannot_be_read_have_an_error_and_the_others_a_prediction(run: Run, tmp_path: Path) -> None:
    good = next(folder_of_test(run).rglob("*.png"))
    five = np.zeros((8, 8, 5), dtype=np.uint8)
    with pytest.warns(UserWarning, match=r"2 of 3 images could not be predicted.*nowhere\.png: no such file"):
        missing, whole, channels = run.predict(["nowhere.png", good, five])
    assert (missing.prediction, missing.top, missing.error) == (None, (), "no such file")
    assert channels.error is not None
    assert "5 channels" in channels.error
    assert (whole.prediction, whole.error) == (run.predict(good)[0].prediction, None)


@pytest.mark.parametrize(
    ("images", "top_k", "message"),
    [
        ("nowhere.png", None, "nowhere.png: no such file"),
        (["a.png", "b.png"], None, "none of 2 images is readable; a.png: no such file"),
        ([], None, "no images given"),
        (np.zeros((2, 2), dtype=np.float32), None, r"uint8 arrays \[h, w, C\], not float32 arrays of shape \[2, 2\]"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), None, "not objects of type Tensor"),
        (7, None, "not objects of type int"),
        ("nowhere.png", 0, "top_k is 0: it must be at least 1"),
    ],
)
def test_wrong_input_is_one_message(run: Run, images: Any, top_k: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run.predict(images, top_k=top_k)


@pytest.mark.parametrize(("name", "value", "least"), [("batch_size", 0, 1), ("batch_size", -1, 1), ("workers", -1, 0)])
def test_impossible_settings_are_one_message(run: Run, name: str, value: int, least: int) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}: it must be at least {least}"):
        run.predict("nowhere.png", **{name: value})  # type: ignore[arg-type]


def test_predicting_leaves_the_model_as_it_was_loaded(run: Run) -> None:
    opened = open_run(run.path)
    inputs = torch.rand(2, 3, 16, 16)
    before = opened.model.module(inputs)
    opened.predict(folder_of_test(run))
    assert torch.equal(opened.model.module(inputs), before)
    assert all(weights.is_contiguous() for weights in opened.model.module.parameters())


def test_the_model_is_loaded_once_and_only_when_needed(run: Run) -> None:
    opened = open_run(run.path)
    assert opened.classes == [str(digit) for digit in range(10)]
    assert "model" not in vars(opened)
    assert opened.model is opened.model
    assert opened.model.classes == opened.classes
    assert opened == run
    assert repr(opened) == f"Run({str(run.path)!r})"


def test_a_run_that_has_not_finished_warns_that_its_model_is_the_best_so_far(run: Run, tmp_path: Path) -> None:
    copy = open_run(shutil.copytree(run.path, tmp_path / "copy"))
    copy.best_weights.unlink()
    with pytest.warns(UserWarning, match="the run has not finished: best-000"):
        found = copy.predict(folder_of_test(run))
    assert found == run.predict(folder_of_test(run))


def test_evaluation_returns_the_recorded_metrics(run: Run) -> None:
    best = run.summary["best"]
    for split, prefix in ((None, "test_"), ("validation", "val_")):
        found = run.evaluate(split)
        assert found == {key.removeprefix(prefix): value for key, value in best.items() if key.startswith(prefix)}
        assert found["accuracy"] > 0.1


def test_evaluation_warns_of_metrics_that_differ(run: Run, tmp_path: Path) -> None:
    copy = open_run(shutil.copytree(run.path, tmp_path / "copy"))
    summary = copy.summary
    summary["best"]["test_loss"] *= 2
    copy.write_json("summary.json", summary)
    with pytest.warns(UserWarning, match=r"metrics differ from summary\.json: best test_loss"):
        copy.evaluate()


def test_evaluation_on_other_data_is_kept_in_the_run(run: Run) -> None:
    shutil.copytree(folder_of_test(run), run.path.parent / "scans")
    shutil.rmtree(run.path.parent / "scans" / "9")
    with pytest.warns(UserWarning, match="no images of 1 of the model's 10 classes: 9"):
        found = run.evaluate(data=run.path.parent / "scans")
    assert found == read_evaluation(run, "scans").metrics
    with pytest.raises(UserError, match="need data, which selects another data set"):
        run.evaluate(name="scans")
    with pytest.raises(UserError, match="only the other data set is read"):
        run.evaluate(data="scans", data_root="elsewhere")


def test_the_report_is_written_and_its_path_returned(run: Run, tmp_path: Path) -> None:
    path = run.report(tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert "<html" in path.read_text()


def predict_and_evaluate(path: str, images: str) -> list[Any]:
    run = open_run(path)
    return [*run.predict(images), run.evaluate(), *run.predict(images)]


def test_two_processes_give_the_same_results(run: Run) -> None:
    images = str(folder_of_test(run))
    expected = predict_and_evaluate(str(run.path), images)
    assert launch(2, predict_and_evaluate, str(run.path), images) == [expected, expected]
    within_a_group = run_on(2, predict_and_evaluate, str(run.path), images)
    assert within_a_group == [expected, expected]


def test_a_damaged_list_of_classes_is_one_message(run: Run, tmp_path: Path) -> None:
    copy = open_run(shutil.copytree(run.path, tmp_path / "copy"))
    (copy.checkpoints / "model.json").write_text('{"classes": 3}')
    with pytest.raises(UserError, match=r"model\.json is damaged"):
        _ = copy.classes


def test_a_recipe_s_folder_means_its_newest_run(run: Run) -> None:
    assert open_run(run.path.parent) == run
    with pytest.raises(UserError, match="is not a run directory"):
        open_run(run.path / "figures")
