"""Damage of every kind to every file of a finished run and of a study, read by every command that reads them.

Each read must end in time, with exit status 0, 1 or 2 and no stack trace; a failing one must print a message; and
`toolkit status` must list the damaged run next to the healthy one. Run with -m slow; -s shows the counts.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from cli import toolkit
from damage import KINDS, LIMIT_S, damaged_copy, fault_of, files_of, limited, reading_commands
from finished import CONVNET, train_on_files
from studies import study_folder, write_study

from toolkit.runs import Run
from toolkit.study.directory import set_target_epoch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEED = 0
READS, STUDY_READS = 440, 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def original(folder: Path) -> Run:
    """Return a finished run with every file that a run directory can contain."""
    run = train_on_files(folder, CONVNET, epochs=2)
    (run.path / "wandb" / "offline-run-1").mkdir(parents=True)
    (run.path / "wandb" / "offline-run-1" / "run-abc.wandb").write_bytes(b":W&B\0\0\0")
    run.write_json("wandb/synced.json", {"digest": "0" * 64, "url": None})
    (run.path / "slurm").mkdir()
    run.write_json("slurm/job.json", {"job": "7", "submitted": 0.0, "log": str(run.log_file), "array": None})
    run.write_text("slurm/starts", "7 0 1760000000 node1\n")
    run.write_text("slurm/outcome", "0\n\n")
    return run


@pytest.fixture(scope="module")
def healthy(folder: Path, original: Run) -> Run:
    """Return another run, which stays undamaged."""
    return train_on_files(folder, CONVNET, "recipe.seed=1")


def test_every_read_of_a_damaged_run_ends_with_a_status_and_no_stack_trace(
    original: Run, healthy: Run, folder: Path, tmp_path: Path
) -> None:
    image = next((folder / "data").rglob("*.png"))
    names = list(reading_commands(original.path, image, tmp_path))
    everything = [(file, kind, name) for file in files_of(original.path) for kind in KINDS for name in names]
    counts: Counter[str] = Counter()
    faults = []
    for number, (file, kind, name) in enumerate(Random(SEED).sample(everything, READS)):
        out = tmp_path / str(number)
        run = damaged_copy(original, healthy, tmp_path / "work", file, kind, number)
        fault, outcome = fault_of(name, reading_commands(run, image, out)[name], run, run.parent / healthy.id)
        counts["faults" if outcome is None else f"exit status {outcome.status}"] += 1
        faults += [f"{file}, {kind}, {name}: {fault}"] if fault else []
        shutil.rmtree(out, ignore_errors=True)
    print(f"\n{READS} reads of {len(everything)} possible: {dict(counts)}, {len(faults)} wrong")
    assert not faults, "\n".join(faults)
    assert min(counts["exit status 0"], counts["exit status 2"]) > 0, "the damage must reach some of the commands"


def test_every_read_of_a_damaged_study_ends_with_a_status_and_no_stack_trace(tmp_path: Path) -> None:
    path = write_study(tmp_path / "made", "[study]\nseeds = 2\n", epochs=1)
    assert toolkit("study", path).status == 0
    made = study_folder(tmp_path / "made")
    runs = [run for member in made.members if (run := made.run(member)) is not None]
    set_target_epoch(runs[0], 1)
    runs[1].write_json("failed.json", {"message": "out of memory", "when": ""})
    read = ("recipe.toml", "metrics.jsonl", "summary.json", "environment.json", "origins.json")
    names = ["study.json", f"{runs[0].id}/assignment.json", f"{runs[1].id}/failed.json"]
    names += [f"{run.id}/{name}" for run in runs for name in read]
    commands = {
        "table": ("table", made.path),
        "table --json": ("table", made.path, "--json", "--by", "recipe.seed"),
        "status": ("status", made.path),
        "report": ("report", made.path, "--figures-only"),
        "study": ("study", path, "--retry"),
    }
    everything = [(file, kind, name) for file in names for kind in KINDS for name in commands]
    kept = tmp_path / "kept"
    shutil.copytree(made.path, kept)
    counts: Counter[str] = Counter()
    faults = []
    for number, (file, kind, name) in enumerate(Random(SEED).sample(everything, STUDY_READS)):
        shutil.rmtree(made.path)
        shutil.copytree(kept, made.path)
        KINDS[kind](made.path / file, Random(f"{file} {kind} {number}"))
        try:
            with limited(2 * LIMIT_S):
                outcome = toolkit(*commands[name])
        except Exception as error:
            faults.append(f"{file}, {kind}, {name}: {type(error).__name__}: {error}")
            continue
        counts[f"exit status {outcome.status}"] += 1
        if "Traceback" in outcome.stderr + outcome.stdout or outcome.status not in (0, 1, 2):
            faults.append(f"{file}, {kind}, {name}: exit status {outcome.status}: {outcome.stderr.strip()[-300:]}")
    print(f"\n{STUDY_READS} reads of {len(everything)} possible: {json.dumps(counts)}, {len(faults)} wrong")
    assert not faults, "\n".join(faults)
    assert min(counts["exit status 0"], counts["exit status 2"]) > 0, "the damage must reach some of the commands"
