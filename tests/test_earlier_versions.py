"""Files of earlier versions are read with current names; a recipe with an old key is refused with the new name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.recipe import RecipeError, loads_recipe, resolved_toml
from toolkit.recipe.earlier_versions import RENAMED, renamed_metric, update_study
from toolkit.recipe.resolve import content_hash, resolved_content
from toolkit.runs import Run

RECIPE = """
[recipe]
name = "example"
[data]
dataset = "imagefolder"
fixed_views = 3
[augment]
run_on = "workers"
mixup_prob = 0.7
mixup_switch_prob = 0.3
train = [{ name = "RandomRotation", degrees = 9, stage = "before_crop" }]
mixup = 0.2
cutmix = 1.0
[model]
source = "torchvision"
name = "vgg11_bn"
weights = "IMAGENET1K_V1"
head = { hidden = [64], scope = "classifier", bias = true }
[transfer]
mode = "backbone_only"
[optimizer]
lr = 0.1
[scheduler]
name = "one_cycle"
pct_start = 0.2
warmup_start_factor = 0.1
[train]
epochs = 5
batch_size = 64
grad_accum_steps = 2
max_grad_norm = 1.0
best_metric = "val/balanced_accuracy"
[expected_metrics]
last_test_balanced_accuracy = { at_least = 0.9, source = "a report" }
"""


OF_A_RUN = {path: new for path, new in RENAMED.items() if path[0] != "study"}


def with_old_names(text: str) -> str:
    for path, new in OF_A_RUN.items():
        old = path[-1]
        text = text.replace(f"[{new}", f"[{old}") if len(path) == 1 else text.replace(f"{new} =", f"{old} =")
    for new, old in (("backbone_only", "frozen_classifier"), ("last_test_", "stopped_test_"), ("balanced_", "class_")):
        text = text.replace(new, old)
    return text


def test_a_resolved_recipe_of_an_earlier_version_is_read_with_current_names() -> None:
    recipe = loads_recipe(RECIPE, ['data.exif="ignore"', "data.value_range=[0, 65535]"])
    old = with_old_names(resolved_toml(recipe))
    used = [path[-1] for path in OF_A_RUN if path[1:2] not in (("validation",), ("test",))]
    assert not [key for key in used if f"{key} =" not in old and f"[{key}" not in old]
    assert not [new for new in OF_A_RUN.values() if f"\n{new} =" in old]
    assert loads_recipe(old) == recipe


def test_the_hash_of_a_recipe_does_not_depend_on_expected_metrics_under_their_old_name() -> None:
    content = resolved_content(loads_recipe(RECIPE))
    without = {key: value for key, value in content.items() if key != "expected_metrics"}
    assert content_hash({**without, "expect": content["expected_metrics"]}) == content_hash(content)


def test_a_recipe_with_old_keys_is_refused_with_the_new_names() -> None:
    with pytest.raises(RecipeError) as caught:
        loads_recipe(with_old_names(RECIPE))
    message = str(caught.value)
    for path, new in OF_A_RUN.items():
        if path[1:2] not in (("validation",), ("test",)):
            where = "augment.train[0]" if path[1:2] == ("train",) else ".".join(path[:-1])
            assert f"renamed to {where + '.' if where else ''}{new}" in message
    assert 'renamed to "backbone_only"' in message
    with pytest.raises(RecipeError, match='renamed to "val/balanced_accuracy"'):
        loads_recipe(RECIPE, ['train.best_metric="val/class_accuracy"'])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stopped_test_class_accuracy", "last_test_balanced_accuracy"),
        ("val/class_accuracy", "val/balanced_accuracy"),
        ("stopped", "last"),
        ("stopped_early", "stopped_early"),
        ("test_accuracy", "test_accuracy"),
    ],
)
def test_old_metric_names_are_translated(old: str, new: str) -> None:
    assert renamed_metric(old) == new
    assert renamed_metric(new) == new


def test_summary_and_metrics_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    models: dict[str, Any] = {"best": {"epoch": 1, "test_class_accuracy": 0.5}, "stopped": {"epoch": 2}}
    (tmp_path / "summary.json").write_text(json.dumps({**models, "stopped_early": True, "shortcuts": ["features"]}))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "train/loss": 1.0, "val/class_accuracy": 0.25}\n')
    run = Run(tmp_path)
    assert run.summary["last"] == {"epoch": 2}
    assert run.summary["best"]["test_balanced_accuracy"] == 0.5
    assert run.summary["stopped_early"]
    assert run.summary["cached"] == ["features"]
    assert "shortcuts" not in run.summary
    assert run.epoch_records() == [{"epoch": 1, "train/loss": 1.0, "val/balanced_accuracy": 0.25}]


def test_columns_and_published_metrics_of_an_earlier_study_are_read() -> None:
    output = {"columns": ["stopped_val_accuracy", "epochs"], "best_by": "val/accuracy"}
    published = [{"where": {}, "figures": {"stopped_val_accuracy": 0.5}}]
    study = update_study({"study": {"output": output, "published": published}})["study"]
    assert study["output"]["columns"] == ["last_val_accuracy", "epochs"]
    assert study["published"] == [{"where": {}, "metrics": {"last_val_accuracy": 0.5}}]


def test_the_old_key_of_published_metrics_is_refused_with_the_new_one() -> None:
    with pytest.raises(RecipeError, match=r"renamed to study\.published\[0\]\.metrics\n1 error in the recipe"):
        loads_recipe(RECIPE, ["study.published=[{ figures = {} }]"])
