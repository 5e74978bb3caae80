"""Who gets which image when: pure functions of (seed, epoch, step, world, rank), in numpy alone.

Three ideas hold the whole module together:

* the order of an epoch is a function of (seed, epoch) alone, so that it can be taken up anywhere;
* a step is a run of consecutive places of that order; parts (gradient accumulation) and processes only cut it up;
* randomness belongs to the *draw* (this image in this epoch), never to a worker, a process or a place in a queue.

Random numbers are raw output of a counter-based generator (Philox; Salmon et al. 2011, SC'11), whose stream numpy
guarantees, turned into permutations and choices here: the same on every platform and in every version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from toolkit.errors import UserError
from toolkit.formatting import plural

IntArray = npt.NDArray[np.int64]

_MASK = 2**64 - 1
_ORDER_STREAM = 0x6F72646572
"""Keeps the order's random numbers apart from all others of the same seed ("order" in ASCII)."""


def hash64(*key: int) -> int:
    """A well mixed number in 0..2**64-1 from integers: SplitMix64's finaliser (Steele et al. 2014), chained."""
    state = 0
    for part in key:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def keyed_bits(n: int, *key: int) -> npt.NDArray[np.uint64]:
    """n random 64-bit numbers, a function of the key alone: uint64 [n]."""
    bits: npt.NDArray[np.uint64] = np.random.Philox(key=[hash64(*key), hash64(*key, 1)]).random_raw(n)
    return bits


def keyed_uniform(n: int, *key: int) -> npt.NDArray[np.float64]:
    """n random numbers in [0, 1), a function of the key alone: float64 [n]."""
    return (keyed_bits(n, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(n: int, *key: int) -> IntArray:
    """0..n-1 in random order, a function of the key alone: int64 [n]."""
    order: IntArray = np.argsort(keyed_bits(n, *key), kind="stable").astype(np.int64, copy=False)
    return order


def epoch_order(seed: int, epoch: int, size: int, weights: npt.NDArray[np.float64] | None = None) -> IntArray:
    """Positions 0..size-1 of the training split in the order of one epoch: int64 [size].

    Without weights every position comes once; with weights (float [size], not negative) positions are drawn with
    replacement in proportion to them.
    """
    if weights is None:
        return keyed_permutation(size, _ORDER_STREAM, seed, epoch)
    cumulative = np.cumsum(weights, dtype=np.float64)
    points = keyed_uniform(size, _ORDER_STREAM, seed, epoch) * cumulative[-1]
    drawn: IntArray = np.searchsorted(cumulative, points, side="right").clip(max=size - 1).astype(np.int64)
    return drawn


def balanced_weights(labels: IntArray) -> npt.NDArray[np.float64]:
    """Weights that draw every class equally often: one over the number of images of the image's class, [N]."""
    weights: npt.NDArray[np.float64] = 1.0 / np.bincount(labels)[labels]
    return weights


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward and backward pass of one process."""

    step: int
    """Optimiser step within the epoch, from 0."""
    part: int
    """Accumulation part of the step, from 0."""
    is_last: bool
    """Whether this is the step's last part: the optimiser steps after it."""
    positions: IntArray
    """Places in the epoch's order that this process loads; the first ``own`` are its own examples, the rest are only
    partners to mix with."""
    own: int
    """How many examples this process trains on."""
    partners: IntArray | None
    """For each own example the index into ``positions`` of the one it is mixed with; None without mixing."""
    step_count: int
    """Images in the whole step, over all parts and processes."""
    replicated: bool
    """True where the part has fewer images than there are processes: then every process gets all of it."""


def steps_per_epoch(n: int, batch_size: int, drop_last: bool) -> int:
    """Optimiser steps in an epoch of n images."""
    return n // batch_size if drop_last else -(-n // batch_size)


def plan_epoch(
    n: int,
    *,
    batch_size: int,
    grad_accum_steps: int,
    drop_last: bool,
    world: int,
    rank: int,
    mixing: bool,
    first_step: int = 0,
) -> Iterator[MicroBatch]:
    """What process ``rank`` of ``world`` does in an epoch of n places, from optimiser step ``first_step`` on.

    Step s is the places s*batch_size and on. It is cut into ``accumulation`` parts (fewer where there are fewer
    images), each part among the processes, as evenly as whole images allow. Place p of a step is mixed with its
    neighbour p^1 (the last of an odd step with itself), whatever part or process that one belongs to: the pairs do
    not depend on accumulation or the number of processes.
    """
    for step in range(first_step, steps_per_epoch(n, batch_size, drop_last)):
        start = step * batch_size
        count = min(batch_size, n - start)
        parts = min(grad_accum_steps, count)
        for part in range(parts):
            low, high = count * part // parts, count * (part + 1) // parts
            replicated = high - low < world
            if not replicated:
                low, high = low + (high - low) * rank // world, low + (high - low) * (rank + 1) // world
            loaded, partners = _with_partners(low, high, count) if mixing else (np.arange(low, high), None)
            yield MicroBatch(step, part, part == parts - 1, start + loaded, high - low, partners, count, replicated)


def _with_partners(low: int, high: int, count: int) -> tuple[IntArray, IntArray]:
    """Places low..high-1 of a step of ``count`` images with the partners missing among them; index of each partner."""
    own = np.arange(low, high, dtype=np.int64)
    partner = own ^ 1
    partner[partner >= count] = count - 1
    outside = np.unique(partner[(partner < low) | (partner >= high)])
    loaded = np.concatenate([own, outside])
    where = np.where((partner >= low) & (partner < high), partner - low, len(own) + np.searchsorted(outside, partner))
    return loaded, where.astype(np.int64)


def plan_evaluation(n: int, batch_size: int, world: int, rank: int) -> list[IntArray]:
    """Batches of positions 0..n-1 for one process; over all processes every position comes exactly once.

    ``batch_size`` counts images over all processes. Each process gets one contiguous range; numbers of batches may
    differ, and may be 0, so that no collective may stand in a loop over them.
    """
    low, high, local = n * rank // world, n * (rank + 1) // world, max(1, batch_size // world)
    return [np.arange(start, min(start + local, high), dtype=np.int64) for start in range(low, high, local)]


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """All that the order of training depends on."""

    size: int
    """Images of the training split."""
    seed: int
    batch_size: int
    """Images per optimiser step, over all processes and parts."""
    grad_accum_steps: int = 1
    drop_last: bool = False
    world: int = 1
    rank: int = 0
    mixing: bool = False
    weights: npt.NDArray[np.float64] | None = None
    """For sampling with replacement, see :func:`epoch_order`."""
    views: int | None = None
    """How many different augmented versions there are of each image; None: a new one each time."""

    @property
    def steps(self) -> int:
        """Optimiser steps in an epoch."""
        return steps_per_epoch(self.size, self.batch_size, self.drop_last)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, IntArray, IntArray]]:
        """Micro-batches of this process, each with positions in the split and draws of all it loads, int64 [m].

        A draw identifies an image's appearance within the epoch, and keys its augmentation: the position itself
        where every image comes once, else the size plus the place.
        """
        order = epoch_order(self.seed, epoch, self.size, self.weights)
        micro_batches = plan_epoch(
            self.size,
            batch_size=self.batch_size,
            grad_accum_steps=self.grad_accum_steps,
            drop_last=self.drop_last,
            world=self.world,
            rank=self.rank,
            mixing=self.mixing,
            first_step=first_step,
        )
        for micro in micro_batches:
            positions = order[micro.positions]
            yield micro, positions, positions if self.weights is None else self.size + micro.positions

    def view(self, epoch: int) -> int:
        """What keys the augmentation of an epoch, with the seed and :meth:`appearances`."""
        return epoch if self.views is None else epoch % self.views

    def augmentation_ids(self, positions: IntArray, draws: IntArray) -> IntArray:
        """What keys the augmentation of each example of an epoch: with views the image alone."""
        return draws if self.views is None else positions


def check_batch_size(batch_size: int, world: int, grad_accum_steps: int) -> None:
    """Raise UserError where a batch does not divide evenly among processes and accumulation parts."""
    unit = world * grad_accum_steps
    if batch_size % unit == 0:
        return
    below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
    nearest = f"{below} or {above}" if below else str(above)
    raise UserError(
        f"train.batch_size = {batch_size} cannot be divided evenly among {plural(world, 'process', 'processes')} x "
        f"{plural(grad_accum_steps, 'accumulation step')}: it must be a multiple of {unit}; the nearest are "
        f"{nearest}"
    )


def check_steps(n: int, batch_size: int, drop_last: bool) -> None:
    """Raise UserError where an epoch would have no step."""
    if steps_per_epoch(n, batch_size, drop_last) == 0:
        raise UserError(
            f"train.drop_last = true leaves nothing to train on: {n} training images are fewer than one batch of "
            f"{batch_size}; set train.batch_size to {n} or less, or train.drop_last to false"
        )
