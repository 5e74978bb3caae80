"""Prediction from Python: of paths, folders, Pillow images and arrays, with the results of `toolkit predict`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from toolkit.data.array_images import WrongLayout, with_channels
from toolkit.data.image_sources import EncodedImages, Pixels, UnreadableImageError
from toolkit.distributed.context import distributed_context
from toolkit.distributed.process import autocast_dtype
from toolkit.errors import UserError
from toolkit.formatting import plural
from toolkit.inference.predict import Predictions, images_at, predict
from toolkit.inference.tta import with_tta
from toolkit.runs import Run
from toolkit.training.trained_model import TrainedModel

Decoded = Image.Image | npt.NDArray[np.uint8]
"""A Pillow image or an array, uint8 [h, w, C] or [h, w]."""
ImageInput = str | os.PathLike[str] | Decoded
"""Path of an image or a folder, or an image."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of one image."""

    path: str | None
    """Path of the image; None for a Pillow image or an array."""
    prediction: str | None
    """The most probable class; None if no label of a multi-label model reaches its threshold, or with an error."""
    probability: float | None
    """Probability of ``prediction``."""
    top: tuple[tuple[str, float], ...]
    """Classes and probabilities, by decreasing probability: the ``top_k`` most probable ones, or without ``top_k`` the
    most probable one, of a multi-label model all labels whose probability is at least their threshold."""
    error: str | None = None
    """Why the image could not be predicted; None if it was."""


class GivenImages:
    """Images in the order in which they were given; Pillow images and arrays are decoded at once, files when loaded."""

    def __init__(self, trained: TrainedModel, items: Sequence[str | Decoded]) -> None:
        self._files = trained.files([item for item in items if isinstance(item, str)])
        numbers = iter(range(len(self._files)))
        self._images = [
            next(numbers) if isinstance(item, str) else _decoded(self._files, item, f"image {i}")
            for i, item in enumerate(items)
        ]
        """For each image its number among the files, its pixels, or why it cannot be decoded."""

    def __len__(self) -> int:
        return len(self._images)

    def load(self, i: int) -> Pixels:
        """Return image i. Raises UnreadableImageError."""
        image = self._images[i]
        if isinstance(image, UnreadableImageError):
            raise image
        return self._files.load(image) if isinstance(image, int) else image

    def name(self, i: int) -> str:
        """Return the path of image i, encoded, or "image <i>"."""
        image = self._images[i]
        return self._files.name(image) if isinstance(image, int) else f"image {i}"


def _decoded(files: EncodedImages, image: Decoded, name: str) -> Pixels | UnreadableImageError:
    """Return the pixels of a Pillow image or an array as those of a file with the same content."""
    try:
        if isinstance(image, Image.Image):
            return files.pixels(image)
        return with_channels(image if image.ndim == 3 else image[..., None], files.channels)
    except WrongLayout as error:
        return UnreadableImageError(name, str(error))
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        return UnreadableImageError(name, f"damaged ({error or type(error).__name__})")


def predict_images(
    run: Run,
    images: ImageInput | Iterable[ImageInput],
    *,
    top_k: int | None,
    batch_size: int | None,
    workers: int | None,
    tta: Sequence[str] | None = None,
) -> list[Prediction]:
    """Predict images with a run's best model; see :meth:`toolkit.runs.Run.predict`. Collective."""
    trained = with_tta(run.model, tta)
    items, found = _predicted(run, trained, images, top_k=top_k, batch_size=batch_size, workers=workers)
    _report_failures(found)
    return list(_records(items, found))


def embed_images(
    run: Run, images: ImageInput | Iterable[ImageInput], *, batch_size: int | None, workers: int | None
) -> npt.NDArray[np.float32]:
    """Return the features of images; see :meth:`toolkit.runs.Run.embed`. Collective."""
    _, found = _predicted(run, run.model, images, top_k=1, batch_size=batch_size, workers=workers, with_features=True)
    _report_failures(found)
    assert found.features is not None
    found.features[[file.position for file in found.failed]] = np.nan
    return found.features


def _predicted(
    run: Run,
    trained: TrainedModel,
    images: ImageInput | Iterable[ImageInput],
    *,
    top_k: int | None,
    batch_size: int | None,
    workers: int | None,
    with_features: bool = False,
) -> tuple[list[str | Decoded], Predictions]:
    """Return all images, with folders replaced by their images, and their predictions. Collective."""
    for name, value, least in (("top_k", top_k, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
    items = list(_expanded(images))
    if not items:
        raise UserError("no images given: specify paths, folders, PIL images or uint8 arrays [h, w, C]")
    train = run.recipe.train
    given = GivenImages(trained, items)
    with distributed_context(train) as accelerator:
        found = predict(
            trained,
            given,
            accelerator.device,
            top_k=top_k,
            batch_size=batch_size or run.images_per_process,
            workers=workers,
            autocast_dtype=autocast_dtype(accelerator.mixed_precision),
            channels_last=train.channels_last,
            with_features=with_features,
        )
    trained.module.to("cpu").to(memory_format=torch.contiguous_format)  # as it was loaded: users call run.model too
    return items, found


def _expanded(images: ImageInput | Iterable[ImageInput]) -> Iterator[str | Decoded]:
    """Yield all images, with those of folders in place of the folders. Raises UserError for any other object."""
    is_one = isinstance(images, str | os.PathLike | Image.Image) or not isinstance(images, Iterable)
    if isinstance(images, np.ndarray):
        is_one = images.ndim < 4
    for image in [images] if is_one else images:  # type: ignore[union-attr]
        if isinstance(image, str | os.PathLike):
            yield from images_at(os.fspath(image), lambda note: warnings.warn(note, stacklevel=7))
        elif isinstance(image, Image.Image) or _is_pixels(image):
            yield image
        else:
            raise UserError(f"images must be paths, folders, PIL images or uint8 arrays [h, w, C], not {_kind(image)}")


def _is_pixels(image: object) -> TypeGuard[npt.NDArray[np.uint8]]:
    return isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3)


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} arrays of shape {list(value.shape)}"
    return f"objects of type {type(value).__name__}"


def _report_failures(found: Predictions) -> None:
    """Warn about images that could not be predicted. Raises UserError if none could be."""
    if not found.failed:
        return
    first, has_features = found.failed[0], found.features is not None
    reason = f"{found.paths[first.position]}: {first.reason}"
    if len(found.failed) == len(found.paths):
        raise UserError(reason if len(found.paths) == 1 else f"none of {len(found.paths)} images is readable; {reason}")
    count = f"{len(found.failed)} of {plural(len(found.paths), 'image')}"
    what = "read, their features are NaN" if has_features else "predicted, see their `error`"
    warnings.warn(f"{count} could not be {what}; {reason}", stacklevel=4)


def _records(items: Sequence[object], found: Predictions) -> Iterator[Prediction]:
    """Yield the prediction of each image, in order."""
    reasons = {failure.position: failure.reason for failure in found.failed}
    for position, item in enumerate(items):
        path = item if isinstance(item, str) else None
        if position in reasons:
            yield Prediction(path, None, None, (), reasons[position])
            continue
        top = tuple((found.classes[index], probability) for index, probability in found.ranked(position))
        prediction, probability = top[0] if top else (None, None)
        yield Prediction(path, prediction, probability, top)
