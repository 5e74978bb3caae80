"""Locks on file systems without flock: live and dead holders are distinguished, on this host and on others."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
from filelock import Timeout
from trainers import EMA, STATEFUL, Trainers, at_call, only_run, outcome, uninterrupted, write_recipe

from toolkit import locks
from toolkit.cache.store import try_lock
from toolkit.locks import acquire, held, is_held
from toolkit.run_directory import RunInUse
from toolkit.runs import Run
from toolkit.study.directory import claim, is_claimed
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

LEASE_S = 1.0


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=lambda number: errno.errorcode[number])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a file system without flock, with the errors of Lustre, NFS and others, also in forked processes."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "LEASE_S", LEASE_S)


class Holder:
    """Another process that holds a lock, on this host or under another host's name."""

    def __init__(self, folder: Path, take: Callable[[], object], host: str | None = None) -> None:
        marker = folder / "holder-is-there"
        marker.unlink(missing_ok=True)

        def hold() -> None:
            if host is not None:
                socket.gethostname = lambda: host
            self.kept = take()
            marker.touch()
            time.sleep(60)

        self.process: ForkProcess = multiprocessing.get_context("fork").Process(target=hold)
        self.process.start()
        deadline = time.monotonic() + 20
        while not marker.exists():
            assert time.monotonic() < deadline
            assert self.process.is_alive()
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def holders() -> Iterator[Callable[..., Holder]]:
    """Return a function that makes holders, which end after the test."""
    made: list[Holder] = []

    def make(*arguments: object, **named: object) -> Holder:
        made.append(Holder(*arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for holder in made:
        holder.kill()


def seconds(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("no_flock", [errno.ENOSYS], indirect=True)
@pytest.mark.parametrize("host", [None, "node7"])
def test_a_live_holder_keeps_the_lock(tmp_path: Path, holders: Callable[..., Holder], host: str | None) -> None:
    path = tmp_path / "lock"
    holders(tmp_path, lambda: acquire(path), host=host)
    time.sleep(1.2 * LEASE_S)  # the holder renews the lease meanwhile
    assert is_held(path)
    with pytest.raises(Timeout):
        acquire(path)
    with pytest.raises(Timeout):
        acquire(path, 2 * LEASE_S)
    assert is_held(path)


@pytest.mark.usefixtures("no_flock")
def test_the_lock_of_a_killed_process_on_this_host_is_free_at_once(
    tmp_path: Path, holders: Callable[..., Holder]
) -> None:
    path = tmp_path / "lock"
    holder = holders(tmp_path, lambda: acquire(path))
    assert is_held(path)
    holder.kill()
    assert not is_held(path)
    assert seconds(lambda: acquire(path).release()) < LEASE_S / 2


@pytest.mark.usefixtures("no_flock")
def test_a_reused_process_id_of_a_dead_holder_is_recognized(tmp_path: Path, holders: Callable[..., Holder]) -> None:
    path, lease = tmp_path / "lock", tmp_path / "lock.lease"
    holder = holders(tmp_path, lambda: acquire(path))
    holder.kill()
    lines = lease.read_text().splitlines()
    index = lines.index(next(line for line in lines if str(holder.process.pid) in line))
    lines[index] = lines[index].replace(str(holder.process.pid), str(os.getpid()))
    lease.write_text("\n".join(lines) + "\n")
    assert not is_held(path)
    assert seconds(lambda: acquire(path).release()) < LEASE_S / 2


@pytest.mark.usefixtures("no_flock")
def test_a_dead_holder_on_another_host_loses_the_lock_when_its_lease_expires(
    tmp_path: Path, holders: Callable[..., Holder]
) -> None:
    path = tmp_path / "lock"
    holders(tmp_path, lambda: acquire(path), host="node7").kill()
    assert is_held(path), "too early to know whether the holder is alive"
    messages: list[str] = []
    assert LEASE_S <= seconds(lambda: acquire(path, log=messages.append).release()) < 3 * LEASE_S
    assert messages == [f"{path}.lease exists: waiting up to {LEASE_S:g} s to see whether its holder is alive"]
    assert not is_held(path)


@pytest.mark.usefixtures("no_flock")
def test_every_kind_of_lock_is_freed_when_its_holder_dies(tmp_path: Path, holders: Callable[..., Holder]) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()

    def trainer() -> object:
        return run.lock(), claim(run), try_lock(tmp_path, "entry")

    holder = holders(tmp_path, trainer)
    assert (is_held(run.path / ".lock"), is_claimed(run)) == (True, True)
    with pytest.raises(RunInUse):
        run.lock()
    assert claim(run) is None
    assert try_lock(tmp_path, "entry") is None
    holder.kill()
    assert (is_held(run.path / ".lock"), is_claimed(run)) == (False, False)
    kept = [run.lock(), claim(run), try_lock(tmp_path, "entry")]
    for lock in kept:
        assert lock is not None
        lock.release()
    with held(tmp_path / "entry.lock"):
        assert try_lock(tmp_path, "entry") is None


@pytest.mark.usefixtures("no_flock")
def test_a_suspended_trainer_ends_at_once_if_another_has_taken_over_its_run(
    tmp_path: Path, holders: Callable[..., Holder]
) -> None:
    run = Run(tmp_path)
    holder = holders(tmp_path, run.lock, host="node7")
    assert holder.process.pid is not None
    os.kill(holder.process.pid, signal.SIGSTOP)
    run.lock().release()
    lock = run.lock()
    os.kill(holder.process.pid, signal.SIGCONT)
    holder.process.join(3 * LEASE_S)
    assert holder.process.exitcode == 1
    lock.release()


def test_a_lease_of_a_host_without_flock_is_respected_on_hosts_with_flock(
    tmp_path: Path, holders: Callable[..., Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"

    def take() -> object:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        fcntl.flock = flock  # type: ignore[assignment]
        return acquire(path)

    holder = holders(tmp_path, take)
    with pytest.raises(Timeout):
        acquire(path)
    holder.kill()
    acquire(path).release()


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("no_flock", [errno.ENOSYS], indirect=True)
def test_a_requeued_job_takes_over_the_run_of_a_dead_node(tmp_path: Path) -> None:
    recipe, marker, folder = write_recipe(tmp_path / "job", STATEFUL), tmp_path / "there", tmp_path / "job"

    def on_other_node(rank: int) -> None:
        socket.gethostname = lambda: "node7"
        at_call(TrainStep, "_update", 9, lambda: (marker.touch(), time.sleep(60)))  # type: ignore[arg-type, func-returns-value]

    first = Trainers(1, folder, recipe, *EMA, prepare=on_other_node)
    first.wait_until(marker.exists)
    second = Trainers(1, folder / "second", "--resume", only_run(folder).path)
    assert second.wait() == [2]
    assert "is in use by another trainer, which is still running" in second.text()
    first.signal(signal.SIGKILL)
    first.wait()
    third = Trainers(1, folder / "third", "--resume", only_run(folder).path)
    assert third.wait() == [0], third.text()
    assert "to see whether its holder is alive" in third.text()
    assert outcome(only_run(folder)) == uninterrupted(1, STATEFUL, *EMA)
