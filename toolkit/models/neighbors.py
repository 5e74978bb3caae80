"""Weighted k-nearest-neighbor classification of features: the head of transfer.mode = "knn".

As in Wu et al. 2018 (arXiv:1805.01978, section 3.4) and in the evaluation of DINO (Caron et al. 2021,
arXiv:2104.14294): the k training images whose features have the highest cosine similarity s vote for their classes,
with weight exp(s / 0.07).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.errors import UserError
from toolkit.models.build import ModelBundle

TEMPERATURE = 0.07
CHUNK = 2**24
"""Maximum number of similarities computed at once; 64 MB."""
LEAST_SHARE = 1e-6
"""Lower limit of a class's share of the votes, so that its logarithm is finite."""


class NearestNeighbors(nn.Module):
    """Head that contains the features of the training images and maps features [n, D] to logits [n, classes].

    The logits are the logarithms of the classes' shares of the votes.
    """

    features: Tensor
    """Features of the training images, divided by their L2 norm, float32 [N, D]."""
    labels: Tensor
    """Their classes, int64 [N]."""

    def __init__(self, in_features: int, classes: int) -> None:
        super().__init__()
        self.in_features, self.classes, self.k = in_features, classes, 1
        # A parameter only because optimizers and DDP need one; it is not trained.
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        self.register_buffer("features", torch.zeros(1, in_features))
        self.register_buffer("labels", torch.zeros(1, dtype=torch.int64))

    def use(self, features: Tensor, labels: Tensor, k: int) -> None:
        """Set the training images, features [N, D] and labels [N], and the number of neighbors, at most N."""
        device = self.features.device
        self.features, self.labels = F.normalize(features.float(), dim=1).to(device), labels.to(device)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Map features [n, D] to logits [n, classes]."""
        with torch.autocast(x.device.type, enabled=False):
            # An exported program takes any number of images, so it cannot have a fixed number of chunks.
            parts = [x] if torch.compiler.is_compiling() else x.split(max(1, CHUNK // len(self.features)))
            shares = [self.shares(part.float(), [self.k])[0] for part in parts]
            return (shares[0] if len(shares) == 1 else torch.cat(shares)).clamp_min(LEAST_SHARE).log()

    def shares(self, x: Tensor, ks: Sequence[int]) -> list[Tensor]:
        """Return each class's share of the votes, [n, classes], for several numbers of neighbors, at most N."""
        similarities, nearest = (F.normalize(x, dim=1) @ self.features.T).topk(max(ks), dim=1)
        votes = ((similarities - similarities[:, :1]) / self.temperature).exp()
        labels = self.labels[nearest]
        zeros = votes.new_zeros(x.shape[0], self.classes)
        counted = (zeros.scatter_add(1, labels[:, :k], votes[:, :k]) for k in ks)
        return [each / each.sum(1, keepdim=True) for each in counted]

    def get_extra_state(self) -> Tensor:
        """Return k, to be stored in the state dict."""
        return torch.tensor(self.k)

    def set_extra_state(self, state: Any) -> None:
        """Set k from the state dict."""
        self.k = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in ("features", "labels"):  # their number of images is known only now
            if isinstance(value := state_dict.get(prefix + name), Tensor):
                setattr(self, name, getattr(self, name).new_empty(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *others)


def with_neighbors(built: ModelBundle) -> ModelBundle:
    """Replace a model's last layer, in place, and return the model. Raises UserError unless it is one Linear."""
    layer = built.module.get_submodule(built.head)
    if len(built.heads) > 1 or not isinstance(layer, nn.Linear):
        raise UserError('transfer.mode = "knn" needs a model with one last layer, which is a Linear')
    built.module.set_submodule(built.head, NearestNeighbors(layer.in_features, layer.out_features))
    return built


def uses_neighbors(module: nn.Module) -> bool:
    """Return whether a model's head is :class:`NearestNeighbors`."""
    return any(isinstance(layer, NearestNeighbors) for layer in module.modules())
