"""Conversion of torchvision transforms to equivalent batch operations, fused if possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchvision.transforms import InterpolationMode, v2

from toolkit.augment.gpu_affine import AffineOp, CoordinateMap, RandomAffine, RandomPerspective
from toolkit.augment.gpu_color import ColorJitter, GaussianBlur, Grayscale, RandomErasing
from toolkit.augment.gpu_crop_flip import BatchOp, CenterCrop, CropFlipOp, IndexMap, Pad, RandomCrop, RandomFlip
from toolkit.augment.transforms import build_transform
from toolkit.data.preprocessing import Preprocessing
from toolkit.recipe.schema import AugmentConfig

FillColor = tuple[float, ...]


@dataclass(frozen=True)
class AugmentationPipeline:
    """The operations on a batch after the resize."""

    passes: tuple[BatchOp, ...]
    """Operations before the normalization."""
    erase: RandomErasing | None
    """Random erasing after the normalization."""

    @property
    def all(self) -> tuple[BatchOp, ...]:
        """All operations, in order."""
        return self.passes if self.erase is None else (*self.passes, self.erase)


def chain_of(steps: Sequence[Any]) -> AugmentationPipeline:
    """Convert the last steps of a split's transform, all of which :mod:`toolkit.recipe.gpu_support` must support."""
    builder = _OpFuser()
    for step in steps:
        if isinstance(step, v2.ToDtype):
            builder.bytes = False
        elif isinstance(step, v2.Normalize):
            builder.normalized = True
        elif not isinstance(step, v2.ToImage | v2.Identity):
            builder.add(step)
    return AugmentationPipeline(tuple(builder.passes), builder.erase)


def after_resize(split: str, augment: AugmentConfig, preprocessing: Preprocessing) -> Sequence[Any]:
    """Return the steps of a split's transform that come after its resize."""
    fixed = sum(entry.stage == "before_resize" for entry in getattr(augment, split))
    return build_transform(split, augment, preprocessing).steps[fixed + (preprocessing.resize is not None) :]


@dataclass
class _OpFuser:
    """Converts transforms to batch operations in order, fusing adjacent ones."""

    passes: list[BatchOp] = field(default_factory=list)
    erase: RandomErasing | None = None
    bytes: bool = True
    """Whether images are uint8 at the current step, else float in 0..1."""
    normalized: bool = False

    def add(self, step: Any) -> None:
        """Append a transform."""
        p = 1.0
        if isinstance(step, v2.RandomApply):
            step, p = step.transforms[0], step.p
        p *= getattr(step, "p", 1.0)
        if isinstance(step, v2.RandomHorizontalFlip | v2.RandomVerticalFlip):
            self._flip(RandomFlip(isinstance(step, v2.RandomVerticalFlip), p))
        elif isinstance(step, v2.RandomCrop):
            padding = tuple(step.padding or (0, 0, 0, 0))
            padded = any(padding) or step.pad_if_needed
            crop = RandomCrop((step.size[0], step.size[1]), padding, step.pad_if_needed, step.padding_mode, p)
            self._index(crop, self._fill(step.fill) if padded and step.padding_mode == "constant" else None)
        elif isinstance(step, v2.CenterCrop):
            self._index(CenterCrop((step.size[0], step.size[1])), (0.0,))
        elif isinstance(step, v2.Pad):
            self._index(Pad(_sides(step.padding), step.padding_mode), self._fill(step.fill))
        elif isinstance(step, v2.RandomRotation | v2.RandomAffine | v2.RandomPerspective):
            self._warp(step, p)
        elif isinstance(step, v2.RandomErasing):
            self._erase(step, p)
        else:
            self.passes.append(self._color(step, p))

    def _flip(self, flip: RandomFlip) -> None:
        """Append a flip, fused with the preceding operation if possible."""
        last = self.passes[-1] if self.passes else None
        if isinstance(last, AffineOp):
            self.passes[-1] = replace(last, after=(*last.after, flip))
        else:
            self._index(flip, None)

    def _index(self, step: IndexMap, fill: FillColor | None) -> None:
        """Append an index map, fused with preceding flips, crops and padding unless the fill color differs."""
        last = self.passes[-1] if self.passes else None
        if isinstance(last, CropFlipOp) and (fill is None or last.fill in (None, fill)):
            self.passes[-1] = replace(last, steps=(*last.steps, step), fill=last.fill if fill is None else fill)
        else:
            self.passes.append(CropFlipOp((step,), fill))

    def _warp(self, step: Any, p: float) -> None:
        """Append a rotation, affine or perspective transform, fused with the flips directly before it."""
        flips: tuple[RandomFlip, ...] = ()
        last = self.passes[-1] if self.passes else None
        if isinstance(last, CropFlipOp):
            steps = last.steps
            while steps and isinstance(steps[-1], RandomFlip):
                flips, steps = (steps[-1], *flips), steps[:-1]
            self.passes[-1:] = [replace(last, steps=steps)] if steps else []
        bilinear = step.interpolation in ("bilinear", InterpolationMode.BILINEAR)
        self.passes.append(AffineOp(flips, _warp_of(step), p, (), bilinear, self._fill(step.fill), self.bytes))

    def _erase(self, step: v2.RandomErasing, p: float) -> None:
        assert step.value is not None
        scale, ratio = (step.scale[0], step.scale[1]), (step.ratio[0], step.ratio[1])
        if self.normalized:
            self.erase = RandomErasing(scale, ratio, tuple(step.value), p)
        else:
            self.passes.append(RandomErasing(scale, ratio, self._fill(step.value), p))

    def _color(self, step: Any, p: float) -> BatchOp:
        match step:
            case v2.ColorJitter():
                return ColorJitter(step.brightness, step.contrast, step.saturation, step.hue, p)
            case v2.Grayscale() | v2.RandomGrayscale():
                return Grayscale(p)
            case v2.GaussianBlur():
                kernel, sigma = step.kernel_size, step.sigma
                return GaussianBlur((kernel[0], kernel[1]), (float(sigma[0]), float(sigma[1])), p, self.bytes)
        raise AssertionError(f"{type(step).__name__} is not made in batches")

    def _fill(self, fill: Any) -> FillColor:
        """Convert a fill color to 0..255: one value for all channels, or one per channel."""
        values = fill if isinstance(fill, list | tuple) else [fill or 0]
        return tuple(float(int(value)) if self.bytes else float(value) * 255 for value in values)


def _warp_of(step: Any) -> CoordinateMap:
    if isinstance(step, v2.RandomPerspective):
        return RandomPerspective(step.distortion_scale)
    center = None if step.center is None else (float(step.center[0]), float(step.center[1]))
    degrees = (step.degrees[0], step.degrees[1])
    if isinstance(step, v2.RandomRotation):
        return RandomAffine(degrees, (0, 0), (1, 1), (0, 0, 0, 0), center, turn=-1)
    shear = tuple(step.shear or ())
    return RandomAffine(
        degrees, step.translate or (0, 0), step.scale or (1, 1), (*shear, 0, 0, 0, 0)[:4], center
    )  # torchvision's shear has two or four values, the first two along x


def _sides(padding: Any) -> tuple[int, int, int, int]:
    """Convert Pad's argument to left, right, top, bottom."""
    given = (padding,) if isinstance(padding, int) else tuple(padding)
    left, top, right, bottom = {1: given * 4, 2: given * 2}.get(len(given), given)
    return left, right, top, bottom
