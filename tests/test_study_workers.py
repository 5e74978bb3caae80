"""Killed workers and controllers do not change the results of a study."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli import toolkit
from studies import GRID, outcomes, runs_of, start, study_folder, write_study
from trainers import Trainers

from toolkit.distributed.signals import GracefulStop
from toolkit.errors import UserError
from toolkit.runs import Run
from toolkit.study import worker, worker_pool
from toolkit.study.directory import (
    STUDY_COPY,
    StudyDirectory,
    claim,
    failure_of,
    is_claimed,
    is_open,
    open_runs,
    set_target_epoch,
    state_of,
)
from toolkit.study.torchrun import train_with_torchrun, train_worker_main
from toolkit.study.worker import acquire_run, train_run, worker_loop
from toolkit.study.worker_pool import LOGS, WorkerPool, WorkerSlot, slots_for

WAIT_S = 600.0
OFTEN = "[checkpoint]\nevery_steps = 2\nevery_minutes = 0.0\n"
EIGHT = """
[study]
seeds = 2

[study.grid]
optimizer.lr = [0.2, 0.05]
optimizer.momentum = [0.5, 0.9]
"""
KILLS = 3

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]  # for machines on which starting a process takes a minute


def wait_until(condition: Callable[[], bool], shown: Path | None = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, shown.read_text() if shown else "timed out"
        time.sleep(0.02)


def progress(folder: StudyDirectory) -> int:
    """Return the total size of the runs' logs, which grows as they train."""
    if not folder.exists:
        return 0
    names = {member.run for member in folder.members if member.run is not None}
    return sum(len((folder.path / name / "log.txt").read_text()) for name in names if _has_log(folder, name))


def _has_log(folder: StudyDirectory, name: str) -> bool:
    return (folder.path / name / "log.txt").exists()


def workers_of(folder: StudyDirectory) -> list[int]:
    """Return the process id of the most recent worker in each slot."""
    found = []
    for log in sorted((folder.path / LOGS).glob("*.txt")):
        ids = re.findall(r"worker \d+, process (\d+)", log.read_text())
        found += [int(ids[-1])] if ids else []
    return found


@contextlib.contextmanager
def killing(folder: StudyDirectory, kills: int, draw: random.Random) -> Iterator[list[int]]:
    """Kill random workers in the background, ``kills`` times, each time after some run has made progress."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        seen = progress(folder)
        while len(killed) < kills and not over.is_set():
            if progress(folder) > seen and (victims := [pid for pid in workers_of(folder) if pid not in killed]):
                over.wait(draw.random() * 0.3)
                with contextlib.suppress(ProcessLookupError):
                    victim = draw.choice(victims)
                    os.kill(victim, signal.SIGKILL)
                    killed.append(victim)
                seen = progress(folder)
            over.wait(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.extended
def test_a_grid_whose_two_workers_are_killed_at_random_gives_the_same_table(tmp_path: Path) -> None:
    """Of the controllers the first is killed, the second stopped by SIGTERM, and the third finishes."""
    whole = write_study(tmp_path / "whole", OFTEN + EIGHT, epochs=3)
    assert toolkit("study", whole).status == 0
    path = write_study(tmp_path / "killed", OFTEN + EIGHT, epochs=3)
    folder, draw, shown = study_folder(tmp_path / "killed"), random.Random(6), tmp_path / "shown.txt"
    for number in (signal.SIGKILL, signal.SIGTERM):
        controller = start(shown, "study", path, "--parallel", "2")
        try:
            before = progress(folder)
            wait_until(lambda before=before: progress(folder) > before, shown)  # type: ignore[misc]
            time.sleep(draw.random() * 0.5)
            assert controller.pid is not None
            os.kill(controller.pid, number)
            controller.join(WAIT_S)
        finally:
            controller.kill()
        assert controller.exitcode == (3 if number == signal.SIGTERM else -number), shown.read_text()
        # Its workers have noticed, written a checkpoint and exited.
        wait_until(lambda: not any(is_claimed(run) for _, run in runs_of(tmp_path / "killed")))
    with killing(folder, KILLS, draw) as killed:
        result = toolkit("study", path, "--parallel", "2")
    assert result.status == 0, result.stderr
    assert len(killed) >= 2
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")
    assert table_of(tmp_path / "killed") == table_of(tmp_path / "whole")


def table_of(folder: Path) -> list[str]:
    """Return the study's table without the columns of times."""
    columns = "train_loss,train_accuracy,val_loss,val_accuracy,test_loss,test_accuracy,epochs"
    return toolkit("table", study_folder(folder).path, "--columns", columns).stdout.splitlines()


@pytest.mark.slow
def test_a_search_whose_two_workers_are_killed_at_random_is_finished(tmp_path: Path) -> None:
    text = """
        [study]
        bohb = { trials = 12, min_epochs = 1, max_epochs = 4, eta = 2, startup_trials = 4 }
        [study.space]
        optimizer.lr = { log_uniform = [1e-3, 1.0] }
        optimizer.name = { choice = ["sgd", "adamw"] }
        optimizer.momentum = { uniform = [0.1, 0.9], when = { optimizer.name = "sgd" } }
        """
    path = write_study(tmp_path, OFTEN + text)
    folder = study_folder(tmp_path)
    with killing(folder, 3, random.Random(1)):
        result = toolkit("study", path, "--parallel", "2")
    assert result.status == 0, result.stderr
    assert folder.is_complete
    assert len(folder.members) == 12
    epochs = [len(run.epoch_records()) for _, run in runs_of(tmp_path)]
    assert set(epochs) <= {1, 2, 4}
    assert 4 in epochs
    assert 1 in epochs
    for title, run in runs_of(tmp_path):
        assert run.is_finished == (len(run.epoch_records()) == 4), title
    before = outcomes_of_finished(tmp_path)
    assert toolkit("study", path, "--parallel", "2").status == 0
    assert outcomes_of_finished(tmp_path) == before
    assert len(folder.members) == 12


def outcomes_of_finished(folder: Path) -> dict[str, bytes]:
    return {title: run.metrics_file.read_bytes() for title, run in runs_of(folder)}


@pytest.mark.extended
def test_a_search_with_one_worker_is_reproducible_despite_interruptions(tmp_path: Path) -> None:
    text = """
        [study]
        bohb = { trials = 6, min_epochs = 1, max_epochs = 4, eta = 2, startup_trials = 3, seed = 4 }
        space.optimizer.lr = { log_uniform = [1e-3, 1.0] }
        """
    found = []
    for name, stops in (("one", 0), ("two", 2)):
        path = write_study(tmp_path / name, text)
        for _ in range(stops):
            controller = start(tmp_path / "shown.txt", "study", path)
            before = progress(study_folder(tmp_path / name))
            wait_until(lambda name=name, before=before: progress(study_folder(tmp_path / name)) > before)  # type: ignore[misc]
            controller.kill()
            controller.join()
        assert toolkit("study", path).status == 0
        found.append(outcomes_of_finished(tmp_path / name))
    assert found[0] == found[1]


# -- claiming runs ----------------------------------------------------------------------------------------------------


def prepared(folder: Path, study: str, epochs: int = 1) -> StudyDirectory:
    """Write a study directory with its run directories, without training."""
    from toolkit.study.expand import expand, read_study
    from toolkit.study.init import init_study, study_lock

    found = read_study(write_study(folder, study, epochs=epochs))
    with study_lock(found) as there:
        init_study(found, there, expand(found))
    return there


def test_workers_acquire_different_runs_until_none_is_left(tmp_path: Path) -> None:
    folder = prepared(tmp_path, GRID)
    taken = []
    while (claimed := acquire_run(folder)) is not None:
        taken.append(claimed)
    assert len({claimed.run.id for claimed in taken}) == 12
    assert all(state_of(claimed.run) == "running" for claimed in taken)
    taken[3].release()
    again = acquire_run(folder)
    assert again is not None
    assert again.run.id == taken[3].run.id


def test_a_run_trained_by_hand_is_not_acquired_by_a_worker(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "[study]\nseeds = 1\n")
    (run,) = open_runs(folder)
    by_hand = run.lock()
    assert acquire_run(folder) is None
    by_hand.release()
    assert acquire_run(folder) is not None


def test_a_worker_trains_a_run_to_its_target_epoch(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "[study]\nseeds = 1\n", epochs=3)
    (run,) = open_runs(folder)
    for until, epochs in ((1, 1), (1, 1), (2, 2), (None, 3)):
        set_target_epoch(run, until)
        with GracefulStop() as stop:
            assert worker_loop(folder, stop, train_run, wait_for_others=False) == 0
        assert len(run.epoch_records()) == epochs
        assert not is_open(run)
    assert run.is_finished


def test_a_worker_started_on_the_command_line_trains_runs_and_exits_with_the_study(tmp_path: Path) -> None:
    path = write_study(tmp_path, "[study]\nseeds = 2\n", epochs=1)
    assert "is not a study directory" in toolkit("study", path, "--worker").stderr
    folder = prepared(tmp_path, "[study]\nseeds = 2\n")
    assert toolkit("study", path, "--worker").status == 0
    assert all(state_of(run) == "finished" for _, run in runs_of(tmp_path))
    assert folder.is_complete


def test_a_worker_started_on_the_command_line_finishes_a_search(tmp_path: Path) -> None:
    """It does not need the process that started the search."""
    text = """
        [study]
        bohb = { trials = 3, min_epochs = 1, max_epochs = 3 }
        space.optimizer.lr = { log_uniform = [1e-3, 1.0] }
        """
    folder = prepared(tmp_path, text)
    assert folder.members == []
    path = tmp_path / "study.toml"
    write_study(tmp_path, text.replace("trials = 3", "trials = 5"))
    assert toolkit("study", path, "--worker").status == 0
    assert folder.is_complete
    assert sorted(len(run.epoch_records()) for run in folder.runs) == [1, 1, 3]


def test_an_error_that_stops_all_workers_of_a_search_is_one_message(tmp_path: Path) -> None:
    text = "[study]\nbohb = { trials = 3 }\nspace.optimizer.lr = { log_uniform = [1e-3, 1.0] }\n"
    folder = prepared(tmp_path, text)
    (folder.path / STUDY_COPY).write_text("not TOML")
    with GracefulStop() as stop, pytest.raises(UserError, match=r"study\.toml:1:5: error"):
        WorkerPool(folder, [WorkerSlot(0), WorkerSlot(1)]).run(stop, print)


def test_a_run_that_repeatedly_kills_its_worker_is_recorded_as_failed(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "[study]\nseeds = 1\n")
    (run,) = open_runs(folder)
    found = WorkerPool(folder, [WorkerSlot(0)])

    def die() -> str:
        return found._note_death(worker_pool.Worker(WorkerSlot(0), None, None, run.id), -signal.SIGKILL)  # type: ignore[arg-type]

    assert "resumes from its last checkpoint" in die()
    assert "resumes from its last checkpoint" in die()
    (run.checkpoints / "0001-000000.json").write_text("{}")  # the run has made progress
    assert "resumes from its last checkpoint" in die()
    assert "resumes from its last checkpoint" in die()
    assert failure_of(run) is None
    assert "is recorded as failed" in die()
    failure = failure_of(run)
    assert failure is not None
    assert "died 3 times without making progress (signal SIGKILL" in failure.line
    assert not is_open(run)


def test_a_claim_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "[study]\nseeds = 1\n")
    (run,) = open_runs(folder)
    child = os.fork()
    if child == 0:
        held = claim(run)  # keep a reference, because the lock is released with the object
        (tmp_path / "claimed").touch()
        time.sleep(WAIT_S)
        os._exit(held is None)
    try:
        wait_until((tmp_path / "claimed").exists)
        assert is_claimed(run)
        assert acquire_run(folder) is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert acquire_run(folder) is not None


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "gpus_per_run", "runs_per_gpu", "devices", "expected"),
    [
        (None, 1, 1, [], [((), 1, 1.0)]),
        (3, 1, 1, [], [((), 1, 1.0)] * 3),
        (None, 2, 2, [], [((), 1, 1.0)]),
        (None, 1, 1, ["0"], [(("0",), 1, 1.0)]),
        (None, 1, 1, ["0", "1"], [(("0",), 1, 1.0), (("1",), 1, 1.0)]),
        (None, 1, 2, ["0", "1"], [(("0",), 1, 0.5), (("0",), 1, 0.5), (("1",), 1, 0.5), (("1",), 1, 0.5)]),
        (None, 2, 1, ["0", "1", "2", "3", "4"], [(("0", "1"), 2, 1.0), (("2", "3"), 2, 1.0)]),
        (None, 4, 1, ["a", "b"], [(("a", "b"), 2, 1.0)]),
        (1, 1, 1, ["0", "1"], [(("0",), 1, 1.0)]),
        (3, 2, 1, ["0", "1", "2", "3"], [(("0", "1"), 2, 1.0), (("2", "3"), 2, 1.0)]),
        (3, 1, 1, ["0", "1"], [(("0",), 1, 0.5), (("1",), 1, 1.0), (("0",), 1, 0.5)]),
    ],
)
def test_the_machines_gpus_are_divided_among_workers(
    parallel: int | None,
    gpus_per_run: int,
    runs_per_gpu: int,
    devices: list[str],
    expected: list[tuple[tuple[str, ...], int, float]],
) -> None:
    found = slots_for(parallel, gpus_per_run, runs_per_gpu, devices)
    assert [(slot.devices, slot.processes, slot.gpu_share) for slot in found] == expected
    assert [slot.number for slot in found] == list(range(len(found)))


def environment_of_worker(
    folder: StudyDirectory, slot: WorkerSlot, sharing: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Return a worker's environment when it takes a run, and the settings made before that."""
    record = folder.path / "environment.json"
    limits: list[float] = []

    def worker_loop(*_: object, before: Callable[[Run], None], **__: object) -> int:
        before(next(iter(open_runs(folder))))
        names = ("CUDA_VISIBLE_DEVICES", worker_pool.SHARING)
        found = {name: os.environ[name] for name in names if name in os.environ}
        record.write_text(json.dumps(found | {"memory": str(limits)}))
        return 0

    monkeypatch.setattr(worker, "worker_loop", worker_loop)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    context = multiprocessing.get_context("fork")
    link, other = context.Pipe()
    process = context.Process(target=worker_pool._worker, args=(str(folder.path), slot, sharing, other))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert link.recv() == next(iter(open_runs(folder))).id
    return dict(json.loads(record.read_text()))


def test_a_worker_sees_only_its_gpus_and_its_share_of_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    folder = prepared(tmp_path, "[study]\nseeds = 1\n")
    (folder.path / LOGS).mkdir()
    first, _, third, _ = slots_for(None, 1, 2, ["4", "5"])
    assert environment_of_worker(folder, first, 4, monkeypatch) == {
        "CUDA_VISIBLE_DEVICES": "4",
        worker_pool.SHARING: "4",
        "memory": "[0.5]",
    }
    assert environment_of_worker(folder, third, 4, monkeypatch)["CUDA_VISIBLE_DEVICES"] == "5"
    (several, _) = slots_for(None, 2, 1, ["4", "5", "6", "7"])
    found = environment_of_worker(folder, several, 2, monkeypatch)
    assert (found["CUDA_VISIBLE_DEVICES"], found["memory"]) == ("4,5", "[]")
    on_cpu = environment_of_worker(folder, WorkerSlot(0), 3, monkeypatch)
    assert (on_cpu["CUDA_VISIBLE_DEVICES"], on_cpu[worker_pool.SHARING]) == ("4,5,6,7", "3")


def test_processes_of_a_run_on_several_devices_record_their_failure_in_its_directory(tmp_path: Path) -> None:
    folder = prepared(tmp_path, '[[study.rows]]\nname = "a"\nset.optimizer.lr = 1e30\n')
    (run,) = open_runs(folder)
    with pytest.raises(Exception, match="not finite"):
        train_worker_main(run.path, None)
    failure = failure_of(run)
    assert failure is not None
    assert failure.line.startswith("the loss is not finite")


@pytest.mark.slow
def test_a_worker_launches_stops_and_resumes_a_run_on_two_processes(tmp_path: Path) -> None:
    """torchrun is stopped by the stop file after an epoch and then finishes, equal to a launch by hand."""
    folder = prepared(tmp_path, "[study]\nseeds = 1\n", epochs=40)
    (run,) = open_runs(folder)
    set_target_epoch(run, 2)
    with GracefulStop() as stop:
        assert train_with_torchrun(run, 2, (), stop)
        assert len(run.epoch_records()) == 2
        set_target_epoch(run, None)
        threading.Thread(target=_stop_after, args=(run, 4, stop)).start()
        with pytest.raises(Exception, match="resumes with the study"):
            train_with_torchrun(run, 2, (), stop)
    assert not run.is_finished
    with GracefulStop() as stop:
        assert train_with_torchrun(run, 2, (), stop), failure_of(run)
    assert run.summary["processes"] == 2
    alone = write_study(tmp_path / "alone", "", epochs=40, name="recipe.toml")
    trainers = Trainers(2, tmp_path / "alone", alone)
    assert trainers.wait() == [0, 0], trainers.text()
    (path,) = (tmp_path / "alone" / "runs" / "small").iterdir()
    assert Run(path).metrics_file.read_bytes() == run.metrics_file.read_bytes()


def _stop_after(run: Run, epochs: int, stop: GracefulStop) -> None:
    wait_until(lambda: len(run.epoch_records()) >= epochs)
    stop.reason = "the test"
