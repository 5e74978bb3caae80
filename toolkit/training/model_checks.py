"""Checks of the model before training: gradients, logits that depend on the batch, conditions of a fit on features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from toolkit.cache.memory_budget import MEMORY_SHARE, available_memory, gib
from toolkit.data.datasets import Dataset
from toolkit.distributed.process import gather_objects, local_processes
from toolkit.errors import UserError, first_line
from toolkit.formatting import plural
from toolkit.models.build import ModelBundle
from toolkit.models.dry_forward import depends_on_batch, without_gradient
from toolkit.models.frozen_backbone import backbone_is_deterministic
from toolkit.models.neighbors import NearestNeighbors
from toolkit.models.transfer import Transfer
from toolkit.recipe.image_size import Size
from toolkit.recipe.schema import ModelConfig
from toolkit.recipe.toml_writer import toml_value

SHOWN = 5
"""Maximum number of patterns in a message."""


def check_gradients(
    transfer: Transfer, name: str, channels: int, image_size: Size, processes: int, log: Callable[[str], None]
) -> None:
    """Log a warning about trained parameters on which the logits do not depend.

    Raises UserError on several processes, since DDP waits for the gradient of each trained parameter.
    """
    without = without_gradient(transfer.built.module, channels, image_size)
    unused = [parameter for parameter in transfer.ever_trained if parameter in without]
    if not unused:
        return
    every = [parameter for parameter, _ in transfer.built.module.named_parameters()]
    patterns = list(dict.fromkeys(_pattern(parameter, without, every) for parameter in unused))
    listed = ", ".join(patterns[:SHOWN]) + (", ..." if len(patterns) > SHOWN else "")
    text = (
        f"{plural(len(unused), 'parameter')} of {name} that {'is' if len(unused) == 1 else 'are'} to be trained cannot "
        f"be, because the logits do not depend on them: {listed}"
    )
    advice = f"freeze them, transfer.freeze = {toml_value(patterns)}, or remove them from the model"
    if processes > 1:
        raise UserError(f"{text}. Several processes need a gradient of each trained parameter: {advice}")
    log(f"warning: {text}. On several processes, this would be an error: {advice}")


def _pattern(parameter: str, without: set[str], every: list[str]) -> str:
    """Return the parameter's name or, if nothing in its outermost module has a gradient, a pattern for the module."""
    outermost, _, rest = parameter.partition(".")
    is_whole = rest and all(other in without for other in every if other.startswith(f"{outermost}."))
    return f"{outermost}.*" if is_whole else parameter


def batch_dependence(table: ModelConfig, built: ModelBundle, channels: int, image_size: Size) -> list[str]:
    """Return a sentence for the summary if a plugin's logits of an image depend on its batch in evaluation.

    Models of libraries are not tried. Raises UserError if the model does not take a single image.
    """
    if table.source != "plugin":
        return []
    try:
        if not depends_on_batch(built.module, channels, image_size):
            return []
    except Exception as error:  # the user's own code may raise anything
        raise UserError(
            f"the model {table.name} fails in evaluation for a batch of one image: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    return [
        f"in evaluation, the logits of {table.name} for an image depend on the other images of its batch, so metrics "
        "and predictions depend on the batch size and on the number of processes"
    ]


def check_fit(transfer: Transfer, dataset: Dataset, images: int, channels: int, image_size: Size) -> None:
    """Raise UserError, before a run begins, unless the last layer can be fitted to cached features (a collective).

    ``images``: number of images of all splits.
    """
    built, mode = transfer.built, transfer.table.mode
    head = built.module.get_submodule(built.head)
    fault = ""
    if len(built.heads) > 1 or not isinstance(head, nn.Linear | NearestNeighbors):
        fault = "needs a model with one last layer, which is a Linear"
    elif dataset.weights is not None:
        fault = "does not support weights of images"
    elif dataset.why_not_cached:
        fault = f"needs features that are kept in the cache, but {dataset.why_not_cached}"
    elif not backbone_is_deterministic(built.module, built.head, torch.rand(2, channels, *image_size)):
        fault = "needs a backbone whose features of an image are always the same"
    else:
        need, free = head.in_features * 4 * images * local_processes(), available_memory()
        if not all(gather_objects(need <= free * MEMORY_SHARE)):
            fault = f"needs {gib(need)} of memory for the features, but only {gib(free)} are free"
    if fault:
        raise UserError(f'transfer.mode = "{mode}" {fault}; use "linear_probe"')
