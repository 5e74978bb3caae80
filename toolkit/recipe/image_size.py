"""Image sizes that are determined by the recipe alone, in pixels."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.data.dataset_info import info_of
from toolkit.errors import UserError
from toolkit.recipe.catalog import weights_input
from toolkit.recipe.schema import ConvNetConfig, Recipe

Size = tuple[int, int]
"""Height and width in pixels."""


def as_size(value: int | Sequence[int]) -> Size:
    """Return (height, width) for a recipe value, which is one number for a square, or [height, width]."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def size_text(size: Size) -> str:
    """Return height x width as text, such as "224 x 448"."""
    return f"{size[0]} x {size[1]}"


def as_value(size: Size) -> int | list[int]:
    """Return the recipe value of a size: one number if it is square. The inverse of :func:`as_size`."""
    return size[0] if size[0] == size[1] else list(size)


def input_size(recipe: Recipe) -> Size | None:
    """Return the height and width of the model's input; None if they depend on the images or the weights file."""
    data, model = recipe.data, recipe.model
    if data.image_size is not None:
        return as_size(data.image_size)
    if not model.is_published or model.weights == "none":
        native = info_of(data.dataset, data.name).size
        return None if native is None else as_size(native)
    expected = weights_input(model.source, model.name, model.weights)
    return None if expected is None else expected.size


def convnet_output_size(table: ConvNetConfig, image_size: Size) -> Size:
    """Return the height and width after the last block. Raises UserError naming the layer that gets no pixels."""
    height, width = image_size
    for number, block in enumerate(table.blocks, start=1):
        for kind in table.order:
            before = height, width
            if kind == "conv":
                height, width = (
                    (side + 2 * block.padding - block.kernel) // block.stride + 1 for side in (height, width)
                )
                layer = f"{block.kernel}x{block.kernel} convolution (padding {block.padding}, stride {block.stride})"
            elif kind == "pool" and block.pool:
                height, width = height // block.pool, width // block.pool
                layer = f"{block.pool}x{block.pool} pooling"
            if min(height, width) < 1:
                raise UserError(
                    f"image_size {as_value(image_size)} is too small for [model.convnet]: only {before[0]}x{before[1]} "
                    f"pixels reach the {layer} of block {number} of {len(table.blocks)}; use larger images, "
                    "padding, or fewer pooling layers"
                )
    return height, width
