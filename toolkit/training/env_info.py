"""The environment of a run, for environment.json.

It contains no user name and no environment variable except SLURM's job id.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import toolkit
from toolkit.plugins import records
from toolkit.recipe.schema import Recipe

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "wandb", "numpy", "pillow", "scikit-learn", "safetensors")


def describe_environment(accelerator: Accelerator, recipe: Recipe) -> dict[str, Any]:
    """Return versions, plugins of the recipe, device, number of processes, command, git state and SLURM job."""
    device = accelerator.device
    return {
        "toolkit": toolkit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": {name: _version(name) for name in PACKAGES},
        "plugins": records(recipe),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git": _git_state(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Return commit and dirty flag of the working directory; None outside a git repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
