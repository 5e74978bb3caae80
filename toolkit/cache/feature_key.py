"""The name under which features of frozen layers are kept: a hash of all that they depend on."""

from __future__ import annotations

import hashlib
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
from toolkit.recipe.schema import AugmentConfig
from toolkit.training.context import TrainingContext


def frozen_part(setup: TrainingContext, tail: str) -> dict[str, Any]:
    """What the values that reach ``tail`` depend on, apart from the images: JSON-ready."""
    module, table = setup.built.module, setup.recipe.model
    return {
        "model": table.model_dump(mode="json", exclude={"weights", "head"}),
        "layers": _layers(module, tail),
        "weights": weights_hash(module, tail),
        "tail": tail,
        "numbers": _numbers(setup),
        "versions": [toolkit.__version__, timm.__version__, np.__version__, PIL.__version__,
                     torch.__version__, torchvision.__version__, resizing_kernel(), jpeg_decoder()],
    }  # fmt: skip


def feature_name(
    setup: TrainingContext, frozen: dict[str, Any], images: str, split: str, view: int, batched: bool
) -> str:
    """The name of the entry for one split, in one augmented version.

    ``frozen`` is :func:`frozen_part`, ``images`` the identity of the split's images.

    The seed counts only where something is random; the recipe's batch size, head, optimiser and number of processes
    do not: studies over these share their features.
    """
    recipe, random = setup.recipe, None
    if not is_deterministic(split, recipe.augment):
        random = {"seed": recipe.recipe.seed, "view": view, "batched": batched}
    key = {
        "images": images,
        "preprocessing": setup.preprocessing.to_dict(),
        "augment": _augmentations(split, recipe.augment),
        "random": random,
        "frozen": frozen,
    }
    return f"features-{content_key(key)}"


def _augmentations(split: str, augment: AugmentConfig) -> dict[str, Any]:
    """What the recipe does to the images of a split."""
    table = augment.model_dump(mode="json", include={split, "auto_augment", "random_erasing"})
    return table if split == "train" else {split: table[split]}


def _layers(module: nn.Module, tail: str) -> list[tuple[str, str, str]]:
    """Name, class and settings of every layer but those of the tail, the same on any number of processes."""
    return [
        # Synchronised batch norm differs from the plain one in training alone, and has empty places for timm's extras.
        (n, "batch norm" if isinstance(m, _BatchNorm) else type(m).__qualname__, m.extra_repr())
        for n, m in module.named_modules()
        if not _is_within(n, tail) and not isinstance(m, nn.Identity)
    ]


def weights_hash(module: nn.Module, tail: str) -> str:
    """SHA-256 of names, types, shapes and values of all parameters and buffers but the tail's."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not _is_within(name, tail):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_within(name: str, tail: str) -> bool:
    return name == tail or name.startswith(f"{tail}.")


def _numbers(setup: TrainingContext) -> list[str]:
    """What floating point depends on: device, precision, memory format, algorithms allowed."""
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
