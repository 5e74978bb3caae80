"""Sampling order of training and evaluation: pure functions of (seed, epoch, step, world, rank), in NumPy alone.

Three principles:

* the order of an epoch depends only on (seed, epoch), so training can resume anywhere;
* a step is a range of consecutive indices in that order, which accumulation steps and processes only subdivide;
* randomness is keyed by the *draw* (this image in this epoch), never by a worker, a process or a position in a queue.

Random numbers are the raw output of a counter-based generator (Philox; Salmon et al. 2011, SC'11), whose stream NumPy
guarantees. Permutations and choices are derived from it here, so they are the same on every platform and version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from toolkit.errors import UserError
from toolkit.formatting import plural

if TYPE_CHECKING:
    from toolkit.recipe.schema import TrainConfig

IntArray = npt.NDArray[np.int64]

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""SplitMix64's increment."""

_MASK = 2**64 - 1
_ORDER_STREAM = 0x6F72646572
"""Key constant that makes the order independent of all other random numbers with the same seed ("order" in ASCII)."""
_SHARD_STREAM = 0x736861726473
"""The same constant for the order of the shards ("shards" in ASCII)."""


def hash64(*key: int) -> int:
    """Hash integers to a number in 0..2**64-1 with SplitMix64's finalizer (Steele et al. 2014), chained."""
    state = 0
    for part in key:
        state = (state + part + GOLDEN_GAMMA) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def finalize64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply SplitMix64's finalizer to each number; ``hash64(k) == finalize64(k + GOLDEN_GAMMA)``, modulo 2**64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def keyed_bits(n: int, *key: int) -> npt.NDArray[np.uint64]:
    """Return n random 64-bit numbers that depend only on the key: uint64 [n]."""
    bits: npt.NDArray[np.uint64] = np.random.Philox(key=[hash64(*key), hash64(*key, 1)]).random_raw(n)
    return bits


def keyed_uniform(n: int, *key: int) -> npt.NDArray[np.float64]:
    """Return n random numbers in [0, 1) that depend only on the key: float64 [n]."""
    return (keyed_bits(n, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(n: int, *key: int) -> IntArray:
    """Return 0..n-1 in a random order that depends only on the key: int64 [n]."""
    order: IntArray = np.argsort(keyed_bits(n, *key), kind="stable").astype(np.int64, copy=False)
    return order


def epoch_order(seed: int, epoch: int, size: int, weights: npt.NDArray[np.float64] | None = None) -> IntArray:
    """Return positions 0..size-1 of the training split in the order of one epoch: int64 [size].

    Without weights every position occurs once. With weights (float [size], not negative) positions are drawn with
    replacement, with probabilities proportional to the weights.
    """
    if weights is None:
        return keyed_permutation(size, _ORDER_STREAM, seed, epoch)
    cumulative = np.cumsum(weights, dtype=np.float64)
    points = keyed_uniform(size, _ORDER_STREAM, seed, epoch) * cumulative[-1]
    drawn: IntArray = np.searchsorted(cumulative, points, side="right").clip(max=size - 1).astype(np.int64)
    return drawn


def repeat_images(order: IntArray, times: int) -> IntArray:
    """Return an order of the same length in which each image occurs ``times`` times, close together, int64 [size].

    For repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335; torchvision's RASampler): only the first
    1 / ``times`` of ``order`` is used, rounded up to whole pairs. Two images alternate until each has occurred
    ``times`` times, so that :func:`plan_epoch` never mixes an image with itself. The last pair may be incomplete.
    """
    size = len(order)
    pairs = -(-size // (2 * times))
    repeated: IntArray = np.repeat(order[: 2 * pairs].reshape(-1, min(2, size)), times, axis=0).reshape(-1)[:size]
    return repeated


def limit_to_shards(order: IntArray, shards: IntArray, at_once: int, seed: int, epoch: int) -> IntArray:
    """Reorder an epoch so that only about ``at_once`` shards are read at any time; return the positions, int64 [size].

    ``order``: positions in random order, from :func:`epoch_order`. ``shards``: shard of each position, int64 [size].

    The shards start one after another, in a random order, and the images of each are spread evenly over the time in
    which ``at_once`` shards start; those of the last shards wrap around to the start of the epoch. So at any point of
    the epoch, two images of a batch come from the same shard with a probability of about 1 / ``at_once``, and all but
    ``at_once`` shards are needed during one contiguous part of the epoch. If ``at_once`` is the number of all shards,
    the order is uniformly random.
    """
    numbers, own = np.unique(shards, return_inverse=True)
    turns = keyed_permutation(len(numbers), _SHARD_STREAM, seed, epoch)[own[order]]
    late = keyed_uniform(len(order), _SHARD_STREAM, seed, epoch, 1) * min(at_once, len(numbers))
    limited: IntArray = order[np.argsort((turns + late) % len(numbers), kind="stable")]
    return limited


def balanced_weights(labels: IntArray) -> npt.NDArray[np.float64]:
    """Return weights that sample every class equally often: 1 / (number of images of the image's class), [N]."""
    weights: npt.NDArray[np.float64] = 1.0 / np.bincount(labels)[labels]
    return weights


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The examples of one forward and backward pass of one process."""

    step: int
    """Optimizer step within the epoch, from 0."""
    part: int
    """Accumulation step within the optimizer step, from 0; or the number of the virtual process, from 0."""
    is_last: bool
    """Whether this is the last micro-batch of this process in the step, after which the optimizer takes its step."""
    positions: IntArray
    """Indices in the epoch's order that this process loads; the first ``own`` are its own examples, the rest only serve
    as partners for mixup or CutMix."""
    own: int
    """Number of examples that this process trains on."""
    partners: IntArray | None
    """For each own example, the index into ``positions`` of its mixing partner; None without mixing."""
    step_count: int
    """Number of images in the whole optimizer step, over all accumulation steps and processes."""
    replicated: bool
    """True if the accumulation step has fewer images than there are processes: every process then gets all of them."""


def steps_per_epoch(n: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of optimizer steps in an epoch of n images."""
    return n // batch_size if drop_last else -(-n // batch_size)


@dataclass(frozen=True)
class RunLength:
    """Number of optimizer steps and epochs of a run, whose last epoch may end early."""

    steps_per_epoch: int
    steps: int
    """Optimizer steps of the whole run."""

    @property
    def epochs(self) -> int:
        """Number of epochs, including the last one, which may end early."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def exact_epochs(self) -> float:
        """Number of epochs as a fraction: 9.9 if the last of 10 epochs ends after nine tenths of its steps."""
        return self.steps / self.steps_per_epoch

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps in an epoch, counted from 0."""
        return self.steps - epoch * self.steps_per_epoch if epoch == self.epochs - 1 else self.steps_per_epoch

    def steps_until(self, epoch: int) -> int:
        """Return the number of optimizer steps in the first ``epoch`` epochs."""
        return min(epoch * self.steps_per_epoch, self.steps)


def run_length(train: TrainConfig, images: int) -> RunLength:
    """Return the length of a run, given its number of training images.

    A fraction of an epoch is rounded up to whole steps.
    """
    per_epoch = steps_per_epoch(images, train.batch_size, train.drop_last)
    if train.epochs is None:
        return RunLength(per_epoch, train.steps or 0)
    return RunLength(per_epoch, max(1, math.ceil(round(train.epochs * per_epoch, 6))))


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
    steps: int | None = None,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of process ``rank`` of ``world`` in an epoch of n images, starting at ``first_step``.

    ``steps``: number of optimizer steps after which the epoch ends; None: all.

    Optimizer step s consists of ``batch_size`` consecutive indices in the epoch's order from s * batch_size on. It is
    divided into ``grad_accum_steps`` accumulation steps (fewer if it has fewer images), and each of these among the
    processes, as evenly as whole images allow. With ``mixing``, index p of a step is mixed with its neighbor p^1 (the
    last index of an odd step with itself), whatever accumulation step or process that belongs to, so the pairs depend
    neither on accumulation nor on the number of processes.
    """
    for step in range(first_step, steps_per_epoch(n, batch_size, drop_last) if steps is None else steps):
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
    """Return indices low..high-1 of a step of ``count`` images plus any partners outside, and each partner's index."""
    own = np.arange(low, high, dtype=np.int64)
    partner = own ^ 1
    partner[partner >= count] = count - 1
    outside = np.unique(partner[(partner < low) | (partner >= high)])
    loaded = np.concatenate([own, outside])
    where = np.where((partner >= low) & (partner < high), partner - low, len(own) + np.searchsorted(outside, partner))
    return loaded, where.astype(np.int64)


def own_range(virtual: int, world: int, rank: int) -> tuple[int, int]:
    """Return the virtual processes low..high-1 of ``virtual`` that process ``rank`` of ``world`` computes."""
    return virtual * rank // world, virtual * (rank + 1) // world


def plan_evaluation(n: int, batch_size: int, world: int, rank: int, virtual: int | None = None) -> list[IntArray]:
    """Return one process's batches of positions 0..n-1; over all processes every position occurs exactly once.

    ``batch_size`` counts images over all processes. Each process gets one contiguous range. The number of batches may
    differ between processes and may be 0, so a loop over them must not contain a collective. With ``virtual``, a
    process gets the batches of its virtual processes, so that no batch depends on the number of processes.
    """
    if virtual is not None:
        own = range(*own_range(virtual, world, rank))
        return [batch for one in own for batch in plan_evaluation(n, batch_size, virtual, one)]
    low, high, local = n * rank // world, n * (rank + 1) // world, max(1, batch_size // world)
    return [np.arange(start, min(start + local, high), dtype=np.int64) for start in range(low, high, local)]


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """Everything that the training order depends on."""

    size: int
    """Number of images in the training split."""
    seed: int
    batch_size: int
    """Number of images per optimizer step, over all processes and accumulation steps."""
    grad_accum_steps: int = 1
    virtual: int | None = None
    """Number of virtual processes, see :mod:`toolkit.distributed.virtual_processes`; None: they are not used."""
    drop_last: bool = False
    world: int = 1
    rank: int = 0
    mixing: bool = False
    weights: npt.NDArray[np.float64] | None = None
    """Sampling weights, see :func:`epoch_order`; None: every image once per epoch."""
    repeats: int = 1
    """How often each image of an epoch occurs in it, see :func:`repeat_images`."""
    views: int | None = None
    """Number of different augmented versions of each image; None: a new one each time."""
    shards: IntArray | None = None
    """Shard of each position, int64 [size], if the order is limited to a few at a time by :func:`limit_to_shards`."""
    shards_at_once: int = 1
    length: RunLength | None = None
    """Length of the run, whose last epoch may end early; None: all epochs are whole."""

    @property
    def steps(self) -> int:
        """Number of optimizer steps per epoch."""
        return steps_per_epoch(self.size, self.batch_size, self.drop_last)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, IntArray, IntArray]]:
        """Yield this process's micro-batches, each with the positions in the split and the draws it loads, int64 [m].

        A draw identifies one appearance of an image within the epoch, and keys its augmentation. It is the position
        itself if every image occurs once, else ``size`` plus the index in the epoch's order, so that an image that
        occurs more than once is augmented differently each time.
        """
        order = epoch_order(self.seed, epoch, self.size, self.weights)
        if self.shards is not None:
            order = limit_to_shards(order, self.shards, self.shards_at_once, self.seed, epoch)
        order = order if self.repeats == 1 else repeat_images(order, self.repeats)
        occurs_once = self.weights is None and self.repeats == 1
        micro_batches = plan_epoch(
            self.size,
            batch_size=self.batch_size,
            grad_accum_steps=self.virtual or self.grad_accum_steps,
            drop_last=self.drop_last,
            world=1 if self.virtual else self.world,
            rank=0 if self.virtual else self.rank,
            mixing=self.mixing,
            first_step=first_step,
            steps=None if self.length is None else self.length.steps_in(epoch),
        )
        for micro in self._own(micro_batches) if self.virtual else micro_batches:
            positions = order[micro.positions]
            yield micro, positions, positions if occurs_once else self.size + micro.positions

    def _own(self, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of the virtual processes that this process computes."""
        assert self.virtual is not None
        low, high = own_range(self.virtual, self.world, self.rank)
        for micro in micro_batches:
            if low <= micro.part < high:
                yield replace(micro, is_last=micro.part == high - 1)

    def view(self, epoch: int) -> int:
        """Return the number that keys an epoch's augmentation, along with the seed and :meth:`augmentation_ids`."""
        return epoch if self.views is None else epoch % self.views

    def augmentation_ids(self, positions: IntArray, draws: IntArray) -> IntArray:
        """Return the random-number key of each example's augmentation: its draw or, with ``views``, its position."""
        return draws if self.views is None else positions


def check_batch_size(train: TrainConfig, world: int) -> None:
    """Raise UserError if a batch does not divide evenly among processes and accumulation steps."""
    parts, virtual = train.min_accum_steps, train.virtual_processes
    if virtual is not None and world > virtual:
        raise UserError(
            f"train.virtual_processes = {virtual} is less than the number of processes, {world}: start at most "
            f"{virtual}"
        )
    unit = virtual or world * parts
    if train.batch_size % unit == 0:
        return
    below, above = train.batch_size // unit * unit, -(-train.batch_size // unit) * unit
    nearest = f"{below} or {above}" if below else str(above)
    among = f"{plural(world, 'process', 'processes')} x {plural(parts, 'accumulation step')}"
    raise UserError(
        f"train.batch_size = {train.batch_size} cannot be divided evenly among "
        f"{f'{virtual} virtual processes' if virtual else among}: it must be a multiple of {unit}; the nearest are "
        f"{nearest}"
    )


def check_steps(n: int, train: TrainConfig) -> None:
    """Raise UserError if an epoch of n images would have no steps, or a step with too few images."""
    if steps_per_epoch(n, train.batch_size, train.drop_last) == 0:
        raise UserError(
            f"train.drop_last = true leaves nothing to train on: {n} training images are fewer than one batch of "
            f"{train.batch_size}; set train.batch_size to {n} or less, or train.drop_last to false"
        )
    last, virtual = n % train.batch_size, train.virtual_processes
    if virtual is not None and 0 < last < virtual and not train.drop_last:
        raise UserError(
            f"the last batch of an epoch has {plural(last, 'image')}, fewer than train.virtual_processes = {virtual}; "
            "set train.drop_last = true, or another train.batch_size"
        )
