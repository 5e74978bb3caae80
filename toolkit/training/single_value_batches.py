"""Check before training for batches that are too small for batch norm; an error would otherwise end the first epoch.

Batch norm in training mode needs more than one value per channel. A convolution's output usually has many per image,
the output of global pooling or a linear layer only one, so a micro-batch of a single image cannot be normalized there.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.errors import UserError
from toolkit.models.build import ModelBundle
from toolkit.models.dry_forward import probe
from toolkit.models.transfer import Transfer
from toolkit.recipe.image_size import Size
from toolkit.recipe.schema import TrainConfig


def check_single_value_batches(
    built: ModelBundle, transfer: Transfer, train: TrainConfig, images: int, world: int, channels: int, image_size: Size
) -> None:
    """Raise UserError if an epoch of ``images`` on ``world`` processes gives a batch norm one value per channel."""
    affected = [
        count for count in _step_sizes(images, train.batch_size, train.drop_last) if _is_affected(count, train, world)
    ]
    if not affected:
        return
    norms = single_value_norms(built, transfer, channels, image_size)
    if not norms:
        return
    more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
    share = "1 image" if affected[0] == 1 else f"{affected[0]} images, of which a forward pass gets 1"
    which = "every batch" if affected[0] == train.batch_size else "the last batch of an epoch"
    advice = []
    if sizes := _other_sizes(images, train, world):
        advice.append(f"train.batch_size = {' or '.join(map(str, sizes))}")
    if affected[0] != train.batch_size:
        advice.append("train.drop_last = true")
    if train.min_accum_steps > 1:
        advice.append("a smaller train.grad_accum_steps")
    raise UserError(
        f"{which} has {share} ({images} training images, train.batch_size = {train.batch_size}"
        f"{f', {world} processes' if world > 1 else ''}), and batch norm needs more than one value per channel: "
        f"{norms[0]}{more} would get one. Set {', or '.join(advice) or 'another train.batch_size'}"
    )


def single_value_norms(built: ModelBundle, transfer: Transfer, channels: int, image_size: Size) -> list[str]:
    """Return the names of batch norms that get one value per channel from an image in training, in model order.

    Frozen ones are not included, because they use their running statistics.
    """
    module, values = built.module, dict[str, int]()
    training = _training_norms(transfer)

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


def _training_norms(transfer: Transfer) -> set[str]:
    """Return the names of batch norms that use batch statistics in any epoch. The transfer's state is restored."""
    module = transfer.built.module
    trains = {parameter: parameter.requires_grad for parameter in module.parameters()}
    transfer.unfreeze_for_epoch(transfer.last_unfreezing)
    transfer.train_mode()
    found = {name for name, layer in module.named_modules() if isinstance(layer, _BatchNorm) and layer.training}
    for parameter, required in trains.items():
        parameter.requires_grad_(required)
    transfer.train_mode()
    return found


def _step_sizes(images: int, batch_size: int, drop_last: bool) -> list[int]:
    """Return the different numbers of images per step in an epoch."""
    full = [batch_size] if images >= batch_size else []
    rest = images % batch_size
    return [*full, rest] if rest and not drop_last else full


def _is_affected(count: int, train: TrainConfig, world: int) -> bool:
    """Return whether a batch norm gets a single image in a step of ``count`` images (see :func:`plan_epoch`)."""
    return 1 in _seen_at_once(count, train, world)


def _seen_at_once(count: int, train: TrainConfig, world: int) -> Iterator[int]:
    """Yield the fewest images that a batch norm gets at once, for a step's smallest and largest micro-batch."""
    parts = min(train.virtual_processes or train.min_accum_steps, count)
    for part in (count // parts, -(-count // parts)):
        # A micro-batch with fewer images than processes is replicated on each; synchronized batch norm sees all of it.
        is_divided = part >= world and not train.sync_batch_norm and train.virtual_processes is None
        yield part // world if is_divided else part


def _other_sizes(images: int, train: TrainConfig, world: int) -> list[int]:
    """Return the nearest smaller and larger batch sizes without this problem."""
    unit = train.virtual_processes or world * train.min_accum_steps

    def fits(size: int) -> bool:
        return not any(_is_affected(count, train, world) for count in _step_sizes(images, size, train.drop_last))

    highest = min(train.batch_size - unit, images // unit * unit)
    below = next((size for size in range(highest, 0, -unit) if fits(size)), None)
    above = next((size for size in range(train.batch_size + unit, images + unit, unit) if fits(size)), None)
    return [size for size in (below, above) if size is not None]
