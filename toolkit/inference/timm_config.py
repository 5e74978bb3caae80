"""Creation of timm's config.json for a model, as read by `create_model("local-dir:...")` and the Hub."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
from PIL import Image

from toolkit.data.image_sources import MODES, to_pixels
from toolkit.errors import UserError
from toolkit.models.neighbors import uses_neighbors
from toolkit.recipe.image_size import as_value
from toolkit.training.trained_model import TrainedModel


def fits_timm(trained: TrainedModel) -> bool:
    """Return whether timm alone can build the model; dropout before the last layer does not matter for inference."""
    table = trained.table
    if uses_neighbors(trained.module):
        return False
    return table.source == "timm" and table.stem == "imagenet" and not (table.head.hidden or table.head.batch_norm)


def timm_config(trained: TrainedModel) -> dict[str, Any]:
    """Return the content of config.json."""
    module, wanted, count = trained.module, trained.preprocessing, len(trained.classes)
    pretrained_cfg: dict[str, Any] = getattr(module, "pretrained_cfg", {})
    is_squashed = isinstance(wanted.resize, tuple) and not wanted.cover and wanted.border is None
    mode = "squash" if is_squashed else "center" if wanted.border is None else "border"
    size = min(wanted.image_size)
    side = min(wanted.resize) if isinstance(wanted.resize, tuple) else wanted.resize or size
    return {
        "architecture": trained.table.name.partition(".")[0],
        "num_classes": count,
        "num_features": getattr(module, "num_features", None),
        "label_names": trained.classes,
        "model_args": _timm_arguments(trained),
        "pretrained_cfg": {
            **{
                key: pretrained_cfg[key]
                for key in ("first_conv", "classifier", "fixed_input_size")
                if pretrained_cfg.get(key)
            },
            "custom_load": False,
            "input_size": [wanted.channels, *wanted.image_size],
            "interpolation": wanted.interpolation,
            "crop_pct": crop_share(size, side),
            "crop_mode": mode,
            "mean": list(wanted.mean),
            "std": list(wanted.std),
            "num_classes": count,
        },
    }


def crop_share(size: int, resize: int) -> float:
    """Return the crop_pct for which timm's floor(size / crop_pct) gives back ``resize``."""
    share = size / resize
    return share if math.floor(size / share) == resize else size / (resize + 0.5)


def _timm_arguments(trained: TrainedModel) -> dict[str, Any]:
    """Return the arguments of timm's constructor, except for the number of classes."""
    wanted, table = trained.preprocessing, trained.table
    arguments = {**({} if wanted.channels == 3 else {"in_chans": wanted.channels}), **table.args}
    if not getattr(trained.module, "pretrained_cfg", {}).get("fixed_input_size"):
        return arguments
    sized = {**arguments, "img_size": as_value(trained.train_size)}
    try:
        timm.create_model(table.name.partition(".")[0], **sized)
    except TypeError:  # the architecture has no img_size argument
        return arguments
    return sized


def transform_note(trained: TrainedModel, folder: Path) -> str | None:
    """Return a note if timm's transform, created from config.json, differs from the run's on a test image."""
    differs = "timm's own transform, created from config.json, differs from the run's: use preprocessing.json"
    if trained.preprocessing.channels not in MODES:  # timm's transforms are for Pillow images
        return differs
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    timm_transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    (height, width), mode = trained.preprocessing.image_size, MODES[trained.preprocessing.channels]
    noise = np.random.default_rng(0).integers(0, 256, (height + 37, width + 11, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    with contextlib.suppress(UserError):  # a run may accept only images of one size
        expected, actual = trained.transform(to_pixels(image, trained.preprocessing.channels)), timm_transform(image)
        # The mean difference must be below 1/255; it is not 0, since timm resizes with Pillow (toolkit.augment.resize).
        if expected.shape == actual.shape and float((expected - actual).abs().mean()) < 1 / 255 / max(
            trained.preprocessing.std
        ):
            return None
    return differs
