"""Measure training and inference on a CPU with several settings of the C library's memory allocator.

Each setting runs in its own processes, and the settings take turns, so that a machine that changes its speed favors
none.

    python benchmarks/allocator.py [--rounds 3] [--jemalloc /usr/lib/x86_64-linux-gnu/libjemalloc.so.2]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "toolkit": {},
    "environment": {
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TRIM_THRESHOLD_": "2147483647",
        "MALLOC_TOP_PAD_": "67108864",
    },
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "toolkit + huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
}
"""Environment of each; "toolkit" calls tune_malloc; huge pages are PyTorch's own switch."""

TASKS = ("resnet18 training", "efficientnet_lite0 inference")


def child(setting: str, task: str, steps: int) -> dict[str, float]:
    """Return images per second (median over steps), page faults per image and peak resident memory of this process."""
    if "toolkit" in setting:
        from toolkit.distributed.malloc import tune_malloc

        if not tune_malloc():
            raise SystemExit("tune_malloc() does nothing here")
    import timm
    import torch

    name, kind = task.split()
    batch = 32 if kind == "training" else 64
    model: Any = timm.create_model(name).to(memory_format=torch.channels_last).train(kind == "training")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,))

    def step() -> None:
        if kind == "training":
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            with torch.inference_mode():
                model(images)

    for _ in range(2):
        step()
    faults, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "images_per_s": batch / statistics.median(seconds),
        "page_faults_per_image": (usage.ru_minflt - faults) / steps / batch,
        "memory_mb": usage.ru_maxrss / 1024,
    }


def main() -> None:
    """Parse the command line and print a table per task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--jemalloc", help="path of a library to preload, as one more setting")
    parser.add_argument("--child", nargs=2, metavar=("SETTING", "TASK"), help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child, arguments.steps)))
        return
    settings = dict(SETTINGS)
    if arguments.jemalloc:
        settings["jemalloc"] = {"LD_PRELOAD": arguments.jemalloc}
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for task in TASKS:
            for setting, variables in settings.items():
                command = [sys.executable, __file__, "--steps", str(arguments.steps), "--child", setting, task]
                done = subprocess.run(
                    command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
                )
                found.setdefault((task, setting), []).append(json.loads(done.stdout))
    for task in TASKS:
        usual = statistics.median(one["images_per_s"] for one in found[task, "default"])
        print(f"\n{task}\n| setting | images/s | ratio to default | page faults per image | memory, MB |")
        print("| --- | --- | --- | --- | --- |")
        for setting in settings:
            each = {key: statistics.median(one[key] for one in found[task, setting]) for key in found[task, setting][0]}
            print(
                f"| {setting} | {each['images_per_s']:.1f} | {each['images_per_s'] / usual:.2f} "
                f"| {each['page_faults_per_image']:,.0f} | {each['memory_mb']:,.0f} |"
            )


if __name__ == "__main__":
    main()
