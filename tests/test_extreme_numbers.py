"""Every numeric key of the recipe with extreme values gives a message or a run, no traceback and no endless loop.

Values are drawn with a seed; `pytest -m slow` tries all of them.
"""

from __future__ import annotations

import random
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from cli import toolkit
from pydantic import BaseModel

from toolkit.recipe.schema import Recipe
from toolkit.recipe.type_descriptions import unwrap_annotation

pytestmark = pytest.mark.long

RECIPE = """
[recipe]
name = "extreme"
run_root = "{root}"
[data]
dataset = "digits"
images_per_class = 3
test_images_per_class = 2
workers = 0
[model]
source = "toolkit"
[model.convnet]
blocks = [{{ channels = 4, batch_norm = true }}]
[optimizer]
name = "adamw"
lr = 0.01
[train]
epochs = 4
batch_size = 8
precision = "no"
[tracking]
trackers = []
"""
STUDY = """
[study]
grid.optimizer.momentum = [0.1, 0.2]
"""

WITH: dict[str, list[str]] = {
    "transfer.unfreeze_at.[]": [],
    "scheduler.step_size": ['scheduler.name="step"'],
    "scheduler.gamma": ['scheduler.name="step"', "scheduler.step_size=1"],
    "scheduler.min_lr": ['scheduler.name="cosine"'],
    "scheduler.power": ['scheduler.name="polynomial"'],
    "scheduler.milestones.[]": ['scheduler.name="multi_step"'],
    "scheduler.T_0": ['scheduler.name="cosine_restarts"', "scheduler.T_mult=2"],
    "scheduler.T_mult": ['scheduler.name="cosine_restarts"', "scheduler.T_0=1"],
    "scheduler.cycle_decay": ['scheduler.name="cosine_restarts"', "scheduler.T_0=1"],
    "scheduler.decay_fraction": ['scheduler.name="wsd"'],
    "scheduler.patience": ['scheduler.name="plateau"'],
    "scheduler.threshold": ['scheduler.name="plateau"'],
    "scheduler.pct_start": ['scheduler.name="one_cycle"'],
    "scheduler.start_factor": ['scheduler.name="one_cycle"'],
    "scheduler.end_factor": ['scheduler.name="one_cycle"'],
    "augment.mixup_prob": ["augment.mixup=0.2"],
    "augment.mixup_switch_prob": ["augment.mixup=0.2", "augment.cutmix=0.2"],
    "early_stopping.min_delta": ["early_stopping.patience=2"],
    "optimizer.momentum": ['optimizer.name="sgd"'],
    "model.convnet.init_std": ['model.convnet.init="gaussian"'],
}
"""Other settings that a key needs to have an effect."""

ONLY_READ = {"data.image_size", "data.resize", "data.workers", "model.convnet.blocks.[].kernel",
             "model.convnet.blocks.[].padding"}  # fmt: skip
"""Keys whose largest allowed values are for large machines, and take minutes on a small one."""

FLOATS = ("0.0", "-1.0", "1e-308", "1e-30", "0.9999999999", "1e30", "1e308", "-1e308", "nan", "inf", "1e999")
INTEGERS = ("0", "-1", "1", "65536", "1000000", "2147483648", "1000000000000", "9223372036854775807",
            "-9223372036854775808", "10000000000000000000000")  # fmt: skip


def numeric_keys(annotation: Any, path: tuple[str, ...] = ()) -> list[tuple[str, type]]:
    """Return the dotted names of all numbers in an annotation, with [] for list items and {} for table values."""
    annotation, _ = unwrap_annotation(annotation)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [key for member in typing.get_args(annotation) for key in numeric_keys(member, path)]
    if origin in (list, dict):
        return numeric_keys(typing.get_args(annotation)[-1], (*path, "[]" if origin is list else "{}"))
    if annotation in (int, float):
        return [(".".join(path), annotation)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return [key for name, field in fields for key in numeric_keys(field.annotation, (*path, name))]
    return []


KEYS = numeric_keys(Recipe)
OF_RUNS = [(key, kind) for key, kind in KEYS if not key.startswith("study.")]
OF_STUDIES = [(key, kind) for key, kind in KEYS if key.startswith("study.")]
ALL_OF_RUNS = [(key, value) for key, kind in OF_RUNS for value in (FLOATS if kind is float else INTEGERS)]


def overrides(key: str, value: str) -> list[str]:
    """Return ``--set`` arguments that give a key this value, with the other settings that it needs."""
    parts = key.split(".")
    if key.startswith("model.convnet.blocks"):
        more = {"kernel": "", "padding": ", kernel = 63"}.get(parts[-1], "")
        channels = "" if parts[-1] == "channels" else "channels = 4, "
        return [f"model.convnet.blocks = [{{ {channels}{parts[-1]} = {value}{more} }}]"]
    if parts[0] == "augment" and "[]" in parts:
        return [f'augment.{parts[1]} = [{{ name = "RandomHorizontalFlip", {parts[-1]} = {value} }}]']
    if key.startswith("data.normalize."):
        values = {"mean": "0.5", "std": "0.5", parts[2]: value}
        return [f"data.normalize = {{ mean = [{values['mean']}], std = [{values['std']}] }}"]
    if parts[0] == "expected_metrics":
        shown = f"[{value}]" if parts[-1] == "[]" else value
        bound = "" if parts[2] in ("at_least", "at_most", "value") else "at_least = 0.1, "
        return [f'expected_metrics.test_accuracy = {{ {bound}{parts[2]} = {shown}, source = "here" }}']
    if parts[-1] == "[]":
        pair = f"[{value}, {value}]" if key == "data.resize.[]" else f"[{value}]"
        return [f"{'.'.join(parts[:-1])} = {pair}"]
    return [*WITH.get(key, []), f"{key} = {value}"]


def try_load(folder: Path, key: str, value: str) -> None:
    """Check that a dry run with the value either trains a batch or prints a message that names the key."""
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(root=folder / "runs"))
    arguments = [part for one in overrides(key, value) for part in ("--set", one)]
    if key in ONLY_READ:
        arguments += ["--set", "recipe.name=1"]  # an error that stops it before training
    outcome = toolkit("train", path, "--dry-run", *arguments)
    assert outcome.status in (0, 1, 2), outcome.stderr
    assert "Traceback" not in outcome.stderr, outcome.stderr
    assert len(outcome.stderr.splitlines()[-1]) < 500, outcome.stderr
    if outcome.status == 0:
        assert "dry run: one batch forward and backward, loss " in outcome.stderr


def test_all_kinds_of_numeric_keys_are_found() -> None:
    names = [key for key, _ in KEYS]
    assert {"optimizer.lr", "model.head.hidden.[]", "data.split.validation", "augment.train.[].apply_p",
            "model.convnet.blocks.[].stride", "study.bohb.trials",
            "expected_metrics.{}.value"} <= set(names)  # fmt: skip
    assert len(names) > 85
    assert set(WITH) | ONLY_READ <= set(names)


@pytest.mark.parametrize(("key", "value"), random.Random(20261128).sample(ALL_OF_RUNS, 24))
def test_an_extreme_value_gives_one_message_or_trains(tmp_path: Path, key: str, value: str) -> None:
    try_load(tmp_path, key, value)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), ALL_OF_RUNS)
def test_any_extreme_value_gives_one_message_or_trains(tmp_path: Path, key: str, value: str) -> None:
    try_load(tmp_path, key, value)


def study_text(parts: list[str], value: str) -> str:
    """Return a [study] table in which the key has the value."""
    if parts[0] in ("random", "bohb"):
        name, least = ("runs", 2) if parts[0] == "random" else ("trials", 3)
        needed = "" if parts[1] == name else f"{name} = {least}, "
        space = "[study]\nspace.optimizer.lr = { uniform = [0.1, 0.2] }\n"
        return f"{space}{parts[0]} = {{ {needed}{parts[1]} = {value} }}\n"
    if parts[0] == "rows":
        inner = f"{{ val_loss = {value} }}" if parts[2] == "published" else f'{{ "val/loss" = [{value}] }}'
        return f'[[study.rows]]\nname = "a"\n{parts[2]} = {inner}\n'
    if parts[0] == "published":
        return f"{STUDY}[[study.published]]\nmetrics = {{ val_loss = {value} }}\n"
    shown = f"[{value}]" if parts[-1] == "[]" else value
    return f"{STUDY}{'.'.join(part for part in parts if part != '[]')} = {shown}\n"


@pytest.mark.parametrize(
    ("key", "kind"),
    [pytest.param(*one, marks=pytest.mark.extended if at % 3 else ()) for at, one in enumerate(OF_STUDIES)],
)
def test_studies_with_extreme_numbers_are_read_or_refused_at_once(tmp_path: Path, key: str, kind: type) -> None:
    path = tmp_path / "study.toml"
    statuses = []
    for value in FLOATS if kind is float else INTEGERS:
        path.write_text(RECIPE.format(root=tmp_path / "runs") + study_text(key.split(".")[1:], value))
        outcome = toolkit("validate", path)
        assert outcome.status in (0, 2), outcome.stderr
        statuses.append(outcome.status)
    assert 2 in statuses, "no key accepts all of these"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lr=1e308", "optimizer.lr: expected a number > 0 and <= 1e+30, found 1e+308"),
        ("optimizer.weight_decay=1e308", "optimizer.weight_decay: expected a number from 0 to 1000000.0, found 1e+308"),
        ("model.head.hidden=[1000000000000]",
         "model.head.hidden[0]: expected a whole number from 1 to 65536, found 1000000000000"),
        ("model.convnet.blocks=[{channels=4, stride=1000000000}]",
         "model.convnet.blocks[0].stride: expected a whole number from 1 to 4096, found 1000000000"),
        ("model.convnet.blocks=[{channels=4, padding=1000000000}]",
         "model.convnet.blocks[0].padding: expected a whole number from 0 to 63, found 1000000000"),
        ("model.convnet.blocks=[{channels=4, kernel=3, padding=9}]",
         "padding = 9 is more than kernel = 3: the border would be all zero"),
        ("model.head.hidden=[65536, 65536, 65536]", "of memory are free: make it smaller"),
    ],
)  # fmt: skip
def test_the_message_states_the_allowed_range(tmp_path: Path, setting: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(root=tmp_path / "runs"))
    outcome = toolkit("train", path, "--dry-run", "--set", setting)
    assert outcome.status == 2
    assert message in outcome.stderr, outcome.stderr


def test_the_largest_allowed_learning_rates_can_take_a_step(tmp_path: Path) -> None:
    """Allowed values stay within the range of float32, also if they are multiplied."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(root=tmp_path / "runs"))
    for name in ("sgd", "adam", "adamw"):
        settings = [f'optimizer.name="{name}"', "optimizer.lr=1e30", "optimizer.weight_decay=1e6"]
        outcome = toolkit("train", path, "--dry-run", *(part for one in settings for part in ("--set", one)))
        assert outcome.status == 0, outcome.stderr
    settings = [
        'optimizer.name="adam"',
        "optimizer.lr=1e30",
        "transfer.head_lr=1e6",
        "optimizer.args={betas=[0.999999, 0.9]}",
    ]
    outcome = toolkit("train", path, "--dry-run", *(part for one in settings for part in ("--set", one)))
    assert outcome.status in (0, 1)
    if outcome.status:
        assert outcome.stderr.splitlines()[-1].startswith("the optimizer cannot take a step:")
