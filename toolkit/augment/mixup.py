"""mixup and CutMix of a batch, given partners and a key.

The mixing coefficient, the box and the choice between mixup and CutMix depend only on the key. With the key
(seed, epoch, step) and the partners of :mod:`toolkit.data.sampling`, the mixing of an example depends neither on the
number of processes, nor on accumulation, nor on the device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toolkit.data.sampling import hash64
from toolkit.recipe.schema import AugmentConfig

_MIXING_STREAM = 0x6D6978696E67
"""Key constant that makes these random numbers independent of all others with the same seed ("mixing" in ASCII)."""


def is_mixed(augment: AugmentConfig) -> bool:
    """Return whether a recipe's training images are ever mixed."""
    return augment.mixup_prob > 0 and bool(augment.mixup or augment.cutmix)


def mix(
    images: Tensor,
    targets: Tensor,
    partners: npt.NDArray[np.int64],
    own: int,
    settings: AugmentConfig,
    key: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Mix the first ``own`` examples with their partners.

    images: float [m, C, H, W] (mixup alone also takes [m, ...]); targets: class probabilities, float [m, K];
    partners: index into 0..m-1 for each own example, [own]. Returns new images [own, ...] and targets [own, K].

    mixup: Zhang et al. 2018, arXiv:1710.09412, x = lam x_i + (1 - lam) x_j and the same for the targets.
    CutMix: Yun et al. 2019, arXiv:1905.04899, algorithm 1; lam of the targets follows from the area of the clipped box.
    """
    generator = np.random.Generator(np.random.Philox(key=[hash64(_MIXING_STREAM, *key), hash64(*key)]))
    mixed, kind, where = generator.random(3)
    if mixed >= settings.mixup_prob:
        return images[:own], targets[:own]
    index = torch.from_numpy(partners).to(images.device, non_blocking=True)
    use_cutmix = settings.cutmix > 0 and (settings.mixup == 0 or kind < settings.mixup_switch_prob)
    alpha = settings.cutmix if use_cutmix else settings.mixup
    share = float(generator.beta(alpha, alpha))
    if use_cutmix:
        height, width = images.shape[-2:]
        top, bottom, left, right = cut_box(height, width, share, where, float(generator.random()))
        share = 1 - (bottom - top) * (right - left) / (height * width)
        result = images[:own].clone()
        result[..., top:bottom, left:right] = images[index, ..., top:bottom, left:right]
    else:
        result = images[:own] * share + images[index] * (1 - share)
    return result, targets[:own] * share + targets[index] * (1 - share)


def cut_box(height: int, width: int, share: float, down: float, across: float) -> tuple[int, int, int, int]:
    """Return CutMix's box, clipped to the image: top, bottom, left, right in pixels.

    ``share``: fraction of the area outside the unclipped box; ``down``, ``across``: center of the box as a fraction
    (0..1) of height and width.
    """
    cut = float(np.sqrt(1 - share))
    half_height, half_width = int(height * cut) // 2, int(width * cut) // 2
    y, x = int(down * height), int(across * width)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    return top, bottom, max(x - half_width, 0), min(x + half_width, width)
