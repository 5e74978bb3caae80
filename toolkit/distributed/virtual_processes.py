"""Gradients of a fixed number of virtual processes, bit-identical on any number of real processes.

Each step's batch is divided among the virtual processes; a real process computes several of them, one after the other.
Their gradients, and the running statistics of batch norm, are summed in the order of one binary tree, whatever the
number of real processes: along the tree within a process, then in chunks of which each process sums one. The idea of
virtual workers is that of VirtualFlow (Or et al. 2022, arXiv:2009.09523) and EasyScale (Li et al. 2023,
arXiv:2208.14228).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.data.sampling import own_range

Node = tuple[int, int]
"""A node of the tree: the sum over the virtual processes low..high-1."""


def middle(node: Node) -> int:
    """Return where a node with more than one virtual process is divided into its two children."""
    return (node[0] + node[1]) // 2


def largest_nodes(node: Node, low: int, high: int) -> Iterator[Node]:
    """Yield the largest nodes at or below ``node`` that lie within low..high-1, in order."""
    if low <= node[0] and node[1] <= high:
        yield node
    elif node[0] < high and low < node[1]:
        yield from largest_nodes((node[0], middle(node)), low, high)
        yield from largest_nodes((middle(node), node[1]), low, high)


class TreeSum:
    """Sum of each virtual process's list of tensors, bit-identical on any number of real processes."""

    def __init__(self, count: int, world: int, rank: int) -> None:
        """``count``: number of virtual processes, at least ``world``."""
        self.root, self.world, self.rank = (0, count), world, rank
        self.nodes = [list(largest_nodes(self.root, *own_range(count, world, r))) for r in range(world)]
        """The nodes that each process sums on its own."""
        self.partial: list[tuple[Node, list[Tensor]]] = []

    def add(self, index: int, tensors: list[Tensor]) -> None:
        """Add the tensors of virtual process ``index``; call in ascending order. They may be modified later."""
        self.partial.append(((index, index + 1), tensors))
        while len(self.partial) > 1:
            (left, first), (right, second) = self.partial[-2:]
            parent = left[0], right[1]
            if parent not in largest_nodes(self.root, *parent) or middle(parent) != left[1]:
                break
            torch._foreach_add_(first, second)
            self.partial[-2:] = [(parent, first)]

    def total(self) -> list[Tensor]:
        """Return the sums over all virtual processes, and begin new sums (a collective)."""
        partial, self.partial = self.partial, []
        assert [node for node, _ in partial] == self.nodes[self.rank], "some virtual processes were not added"
        if self.world == 1:
            return partial[0][1]
        whole = self._exchange(torch.stack([torch.cat([one.flatten() for one in tensors]) for _, tensors in partial]))
        shapes = [one.shape for one in partial[0][1]]
        parts = whole.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _exchange(self, own: Tensor) -> Tensor:
        """Return the sum of all nodes, [n], given this process's nodes, [m, n] (a collective)."""
        size, chunk = own.shape[1], -(-own.shape[1] // self.world)
        padded = nn.functional.pad(own, (0, chunk * self.world - size))
        to_send = padded.view(len(own), self.world, chunk).transpose(0, 1).reshape(-1, chunk)
        counts = [len(of_rank) for of_rank in self.nodes]
        received = own.new_empty(sum(counts), chunk)
        dist.all_to_all_single(received, to_send, counts, [len(own)] * self.world)
        known = dict(zip(itertools.chain(*self.nodes), received, strict=True))
        whole = own.new_empty(self.world * chunk)
        dist.all_gather_into_tensor(whole, _tree_sum(self.root, known))
        return whole[:size]


def _tree_sum(node: Node, known: dict[Node, Tensor]) -> Tensor:
    """Return the sum at a node, given the sums of nodes below it."""
    if node in known:
        return known[node]
    return _tree_sum((node[0], middle(node)), known) + _tree_sum((middle(node), node[1]), known)


class VirtualProcesses:
    """The virtual processes that this process computes in each step; the trained module has no DDP wrapper."""

    def __init__(self, module: nn.Module, count: int, world: int, rank: int) -> None:
        """Copy the state of ``module`` from the first process to all others (a collective)."""
        self.module, self.count = module, count
        self.sum = TreeSum(count, world, rank)
        self.start: list[Tensor] = []
        """Batch norm's buffers before the step, in the order of :meth:`_buffers`; empty between steps."""
        for tensor in [*module.parameters(), *module.buffers()] if world > 1 else ():
            dist.broadcast(tensor.data, 0)

    def begin(self) -> None:
        """Call before the forward pass of each virtual process: all of them start from the same statistics."""
        if not self.start:
            self.start = [buffer.clone() for buffer in self._buffers()]
        for buffer, start in zip(self._buffers(), self.start, strict=True):
            buffer.copy_(start)

    @torch.no_grad()
    def end(self, index: int) -> None:
        """Call after the backward pass of virtual process ``index``: adds its gradients to the sum and clears them."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters()]
        self.sum.add(index, [*gradients, *(buffer.clone() for buffer in self._statistics())])
        self.module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Set the summed gradients and the mean running statistics of all virtual processes (a collective).

        Batch norm's counters of batches are not summed: each one has increased by 1 in every virtual process.
        """
        parameters, total = self._parameters(), self.sum.total()
        for parameter, gradient in zip(parameters, total, strict=False):
            parameter.grad = torch.empty_like(parameter).copy_(gradient) if self.sum.world > 1 else gradient
        for buffer, summed in zip(self._statistics(), total[len(parameters) :], strict=True):
            buffer.copy_(summed / self.count)
        self.start = []

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _buffers(self) -> list[Tensor]:
        """Return the running statistics and counters of the batch norms that are updated in training."""
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]

    def _statistics(self) -> list[Tensor]:
        return [buffer for buffer in self._buffers() if buffer.is_floating_point()]
