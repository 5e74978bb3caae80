"""Small studies on the digits, run in the test's process or in a separate one that can be killed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from trainers import outcome

from toolkit.cli.main import app
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory

BASE = """
[recipe]
name = "small"
run_root = "{root}"

[data]
dataset = "digits"
images_per_class = 8
test_images_per_class = 5
split = {{ validation = 0.3, test = 0.2 }}

[model]
source = "toolkit"

[model.convnet]
blocks = [{{ channels = 4, pool = 2 }}]

[optimizer]
name = "sgd"
lr = 0.05

[train]
epochs = {epochs}
batch_size = 16
precision = "no"

[tracking]
trackers = []

"""

GRID = """
[study]
seeds = 2

[study.grid]
optimizer.lr = [0.2, 0.1, 0.05]
optimizer.momentum = [0.5, 0.9]
"""
"""Twelve runs."""


def write_study(folder: Path, study: str, *, epochs: int = 2, name: str = "study.toml") -> Path:
    """Write a study's file to ``folder``, with its runs in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(BASE.format(root=folder / "runs", epochs=epochs) + study)
    return path


def study_folder(folder: Path) -> StudyDirectory:
    """Return the directory of the study that :func:`write_study` wrote."""
    return StudyDirectory(folder / "runs" / "small")


def runs_of(folder: Path) -> Iterator[tuple[str, Run]]:
    """Yield the runs of a study, each with its row and seed."""
    study = study_folder(folder)
    for member in study.members:
        run = study.run(member)
        assert run is not None
        yield f"{member.row}, seed {member.seed}", run


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return :func:`outcome` of all runs of a study."""
    return {title: outcome(run) for title, run in runs_of(folder)}


def start(output: Path, *arguments: object) -> ForkProcess:
    """Start `toolkit ARGUMENTS` in a forked process, with its output in the file ``output``."""
    process = multiprocessing.get_context("fork").Process(target=_command, args=(output, [str(a) for a in arguments]))
    process.start()
    return process


def _command(output: Path, arguments: Sequence[str]) -> None:
    # The server that forks the test's own workers is not a child of this process.
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_pid = server._forkserver_address = server._forkserver_alive_fd = None
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    app(list(arguments))
