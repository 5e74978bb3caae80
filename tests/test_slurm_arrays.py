"""Studies as job arrays on a real SLURM cluster."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from cli import toolkit
from PIL import Image
from slurm_cluster import status_of, submit, wait_for_end, wait_until, write

from toolkit.runs import Run
from toolkit.slurm.array import array_record
from toolkit.slurm.job_status import SlurmJob, queue, state_of
from toolkit.study.directory import StudyDirectory
from toolkit.study.worker_pool import LOGS

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

TWO = """
[[study.rows]]
name = "images"
set = { data.dataset = "imagefolder", data.root = "later", data.image_size = 8 }

[[study.rows]]
name = "digits"
set = { optimizer.lr = 0.01 }
"""
SEARCH = """
[study.space]
optimizer.lr = { log_uniform = [1e-3, 1e-1] }
[study.bohb]
trials = 4
min_epochs = 1
max_epochs = 3
"""


def study(name: str, text: str) -> str:
    """Write a study file in the working folder."""
    path = write(name, epochs=1, data='dataset = "digits"')
    Path(path).write_text(Path(path).read_text() + text)
    return path


def test_a_resubmitted_array_trains_only_the_run_that_failed(work_dir: Path) -> None:
    recipe = study("two", TWO)
    _images(work_dir / "later")
    # The array is held until the images of one run are gone.
    text = submit(recipe, "--parallel", "1", "--set", 'slurm.options=["--hold"]')
    folder = StudyDirectory(Path("runs/two"))
    array, table = re.search(r"array job (\d+), 2 task", text)[1], re.search(r"by job (\d+)", text)[1]  # type: ignore[index]
    outcome = toolkit("submit", recipe, "--profile", "local")
    assert outcome.status == 2
    assert f"2 task(s) of array job {array} are still active" in outcome.stderr
    (work_dir / "later").rename("away")
    runs = folder.runs
    subprocess.run(["scontrol", "release", array], check=True)
    most, seen = 0, set()

    def over() -> bool:
        nonlocal most
        known = queue() or {}
        mine = {name: entry for name, entry in known.items() if name.split("_")[0] == array}
        most = max(most, sum(entry.state == "RUNNING" for entry in mine.values()))
        seen.update(entry.reason for entry in mine.values())
        return not any(entry.is_active for entry in (*mine.values(), known[table]))

    wait_until(over, lambda: toolkit("status", str(folder.path)).stdout)
    assert status_of(table) == 0
    assert most == 1
    assert "JobArrayTaskLimit" in seen
    states = [state_of(run, queue()) for run in runs]
    assert states[0].state == "failed"
    assert "later" in states[0].detail
    assert len(SlurmJob(runs[0]).starts) == 1  # a failed task is not requeued
    assert states[1].state == "finished"
    assert f"array job {array}: " in toolkit("status", str(folder.path)).stdout
    assert "failed" in (folder.path / "table.md").read_text()
    before = [(run.path / "summary.json").stat().st_mtime_ns for run in runs[1:]]

    (work_dir / "away").rename("later")
    outcome = toolkit("submit", recipe, "--parallel", "2", "--profile", "local", "--time", "30", "--wait")
    assert outcome.status == 0, outcome.stderr
    assert re.search(r"array job \d+, 1 task", outcome.stdout)
    assert "best.safetensors" not in outcome.stdout, "states and table are printed, not the logs of all runs"
    assert "digits" in outcome.stdout
    assert "digits" in (folder.path / "report.html").read_text()
    assert all(run.is_finished for run in runs), toolkit("status", str(folder.path)).stdout
    assert [(run.path / "summary.json").stat().st_mtime_ns for run in runs[1:]] == before
    rows = list(csv.DictReader((folder.path / "runs.csv").open()))
    assert [row["row"] for row in rows] == ["images", "digits"]
    assert {row["state"] for row in rows} == {"finished"}
    for row, run in zip(rows, runs, strict=True):
        assert float(row["test_accuracy"]) == run.summary["best"]["test_accuracy"]
    outcome = toolkit("submit", recipe, "--profile", "local")
    assert outcome.status == 2
    assert "all 2 runs are finished" in outcome.stderr


def _images(folder: Path) -> None:
    """Write black and white images in a folder per class."""
    for split, count in (("train", 16), ("test", 4)):
        for shade, name in ((0, "black"), (255, "white")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("L", (8, 8), shade).save(folder / split / name / f"{index}.png")


@pytest.mark.extended  # test_study_workers.py tests the same with local processes
def test_a_search_continues_when_one_of_its_tasks_ends(work_dir: Path) -> None:
    path = study("search", SEARCH)
    text = submit(path, "--parallel", "2")
    array, table = re.search(r"array job (\d+), 2 task", text)[1], re.search(r"by job (\d+)", text)[1]  # type: ignore[index]
    folder = StudyDirectory(Path("runs/search").resolve())

    def tasks_with_a_run() -> list[str]:
        return [task for task in ("0", "1") if "claimed " in _worker_log(folder, task)]

    wait_until(lambda: bool(tasks_with_a_run()), lambda: _log(folder, array, "0") + _log(folder, array, "1"))
    first, other = ("0", "1") if tasks_with_a_run()[0] == "0" else ("1", "0")
    # Suspended, the task cannot finish the search before it is cancelled.
    for pid in _processes(array, first):
        os.kill(pid, signal.SIGSTOP)
    assert not folder.is_complete
    subprocess.run(["scancel", f"{array}_{first}"], check=True)
    wait_for_end(array)
    assert status_of(table) == 0
    logs = _log(folder, array, "0") + _log(folder, array, "1") + _worker_log(folder, "0") + _worker_log(folder, "1")
    assert "claimed " in _worker_log(folder, other), logs
    assert folder.is_complete, logs
    assert (queue() or {})[f"{array}_{other}"].state == "COMPLETED", logs
    runs = folder.runs
    assert len(runs) == 4
    assert any(run.is_finished and len(run.epoch_records()) == 3 for run in runs)
    assert {state_of(run, queue()).state for run in runs} == {"finished", "paused"}
    # As many epochs as in an uninterrupted search: one configuration to the end, three for one epoch.
    assert sorted(len(run.epoch_records()) for run in runs) == [1, 1, 1, 3]
    assert "4 configurations, 1 trained to the end; 6 epochs" in (folder.path / "table.md").read_text()
    outcome = toolkit("submit", path, "--profile", "local")
    assert outcome.status == 2
    assert "has tried all 4 configurations" in outcome.stderr


def _log(folder: StudyDirectory, array: str, task: str) -> str:
    path = folder.path / "slurm" / f"log-{array}_{task}.txt"
    return path.read_text() if path.exists() else ""


def _worker_log(folder: StudyDirectory, task: str) -> str:
    """Return the log of the task's only worker."""
    path = folder.path / LOGS / f"{task}.txt"
    return path.read_text() if path.exists() else ""


def _processes(array: str, task: str) -> list[int]:
    """Return the Python processes of a task on any node."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            environment = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdigit() else []
            command = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
        except OSError:
            continue
        names = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
        if names <= set(environment) and b"python" in command.split(b"\0")[0]:
            found.append(int(folder.name))
    return found


def test_a_cancelled_study_stays_cancelled_until_it_is_submitted_again(work_dir: Path) -> None:
    path = study("pair", "[study]\nseeds = 2\n")
    submit(path, "--parallel", "1", "--set", 'slurm.options=["--hold"]')
    folder = StudyDirectory(Path("runs/pair").resolve())
    record = array_record(folder.path)
    assert record is not None
    assert "2 pending (JobHeldUser)" in toolkit("status", str(folder.path)).stdout
    assert f"cancelled job {record['job']}" in toolkit("cancel", str(folder.path)).stdout
    wait_for_end(record["job"], record["table_job"])
    assert [state_of(run, queue()).state for run in folder.runs] == ["cancelled"] * 2
    assert (folder.path / "table.md").exists()


def test_a_refused_study_leaves_nothing_new(work_dir: Path) -> None:
    path = study("refused", "[study]\nseeds = 2\n")
    for refused in (("--partition", "nope"), ("--nodes", "4")):
        outcome = toolkit("submit", path, "--profile", "local", *refused)
        assert outcome.status == 2
        assert "nothing was submitted" in outcome.stderr
        assert not Path("runs").exists()
    # The same holds if a study of that name exists.
    assert toolkit("study", path).status == 0
    content = sorted(file for file in Path("runs").rglob("*") if "slurm" not in file.parts)
    described = Path("runs/refused/study.json").read_bytes()
    Path(path).write_text(Path(path).read_text().replace("seeds = 2", "seeds = 3"))
    outcome = toolkit("submit", path, "--profile", "local", "--partition", "nope")
    assert outcome.status == 2
    assert Path("runs/refused/study.json").read_bytes() == described
    assert sorted(file for file in Path("runs").rglob("*") if "slurm" not in file.parts) == content
    assert all(
        Run(folder).is_finished for folder in Path("runs/refused").iterdir() if (folder / "recipe.toml").exists()
    )
