"""Export of trained models to the formats of other programs, with preprocessing and a numerical check.

Every exported model is loaded by the library that will load it elsewhere, and its logits are compared with the
original's on 64 images, in batches of several sizes. The folder is moved into place only if they agree.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import RunFailed, UserError, first_line, missing_package
from toolkit.inference.evaluate import load_last_model, split_images
from toolkit.inference.timm_config import fits_timm, timm_config, transform_note
from toolkit.inference.tta import with_tta
from toolkit.models.build import build_model
from toolkit.models.lora import frozen_hash, is_lora, without_base
from toolkit.models.neighbors import uses_neighbors
from toolkit.models.pretrained import is_file_reference, pack_state
from toolkit.recipe.image_size import size_text
from toolkit.recipe.schema import ModelConfig
from toolkit.runs import open_run
from toolkit.similar_names import did_you_mean
from toolkit.training.checkpoint import load_weights
from toolkit.training.trained_model import UPDATE, TrainedModel, load_model, model_card

IMAGES = 64
BATCHES = (1, 5, 26, 32)
"""Batch sizes into which the 64 images are divided, to check that the batch dimension is dynamic."""
EPOCHS = ("best", "last")
"""Epochs whose weights can be exported: the selected one and the last one."""
LIMIT = 1e-4
"""Maximum allowed absolute difference between the logits of the exported and the original model."""
WEIGHTS, ONNX, PROGRAM = "model.safetensors", "model.onnx", "model.pt2"

DECODED = {1: "grayscale", 3: "RGB"}
"""Descriptions of decoded images by number of channels."""

Compute = Callable[[Tensor], Tensor]
"""Maps images, float32 [n, C, H, W], to logits [n, K]."""


@dataclass(frozen=True)
class ExportFormat:
    """Writer and reader of one export format."""

    write: Callable[[TrainedModel, Path], None]
    read: Callable[[Path], Compute]
    """Returns a function whose logits are divided by the temperature of a calibrated model."""
    packages: tuple[str, ...] = ()
    """Import names of packages required in addition to the toolkit's own dependencies."""


@dataclass
class ExportResult:
    """Result of an export and of its check."""

    folder: Path
    difference: float
    """Largest absolute difference between the logits of the exported and the original model."""
    images: str
    """Description of the images that were compared."""
    notes: list[str] = field(default_factory=list)

    def files(self) -> dict[str, int]:
        """Return name and size in bytes of each file."""
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}


def export(
    path: Path, name: str, folder: Path | None = None, epoch: str = "best", tta: Sequence[str] | None = None
) -> ExportResult:
    """Export the model of a run (or of an exported folder) in one of :data:`FORMATS` to a new folder.

    ``epoch`` is "best" for the selected epoch, or "last" for the last one trained. ``folder`` must be new or empty;
    the default is ``path/export/name`` (``path/export/name-last``), which replaces an earlier export. ``tta``: as for
    :func:`toolkit.inference.tta.with_tta`; the formats ``safetensors`` and ``lora`` store the names of its views, and
    ``timm`` cannot contain it.

    Raises UserError for an unknown format or epoch, missing packages, an existing folder, a model that the format
    cannot represent, or a missing checkpoint of the last epoch; RunFailed if the exported model computes different
    logits. After an error, no folder is left.
    """
    chosen = _format(name)
    if epoch not in EPOCHS:
        raise UserError(f"--epoch {epoch}: expected {' or '.join(EPOCHS)}")
    if epoch == "last" and name == "lora":
        raise UserError("--format lora exports the best epoch only; use safetensors")
    trained = load_model(path)
    if epoch == "last":
        _load_last(path, trained)
        trained = replace(trained, task=replace(trained.task, temperature=1.0))  # chosen for the best epoch
    trained = replace(trained, tta=_chosen_tta(trained, tta, name))
    inputs, images = images_to_compare(path, with_tta(trained))
    target = folder or path / "export" / (name if epoch == "best" else f"{name}-{epoch}")
    with new_folder(target, replace=folder is None) as unfinished:
        difference = write_checked(chosen, trained, unfinished, inputs, name)
    notes = [note for note in (trained.caution, transform_note(trained, target) if name == "timm" else None) if note]
    return ExportResult(target, difference, images, notes)


def _chosen_tta(trained: TrainedModel, tta: Sequence[str] | None, name: str) -> tuple[str, ...]:
    """Return the test-time augmentation of the exported model. Raises UserError if the format cannot contain it."""
    chosen = trained.tta if tta is None else () if [*tta] == ["none"] else tuple(tta)
    if chosen and name == "timm":
        raise UserError("--format timm cannot contain test-time augmentation: use another format, or add --tta none")
    return chosen


def _load_last(path: Path, trained: TrainedModel) -> None:
    """Replace the weights of ``trained`` by those of the run's last epoch."""
    if not (path / "recipe.toml").is_file():
        raise UserError(f"--epoch last: {path} is not a run directory; an exported folder contains only one model")
    run = open_run(path)
    epochs = run.epoch_records()
    last = int(epochs[-1]["epoch"]) if epochs else 0
    if not load_last_model(run, trained.module, last):
        raise UserError(f"--epoch last: {run.checkpoints} has no intact checkpoint of epoch {last}, the last one")


def write_checked(chosen: ExportFormat, trained: TrainedModel, folder: Path, inputs: Tensor, name: str) -> float:
    """Write model and preprocessing to ``folder`` and return the largest absolute difference of a logit."""
    with _quiet():
        try:
            chosen.write(trained, folder)
            compute = chosen.read(folder)
        except (UserError, OSError):
            raise
        except Exception as error:  # exporters raise exceptions of any type
            raise RunFailed(f"{trained.table.name} cannot be exported as {name}: {first_line(_root(error))}") from error
        difference = _difference(_to_export(trained), compute, inputs)
    if not difference <= LIMIT:  # also true for NaN
        raise RunFailed(
            f"{trained.table.name} as {name} computes different outputs: logits differ by up to {difference:.2e}, more "
            f"than {LIMIT:g}; nothing was written"
        )
    write_json(folder / "preprocessing.json", preprocessing_card(trained, name))
    return difference


def _root(error: BaseException) -> BaseException:
    """Return the root cause of an exception, which exporters wrap in advice for their own developers."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _format(name: str) -> ExportFormat:
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS, prefix="; ")
        raise UserError(f"--format {name}: expected {', '.join(FORMATS)}{hint}")
    chosen = FORMATS[name]
    missing = [package for package in chosen.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise missing_package(f"--format {name}", " and ".join(missing), "export")
    return chosen


@contextlib.contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``folder`` on success and deleted on an exception.

    With ``replace``, an existing ``folder`` is replaced. Raises UserError if it cannot be written or, without
    ``replace``, is not empty.
    """
    if not replace and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        raise UserError(f"{folder} already exists; choose a new folder with --out, or remove that one")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.is_dir():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# -- check ------------------------------------------------------------------------------------------------------------


def images_to_compare(path: Path, trained: TrainedModel) -> tuple[Tensor, str]:
    """Return 64 inputs, float32 [64, C, H, W], with a description.

    These are the run's first test images, followed by validation and training images if there are fewer than 64; or
    noise, if the run has fewer than 64 images or they are not available.
    """
    if not (path / "recipe.toml").is_file():
        return _noise(trained), f"{IMAGES} synthetic images (an exported model has no data)"
    inputs: list[Tensor] = []
    with contextlib.suppress(UserError):
        for split in ("test", "validation", "train"):
            dataset, indices = split_images(open_run(path), split, trained)
            transform = trained.transform
            inputs += [transform(dataset.images.load(int(i))) for i in indices[: IMAGES - len(inputs)]]
            if len(inputs) == IMAGES:
                return torch.stack(inputs), f"{IMAGES} images of the run's data"
    why = f"only {len(inputs)} images of the run are available" if inputs else "the run's data set is not available"
    return _noise(trained), f"{IMAGES} synthetic images ({why})"


def _noise(trained: TrainedModel) -> Tensor:
    """Return uniform noise in 0..1, normalized like images."""
    wanted = trained.preprocessing
    shape = (IMAGES, wanted.channels, *wanted.image_size)
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (wanted.mean, wanted.std))
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) - mean) / std


@torch.inference_mode()
def _difference(expected: nn.Module, compute: Compute, inputs: Tensor) -> float:
    """Return the largest absolute difference of a logit between two models, over batches of several sizes."""
    found = [(expected(part) - compute(part)).abs().max() for part in inputs.split(list(BATCHES))]
    return float(torch.stack(found).max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of the exporters in this context, because the numerical check finds relevant problems."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# -- preprocessing ----------------------------------------------------------------------------------------------------


PROBABILITIES = {
    "single_label": "the softmax of the logits; the most probable class is predicted",
    "multi_label": "the sigmoid of each logit; labels whose probability is at least their threshold are predicted",
}
"""How logits become predictions, by kind of task."""


def preprocessing_card(trained: TrainedModel, name: str) -> dict[str, Any]:
    """Return the content of preprocessing.json: everything that another program needs besides the model file.

    ``name``: the export format.
    """
    is_stored = name in ("safetensors", "lora")
    tta = list(trained.tta)
    trained = trained if is_stored else with_tta(trained)
    wanted, task = trained.preprocessing, trained.task.to_dict()
    if trained.task.decision_thresholds is not None:
        task["thresholds"] = trained.task.decision_thresholds.tolist()
    temperature = task.pop("temperature", None)
    where = (
        "divide the logits of the weights by"
        if name in ("safetensors", "lora")
        else "the logits are already divided by"
    )
    return {
        "input": {"name": "images", "type": "float32", "shape": ["batch", wanted.channels, *wanted.image_size]},
        "output": {"name": "logits", "type": "float32", "shape": ["batch", len(trained.classes)]},
        "steps": _steps(trained),
        "torchvision.transforms.v2": [repr(step) for step in trained.transform.steps],
        **wanted.to_dict(),
        "classes": trained.classes,
        "task": task,
        "probabilities": PROBABILITIES[trained.task.kind],
        **({"test_time_augmentation": {"views": tta, "in_model": not is_stored}} if tta else {}),
        **({"calibration": f"{where} the temperature {temperature}"} if temperature is not None else {}),
    }


def _steps(trained: TrainedModel) -> list[str]:
    """Describe each preprocessing step from the image file to the input."""
    wanted = trained.preprocessing
    resize = wanted.resize
    which = "shorter" if wanted.border is None else "longer"
    side = f"the {which} side to {resize}" if isinstance(resize, int) else f"to {resize} (height, width)"
    if isinstance(resize, tuple) and (wanted.cover or wanted.border is not None):
        side = f"keeping the aspect ratio, to {'cover' if wanted.cover else 'fit into'} {size_text(resize)}"
    padding = "" if wanted.border is None else f", padding smaller images with the color {list(wanted.border)}"
    if wanted.border is not None:
        padding += "; the padding above (and left of) the image is half of the missing pixels, rounded down"
    return [
        *_page(wanted.page),
        f"decode to {DECODED.get(wanted.channels, f'all {wanted.channels} channels')}, 8 bits per channel",
        *(["turn the image upright by its EXIF orientation"] if wanted.exif == "apply" else []),
        *([_scaling(wanted.value_range)] if wanted.value_range is not None else []),
        *([f"resize {side} pixels, {wanted.interpolation}, antialiased"] if resize is not None else []),
        *([f"crop the center, {size_text(wanted.image_size)} pixels{padding}"] if wanted.crop else []),
        *(
            f"{entry.name} {entry.arguments or ''} (the recipe's own)".replace("  ", " ")
            for entry in trained.transforms
        ),
        "divide by 255",
        f"subtract the mean {list(wanted.mean)} and divide by the standard deviation {list(wanted.std)}, per channel",
    ]


def _page(page: int | str) -> list[str]:
    if page == "channels":
        return ["read the pages of a TIFF file as the channels of one image"]
    return [f"read page {page} of the file, counted from 0"] if page else []


def _scaling(value_range: tuple[float, float]) -> str:
    black, white = value_range
    return f"in files with more than 8 bits per sample: {black:g} to 0, {white:g} to 255, rounded and clipped"


def write_json(path: Path, content: object) -> None:
    """Write indented JSON without escaping non-ASCII characters."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def portable(table: ModelConfig) -> ModelConfig:
    """Return the model config without paths on this machine."""
    if not is_file_reference(table.weights):
        return table
    kind, _, path = table.weights.partition(":")
    return table.model_copy(update={"weights": f"{kind}:{Path(path).name}" if kind == "file" else table.weights})


# -- formats ----------------------------------------------------------------------------------------------------------


class Calibrated(nn.Module):
    """A trained model whose logits are divided by its temperature."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.model, self.temperature = trained.module, trained.task.temperature

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, C, H, W] to logits [n, K]."""
        logits: Tensor = self.model(images) / self.temperature
        return logits


def _to_export(trained: TrainedModel) -> nn.Module:
    """Return the model with its test-time augmentation and its temperature."""
    used = with_tta(trained)
    return used.module if used.task.temperature == 1 else Calibrated(used).eval()


def _sample(trained: TrainedModel) -> Tensor:
    """Return two inputs, since exporters treat a batch size of one as a constant."""
    return _noise(with_tta(trained))[:2].clone()  # a view would be saved with its whole storage


def _write_safetensors(trained: TrainedModel, folder: Path) -> None:
    """Write weights and model.json, which `toolkit predict` and `load_model` read."""
    _write_weights(trained.module.state_dict(), folder)
    write_json(folder / "model.json", _model_card(trained, portable(trained.table)))


def _model_card(trained: TrainedModel, table: ModelConfig) -> dict[str, Any]:
    """Return the content of model.json with ``table`` as the model config."""
    return model_card(
        table,
        trained.classes,
        trained.task,
        trained.preprocessing,
        trained.transforms,
        trained.recipe,
        trained.train_preprocessing,
        is_knn=uses_neighbors(trained.module),
        tta=trained.tta,
    )


def _write_lora(trained: TrainedModel, folder: Path) -> None:
    """Write what a run with transfer.mode = "lora" trained, and the hash of the frozen pretrained weights.

    `load_model` reads the pretrained weights from model.weights, so a path in it is not changed.
    """
    state = load_weights(trained.weights)
    if not any(map(is_lora, state)):
        raise UserError('--format lora is for runs with transfer.mode = "lora"; use safetensors')
    base = build_model(trained.table, len(trained.classes), trained.preprocessing.channels, trained.train_size)
    update = without_base(state, base.module.state_dict())
    (folder / UPDATE).write_bytes(pack_state(update))
    card = _model_card(trained, trained.table)
    write_json(folder / "model.json", card | {"frozen_sha256": frozen_hash(base.module.state_dict(), update)})


def _write_weights(state: dict[str, Tensor], folder: Path) -> None:
    # safetensors' save_file would create a file that only its owner can read.
    (folder / WEIGHTS).write_bytes(pack_state(state))


def _read_safetensors(folder: Path) -> Compute:
    return _to_export(load_model(folder))


def _batch() -> Any:
    return torch.export.Dim("batch")


def _write_program(trained: TrainedModel, folder: Path) -> None:
    """Write a torch.export program (PT2 archive), which needs torch but not the model's code."""
    program = torch.export.export(_to_export(trained), (_sample(trained),), dynamic_shapes=({0: _batch()},))
    torch.export.save(program, folder / PROGRAM)


def _read_program(folder: Path) -> Compute:
    compute: Compute = torch.export.load(folder / PROGRAM).module()
    return compute


def _write_onnx(trained: TrainedModel, folder: Path) -> None:
    """Write ONNX via torch.export; weights over 2 GB are stored in a separate file."""
    with _plain_attention(trained.module):
        program = torch.onnx.export(
            _to_export(trained),
            (_sample(trained),),
            dynamo=True,
            dynamic_shapes=({0: _batch()},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.save(folder / ONNX)


@contextlib.contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    """Disable timm's fused attention: torch 2.15 cannot decompose the fused kernel with an attention bias (BEiT)."""
    fused: list[Any] = [layer for layer in module.modules() if getattr(layer, "fused_attn", False)]
    for layer in fused:
        layer.fused_attn = False
    try:
        yield
    finally:
        for layer in fused:
            layer.fused_attn = True


def _read_onnx(folder: Path) -> Compute:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_timm(trained: TrainedModel, folder: Path) -> None:
    """Write config.json and weights for `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hub.

    timm's models cannot divide logits by a temperature, so the weights of the last layer are divided instead.
    """
    table = trained.table
    if not fits_timm(trained):
        raise UserError(
            f"--format timm is for unmodified timm models; {table.source}'s {table.name}"
            f"{'' if table.source != 'timm' else ' with a head or stem of its own'} is not one: use safetensors, "
            "torch-export or onnx"
        )
    state = trained.module.state_dict()
    if trained.task.temperature != 1:
        last = [name for name in state if name.rpartition(".")[0] in trained.heads]
        state |= {name: state[name] / trained.task.temperature for name in last}
    _write_weights(state, folder)
    write_json(folder / "config.json", timm_config(trained))


def _read_timm(folder: Path) -> Compute:
    import timm

    module: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return module.eval()


FORMATS = {
    "onnx": ExportFormat(_write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": ExportFormat(_write_program, _read_program),
    "safetensors": ExportFormat(_write_safetensors, _read_safetensors),
    "timm": ExportFormat(_write_timm, _read_timm),
    "lora": ExportFormat(_write_lora, _read_safetensors),
}
