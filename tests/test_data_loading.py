"""Loading: batches do not depend on the number of workers and processes, and no worker hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from toolkit.augment.transforms import ImageTransform, build_transform
from toolkit.data.dataloader import (
    EvaluationLoader,
    SplitDataset,
    TrainLoader,
    WorkerBatches,
    worker_count,
)
from toolkit.data.datasets import open_dataset
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages, InMemoryImages, UnreadableImageError
from toolkit.data.preprocessing import Preprocessing
from toolkit.data.sampling import SamplingPlan, balanced_weights, plan_evaluation
from toolkit.data.tensor_loader import TensorBatches
from toolkit.distributed.cpu_count import available_cpus
from toolkit.errors import RunFailed, UserError
from toolkit.recipe.schema import AugmentConfig, DataConfig

N = 23
PIXELS = np.random.default_rng(0).integers(0, 256, (N + 5, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(N + 5, dtype=np.int64) % 4
INDICES = np.arange(N + 5, dtype=np.int64)[5:][
    ::-1
].copy()  # a split is not the whole data set, so positions are not indices
PLAIN = Preprocessing(3, (8, 8), None, True, "bilinear", (0.0,) * 3, (1.0,) * 3)
RANDOM = AugmentConfig.model_validate(
    {"train": [{"name": "RandomCrop", "padding": 2}, {"name": "ColorJitter", "hue": 0.5}], "auto_augment": "rand-m9"}
)


def transform(augment: AugmentConfig = RANDOM) -> ImageTransform:
    return build_transform("train", augment, PLAIN)


def loader(workers: int = 0, augment: AugmentConfig = RANDOM, **plan: Any) -> TrainLoader:
    settings = {"size": N, "seed": 0, "batch_size": 6, **plan}
    split = SplitDataset(InMemoryImages(PIXELS, "toy", 3), LABELS, INDICES, transform(augment), settings["seed"])
    return TrainLoader(WorkerBatches(split, workers, pin_memory=False), SamplingPlan(**settings))


def by_position(loaders: list[TrainLoader], epoch: int) -> Tensor:
    """Return the augmented image at each position of an epoch, float32 [N, 3, 8, 8]; each must occur exactly once."""
    result, seen = torch.full((N, 3, 8, 8), torch.nan), []
    for one in loaders:
        for micro, batch in one.epoch(epoch):
            own = batch.draws[: micro.own]
            result[own] = batch.images[: micro.own]
            if not (micro.replicated and one.plan.rank):
                seen += own.tolist()
        one.close()
    assert sorted(seen) == list(range(N))
    return result


def test_images_and_labels_belong_together() -> None:
    for _, batch in loader(augment=AugmentConfig()).epoch(0):
        indices = INDICES[batch.draws.numpy()]
        assert torch.equal(batch.labels, torch.from_numpy(LABELS[indices]))
        torch.testing.assert_close(
            batch.images, torch.from_numpy(PIXELS[indices] / np.float32(255)).permute(0, 3, 1, 2)
        )


def test_augmentation_does_not_depend_on_workers_processes_or_accumulation() -> None:
    expected = by_position([loader()], 3)
    assert torch.equal(by_position([loader(workers=1)], 3), expected)
    assert torch.equal(by_position([loader(workers=2)], 3), expected)
    assert torch.equal(by_position([loader(batch_size=4, grad_accum_steps=2)], 3), expected)
    for world in (2, 3):
        ranks = [loader(world=world, rank=rank, mixing=True) for rank in range(world)]
        assert torch.equal(by_position(ranks, 3), expected)


def test_augmentation_differs_between_epochs_and_seeds_and_is_reproducible() -> None:
    one = loader()
    first, second = by_position([loader()], 0), by_position([loader()], 1)
    assert (first != second).flatten(1).any(1).all()
    assert (first != by_position([loader(seed=1)], 0)).flatten(1).any(1).all()
    assert torch.equal(torch.cat([b.images for _, b in one.epoch(0)]), torch.cat([b.images for _, b in one.epoch(0)]))


def test_an_image_drawn_twice_is_augmented_differently() -> None:
    weights = balanced_weights(LABELS[INDICES]) * (INDICES < 7)  # two images only
    batches = [batch for _, batch in loader(weights=weights).epoch(0)]
    images, draws = torch.cat([b.images for b in batches]), torch.cat([b.draws for b in batches])
    assert draws.tolist() == list(range(N, 2 * N))
    assert len({image.numpy().tobytes() for image in images}) == N


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_and_be_abandoned_at_any_step(workers: int) -> None:
    one = loader(workers, grad_accum_steps=2)
    whole = list(one.epoch(2))
    for first in (0, 3, 1):
        rest = []
        for micro, batch in one.epoch(2, first):
            rest.append((micro, batch))
            if first == 3 and len(rest) == 1:
                break  # the next epoch must not get what the workers prepared for this one
        expected = [pair for pair in whole if pair[0].step >= first][: len(rest)]
        assert [m.positions.tolist() for m, _ in rest] == [m.positions.tolist() for m, _ in expected]
        assert all(torch.equal(b.images, e.images) for (_, b), (_, e) in zip(rest, expected, strict=True))
    assert list(one.epoch(2, 100)) == []
    one.close()


def test_the_main_process_keeps_its_random_states() -> None:
    for workers in (0, 1):
        torch.manual_seed(5)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()
        one = loader(workers)
        for _ in one.epoch(0):
            pass
        one.close()
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()) == states[1:]


def test_mixing_partners_follow_the_examples_of_the_process() -> None:
    for rank in (0, 1):
        for micro, batch in loader(world=2, rank=rank, mixing=True).epoch(0):
            assert len(batch.images) == len(batch.labels) == len(batch.draws) == len(micro.positions) >= micro.own
            assert micro.partners is not None
            assert micro.partners.max() < len(micro.positions)


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluation(workers: int = 0, world: int = 1, rank: int = 0, batch_size: int = 5) -> EvaluationLoader:
    split = SplitDataset(InMemoryImages(PIXELS, "toy", 3), LABELS, INDICES, transform(), seed=0)
    source = WorkerBatches(split, workers, pin_memory=False)
    return EvaluationLoader(source, plan_evaluation(N, batch_size, world, rank))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_do_not_depend_on_processes_and_are_reproducible(workers: int) -> None:
    """Even if the split's transform is random."""
    alone = evaluation(workers)
    once, again = (torch.cat([b.images for b in alone]) for _ in range(2))
    assert torch.equal(once, again)
    parts = [batch for rank in range(3) for batch in evaluation(workers, 3, rank)]
    assert np.concatenate([b.positions for b in parts]).tolist() == list(range(N))
    assert torch.equal(torch.cat([b.images for b in parts]), once)
    assert torch.equal(torch.cat([b.labels for b in parts]), torch.from_numpy(LABELS[INDICES]))


def test_a_process_without_examples_has_no_batches() -> None:
    split = SplitDataset(InMemoryImages(PIXELS, "toy", 3), LABELS, INDICES[:1], transform(), seed=0)
    source = WorkerBatches(split, 2, pin_memory=False)
    assert list(EvaluationLoader(source, plan_evaluation(1, 4, 3, 0))) == []


# -- tensors in memory -------------------------------------------------------------------------------------------------


def test_features_have_the_same_order_as_images() -> None:
    features, labels = torch.arange(N, dtype=torch.float32)[:, None].expand(N, 4), torch.from_numpy(LABELS[INDICES])
    for plan in ({"grad_accum_steps": 2}, {"world": 2, "rank": 1}, {"weights": balanced_weights(LABELS[INDICES])}):
        settings = {"size": N, "seed": 0, "batch_size": 6, **plan}
        tensors = TrainLoader(TensorBatches([features], LABELS[INDICES]), SamplingPlan(**settings))  # type: ignore[arg-type]
        for (feature_micro, feature_batch), (image_micro, image_batch) in zip(
            tensors.epoch(1, 1), loader(**plan).epoch(1, 1), strict=True
        ):
            assert feature_micro.positions.tolist() == image_micro.positions.tolist()
            assert torch.equal(feature_batch.labels, image_batch.labels)
            assert torch.equal(feature_batch.draws, image_batch.draws)
            assert torch.equal(labels[feature_batch.images[:, 0].long()], feature_batch.labels)


def test_each_feature_is_evaluated_once() -> None:
    features = torch.randn(N, 4)
    for world in (1, 2, 3):
        parts = [
            b
            for rank in range(world)
            for b in EvaluationLoader(TensorBatches([features], np.arange(N)), plan_evaluation(N, 5, world, rank))
        ]
        assert torch.equal(torch.cat([b.images for b in parts]), features)
        assert np.concatenate([b.positions for b in parts]).tolist() == torch.cat([b.labels for b in parts]).tolist()


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> EncodedImages:
    """Write twelve images, of which number 7 is truncated."""
    names = [f"image {i}.png" for i in range(12)]
    for i, name in enumerate(names):
        Image.fromarray(PIXELS[i]).save(tmp_path / name)
    content = (tmp_path / names[7]).read_bytes()
    (tmp_path / names[7]).write_bytes(content[: len(content) // 2])
    return EncodedImages(ImageFiles(tmp_path, names), 3)


def of_files(files: EncodedImages, workers: int, how: Any) -> Iterator[Any]:
    plan = SamplingPlan(size=12, seed=0, batch_size=2)
    split = SplitDataset(files, LABELS[:12], np.arange(12), how, plan.seed)
    return TrainLoader(WorkerBatches(split, workers, pin_memory=False), plan).epoch(0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.timeout(30)
def test_an_unreadable_image_ends_the_epoch_and_is_named(files: EncodedImages, workers: int) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        list(of_files(files, workers, transform()))
    assert caught.value.name == "image 7.png"
    assert caught.value.reason.startswith("damaged")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_transform_names_the_image_and_keeps_its_traceback(files: EncodedImages, workers: int) -> None:
    too_large = transform(AugmentConfig.model_validate({"train": [{"name": "RandomCrop", "size": 9}]}))
    with pytest.raises(RunFailed, match=r"image \d+.png: the transforms failed: Required crop size") as caught:
        list(of_files(files, workers, too_large))
    assert "Traceback" in caught.value.__notes__[0]
    wrong_size = build_transform(
        "train", AugmentConfig(), Preprocessing(3, (9, 9), None, False, "bilinear", *[(0.5,) * 3] * 2)
    )
    with pytest.raises(UserError, match=r"^augment.train, .*8 x 8 pixels .* but data.image_size is 9"):
        list(of_files(files, workers, wrong_size))


@pytest.mark.timeout(30)
def test_workers_end_at_once_even_if_a_traceback_references_the_loader(files: EncodedImages) -> None:
    """PyTorch's own shutdown would wait 5 s per worker: with 16 workers the other processes would time out."""
    before = {child.pid for child in multiprocessing.active_children()}
    kept = of_files(files, 2, transform())
    with pytest.raises(UnreadableImageError):
        list(kept)
    assert {child.pid for child in multiprocessing.active_children()} <= before
    one = loader(2)
    epoch = one.epoch(0)
    next(epoch)
    start = time.monotonic()
    one.close()
    assert time.monotonic() - start < 4
    assert {child.pid for child in multiprocessing.active_children()} <= before
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(one.epoch(0))


# A process that receives signals while its workers prepare batches; it is separate, so that pytest gets no signal.
SIGNALED = """
import json, os, signal, sys, time
import numpy as np
from toolkit.data.image_sources import InMemoryImages
from toolkit.data.dataloader import SplitDataset, TrainLoader, WorkerBatches
from toolkit.data.sampling import SamplingPlan
from toolkit.data.preprocessing import Preprocessing
from toolkit.augment.transforms import build_transform
from toolkit.recipe.schema import AugmentConfig

mode = sys.argv[1]
images = InMemoryImages(np.zeros((64, 8, 8), np.uint8), "toy", 1)
way = build_transform("train", AugmentConfig(), Preprocessing(1, (8, 8), None, True, "bilinear", (0.0,), (1.0,)))
labels = np.zeros(64, np.int64)
source = WorkerBatches(SplitDataset(images, labels, np.arange(64), way, seed=0), 2, pin_memory=False)
loader = TrainLoader(source, SamplingPlan(size=64, seed=0, batch_size=2))
got = []
for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(number))
epoch = loader.epoch(0)
next(epoch)
children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
print(json.dumps(children), flush=True)
if mode == "hang up":
    time.sleep(60)
while len(set(got)) < 4 and mode == "signals":
    time.sleep(0.01)
count = 1 + sum(1 for _ in epoch)
print(json.dumps([count, sorted(set(got))]), flush=True)
"""


def start(mode: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start the process above; return it and the process ids of its workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALED, mode], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    return process, [int(child) for child in json.loads(process.stdout.readline())]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@needs_linux
def test_workers_ignore_signals_to_the_group_and_end_with_the_training_process() -> None:
    """A scheduler signals the whole process group, but the current step must still get its batches."""
    process, workers = start("signals")
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.killpg(process.pid, number)
    assert process.stdout is not None
    count, got = json.loads(process.stdout.readline())
    assert count == 32
    assert len(got) == 4
    # The loader is still referenced, so Python ends the workers by SIGTERM, which they obey if the parent sends it.
    assert process.wait(20) == 0
    assert not any(alive(worker) for worker in workers)


@needs_linux
def test_workers_end_if_the_training_process_is_killed() -> None:
    process, workers = start("hang up")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(worker) for worker in workers)


# -- number of workers ------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Simulate a machine with 64 CPUs, without quota or scheduler; return the root of its file system."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(root: Path, **files: str) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)


def test_cpus_of_the_job_are_divided_among_processes(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cpus(1, machine) == 64
    assert available_cpus(8, machine) == 8
    assert available_cpus(100, machine) == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert available_cpus(1, machine) == 12
    assert available_cpus(4, machine) == 3  # one task, which launched four processes
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert available_cpus(4, machine) == 12  # four tasks with twelve each


def test_cpus_are_limited_by_quota(machine: Path) -> None:
    write(machine, **{"sys/fs/cgroup/cpu.max": "max 100000\n", "proc/self/cgroup": "0::/job/step\n"})
    assert available_cpus(1, machine) == 64
    write(machine, **{"sys/fs/cgroup/job/cpu.max": "600000 100000\n", "sys/fs/cgroup/job/step/cpu.max": "max 100000\n"})
    assert available_cpus(1, machine) == 6
    assert available_cpus(2, machine) == 3


def test_cpus_are_limited_by_a_quota_of_cgroup_version_1(machine: Path) -> None:
    files = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    write(machine, **files)
    assert available_cpus(1, machine) == 2
    write(machine, **{"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"})
    assert available_cpus(1, machine) == 64


def test_the_number_of_workers_follows_recipe_and_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files, array = EncodedImages(ImageFiles(tmp_path, ["1.png"]), 3), InMemoryImages(PIXELS, "toy", 3)
    monkeypatch.setattr("toolkit.data.dataloader.available_cpus", lambda processes: 64 // processes)
    assert worker_count("auto", files, 8) == 7  # one CPU is the training process's own
    assert worker_count("auto", files, 1) == 16
    assert worker_count("auto", files, 64) == 0
    assert worker_count("auto", array, 1) == 0
    assert worker_count(3, array, 1) == 3


def test_real_images_are_loaded(caltech_subset: Path) -> None:
    data = open_dataset(DataConfig(dataset="caltech101", root=str(caltech_subset)))
    preprocessing = Preprocessing(3, (64, 64), 73, True, "bilinear", (0.5,) * 3, (0.5,) * 3)
    way = build_transform("train", AugmentConfig(), preprocessing)
    split = SplitDataset(data.images, data.labels, data.lists["train"], way, seed=0)
    one = TrainLoader(WorkerBatches(split, 2, pin_memory=False), SamplingPlan(size=80, seed=0, batch_size=32))
    batches = [batch for _, batch in one.epoch(0)]
    one.close()
    assert [tuple(b.images.shape) for b in batches] == [(32, 3, 64, 64), (32, 3, 64, 64), (16, 3, 64, 64)]
    assert torch.bincount(torch.cat([b.labels for b in batches])).tolist() == [8] * 10
