"""Checks before a run is resumed: its recipe and data must be those of its checkpoint.

A recipe edited inside the run directory, a checkpoint of another run, and data that changed since are refused, with
their differences listed. ``--allow-changes`` accepts them; images that were trained on then stay out of validation and
test.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from accelerate import Accelerator

from toolkit.data.datasets import Dataset
from toolkit.data.splits import SPLITS, check_splits, split_hash
from toolkit.distributed.process import main_only
from toolkit.errors import UserError
from toolkit.plugins import records
from toolkit.reading import read_bytes
from toolkit.recipe import Recipe, recipe_hash
from toolkit.recipe.earlier_versions import update_recipe
from toolkit.recipe.resolve import content_hash, experiment_diff, resolved_content
from toolkit.runs import Run
from toolkit.training.checkpoint import BestWeightsLost, best_path, find_latest, load_checkpoint, load_weights
from toolkit.training.console import Console
from toolkit.training.data_changes import DataDifference, FileFacts, Splits
from toolkit.training.train_step import RunningMetrics

if TYPE_CHECKING:
    from toolkit.training.task import EvalResult
    from toolkit.training.trainer import Trainer

ADVICE = (
    "Restore the data that the run was trained with, start a new run, or add --allow-changes, which keeps images "
    "that were trained on out of the validation and test splits"
)


@dataclass
class Resumption:
    """A run that is resumed from a checkpoint."""

    run: Run
    recipe: Recipe
    checkpoint: dict[str, Any]
    accelerator: Accelerator
    display: Console
    allow_changes: bool
    recipe_changed: bool = False
    """Whether the recipe or the file of a plugin differs from the checkpoint's (and this was allowed)."""
    files_known: bool = False
    """Whether the stored sizes and times of the image files are still valid; known to the main process only."""
    data_changed: bool = False
    """Whether the images or their splits differ from the checkpoint's (and this was allowed)."""

    @property
    def changed(self) -> bool:
        """Whether anything changed that the next checkpoint must record."""
        return self.recipe_changed or self.data_changed or bool(self.checkpoint.get("best_lost"))

    def compare(self) -> None:
        """Raise UserError if recipe, plugins or metrics.jsonl changed, unless changes are allowed (a collective)."""
        self.recipe_changed = main_only(self.accelerator, self._compare)

    def _compare(self) -> bool:
        is_changed = self._compare_recipe()
        is_changed |= self._compare_plugins()
        self._compare_metrics()
        return is_changed

    def _compare_recipe(self) -> bool:
        listed = recipe_changes(self.run, self.recipe, self.checkpoint)
        if not listed:
            return False
        if not self.allow_changes:
            raise UserError(
                f"the checkpoint of {self.run.path} was written with another recipe ({listed}): recipe.toml was "
                "edited, or the checkpoint is another run's. Undo this change, or add --allow-changes"
            )
        self.display.log(f"the recipe has changed since the checkpoint was written ({listed})")
        return True

    def _compare_plugins(self) -> bool:
        """Return whether the file of a plugin has changed."""
        before = {(one["kind"], one["name"]): one for one in self.checkpoint.get("plugins", [])}
        now = records(self.recipe)
        changed = [
            f"{one['name']} in {one['file']}" for one in now if _differs(before.get((one["kind"], one["name"])), one)
        ]
        if not changed:
            return False
        what = ", ".join(changed)
        listed = f"the file of a plugin has changed since the checkpoint of {self.run.path} was written ({what})"
        if not self.allow_changes:
            raise UserError(f"{listed}. Undo this change, or add --allow-changes, or start a new run")
        self.display.log(listed)
        return True

    def compare_teacher(self, now: dict[str, Any] | None) -> None:
        """Raise UserError if the teacher of [distillation] has other weights than before, unless changes are allowed.

        ``now``: :attr:`toolkit.training.distillation.Teacher.record`; None without a teacher.
        """
        before = self.checkpoint.get("teacher")
        if now is None or before is None or all(before.get(key) == now[key] for key in now if key != "teacher"):
            return
        changed = f"the teacher {now['teacher']} has changed since the checkpoint of {self.run.path} was written"
        if not self.allow_changes:
            raise UserError(f"{changed}. Restore the teacher, or add --allow-changes, or start a new run")
        self.recipe_changed = True
        self.display.log(changed)

    def _compare_metrics(self) -> None:
        path, length = self.run.metrics_file, self.checkpoint["position"]["metrics_bytes"]
        found = read_bytes(path)[:length] if path.exists() else b""
        known = self.checkpoint.get("metrics_sha256")  # missing in checkpoints of earlier versions
        if len(found) < length:
            fault = f"{len(found)} of {length} bytes are left" if path.exists() else "missing"
        elif known is not None and hashlib.sha256(found).hexdigest() != known:
            fault = "its checksum differs"
        else:
            return
        if not self.allow_changes:
            raise UserError(
                f"{path} is damaged ({fault}): it differs from the file at the time of this run's checkpoint. Restore "
                "the file, or add --allow-changes, which resumes from the same weights with the remaining lines"
            )
        self.display.log(f"warning: {path.name} is damaged ({fault})")

    def choose_splits(self, dataset: Dataset, drawn: Splits) -> Splits:
        """Return the splits to train with (a collective). ``drawn``: those of the recipe with the current data.

        Raises UserError if data or splits differ from the checkpoint's, unless changes are allowed.
        """
        splits, self.data_changed = main_only(self.accelerator, lambda: self._settle(dataset, drawn))
        return splits

    def _settle(self, dataset: Dataset, drawn: Splits) -> tuple[Splits, bool]:
        now, trained = split_hash(dataset, drawn), self.checkpoint["batches"][0]
        # If the hash is unchanged, split.json is not needed, so it may be damaged.
        record = _named(dataset, drawn) if now == trained else self._record(trained)
        files = None if record is None else FileFacts.read(self.run, trained, dataset, record)
        replaced = [] if files is None else files.replaced()
        self.files_known = files is not None and files.is_current
        if now == self.checkpoint.get("drawn", trained) and not replaced:
            return (drawn if now == trained else self._recorded(record, dataset, trained)), False
        if record is None:
            raise UserError(
                f"the data or the splits of {self.run.path} have changed since its checkpoint was written, and "
                "split.json, which lists the training images, is missing or damaged. Start a new run"
            )
        difference = DataDifference(record, dataset, drawn, self._classes(), files)
        if not self.allow_changes:
            raise UserError(f"the data of {self.run.path} have changed since it was trained: {difference}. {ADVICE}")
        difference.check_outputs()
        before = self._recipe_before()
        same_rules = all(
            getattr(before.data, key) == getattr(self.recipe.data, key)
            for key in ("split", "images_per_class", "test_images_per_class")
        )
        splits = difference.kept_apart(self._ever_trained(), same_rules)
        check_splits(dataset, splits, [name for name in SPLITS if len(drawn[name])])
        self.display.log(f"the data have changed since the checkpoint was written: {difference}")
        counts = ", ".join(f"{len(splits[name])} {name}" for name in SPLITS)
        self.display.log(f"images that were trained on stay out of validation and test: now {counts}")
        return splits, True

    def _record(self, trained: str) -> dict[str, list[str]] | None:
        """Return the image names of each split that the checkpoint was trained with; None if they are unknown."""
        with contextlib.suppress(UserError):
            for split in self.run.splits():
                if split.get("hash") == trained:
                    return _names(split)
        return None

    def _recorded(self, record: dict[str, list[str]] | None, dataset: Dataset, trained: str) -> Splits:
        """Return the recorded splits of a run whose data changed earlier, instead of those drawn now."""
        index = {dataset.images.name(i): i for i in range(len(dataset.images))}
        names = record or {}
        if record is not None and all(name in index for split in SPLITS for name in names[split]):
            splits = {s: np.array([index[name] for name in names[s]], dtype=np.int64) for s in SPLITS}
            if split_hash(dataset, splits) == trained:
                return splits
        raise UserError(f"{self.run.path / 'split.json'} is not the one that the checkpoint was trained with")

    def _ever_trained(self) -> set[str]:
        """Return the names of all images that have been in the training split since the run began."""
        return {name for split in self.run.splits() for name in _names(split)["train"]}

    def _classes(self) -> list[str]:
        return list(self.checkpoint.get("classes") or self.run.model_card.get("classes") or [])

    def _recipe_before(self) -> Recipe:
        stored = self.checkpoint.get("recipe")
        return self.run.recipe if stored is None else _validated(stored)


def find_resumption(
    run: Run, recipe: Recipe, accelerator: Accelerator, display: Console, allow_changes: bool
) -> Resumption | None:
    """Return the run at its newest intact checkpoint, chosen by the main process; None without one (a collective).

    Raises UserError if the checkpoint was written with another recipe, if metrics.jsonl is damaged, or if the best
    weights of all checkpoints are lost, unless changes are allowed.
    """

    def choose() -> tuple[Path | None, bool]:
        run.remove_temporary_files()
        try:
            return find_latest(run.checkpoints, display.log, with_best=True), False
        except BestWeightsLost as lost:
            if not allow_changes:
                raise UserError(
                    f"{lost}. Restore the file, or start a new run, or add --allow-changes: then the best epoch is "
                    "chosen from the last epoch and later ones"
                ) from None
            return lost.path, True

    path, best_lost = main_only(accelerator, choose)
    if path is None:
        return None
    checkpoint = load_checkpoint(path) | {"best_lost": best_lost}
    resumption = Resumption(run, recipe, checkpoint, accelerator, display, allow_changes)
    resumption.compare()
    return resumption


def _differs(before: dict[str, str | None] | None, now: dict[str, str | None]) -> bool:
    """Return whether a plugin was defined in another file; of one that the checkpoint did not use, nothing is known."""
    return before is not None and before["sha256"] != now["sha256"]


def _named(dataset: Dataset, splits: Splits) -> dict[str, list[str]]:
    return {split: [dataset.images.name(int(i)) for i in splits[split]] for split in SPLITS}


def _names(split: dict[str, Any]) -> dict[str, list[str]]:
    """Return the image names of each split in split.json. Raises UserError if a list is missing."""
    names = {name: split.get(name) for name in SPLITS}
    if not all(isinstance(value, list) and all(isinstance(n, str) for n in value) for value in names.values()):
        raise UserError("split.json is damaged: it does not list the images of every split")
    return cast("dict[str, list[str]]", names)


def recipe_changes(run: Run, recipe: Recipe, checkpoint: dict[str, Any]) -> str:
    """Describe how a recipe differs from that of a run's checkpoint; "" if it is the same experiment."""
    stored = checkpoint.get("recipe")
    if stored is None:  # written by a version that stored only the hash
        if checkpoint["recipe_hash"] in {recipe_hash(recipe), content_hash(_plain_recipe(run))}:
            return ""
        return "only the hash of its recipe was stored, so the differences cannot be listed"
    changes = experiment_diff(_validated(stored), recipe)
    return "; ".join(f"{'.'.join(map(str, key))}: {old!r} -> {new!r}" for key, old, new in changes)


def check_recipe(run: Run) -> None:
    """Raise UserError if a run's recipe.toml differs from that of its last checkpoint, if it still has one."""
    path = find_latest(run.checkpoints, lambda _: None)
    if path is None:
        return
    if listed := recipe_changes(run, run.recipe, load_checkpoint(path)):
        raise UserError(
            f"{run.path / 'recipe.toml'} is not the recipe that this run was trained with ({listed}): it was edited, "
            "or is another run's. Undo this"
        )


def stored_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as JSON, as stored in checkpoints."""
    return json.dumps(resolved_content(recipe))


def _validated(stored: str) -> Recipe:
    """Parse a checkpoint's recipe; newer keys get values with the behavior of the version that wrote it."""
    try:
        content = json.loads(stored)
        update_recipe(content)
        return Recipe.model_validate(content)
    except ValueError:
        raise UserError(
            "the checkpoint was written with a recipe that this version of the toolkit cannot read: use the version "
            "that started the run, or start a new run"
        ) from None


def _plain_recipe(run: Run) -> dict[str, Any]:
    """Return recipe.toml as it was written, without the defaults of keys added to the schema since then."""
    with open(run.path / "recipe.toml", "rb") as file:
        return tomllib.load(file)


# -- after the state was restored -------------------------------------------------------------------------------------


def accept_changes(trainer: Trainer) -> None:
    """Accept a changed recipe or changed data: validate again and write a checkpoint with them (a collective)."""
    progress = trainer.progress
    trainer.resumed_under_changes = (progress.epoch, progress.step)
    if progress.best is not None and trainer.setup.has("validation"):
        _validate_again(trainer, progress.best)
    trainer.stage_last_if_best()
    virtual = trainer.recipe.train.virtual_processes
    sums = RunningMetrics.restored(progress.sums, trainer.accelerator, virtual) if progress.step else None
    trainer.save(sums)


def _validate_again(trainer: Trainer, best: dict[str, Any]) -> None:
    """Validate the best and the last epoch again with the changes, so that later epochs compare with them."""
    progress, module = trainer.progress, trainer.setup.built.module
    now = _metrics(trainer, trainer.evaluate("validation")) if progress.step == 0 else {}
    if progress.step == 0 and best["epoch"] == progress.epoch:
        validated = best | now
    else:
        assert trainer.run is not None
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(load_weights(best_path(trainer.run.checkpoints, best["epoch"])))
        validated = best | _metrics(trainer, trainer.evaluate_network(trainer.train_step.network, "validation"))
        module.load_state_dict(state)
    if progress.last is not None and progress.step == 0:
        progress.last = progress.last | now
    if validated != best:
        progress.best = validated
        trainer.patience.best, trainer.patience.waited = validated.get(trainer.recipe.early_stopping.metric), 0
        trainer.display.log(
            f"validated again with the changes: epoch {best['epoch']}, the best so far, has "
            f"loss {validated['val/loss']:.4f} and accuracy {validated['val/accuracy']:.4f}; "
            "the count of epochs without improvement restarts"
        )


def _metrics(trainer: Trainer, validated: EvalResult) -> dict[str, float]:
    return trainer.setup.task.with_thresholds_of(validated).metrics(validated, "val/")


def choose_best_again(trainer: Trainer) -> None:
    """Select the best epoch again after its weights were lost: the last epoch, if its weights are the current ones.

    Otherwise there is no best epoch until the next one ends.
    """
    progress = trainer.progress
    progress.best, trainer.writer.best_weights = None, None
    trainer.stage_last_if_best()
    trainer.display.log(f"the best epoch is chosen from epoch {progress.epochs_begun} onwards")
