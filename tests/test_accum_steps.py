"""``train.grad_accum_steps = "auto"``, with processes that run out of memory above a number of images."""

from __future__ import annotations

import contextlib
import io
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from distributed import launch

from toolkit.errors import RunFailed
from toolkit.recipe import loads_recipe
from toolkit.runs import Run, open_run
from toolkit.training.fit import fit
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

RECIPE = """
recipe = {{ name = "auto", run_root = "{root}" }}
tracking.trackers = []

[data]
dataset = "digits"
images_per_class = 5
test_images_per_class = 3
split.validation = 30
workers = 0

[augment]
mixup = 0.4

[model]
{model}

[optimizer]
name = "adamw"
lr = 0.01
weight_decay = 0.1

[train]
epochs = 2
batch_size = 12
ema = 0.9
max_grad_norm = 1.0
grad_accum_steps = "auto"
"""

CONVNET = """
source = "toolkit"
convnet.blocks = [{ channels = 4, batch_norm = true, dropout = 0.1, pool = 2 }, { channels = 6, batch_norm = true }]
head.dropout = 0.2
"""

NO_LIMIT = (math.inf, math.inf)
"""The memory of both processes is limited, but larger than needed."""


def train(
    root: Path,
    limits: tuple[float, ...] | None,
    settings: tuple[str, ...] = (),
    resume: Path | None = None,
    until: int | None = None,
    model: str = CONVNET,
) -> tuple[Path, list[tuple[tuple[int, ...], int]], float]:
    """Train with out-of-memory errors above ``limits[rank]`` images; return the run, all batches and a random number.

    ``limits``: None for a machine without a limit of memory, as most CPUs are. Of a batch: the number and the shape of
    its images, and the number of parameter tensors that are trained.
    """
    batches: list[tuple[tuple[int, ...], int]] = []
    compute = TrainStep._forward_backward

    def limited(self: TrainStep, micro: Any, batch: Any, epoch: int) -> Any:
        trained = sum(parameter.requires_grad for parameter in self.network.parameters())
        batches.append(((micro.own, *batch.images.shape[1:]), trained))
        torch.rand(1)  # as an architecture's own random numbers
        outcome = compute(self, micro, batch, epoch)  # has changed the statistics of batch norm
        if limits is not None and micro.own > limits[self.accelerator.process_index]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return outcome

    TrainStep._forward_backward = limited  # type: ignore[method-assign]  # in a process of its own
    if limits is not None:
        resource.setrlimit(resource.RLIMIT_AS, (2**46, resource.getrlimit(resource.RLIMIT_AS)[1]))
    text = RECIPE.format(root=root, model=model)
    with contextlib.redirect_stderr(io.StringIO()):
        run = fit(loads_recipe(text, settings), resume=resume, until=until)
    return run.path, batches, torch.rand(()).item()


def results(run: Run) -> tuple[bytes, bytes, str]:
    return run.metrics_file.read_bytes(), run.best_weights.read_bytes(), (run.path / "predictions.csv").read_text()


@pytest.mark.parametrize(
    ("limits", "steps", "reason"),
    [
        pytest.param((5,), 3, "out of memory with 2", marks=pytest.mark.extended),
        ((7, 2), 3, "out of memory with 2"),
        pytest.param((7, 6), 1, "the first one tried", marks=pytest.mark.extended),
    ],
)
def test_the_fewest_steps_that_fit_on_every_process_are_found_without_a_trace_and_kept(
    tmp_path: Path, limits: tuple[int, ...], steps: int, reason: str
) -> None:
    world = len(limits)
    auto = open_run(launch(world, train, tmp_path, limits, (), None, 1)[0][0])
    log = auto.log_file.read_text()
    assert f'train.grad_accum_steps = "auto" is {steps} ({reason}): batch size 12' in log
    assert auto.environment["grad_accum_steps"] == steps
    launch(world, train, tmp_path, NO_LIMIT, (), auto.path)
    assert f'"auto" is {steps} (as before)' in auto.log_file.read_text()
    assert auto.summary["grad_accum_steps"] == steps
    assert 'grad_accum_steps = "auto"' in (auto.path / "recipe.toml").read_text()
    given = launch(world, train, tmp_path, None, (f"train.grad_accum_steps={steps}",))[0][0]
    assert results(auto) == results(open_run(given))


def test_on_a_cpu_without_a_limit_nothing_is_tried(tmp_path: Path) -> None:
    auto, tried, _ = launch(1, train, tmp_path, None, ("train.epochs=1",))[0]
    given, trained, _ = launch(1, train, tmp_path, None, ("train.epochs=1", "train.grad_accum_steps=1"))[0]
    assert 'train.grad_accum_steps = "auto" is 1 (nothing to try on a CPU)' in open_run(auto).log_file.read_text()
    assert tried == trained
    assert results(open_run(auto)) == results(open_run(given))


def pretrained(folder: Path) -> str:
    """Return a [model] table with weights that are written to ``folder``."""
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    return f'source = "timm"\nname = "test_resnet"\nweights = "file:{folder}/weights.safetensors"'


def test_features_of_a_frozen_backbone_are_trained_as_with_the_number_given(tmp_path: Path) -> None:
    settings, model = ('transfer.mode="linear_probe"', "augment.mixup=0", "train.epochs=1"), pretrained(tmp_path)
    auto, batches, drawn = launch(1, train, tmp_path, (4,), settings, None, None, model)[0]
    given, _, expected = launch(1, train, tmp_path, None, (*settings, "train.grad_accum_steps=3"), None, None, model)[0]
    assert open_run(auto).summary["cached"] == open_run(given).summary["cached"] != []
    assert len(batches[0][0]) == 2, "a feature vector for each image"
    assert len(batches) == 1 + 1 + 3 + 14, "numbers 1 and 2 fail at once; 3 takes a step, of which no trace is left"
    assert drawn == expected
    assert results(open_run(auto)) == results(open_run(given))


def test_the_largest_input_with_all_layer_groups_is_tried(tmp_path: Path) -> None:
    settings = ('transfer.mode="gradual"', "transfer.unfreeze_at=[3]", "train.epochs=4", "train.batch_size=10",
                "data.image_size=48", "data.progressive_sizes=[32, 48]")  # fmt: skip
    _, batches, _ = launch(1, train, tmp_path, (5,), settings, None, None, pretrained(tmp_path))[0]
    assert [shape for shape, _ in batches[:4]] == [(10, 3, 48, 48), (5, 3, 48, 48), (5, 3, 48, 48), (5, 3, 32, 32)]
    trained = [count for _, count in batches]
    assert trained[0] == trained[1] == trained[2] == trained[-1] > trained[3]


def not_enough(root: Path, limits: tuple[float, ...]) -> str:
    with pytest.raises(RunFailed) as caught:
        train(root, limits)
    return str(caught.value)


def test_if_one_process_has_too_little_memory_for_one_image_all_end_with_the_advice(tmp_path: Path) -> None:
    for message in launch(2, not_enough, tmp_path, (12, 0)):
        assert message.startswith("out of memory even with 1 image at once in each process")
        assert "train.precision" in message


def test_a_resumed_run_on_fewer_processes_starts_from_its_own_number(tmp_path: Path) -> None:
    path, *_ = launch(2, train, tmp_path, (3, 3), (), None, 1)[0]
    launch(1, train, tmp_path, (3,), (), path)
    assert '"auto" is 4 (out of memory with 3)' in open_run(path).log_file.read_text()
    assert open_run(path).summary["grad_accum_steps"] == 4
