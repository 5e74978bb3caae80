"""Image sizes that are determined by the recipe alone, in pixels."""

from __future__ import annotations

from toolkit.data.dataset_info import DATASETS
from toolkit.errors import UserError
from toolkit.recipe.catalog import weights_input
from toolkit.recipe.schema import ConvNetConfig, Recipe


def input_size(recipe: Recipe) -> int | None:
    """Return the height and width of the model's input; None if they depend on the images or the weights file."""
    data, model = recipe.data, recipe.model
    if data.image_size is not None:
        return data.image_size
    if model.source == "toolkit" or model.weights == "none":
        return DATASETS[data.dataset].size
    expected = weights_input(model.source, model.name, model.weights)
    return None if expected is None or expected.height else expected.image_size


def convnet_output_size(table: ConvNetConfig, image_size: int) -> int:
    """Return the height and width after the last block. Raises UserError naming the layer that gets no pixels."""
    size = image_size
    for number, block in enumerate(table.blocks, start=1):
        for kind in table.order:
            before = size
            if kind == "conv":
                size = (size + 2 * block.padding - block.kernel) // block.stride + 1
                layer = f"{block.kernel}x{block.kernel} convolution (padding {block.padding}, stride {block.stride})"
            elif kind == "pool" and block.pool:
                size //= block.pool
                layer = f"{block.pool}x{block.pool} pooling"
            if size < 1:
                raise UserError(
                    f"image_size {image_size} is too small for [model.convnet]: only {before}x{before} pixels reach "
                    f"the {layer} of block {number} of {len(table.blocks)}; use larger images, padding, or "
                    "fewer pooling layers"
                )
    return size
