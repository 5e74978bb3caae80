"""Compare a frozen backbone over many epochs, and a grid of such runs, with the plain loop, which caches no features.

The plain loop (toolkit/plain_loop.py) sends every image through the whole network in every epoch. Some of its epochs
are measured and their time is multiplied, because all take equally long. The toolkit's run is measured as a whole, from
an empty cache to the summary, once with fit() in this process and then as `toolkit study` over 12 learning rates, whose
time contains starting Python, importing PyTorch and the tables. Both use all cores.

    python benchmarks/frozen.py --data data --model resnet18                    # trains one linear layer
    python benchmarks/frozen.py --data data --model alexnet --mode feature_extractor   # three fully connected layers
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torchvision

from toolkit.plain_loop import PlainLoop, default_pillow_allocation
from toolkit.recipe import load
from toolkit.training.fit import fit

RECIPE = """
extends = "{base}"

[recipe]
name = "frozen"
run_root = "{folder}/runs"

[data]
root = "{data}"
images_per_class = {images}
test_images_per_class = 1
split = {{ method = "stratified", validation = 0.2 }}
normalize = "imagenet"

[model]
source = "torchvision"
name = "{model}"
weights = "file:{folder}/weights.safetensors"

[transfer]
mode = "{mode}"

[optimizer]
name = "sgd"
lr = 0.01

[train]
epochs = {epochs}
batch_size = 64
drop_last = false
precision = "no"

[tracking]
trackers = []
"""

GRID = """
extends = "frozen.toml"

[recipe]
name = "frozen-grid"

[study]
grid = {{ "optimizer.lr" = [{rates}] }}
"""


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the seconds of both, and their ratios."""
    base = Path(__file__).resolve().parent.parent / "recipes" / "base" / "caltech101.toml"
    settings = {name: getattr(arguments, name) for name in ("model", "mode", "images", "epochs")}
    recipe = folder / "frozen.toml"
    recipe.write_text(RECIPE.format(base=base, folder=folder, data=arguments.data.resolve(), **settings))
    # Random weights: the arithmetic is the same, and no network is needed.
    module = torchvision.models.get_model(arguments.model)
    safetensors.torch.save_file(module.state_dict(), folder / "weights.safetensors")
    loaded = load(recipe).recipe

    plain = PlainLoop(loaded)
    with default_pillow_allocation():
        plain.epochs(1)  # starts the workers and fills the page cache
        epoch = plain.epochs(arguments.plain_epochs) / arguments.plain_epochs
    began = time.perf_counter()
    run = fit(loaded, quiet=True)
    once = time.perf_counter() - began
    figures = {
        **settings,
        "images": {name: count for name, count in run.summary["images"].items() if name != "test"},
        "plain, one epoch, s": round(epoch, 2),
        f"plain, {arguments.epochs} epochs, s (multiplied)": round(epoch * arguments.epochs, 1),
        "toolkit, s": round(once, 2),
        "ratio": epoch * arguments.epochs / once,
        "cached": run.summary["cached"],
    }
    if arguments.runs:
        grid = grid_seconds(folder, arguments.runs)
        figures[f"toolkit, study of {arguments.runs} runs, s"] = round(grid, 1)
        figures["ratio of the grid"] = arguments.runs * epoch * arguments.epochs / grid
    return figures


def grid_seconds(folder: Path, runs: int) -> float:
    """Return the seconds of a study over the learning rate, with an empty cache folder, from the command to its end."""
    rates = ", ".join(f"{0.001 * 1.5**number:.6f}" for number in range(runs))
    (folder / "grid.toml").write_text(GRID.format(rates=rates))
    command = [sys.executable, "-m", "toolkit", "study", str(folder / "grid.toml"), "--parallel", "1"]
    environment = {**os.environ, "TOOLKIT_CACHE": str(folder / "another cache")}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began


def main() -> None:
    """Parse the command line and print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder that contains caltech101")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--mode", default="linear_probe")
    parser.add_argument("--images", type=int, default=15, help="images of each class")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--plain-epochs", type=int, default=2)
    parser.add_argument("--runs", type=int, default=12, help="of the grid; 0: no grid")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TOOLKIT_CACHE"] = str(Path(folder) / "cache")
        print(json.dumps(measure(arguments, Path(folder))))


if __name__ == "__main__":
    main()
