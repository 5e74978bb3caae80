"""transfer.mode = "lp_ft" (Kumar et al. 2022, arXiv:2202.10054): a linear probe, then fine-tuning from its head.

The two phases are like two runs: each has its own optimizer, learning rate, weight average and batches.
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.recipe.gpu_support import is_random_transform
from toolkit.recipe.schema import AugmentConfig
from toolkit.training.context import TrainingContext


def setup_of_phase(setup: TrainingContext, epochs_begun: int) -> TrainingContext:
    """Return the setup of the current phase: ``setup`` without random augmentation in the probe, else ``setup``.

    ``epochs_begun``: completed epochs, plus one if an epoch is in progress.
    """
    table = setup.recipe.transfer
    if epochs_begun > table.epochs_of_probe or table.mode != "lp_ft" or table.probe_augment:
        return setup
    recipe = setup.recipe.model_copy(update={"augment": without_randomness(setup.recipe.augment)})
    return replace(setup, recipe=recipe)


def without_randomness(augment: AugmentConfig) -> AugmentConfig:
    """Return the augmentation without random transforms of training images, mixup and CutMix."""
    kept = {
        "train": [entry for entry in augment.train if not is_random_transform(entry)],
        "validation": augment.validation,
        "test": augment.test,
        "label_smoothing": augment.label_smoothing,
        "run_on": augment.run_on,
    }
    return AugmentConfig().model_copy(update=kept)
