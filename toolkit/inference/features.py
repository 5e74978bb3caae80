"""Features of a model: the input of its last layer, also called the penultimate layer's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolkit.errors import UserError


class ModelWithFeatures:
    """A model that stores the input of its last layer when it computes logits.

    If that layer is a convolution before global pooling (SqueezeNet), the features are the means over the positions.
    """

    def __init__(self, module: nn.Module, head: str) -> None:
        """``head``: name of the classifier; if it is a sequence of layers, its last layer with parameters is used."""
        self.module = module
        parts = module.get_submodule(head).modules()
        layers = [layer for layer in parts if next(layer.parameters(False), None) is not None]
        self.layer = layers[-1] if layers else module.get_submodule(head)
        self.features: Tensor
        """Features of the last batch, [n, D]."""

    def __call__(self, images: Tensor) -> Tensor:
        """Map images [n, C, H, W] to logits [n, K]. Raises UserError if the last layer's input is not one tensor."""
        found: list[tuple[Tensor, ...]] = []
        handle = self.layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs))
        try:
            logits: Tensor = self.module(images)
        finally:
            handle.remove()
        inputs: tuple[Tensor, ...] = found[0] if len(found) == 1 else ()
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].dim() not in (2, 4):
            raise UserError(
                "the model has no features: its last layer must be called once, with one tensor [n, D] or [n, D, h, w]"
            )
        self.features = inputs[0] if inputs[0].dim() == 2 else inputs[0].mean((2, 3))
        return logits

    def width(self, channels: int, size: tuple[int, int]) -> int:
        """Return the number D of features, for images of ``size`` (height, width)."""
        device = next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))
        self(torch.zeros(1, channels, *size, device=device))
        return self.features.shape[1]
