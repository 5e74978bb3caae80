"""Convert transform steps to equivalent batch operations, fused if possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchvision.transforms import InterpolationMode

from toolkit.augment.gpu_affine import AffineOp, RandomAffine, RandomPerspective
from toolkit.augment.gpu_color import ColorJitter, GaussianBlur, Grayscale, RandomErasing
from toolkit.augment.gpu_crop_flip import (
    AlternatingFlip,
    BatchOp,
    CenterCrop,
    CropFlipOp,
    Pad,
    RandomCrop,
    RandomFlip,
)
from toolkit.augment.steps import Step

Pair = tuple[float, float]


def batch_ops(steps: Sequence[Step]) -> tuple[list[BatchOp], RandomErasing | None]:
    """Convert the last steps of a transform, all of which :mod:`toolkit.recipe.gpu_support` must support.

    Returns the operations before the normalization, and random erasing after it.
    """
    names = [step.name for step in steps]
    to_float, normalize = names.index("ToDtype"), names.index("Normalize")
    ops: list[BatchOp] = []
    for number, step in enumerate(steps[:normalize]):
        if step.name not in ("ToImage", "ToDtype", "Identity"):
            _append(ops, _batch_op(step, is_float=number > to_float))
    if not steps[normalize + 1 :]:
        return ops, None
    erasing = steps[-1]
    return ops, _random_erasing(erasing, _values(erasing.arguments["value"]))


def _append(ops: list[BatchOp], op: BatchOp) -> None:
    """Append an operation, fused with the one before it if possible.

    Flips, crops and padding become one operation unless their fill colors differ; flips next to a rotation, affine or
    perspective transform become part of it.
    """
    last = ops[-1] if ops else None
    if isinstance(last, AffineOp) and isinstance(op, CropFlipOp) and isinstance(op.steps[0], RandomFlip):
        ops[-1] = replace(last, after=(*last.after, op.steps[0]))
    elif (
        isinstance(last, CropFlipOp)
        and isinstance(op, CropFlipOp)
        and (op.fill is None or last.fill in (None, op.fill))
    ):
        ops[-1] = CropFlipOp((*last.steps, *op.steps), last.fill if op.fill is None else op.fill)
    elif isinstance(last, CropFlipOp) and isinstance(op, AffineOp):
        flips: tuple[RandomFlip, ...] = ()
        steps = last.steps
        while steps and isinstance(steps[-1], RandomFlip):
            flips, steps = (steps[-1], *flips), steps[:-1]
        ops[-1:] = [*([replace(last, steps=steps)] if steps else []), replace(op, before=flips)]
    else:
        ops.append(op)


def _batch_op(step: Step, *, is_float: bool) -> BatchOp:
    """Build the batch operation of one step; ``is_float``: whether images are float in 0..1 at this step, not uint8."""
    given, p = step.arguments, step.probability
    size = _pair(given.get("size", 0))
    fill = tuple(float(value) * 255 if is_float else float(int(value)) for value in _values(given.get("fill") or 0))
    match step.name:
        case "RandomHorizontalFlip" | "RandomVerticalFlip":
            return CropFlipOp((RandomFlip(step.name == "RandomVerticalFlip", p),), None)
        case "AlternatingFlip":
            return CropFlipOp((AlternatingFlip(),), None)
        case "RandomCrop":
            padding, mode = _sides(given["padding"] or 0), given["padding_mode"]
            is_filled = mode == "constant" and (any(padding) or given["pad_if_needed"])
            return CropFlipOp(
                (RandomCrop(size, padding, given["pad_if_needed"], mode, p),), fill if is_filled else None
            )
        case "CenterCrop" | "CenterCropOrPad":
            return CropFlipOp((CenterCrop(size),), fill)
        case "Pad":
            return CropFlipOp((Pad(_sides(given["padding"]), given["padding_mode"]),), fill)
        case "RandomRotation" | "RandomAffine" | "RandomPerspective":
            is_bilinear = given["interpolation"] in ("bilinear", InterpolationMode.BILINEAR)
            return AffineOp((), _warp(step), p, (), is_bilinear, fill, rounded=not is_float)
        case "ColorJitter":
            factors = [_jitter_range(given[name], 1.0) for name in ("brightness", "contrast", "saturation")]
            return ColorJitter((*factors, _jitter_range(given["hue"], 0.0)), p)
        case "Grayscale" | "RandomGrayscale":
            return Grayscale(p)
        case "GaussianBlur":
            return GaussianBlur(_pair(given["kernel_size"]), _pair(given["sigma"]), p, rounded=not is_float)
        case "RandomErasing":
            value = (each * 255 if is_float else float(int(each)) for each in _values(given["value"]))
            return _random_erasing(step, tuple(value))
    raise AssertionError(f"{step.name} cannot be applied to batches")


def _warp(step: Step) -> RandomAffine | RandomPerspective:
    """Build the coordinate map of a rotation, affine or perspective transform."""
    given = step.arguments
    if step.name == "RandomPerspective":
        return RandomPerspective(given["distortion_scale"])
    center = None if given["center"] is None else _pair(given["center"])
    degrees = _symmetric(given["degrees"])
    if step.name == "RandomRotation":
        return RandomAffine(degrees, (0, 0), (1, 1), (0, 0, 0, 0), center, turn=-1)
    shear = _symmetric(given["shear"] or 0)  # two or four values, the first two along x
    return RandomAffine(degrees, given["translate"] or (0, 0), given["scale"] or (1, 1), (*shear, 0, 0)[:4], center)


def _random_erasing(step: Step, value: tuple[float, ...]) -> RandomErasing:
    return RandomErasing(_pair(step.arguments["scale"]), _pair(step.arguments["ratio"]), value, step.probability)


def _values(value: Any) -> tuple[float, ...]:
    """Convert a number or a list of numbers to a tuple."""
    return tuple(float(each) for each in value) if isinstance(value, list | tuple) else (float(value),)


def _pair(value: Any) -> Any:
    """Return one number, or one or two in a list, as a tuple of two."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * 2 if len(values) == 1 else values


def _symmetric(value: Any) -> Any:
    """Return the range of an angle; a single number x becomes (-x, x)."""
    return tuple(value) if isinstance(value, list | tuple) else (-value, value)


def _jitter_range(value: Any, neutral: float) -> Pair | None:
    """Return the range of a ColorJitter factor (``neutral`` 1) or hue shift (``neutral`` 0); None: no change."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        low, high = value
    else:
        low, high = neutral - value, neutral + value
        low = max(low, 0.0) if neutral else low
    return None if low == high == neutral else (float(low), float(high))


def _sides(padding: Any) -> tuple[int, int, int, int]:
    """Convert torchvision's padding (all sides; left/right and top/bottom; or each) to left, right, top, bottom."""
    given = (padding,) if isinstance(padding, int) else tuple(padding)
    left, top, right, bottom = {1: given * 4, 2: given * 2}.get(len(given), given)
    return left, right, top, bottom
