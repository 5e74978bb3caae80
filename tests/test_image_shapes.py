"""Images as they are: inputs that are not square, from the recipe to prediction, export and explanation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cli import toolkit
from finished import CONVNET, TIMM, digit_files, train_on_files
from PIL import Image
from timm.data import create_transform
from torch import nn
from trainers import Trainers, at_call, kill_self

from toolkit.augment import resize
from toolkit.augment.transforms import build_transform
from toolkit.data.channel_stats import channel_statistics
from toolkit.data.image_sources import InMemoryImages
from toolkit.data.pipeline import plan_preprocessing
from toolkit.data.preprocessing import Preprocessing, image_area, resolve_preprocessing, stage_of
from toolkit.distributed.process import init_accelerator
from toolkit.errors import UserError
from toolkit.inference.explain import CamLayer, explain, find_layer, heat_maps, subjects_from_files
from toolkit.models.build import build_model, check_sizes
from toolkit.recipe.schema import AugmentConfig, DataConfig, ModelConfig, Recipe
from toolkit.runs import Run, open_run
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.loaders import build_loaders
from toolkit.training.task import SingleLabel
from toolkit.training.train_step import TrainStep
from toolkit.training.trained_model import TrainedModel, load_model

pytestmark = pytest.mark.long

FLIPPED = 'augment.train=[{name="RandomHorizontalFlip"}]'
FLIP = {"name": "RandomHorizontalFlip", "p": 1.0}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def resolved(**data: object) -> Preprocessing:
    table = DataConfig.model_validate({"dataset": "imagefolder", **data})
    return resolve_preprocessing(table, None, None, 3, lambda plain: pytest.fail("nothing is to be measured"))


def trained(module: nn.Module, size: tuple[int, int]) -> TrainedModel:
    plain = Preprocessing(3, size, size, True, "bilinear", (0.5,) * 3, (0.5,) * 3)
    table = ModelConfig(source="timm", name="any")
    return TrainedModel(module.eval(), plain, (), ["a", "b"], SingleLabel(2), table, "none", Path("model.safetensors"))


# -- inputs that are not square ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on inputs of 8 x 12 pixels, augmented in batches."""
    folder = tmp_path_factory.mktemp("wide")
    augment = 'augment.train=[{name="RandomHorizontalFlip"}, {name="RandomRotation", degrees=9}]'
    return train_on_files(folder, CONVNET, "data.image_size=[8, 12]", augment, 'data.normalize="dataset"')


def test_a_run_on_wide_inputs_is_evaluated_predicted_exported_and_explained(wide: Run, tmp_path: Path) -> None:
    assert "input 3x8x12" in (wide.path / "log.txt").read_text()
    evaluated = toolkit("evaluate", wide.path, "--json")
    assert {m["verdict"] for m in json.loads(evaluated.stdout)["metrics"]["best"].values()} == {"equal"}
    file = next((wide.path.parents[2] / "data" / "test").rglob("*.png"))
    assert toolkit("predict", wide.path, file).status == 0
    assert toolkit("export", wide.path, "--format", "safetensors", "-o", tmp_path / "out").status == 0
    card = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert card["input"]["shape"] == ["batch", 3, 8, 12]
    assert card["image_size"] == [8, 12]
    assert load_model(tmp_path / "out").preprocessing.image_size == (8, 12)
    outcome = toolkit("explain", wide.path, file, "-o", tmp_path / "maps")
    assert outcome.status == 0, outcome.stderr
    report = toolkit("report", wide.path)
    assert report.status == 0, report.stderr


def test_plan_states_the_shape_of_the_input(wide: Run) -> None:
    outcome = toolkit("plan", wide.path.parents[2] / "recipe.toml", "--set", "data.image_size=[8, 12]", "--json")
    assert json.loads(outcome.stdout)["input"] == [3, 8, 12]


def test_images_are_scaled_to_cover_an_input_that_is_not_square() -> None:
    """A tall image for a wide input: its full width is kept, and the crop leaves out pixels above and below."""
    preprocessing = resolved(image_size=[20, 40], normalize="none")
    image = np.zeros((60, 30, 3), dtype=np.uint8)
    image[:, :15] = 255
    made = build_transform("test", AugmentConfig(), preprocessing)(image)
    assert made.shape == (3, 20, 40)
    assert (made[:, :, :19] == 1).all()
    assert (made[:, :, 21:] == 0).all()


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_batches_of_inputs_that_are_not_square_equal_single_images(size: tuple[int, int]) -> None:
    preprocessing = resolved(image_size=list(size), normalize="imagenet")
    table = AugmentConfig.model_validate({"train": [FLIP, {"name": "CenterCrop"}]})
    plan = plan_preprocessing("train", table, preprocessing, 0, None)
    assert plan.batched is not None
    images = [noise(50, 70), noise(90, 33)]
    pixels = torch.stack([torch.from_numpy(plan.transform.apply(one, plan.steps).copy()) for one in images])
    for layout in (torch.contiguous_format, torch.channels_last):
        batch = pixels.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        made = plan.batched(batch, 0, np.arange(2))
        assert torch.equal(made, torch.stack([plan.transform(one) for one in images]))
        assert made.shape == (2, 3, *size)


@pytest.mark.parametrize(
    ("source", "name", "size"),
    [("torchvision", "resnet18", (32, 64)), ("torchvision", "swin_t", (64, 96)), ("timm", "test_vit", (64, 96))],
)
def test_models_take_inputs_that_are_not_square(source: str, name: str, size: tuple[int, int]) -> None:
    built = build_model(ModelConfig.model_validate({"source": source, "name": name}), 5, 3, size)
    assert built.module.eval()(torch.zeros(1, 3, *size)).shape == (1, 5)


def test_position_embeddings_of_a_file_are_interpolated_as_timm_does(tmp_path: Path) -> None:
    square = timm.create_model("test_vit", num_classes=5, img_size=64)
    torch.save(square.state_dict(), tmp_path / "w.pth")
    table = ModelConfig(source="timm", name="test_vit", weights=f"file:{tmp_path / 'w.pth'}")
    found = build_model(table, 5, 3, (64, 96)).module
    config = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    reference = timm.create_model(
        "test_vit", num_classes=5, img_size=(64, 96), pretrained=True, pretrained_cfg_overlay=config
    )
    assert torch.equal(found.state_dict()["pos_embed"], reference.state_dict()["pos_embed"])


def test_a_vit_of_torchvision_is_refused_other_shapes() -> None:
    with pytest.raises(UserError, match="vit_b_16 cannot take images of 32x64 pixels"):
        build_model(ModelConfig(source="torchvision", name="vit_b_16"), 5, 3, (32, 64))


@pytest.mark.parametrize(
    ("name", "kind", "grid"), [("test_vit", "tokens", (4, 6)), ("test_convnext", "channels_first", (2, 3))]
)
def test_maps_have_the_shape_of_an_input_that_is_not_square(name: str, kind: str, grid: tuple[int, int]) -> None:
    module = timm.create_model(name, num_classes=2, **({"img_size": (64, 96)} if "vit" in name else {}))
    model, inputs = trained(module, (64, 96)), torch.randn(1, 3, 64, 96)
    layer = find_layer(model, inputs[0])
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        handle = module.get_submodule(layer.name).register_forward_hook(lambda *a: outputs.append(layer.to_maps(a[2])))
        module(inputs)
        handle.remove()
    assert (layer.kind, tuple(outputs[0].shape[2:])) == (kind, grid)
    assert heat_maps(model, layer, inputs, torch.tensor([0])).shape == (1, 64, 96)


def test_tokens_of_an_input_that_is_not_square_are_arranged_row_by_row() -> None:
    tokens = torch.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    layer = CamLayer("any", "tokens", prefix=1, grid=(2, 3))
    maps = layer.to_maps(tokens)
    assert torch.equal(maps[1, :, 1, 0], tokens[1, 1 + 1 * 3 + 0])
    assert torch.equal(layer.from_maps(maps, tokens), tokens)


# -- letterbox --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [[24, 24], [20, 37]])
def test_letterboxed_inputs_equal_timms_border_mode(size: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "resizing_kernel", lambda: "Pillow")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    preprocessing = resolved(image_size=size, resize="letterbox", normalize={"mean": list(mean), "std": list(std)})
    reference = create_transform(
        (3, *size), crop_pct=1.0, crop_mode="border", interpolation="bilinear", mean=mean, std=std
    )
    for image in (noise(61, 150), noise(143, 64), noise(7, 9)):
        made = build_transform("test", AugmentConfig(), preprocessing)(image)
        torch.testing.assert_close(made, reference(Image.fromarray(image)), rtol=0, atol=1e-5)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(("image", "size"), [((30, 60), (20, 30)), ((61, 20), (24, 25)), ((5, 5), (9, 16))])
def test_the_whole_image_is_visible_in_its_area_and_the_rest_is_the_fill(
    image: tuple[int, int], size: tuple[int, int]
) -> None:
    color = [255, 0, 51]
    preprocessing = resolved(image_size=list(size), resize="letterbox", fill=color, normalize="none")
    made = build_transform("test", AugmentConfig(), preprocessing)(np.full((*image, 3), 102, dtype=np.uint8))
    rows, columns = image_area(preprocessing, image)
    is_image = torch.zeros(size, dtype=torch.bool)
    is_image[rows, columns] = True
    values = (made * 255).round().int()
    assert (values[:, is_image] == 102).all()
    assert (values[:, ~is_image] == torch.tensor(color)[:, None]).all()
    height, width = rows.stop - rows.start, columns.stop - columns.start
    assert height == size[0] or width == size[1]
    assert abs(height / width - image[0] / image[1]) < 1 / min(height, width)


def test_batches_of_letterboxed_images_equal_single_images() -> None:
    preprocessing = resolved(image_size=[24, 40], resize="letterbox", normalize="imagenet")
    plan = plan_preprocessing("train", AugmentConfig.model_validate({"train": [FLIP]}), preprocessing, 0, None)
    assert plan.batched is not None
    images = [noise(50, 70), noise(90, 33)]
    pixels = torch.stack([torch.from_numpy(plan.transform.apply(one, plan.steps).copy()) for one in images])
    made = plan.batched(pixels.permute(0, 3, 1, 2), 0, np.arange(2))
    assert torch.equal(made, torch.stack([plan.transform(one) for one in images]))


def test_the_default_fill_is_zero_for_the_model_and_is_not_part_of_the_measured_mean() -> None:
    images = InMemoryImages(np.full((3, 10, 20, 3), 51, dtype=np.uint8), "gray", 3)
    table = DataConfig.model_validate(
        {"dataset": "imagefolder", "image_size": 20, "resize": "letterbox", "normalize": "dataset"}
    )

    def measure(plain: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean, _ = channel_statistics(images, np.arange(3), plain)
        return mean, (1.0,) * 3

    preprocessing = resolve_preprocessing(table, None, None, 3, measure)
    assert preprocessing.mean == pytest.approx((0.2,) * 3)
    made = build_transform("test", AugmentConfig(), preprocessing)(images.load(0))
    assert made.abs().max() < 1e-6


def test_explained_areas_leave_out_the_background(tmp_path: Path) -> None:
    run = train_on_files(tmp_path, CONVNET, "data.image_size=[8, 14]", 'data.resize="letterbox"')
    file = next((tmp_path / "data" / "test").rglob("*.png"))
    trained = load_model(run.path)
    (subject,) = subjects_from_files(trained, [str(file)], pytest.fail)
    assert subject.area == (slice(0, 8), slice(3, 11))
    (found,) = explain(trained, [subject], find_layer(trained, subject.input))
    assert found.heat.shape == (8, 8)
    assert found.heat.max() in (0, 1)
    assert toolkit("explain", run.path, file, "-o", tmp_path / "maps").status == 0
    assert toolkit("export", run.path, "--format", "safetensors", "-o", tmp_path / "out").status == 0
    steps = json.loads((tmp_path / "out" / "preprocessing.json").read_text())["steps"]
    assert any("keeping the aspect ratio, to fit into 8 x 14" in step for step in steps)
    assert any("padding smaller images with the color [128, 128, 128]" in step for step in steps)


# -- sizes of evaluation and of training's stages ---------------------------------------------------------------------

STAGES = ("data.image_size=24", "data.progressive_sizes=[16, [20, 24], 24]", "data.eval_image_size=32")


def test_the_stage_of_an_epoch_divides_the_epochs_into_equal_parts() -> None:
    assert [stage_of(epoch, 10, 3) for epoch in range(10)] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [stage_of(epoch, 4, 4) for epoch in range(4)] == [0, 1, 2, 3]
    assert stage_of(10, 10, 3) == 2, "an epoch after the planned ones"


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose inputs have three sizes in training and a larger one in evaluation, read from the cache."""
    folder = tmp_path_factory.mktemp("staged")
    return train_on_files(folder, TIMM, *STAGES, FLIPPED, 'data.cache="memory"', epochs=3)


def test_sizes_of_training_and_evaluation_are_used_and_stored(staged: Run, tmp_path: Path) -> None:
    log = (staged.path / "log.txt").read_text()
    assert "input 3x16x16, then 3x20x24, then 3x24x24 in training, 3x32x32 in evaluation" in log
    for size in ("short side 16", "cover 20 x 24", "short side 24", "short side 32"):
        assert f"(decode, resize to {size}" in log
    trained = load_model(staged.path)
    assert (trained.preprocessing.image_size, trained.train_size) == ((32, 32), (24, 24))
    evaluated = toolkit("evaluate", staged.path, "--json")
    assert {m["verdict"] for m in json.loads(evaluated.stdout)["metrics"]["best"].values()} == {"equal"}
    assert toolkit("export", staged.path, "--format", "timm", "-o", tmp_path / "out").status == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_stages_do_not_depend_on_the_cache(staged: Run, tmp_path: Path) -> None:
    plain = train_on_files(tmp_path, TIMM, *STAGES, FLIPPED, 'data.cache="off"', epochs=3)
    assert plain.best_weights.read_bytes() == staged.best_weights.read_bytes()
    assert plain.metrics_file.read_bytes() == staged.metrics_file.read_bytes()


def test_a_run_killed_within_a_stage_continues_as_if_it_had_not_been(staged: Run, tmp_path: Path) -> None:
    shutil.copytree(staged.path.parents[2] / "data", tmp_path / "data")
    recipe = tmp_path / "recipe.toml"
    text = (staged.path.parents[2] / "recipe.toml").read_text()
    recipe.write_text(text.replace(str(staged.path.parents[2]), str(tmp_path)))
    overrides = [part for setting in (*STAGES, FLIPPED, 'data.cache="memory"') for part in ("--set", setting)]
    steps = int(staged.epoch_records()[0]["step"])
    killed = Trainers(1, tmp_path / "shown", recipe, *overrides, prepare=lambda _: kill_at(steps + 2))
    assert killed.wait() == [-9], killed.text()
    (path,) = (tmp_path / "runs" / "tiny").iterdir()
    resumed = toolkit("train", "--resume", path, "--no-report")
    assert resumed.status == 0, resumed.stderr
    run = open_run(path)
    assert run.best_weights.read_bytes() == staged.best_weights.read_bytes()
    assert run.metrics_file.read_bytes() == staged.metrics_file.read_bytes()


def kill_at(step: int) -> None:
    at_call(TrainStep, "_update", step, kill_self)


def test_each_stage_gives_the_batches_of_a_run_of_that_size(tmp_path: Path) -> None:
    """The order of the examples and their augmentation are those of the same epoch without stages."""
    digit_files(tmp_path / "data", train=2, test=2)
    base = {"recipe": {"name": "any", "run_root": str(tmp_path)}, "model": {"source": "timm", "name": "test_resnet"},
            "optimizer": {"name": "sgd", "lr": 0.1}, "tracking": {"trackers": []},
            "train": {"epochs": 2, "batch_size": 8, "precision": "no"},
            "augment": {"train": [{"name": "RandomHorizontalFlip"}]}}  # fmt: skip
    data = {"dataset": "imagefolder", "root": str(tmp_path / "data"), "workers": 0, "cache": "off"}

    def batches(epoch: int, **sizes: object) -> list[torch.Tensor]:
        recipe = Recipe.model_validate({**base, "data": {**data, **sizes}})
        setup = build_context(recipe, init_accelerator(recipe.train), Console(is_main=False))
        loaders = build_loaders(setup, lambda items, rounds: items)
        found = [batch.images for _, batch in loaders.train.epoch(epoch)]
        loaders.close()
        return found

    for epoch, size in ((0, 16), (1, 24)):
        staged = batches(epoch, image_size=24, progressive_sizes=[16, 24])
        for one, other in zip(staged, batches(epoch, image_size=size), strict=True):
            assert one.shape[2:] == (size, size)
            assert torch.equal(one, other)


def test_features_of_a_frozen_backbone_are_those_of_each_splits_size(tmp_path: Path) -> None:
    """The recorded metrics come from cached features; `toolkit evaluate` computes them from images of 32 x 32."""
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "w.pth")
    frozen = [f'model.weights="file:{tmp_path / "w.pth"}"', 'transfer.mode="linear_probe"']
    run = train_on_files(tmp_path, TIMM, *frozen, "data.image_size=24", "data.eval_image_size=32")
    assert "inputs of fc computed once" in run.summary["cached"][0]
    evaluated = toolkit("evaluate", run.path, "--split", "validation", "--json")
    verdicts = {m["verdict"] for m in json.loads(evaluated.stdout)["metrics"]["best"].values()}
    assert verdicts <= {"equal", "rounding"}


def test_a_vit_needs_embeddings_for_any_size_to_be_evaluated_at_another_one() -> None:
    table = ModelConfig(source="timm", name="vit_tiny_patch16_224", args={"depth": 1})
    with pytest.raises(UserError, match=r"does not accept images of 96 x 96 pixels; .*dynamic_img_size = true"):
        check_sizes(build_model(table, 3, 3, 64), table, 3, [(96, 96)])
    dynamic = table.model_copy(update={"args": {"depth": 1, "dynamic_img_size": True}})
    check_sizes(build_model(dynamic, 3, 3, 64), dynamic, 3, [(96, 96), (64, 96)])
