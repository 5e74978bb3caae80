"""Access to the images that a run was trained and tested on, if the data set is still where the recipe says."""

from __future__ import annotations

import base64
import contextlib
import io
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.image_sources import MODES, UnreadableImageError, to_mode
from toolkit.data.preprocessing import Preprocessing, as_trained, resolve_channels
from toolkit.errors import UserError
from toolkit.report.prediction_metrics import Ints
from toolkit.report.run_data import SPLITS, RunData

SMALL = 64
"""Images of at most this side in pixels are embedded unchanged and enlarged for display."""


class DatasetImages:
    """Images of a data set, accessed by name."""

    def __init__(self, dataset: Dataset, names: Sequence[str]) -> None:
        """Index the images in ``names``, ignoring names that are not in the data set."""
        self.dataset = dataset
        wanted = set(names)
        self.index = {
            name: number for number in range(len(dataset.images)) if (name := dataset.images.name(number)) in wanted
        }

    def load(self, name: str) -> Image.Image | None:
        """Return an image, or None if it is missing or damaged."""
        if name not in self.index:
            return None
        try:
            return self.dataset.images.load(self.index[name])
        except UnreadableImageError:
            return None

    def counts(self, names: Sequence[str]) -> Ints:
        """Count the images in ``names`` by class, [classes]. Raises UserError for an unknown name."""
        unknown = next((name for name in names if name not in self.index), None)
        if unknown is not None:
            raise UserError(f"the data set at data.root no longer has {unknown}")
        labels = self.dataset.labels[[self.index[name] for name in names]]
        return np.bincount(labels, minlength=len(self.dataset.classes)).astype(np.int64)

    def first_of_each_class(self, names: Sequence[str]) -> dict[int, str]:
        """Return the first of ``names`` in each class, by class."""
        found: dict[int, str] = {}
        for name in names:
            if name in self.index:
                found.setdefault(int(self.dataset.labels[self.index[name]]), name)
        return dict(sorted(found.items()))


def open_dataset_images(facts: RunData, data_root: str | None = None) -> DatasetImages:
    """Open the run's images without downloading anything. Raises UserError if they are missing or have changed."""
    if facts.recipe is None:
        raise UserError("the recipe, which says where they are, cannot be read")
    table = resolve_channels(facts.recipe.data, pretrained=facts.recipe.model.weights != "none")
    with contextlib.suppress(UserError):  # model.json is damaged: use the recipe's settings
        table = as_trained(table, preprocessing_of(facts))
    changes = {"download": False} | ({"root": data_root} if data_root is not None else {})
    dataset = open_dataset(table.model_copy(update=changes))
    if facts.classes and dataset.classes != facts.classes:
        raise UserError(f"the data set at {data_root or table.root} has different classes from those of the run")
    predicted = facts.predictions.names if facts.predictions else []
    return DatasetImages(dataset, [*predicted, *(name for split in SPLITS for name in facts.split.get(split, []))])


def model_input(preprocessing: Preprocessing, image: Image.Image) -> npt.NDArray[np.float32]:
    """Return an image as the model's input, float32 [C, H, W]."""
    from toolkit.augment.transforms import build_transform
    from toolkit.recipe.schema import AugmentConfig

    transform = build_transform("test", AugmentConfig(), preprocessing)
    found: npt.NDArray[np.float32] = transform(to_mode(image, MODES[preprocessing.channels])).numpy()
    return found


def augmented_input(
    facts: RunData, preprocessing: Preprocessing, image: Image.Image, seed: int
) -> npt.NDArray[np.float32]:
    """Return an image as an augmented training input, float32 [C, H, W], without mixup and cutmix."""
    import torch

    from toolkit.augment.transforms import build_transform, random_states_kept

    assert facts.recipe is not None, "the images were found by it"
    transform = build_transform("train", facts.recipe.augment, preprocessing)
    with random_states_kept():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        found: npt.NDArray[np.float32] = transform(to_mode(image, MODES[preprocessing.channels])).numpy()
    return found


def preprocessing_of(facts: RunData) -> Preprocessing:
    """Return the run's preprocessing. Raises UserError if model.json does not contain it."""
    try:
        return Preprocessing.from_dict(facts.card["preprocessing"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{facts.run.checkpoints / 'model.json'} has no preprocessing ({error})") from None


def data_uri(image: Image.Image, side: int) -> str:
    """Encode an image for an HTML page: small ones as PNG, others as WebP with a longer side of at most ``side``."""
    image = image.convert("RGB")
    data = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(data, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(data, "WEBP", quality=72, method=4)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
