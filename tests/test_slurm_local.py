"""The local cluster itself, and what is known of jobs that squeue has forgotten. No training here."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_cluster import (
    ACCOUNT_PACKAGES,
    PACKAGES,
    Cluster,
    require,
    run_mode,
    running,
    sbatch,
    status_of,
    wait_until,
)

from toolkit.runs import Run
from toolkit.slurm.job_status import GONE, SlurmJob, accounted_state, state_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.toml"


def run_of(job: str, folder: Path, log: str = "") -> Run:
    """A run directory as the job's submission left it; the job noted nothing but what it printed."""
    run = Run(folder / job)
    (run.path / "slurm").mkdir(parents=True)
    run.write_text("recipe.toml", QUICKSTART.read_text())
    run.write_text("slurm/log.txt", log)
    SlurmJob(run).write_record(job)
    return run


def test_without_accounts_a_forgotten_job_is_known_by_its_folder(cluster: Cluster, tmp_path: Path) -> None:
    assert accounted_state("1") is None
    silent = state_of(run_of("999", tmp_path), {})
    assert (silent.state, silent.detail) == ("failed", GONE)
    spoke = state_of(run_of("998", tmp_path, "start 1 on node1\nslurmstepd: error: Detected 1 oom-kill event\n"), {})
    assert (spoke.state, spoke.detail) == ("failed", "slurmstepd: error: Detected 1 oom-kill event")


def test_with_accounts_sacct_tells_what_became_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster in plain mode, which keeps accounts; at its end no daemon is left."""
    require("slurmctld", PACKAGES)
    require("slurmdbd", ACCOUNT_PACKAGES)
    monkeypatch.chdir(tmp_path)
    with running("b", CLUSTER_MODE="plain", CLUSTER_ACCOUNTING="1") as cluster:
        assert run_mode() == "plain"
        assert "node1 idle" in cluster.do("status")
        failing = sbatch("--wrap=exit 7")
        waiting = sbatch("--begin=now+1hour", "--wrap=true")
        cluster.do("on", "node1", "scancel", waiting)
        array = sbatch("--array=0-1", "--wrap=exit $SLURM_ARRAY_TASK_ID")
        assert status_of(failing) == 7
        status_of(array)
        expected = {failing: "FAILED", waiting: "CANCELLED", f"{array}_0": "COMPLETED", f"{array}_1": "FAILED"}
        # The accounts are a moment late.
        wait_until(
            lambda: all(accounted_state(job) == state for job, state in expected.items()),
            lambda: str({job: accounted_state(job) for job in expected}),
        )
        failed = state_of(run_of(failing, tmp_path, "the last words\n"), {})
        assert (failed.state, failed.detail) == ("failed", "FAILED: the last words")
        assert state_of(run_of(waiting, tmp_path), {}).state == "cancelled"
        folder = cluster.folder
        pids = {path.name: int(path.read_text()) for path in (folder / "run").glob("*.pid")}
        assert len(pids) == 6, pids
    left = {name: pid for name, pid in pids.items() if _lives(pid) and str(folder) in _arguments(pid)}
    assert not left


def _lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def _arguments(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
