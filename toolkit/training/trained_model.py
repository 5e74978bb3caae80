"""A trained model, loaded from its weights and model.json without data, recipe file or network."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import toolkit
from toolkit.augment.transforms import ImageTransform, build_transform
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages
from toolkit.data.preprocessing import Preprocessing
from toolkit.errors import UserError
from toolkit.models.build import build_model
from toolkit.models.lora import frozen_hash, merge_lora
from toolkit.models.neighbors import with_neighbors
from toolkit.plugins import Plugin, add, find, is_loaded
from toolkit.reading import Shape, UnreadableFile, check_shape, read_json
from toolkit.recipe.earlier_versions import update_model
from toolkit.recipe.image_size import Size
from toolkit.recipe.schema import MAX_CHANNELS, AugmentConfig, ModelConfig, TransformConfig
from toolkit.runs import Run
from toolkit.training.checkpoint import finished_fault, load_weights
from toolkit.training.given_plugins import Object, as_factory
from toolkit.training.task import Task, task_from_dict

FORMAT = 1
"""Version of model.json."""

UPDATE = "lora.safetensors"
"""Name of a file that lacks the frozen pretrained weights, written by `toolkit export --format lora`."""

WEIGHTS = ("best.safetensors", "model.safetensors", "last.safetensors", UPDATE)
"""Names of the weights file in a run, in a folder written by `toolkit export`, and in the last model on W&B."""


_Side = Annotated[int, Field(ge=1, le=10_000)]


class _Preprocessing(Shape):
    """Schema of ``preprocessing`` in model.json."""

    channels: int = Field(ge=1, le=MAX_CHANNELS)
    image_size: _Side | Annotated[list[_Side], Field(min_length=2, max_length=2)]
    resize: int | list[int] | None
    crop: bool
    interpolation: Literal["nearest", "bilinear", "bicubic"]
    mean: list[float]
    std: list[float]


class _TaskEntry(Shape):
    """Schema of ``task`` in model.json; versions without multi-label classification did not write it."""

    kind: Literal["single_label", "multi_label"]
    thresholds: list[Annotated[float, Field(ge=0, le=1)]] | None = None
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)


class _Card(Shape):
    """Schema of model.json."""

    recipe: str
    model: dict[str, Any]
    classes: list[str] = Field(min_length=1)
    task: _TaskEntry | None = None
    preprocessing: _Preprocessing
    train_preprocessing: _Preprocessing | None = None
    transforms: list[dict[str, Any]] = Field([])
    frozen_sha256: str | None = None
    head: Literal["knn"] | None = None
    wise: float | None = Field(None, ge=0, le=1)
    tta: list[str] = Field([])


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with its preprocessing and classes."""

    module: nn.Module
    """Maps float32 [n, C, H, W] to logits [n, K]."""
    preprocessing: Preprocessing
    transforms: tuple[TransformConfig, ...]
    """The recipe's own transforms of test images, in addition to the preprocessing ([augment] test)."""
    classes: list[str]
    task: Task
    """Kind of classification, with the temperature of the logits and, for multi-label, the thresholds."""
    table: ModelConfig
    recipe: str
    """Name of the recipe that the model was trained with."""
    weights: Path
    """Path of the weights file."""
    train_preprocessing: Preprocessing | None = None
    """Preprocessing of training images; None: the same as ``preprocessing``."""
    plugin_note: str | None = None
    """Note if the file of the model's plugin has changed since the model was trained."""
    heads: tuple[str, ...] = ()
    """Dotted names of the last layers of ``module``; more than one only for distilled transformers."""
    tta: tuple[str, ...] = ()
    """Test-time augmentation to apply (:func:`toolkit.inference.tta.with_tta`); ``module`` is without it."""

    @property
    def train_size(self) -> Size:
        """Height and width of the inputs that the model was trained with and built for."""
        return (self.train_preprocessing or self.preprocessing).image_size

    @property
    def transform(self) -> ImageTransform:
        """Transform from a decoded image to a model input, as for the run's test images."""
        return build_transform("test", AugmentConfig(test=list(self.transforms)), self.preprocessing)

    def files(self, paths: Sequence[str]) -> EncodedImages:
        """Return a reader that decodes image files as the run did; pass its ``load(i)`` to :attr:`transform`."""
        wanted = self.preprocessing
        source = ImageFiles(Path(), paths)
        return EncodedImages(
            source, wanted.channels, exif=wanted.exif, value_range=wanted.value_range, page=wanted.page
        )

    @property
    def caution(self) -> str | None:
        """Warning to show to the user, if any."""
        unfinished = f"the run has not finished: {self.weights.name} holds the best epoch so far"
        notes = [None if self.weights.name in WEIGHTS else unfinished, self.plugin_note]
        return "; ".join(note for note in notes if note) or None


def model_card(
    table: ModelConfig,
    classes: list[str],
    task: Task,
    preprocessing: Preprocessing,
    transforms: Sequence[TransformConfig],
    recipe_name: str,
    train_preprocessing: Preprocessing | None = None,
    *,
    is_knn: bool = False,
    tta: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of model.json, stored next to best.safetensors.

    ``train_preprocessing`` is included if it differs from ``preprocessing``. ``is_knn``: whether the head is
    :class:`~toolkit.models.neighbors.NearestNeighbors`. ``tta``: test-time augmentation, if any.
    """
    differs = train_preprocessing != preprocessing
    return {
        "format": FORMAT,
        "toolkit_version": toolkit.__version__,
        "recipe": recipe_name,
        "model": table.model_dump(mode="json"),
        **({"plugin": find("model", table.name).record} if table.source == "plugin" else {}),
        **({"head": "knn"} if is_knn else {}),
        "classes": classes,
        "task": task.to_dict(),
        "preprocessing": preprocessing.to_dict(),
        **({"train_preprocessing": train_preprocessing.to_dict()} if train_preprocessing and differs else {}),
        "transforms": [entry.model_dump(mode="json", exclude_none=True) for entry in transforms],
        **({"tta": list(tta)} if tta else {}),
    }


def load_model(path: str | os.PathLike[str], *, model: Object | None = None) -> TrainedModel:
    """Load the model of a run directory, a run's ``checkpoints`` folder, or any folder with model.json and weights.

    The pretrained weights are only needed for a folder that `toolkit export --format lora` wrote.

    ``model``: the factory of a model that :func:`fit` was given. Raises UserError if a file is missing or damaged, if
    the two do not belong together, if the model is a plugin that is not loaded, or if ``model`` is given for another
    model.
    """
    folder = _model_folder(Path(path))
    weights = _weights_in(folder)
    card = read_json(folder / "model.json")
    if card.get("format") != FORMAT:
        raise UserError(f"{folder / 'model.json'} was written by another version of this toolkit")
    check_shape(folder / "model.json", card, _Card)
    try:
        preprocessing = Preprocessing.from_dict(card["preprocessing"])
        in_training = Preprocessing.from_dict(card.get("train_preprocessing") or card["preprocessing"])
        if not len(preprocessing.mean) == len(preprocessing.std) == preprocessing.channels or 0 in preprocessing.std:
            raise ValueError("preprocessing.mean and preprocessing.std do not fit the channels")
        update_model(card["model"])
        table, classes = ModelConfig.model_validate(card["model"]), list(card["classes"])
        transforms = tuple(TransformConfig.model_validate(entry) for entry in card.get("transforms", []))
        task, recipe = task_from_dict(card.get("task"), len(classes)), str(card["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableFile(folder / "model.json", error) from None
    if model is not None and table.source != "plugin":
        raise UserError(f"the model of {folder} is {table.name} of {table.source}, not a plugin: leave out model=...")
    plugin_note = None if table.source != "plugin" else _prepare_plugin(folder, table, card.get("plugin"), model)
    size = in_training.image_size
    try:
        with torch.inference_mode(False):  # building a model uses autograd, and the caller may be in inference mode
            is_update = weights.name == UPDATE
            built = build_model(table, len(classes), preprocessing.channels, size, load_weights=is_update)
            built = with_neighbors(built) if card.get("head") == "knn" else built
        state = load_weights(weights)
        if is_update:
            base = built.module.state_dict()
            if frozen_hash(base, state) != card.get("frozen_sha256"):
                raise UserError(
                    f"{weights} was not trained on the pretrained weights that model.weights = {table.weights!r} loads"
                )
            state = base | state
        load_state(built.module, state)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{weights} does not belong to {folder / 'model.json'}: {error}") from None
    _check_finished(folder, weights, classes)
    module = built.module.eval()
    return TrainedModel(
        module, preprocessing, transforms, classes, task, table, recipe, weights, in_training, plugin_note, built.heads,
        tuple(card.get("tta", ())),
    )  # fmt: skip


def _prepare_plugin(
    folder: Path, table: ModelConfig, record: dict[str, Any] | None, model: Object | None
) -> str | None:
    """Register a model's factory if it is given; return a note if its file changed since the model was trained.

    ``record``: :attr:`toolkit.plugins.Plugin.record` in model.json. Raises UserError if the plugin is not loaded.
    """
    record = record or {}
    if model is not None:
        add(Plugin("model", table.name, as_factory(model)), replace=True)
    if not is_loaded("model", table.name):
        module = record.get("loaded_with") or record.get("file") or "MODULE"
        raise UserError(
            f"the model of {folder} is the plugin {table.name!r} of {record.get('file') or 'your own code'}: load it "
            f"with --plugin {module}, or give the function that builds it to open_run or load_model with model=..."
        )
    if record.get("sha256") == find("model", table.name).record["sha256"]:
        return None
    return f"{record.get('file')} has changed since the model {table.name} was trained"


def _check_finished(folder: Path, weights: Path, classes: list[str]) -> None:
    """Raise UserError if a finished run's weights or classes are intact but belong to another run."""
    run = Run(folder.parent)
    if weights.name != WEIGHTS[0] or not run.is_finished:
        return
    with contextlib.suppress(UnreadableFile):  # prediction works without the summary
        epoch = run.summary["best"]["epoch"]
        if fault := finished_fault(folder, epoch, classes, run.summary.get("wise")):
            raise UserError(f"{folder}: {fault}: it was edited, or belongs to another run. Restore the run's own file")


def load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict that training wrote into a new model, with the factors of LoRA merged into the weights.

    Adds the layers' version metadata: safetensors drops it, and MNASNet requires it. Raises RuntimeError if names or
    shapes differ.
    """
    versioned = OrderedDict(merge_lora(state))
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned)


def _model_folder(path: Path) -> Path:
    """Return the folder that holds model.json."""
    if not path.is_dir():
        raise UserError(
            f"{path}: there is no such folder; specify a run directory or a folder that toolkit export wrote"
        )
    if (path / "recipe.toml").is_file() and not (path / "model.json").is_file():
        return path / "checkpoints"
    if not (path / "model.json").is_file() and path.name != "checkpoints":
        raise UserError(
            f"{path} holds no model: neither recipe.toml (a run directory) nor model.json (what toolkit export "
            "--format safetensors writes)"
        )
    return path


def _weights_in(folder: Path) -> Path:
    """Return the file of the best weights: the final ones, or those of the best epoch so far."""
    whole = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    found = whole or sorted(folder.glob("best-*.safetensors"), reverse=True)
    if not found and folder.name != "checkpoints":
        raise UserError(f"{folder} has no weights: model.safetensors or {UPDATE} is missing; export the model again")
    if not found:
        raise UserError(f"{folder / WEIGHTS[0]} is missing: the run has not finished an epoch yet, so it has no model")
    return found[0]
