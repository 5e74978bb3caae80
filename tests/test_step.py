"""The training step and evaluation: optimizations for speed change no metric."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from toolkit.distributed.precision import precision_line, resolve_precision
from toolkit.distributed.process import init_accelerator
from toolkit.errors import UserError
from toolkit.recipe.schema import OptimizerConfig, TrainConfig
from toolkit.training.evaluation import evaluate
from toolkit.training.optimizer import build_optimizer, load_state
from toolkit.training.task import SingleLabel
from toolkit.training.train_step import NonFiniteDetector

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("losses", "bad"),
    [([1.0, 2.0, 0.5], None), ([1.0, NAN, 1.0], 2), ([1.0, 1.0, INF, NAN], 3), ([-INF], 1), ([1.0] * 9 + [NAN], 10)],
)
def test_the_first_loss_that_is_not_finite_is_found(losses: list[float], bad: int | None) -> None:
    finite, seen = NonFiniteDetector(), []
    for step, loss in enumerate(losses, 1):
        finite.add(step, torch.tensor(loss))
        seen.append(finite.first_nonfinite_step())
    assert seen == [bad if bad is not None and step >= bad else None for step in range(1, len(losses) + 1)]
    assert finite.first_nonfinite_step(wait=True) == bad


class LateEvent:
    """A CUDA event that is not complete until it is synchronized."""

    def __init__(self) -> None:
        self.is_complete = self.was_waited_for = False

    def query(self) -> bool:
        return self.is_complete

    def synchronize(self) -> None:
        self.is_complete = self.was_waited_for = True


def test_pending_finiteness_checks_are_not_waited_for_until_too_many_are_pending() -> None:
    finite, events = NonFiniteDetector(), [LateEvent() for _ in range(NonFiniteDetector.MOST + 2)]
    for step, event in enumerate(events[: NonFiniteDetector.MOST], 1):
        finite.waiting.append((step, torch.tensor(step != 2), event))  # type: ignore[arg-type]
        assert finite.first_nonfinite_step() is None
    assert not any(event.was_waited_for for event in events)
    for step, event in enumerate(events[NonFiniteDetector.MOST :], NonFiniteDetector.MOST + 1):
        finite.waiting.append((step, torch.tensor(True), event))  # type: ignore[arg-type]
        found = finite.first_nonfinite_step()
    assert [event.was_waited_for for event in events] == [True] * 2 + [False] * NonFiniteDetector.MOST
    assert found == 2
    assert finite.first_nonfinite_step(wait=True) == 2
    assert all(event.was_waited_for for event in events)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def optimizer_of(module: nn.Module, name: str, **arguments: Any) -> torch.optim.Optimizer:
    group = {"params": list(module.parameters()), "lr": 0.01, "lr_scale": 1.0, "weight_decay": 1e-2}
    momentum = 0.9 if name in ("sgd", "nag") else None
    return build_optimizer(OptimizerConfig(name=name, lr=0.01, momentum=momentum, args=arguments), [group])


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> nn.Module:
    for step in range(steps):
        torch.manual_seed(step)
        module(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_fused_optimizer_takes_the_same_steps(name: str) -> None:
    one, other = network(), network()
    fused, plain = optimizer_of(one, name), optimizer_of(other, name, fused=False)
    assert fused.param_groups[0]["fused"]
    assert not plain.param_groups[0]["fused"]
    stepped(one, fused, 20), stepped(other, plain, 20)
    for actual, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_parameters_with_another_memory_format_are_not_fused_on_a_cpu() -> None:
    """PyTorch's fused kernels for CPUs read weights and gradients as if both were contiguous."""
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert not optimizer_of(convolution, "adamw").param_groups[0].get("fused")
    assert optimizer_of(nn.Conv2d(3, 4, 3), "adamw").param_groups[0]["fused"]


@pytest.mark.parametrize("name", ["sgd", "nag", "adam", "adamw"])
def test_a_state_from_another_device_type_uses_the_fastest_kernel_of_this_device(name: str) -> None:
    module = network()
    optimizer = optimizer_of(module, name)
    stepped(module, optimizer, 3)
    kernels = [(group.get("fused"), group.get("foreach"), group.get("capturable")) for group in optimizer.param_groups]
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group |= {"fused": True, "foreach": False, "lr": 0.005}  # as saved on a GPU, in another epoch
        if "capturable" in group:
            group["capturable"] = True
    restored = network()
    restored.load_state_dict(weights)
    other = optimizer_of(restored, name)
    load_state(other, state)
    assert [(g.get("fused"), g.get("foreach"), g.get("capturable")) for g in other.param_groups] == kernels
    assert other.param_groups[0]["lr"] == 0.005, "the step depends on the loaded state"
    optimizer.param_groups[0]["lr"] = 0.005
    stepped(module, optimizer, 3), stepped(restored, other, 3)
    for actual, expected in zip(module.parameters(), restored.parameters(), strict=True):
        assert torch.equal(actual, expected)


class Small(nn.Module):
    """A network on a device with memory for ``room`` images at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.inner, self.room, self.sizes = network(), room, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        result: Tensor = self.inner(x)
        return result


def evaluated(module: nn.Module) -> tuple[list[float], list[int]]:
    torch.manual_seed(1)
    images, labels = torch.randn(21, 6), torch.arange(21) % 3
    batches = [(np.arange(init_accelerator, min(init_accelerator + 8, 21)),) for init_accelerator in range(0, 21, 8)]
    parts, task = ((b, images[b], labels[b]) for (b,) in batches), SingleLabel(3)
    found = evaluate(module, parts, labels.numpy(), task, torch.device("cpu"))
    return found.outcomes[:, 0].tolist(), task.predictions(found).tolist()


@pytest.mark.parametrize(("room", "sizes"), [(8, [8, 8, 5]), (3, [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]), (1, None)])
def test_evaluation_out_of_memory_uses_smaller_batches(room: int, sizes: list[int] | None) -> None:
    module = Small(room)
    losses, predictions = evaluated(module)
    plain_losses, plain = evaluated(network())
    assert predictions == plain
    assert losses == pytest.approx(plain_losses, abs=1e-6)
    if sizes is not None:
        assert module.sizes == sizes, "the batch size that fits is kept"


def test_evaluation_without_memory_for_one_image_fails() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        evaluated(Small(0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int], bool], None]:
    """Make PyTorch report a GPU of a given compute capability."""

    def set_gpu(capability: tuple[int, int], bf16: bool) -> None:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return set_gpu


def test_precision_on_a_cpu_defaults_to_fp32() -> None:
    assert resolve_precision("auto") == "no"
    assert resolve_precision("bf16") == "bf16"
    why = "on a CPU bf16 is faster for some models, slower for others (see toolkit bench)"
    assert precision_line("auto", "no") == f"precision no (auto): {why}"
    assert precision_line("bf16", "bf16") == "precision bf16, set in the recipe"
    with pytest.raises(UserError, match="'fp16' needs a GPU"):
        resolve_precision("fp16")


def test_precision_on_a_gpu_depends_on_its_capabilities(gpu: Callable[[tuple[int, int], bool], None]) -> None:
    gpu((9, 0), True)
    assert resolve_precision("auto") == "bf16"
    assert "the GPU supports it" in precision_line("auto", "bf16")
    gpu((7, 5), False)
    assert resolve_precision("auto") == "no"
    assert "compute capability 7.5 has no bf16 units" in precision_line("auto", "no")
    with pytest.raises(UserError, match="this GPU does not support bf16"):
        resolve_precision("bf16")
    assert resolve_precision("fp16") == "fp16"


def test_an_unused_gpu_does_not_affect_precision(
    gpu: Callable[[tuple[int, int], bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0), True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve_precision("auto") == "no"


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(UserError, match="cuda_graphs = true needs a GPU"):
        init_accelerator(TrainConfig(epochs=1, batch_size=4, cuda_graphs=True))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": 16}, 32),
        ({"batch_size": 16, "grad_accum_steps": 4}, 8),
        ({"batch_size": 16, "eval_batch_size": 5}, 5),
    ],
)
def test_evaluation_batches_are_twice_as_large(settings: dict[str, int], expected: int) -> None:
    table = TrainConfig(epochs=1, **settings)
    assert table.images_per_evaluation(table.min_accum_steps) == expected
