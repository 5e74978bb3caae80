"""Run `toolkit train ...` on one or more processes that a test can end; they are forked, so torch is imported once."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from distributed import free_port

import toolkit.training.fit  # noqa: F401  (imported once before processes are forked, not in each)
from toolkit.cli.main import app
from toolkit.models.build import build_model
from toolkit.recipe import loads_recipe
from toolkit.runs import Run, open_run

RECIPE = """
[recipe]
name = "small"
run_root = "{root}"

[data]
dataset = "digits"
images_per_class = 11
test_images_per_class = 7
split = {{ validation = 0.3, test = 0.2 }}

[optimizer]
name = "sgd"
lr = 0.05
momentum = 0.9

[train]
epochs = 5
batch_size = 16
eval_batch_size = 16
log_every = 2
precision = "no"

[checkpoint]
every_steps = 3
every_minutes = 0.0

[tracking]
trackers = []

"""

STATEFUL = """
[augment]
train = [{{ name = "RandomAffine", degrees = 20 }}]
mixup = 0.4
label_smoothing = 0.1

[model]
source = "toolkit"

[model.convnet]
blocks = [
  {{ channels = 6, batch_norm = true, pool = 2, dropout = 0.1 }},
  {{ channels = 8, batch_norm = true, pool = 2 }},
]

[model.head]
hidden = [12]
dropout = 0.2

[scheduler]
name = "plateau"
patience = 0
gamma = 0.5
warmup_epochs = 1.0
"""
"""With the settings EMA below, a recipe with every kind of state that a checkpoint holds."""

PRETRAINED = """
[model]
source = "toolkit"
weights = "file:{root}/../weights.safetensors"

[model.convnet]
blocks = [{{ channels = 6, batch_norm = true, pool = 2 }}, {{ channels = 8, pool = 2 }}]
"""

FROZEN = f"""{PRETRAINED}
[transfer]
mode = "linear_probe"
"""
"""A frozen backbone, whose features are computed once."""

GRADUAL = f"""{PRETRAINED}
[transfer]
mode = "gradual"
unfreeze_at = [2, 4]
"""

LORA = f"""{PRETRAINED}
[transfer]
mode = "lora"
lora_rank = 2
lora_alpha = 1.0
"""

EMA = ("--set", "train.ema=0.8", "--set", "train.ema_steps=2", "--set", "train.max_grad_norm=1.0",
       "--set", 'train.best_metric="val/loss"')  # fmt: skip
"""Settings for STATEFUL."""

Prepare = Callable[[int], None]
"""Called in each process with its rank, before the command."""


def write_recipe(folder: Path, text: str) -> Path:
    """Write a recipe to ``folder``, with its runs in the same folder."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text((RECIPE + text).format(root=folder / "runs"))
    if PRETRAINED in text:
        scratch = loads_recipe((RECIPE + PRETRAINED).format(root=folder / "runs"), ['model.weights="none"'])
        torch.manual_seed(0)
        module = build_model(scratch.model, 10, 3, 8).module
        safetensors.torch.save_file(module.state_dict(), folder / "weights.safetensors")
    return path


def only_run(folder: Path) -> Run:
    """Return the only run of :func:`write_recipe`'s recipe."""
    (path,) = (folder / "runs" / "small").iterdir()
    return open_run(path)


def outcome(run: Run) -> dict[str, Any]:
    """Return the parts of a run that must not depend on how it was run; recorded times are left out."""
    varying = {"seconds", "startup_seconds", "images_per_s", "peak_memory_gib"}
    return {
        "weights": run.best_weights.read_bytes(),
        "metrics": run.metrics_file.read_bytes(),
        "predictions": (run.path / "predictions.csv").read_bytes() if run.has_test else None,
        "summary": {key: value for key, value in run.summary.items() if key not in varying},
    }


class Trainers:
    """The processes of one `toolkit train`, which write their output to one file."""

    def __init__(self, world: int, folder: Path, *arguments: object, prepare: Prepare | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        context, port = multiprocessing.get_context("fork"), free_port()
        self.shown = folder / "shown.txt"
        self.shown.write_text("")
        texts = [str(argument) for argument in arguments]
        self.processes = [
            context.Process(target=_trainer, args=(rank, world, port, self.shown, texts, prepare))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some of the processes, or to all."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].is_alive():
                os.kill(pid, number)

    def wait(self, timeout_s: float = 100) -> list[int]:
        """Return the exit statuses in order of rank (negative: killed by this signal); on a time-out, kill and fail."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        assert not late, f"ranks {late} still ran after {timeout_s} s:\n{self.text()}"
        return [int(process.exitcode or 0) for process in self.processes]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Wait until a condition holds while the processes run."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"the condition did not hold within {timeout_s} s:\n{self.text()}"
            assert any(process.is_alive() for process in self.processes), f"all processes have ended:\n{self.text()}"
            time.sleep(0.02)

    def wait_until_first_ends(self, timeout_s: float = 100) -> None:
        """Wait until one of the processes ends, for any reason."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout_s)

    def text(self) -> str:
        """Return the output of all processes in chronological order."""
        return self.shown.read_text()


def _trainer(rank: int, world: int, port: int, shown: Path, arguments: list[str], prepare: Prepare | None) -> None:
    descriptor = os.open(shown, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if prepare is not None:
        prepare(rank)
    app(["train", "--no-report", *arguments])


@functools.cache
def uninterrupted_run(world: int, text: str, *settings: str) -> Run:
    """Train a recipe without interruption, once for all tests of this process that compare with it."""
    folder = Path(tempfile.mkdtemp(prefix="toolkit-uninterrupted-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    trainers = Trainers(world, folder, write_recipe(folder, text), *settings)
    assert trainers.wait() == [0] * world, trainers.text()
    return only_run(folder)


def uninterrupted(world: int, text: str, *settings: str) -> dict[str, Any]:
    """Return :func:`outcome` of :func:`uninterrupted_run`."""
    return outcome(uninterrupted_run(world, text, *settings))


def at_call(owner: Any, name: str, count: int, act: Callable[[], None], *, after: bool = False) -> None:
    """Call ``act`` before (or after) the ``count``-th call of ``owner.name`` in this process."""
    original, calls = getattr(owner, name), [0]

    def called(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and not after:
            act()
        result = original(*arguments, **named)
        if calls[0] == count and after:
            act()
        return result

    setattr(owner, name, called)


def after_seconds(seconds: float, act: Callable[[], None]) -> None:
    """Call ``act`` in this process after a number of seconds."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def kill_self() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
