"""`toolkit embed` and `run.embed`: features of images, and their nearest neighbors."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from cli import toolkit
from distributed import launch
from finished import CONVNET, train_on_files
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from toolkit.errors import UserError
from toolkit.inference.embed import nearest
from toolkit.inference.features import ModelWithFeatures
from toolkit.models.build import build_model
from toolkit.recipe.schema import ModelConfig
from toolkit.runs import Run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run with a hidden layer in its head."""
    return train_on_files(tmp_path_factory.mktemp("embed"), CONVNET, "model.head.hidden=[12]", epochs=2)


def images_of(run: Run, split: str) -> Path:
    return Path(run.recipe.data.root) / split


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_last_layer_maps_the_features_to_the_predictions(run: Run) -> None:
    features = torch.from_numpy(run.embed(images_of(run, "test")))
    assert features.shape == (50, 12)
    last = run.model.module.head[-1]
    with torch.no_grad():
        probabilities = F.linear(features, last.weight, last.bias).softmax(1)
    found = run.predict(images_of(run, "test"))
    assert [run.classes[i] for i in probabilities.argmax(1)] == [each.prediction for each in found]
    assert probabilities.amax(1).tolist() == pytest.approx([each.probability for each in found], abs=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_features_are_those_that_timm_calls_pre_logits(name: str) -> None:
    table = ModelConfig.model_validate({"source": "timm", "name": name})
    built = build_model(table, 5, 3, 160)
    module, images = built.module.eval(), torch.randn(3, 3, 160, 160)
    model = ModelWithFeatures(module, built.head)
    with torch.no_grad():
        assert torch.equal(model(images), module(images))
        assert torch.equal(model.features, module.forward_head(module.forward_features(images), pre_logits=True))
        assert model.width(3, (160, 160)) == model.features.shape[1]


def test_features_of_a_convolution_before_the_pooling_are_means() -> None:
    table = ModelConfig.model_validate({"source": "torchvision", "name": "squeezenet1_1"})
    built = build_model(table, 5, 3, 64)
    module, images = built.module.eval(), torch.randn(2, 3, 64, 64)
    model = ModelWithFeatures(module, built.head)
    with torch.no_grad():
        model(images)
        assert torch.allclose(model.features, module.features(images).mean((2, 3)))


def test_neighbors_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, among = torch.randn(7, 16, generator=generator), torch.randn(40, 16, generator=generator)
    similarities, indices = nearest(queries, among, 5)
    reference = NearestNeighbors(n_neighbors=5, metric="cosine").fit(among.numpy())
    distances, expected = reference.kneighbors(queries.numpy())
    assert indices.tolist() == expected.tolist()
    assert np.allclose(1 - distances, similarities.numpy(), atol=1e-6)
    own = torch.arange(40)
    _, others = nearest(among, among, 3, own)
    assert not (others == own[:, None]).any()
    assert nearest(queries, among, 99)[1].shape == (7, 40)


def test_all_files_and_python_have_the_same_features(run: Run, tmp_path: Path) -> None:
    images, expected = images_of(run, "test"), run.embed(images_of(run, "test"))
    paths = [each.path for each in run.predict(images)]
    for name in ("f.npy", "f.parquet"):
        outcome = toolkit("embed", run.path, images, "-o", tmp_path / name)
        assert outcome.status == 0, outcome.stderr
    assert np.array_equal(np.load(tmp_path / "f.npy"), expected)
    assert (tmp_path / "f.txt").read_text().splitlines() == paths
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert np.array_equal(np.array(table["features"], dtype=np.float32), expected)
    assert table["path"] == paths
    assert table["prediction"] == [each.prediction for each in run.predict(images)]


def test_folders_archives_tables_and_the_runs_own_images_are_read_alike(run: Run, tmp_path: Path) -> None:
    folder = images_of(run, "test")
    expected = run.embed(folder)
    archive = shutil.make_archive(str(tmp_path / "digits"), "zip", folder)
    (tmp_path / "table.csv").write_text(
        "path,label\n" + "".join(f"{path},{path.parent.name}\n" for path in sorted(folder.rglob("*.png")))
    )
    for source in (("--data", folder), ("--data", archive), ("--data", tmp_path / "table.csv"), ("--split", "test")):
        outcome = toolkit("embed", run.path, *source, "-o", tmp_path / "f.parquet")
        assert outcome.status == 0, outcome.stderr
        table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
        assert np.allclose(np.array(table["features"]), expected, atol=1e-6)
        assert table["label"] == [path.parent.name for path in sorted(folder.rglob("*.png"))]


def test_neighbors_among_the_training_images_or_the_given_ones(run: Run) -> None:
    image = sorted(images_of(run, "train").rglob("*.png"))[11]
    first, second = rows(toolkit("embed", run.path, image, "--neighbors", "2").stdout)
    assert (first["path"], first["rank"], first["neighbor"], first["neighbor_class"]) == (
        str(image),
        "1",
        f"train/{image.parent.name}/{image.name}",
        image.parent.name,
    )
    assert float(first["similarity"]) == pytest.approx(1, abs=1e-5)
    assert float(second["similarity"]) <= float(first["similarity"])
    outcome = toolkit("embed", run.path, images_of(run, "train"), "--query", image, "--neighbors", "3", "--json")
    found = json.loads(outcome.stdout)
    assert [each["rank"] for each in found] == [1, 2, 3]
    assert str(image) not in [each["neighbor"] for each in found]
    assert found[0]["similarity"] == pytest.approx(float(second["similarity"]), abs=1e-5)


def test_several_processes_write_the_same_file(run: Run, tmp_path: Path) -> None:
    toolkit("embed", run.path, images_of(run, "test"), "-o", tmp_path / "one.npy")
    arguments = ("--workers", "0", "--neighbors", "1", "--query", str(images_of(run, "test") / "3"))
    first, other = launch(
        2, toolkit, "embed", str(run.path), str(images_of(run, "test")), "-o", str(tmp_path / "two.npy"), *arguments
    )
    assert first.status == 0, first.stderr
    assert len(rows(first.stdout)) == 5
    assert other.stdout == ""
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy"))


def test_an_unreadable_image_is_left_out_of_files_and_nan_in_python(run: Run, tmp_path: Path) -> None:
    good, bad = sorted(images_of(run, "test").rglob("*.png"))[3], tmp_path / "bad.png"
    bad.write_text("no image")
    outcome = toolkit("embed", run.path, bad, good, "-o", tmp_path / "f.npy")
    assert outcome.status == 1
    assert f"{bad}: not an image of a known format" in outcome.stderr
    assert (tmp_path / "f.txt").read_text() == f"{good}\n"
    with pytest.warns(UserWarning, match="1 of 2 images could not be read, their features are NaN"):
        found = run.embed([bad, good])
    assert np.isnan(found[0]).all()
    assert np.array_equal(found[1:], np.load(tmp_path / "f.npy"))
    with pytest.raises(UserError, match="not an image of a known format"):
        run.embed(bad)


def test_bad_arguments_are_one_message(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = str(sorted(images_of(run, "test").rglob("*.png"))[0])
    exported = tmp_path / "exported"
    assert toolkit("export", run.path, "--format", "safetensors", "-o", exported).status == 0
    cases = {
        (str(run.path), image): "give -o FILE.parquet or -o FILE.npy for the features, or --neighbors K",
        (str(run.path), "-o", "f.npy"): "give one of these: PATHs, --data, or --split",
        (str(run.path), image, "--split", "test", "-o", "f.npy"): "give one of these: PATHs, --data, or --split",
        (str(run.path), image, "-o", "f.csv"): "-o f.csv: expected a file name that ends in .parquet or .npy",
        (str(run.path), image, "-o", "f.npy", "--query", image): "--query needs --neighbors K",
        (str(run.path), "--split", "tests", "-o", "f.npy"): "there is no split 'tests'",
        (str(exported), image, "--neighbors", "2"): "is an exported model, which has no training images",
    }
    for arguments, message in cases.items():
        outcome = toolkit("embed", *arguments)
        assert outcome.status == 2, arguments
        assert message in outcome.stderr
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    outcome = toolkit("embed", run.path, image, "-o", "f.parquet")
    assert outcome.status == 2
    assert "pip install 'image-classification-toolkit[parquet]'" in outcome.stderr
