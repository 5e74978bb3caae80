"""Runs with plugins: results equal those of built-in names; kills, resuming and commands work as for any other run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from plugin_modules import TRAINING, WriteModule, write_module
from torch import nn
from trainers import Trainers, at_call, kill_self, only_run, outcome, uninterrupted, write_recipe

from toolkit import fit, load_model, open_run, plugins
from toolkit.errors import UserError
from toolkit.models.build import build_model
from toolkit.models.transfer import apply_transfer
from toolkit.recipe import Recipe, RecipeError, loads_recipe
from toolkit.recipe.schema import ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig, TransferConfig
from toolkit.runs import Run
from toolkit.training.losses import check_loss, plugin_loss, training_loss
from toolkit.training.lr_schedule import check_schedule, learning_rate
from toolkit.training.model_checks import check_gradients
from toolkit.training.optimizer import build_optimizer
from toolkit.training.train_step import TrainStep

__all__ = ["write_module"]

RECIPE = """
[recipe]
name = "small"
run_root = "{root}"

[data]
dataset = "digits"
images_per_class = 6
test_images_per_class = 3
image_size = 32
channels = 3
workers = 0

[augment]
mixup = 0.3
label_smoothing = 0.1

[model]
source = "timm"
name = "test_resnet"

[optimizer]
name = "sgd"
lr = 0.05
momentum = 0.9
weight_decay = 1e-3

[scheduler]
name = "cosine"
warmup_epochs = 0.5

[train]
epochs = 2
batch_size = 16
class_weights = "balanced"
precision = "no"

[tracking]
trackers = []
"""
BUILT_IN = """
[model]
source = "timm"
name = "test_resnet"

[scheduler]
name = "cosine"
warmup_epochs = 1.0
"""
PLUGINS = {
    "model": ('model.source="plugin"', 'model.name="net"'),
    "optimizer": ('optimizer.name="plugin:own_sgd"',),
    "loss": ('train.loss="plugin:own_ce"',),
    "schedule": ('scheduler.name="plugin:own_cosine"',),
}


def small(folder: Path, *settings: str) -> Recipe:
    return loads_recipe(RECIPE.format(root=folder / "runs"), settings)


def results(run: Run) -> tuple[bytes, bytes]:
    return run.metrics_file.read_bytes(), run.best_weights.read_bytes()


def own_resnet(num_classes: int) -> nn.Module:
    return torchvision.models.resnet18(num_classes=num_classes)


def one_layer(num_classes: int, channels: int, image_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, num_classes))


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Return the results of the recipe without plugins."""
    return results(fit(small(tmp_path_factory.mktemp("built-in")), quiet=True))


@pytest.mark.parametrize("kind", PLUGINS)
def test_a_plugin_that_equals_a_built_in_name_gives_the_same_bytes(
    kind: str, built_in: tuple[bytes, bytes], write_module: WriteModule, tmp_path: Path
) -> None:
    write_module(TRAINING)
    plugins.use_modules(["own"])
    run = fit(small(tmp_path, *PLUGINS[kind]), quiet=True)
    assert results(run) == built_in
    assert [(found["kind"], found["loaded_with"]) for found in run.environment["plugins"]] == [(kind, "own")]
    assert run.summary["not_exact"] == []


@pytest.mark.long
def test_torchvision_s_resnet18_as_a_plugin_equals_source_torchvision(tmp_path: Path) -> None:
    shape = ("train.epochs=1", "data.images_per_class=3")
    settings = ('model.source="torchvision"', 'model.name="resnet18"', *shape)
    expected = results(fit(small(tmp_path / "named", *settings), quiet=True))
    run = fit(small(tmp_path / "given", *shape), model=own_resnet, quiet=True)
    assert results(run) == expected
    assert (run.recipe.model.source, run.recipe.model.name) == ("plugin", "own_resnet")


@pytest.mark.extended
@pytest.mark.long
def test_two_processes_killed_and_resumed_give_the_bytes_of_built_in_names(
    write_module: WriteModule, tmp_path: Path
) -> None:
    module = write_module(TRAINING)
    named = tuple(part for sets in PLUGINS.values() for part in sets)
    settings = [*(word for name in named for word in ("--set", name)), "--plugin", str(module)]
    recipe = write_recipe(tmp_path, BUILT_IN)

    def kill_in_second_epoch(rank: int) -> None:
        if rank == 1:
            at_call(TrainStep, "_update", 10, kill_self)

    trainers = Trainers(2, tmp_path, recipe, *settings, prepare=kill_in_second_epoch)
    assert trainers.wait() != [0, 0]
    resumed = Trainers(2, tmp_path, recipe, *settings, "--resume", "auto")
    assert resumed.wait() == [0, 0], resumed.text()
    assert "resuming after epoch" in resumed.text()
    found, expected = outcome(only_run(tmp_path)), uninterrupted(2, BUILT_IN)
    assert found == expected


@pytest.mark.long
def test_a_run_is_not_resumed_after_its_plugin_has_changed(write_module: WriteModule, tmp_path: Path) -> None:
    module = write_module(TRAINING)
    plugins.use_modules(["own"])
    recipe = small(tmp_path, *PLUGINS["model"], "train.epochs=3")
    run = fit(recipe, until=1, quiet=True)
    module.write_text(module.read_text() + "# changed\n")
    record = plugins.find("model", "net").record
    del plugins.find("model", "net").__dict__["record"]  # as in a new process
    with pytest.raises(UserError, match=r"the file of a plugin has changed .* \(net in own.py\)"):
        fit(recipe, resume=run.path, quiet=True)
    assert fit(recipe, resume=run.path, allow_changes=True, until=2, quiet=True).path == run.path
    assert plugins.find("model", "net").record["sha256"] != record["sha256"]
    fit(recipe, resume=run.path, quiet=True)  # the change was accepted


def test_features_of_a_frozen_plugin_are_cached_for_its_file(
    write_module: WriteModule, tmp_path: Path, own_cache: Path
) -> None:
    module = write_module(TRAINING)
    plugins.use_modules(["own"])
    first = fit(small(tmp_path, *PLUGINS["model"], "train.epochs=1"), quiet=True)
    frozen = (f'model.weights="file:{first.best_weights}"', 'transfer.mode="linear_probe"', "augment.mixup=0.0")
    recipe = small(tmp_path, *PLUGINS["model"], *frozen)

    def entries() -> set[str]:
        return {path.name for path in own_cache.glob("features-*") if path.is_dir()}

    expected = results(fit(recipe, quiet=True))
    cached = entries()
    assert len(cached) == 3, "train, validation, test"
    assert results(fit(recipe, quiet=True)) == expected
    assert entries() == cached
    module.write_text(module.read_text() + "# changed\n")
    del plugins.find("model", "net").__dict__["record"]  # as in a new process
    assert results(fit(recipe, quiet=True)) == expected
    assert len(entries() - cached) == 3, "the file is part of the key, because the forward pass may have changed"


# -- objects given to fit ---------------------------------------------------------------------------------------------


def test_fit_takes_a_path_and_keeps_the_arguments_of_an_object_that_the_recipe_names(
    write_module: WriteModule, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.toml"
    text = RECIPE.format(root=tmp_path / "runs").replace("class_weights", "#").replace("label_smoothing", "#")
    text = text.replace(
        'source = "timm"\nname = "test_resnet"', 'source = "plugin"\nname = "wide"\nargs = { width = 5 }'
    )
    path.write_text(text)

    def wide(num_classes: int, channels: int, width: int = 3) -> nn.Module:
        layers = nn.Conv2d(channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
        return nn.Sequential(*layers)

    def mean_square() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if targets.dim() == 1:
                targets = nn.functional.one_hot(targets, logits.shape[1])
            return (logits - targets).square().mean(1)

        return loss

    run = fit(path, model=wide, loss=mean_square, quiet=True)
    assert load_model(run.path).module[0].out_channels == 5  # type: ignore[index]
    plugins._registered.clear()
    assert open_run(run.path, model=wide).evaluate() == open_run(run.path).evaluate()
    assert run.recipe.train.loss == "plugin:mean_square"
    names = [found["name"] for found in run.environment["plugins"]]
    assert names == ["wide", "mean_square"]


def test_a_module_is_copied_and_keeps_its_weights(write_module: WriteModule, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    before = network[1].weight.detach().clone()
    run = fit(small(tmp_path, "train.epochs=1"), model=network, quiet=True)
    assert torch.equal(network[1].weight, before)
    assert run.recipe.model.name == "Sequential"
    assert load_model(run.path, model=network).classes == list("0123456789")


def test_objects_that_contradict_the_recipe_are_refused_before_training(
    write_module: WriteModule, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="the loss mean_loss has no argument class_weights"):
        fit(small(tmp_path), loss=lambda_named("mean_loss"), quiet=True)
    with pytest.raises(UserError, match="give a function or class with a name"):
        fit(small(tmp_path), loss=lambda: None, quiet=True)
    with pytest.raises(RecipeError, match='source "plugin" has no pretrained weights'):
        fit(small(tmp_path, 'model.weights="DEFAULT"'), model=own_resnet, quiet=True)
    for given, message in (
        ({"model": "resnet18"}, r"fit\(model='resnet18'\): give a function or class"),
        ({"metrics": own_resnet}, r"fit\(metrics=.*\): give a list"),
        ({"callbacks": own_resnet}, r"fit\(callbacks=.*\): give a list"),
    ):
        with pytest.raises(UserError, match=message):
            fit(small(tmp_path), quiet=True, **given)  # type: ignore[arg-type]
    assert not (tmp_path / "runs").exists()


def lambda_named(name: str) -> Callable[[], Any]:
    def factory() -> None: ...

    factory.__name__ = name
    return factory


def test_data_sets_transforms_and_metrics_can_be_given(write_module: WriteModule, tmp_path: Path) -> None:
    class Squares:
        """Dark and bright images."""

        classes = ("dark", "bright")

        def __init__(self, count: int = 40) -> None:
            self.targets = [i % 2 for i in range(count)]

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return torch.full((3, 8, 8), 50 + 150 * (i % 2) + i // 2, dtype=torch.uint8), i % 2

    def hit_rate() -> Callable[..., float]:
        return lambda labels, probabilities: float((probabilities.argmax(1) == labels).mean())

    settings = ('train.class_weights="none"', "data.images_per_class=15", "augment.mixup=0.0", "train.epochs=1")
    flip = torchvision.transforms.v2.RandomVerticalFlip()
    run = fit(small(tmp_path, *settings), dataset=Squares, transforms=[flip], metrics=[hit_rate], quiet=True)
    assert run.summary["best"]["test_hit_rate"] == run.summary["best"]["test_accuracy"]
    assert (run.recipe.data.dataset, run.recipe.data.name) == ("plugin", "Squares")
    assert [entry.name for entry in run.recipe.augment.train] == ["plugin:RandomVerticalFlip"]
    assert [found["kind"] for found in run.environment["plugins"]] == ["dataset", "transform", "metric"]


# -- what factories return --------------------------------------------------------------------------------------------


class RandomInEvaluation(nn.Sequential):
    """Dropout as a function, whose argument ``training`` was forgotten."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(images))


def register(kind: str, factory: Callable[..., Any]) -> str:
    plugins.add(plugins.Plugin(kind, "own", factory), replace=True)
    return "own"


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: nn.Linear(2, 2).weight, "the model own must be a torch.nn.Module, not Parameter"),
        (lambda: 1 / 0, "the model 'own' failed: ZeroDivisionError: division by zero"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), "has no last layer with 5 outputs"),
        (lambda: nn.Sequential(nn.Linear(192, 5)), "the model own fails for a batch of 3 x 8 x 8 images, float32"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Unflatten(1, (5, 1))),
            "own does not return 5 logits per image",
        ),
        (
            RandomInEvaluation,
            "draws random numbers in evaluation mode (aten.bernoulli_.float), but there its logits must be a",
        ),
    ],
)
def test_faulty_models_are_refused(write_module: WriteModule, factory: Callable[..., Any], message: str) -> None:
    table = ModelConfig(source="plugin", name=register("model", factory))
    with pytest.raises(UserError, match=re.escape(message)):
        build_model(table, 5, 3, 8)


def test_the_last_layer_is_the_last_one_used_or_what_get_classifier_returns(write_module: WriteModule) -> None:
    class Odd(nn.Module):
        """The layers are used in another order than they are registered; both have 5 outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(5, 5)
            self.first = nn.Linear(192, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.last(self.first(images.flatten(1)))
            return found

    class Stated(Odd):
        def get_classifier(self) -> nn.Module:
            return self.first

    for cls, expected in ((Odd, ("last",)), (Stated, ("first",))):
        assert build_model(ModelConfig(source="plugin", name=register("model", cls)), 5, 3, 8).heads == expected


def test_dropout_layers_are_keyed_and_other_randomness_is_reported(write_module: WriteModule, tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(3 * 32 * 32, num_classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            values = images.flatten(1)
            if self.training:
                values = values + 0.01 * torch.randn_like(values)
            found: torch.Tensor = self.head(values)
            return found

    run = fit(small(tmp_path, "train.epochs=1"), model=Noisy, quiet=True)
    (sentence,) = run.summary["not_exact"]
    assert "draws random numbers that are not keyed by example: aten.randn_like" in sentence
    assert "warning: Noisy draws random numbers" in run.log_file.read_text()


class Unused(nn.Module):
    """Its forward does not use ``aux`` at all, and cuts off the gradient of ``scale``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)
        self.aux = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(images.flatten(1)) * self.scale.detach()
        return found


def test_parameters_without_a_gradient_are_named_before_training(write_module: WriteModule, tmp_path: Path) -> None:
    run = fit(small(tmp_path, "train.epochs=1"), model=Unused, quiet=True)
    text = (
        "parameters of Unused that are to be trained cannot be, because the logits do not depend on them: scale, aux.*"
    )
    assert f"warning: 3 {text}. On several processes" in run.log_file.read_text()

    def check(processes: int, **settings: Any) -> list[str]:
        """Return the lines that are logged."""
        built = build_model(run.recipe.model, 10, 3, 32)
        logged: list[str] = []
        transfer = apply_transfer(built, TransferConfig(**settings))
        check_gradients(transfer, "Unused", 3, (32, 32), processes, logged.append)
        return logged

    with pytest.raises(UserError, match=re.escape(text)) as caught:
        check(2)
    assert 'freeze them, transfer.freeze = ["scale", "aux.*"], or remove them from the model' in str(caught.value)
    assert check(2, freeze=["scale", "aux.*"]) == []
    assert check(2, mode="linear_probe") == []
    with pytest.raises(UserError, match=r"2 parameters of Unused .*: aux"):
        check(2, mode="gradual", unfreeze_at=[5], freeze=["scale"])


def test_logits_that_depend_on_the_batch_are_said_in_log_and_summary(write_module: WriteModule, tmp_path: Path) -> None:
    class Centered(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(3 * 32 * 32, num_classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head((images - images.mean(0)).flatten(1))
            return found

    class Squeezed(Centered):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(images.squeeze().flatten(1))
            return found

    run = fit(small(tmp_path, "train.epochs=1"), model=Centered, quiet=True)
    (sentence,) = run.summary["not_exact"]
    assert "the logits of Centered for an image depend on the other images of its batch" in sentence
    assert f"warning: {sentence}" in run.log_file.read_text()
    with pytest.raises(UserError, match="Squeezed fails in evaluation for a batch of one image"):
        fit(small(tmp_path), model=Squeezed, quiet=True)


def losses(function: Callable[..., torch.Tensor]) -> str | None:
    table = TrainConfig(epochs=1, batch_size=8, loss=f"plugin:{register('loss', lambda: function)}")
    loss = plugin_loss(table, 0.0, None, 4, torch.device("cpu"))
    return check_loss(loss, table.loss, 4, torch.device("cpu"), multi_label=False, mixed=True)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def test_losses_are_tried_before_training(write_module: WriteModule) -> None:
    assert losses(cross_entropy) is None
    found = losses(lambda logits, targets: cross_entropy(logits - logits.mean(0), targets))
    assert found is not None
    assert "depends on the other images of its batch" in found
    for function, message in (
        (
            nn.CrossEntropyLoss(),
            r"must return one value per example, \[n\], not shape \[\] for n = 4; .* reduction='none'",
        ),
        (lambda logits, targets: 3.0, "not float for n = 4"),
        (lambda logits, targets: logits.argmax(1).float(), "has no gradient"),
        (lambda logits, targets: cross_entropy(logits, targets) / 0, "is not finite for ordinary logits"),
        (lambda logits, targets: cross_entropy(logits, targets[:, 0]), "failed for logits .* and class indices"),
        (lambda logits, targets: logits.gather(1, targets[:, None])[:, 0], "and probabilities .*: "),
    ):
        with pytest.raises(UserError, match=message):
            losses(function)


def test_a_loss_of_several_labels_gets_them_as_numbers(write_module: WriteModule) -> None:
    def mean_over_labels(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)

    cpu = torch.device("cpu")
    table = TrainConfig(epochs=1, batch_size=8, loss=f"plugin:{register('loss', lambda: mean_over_labels)}")
    loss = plugin_loss(table, 0.0, None, 4, cpu)
    assert check_loss(loss, table.loss, 4, cpu, multi_label=True, mixed=False) is None
    built_in = training_loss(TrainConfig(epochs=1, batch_size=8, loss="bce"), 0.0, None, multi_label=True)
    logits, labels = torch.randn(3, 4), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.uint8)
    assert torch.allclose(loss(logits, labels), built_in(logits, labels))


def test_a_loss_with_parameters_is_refused(write_module: WriteModule) -> None:
    table = TrainConfig(epochs=1, batch_size=8, loss=f"plugin:{register('loss', lambda: nn.Linear(2, 2))}")
    with pytest.raises(UserError, match="has parameters, which would not be trained"):
        plugin_loss(table, 0.0, None, 4, torch.device("cpu"))


def test_an_inexact_loss_is_said_in_log_and_summary(write_module: WriteModule, tmp_path: Path) -> None:
    def centered() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return lambda logits, targets: cross_entropy(logits - logits.mean(0), targets)

    settings = ('train.class_weights="none"', "augment.label_smoothing=0.0", "train.epochs=1")
    run = fit(small(tmp_path, *settings), loss=centered, quiet=True)
    (sentence,) = run.summary["not_exact"]
    assert f"warning: {sentence}" in run.log_file.read_text()


class Listed:
    """Not an optimizer."""


def test_optimizers_must_keep_their_parameter_groups(write_module: WriteModule) -> None:
    def joined(params: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in params for p in group["params"]], lr=lr)

    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1, "lr_scale": s, "weight_decay": 0.0} for s in (1, 2)]
    for factory, message in (
        (joined, "changes its parameter groups"),
        (Listed, "must be a torch.optim.Optimizer, not Listed"),
    ):
        table = OptimizerConfig(name=f"plugin:{register('optimizer', factory)}", lr=0.1)
        with pytest.raises(UserError, match=message):
            build_optimizer(table, groups)


def test_schedules_must_be_functions_of_the_epoch_alone(write_module: WriteModule) -> None:
    calls: list[float] = []

    def counting(epoch: float) -> float:
        calls.append(epoch)
        return 1 / len(calls)

    for function, message in (
        (counting, "gives other factors when it is called again"),
        (lambda epoch: 0.5 - epoch, "gives -0.25 at epoch 0.75: expected 0 or more"),
        (lambda epoch: 1 / epoch, "failed: ZeroDivisionError"),
    ):
        table = SchedulerConfig(name=f"plugin:{register('schedule', lambda function=function: function)}")
        with pytest.raises(UserError, match=message):
            check_schedule(table, 3)
    table = SchedulerConfig(
        name=f"plugin:{register('schedule', lambda epochs: lambda e: 1 - e / epochs)}", warmup_epochs=2
    )
    assert learning_rate(table, 0.4, 1, 4) == pytest.approx(0.4 * 0.75 * 0.505), "the warm-up multiplies the factor"
