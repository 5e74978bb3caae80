"""mixup and CutMix against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from toolkit.augment.mixup import cut_box, is_mixed, mix
from toolkit.data.sampling import plan_epoch
from toolkit.recipe.schema import AugmentConfig

MIXUP, CUTMIX = (
    AugmentConfig(mixup=1.0),
    AugmentConfig(cutmix=1.0),
)
SWAP = np.array([1, 0])


def pair(size: int = 16) -> tuple[Tensor, Tensor]:
    """Return a black image of class 0 and a white one of class 1: the mean of a mix is the share of the white image."""
    return torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)]), torch.eye(2)


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX])
def test_targets_are_mixed_in_the_same_proportion_as_the_images(settings: AugmentConfig) -> None:
    for step in range(50):
        images, targets = mix(*pair(), SWAP, 2, settings, (0, 0, step))
        share = images.mean((1, 2, 3))
        torch.testing.assert_close(targets[:, 1], share)
        torch.testing.assert_close(targets.sum(1), torch.ones(2))
        torch.testing.assert_close(targets[0, 1], targets[1, 0])


def test_mixup_follows_its_formula_with_a_beta_distributed_weight() -> None:
    images, targets = torch.randn(4, 3, 8, 8), torch.eye(4)
    partners = np.array([1, 0, 3, 2])
    mixed, soft = mix(images, targets, partners, 4, MIXUP, (1, 2, 3))
    share = soft[0, 0]
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[[1, 0, 3, 2]])
    # Beta(0.4, 0.4): mean 1/2, variance 1 / (4 (2 * 0.4 + 1)).
    alpha = AugmentConfig(mixup=0.4)
    shares = np.array([mix(*pair(1), SWAP, 2, alpha, (0, 0, s))[1][0, 0].item() for s in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.035)
    assert shares.var() == pytest.approx(1 / (4 * 1.8), rel=0.1)


def test_cutmix_pastes_one_box_from_the_partner() -> None:
    for step in range(30):
        images, _ = mix(*pair(), SWAP, 2, CUTMIX, (0, 0, step))
        assert set(images[0].flatten().tolist()) <= {0.0, 1.0}
        rows, columns = images[0, 0].amax(1).bool(), images[0, 0].amax(0).bool()
        assert torch.equal(images[0, 0].bool(), rows[:, None] & columns[None])
        assert torch.equal(images[0, 0], 1 - images[1, 0])


def test_the_box_has_the_area_of_its_weight_and_is_clipped_at_the_border() -> None:
    assert cut_box(100, 200, 0.75, 0.5, 0.5) == (25, 75, 50, 150)  # a quarter of the area: half of each side
    assert cut_box(100, 200, 0.75, 0.0, 0.0) == (0, 25, 0, 50)
    assert cut_box(100, 200, 1.0, 0.5, 0.5) == (50, 50, 100, 100)


def test_mixing_depends_only_on_the_key() -> None:
    settings = AugmentConfig(mixup=0.8, cutmix=1.0)
    first, again, other = (mix(*pair(), SWAP, 2, settings, key)[0] for key in ((0, 1, 2), (0, 1, 2), (0, 1, 3)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_mixing_and_cutmix_occur_with_their_probabilities() -> None:
    settings = AugmentConfig(mixup=1.0, cutmix=1.0, mixup_prob=0.6, mixup_switch_prob=0.25)
    kinds = []
    for step in range(1000):
        image = mix(*pair(), SWAP, 2, settings, (3, 0, step))[0][0]
        share = image.mean().item()
        kinds.append("none" if share == 0 else "cutmix" if len(set(image.flatten().tolist())) == 2 else "mixup")
    # CutMix with an empty box, which is rare, also counts as no mixing.
    assert kinds.count("mixup") / 1000 == pytest.approx(0.6 * 0.75, abs=0.06)
    assert kinds.count("cutmix") / 1000 == pytest.approx(0.6 * 0.25, abs=0.05)


def test_mixing_does_not_change_its_inputs() -> None:
    images, targets = pair()
    mix(images, targets, SWAP, 2, CUTMIX, (0, 0, 1))
    assert images[0].max() == 0
    assert torch.equal(targets, torch.eye(2))


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX])
@pytest.mark.parametrize(("world", "grad_accum_steps"), [(2, 1), (3, 1), (1, 2), (2, 3)])
def test_mixing_does_not_depend_on_processes_and_micro_batches(
    settings: AugmentConfig, world: int, grad_accum_steps: int
) -> None:
    n, batch = 17, 12  # 17: the second step is smaller, odd, and its last micro-batch has fewer images than processes
    images, targets = torch.randn(n, 3, 8, 8), torch.eye(n)

    def epoch(world: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        mixed, soft = torch.zeros(n, 3, 8, 8), torch.zeros(n, n)
        for rank in range(world):
            for m in plan_epoch(
                n,
                batch_size=batch,
                grad_accum_steps=grad_accum_steps,
                drop_last=False,
                world=world,
                rank=rank,
                mixing=True,
            ):
                assert m.partners is not None
                own = m.positions[: m.own]
                mixed[own], soft[own] = mix(
                    images[m.positions], targets[m.positions], m.partners, m.own, settings, (0, 0, m.step)
                )
        return mixed, soft

    for together, alone in zip(epoch(world, grad_accum_steps), epoch(1, 1), strict=True):
        assert torch.equal(together, alone)


def test_mixing_is_on_if_the_recipe_has_mixup_or_cutmix() -> None:
    assert not is_mixed(AugmentConfig())
    assert not is_mixed(AugmentConfig(mixup=0.2, mixup_prob=0.0))
    assert is_mixed(AugmentConfig(cutmix=1.0))
