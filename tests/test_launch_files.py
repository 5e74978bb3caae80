"""The files for SkyPilot and Kubeflow start training on all processes, with resuming.

Both were validated against their published schemas by hand (docs/launchers.md).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import typer
import yaml
from torch.distributed.run import get_args_parser

from toolkit.cli.main import app

LAUNCH = Path(__file__).parent.parent / "launch"
TRAIN = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]


def parsed(arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """Return the options of torchrun, and those of toolkit.train, of a command's arguments after `torchrun`."""
    torchrun = get_args_parser().parse_args(arguments)
    assert (torchrun.module, torchrun.training_script) == (True, "toolkit.train")
    return torchrun, TRAIN.make_context("train", torchrun.training_script_args).params


def test_the_skypilot_task_starts_all_processes_of_all_nodes(tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", **task["envs"], "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
    }  # fmt: skip
    done = subprocess.run(["bash", "-ec", task["run"]], env=environment, capture_output=True, text=True, check=True)
    torchrun, train = parsed(done.stdout.splitlines())
    assert (torchrun.nnodes, torchrun.node_rank, torchrun.nproc_per_node) == ("2", 1, "8")
    assert (torchrun.master_addr, torchrun.master_port) == ("10.0.0.1", 29500)
    (folder,) = task["file_mounts"]
    assert train["set_"] == [f'recipe.run_root="{folder}"']
    assert train["resume"] == "auto"
    assert Path(train["recipe"]).is_file(), "a ready recipe"
    assert task["resources"]["use_spot"] is True


def test_the_trainjob_starts_torchrun_with_what_the_runtime_sets() -> None:
    job = yaml.safe_load((LAUNCH / "kubeflow_trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert trainer["command"][0] == "torchrun"
    torchrun, train = parsed([*trainer["command"][1:], *trainer["args"]])
    assert torchrun.nnodes == "1:1", "from PET_NNODES, and so on"
    assert train["resume"] == "auto"
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    (node,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    root = train["set_"][0].removeprefix("recipe.run_root=").strip('"')
    assert train["recipe"].startswith(f"{mounts['toolkit']}/")
    assert root.startswith(f"{mounts['toolkit']}/")
