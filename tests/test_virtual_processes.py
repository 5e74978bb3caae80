"""With train.virtual_processes a run has the same bytes on any number of processes, also when resumed on another."""

from __future__ import annotations

import functools
import itertools
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import toolkit
from distributed import run_on
from test_lp_ft import LP_FT
from torch import nn
from trainers import (
    EMA,
    FROZEN,
    GRADUAL,
    STATEFUL,
    Trainers,
    at_call,
    kill_self,
    only_run,
    outcome,
    uninterrupted,
    write_recipe,
)

from toolkit.data.sampling import SamplingPlan, own_range
from toolkit.distributed.virtual_processes import TreeSum, VirtualProcesses
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

VIRTUAL = 4
STEPS = 7
"""Steps of an epoch."""
SETTINGS = ("--set", f"train.virtual_processes={VIRTUAL}", "--set", "train.epochs=3")


def vector(index: int) -> torch.Tensor:
    return torch.randn(1001, generator=torch.Generator().manual_seed(index)) * 10 ** (index % 5)


def tree_total(count: int) -> torch.Tensor:
    total = TreeSum(count, *process())
    for index in range(*own_range(count, *process())):
        total.add(index, [vector(index)])
    (found,) = total.total()
    return found


def process() -> tuple[int, int]:
    """Return the number of processes and this one's rank."""
    if not torch.distributed.is_initialized():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


def test_a_sum_over_virtual_processes_has_the_same_bits_on_any_number_of_processes() -> None:
    for count in (3, 4, 6):
        expected = tree_total(count)
        exact = sum(vector(index).double() for index in range(count))
        assert torch.allclose(expected.double(), exact, rtol=1e-4, atol=1e-2)
        for found in run_on(3, tree_total, count):
            assert torch.equal(found, expected)
    assert not torch.equal(tree_total(6), sum(vector(index) for index in range(6))), "the order matters"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_the_micro_batches_of_the_virtual_processes(world: int) -> None:
    plan = {"size": 45, "seed": 1, "batch_size": 16, "mixing": True}
    expected = list(SamplingPlan(**plan, grad_accum_steps=VIRTUAL).epoch(0, 1))
    found = [list(SamplingPlan(**plan, virtual=VIRTUAL, world=world, rank=r).epoch(0, 1)) for r in range(world)]
    for rank in range(world):
        assert [micro.is_last for micro, *_ in found[rank]].count(True) == 2, "one update for each step"
    shared = sorted(itertools.chain(*found), key=lambda one: (one[0].step, one[0].part))
    assert len(shared) == len(expected)
    for (micro, positions, draws), (other, *others) in zip(shared, expected, strict=True):
        assert (micro.step, micro.part, micro.own) == (other.step, other.part, other.own)
        assert np.array_equal([positions, draws], others)
        assert np.array_equal(micro.partners, other.partners)  # type: ignore[arg-type]


def test_gradients_are_those_of_the_whole_batch_and_statistics_the_mean() -> None:
    torch.manual_seed(0)
    module, reference = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.Linear(3, 2)
    reference.load_state_dict(module[0].state_dict())
    images = torch.randn(4, 5, 3)
    virtual, means = VirtualProcesses(module, 4, 1, 0), []
    for index, part in enumerate(images):
        virtual.begin()
        module(part).square().sum().backward()
        virtual.end(index)
        means.append(0.1 * reference(part).mean(0))
    virtual.finish()
    norm = nn.BatchNorm1d(2)
    sum(norm(reference(part)).square().sum() for part in images).backward()
    assert torch.allclose(module[0].weight.grad, reference.weight.grad, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(module[1].running_mean, torch.stack(means).mean(0), atol=1e-6)  # type: ignore[arg-type]
    assert module[1].num_batches_tracked == 1


def same_for_all(found: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome of a run without the number of processes, which the summary records."""
    return found | {"summary": {key: value for key, value in found["summary"].items() if key != "processes"}}


def test_a_run_has_the_same_bytes_on_any_number_of_processes(tmp_path: Path) -> None:
    expected = same_for_all(uninterrupted(1, STATEFUL, *SETTINGS, *EMA))
    assert same_for_all(uninterrupted(2, STATEFUL, *SETTINGS, *EMA)) == expected
    recipe = write_recipe(tmp_path, STATEFUL)
    first = Trainers(3, tmp_path, recipe, *SETTINGS, *EMA, prepare=kill_in_second_epoch)
    assert -signal.SIGKILL in first.wait()
    second = Trainers(1, tmp_path, recipe, "--resume", "auto", *SETTINGS, *EMA)
    assert second.wait() == [0], second.text()
    assert "resuming after epoch 1, step 3" in second.text()
    assert same_for_all(outcome(only_run(tmp_path))) == expected


def kill_in_second_epoch(rank: int) -> None:
    """Kill process 1 in the fifth step of the second epoch; checkpoints are written after each third step."""
    if rank == 1:
        at_call(TrainStep, "_update", STEPS + 5, kill_self)


@pytest.mark.extended
@pytest.mark.parametrize(
    "text", [STATEFUL, FROZEN, GRADUAL, LP_FT], ids=["stateful", "frozen", "gradual", "lp_ft and wise"]
)
def test_variants_have_the_same_bytes_on_one_two_and_four_processes(text: str, tmp_path: Path) -> None:
    settings = (*SETTINGS[:2], *EMA, "--set", "optimizer.sam=0.05")
    expected = same_for_all(uninterrupted(1, text, *settings))
    for world in (2, 4):
        assert same_for_all(uninterrupted(world, text, *settings)) == expected
    for before, after in ((1, 4), (4, 2)):
        folder = tmp_path / f"{before}-{after}"
        recipe = write_recipe(folder, text)
        first = Trainers(before, folder, recipe, *settings, prepare=functools.partial(kill_one, before - 1))
        assert -signal.SIGKILL in first.wait()
        second = Trainers(after, folder, recipe, "--resume", "auto", *settings)
        assert second.wait() == [0] * after, second.text()
        assert same_for_all(outcome(only_run(folder))) == expected


def kill_one(victim: int, rank: int) -> None:
    """Kill a process in the fifth step of the second epoch."""
    if rank == victim:
        at_call(TrainStep, "_update", STEPS + 5, kill_self)


def test_too_many_processes_and_batches_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, STATEFUL)
    for settings, message in (
        (["train.virtual_processes=3"], "16 is not divisible by train.virtual_processes = 3"),
        (["train.virtual_processes=4", "train.grad_accum_steps=2"], "must be 1 with train.virtual_processes"),
        (["train.virtual_processes=8", "train.batch_size=8"], "fewer than train.virtual_processes = 8"),
    ):
        found = toolkit("train", str(recipe), *itertools.chain(*(["--set", one] for one in settings)))
        assert (found.status, message in found.stderr) == (2, True), found.stderr
    trainers = Trainers(3, tmp_path, recipe, "--set", "train.virtual_processes=2")
    statuses = trainers.wait()  # a process that ends after the others have failed may have status 1
    assert (2 in statuses, 0 in statuses) == (True, False)
    assert "train.virtual_processes = 2 is less than the number of processes, 3: start at most 2" in trainers.text()
