"""Compare batched augmentation with torchvision's functional kernels, called for each image with given parameters.

    python benchmarks/augment.py [--rounds 15]

Parameters like angles and factors differ in each image, so a group of equal parameters is one image (two groups for a
flip). Prints CPU time per image on one thread, and the mean absolute difference in 1/255 of both implementations from
torchvision on Pillow images, which is what data workers compute, for the same parameters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from toolkit.augment.gpu import CHUNK, GpuAugmentation, apply_to_changed
from toolkit.augment.gpu_affine import AffineOp
from toolkit.augment.gpu_color import ColorJitter, GaussianBlur
from toolkit.augment.transforms import build_transform
from toolkit.data.preprocessing import Preprocessing
from toolkit.recipe.schema import AugmentConfig

ENTRIES = {
    "flip": {"name": "RandomHorizontalFlip"},
    "rotation": {"name": "RandomRotation", "degrees": 30},
    "color jitter": {"name": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "blur": {"name": "GaussianBlur", "kernel_size": 5},
}
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
One = Callable[[object], object]


def images_of(size: int, count: int) -> list[Image.Image]:
    """Return crops of two photographs, resized to ``size``."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    crops = [photographs[i % 2].crop((23 * i % 200, 17 * i % 150, 23 * i % 200 + 400, 17 * i % 150 + 250))
             for i in range(count)]  # fmt: skip
    return [crop.resize((size, size), Image.Resampling.BILINEAR) for crop in crops]


def one_by_one(augment: GpuAugmentation, u: np.ndarray, size: int) -> list[One]:
    """Return torchvision's function for each image, with the parameters that ``augment`` samples from u [images, n]."""
    op = augment.passes[-1]
    plan = op.plan(u, (size, size))
    if isinstance(op, ColorJitter):

        def jitter(row: np.ndarray) -> One:
            def apply(image: object) -> object:
                for kind in row[4:].astype(int).tolist():
                    image = ADJUST[kind](image, float(row[kind]))
                return image

            return apply

        return [jitter(row) for row in plan.table]
    if isinstance(op, GaussianBlur):
        return [lambda image, s=s: F.gaussian_blur(image, list(op.kernel_size), [s, s]) for s in op.draw(u).tolist()]
    if isinstance(op, AffineOp):
        angles = op.warp.draw(u[:, 1 : 1 + op.warp.random_count], (size, size))[:, 0].tolist()
        return [lambda image, angle=angle: F.rotate(image, angle) for angle in angles]
    return [F.horizontal_flip if changed else lambda image: image for changed in plan.applied]


def compare(name: str, size: int, count: int, rounds: int) -> str:
    """Return one line of the table."""
    pillow = images_of(size, count)
    pixels = torch.stack([F.pil_to_tensor(image) for image in pillow]).contiguous(memory_format=torch.channels_last)
    preprocessing = Preprocessing(3, (size, size), None, False, "bilinear", (0.0,) * 3, (1.0,) * 3)
    steps = build_transform("train", AugmentConfig.model_validate({"train": [ENTRIES[name]]}), preprocessing).steps
    augment = GpuAugmentation(steps, preprocessing, 0)
    op = augment.passes[-1]
    u, chunk = np.random.default_rng(0).random((count, op.random_count)), max(1, CHUNK // (3 * size**2))
    functions = one_by_one(augment, u, size)

    def batched() -> Tensor:
        plan, made = op.plan(u, (size, size)), torch.empty_like(pixels, dtype=torch.float32)
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            values = torch.from_numpy(plan.table[part].astype(np.float32))
            made[part] = apply_to_changed(op, pixels[part], plan.of(part), values)
        return made

    def per_image() -> Tensor:
        return torch.stack([f(image) for f, image in zip(functions, pixels, strict=True)]).float()

    expected = torch.stack([F.pil_to_tensor(f(image)) for f, image in zip(functions, pillow, strict=True)]).float()
    times: dict[Callable[[], Tensor], list[float]] = {batched: [], per_image: []}
    for _ in range(rounds):
        for way in times:
            start = time.process_time()
            way()
            times[way].append((time.process_time() - start) / count * 1e6)
    cells = [f"{np.median(spent):10.0f}" for spent in times.values()]
    cells += [f"{float((way() - expected).abs().mean()):10.3f}" for way in times]
    return f"{name:13s} {size:5d} {' '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(" " * 20 + "us per image: batched, per image; difference from Pillow: batched, per image")
    for size, count in ((32, 256), (224, 32)):
        for name in ENTRIES:
            print(compare(name, size, count, rounds), flush=True)


if __name__ == "__main__":
    main()
