"""Compare the step with train.virtual_processes with gradient accumulation (one process) or with plain DDP (several).

    OMP_NUM_THREADS=1 python benchmarks/virtual_processes.py --count 4
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/virtual_processes.py --count 2

Both trainers are in the same processes, with one thread each, and train the same batch of images in turns. Without
virtual processes a step has as many accumulation steps as each process has virtual processes, and batch norm is not
synchronized, so that the arithmetic is the same but for the order of sums.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from step import RECIPE, turned

from toolkit.bench import _first_step, _RepeatedBatch, _train
from toolkit.distributed.process import init_accelerator
from toolkit.distributed.signals import GracefulStop
from toolkit.recipe import load
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.trainer import Trainer


def build_trainer(virtual: int, parts: int, a: argparse.Namespace) -> Trainer:
    """Return a trainer with virtual processes, or (0) with accumulation steps."""
    settings = f"virtual_processes = {virtual}" if virtual else f"grad_accum_steps = {parts}\nsync_batch_norm = false"
    text = RECIPE.format(model=a.model, size=a.size, batch=a.batch, precision="no")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.toml"
        path.write_text(text.replace("[train]\n", f"[train]\n{settings}\n"))
        recipe = load(path).recipe
    setup = build_context(recipe, init_accelerator(recipe.train), Console(is_main=False, shows=False))
    training = Trainer(setup, None, None, GracefulStop(), None, "images")
    setup.transfer.train_mode()
    return training


def main() -> None:
    """Parse the command line and print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    virtual = build_trainer(a.count, 1, a)
    processes = virtual.accelerator.num_processes
    trainers = {"virtual": virtual, "plain": build_trainer(0, a.count // processes, a)}
    batches = {name: _RepeatedBatch(_first_step(one), a.steps) for name, one in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(a.rounds + 1):
        for name in turned(list(trainers), number):
            virtual.accelerator.wait_for_everyone()
            began = time.perf_counter()
            _train(trainers[name], batches[name], a.steps)
            seconds[name].append((time.perf_counter() - began) / a.steps)
    ratios = [ours / plain for ours, plain in zip(seconds["virtual"][1:], seconds["plain"][1:], strict=True)]
    found = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    if virtual.accelerator.is_main_process:
        print(json.dumps(vars(a) | {"processes": processes, "seconds": found, "ratio": statistics.median(ratios)}))
    for trainer in trainers.values():
        trainer.loaders.close()


if __name__ == "__main__":
    main()
