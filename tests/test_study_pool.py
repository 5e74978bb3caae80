"""Assignments of a search while workers start and end. Nothing is trained; test_slurm_arrays.py trains."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
from studies import write_study

from toolkit.locks import Lock, held, is_held
from toolkit.runs import Run
from toolkit.study import assign
from toolkit.study.assign import SearchAssigner
from toolkit.study.bohb import BohbScheduler
from toolkit.study.directory import WRITING, StudyDirectory, claim, open_runs, record_failure, target_epoch
from toolkit.study.expand import expand, read_study
from toolkit.study.init import init_study, study_lock
from toolkit.study.worker import LockedRun, acquire_run

SEARCH = """
[study.space]
optimizer.lr = { log_uniform = [1e-3, 1e-1] }
[study.bohb]
trials = 9
min_epochs = 1
max_epochs = 9
"""


def prepared(tmp_path: Path) -> StudyDirectory:
    """Write a study directory of a search in which nothing was trained yet."""
    study = read_study(write_study(tmp_path, SEARCH))
    with study_lock(study) as folder:
        init_study(study, folder, expand(study))
    return folder


def next_run(folder: StudyDirectory) -> LockedRun:
    """Acquire a run as a worker does."""
    found = acquire_run(folder)
    if found is None:
        assert SearchAssigner(folder).assign()
        found = acquire_run(folder)
    assert found is not None
    return found


def log_epochs(run: Run, *accuracies: float) -> None:
    """Write the metrics of a run as training does."""
    lines = [
        {"epoch": epoch, "train/loss": 1.0, "val/loss": 1 - value, "val/accuracy": value}
        for epoch, value in enumerate(accuracies, 1)
    ]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_each_worker_gets_a_configuration_and_none_is_assigned_ahead(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    taken = [next_run(folder) for _ in range(4)]
    assert len({locked.run.id for locked in taken}) == len(folder.members) == 4
    changes = [member.changes for member in folder.members]
    assert all(change not in changes[:n] for n, change in enumerate(changes))
    # A released run goes to the next worker without a new configuration.
    taken[2].release()
    assert next_run(folder).run.id == taken[2].run.id
    assert len(folder.members) == 4


def test_only_one_process_assigns_runs_at_a_time(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    with held(folder.path / WRITING):
        assert not SearchAssigner(folder).assign()
    assert folder.members == []
    assert SearchAssigner(folder).assign()
    assert len(folder.members) == 1


def test_a_process_killed_while_assigning_does_not_block_the_others(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=hold_until_killed, args=(folder,))
    process.start()
    deadline = time.monotonic() + 60
    while not is_held(folder.path / WRITING):
        assert time.monotonic() < deadline
    assert not SearchAssigner(folder).assign()
    process.kill()
    process.join()
    assert SearchAssigner(folder).assign()


def hold_until_killed(folder: StudyDirectory) -> None:
    with held(folder.path / WRITING):
        time.sleep(600)


@pytest.mark.parametrize("last", ["create_run", "set_target_epoch", "write"])
def test_a_crash_within_an_assignment_loses_and_duplicates_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """``last`` is the last step of the assignment before the crash."""
    whole, folder = prepared(tmp_path / "whole"), prepared(tmp_path / "crashes")
    for each in (whole, folder):
        next_run(each).release()

    class SimulatedCrash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise SimulatedCrash

    log_epochs(folder.runs[0], 0.5)
    log_epochs(whole.runs[0], 0.5)
    with monkeypatch.context() as patch:
        if last == "create_run":
            patch.setattr(assign, "set_target_epoch", crash)
        elif last == "set_target_epoch":
            patch.setattr(StudyDirectory, "write", crash)
        if last == "write":
            SearchAssigner(folder).assign()
        else:
            with pytest.raises(SimulatedCrash):
                SearchAssigner(folder).assign()
    made = next_run(folder).run
    next_run(whole)
    assert [member.changes for member in folder.members] == [member.changes for member in whole.members]
    assert target_epoch(made) == 1
    assert sum((path / "recipe.toml").exists() for path in folder.path.iterdir()) == 2


def test_results_lead_to_promotions_and_failures_do_not(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    search = SearchAssigner(folder)
    for accuracy in (0.5, 0.9, None):
        locked = next_run(folder)
        if accuracy is None:
            record_failure(locked.run, "diverged")
        else:
            log_epochs(locked.run, accuracy)
        locked.release()
    assert search.assign()
    assert [target_epoch(run) for run in folder.runs] == [1, 3, 1]
    assert list(open_runs(folder)) == [folder.runs[1]]


def test_a_run_that_stopped_early_keeps_its_promotion(tmp_path: Path) -> None:
    """Otherwise another run would be promoted in its place when the search is rebuilt."""
    folder = prepared(tmp_path)
    for accuracy in (0.5, 0.9, 0.7):
        locked = next_run(folder)
        log_epochs(locked.run, accuracy)
        if accuracy == 0.9:
            locked.run.write_json("summary.json", {"best": {"epoch": 1}, "last": {"epoch": 1}})
        locked.release()
    assert SearchAssigner(folder).assign()
    assert len(folder.members) == 4, "the promoted run is finished, so a new configuration is added"
    assert [target_epoch(run) for run in folder.runs] == [1, 3, 1, 1]


def test_a_fully_assigned_search_is_not_asked_again_before_new_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(tmp_path)
    search = SearchAssigner(folder)
    locks: list[LockedRun] = []
    while search.assign():
        locks.append(next_run(folder))
    assert len(locks) == 9
    monkeypatch.setattr(BohbScheduler, "ask", None)
    assert not search.assign()
    monkeypatch.undo()
    log_epochs(locks[3].run, 0.5)
    log_epochs(locks[4].run, 0.6)
    log_epochs(locks[5].run, 0.7)
    assert search.assign()
    assert target_epoch(locks[5].run) == 3


def test_a_worker_notices_that_a_search_was_restarted_with_more_trials(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    worker = SearchAssigner(folder)
    while worker.assign():
        record_failure(next_run(folder).run, "diverged")
    assert len(folder.members) == 9
    study = read_study(write_study(tmp_path, SEARCH), ["study.bohb.trials=12"])
    with study_lock(study):
        init_study(study, folder, expand(study))
    assert worker.assign()
    assert len(folder.members) == 10


def test_a_status_check_never_makes_a_workers_claim_fail(tmp_path: Path) -> None:
    """This holds even if a loaded machine pauses in the middle of the check."""
    import fcntl

    folder = prepared(tmp_path)
    assert SearchAssigner(folder).assign()
    (run,) = folder.runs
    lock = claim(run)
    assert lock is not None
    lock.release()
    with open(run.path / ".claim", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as is_held() does
        assert not is_held(run.path / ".claim"), "concurrent checks do not conflict"
        context = multiprocessing.get_context("fork")
        process = context.Process(target=claim_and_note, args=(run, folder.path / "claimed"))
        process.start()
        time.sleep(0.5)
        assert not (folder.path / "claimed").exists()
        fcntl.flock(file, fcntl.LOCK_UN)
        process.join(60)
    assert (folder.path / "claimed").exists()


def claim_and_note(run: Run, note: Path) -> None:
    lock: Lock | None = claim(run)
    if lock is not None:
        note.touch()
