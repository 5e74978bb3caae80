"""`toolkit publish`: the folder, its model card, and the push by the real client to a local mock of the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import tomli
import torch
from cli import toolkit
from finished import CONVNET, TIMM, train_on_files
from hub import Hub
from huggingface_hub import ModelCard, constants

from toolkit.inference.publish import model_card, shareable
from toolkit.recipe import Recipe, load_recipe
from toolkit.recipe.resolve import resolved_content
from toolkit.runs import Run
from toolkit.training.fit import fit
from toolkit.training.trained_model import load_model

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_on_files(tmp_path_factory.mktemp("publish"), CONVNET)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Log the client in to a local mock of the Hub."""
    with Hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        yield server


def card_of(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


def test_the_cards_front_matter_is_parsed_by_the_hubs_own_library(run: Run, tmp_path: Path) -> None:
    outcome = toolkit("publish", run.path, "lab/digits", "--license", "mit", "--no-push", "-o", tmp_path / "out")
    assert outcome.status == 0, outcome.stderr
    data = card_of(tmp_path / "out").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "toolkit", "image-classification")
    assert {"image-classification", "toolkit", "convnet", "scratch"} <= set(data.tags)
    assert data.model_name == "digits"
    best = run.summary["best"]
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        "top-1 accuracy": round(best["test_accuracy"], 6),
        "top-5 accuracy": round(best["test_top5_accuracy"], 6),
        "balanced accuracy": round(best["test_balanced_accuracy"], 6),
        "macro F1": round(best["test_macro_f1"], 6),
    }
    assert {(result.dataset_type, result.dataset_split) for result in data.eval_results} == {("imagefolder", "test")}
    assert {result.metric_type: result.metric_args for result in data.eval_results}["f1"] == {"average": "macro"}
    assert data.metrics == ["accuracy", "f1"]
    assert data.datasets is None


def card_for(run: Run, folder: Path, best: dict[str, float] | None = None, **data: Any) -> Any:
    """Return the model card that the run would have with other keys of [data] and other metrics, read back."""
    recipe = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update=data)})
    summary = {**run.summary, "best": best or run.summary["best"]}
    text = model_card(run, load_model(run.path), recipe, summary, "lab/digits", "mit")
    (folder / "README.md").write_text(text)
    return card_of(folder)


def test_a_data_set_on_the_hub_is_in_the_metadata_and_linked(run: Run, tmp_path: Path) -> None:
    arguments = {"name": "small", "revision": "main"}
    card = card_for(run, tmp_path, dataset="huggingface", name="lab/my_flowers", args=arguments)
    assert card.data.datasets == ["lab/my_flowers"]
    described = {(r.dataset_type, r.dataset_config, r.dataset_revision) for r in card.data.eval_results}
    assert described == {("lab/my_flowers", "small", "main")}
    assert r"[lab/my\_flowers](https://huggingface.co/datasets/lab/my_flowers)" in card.text
    for not_on_the_hub in ("cifar10", str(tmp_path), "lab/flowers/train"):
        assert card_for(run, tmp_path, dataset="huggingface", name=not_on_the_hub).data.datasets is None


@pytest.mark.parametrize(
    ("data", "link"),
    [
        (
            {"dataset": "cifar10"},
            "[CIFAR-10](https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.CIFAR10.html)",
        ),
        (
            {"dataset": "torchvision", "name": "Flowers102"},
            "[Flowers102](https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.Flowers102.html)",
        ),
        ({"dataset": "caltech101"}, "[Caltech-101](https://doi.org/10.22002/D1.20086)"),
        ({"dataset": "imagefolder"}, "the author's own images. 10 classes"),
    ],
)
def test_the_card_links_the_page_of_the_data_set(run: Run, tmp_path: Path, data: dict[str, str], link: str) -> None:
    assert link in card_for(run, tmp_path, **data).text


def test_without_test_images_the_metadata_has_the_validation_metrics(run: Run, tmp_path: Path) -> None:
    best = {key: value for key, value in run.summary["best"].items() if not key.startswith("test_")}
    results = card_for(run, tmp_path, best).data.eval_results
    assert {result.dataset_split for result in results} == {"validation"}
    assert results[0].metric_value == round(best["val_accuracy"], 6)


def test_the_card_describes_data_recipe_metrics_limits_and_license(run: Run, tmp_path: Path) -> None:
    toolkit("publish", run.path, "lab/digits", "--no-push", "-o", tmp_path / "out")
    text = card_of(tmp_path / "out").text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Use", "## Data", "## Recipe", "## Metrics", "## Limits", "## License",
    ]  # fmt: skip
    assert "72 train, 8 validation, 50 test" in text
    assert "sgd, learning rate 0.02" in text
    assert f"| cross-entropy | {run.summary['best']['val_loss']:.4f} | {run.summary['best']['test_loss']:.4f} |" in text
    assert "Its author has not stated a license." in text


def test_the_folder_predicts_as_the_run_does_and_contains_no_local_path(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert toolkit("publish", run.path, "lab/digits", "--no-push", "-o", folder).status == 0
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "model.safetensors", "model.json", "preprocessing.json", "recipe.toml",
    }  # fmt: skip
    images = Path(run.recipe.data.root) / "test" / "7"
    assert toolkit("predict", folder, images).stdout == toolkit("predict", run.path, images).stdout
    home = str(run.path.parents[2]).encode()
    assert not [path for path in folder.iterdir() if home in path.read_bytes()]
    assert load_recipe(folder / "recipe.toml").model == run.recipe.model


def test_no_published_file_has_a_path_of_the_author(run: Run, tmp_path: Path) -> None:
    """Train with absolute paths of the table, its images, its class names and the initial weights."""
    folder = tmp_path / "secret"
    folder.mkdir()
    images = sorted(Path(run.recipe.data.root).rglob("*.png"))
    rows = [f"{path.relative_to(run.recipe.data.root)},{path.parent.name}\n" for path in images]
    (folder / "labels.csv").write_text("image,label\n" + "".join(rows))
    (folder / "names.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    shutil.copy(run.best_weights, folder / "start.safetensors")
    shutil.copytree(run.recipe.data.root, folder / "images")
    settings = ['data.dataset="table"', f'data.root="{folder}/images"', f'data.table="{folder}/labels.csv"']
    settings += [f'data.class_names="{folder}/names.txt"', f'model.weights="file:{folder}/start.safetensors"']
    settings += ['transfer.mode="finetune"', "data.split={ validation = 0.2, test = 0.2 }"]
    trained = fit(load_recipe(run.path / "recipe.toml", [*settings, f'recipe.run_root="{folder}/runs"']), quiet=True)
    shown = toolkit("publish", trained.path, "lab/digits", "--no-push", "-o", tmp_path / "out")
    assert shown.status == 0, shown.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert not [name for name, content in files.items() if b"secret" in content]
    shared = load_recipe(tmp_path / "out" / "recipe.toml")
    data = shared.data
    assert (data.root, data.table, data.class_names) == ("data", "./labels.csv", "./names.txt")
    assert shared.model.weights == "file:start.safetensors"


@pytest.mark.parametrize(
    ("setting", "key", "expected"),
    [
        ('data.name="/home/secret/flowers"', "name", "./flowers"),
        ('data.name="lab/flowers"', "name", "lab/flowers"),
        ('data.args={ data_files = ["/x/a.csv", "b.csv"] }', "args", {"data_files": ["./a.csv", "b.csv"]}),
        ('data.root=["/home/secret/a", "b"]', "root", ["./a", "b"]),
        ('data.class_names=["/a", "b"]', "class_names", ["/a", "b"]),
        ('data.label_separator="/"', "label_separator", "/"),
        ('augment.train=[{ name = "plugin:Fog", map = "~me/a", to = "../x" }]', "", {"map": "./a", "to": "./x"}),
    ],
)  # fmt: skip
def test_only_paths_are_replaced_in_a_shared_recipe(run: Run, setting: str, key: str, expected: Any) -> None:
    given = load_recipe(run.path / "recipe.toml", with_plugins=False)
    name, _, value = setting.partition("=")
    table, _, of_table = name.partition(".")
    content = resolved_content(given)
    content[table][of_table] = tomli.loads(f"value = {value}")["value"]
    shared = shareable(Recipe.model_validate(content))
    assert (getattr(shared.data, key) if key else shared.augment.train[0].arguments) == expected


def test_a_timm_model_is_published_in_timms_format(tmp_path: Path) -> None:
    run = train_on_files(tmp_path, TIMM, size=32)
    assert toolkit("publish", run.path, "lab/small", "--no-push").status == 0
    folder = run.path / "publish"
    assert card_of(folder).data.library_name == "timm"
    assert 'timm.create_model("hf-hub:lab/small", pretrained=True)' in card_of(folder).text
    module, images = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(module(images), load_model(run.path).module(images))


def test_with_a_login_everything_is_pushed(run: Run, hub: Hub, tmp_path: Path) -> None:
    outcome = toolkit("publish", run.path, "lab/digits", "--private", "-o", tmp_path / "out")
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout == f"{hub.url}/lab/digits\n"
    pushed = hub.repositories["lab/digits"]
    assert pushed == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.private["lab/digits"]
    assert hub.tokens == {"Bearer hf_" + "x" * 34}


def test_a_name_without_an_owner_is_refused_before_anything_is_written(run: Run, hub: Hub) -> None:
    shutil.rmtree(run.path / "publish", ignore_errors=True)
    outcome = toolkit("publish", run.path, "digits")
    assert outcome.status == 2
    assert outcome.stderr == "REPO 'digits' lacks its owner: give OWNER/NAME, such as lab/digits\n"
    assert not (run.path / "publish").exists()
    assert toolkit("publish", run.path, "lab/digits").stdout == f"{hub.url}/lab/digits\n"
    assert "README.md" in hub.repositories["lab/digits"]
    assert not hub.private["lab/digits"]


def test_a_refused_push_leaves_the_folder_ready_to_push(run: Run, hub: Hub) -> None:
    hub.refuse = True
    outcome = toolkit("publish", run.path, "lab/digits")
    assert outcome.status == 1
    folder = run.path / "publish"
    assert "lab/digits was not pushed (" in outcome.stderr
    assert f"hf upload lab/digits {folder} ." in outcome.stderr
    assert (folder / "README.md").is_file()
    hub.refuse = False
    assert toolkit("publish", run.path, "lab/digits").status == 0, "the folder is replaced"


def test_without_a_login_the_folder_is_written_and_the_message_says_how_to_push(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert huggingface_hub.get_token() is None
    outcome = toolkit("publish", run.path, "lab/digits", "-o", tmp_path / "out")
    assert outcome.status == 0
    assert outcome.stdout == f"{tmp_path / 'out'}\n"
    assert "not pushed, since there is no login for the Hugging Face Hub" in outcome.stderr
    assert f"hf auth login, then hf upload lab/digits {tmp_path / 'out'} ." in outcome.stderr
    assert "no license is stated; set one with --license" in outcome.stderr


def test_a_secret_is_written_to_no_file(run: Run, hub: Hub, tmp_path: Path) -> None:
    toolkit("publish", run.path, "lab/digits", "-o", tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if b"hf_" + b"x" * 34 in path.read_bytes()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b/c"], "is not a repository name, such as lab/resnet50-caltech"),
        (["lab/..digits"], "is not a repository name"),
        (["lab/digits", "--license", "MIT License"], "is not a license identifier of the Hub, such as mit, apache-2.0"),
        (["lab/digits", "-o", "USED"], "already exists; choose a new folder"),
    ],
)
def test_a_users_mistake_is_one_message(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "used").write_text("")
    paths = {"USED": str(tmp_path / "used")}
    outcome = toolkit("publish", run.path, *(paths.get(argument, argument) for argument in arguments))
    assert outcome.status == 2
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_an_unfinished_run_cannot_be_published(run: Run, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(run.path, tmp_path / "copy", ignore=shutil.ignore_patterns("publish")))
    (copy.path / "summary.json").unlink()
    outcome = toolkit("publish", copy.path, "lab/digits")
    assert outcome.status == 2
    assert "is not finished: it has no metrics" in outcome.stderr
    assert not (copy.path / "publish").exists()
