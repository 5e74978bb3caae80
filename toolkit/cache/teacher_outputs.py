"""Outputs of the teacher of [distillation], computed once if the training images are the same in every epoch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from toolkit.cache.distributed import DistributedCache, Guard
from toolkit.cache.feature_key import feature_name, teacher_part
from toolkit.cache.frozen_features import compute_outputs, has_fixed_inputs, input_views, kept_in_cache
from toolkit.cache.memory_budget import MEMORY_SHARE, available_memory, gib
from toolkit.data.dataloader import EvaluationLoader
from toolkit.data.sampling import IntArray
from toolkit.distributed.process import gather_objects, local_processes
from toolkit.training.context import TrainingContext
from toolkit.training.distillation import Teacher
from toolkit.training.evaluation import to_device


def why_not_computed_once(setup: TrainingContext) -> str:
    """Return why the teacher's outputs cannot be computed once; "" if they can (a collective)."""
    if not has_fixed_inputs(setup.recipe):
        return "the training images differ from epoch to epoch"
    count = len(setup.splits["train"]) * len(input_views(setup, "train"))
    need, free = 4 * count * len(setup.dataset.classes) * local_processes(), available_memory()
    if not all(gather_objects(need <= free * MEMORY_SHARE)):
        return f"they need {gib(need)}, but only {gib(free)} are free"
    return ""


def compute_teacher_outputs(
    setup: TrainingContext,
    teacher: Teacher,
    cache: DistributedCache,
    guard: Guard,
    loader_of: Callable[[str, list[IntArray], int], EvaluationLoader],
    *,
    batched: bool,
) -> list[Tensor]:
    """Return the teacher's logits of the training images for each view, float32 [N, K] (a collective).

    They are kept in the cache for other runs with the same teacher and images. ``batched``: whether the images are
    augmented in batches.
    """
    images = setup.dataset.images.identity(setup.splits["train"])
    part, device = teacher_part(setup, teacher.record), setup.accelerator.device

    def forward(images: Tensor) -> Tensor:
        return teacher.logits(to_device(images, device, setup.recipe.train.channels_last)).cpu()

    def of_view(view: int) -> Tensor:
        version = f", version {view + 1}" if view >= 0 else ""
        name = feature_name(setup, part, images, "train", view, batched)
        title = f"outputs of the teacher {teacher.record['model']}, train{version}"
        found = f"outputs of the teacher{version} taken from the cache"

        def compute() -> Tensor:
            return compute_outputs(setup, guard, loader_of, "train", view, "outputs of the teacher", forward)

        return kept_in_cache(cache, name, title, compute, found=found)

    return [of_view(view) for view in input_views(setup, "train")]
