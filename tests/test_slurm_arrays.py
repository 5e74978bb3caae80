"""Job arrays on a real SLURM cluster."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from cli import toolkit
from PIL import Image
from slurm_cluster import submit, wait_for_end, wait_until, write

from toolkit.slurm.job import Job, find_runs, queue, state_of

pytestmark = pytest.mark.timeout(1800)


def test_array_of_six_goes_on_where_one_failed(place: Path) -> None:
    good = write("good", epochs=1)
    bad = write("bad", epochs=1, data='dataset = "imagefolder"\nroot = "later"\nimage_size = 8')
    # Six runs: three recipes with two seeds, of which bad's first seed finds no images, since they are not there yet.
    six = [good, bad, write("third", epochs=1)]
    text = submit(*six, "--seeds", "0,1", "--parallel", "2", "--name", "six")
    folder = Path("runs/_arrays/six")
    array, table = re.search(r"array job (\d+), 6 run", text)[1], re.search(r"by job (\d+)", text)[1]  # type: ignore[index]
    most, seen = 0, set()

    def over() -> bool:
        nonlocal most
        known = queue() or {}
        mine = {name: entry for name, entry in known.items() if name.split("_")[0] == array}
        most = max(most, sum(entry.state == "RUNNING" for entry in mine.values()))
        seen.update(entry.reason for entry in mine.values())
        if not (place / "later").exists() and state_of(find_runs(folder)[2], known).state == "failed":
            _images(place / "later")  # from here on the second seed of bad can be trained
        return not any(entry.is_active for entry in (*mine.values(), known[table]))

    wait_until(over, lambda: toolkit("status", str(folder)).stdout)
    assert most == 2
    assert "JobArrayTaskLimit" in seen
    runs = find_runs(folder)
    states = [state_of(run, queue()) for run in runs]
    assert [state.state for state in states].count("finished") >= 4
    assert states[2].state == "failed"
    assert "later" in states[2].detail
    assert len(Job(runs[2]).starts) == 1  # a failed one is not requeued
    assert {row["state"] for row in csv.DictReader((folder / "table.csv").open())} == {"finished", "failed"}
    assert "of 6 runs finished" in (folder / "table.md").read_text()
    before = {run.path: (run.path / "summary.json").stat().st_mtime_ns for run in runs if run.is_finished}

    text = submit(*six, "--seeds", "0,1", "--parallel", "2", "--name", "six")
    again, table = re.search(r"array job (\d+), (\d) run", text), re.search(r"by job (\d+)", text)
    assert again is not None
    assert table is not None
    assert int(again[2]) == 6 - len(before)
    wait_for_end(again[1], table[1])
    assert all(run.is_finished for run in runs), toolkit("status", str(folder)).stdout
    assert all((path / "summary.json").stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [(row["recipe"], row["seed"], row["state"]) for row in rows] == [
        (name, seed, "finished") for name in ("good", "bad", "third") for seed in ("0", "1")
    ]
    for row, run in zip(rows, runs, strict=True):
        assert float(row["test_accuracy"]) == run.summary["best"]["test_accuracy"]
    assert "6 of 6 runs finished" in (folder / "table.md").read_text()
    outcome = toolkit("submit", *six, "--seeds", "0,1", "--name", "six", "--profile", "local", "--time", "20")
    assert outcome.status == 2
    assert "all 6 runs are finished" in outcome.stderr


def _images(folder: Path) -> None:
    """Black and white images in two folders, moved into place at once."""
    temporary = folder.with_suffix(".new")
    for split, count in (("train", 16), ("test", 4)):
        for shade, name in ((0, "black"), (255, "white")):
            (temporary / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (shade, shade, shade)).save(temporary / split / name / f"{index}.png")
    temporary.rename(folder)
