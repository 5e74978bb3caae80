"""Runs: the Python interface to a run directory, and functions that create and find run directories."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.data_frames import data_frame
from toolkit.errors import UserError
from toolkit.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pandas import DataFrame

    from toolkit.inference.predict_images import ImageInput, Prediction
    from toolkit.training.given_plugins import Object
    from toolkit.training.trained_model import TrainedModel

RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")


@dataclass(frozen=True, repr=False)
class Run(RunDirectory):
    """A run, as returned by :func:`fit` and :func:`open_run`: its files, and values computed from them.

    Reading imports neither torch nor pandas; properties and methods that need them import them.
    """

    factory: Object | None = field(default=None, compare=False)
    """Function that builds the model, if it is a plugin that is not registered; see :func:`open_run`."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        from toolkit.report.notebook import run_html

        return run_html(self)

    @property
    def metrics(self) -> DataFrame:
        """The metrics of each epoch: one row per epoch, indexed by ``epoch``.

        The columns are those of metrics.jsonl, such as ``lr``, ``train/loss`` and ``val/accuracy``. Needs pandas.
        """
        return data_frame(self.epoch_records(), "epoch")

    @property
    def steps(self) -> DataFrame:
        """The metrics logged within epochs: one row per ``train.log_every`` optimizer steps, indexed by ``step``.

        The column ``epoch`` counts epochs with a fraction. Needs pandas.
        """
        return data_frame([record for record in self.metric_records() if "train/loss" not in record], "step")

    @property
    def predictions(self) -> DataFrame:
        """The best model's predictions of the test images: one row per image, indexed by its name, ``path``.

        The columns are those of predictions.csv: ``label``, ``prediction`` and ``probability``, or of a multi-label
        run ``labels``, ``predictions`` and the probability of each label. Needs pandas.
        """
        return data_frame(
            [
                {column: float(text) if column.startswith("probability") else text for column, text in row.items()}
                for row in self.prediction_records()
            ],
            "path",
        )

    @cached_property
    def model(self) -> TrainedModel:
        """The best model, on the CPU, loaded at the first access.

        Of a run that has not finished, it is the best one so far, with a warning; open the run again for a later one.
        """
        from toolkit.training.trained_model import load_model

        trained = load_model(self.path, model=self.factory)
        if trained.caution:
            warnings.warn(trained.caution, stacklevel=3)
        return trained

    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        top_k: int | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        tta: Sequence[str] | None = None,
    ) -> list[Prediction]:
        """Predict images with the best model: one prediction per image, in order, as `toolkit predict` computes them.

        ``images``: one, or any iterable, of paths of images or folders (all images below them, sorted), Pillow images
        and arrays, uint8 [h, w, C] or [h, w]; also an array uint8 [n, h, w, C]. Images are preprocessed as the run's
        test images. ``top_k``: number of classes in ``top`` of each prediction; None: one, or of a multi-label model
        all labels whose probability is at least their threshold. ``batch_size`` (None: the run's own) and ``workers``
        (data loader workers; None: the available CPUs minus one) change the speed, and probabilities only by rounding.
        ``tta``: test-time augmentation, such as ["flip"] or ["five_crop", "scales=1,1.15"]; ["none"]: none; None: the
        one stored in model.json, if any.

        Images that cannot be read give a warning and a prediction with an ``error``. Raises UserError if none can be
        read. Under a launcher, all processes call it with the same images, and each gets all predictions.
        """
        from toolkit.inference.predict_images import predict_images

        return predict_images(self, images, top_k=top_k, batch_size=batch_size, workers=workers, tta=tta)

    def embed(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> NDArray[np.float32]:
        """Return the features of images, float32 [N, D]: the inputs of the best model's last layer.

        Arguments are those of :meth:`predict`. The features of images that cannot be read are NaN, with a warning.
        Raises UserError if none can be read, or if the model's last layer does not take one tensor. Under a launcher,
        all processes call it with the same images, and each gets all features.
        """
        from toolkit.inference.predict_images import embed_images

        return embed_images(self, images, batch_size=batch_size, workers=workers)

    def evaluate(
        self,
        split: str | None = None,
        *,
        data: str | os.PathLike[str] | None = None,
        name: str | None = None,
        ignore_unknown_classes: bool = False,
        data_root: str | os.PathLike[str] | None = None,
        tta: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Evaluate the best model on the run's test images or another ``split``, or on other data.

        Returns each metric by its name, such as ``accuracy`` (a fraction). On the run's own images, a warning says if
        one differs from the recorded value; ``data_root`` is their folder if it is no longer the recipe's. ``data``: a
        recipe, a folder with one folder per class, or a table of paths and labels, as for `toolkit evaluate --data`;
        metrics and predictions are then written to ``evaluations/<name>`` in the run directory, by default named after
        the data, and images of classes that the model does not have are an error unless ``ignore_unknown_classes``.
        ``tta``: as for :meth:`predict`.

        Raises UserError. Under a launcher, all processes call it.
        """
        if data is None and (name is not None or ignore_unknown_classes):
            raise UserError("name and ignore_unknown_classes need data, which selects another data set")
        if data is not None and data_root is not None:
            raise UserError("data_root is where the run's own images are; with data, only the other data set is read")
        from toolkit.distributed.context import distributed_context
        from toolkit.inference.evaluate import check_split, evaluate_run
        from toolkit.inference.evaluate_data import evaluate_data

        check_split(split or "test")
        with distributed_context(self.recipe.train) as accelerator:
            if data is None:
                root = None if data_root is None else Path(data_root)
                report = evaluate_run(self, split or "test", accelerator, root, last=False, tta=tta)
                metrics, notes = report.best, [*report.notes, *([report.conclusion] if report.differs else [])]
            else:
                found = evaluate_data(
                    self,
                    os.fspath(data),
                    accelerator,
                    split=split,
                    name=name,
                    ignore_unknown_classes=ignore_unknown_classes,
                    tta=tta,
                )
                metrics, notes = found.evaluation.metrics, found.notes
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return metrics

    def report(self, output: str | os.PathLike[str] | None = None) -> Path:
        """Write the figures and the report, one HTML file, and return its path; a warning lists what is missing.

        ``output``: the file; None: report.html in the run directory. Raises UserError if no epoch has finished.
        """
        from toolkit.report.run_report import write_report

        written = write_report(self, None if output is None else Path(output), log=warnings.warn)
        if written.missing:
            warnings.warn("not shown: " + "; ".join(written.missing), stacklevel=2)
        assert written.report is not None
        return written.report


def open_run(path: str | os.PathLike[str], *, model: Object | None = None) -> Run:
    """Open a run: a run directory, a recipe's folder for its newest run, or "latest", as for all commands.

    ``model``: the factory of a model that :func:`fit` was given, if the run's model is to be used. Raises UserError if
    there is no such run.
    """
    folder = newest_run(path)
    try:
        is_run = (folder / "recipe.toml").is_file()
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    if not is_run:
        hint = "; it is a study's folder (toolkit.open_study)" if (folder / "study.json").is_file() else ""
        raise UserError(f"{folder} is not a run directory: it has no recipe.toml{hint}")
    return Run(folder, model)


def new_run_id() -> str:
    """Return a run id: the start time, so that ids sort by time, and four random hex digits against collisions."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def create_run(run_root: str, name: str) -> Run:
    """Create a new, empty run directory; an existing one is never reused."""
    parent = Path(run_root) / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            path = parent / new_run_id()
            try:
                path.mkdir()
                break
            except FileExistsError:
                continue
        (path / "checkpoints").mkdir()
    except OSError as error:
        raise UserError(f"recipe.run_root: cannot create a run directory under {parent}: {error.strerror}") from None
    return Run(path)


def newest_run(path: str | os.PathLike[str]) -> Path:
    """Resolve a command's argument to a run directory.

    A recipe's folder (``runs/quickstart``) means its newest run; ``latest`` means the newest run of all recipes in
    ``runs/``. Any other path is returned unchanged.
    """
    folder = Path(path)
    if str(path) == "latest" and not folder.exists():
        root = Path("runs")
        found = [run for child in root.iterdir() for run in runs_of(str(root), child.name)] if root.is_dir() else []
        return max(found, key=lambda run: run.id).path if found else folder
    if any(os.path.exists(folder / name) for name in ("recipe.toml", "study.json")) or not os.path.isdir(folder):
        return folder
    with contextlib.suppress(OSError):  # unreadable folders are reported when they are opened
        found = runs_of(str(folder.parent), folder.name)
        return found[0].path if found else folder
    return folder


def runs_of(run_root: str, name: str) -> list[Run]:
    """Return the runs of a recipe, most recent first."""
    parent = Path(run_root) / name
    if not parent.is_dir():
        return []
    folders = sorted((p for p in parent.iterdir() if RUN_ID.fullmatch(p.name)), reverse=True)
    return [Run(p) for p in folders if (p / "recipe.toml").exists()]
