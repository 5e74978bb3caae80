"""Jobs on a real SLURM cluster: two nodes on this machine, started by slurm/local-cluster.sh from Debian's packages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import toolkit
from safetensors.torch import load_file
from slurm_cluster import (
    REPOSITORY,
    Cluster,
    local_run,
    log_of,
    number_of,
    run_mode,
    sbatch,
    status_of,
    submit,
    submitted,
    suspended,
    trainers,
    wait_for,
    wait_for_end,
    wait_for_epoch,
    wait_for_start,
    wait_until,
    write,
)

from toolkit.runs import Run
from toolkit.slurm.job_status import SlurmJob, queue, state_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

AWKWARD = "it's $HOME; 100% & `more`"
"""A folder's name."""

CONTAINER = """#!/bin/bash
# Stands in for a container: IMAGE COMMAND...
{{
    echo "image: $1"; echo "command: ${{*:2}}"; echo "modules: $LOADED"; echo "greeting: $GREETING"
    [ ! -d "$TMPDIR" ] || echo "scratch: $TMPDIR"
}} >>'{notes}'
shift
exec "$@"
"""
PROFILE = """
shared = ["/"]
container = "{work_dir}/enter image.sif"
setup = ["source {work_dir}/modules.sh", "module load cuda/12.6"]
scratch = "{work_dir}/scratch/$SLURM_JOB_USER"
[variables]
GREETING = "it's $HOME"
"""
MODULES = """
false   # such files try things out
module() { case $2 in cuda/*) export LOADED=$2 ;; *) echo "no module $2"; return 1 ;; esac; }
"""


@pytest.fixture(scope="module")
def early(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Submit all independent jobs at once, to use the whole machine; return their folder."""
    work_dir = tmp_path_factory.mktemp("early")
    with contextlib.chdir(work_dir), pytest.MonkeyPatch.context() as patch:
        text = submit(write("two-nodes"), "--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "3")
        Path("two-nodes.txt").write_text(text)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        Path("by-hand.txt").write_text(
            sbatch("--cpus-per-task=1", f"{REPOSITORY}/slurm/train.sbatch", write("by-hand", epochs=1), PATH=path)
        )
        _submit_awkward(work_dir, patch)
    return work_dir


def _submit_awkward(work_dir: Path, patch: pytest.MonkeyPatch) -> None:
    """Submit a job whose folder, names, profile and environment contain characters special to a shell."""
    (work_dir / "enter").write_text(CONTAINER.format(notes=work_dir / "inside.txt"))
    (work_dir / "enter").chmod(0o755)
    (work_dir / "modules.sh").write_text(MODULES)
    profiles = work_dir / AWKWARD / "slurm" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "lab.toml").write_text(PROFILE.format(work_dir=work_dir))
    patch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "secretkey")
    with contextlib.chdir(work_dir / AWKWARD):
        submit(write("a name, with + signs", epochs=1), profile="lab")


@pytest.fixture
def among(early: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder of the early jobs; return it."""
    monkeypatch.chdir(early)
    return early


@pytest.mark.extended
def test_two_jobs_run_on_one_node_at_once(work_dir: Path) -> None:
    options = ("--processes-per-node", "2", "--cpus-per-task", "2", "--set", 'slurm.options=["--nodelist=node1"]')
    for seed, name in enumerate(("left", "right")):
        submit(write(name, epochs=2, recipe=f"seed = {seed}"), *options)
    runs = [submitted(name) for name in ("left", "right")]
    for run in runs:
        wait_for(run, "finished")
    first, second = (SlurmJob(run).starts[0] for run in runs)
    ends = [(run.path / "summary.json").stat().st_mtime for run in runs]
    assert first.nodes == second.nodes == "node1"
    assert max(first.time, second.time) < min(ends)  # they overlapped in time
    assert [run.summary["processes"] for run in runs] == [2, 2]
    assert [run.summary["seed"] for run in runs] == [0, 1]


def test_a_run_on_two_nodes_equals_a_run_in_one_process(among: Path) -> None:
    text, run = Path("two-nodes.txt").read_text(), submitted("two-nodes")
    assert re.match(r"submitted job \d+\n", text)
    assert str(run.path / "slurm" / "train.sbatch") in text
    assert str(run.path / "slurm" / "log.txt") in text
    assert "toolkit logs -f" in text
    assert "toolkit cancel" in text
    alone = local_run("two-nodes.toml")
    wait_for(run, "finished")
    log = log_of(run)
    assert run.summary["processes"] == 2
    assert len(set(re.findall(r"rank \d of 2 on (\S+),", log))) == (2 if run_mode() == "net" else 1)
    for actual, expected in zip(run.epoch_records(), alone.epoch_records(), strict=True):
        assert actual["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-5)
        assert actual["val/loss"] == pytest.approx(expected["val/loss"], abs=1e-5)
    assert run.summary["best"]["test_loss"] == pytest.approx(alone.summary["best"]["test_loss"], abs=1e-5)
    assert run.summary["best"]["test_accuracy"] == alone.summary["best"]["test_accuracy"]
    assert "Traceback" not in log
    wait_for_end(number_of(run))
    assert len(SlurmJob(run).starts) == 1  # a finished job is not requeued


def test_the_batch_script_can_be_submitted_by_hand(among: Path) -> None:
    job = Path("by-hand.txt").read_text()
    assert status_of(job) == 0, Path(f"slurm-{job}.txt").read_text()
    run = submitted("by-hand")
    assert state_of(run, queue()).state == "finished"
    assert state_of(run, queue()).job == job
    assert "start 1" in toolkit("logs", str(run.path)).stdout


def test_a_job_gets_the_profiles_modules_container_scratch_folder_and_variables(
    among: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(among / AWKWARD)
    run = submitted("a name, with + signs")
    wait_for(run, "finished")
    wait_for_end(number_of(run))
    values = dict(line.split(": ", 1) for line in (among / "inside.txt").read_text().splitlines())
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    scratch = among / "scratch" / user
    assert values["image"] == "image.sif"
    assert values["command"] == f"{sys.executable} -m toolkit.slurm.job_worker {run.path}"
    assert values["modules"] == "cuda/12.6"
    assert values["greeting"] == "it's $HOME"
    assert values["scratch"] == str(scratch / f"toolkit-{number_of(run)}")
    assert list(scratch.iterdir()) == []  # the job removed only its own folder
    for path in (run.path / "slurm").rglob("*"):
        assert b"secretkey" not in path.read_bytes()


def test_a_job_uses_the_cpus_and_gpus_that_slurm_granted_or_refuses(among: Path) -> None:
    run = submitted("two-nodes")
    script, other = SlurmJob(run).script.read_text(), Run(among / "other")
    # Submit the same script by hand with other options, as if SLURM had granted another number.
    text = script.replace(str(run.path), str(other.path)).replace("exec $container", "env; exec true $container")
    Path("other.sbatch").write_text(text)
    (other.path / "slurm").mkdir(parents=True)
    shutil.copy(run.path / "recipe.toml", other.path)
    assert status_of(sbatch("--gpus-per-node=2", "other.sbatch")) == 2
    assert "asked for 1 GPU(s) on each node, SLURM gave 2" in log_of(other)
    outcome = SlurmJob(other).outcome
    assert outcome is not None
    assert outcome[0] == 2
    assert outcome[1] in log_of(other).splitlines()  # srun prints lines of its own before or after
    assert status_of(sbatch("--nodes=1", "other.sbatch")) == 2
    assert "asked for 2 node(s), SLURM gave 1" in log_of(other)
    assert status_of(sbatch("other.sbatch", OMP_NUM_THREADS="")) == 0
    granted = dict(line.split("=", 1) for line in log_of(other).splitlines() if re.match(r"[A-Z_]+=", line))
    assert granted["TOOLKIT_GPUS"] == granted["SLURM_GPUS_ON_NODE"] == "1"
    assert granted["SLURM_CPUS_PER_TASK"] == granted["OMP_NUM_THREADS"] == "3"


def test_a_setup_line_or_scratch_folder_that_fails_ends_the_job(work_dir: Path) -> None:
    profiles = Path("slurm/profiles")
    profiles.mkdir(parents=True)
    Path("modules.sh").write_text(MODULES)
    lines = f'shared = ["/"]\nsetup = ["source {work_dir}/modules.sh", "module load cuda/0 && module load nope"]'
    (profiles / "modules.toml").write_text(lines)
    (profiles / "scratch.toml").write_text('shared = ["/"]\nscratch = "/proc/none"')
    runs = []
    for profile in ("modules", "scratch"):
        submit(write(profile), profile=profile)
        runs.append(submitted(profile))
    wait_for_end(*(number_of(run) for run in runs))
    states = [state_of(run, queue()) for run in runs]
    assert [state.state for state in states] == ["failed", "failed"]
    assert states[0].detail == "FAILED: status 1 from the setup line: module load cuda/0 && module load nope"
    assert "cannot make the scratch folder /proc/none/toolkit-" in states[1].detail


def comes_near_its_time_limit(cluster: Cluster, run: Run) -> None:
    """SLURM signals the batch shell 110 s before the time limit."""
    number = number_of(run)
    with suspended(run):
        subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=2"], check=True)
        wait_until((run.path / "stop").exists, lambda: log_of(run))
    wait_for_start(run, 2)
    subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=30"], check=True)


def is_preempted(cluster: Cluster, run: Run) -> None:
    """A job of a higher-priority partition needs the node: SLURM signals the processes there."""
    starts = SlurmJob(run).starts
    with suspended(run):
        prior = sbatch("--partition=debug", f"--nodelist={starts[-1].nodes}", "--exclusive", "--wrap=true")
        wait_until(lambda: "CANCELLED AT" in log_of(run), lambda: log_of(run))
    assert status_of(prior) == 0
    wait_for_start(run, len(starts) + 1)
    assert state_of(run, queue()).requeued == len(starts)


def loses_its_node(cluster: Cluster, run: Run) -> None:
    """The node fails with all its processes and comes back."""
    node = SlurmJob(run).starts[-1].nodes
    cluster.do("kill-node", node)
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test"], check=True)
    assert not run.is_finished
    cluster.do("start-node", node)


ALL_REASONS = (comes_near_its_time_limit, is_preempted, loses_its_node)


@pytest.mark.parametrize(
    ("reasons", "epochs"),
    [((comes_near_its_time_limit,), 12), pytest.param(ALL_REASONS, 30, marks=pytest.mark.extended)],
    ids=["time limit", "time limit, preemption, dead node"],
)
def test_a_requeued_job_ends_bit_identical(
    cluster: Cluster, work_dir: Path, reasons: tuple[Callable[[Cluster, Run], None], ...], epochs: int
) -> None:
    recipe = write("requeued", epochs=epochs, data='dataset = "digits"', trackers='"wandb"')
    submit(recipe, "--partition", "low", "--set", "slurm.signal_before_s=110")
    run = submitted("requeued")
    for requeue in reasons:
        wait_for_epoch(run, len(run.epoch_records()) + 2)
        requeue(cluster, run)
    alone = local_run(recipe)
    wait_for(run, "finished")

    starts = SlurmJob(run).starts
    assert [start.restarts for start in starts] == list(range(len(reasons) + 1))
    assert {start.job for start in starts} == {number_of(run)}
    assert log_of(run).count("checkpoint written, requeue") == len([each for each in reasons if each != loses_its_node])
    actual, expected = load_file(run.best_weights), load_file(alone.best_weights)
    assert actual.keys() == expected.keys()
    assert all((actual[name] == expected[name]).all() for name in expected)
    assert run.epoch_records() == alone.epoch_records()
    assert (run.path / "predictions.csv").read_bytes() == (alone.path / "predictions.csv").read_bytes()
    # A single W&B run, even after several resumptions.
    parts = [folder.name.split("-", 3)[3] for folder in (run.path / "wandb").glob("offline-run-*")]
    assert len(parts) == len(starts)
    assert set(parts) == {f"requeued-{run.id}"}


def test_a_cancelled_job_is_not_requeued(work_dir: Path) -> None:
    submit(write("cancelled", epochs=1000))
    cancelled = submitted("cancelled")
    wait_for_epoch(cancelled, 1)
    shown = json.loads(toolkit("status", str(cancelled.path), "--json").stdout)
    assert [row["state"] for row in shown] == ["running"]
    assert all(row["epoch"] >= 1 and row["epochs"] == 1000 and "time limit in" in row["detail"] for row in shown)
    assert toolkit("cancel", str(cancelled.path)).status == 0
    wait_for_end(number_of(cancelled))
    assert state_of(cancelled, queue()).state == "cancelled"
    assert len(SlurmJob(cancelled).starts) == 1
    outcome = toolkit("cancel", str(cancelled.path))
    assert outcome.status == 2
    assert "has already ended" in outcome.stderr


@pytest.mark.extended
def test_a_job_at_its_restart_limit_is_not_requeued(work_dir: Path) -> None:
    submit(write("limited", epochs=1000), "--max-restarts", "0", "--processes-per-node", "2", "--cpus-per-task", "2")
    run = submitted("limited")
    # The signal reaches launcher and trainers while they are still starting.
    wait_until(lambda: len(trainers(run)) > 0, lambda: log_of(run))
    subprocess.run(["scancel", "--signal=TERM", number_of(run)], check=True)
    wait_for_end(number_of(run))
    assert state_of(run, queue()).state == "interrupted"
    assert "max_restarts = 0" in toolkit("logs", str(run.path)).stdout
    assert "Traceback" not in log_of(run)
    assert len(SlurmJob(run).starts) == 1


def test_a_job_that_sbatch_rejects_leaves_no_files(work_dir: Path) -> None:
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


def test_wait_shows_the_log_and_returns_the_status(work_dir: Path) -> None:
    recipe = write("waiting", data='dataset = "imagefolder"\nroot = "nowhere"\nimage_size = 8')
    outcome = toolkit("submit", recipe, "--profile", "local", "--wait")
    assert outcome.status == 2
    assert "start 1 on node" in outcome.stdout
    assert "nowhere" in outcome.stdout
    assert "end with status 2" in outcome.stdout
    state = state_of(submitted("waiting"), queue())
    assert state.state == "failed"
    assert "nowhere" in state.detail


def test_several_srun_tasks_are_refused(work_dir: Path) -> None:
    """Each task would train a run of its own."""
    command = ["srun", "--nodes", "1", "--ntasks", "2", sys.executable, "-m", "toolkit.train", write("tasks", epochs=1)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "srun started 2 tasks, each of which would train alone" in done.stderr
    assert "srun --ntasks 1 torchrun --standalone --nproc-per-node 2 -m toolkit.train RECIPE" in done.stderr
    assert not Path("runs").exists()


@pytest.mark.extended
def test_the_command_suggested_in_that_error_trains_one_run(work_dir: Path) -> None:
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command = ["srun", "--ntasks", "1", *torchrun, "-m", "toolkit.train", write("tasks", epochs=1)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert submitted("tasks").summary["processes"] == 2
