"""Training continues without its terminal: closed streams, a closed pipe, a hangup."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from test_stopping import by_signal, finished, mark_at, stopped
from trainers import EMA, RECIPE, STATEFUL, Trainers, at_call, only_run, outcome, uninterrupted, write_recipe

from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

EPOCHS = 5
BIN = Path(sys.executable).parent


def closed(command: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Return a command that runs without stdin, stdout and stderr."""
    words = [str(word) for word in arguments]
    return subprocess.run(["sh", "-c", f'{command} "$@" 0<&- 1>&- 2>&-', "sh", *words], timeout=200)


def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path: Path) -> None:
    """Output that a library writes to descriptor 2 must not end up in a checkpoint."""
    code = (
        "import os, sys; from toolkit.terminal import open_closed_streams; open_closed_streams(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); file.write(str(file.fileno())); file.flush(); "
        "print('talk', flush=True); print('talk', file=sys.stderr, flush=True); os.write(2, b'talk')"
    )
    assert closed(sys.executable, "-c", code).returncode == 0
    assert int((tmp_path / "file").read_text()) >= 3, "the file contains only that number"


def without_reader(rank: int) -> None:
    """Redirect the standard streams to a pipe without a reader, as after `| head -1` has exited."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)


def epochs_in_log(folder: Path) -> int:
    lines = only_run(folder).log_file.read_text().splitlines()
    return sum(line.startswith("epoch ") and "val loss" in line for line in lines)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_output_to_a_closed_pipe_is_in_the_log(tmp_path: Path, world: int) -> None:
    recipe = write_recipe(tmp_path / "alone", STATEFUL)
    trainers = Trainers(world, tmp_path / "alone", recipe, *EMA, prepare=without_reader)
    assert trainers.wait() == [0] * world
    assert trainers.text() == ""
    assert outcome(only_run(tmp_path / "alone")) == uninterrupted(world, STATEFUL, *EMA)
    assert epochs_in_log(tmp_path / "alone") == EPOCHS
    log = only_run(tmp_path / "alone").log_file.read_text()
    assert "test balanced accuracy" in log.splitlines()[-4], "the log ends with the table of results"


def test_an_error_with_a_closed_pipe_is_in_the_log(tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        without_reader(rank)
        at_call(TrainStep, "_update", 3, lambda: 1 / 0)  # type: ignore[arg-type, return-value]

    trainers = Trainers(1, tmp_path, write_recipe(tmp_path, STATEFUL), prepare=prepare)
    assert trainers.wait() == [1]
    log = only_run(tmp_path).log_file.read_text()
    assert "Traceback" in log
    assert log.rstrip().endswith("ZeroDivisionError: division by zero")


def on_terminal(master: int, slave: int, phase: str, there: Path) -> Callable[[int], None]:
    """Return a function that gives rank 0 its own terminal and makes it wait in a phase."""

    def prepare(rank: int) -> None:
        os.close(master)
        if rank == 0:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            for descriptor in (0, 1, 2):
                os.dup2(slave, descriptor)
            mark_at(phase, 4, there, rank)
        os.close(slave)

    return prepare


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_a_terminal_hangup_stops_the_run_with_a_checkpoint(tmp_path: Path, world: int) -> None:
    master, slave = pty.openpty()
    folder, there = tmp_path / "hung", tmp_path / "there"
    prepare = on_terminal(master, slave, "step", there)
    trainers = Trainers(world, folder, write_recipe(folder, STATEFUL), *EMA, prepare=prepare)
    os.close(slave)
    trainers.wait_until(there.exists)
    shown = os.read(master, 1 << 16)
    assert b"rank 0 of" in shown
    os.close(master)  # the kernel sends SIGHUP, and every write fails from now on
    there.unlink()
    assert trainers.wait() == [0] * world
    assert outcome(only_run(folder)) == uninterrupted(world, STATEFUL, *EMA)
    assert epochs_in_log(folder) == EPOCHS


def test_a_checkpoint_is_written_before_torchrun_kills_its_trainers_after_a_hangup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "last"
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "none")
        trainers = stopped(folder, 1, STATEFUL, "step", 4, by_signal(signal.SIGHUP), *EMA)
    assert "stopped by SIGHUP" in trainers.text()
    assert "stopped by SIGHUP" in only_run(folder).log_file.read_text().splitlines()[-1]
    assert finished(folder, 1) == uninterrupted(1, STATEFUL, *EMA)


def write_short(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text((RECIPE + STATEFUL).format(root=folder / "runs").replace("epochs = 5", "epochs = 2"))
    return path


def test_a_real_command_with_all_streams_closed(tmp_path: Path) -> None:
    done = closed(sys.executable, "-m", "toolkit.train", write_short(tmp_path), "--no-report")
    assert done.returncode == 0
    run = only_run(tmp_path)
    assert run.is_finished
    assert epochs_in_log(tmp_path) == 2
    assert [record["epoch"] for record in run.epoch_records()] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "head"])
def test_torchrun_trains_with_a_closed_pipe(tmp_path: Path, how: str) -> None:
    command = [BIN / "torchrun", "--nproc-per-node", "2", "-m", "toolkit.train", write_short(tmp_path), "--no-report"]
    if how == "closed":
        assert closed(str(command[0]), *command[1:]).returncode == 0
    else:
        words = " ".join(map(str, command))
        subprocess.run(["sh", "-c", f"{words} 2>&1 | head -1"], check=True, stdout=subprocess.DEVNULL, timeout=200)
    assert only_run(tmp_path).is_finished
    assert epochs_in_log(tmp_path) == 2
