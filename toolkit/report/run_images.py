"""Access to the images that a run was trained and tested on, if the data set is still available."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolkit.data.datasets import Dataset, open_dataset, root_names
from toolkit.data.image_sources import Pixels, UnreadableImageError
from toolkit.data.preprocessing import Preprocessing, as_trained, resolve_channels
from toolkit.errors import UserError
from toolkit.recipe import Recipe
from toolkit.recipe.schema import AugmentConfig


@dataclass(frozen=True)
class RunImages:
    """The data set of a run, with its images accessed by name."""

    dataset: Dataset
    index: dict[str, int]
    """Index of each image in the data set, by name."""

    def load(self, name: str) -> Pixels | None:
        """Return an image, or None if it is missing or damaged."""
        try:
            return self.dataset.images.load(self.index[name])
        except (KeyError, UnreadableImageError):
            return None

    def indices(self, names: Sequence[str], what: str) -> npt.NDArray[np.int64]:
        """Return the indices of images. Raises UserError, naming them ``what``, if some are missing."""
        missing = [name for name in names if name not in self.index]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(names)} {what} are no longer in the data set: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            )
        return np.array([self.index[name] for name in names], dtype=np.int64)


def open_run_images(
    recipe: Recipe, preprocessing: Preprocessing | None, classes: Sequence[str], data_root: Path | None = None
) -> RunImages:
    """Open a run's data set without downloading anything.

    The images are decoded according to ``preprocessing``; None: according to the recipe. ``data_root`` overrides the
    recipe's data.root; if that is a list, it is the folder that contains all of them. Raises UserError if the images
    are missing or, unless ``classes`` is empty, if the classes have changed.
    """
    config = resolve_channels(recipe.data, pretrained=recipe.model.weights != "none")
    config = config if preprocessing is None else as_trained(config, preprocessing)
    moved = {"name": str(data_root)} if data_root and config.dataset == "huggingface" else {}
    config = config.model_copy(update={"download": False, "root": _moved(config.root, data_root), **moved})
    dataset = open_dataset(config)
    if classes and dataset.classes != list(classes):
        raise UserError(
            f"the data set at {config.root} now has different classes ({len(dataset.classes)}) than the run was "
            f"trained on ({len(classes)}): {_first_difference(dataset.classes, classes)}"
        )
    return RunImages(dataset, {dataset.images.name(i): i for i in range(len(dataset.images))})


def _moved(root: str | list[str], data_root: Path | None) -> str | list[str]:
    """Return the recipe's root or roots; ``data_root`` replaces a single root, or is the folder that contains all."""
    if data_root is None:
        return root
    return str(data_root) if isinstance(root, str) else [str(data_root / name) for name in root_names(root)]


def _first_difference(now: Sequence[str], then: Sequence[str]) -> str:
    new, gone = [c for c in now if c not in then], [c for c in then if c not in now]
    return f"{'new' if new else 'gone'}: {(new or gone)[0]}" if new or gone else "in another order"


def model_inputs(
    preprocessing: Preprocessing, images: Iterable[Pixels], augment: AugmentConfig | None = None
) -> list[npt.NDArray[np.float32]]:
    """Return images as the model's inputs, float32 [C, H, W]: as in evaluation, or with ``augment`` as in training.

    Mixup and CutMix are not applied.
    """
    import torch

    from toolkit.augment.transforms import build_transform, preserved_random_states

    transform = build_transform("train" if augment else "test", augment or AugmentConfig(), preprocessing)
    found = []
    with preserved_random_states():
        for seed, image in enumerate(images):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            found.append(transform(image).numpy())
    return found
