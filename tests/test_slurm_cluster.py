"""Jobs on a real SLURM cluster: two nodes on this machine, started by slurm/local-cluster.sh from Debian's packages."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli import toolkit
from PIL import Image
from safetensors.torch import load_file

from toolkit.runs import Run, open_run
from toolkit.slurm.job import Job, find_runs, queue, state_of

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "slurm" / "local-cluster.sh"
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux procps"
DEADLINE_S = 240

pytestmark = pytest.mark.timeout(600)

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
"""
DIGITS = 'dataset = "digits"\nimages_per_class = 20\ntest_images_per_class = 10'


class Cluster:
    """The cluster, and a clean folder for one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def do(self, action: str, *arguments: str) -> str:
        """slurm/local-cluster.sh ACTION FOLDER ARGUMENTS"""
        command = [str(SCRIPT), action, str(self.folder), *arguments]
        # Not through pipes: the daemons would hold them open.
        with open(self.folder.parent / "cluster.txt", "w+") as output:
            done = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, timeout=120)
            output.seek(0)
            text = output.read()
        assert done.returncode == 0, text
        return text


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes; skipped where SLURM is not installed, but a failure on CI."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        message = f"no SLURM here: apt-get install --no-install-recommends {PACKAGES}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    home = Path(f"/tmp/toolkit-slurm-{os.getpid()}")
    shutil.rmtree(home, ignore_errors=True)
    (home / "c").mkdir(parents=True)
    cluster = Cluster(home / "c")
    before = dict(os.environ)
    try:
        cluster.do("start")
        os.environ.update(re.findall(r"^export (\w+)=(.*)$", (home / "c" / "env.sh").read_text(), re.MULTILINE))
        yield cluster
    finally:
        cluster.do("stop")
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(home)


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no job left behind at its end."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *, epochs: int = 3, data: str = DIGITS, recipe: str = "", trackers: str = "") -> str:
    """A recipe in the working folder."""
    text = RECIPE.format(name=name, epochs=epochs, data=data, recipe=recipe, trackers=trackers)
    Path(f"{name}.toml").write_text(text)
    return f"{name}.toml"


def submit(*arguments: str) -> str:
    """`toolkit submit ARGUMENTS`, which must succeed; what it printed."""
    outcome = toolkit("submit", *arguments, "--profile", "local", "--time", "20")
    assert outcome.status == 0, outcome.stderr + outcome.stdout
    return outcome.stdout


def submitted(name: str) -> Run:
    """The only run of a recipe."""
    runs = find_runs(Path("runs").resolve() / name)
    assert len(runs) == 1
    return runs[0]


@contextlib.contextmanager
def frozen(run: Run) -> Iterator[None]:
    """Hold the trainer of a run still, so that a fast machine does not finish before it is interrupted."""
    pids = [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and f"toolkit.slurm.task\0{run.path}\0" in _command_line(folder)
    ]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def wait_until(what: Callable[[], bool], told: Callable[[], str], seconds: float = DEADLINE_S) -> None:
    """Wait until it is so; fail with what ``told`` says."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s\n{told()}"
        time.sleep(0.2)


def wait_for(run: Run, state: str) -> None:
    """Wait until `toolkit status` would say so."""

    def told() -> str:
        log = Job(run).log
        return f"{state_of(run, queue())}\n{log.read_text() if log.exists() else ''}"

    def reached() -> bool:
        now = state_of(run, queue()).state
        assert now == state or now in ("pending", "running", "interrupted"), told()
        return now == state

    wait_until(reached, told)


def wait_for_end(*jobs: str) -> None:
    """Wait until SLURM has done with these jobs."""

    def over() -> bool:
        known = queue()
        assert known is not None
        return not any(entry.is_active and name.split("_")[0] in jobs for name, entry in known.items())

    wait_until(over, lambda: str(queue()))


def wait_for_epoch(run: Run, epoch: int) -> None:
    """Wait until so many epochs are done."""
    wait_until(lambda: len(run.epochs()) >= epoch, lambda: Job(run).log.read_text())


def sbatch(*arguments: str, **environment: str) -> tuple[str, int]:
    """`sbatch ARGUMENTS` to the job's end: its id and exit status. (sbatch --wait looks every half minute only.)"""
    surroundings = {name: value for name, value in (os.environ | environment).items() if value}
    command = ["sbatch", "--parsable", *arguments]
    job = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings).stdout.strip()
    wait_for_end(job)
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return job, int(re.search(r" ExitCode=(\d+):", shown)[1])  # type: ignore[index]


def local_run(recipe: str) -> Run:
    """The same recipe trained in this process, undisturbed."""
    outcome = toolkit("train", recipe, "--set", 'recipe.run_root="alone"')
    assert outcome.status == 0, outcome.stderr
    return open_run(outcome.stdout.splitlines()[-1])


def test_two_nodes_end_like_one_process(place: Path) -> None:
    recipe = write("two-nodes")
    text = submit(recipe, "--nodes", "2", "--cpus-per-task", "2")
    run = submitted("two-nodes")
    assert re.match(r"submitted job \d+\n", text)
    assert str(run.path / "slurm" / "train.sbatch") in text
    assert str(run.path / "slurm" / "log.txt") in text
    assert "toolkit logs -f" in text
    assert "toolkit cancel" in text
    wait_for(run, "finished")
    alone = local_run(recipe)
    log = Job(run).log.read_text()
    assert run.summary["processes"] == 2
    assert len(set(re.findall(r"rank \d of 2 on (\S+),", log))) == (2 if (run_mode() == "net") else 1)
    for ours, theirs in zip(run.epochs(), alone.epochs(), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
        assert ours["val/loss"] == pytest.approx(theirs["val/loss"], abs=1e-5)
    assert run.summary["best"]["test_loss"] == pytest.approx(alone.summary["best"]["test_loss"], abs=1e-5)
    assert run.summary["best"]["test_accuracy"] == alone.summary["best"]["test_accuracy"]
    assert "Traceback" not in log
    wait_for_end(Job(run).current or "")
    assert len(Job(run).starts) == 1  # a finished job is not requeued


def run_mode() -> str:
    """net or plain."""
    return (Path(os.environ["SLURM_CONF"]).parent / "mode").read_text().strip()


def test_requeued_by_limit_by_signal_and_by_a_dead_node_it_ends_bit_identical(cluster: Cluster, place: Path) -> None:
    recipe = write("requeued", epochs=30, data='dataset = "digits"', trackers='"wandb"')
    submit(recipe, "--set", "slurm.signal_before_s=110")
    run = submitted("requeued")
    job = Job(run)
    number = job.record["job"]  # type: ignore[index]

    def start(count: int) -> None:
        wait_until(lambda: len(job.starts) == count, lambda: job.log.read_text())

    # First the time limit comes near: 110 s before it SLURM warns.
    wait_for_epoch(run, 2)
    with frozen(run):
        subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=2"], check=True)
        wait_until((run.path / "stop").exists, lambda: job.log.read_text())
    start(2)
    subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=20"], check=True)

    # Then somebody else's job comes first: the same signal, from another hand.
    wait_for_epoch(run, len(run.epochs()) + 2)
    with frozen(run):
        subprocess.run(["scancel", "--signal=USR1", "--batch", number], check=True)
        wait_until((run.path / "stop").exists, lambda: job.log.read_text())
    start(3)
    assert state_of(run, queue()).requeued == 2

    # Then the node dies, with all that runs on it.
    done = len(run.epochs())
    wait_for_epoch(run, done + 2)
    node = job.starts[-1].nodes
    cluster.do("kill-node", node)
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test"], check=True)
    assert not run.is_finished
    cluster.do("start-node", node)
    wait_for(run, "finished")

    starts = job.starts
    assert [start.restarts for start in starts] == [0, 1, 2, 3]
    assert {start.job for start in starts} == {number}
    alone = local_run(recipe)
    ours, theirs = load_file(run.best_weights), load_file(alone.best_weights)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert run.epochs() == alone.epochs()
    assert (run.path / "predictions.csv").read_bytes() == (alone.path / "predictions.csv").read_bytes()
    # One W&B run, however often it was resumed.
    parts = [folder.name.split("-", 3)[3] for folder in (run.path / "wandb").glob("offline-run-*")]
    assert len(parts) == 4
    assert set(parts) == {f"requeued-{run.id}"}


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


def test_two_jobs_at_once_on_one_node(place: Path) -> None:
    runs = []
    for name in ("left", "right"):
        options = ("--processes-per-node", "2", "--cpus-per-task", "2", "--set", 'slurm.options=["--nodelist=node1"]')
        submit(write(name, epochs=2, recipe=f"seed = {len(runs)}"), *options)
        runs.append(submitted(name))
    for run in runs:
        wait_for(run, "finished")
    first, second = (Job(run).starts[0] for run in runs)
    ends = [(run.path / "summary.json").stat().st_mtime for run in runs]
    assert first.nodes == second.nodes == "node1"
    assert max(first.time, second.time) < min(ends)  # they did overlap
    assert [run.summary["processes"] for run in runs] == [2, 2]
    assert [run.summary["seed"] for run in runs] == [0, 1]


def test_cancelled_and_at_its_limit_of_restarts_a_job_is_not_requeued(place: Path) -> None:
    submit(write("cancelled", epochs=1000), "--set", 'slurm.options=["--nodelist=node1"]')
    submit(write("limited", epochs=1000), "--max-restarts", "0", "--set", 'slurm.options=["--nodelist=node2"]')
    cancelled, limited = submitted("cancelled"), submitted("limited")
    wait_for_epoch(cancelled, 1)
    wait_for_epoch(limited, 1)
    shown = json.loads(toolkit("status", "runs", "--json").stdout)
    assert {row["state"] for row in shown} == {"running"}
    assert all(row["epoch"] >= 1 and row["epochs"] == 1000 and "time limit in" in row["detail"] for row in shown)
    numbers = [str(Job(run).current) for run in (cancelled, limited)]
    subprocess.run(["scancel", "--signal=USR1", "--batch", numbers[1]], check=True)
    assert toolkit("cancel", str(cancelled.path)).status == 0
    wait_for_end(*numbers)
    assert state_of(cancelled, queue()).state == "cancelled"
    assert state_of(limited, queue()).state == "interrupted"
    assert "max_restarts = 0" in toolkit("logs", str(limited.path)).stdout
    assert len(Job(cancelled).starts) == len(Job(limited).starts) == 1
    outcome = toolkit("cancel", str(cancelled.path))
    assert outcome.status == 2
    assert "has ended already" in outcome.stderr


def test_gpus_and_cpus_follow_the_grant(place: Path) -> None:
    submit(write("gpus", epochs=1), "--gpus-per-node", "1", "--cpus-per-task", "3")
    run = submitted("gpus")
    script = Job(run).script.read_text()
    # As if SLURM had given another number: the same script, submitted by hand with other options.
    other = place / "other.sbatch"
    other.write_text(script.replace(str(run.path), str(place / "other")).replace("exec $container", "env; exec true"))
    shutil.copytree(run.path, place / "other", ignore=shutil.ignore_patterns(".lock"))
    for name in ("starts", "outcome", "log.txt"):
        (place / "other" / "slurm" / name).unlink(missing_ok=True)
    log = place / "other" / "slurm" / "log.txt"
    assert sbatch("--gpus-per-node=2", str(other))[1] == 2
    assert "asked for 1 GPU(s) on each node, SLURM gave 2" in log.read_text()
    outcome = Job(Run(place / "other")).outcome
    assert outcome is not None
    assert outcome[0] == 2
    assert outcome[1] in log.read_text().splitlines()  # srun adds lines of its own, before or after
    assert sbatch("--nodes=2", str(other))[1] == 2
    assert "asked for 1 node(s), SLURM gave 2" in log.read_text()
    assert sbatch(str(other), OMP_NUM_THREADS="")[1] == 0
    granted = dict(line.split("=", 1) for line in log.read_text().splitlines() if re.match(r"[A-Z_]+=", line))
    assert granted["TOOLKIT_GPUS"] == granted["SLURM_GPUS_ON_NODE"] == "1"
    assert granted["SLURM_CPUS_PER_TASK"] == granted["OMP_NUM_THREADS"] == "3"
    wait_for(run, "finished")


def test_sbatch_refuses_and_nothing_is_left(place: Path) -> None:
    recipe = write("refused")
    for option, value, words in (
        ("--partition", "nope", "invalid partition specified: nope"),
        ("--nodes", "3", "Node count specification invalid"),
        ("--gpus-per-node", "3", "Requested node configuration is not available"),
    ):
        extra = ("--set", "train.batch_size=36") if option != "--partition" else ()
        outcome = toolkit("submit", recipe, "--profile", "local", option, value, *extra)
        assert outcome.status == 2
        assert words in outcome.stderr
        assert f"slurm.{option[2:].replace('-', '_')}" in outcome.stderr
        assert not Path("runs").exists()
    outcome = toolkit("submit", recipe, "--profile", "local", "--seeds", "0,1", "--partition", "nope")
    assert outcome.status == 2
    assert not [path for path in Path("runs").rglob("*") if path.is_file()]


def test_names_and_folders_with_spaces_and_metacharacters(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "it's $HOME; 100% & `more`"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "secretkey")
    recipe = write("a name, with + signs", epochs=1)
    submit(recipe)
    run = submitted("a name, with + signs")
    wait_for(run, "finished")
    for path in (run.path / "slurm").rglob("*"):
        assert b"secretkey" not in path.read_bytes()


def test_by_hand(place: Path) -> None:
    recipe = write("by-hand", epochs=1)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    job, status = sbatch("--cpus-per-task=1", f"{REPOSITORY}/slurm/train.sbatch", recipe, PATH=path)
    assert status == 0, Path(f"slurm-{job}.txt").read_text()
    run = submitted("by-hand")
    assert state_of(run, queue()).state == "finished"
    assert state_of(run, queue()).job == job
    assert "start 1" in toolkit("logs", str(run.path)).stdout


def test_wait_shows_the_log_and_returns_the_status(place: Path) -> None:
    recipe = write("waiting", data='dataset = "imagefolder"\nroot = "nowhere"\nimage_size = 8')
    outcome = toolkit("submit", recipe, "--profile", "local", "--wait")
    assert outcome.status == 2
    assert "start 1 on node" in outcome.stdout
    assert "nowhere" in outcome.stdout
    assert "end with status 2" in outcome.stdout
    state = state_of(submitted("waiting"), queue())
    assert state.state == "failed"
    assert "nowhere" in state.detail


def test_stopping_the_cluster_leaves_no_process(tmp_path: Path) -> None:
    """The script by itself: start, stop, and no daemon of it lives."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        pytest.skip("no SLURM here")
    home = Path(f"/tmp/toolkit-slurm-{os.getpid()}-b")
    home.mkdir()
    second = Cluster(home / "c")
    second.do("start")
    assert "node1 idle" in second.do("status")
    pids = [int(path.read_text()) for path in (home / "c" / "run").glob("*.pid") if "slurmd." not in path.name]
    assert len(pids) >= 2
    second.do("stop")
    for pid in pids:
        comm = Path(f"/proc/{pid}/comm")
        state = Path(f"/proc/{pid}/status")
        assert (
            not comm.exists()
            or "zombie" in state.read_text()
            or comm.read_text().strip() not in ("munged", "slurmctld")
        )
    shutil.rmtree(home)
