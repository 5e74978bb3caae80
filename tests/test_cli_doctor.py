"""toolkit doctor: each line is correct for a simulated machine, and no secret is printed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from cli import toolkit

from toolkit import doctor

SECRET = "0123456789abcdef0123456789abcdef01234567"

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tNV18\t{far}\tPIX\t0-47\t0
GPU1\tNV18\t X \tNV18\tNV18\tSYS\t0-47\t0
GPU2\tNV18\tNV18\t X \tNV18\tSYS\t48-95\t1
GPU3\t{far}\tNV18\tNV18\t X \tSYS\t48-95\t1
NIC0\tPIX\tSYS\tSYS\tSYS\t X \t\t

Legend:
  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""


def test_the_report_has_a_line_for_every_check(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    outcome = toolkit("doctor", "--run-root", str(root))
    lines = outcome.stdout.splitlines()
    states = [line.split()[0] for line in lines[:-1] if not line.lstrip().startswith("->")]
    assert set(states) <= {"ok", "warn", "fail"}
    assert outcome.status == (1 if "fail" in states else 0)
    ok, warn, fail = (states.count(state) for state in ("ok", "warn", "fail"))
    assert lines[-1] == f"{ok} ok, {warn} warn, {fail} fail"
    for word in ("torch", "accelerate", "wandb", "precision", "gloo", "NCCL", "CPUs", "shared memory", "run root",
                 "W&B", "SLURM"):  # fmt: skip
        assert any(line[6:].startswith(word) for line in lines), word
    assert not root.exists(), "checking creates no files"


def test_every_warning_and_failure_says_what_to_do(tmp_path: Path) -> None:
    checks = json.loads(toolkit("doctor", "--json", "--run-root", str(tmp_path)).stdout)
    assert [c["name"] for c in checks if c["state"] != "ok" and not c["advice"]] == []


def test_the_faster_decoder_is_recommended_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise doctor.metadata.PackageNotFoundError(name)
        return "1.9.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    installed: set[str] = set()
    assert (doctor.decoder().state, doctor.decoder().found) == ("ok", "decoded by Pillow")
    assert "pip install simplejpeg" in doctor.decoder().advice
    installed.add("simplejpeg")
    assert (doctor.decoder().found, doctor.decoder().advice) == ("decoded by simplejpeg 1.9.0", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")
def test_a_driver_that_torch_cannot_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(doctor.gpus()).state == "warn"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert next(doctor.gpus()).state == "fail"


def test_gpus_without_a_direct_link_are_warned_about() -> None:
    good = doctor.interconnect(4, TOPOLOGY.format(far="NV18"))
    assert (good.state, good.found) == ("ok", "NV18")
    far = doctor.interconnect(4, TOPOLOGY.format(far="SYS"))
    assert (far.state, far.found) == ("warn", "NV18, SYS")
    assert doctor.interconnect(4, "").state == "warn"


def test_installed_versions_are_compared_with_the_required_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch>=99", "no-such-package>=1", "pydantic>=2",
                                                                   'tensorboard; extra == "dev"'])  # fmt: skip
    checks = {check.name: check for check in doctor.requirements()}
    assert {name: check.state for name, check in checks.items()} == {
        "torch": "fail", "no-such-package": "fail", "pydantic": "ok"
    }  # fmt: skip
    assert checks["torch"].advice == 'pip install "torch>=99"'


def test_a_failure_makes_the_exit_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "run_root_is_writable", lambda root: doctor.Check("run root", "fail", "no", "do"))
    assert toolkit("doctor", "--run-root", str(tmp_path)).status == 1


def test_a_run_root_that_is_not_writable_or_nearly_full_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.run_root_is_writable(tmp_path / "a" / "b").state in ("ok", "warn")
    file = tmp_path / "file"
    file.touch()
    assert doctor.run_root_is_writable(file / "runs").state == "fail"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(doctor, "DISK_GIB", 1e9)
    assert doctor.run_root_is_writable(tmp_path).state == "warn"


def test_little_shared_memory_and_few_cpus_are_warned_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(doctor, "SHARED_GIB", 1e9)
    assert doctor.shared_memory().state == "warn"
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "none")
    assert doctor.shared_memory().state == "ok"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert doctor.cpus().state == "warn"


def test_the_slurm_version_and_job_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho slurm 24.05.1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert doctor.slurm().found == "slurm 24.05.1, inside job 42"


def test_the_wandb_key_is_never_printed_and_a_hanging_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("WANDB_MODE")
        start = time.perf_counter()
        check = doctor.wandb_login()
        assert time.perf_counter() - start < doctor.WANDB_SECONDS + 1
    assert SECRET not in f"{check}"


def test_wandb_offline_mode_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert doctor.wandb_login() == doctor.Check("W&B", "ok", "offline (by WANDB_MODE)")
