"""Measure the accuracy of batch norm on a CPU in channels_last, and its cost in ResNet18's training step at 224 pixels.

Three implementations: PyTorch's channels_last kernel; PyTorch's contiguous kernel, with a copy before and after it; the
toolkit's. They take turns at every step, and ratios are of CPU time, so that a busy machine favors none.

    python benchmarks/batchnorm.py [--batch-size 32] [--rounds 15] [--threads 1] [--bf16]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.distributed.batchnorm import SyncBatchNorm
from toolkit.distributed.malloc import tune_malloc

WAYS = ("pytorch", "contiguous", "toolkit")
SHAPES = ((64, 32, 8, 8), (32, 64, 112, 112))
"""[n, C, h, w] at which exactness is measured: the quickstart's first layer, and ResNet18's."""


class Norm(SyncBatchNorm):
    """Batch norm in one of the three implementations."""

    way = "toolkit"

    def forward(self, input: Tensor) -> Tensor:
        """Map [n, C, h, w] to the same shape."""
        if Norm.way == "pytorch":
            return _BatchNorm.forward(self, input)
        if Norm.way == "contiguous":
            return _BatchNorm.forward(self, input.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(input)


def errors(shape: tuple[int, ...]) -> None:
    """Print the largest error of each implementation compared with float64, relative to the largest value."""
    torch.manual_seed(0)
    x, gradient = torch.randn(shape) * 2 + 1, torch.randn(shape) + 0.3

    def results(dtype: torch.dtype) -> list[Tensor]:
        norm = Norm(shape[1], dtype=dtype)
        leaf = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        out = norm(leaf)
        out.backward(gradient.to(dtype).contiguous(memory_format=torch.channels_last))
        return [each.double() for each in (out.detach(), leaf.grad, norm.weight.grad)]

    Norm.way = "contiguous"
    expected = results(torch.float64)
    for way in WAYS:
        Norm.way = way
        pairs = zip(results(torch.float32), expected, strict=True)
        found = [f"{((mine - true).abs().max() / true.abs().max()).item():.0e}" for mine, true in pairs]
        print(f"{list(shape)} {way:10}  output {found[0]}  input gradient {found[1]}  weight gradient {found[2]}")


def main() -> None:
    """Parse the command line and print errors and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()
    for shape in SHAPES:
        errors(shape)

    model = torchvision.models.resnet18(norm_layer=Norm).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(args.batch_size, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (args.batch_size,))

    def step(way: str) -> float:
        """Return the CPU seconds of one training step."""
        Norm.way = way
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - began

    for way in WAYS:
        step(way)
    seconds = [{way: step(way) for way in WAYS} for _ in range(args.rounds)]
    for way in WAYS:
        ratios = [each[way] / each["pytorch"] for each in seconds]
        fastest = min(each[way] for each in seconds)
        quartiles = statistics.quantiles(ratios, n=4)
        print(
            f"{way:10}  fastest {fastest:.3f} CPU s a step; against pytorch {quartiles[1]:.3f} "
            f"(quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})"
        )


if __name__ == "__main__":
    main()
