"""What a search assigns where workers come and go. Nothing is trained here (on a cluster: test_slurm_arrays.py)."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from studies import write_study

from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory, claim, external_worker, open_runs
from toolkit.study.expand import expand, read_study
from toolkit.study.init import CONTROLLER, init_study, study_lock
from toolkit.study.search_driver import SearchDriver

SEARCH = """
[study.space]
optimizer.lr = { log_uniform = [1e-3, 1e-1] }
[study.bohb]
trials = 9
min_epochs = 1
max_epochs = 3
"""


def begun(tmp_path: Path) -> tuple[StudyDirectory, SearchDriver]:
    """A search in whose folder nothing was trained yet."""
    study = read_study(write_study(tmp_path, SEARCH))
    with study_lock(study) as folder:
        init_study(study, folder, expand(study))
    return folder, SearchDriver(study, folder)


def test_one_assignment_lies_ready_for_the_next_worker_and_no_more(tmp_path: Path) -> None:
    folder, search = begun(tmp_path)
    locks = []
    for busy in range(4):
        assert search.step(1, in_all=4)
        assert len(search.under_way) == min(busy + 1, 4)
        locks.append(next(lock for run in open_runs(folder) if (lock := claim(run))))
    search.step(1, in_all=4)
    assert len(search.under_way) == 4, "all four workers have something"
    for lock in locks:
        lock.release()


def test_without_others_a_search_assigns_what_its_own_workers_can_take(tmp_path: Path) -> None:
    folder, search = begun(tmp_path)
    search.step(2)
    locks = [claim(run) for run in open_runs(folder)]
    search.step(2)
    assert len(search.under_way) == len(locks) == 2


def test_who_helps_has_something_to_do_and_who_was_killed_has_not(tmp_path: Path) -> None:
    folder, search = begun(tmp_path)
    with external_worker(folder):
        search.step(1)
        assert len(search.under_way) == 2
    context = multiprocessing.get_context("fork")
    helper = context.Process(target=help_until_killed, args=(folder, started := context.Event()))
    helper.start()
    assert started.wait(30)
    search.step(2)
    assert len(search.under_way) == 3
    helper.kill()
    helper.join()
    search.step(3)
    assert len(search.under_way) == 3


def help_until_killed(folder: StudyDirectory, started: Event) -> None:
    with external_worker(folder):
        started.set()
        time.sleep(60)


def test_the_folder_has_one_leader(tmp_path: Path) -> None:
    folder, _ = begun(tmp_path)
    first = claim(Run(folder.path), CONTROLLER)
    assert first is not None
    assert claim(Run(folder.path), CONTROLLER) is None
    first.release()
    assert claim(Run(folder.path), CONTROLLER) is not None
