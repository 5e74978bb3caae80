"""ConvNets defined by the recipe: blocks of convolution, batch norm, pooling, activation and dropout, then a head."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.models.head import ACTIVATIONS, build_head, check_memory
from toolkit.recipe.image_size import Size, convnet_output_size
from toolkit.recipe.schema import ConvBlock, ConvNetConfig, HeadConfig


class ConvNet(nn.Module):
    """ConvNet of a sequence of blocks, a flatten layer and a head.

    Parameters are named ``blocks.<i>.conv``, ``blocks.<i>.norm`` and ``head``. A whitening convolution is initialized
    by :mod:`toolkit.training.whitening`. Raises UserError if the image is too small for a block, and for a whitening
    convolution with another number of channels than its patches need.
    """

    def __init__(
        self, table: ConvNetConfig, head: HeadConfig, num_classes: int, channels: int, image_size: Size
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        size, widths = convnet_output_size(table, image_size), [channels, *(block.channels for block in table.blocks)]
        weights = sum(a * b.channels * b.kernel**2 for a, b in zip(widths, table.blocks, strict=False))
        check_memory(weights, "the convolutions of [model.convnet]")
        first = table.blocks[0]
        if first.whiten and first.channels != (needed := 2 * channels * first.kernel**2):
            raise UserError(
                f"model.convnet.blocks[0]: whiten needs channels = {needed}, 2 x {channels} input channels x "
                f"{first.kernel} x {first.kernel} pixels, not {first.channels}"
            )
        for block in table.blocks:
            self.blocks.append(_build_block(table, block, channels))
            channels = block.channels
        self.head = build_head(head, channels * math.prod(size), num_classes)
        if table.init == "gaussian":
            _init_gaussian(self, table.init_std)
        elif table.init == "dirac":
            _init_dirac(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, channels, height, width] to logits [N, num_classes]."""
        logits: Tensor = self.head(self.blocks(images).flatten(1))
        return logits


def _build_block(table: ConvNetConfig, block: ConvBlock, channels: int) -> nn.Sequential:
    """Build a block, with its layers in the order given by the recipe."""
    conv = nn.Conv2d(channels, block.channels, block.kernel, block.stride, block.padding, bias=table.has_bias(block))
    width = channels
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for kind in table.order:
        if kind == "conv":
            layers["conv"], width = conv, block.channels
        elif kind == "norm" and table.has_batch_norm(block):
            layers["norm"] = nn.BatchNorm2d(width, table.batch_norm_eps, table.batch_norm_momentum)
        elif kind == "pool" and block.pool:
            layers["pool"] = nn.MaxPool2d(block.pool)
        elif kind == "act" and table.activation != "none":
            layers["act"] = ACTIVATIONS[table.activation]()
        elif kind == "dropout" and table.dropout_of(block):
            layers["dropout"] = nn.Dropout(table.dropout_of(block))
    return nn.Sequential(layers)


def _init_dirac(module: nn.Module) -> None:
    """Initialize the first filters of each convolution so that each copies one input channel; keep the others."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight.data[: layer.in_channels])
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _init_gaussian(module: nn.Module, std: float) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
