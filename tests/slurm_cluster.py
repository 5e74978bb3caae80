"""A real SLURM cluster of two nodes, started by slurm/local-cluster.sh, and helpers for the tests that use it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli import toolkit

from toolkit.runs import Run, open_run
from toolkit.slurm.job_status import SlurmJob, find_runs, queue, state_of, tasks_of

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "slurm" / "local-cluster.sh"
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux procps"
ACCOUNT_PACKAGES = "slurmdbd mariadb-server-core mariadb-client-core"
DEADLINE_S = 480
"""Limit for operations that take seconds on an idle machine."""

RECIPE = """
[recipe]
name = "{name}"
{recipe}

[data]
{data}
workers = 0

[model]
source = "toolkit"
convnet = {{ blocks = [{{ channels = 8, batch_norm = true, pool = 2 }}] }}
head = {{ dropout = 0.1 }}

[optimizer]
name = "sgd"
lr = 0.05

[train]
epochs = {epochs}
batch_size = 32

[checkpoint]
every_minutes = 0

[tracking]
trackers = [{trackers}]
upload = []
"""
DIGITS = 'dataset = "digits"\nimages_per_class = 20\ntest_images_per_class = 10'


class Cluster:
    """A cluster that slurm/local-cluster.sh manages in one folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.environment = folder, environment

    def do(self, action: str, *arguments: str) -> str:
        """Run slurm/local-cluster.sh ACTION FOLDER ARGUMENTS and return its output."""
        command = [str(SCRIPT), action, str(self.folder), *arguments]
        # Not through pipes: the daemons would hold them open.
        with open(self.folder.parent / "cluster.txt", "w+") as output:
            done = subprocess.run(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=os.environ | self.environment
            )
            output.seek(0)
            text = output.read()
        assert done.returncode == 0, text
        return text

    @property
    def variables(self) -> dict[str, str]:
        """Return the variables that the cluster's env.sh exports."""
        return dict(re.findall(r"^export (\w+)=(.*)$", (self.folder / "env.sh").read_text(), re.MULTILINE))


def require(program: str, packages: str) -> None:
    """Skip the test if a daemon is not installed; on CI, fail."""
    if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        message = f"no {program} here: apt-get install --no-install-recommends {packages}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@contextlib.contextmanager
def running(name: str, **environment: str) -> Iterator[Cluster]:
    """Start a cluster with two idle nodes and point this process's environment to it."""
    home = Path(f"/tmp/toolkit-slurm-{os.getpid()}-{name}")
    shutil.rmtree(home, ignore_errors=True)
    (home / "c").mkdir(parents=True)
    cluster = Cluster(home / "c", **environment)
    before = dict(os.environ)
    try:
        cluster.do("start")
        os.environ.update(cluster.variables)
        yield cluster
    finally:
        cluster.do("stop")
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start two idle nodes; skip if SLURM is not installed, but fail on CI."""
    require("slurmctld", PACKAGES)
    with running("a") as cluster:
        yield cluster


@pytest.fixture
def work_dir(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *, epochs: int = 3, data: str = DIGITS, recipe: str = "", trackers: str = "") -> str:
    """Write a recipe to the working folder."""
    text = RECIPE.format(name=name, epochs=epochs, data=data, recipe=recipe, trackers=trackers)
    Path(f"{name}.toml").write_text(text)
    return f"{name}.toml"


def submit(*arguments: str, profile: str = "local") -> str:
    """Run `toolkit submit ARGUMENTS`, which must succeed, and return what it printed."""
    outcome = toolkit("submit", *arguments, "--profile", profile, "--time", "30")
    assert outcome.status == 0, outcome.stderr + outcome.stdout
    return outcome.stdout


def submitted(name: str) -> Run:
    """Return the only run of a recipe."""
    runs = find_runs(Path("runs").resolve() / name)
    assert len(runs) == 1
    return runs[0]


def number_of(run: Run) -> str:
    """Return the id of the run's job."""
    return str(SlurmJob(run).current)


def trainers(run: Run) -> list[int]:
    """Return the processes, on any node, that train in the run directory or are about to."""
    found = (folder for folder in Path("/proc").iterdir() if folder.name.isdigit())
    return [int(folder.name) for folder in found if f"toolkit.slurm.job_worker\0{run.path}\0" in _command_line(folder)]


@contextlib.contextmanager
def suspended(run: Run) -> Iterator[None]:
    """Suspend the trainer of a run, so that it does not finish before it is interrupted on a fast machine."""
    pids = trainers(run)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # SLURM resumes processes in order to end them
                os.kill(pid, signal.SIGCONT)


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def wait_until(what: Callable[[], bool], describe: Callable[[], str]) -> None:
    """Wait until the condition holds; fail with what ``describe`` returns."""
    end = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < end, f"not within {DEADLINE_S} s\n{describe()}"
        time.sleep(0.2)


def log_of(run: Run) -> str:
    """Return what the run's job has printed."""
    path = SlurmJob(run).log
    return path.read_text() if path.exists() else ""


def wait_for(run: Run, state: str) -> None:
    """Wait until `toolkit status` would show this state."""

    def describe() -> str:
        return f"{state_of(run, queue())}\n{log_of(run)}"

    def reached() -> bool:
        now = state_of(run, queue()).state
        if now != state and now not in ("pending", "running", "interrupted", "unknown"):
            wait_for_end(number_of(run))  # between two starts SLURM may show a job as ended
            now = state_of(run, queue()).state
            assert now == state, describe()
        return now == state

    wait_until(reached, describe)


def wait_for_end(*jobs: str) -> None:
    """Wait until SLURM has finished these jobs."""

    def over() -> bool:
        known = queue()
        return known is not None and not any(entry.is_active for job in jobs for entry in tasks_of(job, known))

    wait_until(over, lambda: str(queue()))


def wait_for_epoch(run: Run, epoch: int) -> None:
    """Wait until this epoch is finished."""
    wait_until(lambda: len(run.epoch_records()) >= epoch, lambda: log_of(run))


def wait_for_start(run: Run, count: int) -> None:
    """Wait until the job has started ``count`` times."""
    wait_until(lambda: len(SlurmJob(run).starts) >= count, lambda: log_of(run))


def sbatch(*arguments: str, **environment: str) -> str:
    """Run `sbatch ARGUMENTS` and return the job's id."""
    variables = {name: value for name, value in (os.environ | environment).items() if value}
    command = ["sbatch", "--parsable", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout.strip()


def status_of(job: str) -> int:
    """Wait for a job and return its exit status. (sbatch --wait checks only every half minute.)"""
    wait_for_end(job)
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return int(re.search(r" ExitCode=(\d+):", shown)[1])  # type: ignore[index]


def local_run(recipe: str) -> Run:
    """Train the same recipe in this process without interruption."""
    outcome = toolkit("train", recipe, "--no-report", "--set", 'recipe.run_root="alone"')
    assert outcome.status == 0, outcome.stderr
    return open_run(outcome.stdout.splitlines()[-1])


def run_mode() -> str:
    """Return the mode of the cluster: net or plain."""
    return (Path(os.environ["SLURM_CONF"]).parent / "mode").read_text().strip()
