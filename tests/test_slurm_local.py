"""The local test cluster, and the state of jobs that squeue no longer lists. Nothing is trained."""

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
    """Write a run directory as submission leaves it, with a log but without records of the job."""
    run = Run(folder / job)
    (run.path / "slurm").mkdir(parents=True)
    run.write_text("recipe.toml", QUICKSTART.read_text())
    run.write_text("slurm/log.txt", log)
    SlurmJob(run).write_record(job)
    return run


def test_without_accounting_a_job_missing_from_squeue_is_read_from_its_folder(cluster: Cluster, tmp_path: Path) -> None:
    assert accounted_state("1") is None
    silent = state_of(run_of("999", tmp_path), {})
    assert (silent.state, silent.detail) == ("failed", GONE)
    logged = state_of(run_of("998", tmp_path, "start 1 on node1\nslurmstepd: error: Detected 1 oom-kill event\n"), {})
    assert (logged.state, logged.detail) == ("failed", "slurmstepd: error: Detected 1 oom-kill event")


@pytest.mark.extended  # test_slurm.py reads the answer of a stand-in for sacct
def test_with_accounting_sacct_gives_the_state_of_a_past_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster runs in plain mode with accounting; after it ends no daemon is left."""
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
        # The accounting database lags behind.
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
    left = {name: pid for name, pid in pids.items() if _is_alive(pid) and str(folder) in _arguments(pid)}
    assert not left


def _is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def _arguments(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
