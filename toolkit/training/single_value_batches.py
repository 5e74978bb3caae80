"""Batches too small for batch norm, found before training instead of at the end of the first epoch.

Batch norm in training mode needs more than one value per channel. A convolution's output has many for each image; the
output of global pooling or a linear layer has one: a part of a batch that is a single image cannot be trained on there.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.errors import UserError
from toolkit.models.build import ModelBundle
from toolkit.models.dry_forward import probe
from toolkit.models.transfer import Transfer
from toolkit.recipe.schema import TrainConfig


def check_single_value_batches(
    built: ModelBundle, transfer: Transfer, train: TrainConfig, images: int, world: int, channels: int, image_size: int
) -> None:
    """Raise UserError where an epoch of ``images`` on ``world`` processes gives a batch norm one value per channel."""
    lone = [count for count in _step_sizes(images, train.batch_size, train.drop_last) if _is_lone(count, train, world)]
    if not lone:
        return
    norms = single_value_norms(built, transfer, train.epochs, channels, image_size)
    if not norms:
        return
    more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
    share = "1 image" if lone[0] == 1 else f"{lone[0]} images, of which a forward pass gets 1"
    which = "every batch" if lone[0] == train.batch_size else "the last batch of an epoch"
    advice = []
    if sizes := _other_sizes(images, train, world):
        advice.append(f"train.batch_size = {' or '.join(map(str, sizes))}")
    if lone[0] != train.batch_size:
        advice.append("train.drop_last = true")
    if train.grad_accum_steps > 1:
        advice.append("a smaller train.grad_accum_steps")
    raise UserError(
        f"{which} has {share} ({images} training images, train.batch_size = {train.batch_size}"
        f"{f', {world} processes' if world > 1 else ''}), and batch norm needs more than one value per channel: "
        f"{norms[0]}{more} would get one. Set {', or '.join(advice) or 'another train.batch_size'}"
    )


def single_value_norms(
    built: ModelBundle, transfer: Transfer, epochs: int, channels: int, image_size: int
) -> list[str]:
    """Names of the batch norms that in training get one value per channel from one image, in the order of the model.

    Frozen ones, which use their running statistics, are not among them.
    """
    module, values = built.module, dict[str, int]()
    training = _training_norms(transfer, epochs)

    def note(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            count = args[0].numel() // args[0].shape[1]
            values[name] = min(count, values.get(name, count))

        return hook

    norms = [(name, layer) for name, layer in module.named_modules() if name in training]
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in norms]
    try:
        images = 2
        probe(module, channels, image_size)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, count in values.items() if count == images]


def _training_norms(transfer: Transfer, epochs: int) -> set[str]:
    """Names of the batch norms that normalize by the batch in some epoch; the transfer is left as it was."""
    module = transfer.built.module
    trains = {parameter: parameter.requires_grad for parameter in module.parameters()}
    transfer.unfreeze_for_epoch(epochs)
    transfer.train_mode()
    found = {name for name, layer in module.named_modules() if isinstance(layer, _BatchNorm) and layer.training}
    for parameter, required in trains.items():
        parameter.requires_grad_(required)
    transfer.train_mode()
    return found


def _step_sizes(images: int, batch_size: int, drop_last: bool) -> list[int]:
    """Numbers of images that an epoch's steps have."""
    full = [batch_size] if images >= batch_size else []
    rest = images % batch_size
    return [*full, rest] if rest and not drop_last else full


def _is_lone(count: int, train: TrainConfig, world: int) -> bool:
    """Whether batch norm somewhere sees one image of a step of ``count``, cut as in :func:`plan_epoch`."""
    return 1 in _seen_at_once(count, train, world)


def _seen_at_once(count: int, train: TrainConfig, world: int) -> Iterator[int]:
    """The fewest images that a batch norm sees at once, for the smallest and the largest part of a step."""
    parts = min(train.grad_accum_steps, count)
    for part in (count // parts, -(-count // parts)):
        # A part of fewer images than processes goes to each of them whole; synchronized batch norm sees all of a part.
        yield part if part < world or train.sync_batch_norm else part // world


def _other_sizes(images: int, train: TrainConfig, world: int) -> list[int]:
    """The nearest batch sizes, below and above, that avoid it."""
    unit = world * train.grad_accum_steps

    def fits(size: int) -> bool:
        return not any(_is_lone(count, train, world) for count in _step_sizes(images, size, train.drop_last))

    highest = min(train.batch_size - unit, images // unit * unit)
    below = next((size for size in range(highest, 0, -unit) if fits(size)), None)
    above = next((size for size in range(train.batch_size + unit, images + unit, unit) if fits(size)), None)
    return [size for size in (below, above) if size is not None]
