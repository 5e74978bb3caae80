"""Learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3) with the training steps of a recipe.

The learning rate rises exponentially from step to step until the loss diverges. The suggestions are those of fastai:
"valley", "steepest" and "minimum". No run is written, and the trained weights are discarded.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit.data.sampling import check_batch_size
from toolkit.distributed.process import init_accelerator, leave, out_of_memory_explained
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe
from toolkit.training.console import Console, table
from toolkit.training.context import build_context
from toolkit.training.train_step import RunningMetrics, TrainCallbacks
from toolkit.training.trainer import Trainer

SMOOTHING = 0.98
"""Weight of the previous average in the moving average of the loss, as in fastai."""
DIVERGED = 4.0
"""The test ends when the average loss exceeds this multiple of its minimum, as in fastai."""
FEWEST = 8
"""Minimum number of steps for suggesting a learning rate."""
LITTLE = 0.1
"""If the average loss falls by less than this fraction, the suggestion is marked as unreliable."""
NAME = "lr_finder"


@dataclass(frozen=True)
class RangeStep:
    """One optimizer step of the range test."""

    lr: float
    """``optimizer.lr`` of the step; each layer group trains with its usual multiple of it."""
    loss: float
    """Mean training loss over the images of the step, on all processes."""
    average: float
    """Exponential moving average of the losses so far, with bias correction."""


@dataclass(frozen=True)
class RangeTest:
    """The steps of a range test and the learning rates that they suggest."""

    steps: list[RangeStep]
    diverged: bool
    """Whether the test ended before its last step because the loss diverged."""
    valley: float
    """Learning rate in the middle of the longest fall of the loss; the suggestion."""
    steepest: float
    """Learning rate at which the average loss falls fastest per step."""
    minimum: float
    """A tenth of the learning rate with the lowest average loss."""
    fall: float
    """Fraction by which the average loss fell in total, 0..1."""

    @property
    def is_reliable(self) -> bool:
        """Return whether the loss fell enough for a suggestion."""
        return self.fall >= LITTLE

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {"suggestion": rounded(self.valley), "is_reliable": self.is_reliable, **asdict(self)}


def find_lr(recipe: Recipe, *, steps: int = 100, min_lr: float = 1e-7, max_lr: float = 10.0) -> tuple[RangeTest, bool]:
    """Run a range test on the processes started by a launcher (a collective).

    Trains up to ``steps`` optimizer steps from the recipe's initial weights. Instead of following the schedule,
    optimizer.lr rises exponentially from ``min_lr`` to ``max_lr``. Inputs have data.image_size, also in recipes with
    progressive sizes; with transfer.mode = "lp_ft", everything is trained, without the probe.
    Returns the result, equal on all processes, and whether this is the main process. Raises UserError if
    ``min_lr`` is not below ``max_lr`` or the loss diverges within the first steps.
    """
    if not 0 < min_lr < max_lr < math.inf:
        raise UserError(f"the learning rate must rise: {min_lr:g} to {max_lr:g} does not")
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"progressive_sizes": None}),
            "train": recipe.train.model_copy(update={"log_every": 0}),
        }
    )
    accelerator = init_accelerator(recipe.train)
    check_batch_size(recipe.train, accelerator.num_processes)
    display = Console(is_main=accelerator.is_main_process)
    if recipe.transfer.mode == "lp_ft":
        recipe = recipe.model_copy(update={"transfer": recipe.transfer.model_copy(update={"mode": "finetune"})})
        display.log('transfer.mode = "lp_ft": the test fine-tunes with a new head; the result is for optimizer.lr')
    with out_of_memory_explained(recipe.train, accelerator.num_processes):
        training = Trainer(build_context(recipe, accelerator, display), None, None, GracefulStop(), None)
        try:
            display.log(f"learning-rate range test: {min_lr:g} to {max_lr:g} in {steps} steps")
            lrs = [min_lr * (max_lr / min_lr) ** (step / (steps - 1)) for step in range(steps)]
            found = _train(training, lrs)
            leave(accelerator)
        finally:
            training.loaders.close()
    return suggest(found, planned=steps), accelerator.is_main_process


def _train(training: Trainer, lrs: Sequence[float]) -> list[RangeStep]:
    """Train one step with each learning rate, over as many epochs as needed, until the loss diverges."""
    found: list[RangeStep] = []

    def set_lr(_: float) -> None:
        for group in training.train_step.optimizer.param_groups:
            group["lr"] = lrs[len(found)] * group["lr_scale"]

    def after_step(_: int, sums: RunningMetrics) -> bool:
        loss, _accuracy = sums.metrics_since_log(training.accelerator)
        found.append(RangeStep(lrs[len(found)], loss, _average(found, loss)))
        return len(found) == len(lrs) or has_diverged(found)

    training.setup.transfer.train_mode()
    hooks = TrainCallbacks(set_lr, after_step, lambda *_: None)
    for epoch in itertools.count():
        sums = RunningMetrics.zero(training.accelerator.device, training.recipe.train.virtual_processes)
        if not training.train_step.train_epoch(training.loaders.train, epoch, 0, sums, hooks):
            return found
    raise AssertionError("unreachable")


def _average(before: Sequence[RangeStep], loss: float) -> float:
    """Return the moving average after one more loss; the bias correction divides by 1 - SMOOTHING^n."""
    count = len(before)
    total = before[-1].average * (1 - SMOOTHING**count) if before else 0.0
    return (SMOOTHING * total + (1 - SMOOTHING) * loss) / (1 - SMOOTHING ** (count + 1))


def has_diverged(steps: Sequence[RangeStep]) -> bool:
    """Return whether the last loss is not finite, or the average is more than DIVERGED times its minimum."""
    last = steps[-1]
    return not math.isfinite(last.loss) or last.average > DIVERGED * min(step.average for step in steps)


def suggest(steps: list[RangeStep], planned: int) -> RangeTest:
    """Return the suggestions; as in fastai, the first tenth of the planned steps and the last five are left out.

    Raises UserError if fewer than FEWEST steps are left.
    """
    kept = [step for step in steps if math.isfinite(step.average)]
    kept = kept[planned // 10 : -5]
    if len(kept) < FEWEST:
        raise UserError(
            f"the range test has {len(kept)} usable steps, but at least {FEWEST} are needed (the loss diverged at "
            f"learning rate {steps[-1].lr:.2g}): set a smaller --min-lr, or more --steps"
        )
    averages = [step.average for step in kept]
    lowest = min(range(len(kept)), key=averages.__getitem__)
    steepest = min(range(len(kept) - 1), key=lambda index: averages[index + 1] - averages[index])
    return RangeTest(
        steps=steps,
        diverged=has_diverged(steps),
        valley=kept[valley(averages)].lr,
        steepest=kept[steepest].lr,
        minimum=kept[lowest].lr / 10,
        fall=1 - averages[lowest] / max(averages[: lowest + 1]),
    )


def valley(losses: Sequence[float]) -> int:
    """Return the index in the middle of the longest fall: fastai's "valley".

    The fall is the longest decreasing subsequence (dynamic programming in quadratic time). fastai considers the
    interval that ends at its last element and has as many elements, and takes the middle of its middle third.
    """
    lengths = [1] * len(losses)
    for index, loss in enumerate(losses):
        lengths[index] += max((lengths[j] for j in range(index) if losses[j] > loss), default=0)
    end = lengths.index(max(lengths))
    start = end - lengths[end]
    third = (end - start) / 3
    return max(start, 0) + int(third) + int(third / 2)


def rounded(lr: float) -> float:
    """Round a learning rate to two significant digits."""
    return float(f"{lr:.2g}")


def range_test_text(result: RangeTest, recipe: Recipe, command: str) -> str:
    """Format the result for a terminal: about ten of the steps, the suggestions, and a command that uses them."""
    step = max(1, len(result.steps) // 10)
    rows = [(f"{one.lr:.2e}", f"{one.loss:.4f}", f"{one.average:.4f}") for one in result.steps[step - 1 :: step]]
    lines = [table(rows, ("optimizer.lr", "loss", "average"), frozenset((0, 1, 2))), ""]
    if result.diverged:
        lines.append(f"the loss diverged at {result.steps[-1].lr:.2g}, after {len(result.steps)} steps")
    lines += [
        f"valley    {result.valley:<8.2g} in the middle of the longest fall of the loss: the suggestion",
        f"steepest  {result.steepest:<8.2g} where the loss falls fastest",
        f"minimum   {result.minimum:<8.2g} a tenth of the learning rate with the lowest loss",
        f"recipe    {recipe.optimizer.lr:<8.2g}",
    ]
    if not result.is_reliable:
        lines.append(f"the loss fell by only {result.fall:.1%}, so the suggestion is not reliable: try more --steps")
    return "\n".join([*lines, f"to use it: {command} --set optimizer.lr={rounded(result.valley):g}"])


def write_range_test(result: RangeTest, recipe: Recipe, folder: Path, log: Callable[[str], None]) -> list[Path]:
    """Write lr_finder.csv and lr_finder.svg to ``folder`` and return their paths. Raises UserError if that fails."""
    from toolkit.report.plot_style import plot_style, save

    rows = io.StringIO(newline="")
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["step", "lr", "loss", "average"])
    writer.writerows([number, one.lr, one.loss, one.average] for number, one in enumerate(result.steps, 1))
    with plot_style(log):
        files = save(_figure(result, recipe), folder, NAME, ("svg",))
    file = folder / f"{NAME}.csv"
    file.write_text(rows.getvalue(), encoding="utf-8")
    return [file, *files]


def _figure(result: RangeTest, recipe: Recipe) -> Any:
    """Plot the loss and its average against the learning rate, with the suggestion and the recipe's value."""
    from toolkit.report.plot_style import BLUE, INK, SKY, VERMILION, fitted, labeled_axes

    title = fitted(f"{recipe.recipe.name}: learning-rate range test", 5.3)
    figure, axes = labeled_axes("learning rate (optimizer.lr)", "training loss", title, (6.3, 3.6), integers=False)
    lrs = [step.lr for step in result.steps]
    axes.set_xscale("log")
    axes.plot(lrs, [step.loss for step in result.steps], color=SKY, linewidth=1.0, label="of each step")
    axes.plot(lrs, [step.average for step in result.steps], color=BLUE, linewidth=1.6, label="moving average")
    axes.axvline(result.valley, color=VERMILION, linewidth=1.2, label=f"suggestion: {result.valley:.2g}")
    axes.axvline(recipe.optimizer.lr, color=INK, linewidth=1.0, linestyle=":", label=f"recipe: {recipe.optimizer.lr:g}")
    axes.set_ylim(0, 2 * result.steps[0].loss)  # a loss that diverges would flatten the rest
    axes.legend(loc="best")
    return figure
