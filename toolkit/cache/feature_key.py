"""Cache key of frozen features: a hash of everything that they depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import toolkit
from toolkit.augment.resize import resizing_kernel
from toolkit.augment.transforms import is_deterministic
from toolkit.cache.store import content_key
from toolkit.data.jpeg_decoding import jpeg_decoder
from toolkit.models.pretrained import state_hash
from toolkit.plugins import PREFIX, records
from toolkit.recipe.schema import AugmentConfig
from toolkit.training.context import TrainingContext


def frozen_part(setup: TrainingContext, tail: str) -> dict[str, Any]:
    """Return everything except the images that the inputs of ``tail`` depend on, as JSON-serializable values."""
    module, table = setup.built.module, setup.recipe.model
    return {
        "model": table.model_dump(mode="json", exclude={"weights", "head"}),
        "layers": _layers(module, tail),
        "weights": weights_hash(module, tail),
        **({"plugin": records(setup.recipe, ["model"])} if table.source == "plugin" else {}),
        "tail": tail,
        **_computation(setup),
    }


def teacher_part(setup: TrainingContext, record: dict[str, Any]) -> dict[str, Any]:
    """Return everything that the outputs of the teacher with this ``record`` depend on, except the images."""
    own = {key: value for key, value in record.items() if key not in ("teacher", "recipe")}
    own |= {"student": [setup.preprocessing_of("train").mean, setup.preprocessing_of("train").std]}
    return {"teacher": own, **_computation(setup)}


def _computation(setup: TrainingContext) -> dict[str, Any]:
    """Return the settings and versions that the outputs of every model depend on."""
    return {
        "numbers": _numbers(setup),
        "versions": [toolkit.__version__, timm.__version__, np.__version__, PIL.__version__,
                     torch.__version__, torchvision.__version__, resizing_kernel(), jpeg_decoder()],
    }  # fmt: skip


def feature_name(
    setup: TrainingContext, frozen: dict[str, Any], images: str, split: str, view: int, batched: bool
) -> str:
    """Return the entry name for one split and augmented view.

    ``frozen`` comes from :func:`frozen_part`; ``images`` is the identity of the split's images. The seed is included
    only if the preprocessing is random. Batch size, head, optimizer and number of processes are not included, so that
    studies over these share their features.
    """
    recipe, random = setup.recipe, None
    if not is_deterministic(split, recipe.augment):
        random = {"seed": recipe.recipe.seed, "view": view, "batched": batched}
    key: dict[str, Any] = {
        "images": images,
        "preprocessing": setup.preprocessing_of(split).to_dict(),
        "augment": _augmentations(split, recipe.augment),
        "random": random,
        "frozen": frozen,
    }
    if any(entry.name.startswith(PREFIX) for entry in getattr(recipe.augment, split)):
        key["plugins"] = records(recipe, ["transform"])
    return f"features-{content_key(key)}"


def _augmentations(split: str, augment: AugmentConfig) -> dict[str, Any]:
    """Return the augmentation settings that apply to a split."""
    table = augment.model_dump(mode="json", include={split, "auto_augment", "random_erasing"})
    if augment.alternating_flip:  # only if true, so that the hashes of earlier versions stay valid
        table["alternating_flip"] = True
    return table if split == "train" else {split: table[split]}


def _layers(module: nn.Module, tail: str) -> list[tuple[str, str, str]]:
    """Return name, class and settings of every layer outside the tail, independent of the number of processes."""
    return [
        # Synchronized batch norm differs from the plain one only in training and has Identity layers for timm's extras.
        (n, "batch norm" if isinstance(m, _BatchNorm) else type(m).__qualname__, m.extra_repr())
        for n, m in module.named_modules()
        if not _is_within(n, tail) and not isinstance(m, nn.Identity)
    ]


def weights_hash(module: nn.Module, tail: str) -> str:
    """Return the hash of all parameters and buffers outside the tail."""
    return state_hash({name: value for name, value in module.state_dict().items() if not _is_within(name, tail)})


def _is_within(name: str, tail: str) -> bool:
    return name == tail or name.startswith(f"{tail}.")


def _numbers(setup: TrainingContext) -> list[str]:
    """Return what floating-point results depend on: device, precision, memory format, allowed algorithms."""
    device = setup.accelerator.device
    on_cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return [
        device.type,
        torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        str(setup.accelerator.mixed_precision),
        f"channels_last {setup.recipe.train.channels_last}",
        f"deterministic {setup.recipe.train.deterministic}",
        f"matmul {torch.get_float32_matmul_precision()}, convolutions tf32 {torch.backends.cudnn.allow_tf32}",
    ]
