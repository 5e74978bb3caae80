"""Simulate the time of a DDP step on many GPUs from compute, gradient bytes and links; compare it with measurements.

    python benchmarks/ddp_model.py predict                       # the tables of docs/scaling.md
    python benchmarks/ddp_model.py predict --images-per-s 2500   # with your GPU's own speed (toolkit bench RECIPE)
    torchrun --nproc_per_node 2 benchmarks/ddp_model.py check    # two CPU processes, measured and predicted

DDP (Li et al. 2020, arXiv:2006.15704) sums gradients in buckets, from the last layer to the first, during the backward
pass. The simulation models two queues: the layers' backward passes produce gradients, and the link sums one bucket
after the other. Summing B bytes over N processes in a ring moves 2 (N - 1) / N x B through each link and takes 2 (N -
1) steps of latency; with several GPUs per node NCCL sums within the node, between the nodes and within the node again,
each GPU's share over its own network card.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

BUCKET_BYTES = (2**20, 25 * 2**20)
"""DDP's first bucket and the others."""

BACKWARD = 2 / 3
"""Share of a step's arithmetic that is the backward pass: two of three matrix products of a layer."""


@dataclass(frozen=True)
class Layer:
    """A module with direct parameters: bytes of its gradient (float32) and its share of the model's arithmetic."""

    bytes: int
    share: float


@dataclass(frozen=True)
class Link:
    """A link from one process to one peer at a time: bytes per second, and seconds before the first byte."""

    bandwidth: float
    latency: float

    def all_reduce(self, count: int, processes: int) -> float:
        """Return the seconds to sum ``count`` bytes over several processes in a ring."""
        if processes == 1:
            return 0.0
        return 2 * (processes - 1) / processes * count / self.bandwidth + 2 * (processes - 1) * self.latency


@dataclass(frozen=True)
class Cluster:
    """A cluster of nodes with several GPUs each; ``outer`` is one GPU's share of its node's network."""

    gpus_per_node: int
    inner: Link
    outer: Link

    def all_reduce(self, count: int, gpus: int) -> float:
        """Return the seconds to sum ``count`` bytes over several GPUs: in the node, between nodes, in the node."""
        local = min(gpus, self.gpus_per_node)
        return self.inner.all_reduce(count, local) + self.outer.all_reduce(count // local, max(1, gpus // local))


def layers_of(name: str, size: int = 224) -> list[Layer]:
    """Return the layers of a timm model in the order of its forward pass, with their shares of its arithmetic."""
    with torch.device("meta"):
        model = timm.create_model(name)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.empty(1, 3, size, size))
    counts = counter.get_flop_counts()
    whole = sum(counts["Global"].values())
    prefix = type(model).__name__
    found = []
    for path, module in model.named_modules():
        own = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        if own:
            found.append(Layer(own, sum(counts.get(f"{prefix}.{path}", {}).values()) / whole))
    return found


def buckets_of(layers: list[Layer]) -> list[tuple[int, float]]:
    """Return DDP's buckets in the order in which they fill: bytes, and the share of the backward pass done by then."""
    buckets, size, done = [], 0, 0.0
    total = sum(layer.share for layer in layers) or 1.0
    for layer in reversed(layers):
        size += layer.bytes
        done += layer.share / total
        if size >= BUCKET_BYTES[1 if buckets else 0]:
            buckets.append((size, done))
            size = 0
    if size:
        buckets.append((size, 1.0))
    return buckets


def step_seconds(
    buckets: list[tuple[int, float]], compute: float, all_reduce: Callable[[int], float], *, overlaps: bool = True
) -> float:
    """Return the seconds of a step with ``compute`` seconds of compute; without ``overlaps`` sums come after it."""
    if not overlaps:
        return compute + sum(all_reduce(size) for size, _ in buckets)
    forward = compute * (1 - BACKWARD)
    free = 0.0
    for size, share in buckets:
        free = max(free, forward + compute * BACKWARD * share) + all_reduce(size)
    return max(free, compute)


# -- the tables --------------------------------------------------------------------------------------------------------

H100_NODES = Cluster(8, Link(350e9, 5e-6), Link(40e9, 15e-6))
"""Assumed: NVLink at 350 GB/s of 450, a 400 Gbit/s card for each GPU at 40 GB/s of 50."""

ETHERNET_NODES = Cluster(8, Link(350e9, 5e-6), Link(2.5e9, 30e-6))
"""Assumed: the same nodes, but eight GPUs share two 100 Gbit/s Ethernet cards: 2.5 GB/s each."""

MODELS = {"resnet50": (2500.0, 128), "vit_base_patch16_224": (1000.0, 128)}
"""Assumed images per second of one GPU in training with bf16, and images per GPU and step."""


def predict(images_per_s: float | None) -> None:
    """Print, for each model and kind of cluster, step and efficiency on 1, 8, 64 and 512 GPUs."""
    for name, (speed, batch) in MODELS.items():
        layers = layers_of(name)
        buckets = buckets_of(layers)
        compute = batch / (images_per_s or speed)
        gradient = sum(layer.bytes for layer in layers)
        print(f"\n{name}: gradient {gradient / 1e6:.1f} MB in {len(buckets)} buckets; compute {compute * 1e3:.1f} ms")
        print("| GPUs | InfiniBand: step, efficiency | Ethernet: step, efficiency | Ethernet without overlap |")
        print("| --- | --- | --- | --- |")
        for gpus in (1, 8, 64, 512):
            cells = [
                step_seconds(buckets, compute, lambda count: cluster.all_reduce(count, gpus), overlaps=overlaps)  # noqa: B023
                for cluster, overlaps in ((H100_NODES, True), (ETHERNET_NODES, True), (ETHERNET_NODES, False))
            ]
            print(f"| {gpus} | " + " | ".join(f"{c * 1e3:.1f} ms, {compute / c:.0%}" for c in cells) + " |")


# -- the check ---------------------------------------------------------------------------------------------------------


def check(name: str, size: int, batch: int, repeats: int) -> None:
    """Measure compute, link and steps of two CPU processes over gloo, and compare the steps with the prediction."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=101).to(memory_format=torch.channels_last)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 101, (batch,))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(wrapped(images), labels).backward()

    def step_without_sum() -> None:
        with wrapped.no_sync():
            step()

    compute = _median(step_without_sum, repeats)
    link = _measure_link(repeats)
    measured = _median(step, repeats)
    buckets = buckets_of(layers_of(name, size))
    results = {
        "model": name,
        "image_size": size,
        "images_per_process": batch,
        "gradient_mb": round(sum(size for size, _ in buckets) / 1e6, 1),
        "link_gb_per_s": round(link.bandwidth / 1e9, 3),
        "link_latency_us": round(link.latency * 1e6),
        "compute_ms": round(compute * 1e3, 1),
        "step_ms_measured": round(measured * 1e3, 1),
        "step_ms_predicted_with_overlap": round(1e3 * step_seconds(buckets, compute, _over(link)), 1),
        "step_ms_predicted_without": round(1e3 * step_seconds(buckets, compute, _over(link), overlaps=False), 1),
    }
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


def _over(link: Link) -> Callable[[int], float]:
    return lambda count: link.all_reduce(count, dist.get_world_size())


def _measure_link(repeats: int) -> Link:
    """Return the bandwidth, from a large sum, and the latency, from a small one."""
    small, large = torch.zeros(256), torch.zeros(25 * 2**18)
    least = _median(lambda: dist.all_reduce(small), 10 * repeats)
    most = _median(lambda: dist.all_reduce(large), repeats)
    world = dist.get_world_size()
    moved = 2 * (world - 1) / world * large.numel() * 4
    return Link(moved / max(most - least, 1e-9), least / (2 * (world - 1)))


def _median(work: Callable[[], None], repeats: int) -> float:
    """Return the median seconds of ``work`` on the slowest process."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def main() -> None:
    """Parse the command line and run the prediction or the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    predicting = commands.add_parser("predict")
    predicting.add_argument("--images-per-s", type=float, help="of one GPU, for all models; default: those assumed")
    predicting.set_defaults(run=lambda a: predict(a.images_per_s))
    checking = commands.add_parser("check")
    checking.add_argument("--model", default="resnet50")
    checking.add_argument("--size", type=int, default=96, help="image size in pixels")
    checking.add_argument("--batch", type=int, default=8, help="images of one process in a step")
    checking.add_argument("--repeats", type=int, default=15)
    checking.set_defaults(run=lambda a: check(a.model, a.size, a.batch, a.repeats))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
