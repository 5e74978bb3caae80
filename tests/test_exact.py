"""The numbers of processes, accumulation steps and data workers do not change the experiment."""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import launch, run_on

from toolkit.data.sampling import plan_evaluation
from toolkit.recipe import load_recipe, loads_recipe
from toolkit.training.checkpoint import load_weights
from toolkit.training.evaluation import evaluate
from toolkit.training.fit import fit  # imported before the processes are forked, so only once
from toolkit.training.task import SingleLabel

pytestmark = pytest.mark.long

RECIPE = """
[recipe]
name = "exact"
run_root = "{root}"

[data]
dataset = "digits"
images_per_class = 11
split = {{ validation = 0.44, test = 0.862, method = "random", seed = 2 }}
cache = "off"

[augment]
train = [{{ name = "RandomAffine", degrees = 20, translate = [0.1, 0.1] }}]
mixup = 0.4
label_smoothing = 0.1

[model]
source = "toolkit"

[model.convnet]
blocks = [
  {{ channels = 6, batch_norm = {batch_norm}, pool = 2, dropout = 0.1 }},
  {{ channels = 8, batch_norm = {batch_norm}, pool = 2 }},
]

[model.head]
hidden = [12]
dropout = 0.2

[optimizer]
name = "sgd"
lr = 0.05
weight_decay = 1e-3

[scheduler]
name = "plateau"
patience = 0
gamma = 0.5
warmup_epochs = 1.0

[train]
epochs = 7
batch_size = 12
max_grad_norm = 1.0
ema = 0.9
best_metric = "val/loss"

[early_stopping]
metric = "val/loss"
patience = 3

[tracking]
trackers = []
"""


IMAGES = {"train": 109, "validation": 101, "test": 1549}
"""All are prime, so neither batch sizes nor numbers of processes divide them."""


def trained(root: Path, batch_norm: bool, settings: tuple[str, ...]) -> dict[str, Any]:
    """Return metrics, summary, predictions and best weights of one run (the same on each process)."""
    text = RECIPE.format(root=root, batch_norm=str(batch_norm).lower())
    with contextlib.redirect_stderr(io.StringIO()):
        run = fit(loads_recipe(text, settings))
    weights = {name: tensor.numpy() for name, tensor in load_weights(run.best_weights).items()}
    assert run.summary["images"] == IMAGES
    return {
        "epochs": run.epoch_records(),
        "summary": run.summary,
        "predictions": run.prediction_records(),
        "weights": weights,
    }


@functools.cache
def run_with(tmp_path: Path, world: int, batch_norm: bool, *settings: str) -> dict[str, Any]:
    # Fork for one process too, so that the test's own process has no Accelerate state.
    return launch(world, trained, tmp_path / f"{world}-{len(settings)}-{hash(settings)}", batch_norm, settings)[0]


def assert_same_experiment(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert len(one["epochs"]) == len(other["epochs"]), "early stopping at a different epoch"
    for found, expected in zip(one["epochs"], other["epochs"], strict=True):
        for key in found:
            assert found[key] == pytest.approx(expected[key], rel=1e-5), f"{key} of epoch {found['epoch']}"
    assert one["summary"]["best"]["epoch"] == other["summary"]["best"]["epoch"]
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(weight, other["weights"][name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert [row["path"] for row in one["predictions"]] == [row["path"] for row in other["predictions"]]


QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.toml"
SMOOTH = (  # no ReLU and max pooling, whose gradients jump if two values are equal up to rounding
    'model.convnet.activation="gelu"',
    "model.convnet.blocks=[{channels=32,batch_norm=true},{channels=64,batch_norm=true,stride=2}]",
)


def quickstart(root: Path, settings: tuple[str, ...]) -> list[dict[str, Any]]:
    """Train the shipped quickstart recipe and return its metrics per epoch."""
    common = (f'recipe.run_root="{root}"', "tracking.trackers=[]", "train.batch_size=60")
    with contextlib.redirect_stderr(io.StringIO()):
        return fit(load_recipe(QUICKSTART, (*common, *settings))).epoch_records()


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        pytest.param(("train.epochs=2", *SMOOTH), 1e-5, id="adamw, smooth"),
        # ReLU or max pooling may differ if two values are equal up to rounding; AdamW amplifies the difference.
        pytest.param(("train.epochs=2", 'optimizer.name="sgd"'), 1e-4, marks=pytest.mark.extended, id="sgd"),
        pytest.param(("train.epochs=1",), 1e-2, marks=pytest.mark.extended, id="unchanged recipe"),
    ],
)
def test_the_quickstart_gives_the_same_metrics_on_one_two_and_three_processes(
    tmp_path: Path, settings: tuple[str, ...], tolerance: float
) -> None:
    one, *others = (launch(world, quickstart, tmp_path / str(world), settings)[0] for world in (1, 2, 3))
    for other in others:
        for found, expected in zip(one, other, strict=True):
            for key in ("train/loss", "val/loss"):
                assert found[key] == pytest.approx(expected[key], rel=tolerance), f"{key} of epoch {found['epoch']}"


@pytest.mark.parametrize(
    "worlds",
    [
        pytest.param({1: (3,), 2: (2,)}, marks=pytest.mark.extended),
        pytest.param({1: (2, 3), 2: (2, 3)}, marks=pytest.mark.slow),
    ],
    ids=["one per accumulation", "all"],
)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_processes_and_accumulation_do_not_change_the_experiment(
    tmp_path: Path, batch_norm: bool, worlds: dict[int, tuple[int, ...]]
) -> None:
    for grad_accum_steps, processes in worlds.items():
        setting = f"train.grad_accum_steps={grad_accum_steps}"
        alone = run_with(tmp_path, 1, batch_norm, setting)
        assert len(alone["epochs"]) >= 3
        for world in processes:
            assert_same_experiment(alone, run_with(tmp_path, world, batch_norm, setting))
        if not batch_norm:  # batch norm uses the statistics of a micro-batch, which depend on accumulation by design
            assert_same_experiment(alone, run_with(tmp_path, 1, batch_norm, "train.grad_accum_steps=3"))


@pytest.mark.parametrize(
    "setting", ["augment.repeats=3", pytest.param("augment.alternating_flip=true", marks=pytest.mark.extended)]
)
def test_repeated_and_alternating_augmentation_are_the_same_on_two_processes(tmp_path: Path, setting: str) -> None:
    settings = (setting, "train.epochs=2")
    alone, two = (run_with(tmp_path, world, True, *settings) for world in (1, 2))
    assert_same_experiment(alone, two)
    without = run_with(tmp_path, 1, True, "train.epochs=2")
    assert alone["epochs"][0]["train/loss"] != without["epochs"][0]["train/loss"]


def test_sam_takes_the_same_steps_on_two_processes(tmp_path: Path) -> None:
    settings = ("optimizer.sam=0.1", "train.epochs=2")
    assert_same_experiment(run_with(tmp_path, 1, True, *settings), run_with(tmp_path, 2, True, *settings))


def test_the_number_of_data_workers_does_not_change_the_experiment(tmp_path: Path) -> None:
    runs = [run_with(tmp_path, 1, True, f"data.workers={workers}") for workers in (0, 3)]
    for key in ("epochs", "predictions"):
        assert runs[0][key] == runs[1][key]


def test_training_the_same_recipe_twice_gives_identical_bits(tmp_path: Path) -> None:
    one, other = (run_with(tmp_path, 2, True, "train.epochs=3", f'recipe.description="{i}"') for i in range(2))
    assert one["epochs"] == other["epochs"]
    assert all((one["weights"][name] == other["weights"][name]).all() for name in one["weights"])


def evaluated(count: int, batch_size: int) -> list[float]:
    """Return metrics and predictions of a fixed model on ``count`` examples, evaluated on all processes."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    inputs = torch.randn((17, 6), generator=torch.Generator().manual_seed(3))[:count]
    labels = np.arange(17)[:count] % 6
    batches = [
        (positions, inputs[positions], torch.from_numpy(labels[positions]))
        for positions in plan_evaluation(count, batch_size, world, rank)
    ]
    task = SingleLabel(6)
    result = evaluate(torch.nn.Identity(), batches, labels, task, torch.device("cpu"))
    return [len(result.outcomes), *result.outcomes.flatten().tolist(), *task.metrics(result, "").values()]


def all_evaluations() -> list[list[float]]:
    return [evaluated(count, batch_size) for count in range(1, 18) for batch_size in range(1, 6)]


def test_every_example_is_evaluated_once_for_any_batch_size_and_number_of_processes() -> None:
    alone = run_on(1, all_evaluations)[0]
    assert len(alone) == 17 * 5
    for world in (2, 3):
        for of_rank in run_on(world, all_evaluations):
            for found, expected in zip(of_rank, alone, strict=True):
                assert found == pytest.approx(expected, rel=1e-12)
