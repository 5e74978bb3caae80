"""Artifacts that W&B gets of a finished run: its data set as an input, and its model.

W&B stores each content of an artifact once, as a version; runs with equal data sets share one.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toolkit.data.datasets import Dataset
from toolkit.data.encoded_sources import ImageFiles, read_bytes
from toolkit.data.image_sources import EncodedImages, InMemoryImages, as_image
from toolkit.errors import UserError
from toolkit.runs import Run

if TYPE_CHECKING:
    from toolkit.training.trained_model import TrainedModel

MAX_LIST_BYTES = 10_000_000
"""Maximum size of the lists of images; W&B gets only the hash of longer ones."""
MAX_IMAGES, MAX_IMAGE_BYTES = 20_000, 2_000_000_000
"""Maximum number of images, and of their bytes, that are uploaded if the recipe asks for it."""


def log_data(target: Any, run: Run, *, with_images: bool, log: Callable[[str], None]) -> Any:
    """Log the data set, which names its images and their splits, and return the artifact.

    ``with_images``: add the images. If there are too many or they are not available, ``log`` is called with the reason.
    The artifact is the run's input. Offline, W&B's client allows outputs only.
    """
    import wandb

    split, data = run.split, run.recipe.data
    place = {"imagefolder": data.root, "shards": data.root, "table": data.table}.get(data.dataset)
    name = data.name or (Path(place).stem if isinstance(place, str) else "") or data.dataset
    counts = {key: len(split[key]) for key in ("train", "validation", "test")}
    metadata = {"dataset": data.dataset, "split_hash": split["hash"], "images": counts,
                "classes": len(run.model_card["classes"])}  # fmt: skip
    artifact = wandb.Artifact(_name(f"data-{name}"), "dataset", metadata=metadata)
    path = (run.path / "split.json").absolute()
    if path.stat().st_size <= MAX_LIST_BYTES:
        artifact.add_file(str(path), policy="immutable", skip_cache=True)
    else:
        with artifact.new_file("split-hash.txt") as file:
            file.write(split["hash"])
    if with_images:
        try:
            _add_images(artifact, run)
        except (UserError, OSError) as error:
            log(f"W&B gets the data set without its images: {error}")
    (target.log_artifact if target.offline else target.use_artifact)(artifact)
    return artifact


def _add_images(artifact: Any, run: Run) -> None:
    """Add the images of all splits: files as they are stored, others as PNG. Raises UserError."""
    from toolkit.report.run_images import open_run_images

    found = open_run_images(run.recipe, None, run.model_card["classes"])
    names = [name for split in ("train", "validation", "test") for name in run.split[split]]
    indices, images = found.indices(names, "images"), found.dataset.images
    if len(names) > MAX_IMAGES:
        raise UserError(f"there are {len(names):,} of them, and at most {MAX_IMAGES:,} are uploaded")
    if (size := _size(found.dataset, indices)) > MAX_IMAGE_BYTES:
        raise UserError(f"they have {size / 1e6:,.2f} MB, and at most {MAX_IMAGE_BYTES / 1e6:,.0f} MB are uploaded")
    for i, name in zip(indices.tolist(), names, strict=True):
        if not isinstance(images, EncodedImages):
            with artifact.new_file(f"images/{name}.png", mode="wb") as file:
                file.write(_png(images.load(i)))
        elif isinstance(images.source, ImageFiles):
            path = Path(images.source.path(i)).absolute()
            artifact.add_file(str(path), f"images/{name}", policy="immutable", skip_cache=True)
        else:
            with artifact.new_file(f"images/{name}", mode="wb") as file:
                file.write(read_bytes(images.source, i))


def _size(dataset: Dataset, indices: npt.NDArray[np.int64]) -> int:
    """Return the size of images in bytes; of an array, before compression."""
    if isinstance(dataset.images, EncodedImages):
        return sum(dataset.images.source.size_and_version(i)[0] for i in indices.tolist())
    assert isinstance(dataset.images, InMemoryImages)
    return len(indices) * dataset.images.pixels[:1].nbytes


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    image = io.BytesIO()
    as_image(pixels).save(image, "png")
    return image.getvalue()


def log_model(target: Any, run: Run, log: Callable[[str], None]) -> list[Any]:
    """Log the weights of the last and of the best epoch as versions of one artifact; return them, the best one last.

    They have the aliases last and best; if both are of the same epoch, there is one version with both. Without the
    checkpoint of the last epoch, only the best weights are logged, and ``log`` is called with the reason.
    """
    from toolkit.inference.evaluate import load_last_model
    from toolkit.models.pretrained import pack_state
    from toolkit.training.trained_model import load_model

    summary, trained = run.summary, load_model(run.path)
    epoch = summary["last"]["epoch"]
    is_best = epoch == summary["best"]["epoch"] and "wise" not in summary
    versions = []
    if not is_best:
        if load_last_model(run, trained.module, epoch):
            artifact = _version(target, run, trained, "last")
            with artifact.new_file("last.safetensors", mode="wb") as file:
                file.write(pack_state(trained.module.state_dict(), epoch=epoch))
            versions.append(target.log_artifact(artifact, aliases=["last"]))
        else:
            log(f"W&B does not get the weights of epoch {epoch}, the last one: no intact checkpoint of it is left")
    artifact = _version(target, run, trained, "best")
    artifact.add_file(str(run.best_weights.absolute()), policy="immutable", skip_cache=True)
    return [*versions, target.log_artifact(artifact, aliases=["best", "last"] if is_best else ["best"])]


def _version(target: Any, run: Run, trained: TrainedModel, alias: str) -> Any:
    """Return a version of the model's artifact without its weights: model.json and a model card."""
    import wandb

    from toolkit.inference.export import portable
    from toolkit.inference.publish import model_card

    summary, content = run.summary, run.model_card
    metadata = {"recipe": run.recipe.recipe.name, **summary[alias]}
    artifact = wandb.Artifact(_name(f"model-{target.id}"), "model", metadata=metadata)
    content["model"]["weights"] = portable(trained.table).weights
    if alias == "last" and "last_thresholds" in summary:
        content["task"]["thresholds"] = summary["last_thresholds"]
    with artifact.new_file("model.json", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
    with artifact.new_file("README.md", encoding="utf-8") as file:
        metrics = summary | {"best": summary[alias]}
        file.write(model_card(run, trained, run.recipe, metrics, artifact.name, "unknown", alias=alias))
    return artifact


def _name(text: str) -> str:
    """Return a text with the characters and the length that names of artifacts may have."""
    return re.sub(r"[^\w.-]", "-", text, flags=re.ASCII)[:120]
