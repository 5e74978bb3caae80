"""Start-up: a launcher's mistake gives one message within the time limit, which names the missing processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from distributed import free_port, launch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from trainers import STATEFUL, Trainers, after_seconds, at_call, kill_self, only_run, write_recipe

from toolkit.distributed import rendezvous
from toolkit.distributed.launcher import ProcessInfo, read_process_info
from toolkit.errors import UserError

pytestmark = pytest.mark.long

GOOD = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}


def in_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in GOOD:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_the_variables_of_torchrun_give_rank_and_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    in_environment(monkeypatch, GOOD)
    assert read_process_info() == ProcessInfo(1, 4, 1, "node7", 29500, is_on_one_machine=False)
    in_environment(monkeypatch, GOOD | {"LOCAL_WORLD_SIZE": "4"})
    assert read_process_info() == ProcessInfo(1, 4, 1, "node7", 29500, is_on_one_machine=True)


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "0"}])
def test_without_a_launcher_a_process_trains_alone(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    in_environment(monkeypatch, variables)
    assert read_process_info() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "x"}, "RANK = 'x' in the environment is not a whole number"),
        ({"RANK": "1.0"}, "RANK = '1.0' in the environment is not a whole number"),
        ({"RANK": "-1"}, "RANK = '-1' in the environment is not a whole number"),
        ({"RANK": "4"}, "RANK = 4 in the environment is out of range: it must be from 0 to 3 (WORLD_SIZE is 4)"),
        ({"RANK": ""}, "but not RANK: a process of a distributed run needs all of them"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0 in the environment is out of range: it must be 1 or more"),
        ({"WORLD_SIZE": ""}, "RANK = 1 in the environment is out of range: it must be from 0 to 0 (WORLD_SIZE is"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK = 'one' in the environment is not a whole number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK = 2 in the environment is out of range: it must be from 0 to 1"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE = 5 in the environment is out of range: it must be from 1 to 4"),
        ({"MASTER_ADDR": ""}, "but not MASTER_ADDR"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http' in the environment is not a whole number"),
        (
            {"MASTER_PORT": "65536"},
            "MASTER_PORT = 65536 in the environment is out of range: it must be from 1 to 65535",
        ),
        ({"MASTER_PORT": "0"}, "use --standalone instead of --master-port 0"),
    ],
)
def test_invalid_launcher_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    in_environment(monkeypatch, GOOD | changes)
    with pytest.raises(UserError, match=re.escape(message)):
        read_process_info()


def test_the_time_limit_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    several, one = (ProcessInfo(0, 2, 0, "node7", 29500, is_on_one_machine=one) for one in (False, True))
    monkeypatch.delenv("TOOLKIT_JOIN_TIMEOUT", raising=False)
    assert (rendezvous.time_limit(one), rendezvous.time_limit(several)) == (30, 600)
    monkeypatch.setenv("TOOLKIT_JOIN_TIMEOUT", "7.5")
    assert rendezvous.time_limit(one) == 7.5
    for bad in ("soon", "0", "-3", "nan", "inf"):
        monkeypatch.setenv("TOOLKIT_JOIN_TIMEOUT", bad)
        with pytest.raises(UserError, match="set it to the seconds"):
            rendezvous.time_limit(one)


def test_lists_of_ranks_are_abbreviated() -> None:
    assert rendezvous._ranks([3]) == "rank 3"
    assert rendezvous._ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


# -- real processes ---------------------------------------------------------------------------------------------------


def started(folder: Path, world: int, prepare: Callable[[int], None], *settings: str) -> Trainers:
    return Trainers(world, folder, write_recipe(folder, STATEFUL), *settings, prepare=prepare)


def statuses_and_output(
    folder: Path, world: int, prepare: Callable[[int], None], *settings: str, within_s: float = 20
) -> tuple[list[int], str]:
    """Return exit statuses and output of trainers, which must end by themselves within the time."""
    trainers = started(folder, world, prepare, *settings)
    statuses = trainers.wait(within_s)
    return statuses, trainers.text()


def variables(**values: str) -> Callable[[int], None]:
    return lambda rank: os.environ.update(values)


def test_with_a_world_size_that_is_too_large_the_missing_ranks_are_named(tmp_path: Path) -> None:
    statuses, text = statuses_and_output(tmp_path, 2, variables(WORLD_SIZE="4", TOOLKIT_JOIN_TIMEOUT="4"))
    assert statuses == [1, 1]
    joined = rf"joined: rank 0 \({re.escape(socket.gethostname())}, process \d+\); rank 1 \(\S+, process \d+\)"
    notice = rf"rank 0: ranks 2-3 of 4 have not joined; {joined}; waiting up to 4 s \(TOOLKIT_JOIN_TIMEOUT\)"
    assert len(re.findall(notice, text)) == 1
    assert re.search(rf"rank 0: gave up after 4 s: ranks 2-3 of 4 have not joined; {joined}\. Check that", text)
    assert "WORLD_SIZE = 4" in text
    assert "Traceback" not in text


def test_a_rank_given_twice_is_refused_at_once(tmp_path: Path) -> None:
    def twice(rank: int) -> None:
        os.environ["RANK"] = str(min(rank, 1))

    statuses, text = statuses_and_output(tmp_path, 3, twice)
    assert statuses == [2, 2, 2]
    pair = r"RANK=1 was given to two processes: \S+, process (\d+); \S+, process (\d+)\."
    first = re.search(pair, text)
    assert first is not None, text
    assert first[1] != first[2]


def test_processes_that_disagree_about_the_world_size_are_refused_at_once(tmp_path: Path) -> None:
    def more(rank: int) -> None:
        os.environ["WORLD_SIZE"] = str(3 - rank)

    statuses, text = statuses_and_output(tmp_path, 2, more)
    assert statuses == [2, 2]
    assert re.search(
        r"WORLD_SIZE is (2 for rank 1|3 for rank 0) on \S+, but (2 for rank 1|3 for rank 0) on \S+\.", text
    )


def test_without_rank_0_the_address_is_named(tmp_path: Path) -> None:
    def first_is_gone(rank: int) -> None:
        os.environ["TOOLKIT_JOIN_TIMEOUT"] = "3"
        if rank == 0:
            os._exit(0)

    statuses, text = statuses_and_output(tmp_path, 2, first_is_gone)
    assert statuses == [0, 1]
    assert re.search(
        r"gave up after 3 s: rank 1 of 2 cannot reach rank 0 at MASTER_ADDR:MASTER_PORT = 127\.0\.0\.1:\d+ "
        r"\(Connection refused\)", text,
    )  # fmt: skip


def test_an_unknown_host_is_reported(tmp_path: Path) -> None:
    statuses, text = statuses_and_output(
        tmp_path, 2, lambda rank: os.environ.update(MASTER_ADDR="no-such-host.invalid", TOOLKIT_JOIN_TIMEOUT="3")
    )
    assert statuses[1] == 1
    assert "(no-such-host.invalid is not a known host)" in text


def test_a_port_in_use_is_reported_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        statuses, text = statuses_and_output(tmp_path, 2, variables(MASTER_PORT=port, TOOLKIT_JOIN_TIMEOUT="3"))
    assert statuses == [2, 1]
    assert f"rank 0: port {port} of this machine ({socket.gethostname()}) is in use" in text


@pytest.mark.parametrize("rank", [0, 1])
def test_if_a_process_is_killed_while_others_join_they_end_too(tmp_path: Path, rank: int) -> None:
    """Rank 2 never starts, so both wait; rank 0 serves the store."""

    def kill_one(own_rank: int) -> None:
        os.environ["WORLD_SIZE"] = "3"
        if own_rank == rank:
            after_seconds(3, kill_self)

    statuses, text = statuses_and_output(tmp_path, 2, kill_one)
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 1
    assert re.search(rf"rank {rank} \(\S+, process \d+\) ended while the processes were joining", text)


def test_if_a_process_is_killed_before_it_is_connected_the_others_end(tmp_path: Path) -> None:
    def kill_late(rank: int) -> None:
        if rank == 1:
            at_call(rendezvous, "start_failure_detector", 1, kill_self)

    statuses, text = statuses_and_output(tmp_path, 3, kill_late, "--set", "train.batch_size=18")
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] == statuses[2] == 1
    assert re.search(r"rank 1 \(\S+, process \d+\) ended while the processes were joining", text)


def test_a_hanging_store_does_not_block_the_others_longer_than_the_limit(tmp_path: Path) -> None:
    trainers = started(tmp_path, 2, variables(WORLD_SIZE="3", TOOLKIT_JOIN_TIMEOUT="5"))
    trainers.wait_until(lambda: "rank 0: rank 2 of 3 has not joined" in trainers.text())
    trainers.signal(signal.SIGSTOP, 0)
    trainers.wait_until(lambda: not trainers.processes[1].is_alive(), 20)
    assert trainers.processes[1].exitcode == 1
    assert "rank 1: gave up after 5 s: rank 2 of 3 has not joined" in trainers.text()
    trainers.signal(signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_while_joining_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_S", 0.2)
    first_variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    trainers = started(tmp_path, 1, variables(**first_variables, MASTER_PORT=str(free_port())))
    trainers.wait_until(lambda: "has not joined" in trainers.text())
    began = time.monotonic()
    trainers.signal(number)
    assert trainers.wait(10) == [3]
    assert time.monotonic() - began < 3
    name = signal.Signals(number).name
    last = trainers.text().strip().splitlines()[-1]
    assert last.startswith(
        f"stopped by {name} while the processes were joining (rank 1 of 2 has not joined; joined: rank 0"
    )


def test_processes_that_torchrun_starts_again_join_although_its_store_has_the_keys_of_earlier_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(rendezvous, "_stores", {})

    def joined(order: list[int]) -> int:
        info = read_process_info()
        assert info is not None
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
        time.sleep(0.3 * order.index(info.rank))
        info = read_process_info()
        assert info is not None
        rendezvous.join(info, "gloo")
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        return int(total)

    for order in ([0, 1], [1, 0], [2, 1, 0], [1, 0]):  # the same number of processes, then more, then fewer
        assert launch(len(order), joined, order) == [len(order)] * len(order)


@pytest.mark.extended
def test_torchrun_starts_all_processes_again_after_one_was_killed(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, STATEFUL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--monitor-interval=1", "-m", "toolkit.train"]
    arguments = [*command, recipe, "--resume", "auto", "--set", "train.epochs=60"]
    launcher = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("runs/small/*/checkpoints/0*.json")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.1)
    psutil.Process(launcher.pid).children()[-1].kill()
    text, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, text
    assert "resuming after epoch" in text
    assert only_run(tmp_path).is_finished


def test_a_process_that_starts_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_S", 0.2)

    def late(rank: int) -> None:
        time.sleep(3 * rank)

    statuses, text = statuses_and_output(tmp_path, 2, late, "--set", "train.epochs=2", within_s=60)
    assert statuses == [0, 0], text
    assert "rank 1 of 2 has not joined" in text
    assert only_run(tmp_path).environment["processes"] == 2
