"""Compare the whole step on images from disk with timm's loader, model, optimizer and training loop.

timm's train.py is not part of the package that pip installs; `as_timm` is a transcript of its loop with timm's dataset,
loader (create_loader, with its prefetcher and persistent workers), AverageMeter and create_optimizer_v2. It is measured
twice: "defaults" has the defaults of timm's command line (4 workers, channels first), "tuned" has what suits the
machine (--channels-last, one worker less than there are CPUs). Both have --color-jitter 0, --smoothing 0 and
--train-interpolation bilinear, so that the work is the same. The toolkit is measured by `toolkit bench` with a filled
cache. Each runs in its own process, in turns; all crop and flip at random (RandomResizedCrop 0.08 to 1).

    python benchmarks/timm_loop.py --data data --model mobilenetv3_small_100 --batch 32
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = """
[recipe]
name = "beside-timm"

[data]
dataset = "caltech101"
root = "{data}"
image_size = {size}
normalize = "imagenet"

[model]
source = "timm"
name = "{model}"

[augment]
train = [
  {{ name = "RandomResizedCrop", stage = "resize_crop" }},
  {{ name = "RandomHorizontalFlip" }},
]

[optimizer]
name = "sgd"
lr = 0.01
momentum = 0.9

[train]
epochs = 1
batch_size = {batch}
precision = "{precision}"

[tracking]
trackers = []
"""


def as_timm(
    folder: Path, tuned: bool, precision: str, model_name: str, size: int, batch: int, steps: int, repeats: int
) -> dict[str, float]:
    """Return images per second of data loading alone and of training: medians after one uncounted repetition."""
    import timm
    import timm.data
    import timm.optim
    import timm.utils
    import torch
    from torch import nn

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = timm.data.create_loader(
        timm.data.create_dataset("", str(folder)), (3, size, size), batch, is_training=True, color_jitter=0,
        num_workers=max(1, len(os.sched_getaffinity(0)) - 1) if tuned else 4, device=device,
    )  # fmt: skip
    layout = torch.channels_last if tuned else torch.contiguous_format
    model = timm.create_model(model_name, num_classes=102).to(device, memory_format=layout)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9)
    loss_of, losses = nn.CrossEntropyLoss(), timm.utils.AverageMeter()
    model.train()

    def endless() -> Any:
        while True:
            yield from loader

    batches, rates = endless(), {"data": [], "step": []}
    for name, found in rates.items():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            for number in range(steps):
                images, labels = next(batches)
                images = images.contiguous(memory_format=layout)
                if name == "data":
                    continue
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = loss_of(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if number % 50 == 0:  # its log interval
                    losses.update(loss.item(), len(images))
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(steps * batch / (time.perf_counter() - began))
    return {f"{name}_images_per_s": statistics.median(found[1:]) for name, found in rates.items()}


def toolkit_bench(recipe: Path, steps: int, repeats: int) -> dict[str, float]:
    """Return the same for the toolkit."""
    command = [sys.executable, "-m", "toolkit", "bench", str(recipe), "--json"]
    command += ["--steps", str(steps), "--repeats", str(repeats)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in ("data_images_per_s", "step_images_per_s")}


def main() -> None:
    """Parse the command line, measure in turns, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that contains caltech101")
    parser.add_argument("--model", default="mobilenetv3_small_100")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--only-timm", choices=["defaults", "tuned"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    measured = arguments.steps, arguments.repeats
    if arguments.only_timm:
        folder = arguments.data / "caltech101" / "101_ObjectCategories"
        how = arguments.only_timm == "tuned", arguments.precision
        print(json.dumps(as_timm(folder, *how, arguments.model, arguments.size, arguments.batch, *measured)))
        return
    found: dict[str, list[dict[str, float]]] = {"toolkit": [], "timm, defaults": [], "timm, tuned": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TOOLKIT_CACHE"] = f"{folder}/cache"
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(
            RECIPE.format(
                data=arguments.data.absolute(),
                size=arguments.size,
                model=arguments.model,
                batch=arguments.batch,
                precision=arguments.precision,
            )
        )
        toolkit_bench(recipe, 1, 1)  # builds the cache
        for _ in range(arguments.rounds):
            found["toolkit"].append(toolkit_bench(recipe, *measured))
            for how in ("defaults", "tuned"):
                command = [sys.executable, *sys.argv, "--only-timm", how]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[f"timm, {how}"].append(json.loads(done.stdout.splitlines()[-1]))
    ratios = {
        f"toolkit / {way}: {name}": statistics.median(
            ours[name] / theirs[name] for ours, theirs in zip(found["toolkit"], found[way], strict=True)
        )
        for way in ("timm, defaults", "timm, tuned")
        for name in ("data_images_per_s", "step_images_per_s")
    }
    print(json.dumps({**found, "median over rounds": ratios}, indent=1))


if __name__ == "__main__":
    main()
