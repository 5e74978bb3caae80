"""When one of several processes fails, the others exit soon and its error comes last; disk, memory and image errors."""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from trainers import EMA, STATEFUL, Trainers, at_call, kill_self, only_run, outcome, uninterrupted, write_recipe

import toolkit.data.dataloader
import toolkit.runs
import toolkit.training.checkpoint
import toolkit.training.context
from toolkit.distributed import failure_detection
from toolkit.models.build import ModelBundle
from toolkit.training.task import SingleLabel
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

LIMIT_S = 30


def statuses_and_output(
    folder: Path, world: int, prepare: Callable[[int], None], *settings: str, text: str = STATEFUL
) -> tuple[list[int], str]:
    """Return exit statuses and output of trainers that must exit by themselves within the time limit."""
    settings = ("--set", f"train.batch_size={18 if world == 3 else 16}", *settings)
    trainers = Trainers(world, folder, write_recipe(folder, text), *settings, prepare=prepare)
    trainers.wait_until_first_ends()
    statuses = trainers.wait(LIMIT_S)
    return statuses, trainers.text()


def fail_on(rank: int, phase: str, act: Callable[[], None], mine: int) -> None:
    owner, name = {"step": (TrainStep, "_update"), "evaluation": (SingleLabel, "outcomes")}[phase]
    if mine == rank:
        at_call(owner, name, 5, act)


def raise_error() -> None:
    raise ZeroDivisionError("a fault planted by the test")


@pytest.mark.parametrize(
    ("world", "rank", "phase"),
    [pytest.param(2, 0, "step", marks=pytest.mark.extended), (2, 1, "step"), (3, 1, "evaluation")],
)
def test_an_exception_ends_all_processes_and_is_printed_last(tmp_path: Path, world: int, rank: int, phase: str) -> None:
    statuses, text = statuses_and_output(tmp_path, world, functools.partial(fail_on, rank, phase, raise_error), *EMA)
    assert all(status != 0 for status in statuses), text
    assert text.rstrip().endswith("ZeroDivisionError: a fault planted by the test")
    assert f"rank {rank}: Traceback" in text
    assert text.count("Traceback") == 1


def add_an_unused_parameter(rank: int) -> None:
    original = toolkit.training.context.build_model

    def build(*arguments: Any, **named: Any) -> ModelBundle:
        built = original(*arguments, **named)
        built.module.head.unused = torch.nn.Parameter(torch.zeros(3))
        return built

    toolkit.training.context.build_model = build


def test_a_parameter_without_gradient_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    statuses, text = statuses_and_output(tmp_path, 2, add_an_unused_parameter, *EMA)
    assert all(status != 0 for status in statuses), text
    assert 'need a gradient of each trained parameter: freeze them, transfer.freeze = ["head.unused"]' in text


@pytest.mark.parametrize(("world", "rank"), [(2, 0), pytest.param(2, 1, marks=pytest.mark.extended), (3, 1)])
def test_a_killed_process_ends_the_others_and_is_named(tmp_path: Path, world: int, rank: int) -> None:
    statuses, text = statuses_and_output(tmp_path, world, functools.partial(fail_on, rank, "step", kill_self), *EMA)
    assert statuses[rank] == -signal.SIGKILL
    assert all(status != 0 for status in statuses), text
    last = text.strip().splitlines()[-1]
    assert "ended without an error message" in last
    assert rank == 0 or f"rank {rank} ended without an error message" in last
    assert "Traceback" not in text


def test_a_blocked_main_thread_does_not_keep_its_process_alive(tmp_path: Path) -> None:
    """This is the state of a process that waits for a GPU that waits for the lost process."""

    def prepare(rank: int) -> None:
        at_call(TrainStep, "_update", 5, kill_self if rank == 1 else functools.partial(time.sleep, 100))

    statuses, text = statuses_and_output(tmp_path, 2, prepare, *EMA)
    assert statuses == [1, -signal.SIGKILL]
    assert "rank 1 ended without an error message" in text.strip().splitlines()[-1]


# -- unresponsive processes -------------------------------------------------------------------------------------------


def stop_self_at_step(count: int, rank: int, mine: int) -> None:
    """Suspend one rank before its ``count``-th step, as SIGSTOP or a hanging machine would."""
    if mine == rank:
        at_call(TrainStep, "_update", count, functools.partial(os.kill, os.getpid(), signal.SIGSTOP))


def with_a_stopped_rank(folder: Path, world: int, rank: int) -> Trainers:
    """Start trainers, one of which is suspended in its fifth step, after the checkpoint of the third."""
    settings = ("--set", f"train.batch_size={18 if world == 3 else 16}", *EMA)
    prepare = functools.partial(stop_self_at_step, 5, rank)
    trainers = Trainers(world, folder, write_recipe(folder, STATEFUL), *settings, prepare=prepare)
    stopped = psutil.Process(trainers.processes[rank].pid)
    trainers.wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED)
    return trainers


@pytest.mark.parametrize(
    ("world", "rank"),
    [pytest.param(2, 0, marks=pytest.mark.extended), pytest.param(3, 1, marks=pytest.mark.slow)],
)
def test_after_a_stop_request_an_unresponsive_process_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, rank: int
) -> None:
    monkeypatch.setattr(failure_detection, "SILENT_S", 3.0)
    monkeypatch.setattr(failure_detection, "GRACE_S", 2.0)
    trainers = with_a_stopped_rank(tmp_path, world, rank)
    others = [other for other in range(world) if other != rank]
    began = time.monotonic()
    trainers.signal(signal.SIGTERM, others[0])
    trainers.wait_until(lambda: not any(trainers.processes[other].is_alive() for other in others))
    assert time.monotonic() - began < 3 + 2 + failure_detection.SEND_S + 4
    assert [trainers.processes[other].exitcode for other in others] == [3] * len(others)
    who = rf"rank {rank} \(\S+, process {trainers.processes[rank].pid}\)"
    message = rf"rank \d: {who} has not answered for 3 s and a stop was requested .* --resume continues from it"
    assert len(re.findall(message, trainers.text())) == 1, trainers.text()
    trainers.signal(signal.SIGCONT, rank)
    assert trainers.wait(LIMIT_S)[rank] not in (0, -signal.SIGKILL), "it exits by itself once it is continued"
    assert "Traceback" not in trainers.text()
    run = only_run(tmp_path)
    resumed = Trainers(world, tmp_path / "resumed", "--resume", run.path)
    assert resumed.wait() == [0] * world, resumed.text()
    assert "resuming after epoch 0, step 3" in resumed.text()
    plain = uninterrupted(world, STATEFUL, *EMA) if world == 2 else None
    assert plain is None or outcome(run) == plain, "results are bit-identical for up to two processes"
    assert run.is_finished


def test_without_a_stop_request_an_unresponsive_process_is_named_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_detection, "NOTICE_S", 3.0)
    trainers = with_a_stopped_rank(tmp_path, 2, 1)
    warning = rf"warning: rank 1 \(\S+, process {trainers.processes[1].pid}\) has not answered for \d+ s: it is stopped"
    trainers.wait_until(lambda: re.search(warning, trainers.text()) is not None)
    trainers.signal(signal.SIGCONT, 1)
    assert trainers.wait() == [0, 0], trainers.text()
    assert len(re.findall(warning, trainers.text())) == 1
    assert re.search(r"rank 1 \(\S+, process \d+\) responds again after \d+ s", trainers.text())
    assert outcome(only_run(tmp_path)) == uninterrupted(2, STATEFUL, *EMA)


def test_the_launcher_receives_the_error_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    statuses_and_output(tmp_path, 1, functools.partial(fail_on, 0, "step", raise_error), *EMA)
    assert "ZeroDivisionError: a fault planted by the test" in (tmp_path / "error.json").read_text()


# -- images -----------------------------------------------------------------------------------------------------------

IMAGES = """
[model]
source = "toolkit"
[model.convnet]
blocks = [{{ channels = 4 }}]
"""


def image_folder(root: Path) -> Path:
    """Write three classes of twenty noisy images of 12 x 12 pixels."""
    for name in ("a", "b", "c"):
        (root / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.random.default_rng(number).integers(0, 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
    return root


def damage_middle(path: Path) -> None:
    """Damage an image so that only decoding detects it: both ends of the file stay intact."""
    data = bytearray(path.read_bytes())
    middle = data.index(b"IDAT") + 20
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)


def images_settings(root: Path, *more: str) -> list[str]:
    settings = ['data.dataset="imagefolder"', f'data.root="{root}"', "data.split={ validation = 0.2, test = 0.2 }",
                "data.image_size=12", *more]  # fmt: skip
    # The base recipe's limits are for the digits.
    return [part for s in settings for part in ("--set", s)]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2)])
def test_a_damaged_image_in_mid_epoch_ends_all_processes_and_is_named(tmp_path: Path, world: int, workers: int) -> None:
    root = image_folder(tmp_path / "images")
    for number in range(0, 20, 3):
        damage_middle(root / "b" / f"{number:02d}.png")
    settings = images_settings(root, f"data.workers={workers}", 'data.cache="off"')
    statuses, text = statuses_and_output(tmp_path, world, lambda _: None, *settings, text=IMAGES)
    assert all(status != 0 for status in statuses), text
    assert ".png: damaged (" in text.strip().splitlines()[-1]
    assert "b/" in text.strip().splitlines()[-1]
    assert 'data.on_bad_image = "skip"' in text.strip().splitlines()[-1]
    assert "Traceback" not in text


def test_skipping_leaves_out_the_same_images_in_all_processes_up_to_a_limit(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    damage_middle(root / "a" / "07.png")
    (root / "c" / "11.png").write_bytes((root / "c" / "11.png").read_bytes()[:100])
    epochs = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        settings = images_settings(root, 'data.on_bad_image="skip"', "data.max_bad_fraction=0.05")
        statuses, text = statuses_and_output(folder, world, lambda _: None, *settings, text=IMAGES)
        assert statuses == [0] * world, text
        run = only_run(folder)
        assert run.summary["images_left_out"] == 2
        assert "left out 2 unreadable images" in text
        epochs.append(run.epoch_records())
    for one, two in zip(*epochs, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    statuses, text = statuses_and_output(
        tmp_path / "3", 1, lambda _: None,
        *images_settings(root, 'data.on_bad_image="skip"', "data.max_bad_fraction=0.02"), text=IMAGES,
    )  # fmt: skip
    assert statuses == [2]
    assert "2 of 55 images cannot be read, more than data.max_bad_fraction = 0.02 allows" in text


# -- disk -------------------------------------------------------------------------------------------------------------


def full_disk(calls: range, rank: int) -> None:
    """Make some writes to checkpoints/ and metrics.jsonl fail half-way with a full disk."""
    original, count = toolkit.training.checkpoint.write_atomically, [0]

    def write(path: Path, data: bytes) -> None:
        count[0] += 1
        if count[0] in calls:
            path.with_name(f".{path.name}.0.tmp").write_bytes(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, data)

    toolkit.training.checkpoint.write_atomically = write  # type: ignore[assignment]
    write_metrics, lines = toolkit.runs.Run.write_metrics, [0]

    def write_half(run: Any, length: int, text: bytes) -> int:
        lines[0] += 1
        if lines[0] in calls:
            write_metrics(run, length, text[: len(text) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_metrics(run, length, text)

    toolkit.runs.Run.write_metrics = write_half  # type: ignore[method-assign]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_a_full_disk_is_a_warning_and_nothing_is_lost(tmp_path: Path, world: int) -> None:
    plain = uninterrupted(world, STATEFUL, *EMA)
    statuses, text = statuses_and_output(tmp_path / "full", world, functools.partial(full_disk, range(4, 12)), *EMA)
    assert statuses == [0] * world, text
    assert "warning: a checkpoint could not be written in" in text
    assert "No space left on device" in text
    assert "(No space left on device); the checkpoint of epoch 1, step 3 is kept, and the run continues" in text
    assert outcome(only_run(tmp_path / "full")) == plain


def test_a_full_disk_stops_the_run_if_the_recipe_says_so(tmp_path: Path) -> None:
    stop = ("--set", 'checkpoint.on_write_error="stop"')
    plain = uninterrupted(2, STATEFUL, *EMA, *stop)
    folder = tmp_path / "full"
    statuses, text = statuses_and_output(folder, 2, functools.partial(full_disk, range(9, 12)), *EMA, *stop)
    assert statuses == [1, 1], text
    assert "No space left on device" in text.strip().splitlines()[-1]
    assert "Traceback" not in text
    trainers = Trainers(2, folder, "--resume", only_run(folder).path)
    assert trainers.wait() == [0, 0], trainers.text()
    assert outcome(only_run(folder)) == plain


def test_a_disk_that_stays_full_ends_the_run_with_a_message(tmp_path: Path) -> None:
    statuses, text = statuses_and_output(tmp_path, 2, functools.partial(full_disk, range(9, 10_000)), *EMA)
    assert statuses == [1, 1], text
    assert "results could not be written" in text.strip().splitlines()[-1]


def test_a_real_full_disk_is_handled_like_a_simulated_one(tmp_path: Path) -> None:
    """The operating system limits file sizes: weights and log lines fit, checkpoints do not."""
    import resource

    def limited(rank: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    statuses, text = statuses_and_output(tmp_path, 1, limited, *EMA)
    assert statuses == [0], text
    assert "warning: a checkpoint could not be written" in text
    assert "(File too large); there is no checkpoint to resume from, and the run continues" in text
    assert "checkpoint of" not in text
    assert not list(only_run(tmp_path).checkpoints.glob("*.pt"))
    assert not list(only_run(tmp_path).checkpoints.glob(".*")), "no partial file is left"


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_root_that_cannot_be_written_is_reported_before_training(tmp_path: Path, world: int) -> None:
    (tmp_path / "file").write_text("")
    settings = (*EMA, "--set", f'recipe.run_root="{tmp_path}/file/runs"')
    statuses, text = statuses_and_output(tmp_path, world, lambda _: None, *settings)
    assert statuses == [2] * world, text
    assert "recipe.run_root: cannot create a run directory under" in text.strip().splitlines()[-1]


def test_a_second_trainer_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, STATEFUL)
    workers = (*EMA, "--set", "data.workers=2", "--set", 'data.cache="off"')
    there = tmp_path / "there"

    def slow(rank: int) -> None:
        at_call(TrainStep, "_update", 9, lambda: (there.touch(), time.sleep(60)))  # type: ignore[arg-type, func-returns-value]

    first = Trainers(1, tmp_path, recipe, *workers, prepare=slow)
    first.wait_until(there.exists)
    second = Trainers(1, tmp_path / "second", "--resume", only_run(tmp_path).path)
    assert second.wait() == [2]
    assert "is in use by another trainer, which is still running" in second.text()
    first.signal(signal.SIGKILL)
    first.wait()
    third = Trainers(1, tmp_path / "third", "--resume", only_run(tmp_path).path)  # although data workers still run
    assert third.wait() == [0], third.text()


# -- memory -----------------------------------------------------------------------------------------------------------


def no_memory(error: type[Exception], message: str, rank: int) -> None:
    def fail() -> None:
        raise error(message)

    if rank == 1:
        at_call(TrainStep, "_forward_backward", 5, fail)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_out_of_memory_says_what_to_try(tmp_path: Path, error: type[Exception], message: str) -> None:
    statuses, text = statuses_and_output(tmp_path, 2, functools.partial(no_memory, error, message), *EMA)
    assert all(status != 0 for status in statuses)
    assert "rank 1: out of memory with 8 images at once in each process (train.batch_size = 16 over 2" in text
    last = text.strip().splitlines()[-1]
    assert all(key in last for key in ("train.grad_accum_steps", "train.precision", "train.batch_size"))
    assert "Traceback" not in text


def test_a_real_failing_allocation_is_reported_as_out_of_memory(tmp_path: Path) -> None:
    def allocate_too_much(rank: int) -> None:
        at_call(TrainStep, "_forward_backward", 5, lambda: torch.empty(2**60))  # type: ignore[arg-type, return-value]

    statuses, text = statuses_and_output(tmp_path, 1, allocate_too_much, *EMA)
    assert statuses == [1]
    assert "out of memory with 16 images at once" in text
