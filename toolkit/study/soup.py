"""Model soups: averages of the weights of a study's finished runs (Wortsman et al. 2022, arXiv:2203.05482).

The uniform soup averages all runs. The greedy soup begins with the run that is best on validation, and adds the others
in order, each only if it does not make the validation metric worse; so it is never worse on validation than its best
member. Test images are used once, by the finished soup.

The batch norm statistics of averaged weights are not the average of the runs' statistics. Those that differ between the
runs are recomputed on the training images; those that are equal in all runs were frozen, and are kept.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.cache.frozen_features import tail_of
from toolkit.calibration import without_temperature
from toolkit.data.datasets import Dataset
from toolkit.data.splits import split_hash
from toolkit.distributed.context import distributed_context
from toolkit.distributed.process import autocast_dtype
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import UserError
from toolkit.formatting import plural
from toolkit.metrics import higher_is_better
from toolkit.recipe import Recipe
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory
from toolkit.study.soup_members import SoupMember, find_members
from toolkit.study.soup_results import FILE, FOLDER, Ingredient, Method, SoupFile
from toolkit.training.batch_norm_statistics import recompute_batch_norm
from toolkit.training.console import Console
from toolkit.training.context import build_context
from toolkit.training.env_info import describe_environment
from toolkit.training.evaluation import to_device
from toolkit.training.finalize import finish
from toolkit.training.loaders import CachePolicy
from toolkit.training.run_writer import RunWriter
from toolkit.training.train_step import RunningMetrics
from toolkit.training.trained_model import load_model
from toolkit.training.trainer import Trainer

StateDict = dict[str, Tensor]

COPIED = (
    "recipe.toml",
    "origins.json",
    "split.json",
    "checkpoints/files.safetensors",
    "checkpoints/first_layer.safetensors",
)
"""Files of the best member that also describe the soup; some may be absent."""


def make_soups(folder: StudyDirectory, rows: Sequence[str], log: Callable[[str], None]) -> None:
    """Make the uniform and the greedy soup of a study's finished runs and write them to its folder ``soup``.

    ``rows``: names of the rows whose runs are used; empty: all. Raises UserError.
    """
    warnings: list[str] = []

    def warn(line: str) -> None:
        warnings.append(line.removeprefix("warning: "))
        log(line)

    members = find_members(folder, rows, warn)
    total, changed = _sum_all(members)
    if not changed:
        raise UserError(f"all {len(members)} finished runs have the same weights, so there is nothing to average")
    log(f"averaging {len(members)} runs; the best is {members[0].title}")
    recipe = evaluated_recipe(members)
    with distributed_context(recipe.train) as accelerator:
        evaluator = SoupEvaluator(recipe, members, changed, accelerator, folder.table.output.best_by)
        with contextlib.closing(evaluator):
            single = evaluator.evaluate(_state_of(members[0]), averaged=False)
            soups: dict[Method, tuple[list[SoupMember], Candidate]] = {
                "uniform": (members, evaluator.evaluate(total.mean(), averaged=True)),
                "greedy": _greedy(members, single, evaluator, log),
            }
            for method, (used, candidate) in soups.items():
                content = SoupFile(
                    method=method,
                    metric=evaluator.metric,
                    value=candidate.value(evaluator.metric),
                    members=_ingredients(members, used, single.value(evaluator.metric), evaluator.metric),
                    recomputed_batch_norms=len(evaluator.layers) if len(used) > 1 else 0,
                    test=None,
                    warnings=warnings,
                )
                log(f"{method} soup of {plural(len(used), 'run')}: {evaluator.metric} {content.value:.4f}")
                evaluator.write(folder.path / FOLDER, candidate, content)


def _greedy(
    members: Sequence[SoupMember], single: Candidate, evaluator: SoupEvaluator, log: Callable[[str], None]
) -> tuple[list[SoupMember], Candidate]:
    """Return the members of the greedy soup, and the soup. ``single``: the soup of the best member only."""
    used, best, metric = [members[0]], single, evaluator.metric
    total = WeightSum(_state_of(members[0]))
    for member in members[1:]:
        state = _state_of(member)
        found = evaluator.evaluate(total.plus(state).mean(), averaged=True)
        value, before = found.value(metric), best.value(metric)
        is_kept = value >= before if higher_is_better(metric) else value <= before
        log(f"  with {member.title}: {metric} {value:.4f}, {'added' if is_kept else 'left out'} (before: {before:.4f})")
        if is_kept:
            used, best, total = [*used, member], found, total.plus(state)
    return used, best


def _ingredients(
    members: Sequence[SoupMember], used: Sequence[SoupMember], best: float, metric: str
) -> list[Ingredient]:
    """Return the entries of soup.json; ``best``: the metric of the first member, evaluated again."""
    values = [best, *(member.result.metrics[metric.replace("/", "_")] for member in members[1:])]
    return [
        Ingredient(title=member.title, run=member.run.id, value=value, used=member in used)
        for member, value in zip(members, values, strict=True)
    ]


# -- weights ----------------------------------------------------------------------------------------------------------


def _state_of(member: SoupMember) -> StateDict:
    """Return the weights of a member's best epoch, on the CPU."""
    return load_model(member.run.path).module.state_dict()


class WeightSum:
    """Sum of state dicts, in float64, so that the mean of equal weights is exactly these weights."""

    def __init__(self, state: StateDict, count: int = 1, total: StateDict | None = None) -> None:
        self.first, self.count = state, count
        self.total = total or {name: value.double() for name, value in state.items() if value.is_floating_point()}

    def plus(self, state: StateDict) -> WeightSum:
        """Return the sum with one more state dict."""
        return WeightSum(
            self.first, self.count + 1, {name: value + state[name].double() for name, value in self.total.items()}
        )

    def mean(self) -> StateDict:
        """Return the equal average; integers, such as batch norm's counters, are those of the first state dict."""
        return self.first | {
            name: (value / self.count).to(self.first[name].dtype) for name, value in self.total.items()
        }


def _sum_all(members: Sequence[SoupMember]) -> tuple[WeightSum, set[str]]:
    """Return the sum of all members' weights, and the names of the tensors that are not equal in all of them.

    Raises UserError if their tensors have other names or shapes.
    """
    first = _state_of(members[0])
    total, changed = WeightSum(first), set[str]()
    for member in members[1:]:
        state = _state_of(member)
        unlike = first.keys() ^ state.keys() or {name for name in first if first[name].shape != state[name].shape}
        if unlike:
            raise UserError(
                f"the weights of {member.title} do not have the names and shapes of those of {members[0].title} "
                f"({min(unlike)}): choose rows with the same architecture with --row"
            )
        changed |= {name for name, value in state.items() if not torch.equal(value, first[name])}
        total = total.plus(state)
    return total, changed


def evaluated_recipe(members: Sequence[SoupMember]) -> Recipe:
    """Return the recipe with which soups are evaluated: the best member's, without the keys that only training needs.

    If only the last layer was trained in all members, the features of the frozen backbone are taken from the cache.
    """
    recipe = members[0].recipe
    accum_steps = int(members[0].run.environment.get("grad_accum_steps", recipe.train.min_accum_steps))
    train = {"compile": False, "cuda_graphs": False, "ema": None, "swa_start": None, "grad_accum_steps": accum_steps}
    update: dict[str, Any] = {"train": recipe.train.model_copy(update=train), "distillation": None}
    if any(member.recipe.transfer.mode not in ("linear_probe", "logistic") for member in members):
        update["transfer"] = type(recipe.transfer)(mode="finetune")
    return recipe.model_copy(update=update)


# -- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Averaged weights, with their batch norm statistics, and their validation metrics."""

    state: StateDict
    metrics: dict[str, float]
    """Values by names as in metrics.jsonl, such as ``val/accuracy``."""

    def value(self, metric: str) -> float:
        """Return a validation metric."""
        return self.metrics[metric]


class SoupEvaluator:
    """Evaluation of averaged weights on the images of their runs, with the trainer's loaders and caches."""

    def __init__(
        self, recipe: Recipe, members: Sequence[SoupMember], changed: set[str], accelerator: Accelerator, metric: str
    ) -> None:
        """``changed``: names of the tensors that are not equal in all members."""
        self.best, self.metric, self.accelerator = members[0], metric, accelerator
        self.display = Console(is_main=True, shows=False)
        setup = build_context(recipe, accelerator, self.display, load_weights=False, choose_splits=self._same_splits)
        setup.built.module.load_state_dict(_state_of(self.best))
        tail = tail_of(recipe, setup.transfer)
        has_same_backbone = tail is not None and all(name.startswith(f"{tail}.") for name in changed)
        policy: CachePolicy = "all" if has_same_backbone else "images"
        self.trainer = Trainer(setup, None, None, GracefulStop(), None, policy)
        owners = {name.rpartition(".")[0] for name in changed if name.endswith(("running_mean", "running_var"))}
        self.layers: list[nn.Module] = [
            layer
            for name, layer in setup.built.module.named_modules()
            if isinstance(layer, _BatchNorm) and name in owners
        ]

    def _same_splits(self, dataset: Dataset, splits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the splits. Raises UserError if they differ from those of the runs."""
        if split_hash(dataset, splits) != self.best.run.split["hash"]:
            raise UserError(
                f"the images or labels have changed since {self.best.run.path} was trained (the hash in split.json "
                "differs), so soups cannot be compared with the runs; restore the original data set"
            )
        return splits

    def evaluate(self, state: StateDict, *, averaged: bool) -> Candidate:
        """Evaluate weights on validation; ``averaged``: recompute batch norm statistics."""
        trainer = self.trainer
        module = trainer.setup.built.module
        module.load_state_dict(state)
        if averaged and self.layers:
            recompute_batch_norm(trainer, 0, self.layers)
        validated = trainer.evaluate_network(trainer.train_step.network, "validation")
        metrics = trainer.setup.task.with_thresholds_of(validated).metrics(validated, "val/")
        return Candidate({name: value.cpu().clone() for name, value in module.state_dict().items()}, metrics)

    def write(self, parent: Path, candidate: Candidate, content: SoupFile) -> None:
        """Write a soup as a run directory, ``parent`` / its method, replacing an earlier one. Raises UserError."""
        target = parent / content.method
        run = Run(parent / f".{content.method}-{secrets.token_hex(4)}")
        try:
            run.checkpoints.mkdir(parents=True)
            try:
                self._write(run, candidate, content)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(run.path, target)
            finally:
                shutil.rmtree(run.path, ignore_errors=True)
        except OSError as error:
            raise UserError(f"the soup cannot be written to {target}: {error.strerror}") from None

    def _write(self, run: Run, candidate: Candidate, content: SoupFile) -> None:
        trainer, best = self.trainer, self.best.run
        for name in COPIED:
            if (best.path / name).exists():
                shutil.copyfile(best.path / name, run.path / name)
        card = without_temperature(best.model_card)
        card.pop("wise", None)  # of the member only
        run.write_json("checkpoints/model.json", card)
        steps = {"grad_accum_steps": trainer.setup.accum_steps}
        run.write_json("environment.json", describe_environment(self.accelerator, trainer.recipe) | steps)
        self.display.set_log_file(run.log_file)
        trainer.setup.built.module.load_state_dict(candidate.state)
        loss, accuracy = self._train_metrics()
        record = {"epoch": 0, "step": 0, "lr": 0.0, "train/loss": loss, "train/accuracy": accuracy, **candidate.metrics}
        trainer.run, trainer.writer = run, RunWriter(run, 1)
        trainer.writer.begin(0, self.display.log)
        trainer.writer.stage_best_weights(0, candidate.state)
        trainer.writer.add_line(record)
        trainer.progress.best = trainer.progress.last = record
        summary = finish(trainer)
        run.write_json(FILE, content.model_copy(update={"test": _compared(run, best)}).model_dump())
        run.write_json("summary.json", summary)

    @torch.no_grad()
    def _train_metrics(self) -> tuple[float, float]:
        """Return loss and accuracy on the training images of an epoch, augmented as in training, without dropout."""
        trainer, device = self.trainer, self.accelerator.device
        network, task = trainer.train_step.network.eval(), trainer.setup.task
        dtype = autocast_dtype(self.accelerator.mixed_precision)
        sums = RunningMetrics.zero(device, None)
        for micro, batch in trainer.loaders.train.epoch(0):
            inputs = to_device(batch.images[: micro.own], device, trainer.recipe.train.channels_last)
            labels = batch.labels[: micro.own].to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                logits = network(inputs)
            sums.add(task.outcomes(logits.float(), labels)[:, 0], task.is_correct(logits, labels))
        return sums.means(self.accelerator)

    def close(self) -> None:
        """Stop data workers."""
        self.trainer.loaders.close()


def _compared(soup: Run, best: Run) -> dict[str, int] | None:
    """Return on how many test images only the soup or only its best member is correct; None if it is not known."""
    if not soup.has_test:
        return None
    try:
        one, other = soup.correct_predictions(), best.correct_predictions()
    except UserError:  # the member's predictions.csv was deleted
        return None
    if one.keys() != other.keys():
        return None
    return {
        "soup_only": sum(one[name] and not other[name] for name in one),
        "best_only": sum(other[name] and not one[name] for name in one),
        "images": len(one),
    }
