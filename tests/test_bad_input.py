"""Bad input gives one clear message that says what to do, and exit status 2, before training; no files remain."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import toolkit
from PIL import Image
from trainers import Trainers

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.toml"


def refused(tmp_path: Path, *settings: str, recipe: Path = QUICKSTART) -> str:
    """Return the message with which training refuses; nothing may have been written."""
    runs = tmp_path / "runs"
    arguments = [part for setting in settings for part in ("--set", setting)]
    outcome = toolkit("train", recipe, "--set", f"recipe.run_root={json.dumps(str(runs))}", *arguments)
    assert outcome.status == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert not runs.exists(), "a refused run leaves nothing behind"
    return outcome.stderr


def folder_of_images(root: Path, classes: dict[str, int]) -> Path:
    """Write a folder with the given number of small random images per class."""
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, recipe=tmp_path / "none.toml")
    assert "none.toml" in message


def test_training_without_a_recipe_is_refused() -> None:
    outcome = toolkit("train")
    assert outcome.status == 2
    assert "no recipe given" in outcome.stderr


def test_a_toml_syntax_error_is_reported_with_its_position(tmp_path: Path) -> None:
    recipe = tmp_path / "broken.toml"
    recipe.write_text('[recipe]\nname = "x"\nseed = = 3\n')
    assert f"{recipe}:3:8" in refused(tmp_path, recipe=recipe)


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("trainn.epochs=3", ["trainn", "train"]),
        ("train.epoch=3", ["epoch", "epochs"]),
        ('model={ source = "torchvision", name = "resnet05" }', ["resnet05", "resnet50"]),
        ('model={ source = "timm", name = "vit_smal_patch16_224" }', ["vit_smal_patch16_224", "vit_small_patch16_224"]),
        ('data.dataset="caltech_101"', ["caltech_101", "caltech101"]),
        ('augment.train=[{ name = "RandomHorizontlFlip" }]', ["RandomHorizontlFlip", "RandomHorizontalFlip"]),
        ('optimizer.name="adamww"', ["adamww", "adamw"]),
        ('train.epochs="ten"', ["train.epochs", "a number > 0"]),
        ('augment.train=[{ name = "RandomRotation", degree = 10 }]', ["degree", "degrees"]),
        ('augment.train=[{ name = "RandomRotation" }]', ["degrees"]),
        ('model={ source = "torchvision", name = "resnet50", weights = "IMAGENET1K_V3" }', ["IMAGENET1K_V2"]),
    ],
)
def test_a_misspelled_or_missing_value_is_refused_with_the_correct_one(
    tmp_path: Path, setting: str, parts: list[str]
) -> None:
    message = refused(tmp_path, setting)
    for part in parts:
        assert part in message


def test_a_missing_data_root_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, 'data.dataset="imagefolder"', f"data.root={json.dumps(str(tmp_path / 'no'))}")
    assert str(tmp_path / "no") in message
    assert "data.root" in message


def test_missing_caltech_data_are_refused_with_their_source(tmp_path: Path) -> None:
    message = refused(
        tmp_path, 'data.dataset="caltech101"', "data.image_size=64", f"data.root={json.dumps(str(tmp_path))}"
    )
    assert "10.22002/D1.20086" in message


def test_missing_data_are_refused_if_downloads_are_off(tmp_path: Path) -> None:
    root = f"data.root={json.dumps(str(tmp_path / 'cifar'))}"
    message = refused(tmp_path, 'data.dataset="cifar10"', "data.download=false", root)
    assert "data.download" in message


def test_a_class_without_training_images_is_refused(tmp_path: Path) -> None:
    data = folder_of_images(tmp_path / "data", {"cat": 10, "dog": 10, "one": 1})
    message = refused(tmp_path, 'data.dataset="imagefolder"', f"data.root={json.dumps(str(data))}",
                      "data.image_size=16", "data.split.validation=0.5", 'data.split.method="random"',
                      "data.split.seed=1", "data.split.test=0.4")  # fmt: skip
    assert "one" in message
    assert "training image" in message


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    assert "fp16" in refused(tmp_path, 'train.precision="fp16"')


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    message = refused(tmp_path, f'model={{ source = "timm", name = "resnet18", weights = "file:{missing}" }}',
                      'transfer.mode="finetune"')  # fmt: skip
    assert "none.safetensors" in message


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(3, 3)}, weights)
    message = refused(tmp_path, f'model={{ source = "timm", name = "resnet18", weights = "file:{weights}" }}',
                      'transfer.mode="finetune"')  # fmt: skip
    assert "another architecture" in message


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(self.mark), "w"))


def test_weights_that_carry_code_are_refused_and_do_not_run(tmp_path: Path) -> None:
    weights, mark = tmp_path / "evil.pth", tmp_path / "ran"
    weights.write_bytes(pickle.dumps({"state_dict": Bomb(mark)}))
    refused(tmp_path, f'model={{ source = "timm", name = "resnet18", weights = "file:{weights}" }}',
            'transfer.mode="finetune"')  # fmt: skip
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_a_file_that_is_not_an_image_is_named_before_the_first_epoch(tmp_path: Path, content: bytes | None) -> None:
    data = folder_of_images(tmp_path / "data", {"cat": 10, "dog": 10})
    bad = data / "cat" / "004.png"
    bad.write_bytes(bad.read_bytes()[:200] if content is None else content)
    message = refused(tmp_path, 'data.dataset="imagefolder"', f"data.root={json.dumps(str(data))}",
                      "data.image_size=16", "train.batch_size=4", "data.split.validation=0.2")  # fmt: skip
    assert "004.png" in message
    assert "on_bad_image" in message


def test_a_batch_that_cannot_be_divided_among_the_processes_is_refused(tmp_path: Path) -> None:
    settings = ["--set", "train.batch_size=30", "--set", "train.grad_accum_steps=2"]
    settings += ["--set", f"recipe.run_root={json.dumps(str(tmp_path / 'runs'))}"]
    trainers = Trainers(2, tmp_path, QUICKSTART, *settings)
    assert trainers.wait() == [2, 2]
    message = trainers.text()
    assert "28 or 32" in message
    assert message.count("cannot be divided evenly") == 1, "one process reports it for both"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("variable", "value", "parts"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", ["bf16", "train.precision", "'no'"]),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", ["_accumulation_steps = 4", "train.grad_accum_steps = 1"]),
        ("ACCELERATE_USE_FSDP", "true", ["FSDP"]),
    ],
)
def test_launcher_variables_that_contradict_the_recipe_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, parts: list[str]
) -> None:
    monkeypatch.setenv(variable, value)
    message = refused(tmp_path, 'train.precision="no"')
    for part in parts:
        assert part in message


def test_resuming_a_folder_that_is_not_a_run_directory_is_refused(tmp_path: Path) -> None:
    outcome = toolkit("train", QUICKSTART, "--resume", tmp_path)
    assert outcome.status == 2
    assert "is not a run directory" in outcome.stderr


def test_a_run_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    root = f"recipe.run_root={json.dumps(str(tmp_path / 'file'))}"
    outcome = toolkit("train", QUICKSTART, "--set", root)
    assert outcome.status == 2
    assert "recipe.run_root" in outcome.stderr
