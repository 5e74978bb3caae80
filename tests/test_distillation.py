"""Knowledge distillation: loss, teacher, resuming, and outputs that are computed once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from cli import toolkit
from safetensors.torch import save_file
from timm import create_model
from torch import Tensor, nn
from trainers import STATEFUL, Trainers, only_run, outcome, write_recipe

from toolkit.errors import UserError
from toolkit.inference.publish import shareable
from toolkit.recipe import load_recipe
from toolkit.recipe.distillation_schema import DistillationConfig, PretrainedTeacher
from toolkit.runs import Run, open_run
from toolkit.training.checkpoint import find_latest, load_checkpoint, load_weights
from toolkit.training.console import Console
from toolkit.training.distillation import Teacher, build_teacher
from toolkit.training.fit import fit
from toolkit.training.resume import Resumption
from toolkit.training.train_step import TrainStep
from toolkit.training.trained_model import load_model

TEACHER = """
[model]
source = "toolkit"
convnet = {{ blocks = [{{ channels = 12, pool = 2 }}, {{ channels = 16, pool = 2 }}] }}
"""
STUDENT = """
[model]
source = "toolkit"
convnet = {{ blocks = [{{ channels = 6, batch_norm = true, pool = 2 }}, {{ channels = 8, pool = 2 }}] }}
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a teacher on digits."""
    recipe = write_recipe(tmp_path_factory.mktemp("teacher"), TEACHER)
    return fit(load_recipe(recipe, ("train.epochs=2", "optimizer.lr=0.02")), quiet=True)


def of(teacher: Run, alpha: float = 0.5, temperature: float = 4.0) -> str:
    return f'distillation={{teacher="{teacher.path}", alpha={alpha}, temperature={temperature}}}'


def distilled(folder: Path, text: str, teacher: Run, *settings: str) -> Run:
    recipe = load_recipe(write_recipe(folder, text), (of(teacher), "train.epochs=2", *settings))
    return fit(recipe, quiet=True)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 4.0), (1.0, 1.0)])
def test_the_loss_is_that_of_hinton_et_al(alpha: float, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    losses = torch.nn.functional.cross_entropy(student, torch.arange(5), reduction="none")
    table = DistillationConfig(teacher="runs/teacher", alpha=alpha, temperature=temperature)
    found = Teacher(table, nn.Identity(), {}).distilled(losses, student, teacher)
    p, q = (logits / temperature for logits in (teacher, student))
    p, q = (e.exp() / e.exp().sum(1, keepdim=True) for e in (p, q))
    divergence = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(found, (1 - alpha) * losses + alpha * temperature**2 * divergence)
    (gradient,) = torch.autograd.grad((found - (1 - alpha) * losses).sum(), student)
    torch.testing.assert_close(gradient, alpha * temperature * (q - p)), "the reason for the factor T^2"


def test_the_teacher_gets_the_images_of_the_student_augmented_and_mixed(teacher: Run, tmp_path: Path) -> None:
    """A student that is a copy of the teacher has a divergence of 0, if both get the same images."""
    augment = "augment={train=[{name='RandomAffine', degrees=30}], mixup=0.5}"
    copied = (f'model.weights="file:{teacher.best_weights}"', "data.channels=1", "optimizer.lr=1e-12", "train.epochs=1")
    recipe = load_recipe(write_recipe(tmp_path, TEACHER), (of(teacher, alpha=1.0), augment, *copied))
    run = fit(recipe, quiet=True)
    assert abs(run.epoch_records()[0]["train/loss"]) < 1e-6
    assert run.epoch_records()[0]["val/loss"] > 1e-2, "validation loss is the cross-entropy of the labels"


def test_a_teacher_with_another_normalization_and_order_of_classes_gets_its_own(teacher: Run) -> None:
    model = load_model(teacher.path)
    recipe = load_recipe(teacher.path / "recipe.toml", (of(teacher),))
    own = model.preprocessing
    ours = type(own).from_dict(own.to_dict() | {"mean": [0.1] * own.channels, "std": [0.3] * own.channels})
    order = [3, 1, 2, 0, 9, 8, 7, 6, 5, 4]
    classes = [model.classes[at] for at in order]
    found = build_teacher(recipe, Accelerator(cpu=True), classes, ours)
    assert found is not None
    pixels = torch.rand(6, own.channels, *own.image_size)

    def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    with torch.no_grad():
        expected = model.module(normalized(own.mean, own.std))[:, order]
    torch.testing.assert_close(found.logits(normalized(ours.mean, ours.std)), expected, rtol=1e-4, atol=1e-5)
    same = build_teacher(recipe, Accelerator(cpu=True), model.classes, own)
    assert same is not None
    assert (same.rescale, same.columns) == (None, None)


def test_teachers_with_other_classes_or_sizes_are_refused(teacher: Run) -> None:
    recipe, model = load_recipe(teacher.path / "recipe.toml", (of(teacher),)), load_model(teacher.path)
    accelerator, own = Accelerator(cpu=True), model.preprocessing
    with pytest.raises(UserError, match=r"the teacher lacks ten; only the teacher has 9$"):
        build_teacher(recipe, accelerator, [*model.classes[:9], "ten"], own)
    larger = type(own).from_dict(own.to_dict() | {"image_size": 16})
    with pytest.raises(UserError, match=r"trained with image size 8 x 8, but data\.image_size is 16 x 16 here"):
        build_teacher(recipe, accelerator, model.classes, larger)


def test_a_pretrained_model_is_a_teacher_if_its_last_layer_fits(teacher: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("test_resnet", num_classes=10).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    recipe, own = load_recipe(teacher.path / "recipe.toml"), load_model(teacher.path).preprocessing
    spec = PretrainedTeacher(source="timm", name="test_resnet", weights=f"file:{tmp_path / 'model.safetensors'}")
    recipe = recipe.model_copy(update={"distillation": DistillationConfig(teacher=spec)})
    ours = type(own).from_dict(own.to_dict() | {"channels": 3, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3})
    found = build_teacher(recipe, Accelerator(cpu=True), list("abcdefghij"), ours)
    assert found is not None
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.logits(images), model(images))
    with pytest.raises(UserError, match="are not for 7 classes"):
        build_teacher(recipe, Accelerator(cpu=True), list("abcdefg"), ours)


@pytest.mark.long
def test_an_interrupted_student_continues_bit_for_bit_and_needs_no_teacher_afterwards(
    teacher: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Run(shutil.copytree(teacher.path, tmp_path / "teacher"))
    before = own.best_weights.read_bytes()
    whole = distilled(tmp_path / "whole", STATEFUL, own)
    update, calls = TrainStep._update, [0]

    def end(step: TrainStep, number: int) -> None:
        calls[0] += 1
        if calls[0] == 6:
            assert step.teacher is not None
            assert all(p.grad is None and not p.requires_grad for p in step.teacher.module.parameters())
            assert not any(module.training for module in step.teacher.module.modules())
            raise InterruptedError
        update(step, number)

    monkeypatch.setattr(TrainStep, "_update", end)
    with pytest.raises(InterruptedError):
        distilled(tmp_path / "ended", STATEFUL, own)
    run = only_run(tmp_path / "ended")
    fit(run.recipe, resume=run.path, quiet=True)
    assert outcome(run) == outcome(whole)
    assert own.best_weights.read_bytes() == before
    content = load_checkpoint(find_latest(run.checkpoints, lambda line: None))
    assert content["model"].keys() == load_weights(run.best_weights).keys(), "the student alone"
    assert run.summary["teacher"] == content["teacher"]
    assert run.summary["teacher"]["recipe"] == "small"

    shutil.rmtree(own.path)
    assert toolkit("evaluate", run.path).status == 0
    assert shareable(run.recipe).distillation == DistillationConfig(teacher="./teacher")


def test_a_changed_teacher_is_refused_on_resuming(teacher: Run, tmp_path: Path) -> None:
    own = Run(shutil.copytree(teacher.path, tmp_path / "teacher"))
    recipe = load_recipe(write_recipe(tmp_path, STUDENT), (of(own), "train.epochs=2"))
    run = fit(recipe, until=1, quiet=True)
    state = load_weights(own.best_weights)
    (own.path / "summary.json").unlink()  # the weights of a finished run are compared with it
    own.best_weights.unlink()
    save_file({name: value + 1e-3 for name, value in state.items()}, own.best_weights)
    with pytest.raises(UserError, match="has changed since the checkpoint of"):
        fit(recipe, resume=run.path, quiet=True)
    before = {"teacher": {"teacher": "timm resnet50"}}
    resumption = Resumption(run, recipe, before, Accelerator(cpu=True), Console(is_main=True), False)
    with pytest.raises(UserError, match="has changed since the checkpoint of"):  # a pretrained model was the teacher
        resumption.compare_teacher({"teacher": str(own.path), "recipe": "small"})
    fit(recipe, resume=run.path, quiet=True, allow_changes=True)
    assert open_run(run.path).is_finished
    shutil.rmtree(own.path)
    with pytest.raises(UserError, match=r"distillation\.teacher: .* there is no such folder"):
        fit(recipe, quiet=True)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        pytest.param(
            ("augment.train=[{name='RandomAffine', degrees=30}]", "data.fixed_views=2", "train.epochs=3"),
            marks=pytest.mark.extended,
        ),
    ],
    ids=["no augmentation", "two versions of each image"],
)
def test_outputs_computed_once_are_those_of_each_batch(teacher: Run, settings: tuple[str, ...], tmp_path: Path) -> None:
    cached = distilled(tmp_path / "cached", STUDENT, teacher, *settings)
    each = distilled(tmp_path / "each", STUDENT, teacher, 'data.cache="off"', *settings)
    assert "cached: outputs of the teacher for all training images" in cached.log_file.read_text()
    assert "the teacher's outputs are computed for each batch: caching is off" in each.log_file.read_text()
    assert cached.metrics_file.read_bytes() == each.metrics_file.read_bytes()
    assert cached.best_weights.read_bytes() == each.best_weights.read_bytes()


@pytest.mark.extended
@pytest.mark.parametrize(
    "mode",
    [
        ('transfer.mode="linear_probe"',),
        (
            'transfer={mode="lp_ft", probe_epochs=1, probe_lr=0.05}',
            "augment.train=[{name='RandomAffine', degrees=30}]",
            "train.epochs=3",
        ),
    ],
    ids=["linear_probe", "lp_ft, whose probe has no augmentation"],
)
def test_a_student_with_a_frozen_backbone_is_trained_on_features_and_outputs_computed_once(
    teacher: Run, mode: tuple[str, ...], tmp_path: Path
) -> None:
    settings = (f'model.weights="file:{teacher.best_weights}"', "data.channels=1", *mode)
    cached = distilled(tmp_path / "cached", TEACHER, teacher, *settings)
    each = distilled(tmp_path / "each", TEACHER, teacher, 'data.cache="off"', *settings)
    assert "cached: outputs of the teacher for all training images" in cached.log_file.read_text()
    for found, expected in zip(cached.epoch_records(), each.epoch_records(), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.extended
def test_two_processes_train_the_same_student(teacher: Run, tmp_path: Path) -> None:
    alone = distilled(tmp_path / "alone", STUDENT, teacher, "augment.mixup=0.4")
    recipe = write_recipe(tmp_path / "two", STUDENT)
    settings = (of(teacher), "train.epochs=2", "augment.mixup=0.4")
    trainers = Trainers(2, tmp_path / "two", recipe, *(part for each in settings for part in ("--set", each)))
    assert trainers.wait() == [0, 0], trainers.text()
    for found, expected in zip(only_run(tmp_path / "two").epoch_records(), alone.epoch_records(), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
