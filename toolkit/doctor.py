"""Environment checks before training: for each item ok, warn or fail, what was found, and advice."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

CheckStatus = Literal["ok", "warn", "fail"]

WANDB_SECONDS = 5.0
"""Seconds to wait for W&B's client, which may ask its server who is logged in."""

SHARED_MEMORY = Path("/dev/shm")
SHARED_GIB, DISK_GIB = 1.0, 5.0
"""Limits in GiB: warn if there is less shared memory, or less disk space for runs."""


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    state: CheckStatus
    found: str
    advice: str = ""


def examine(run_root: Path) -> list[Check]:
    """Run all checks. No check raises, prompts, takes long or prints secrets."""
    return [
        python_version(),
        *requirements(),
        catalog_is_current(),
        decoder(),
        *gpus(),
        *communication(),
        cpus(),
        shared_memory(),
        run_root_is_writable(run_root),
        wandb_login(),
        slurm(),
    ]


def report_text(checks: list[Check]) -> str:
    """Format the report: one line per check followed by its advice, and the counts at the end."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<4}  {check.name:<{width}}  {check.found}")
        if check.advice:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.advice}")
    counts = {state: sum(check.state == state for check in checks) for state in ("ok", "warn", "fail")}
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items())])


def python_version() -> Check:
    """Report the Python version and platform."""
    return Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def requirements() -> Iterator[Check]:
    """Check that the required packages are installed in supported versions."""
    from packaging.requirements import Requirement

    try:
        stated = metadata.requires("image-classification-toolkit") or []
    except metadata.PackageNotFoundError:
        yield Check(
            "packages", "warn", "the toolkit is importable, but not installed", "pip install -e . in its folder"
        )
        return
    for text in stated:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _requirement(requirement.name, str(requirement.specifier))


def _requirement(name: str, specifier: str) -> Check:
    from packaging.specifiers import SpecifierSet

    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", f'pip install "{name}{specifier}"')
    if not SpecifierSet(specifier).contains(found, prereleases=True):
        return Check(name, "fail", f"{found}, but {specifier} is required", f'pip install "{name}{specifier}"')
    return Check(name, "ok", found)


def catalog_is_current() -> Check:
    """Check that the catalog used by `toolkit validate` was generated with the installed versions."""
    from toolkit.recipe.catalog import catalog

    recorded: dict[str, str] = catalog()["versions"]
    other = [f"{name} {version}" for name, version in recorded.items() if _release(name) != version]
    if not other:
        return Check("name catalog", "ok", "matches the installed versions")
    return Check(
        "name catalog",
        "warn",
        f"generated with {', '.join(other)}; other versions are installed",
        "some names of models, weights and arguments may differ: regenerate it with python -m toolkit.recipe.catalog",
    )


def decoder() -> Check:
    """Report the library that decodes JPEG files."""
    try:
        return Check("JPEG files", "ok", f"decoded by simplejpeg {metadata.version('simplejpeg')}")
    except metadata.PackageNotFoundError:
        faster = "the extra fast (pip install simplejpeg): the same pixels in two thirds of the time"
        return Check("JPEG files", "ok", "decoded by Pillow", faster)


def _release(name: str) -> str:
    """Return the installed version without a local part such as +cu128."""
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def gpus() -> Iterator[Check]:
    """Report the GPUs, the precisions they support, and their interconnect."""
    import torch

    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda)
        yield Check("precision", "ok", "bf16 on the CPU; no fp16 without a GPU")
        return
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        yield Check(f"GPU {index}", "ok", f"{properties.name}, {size}")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Check(
        "precision",
        "ok",
        "bf16 and fp16" if bf16 else 'fp16, no bf16 (train.precision = "auto" uses no mixed precision)',
    )
    if count > 1:
        yield interconnect(count, topology())


def _no_gpu(cuda: str | None) -> Check:
    """Report that no GPU is usable; the advice depends on the driver and on how torch was built."""
    if shutil.which("nvidia-smi") is None:
        return Check(
            "GPU", "warn", "none; training runs on the CPU", "use a machine with NVIDIA GPUs for real training"
        )
    if cuda is None:
        return Check("GPU", "fail", "there is a driver, but this torch is built for the CPU", "install torch with CUDA")
    return Check(
        "GPU",
        "fail",
        f"there is a driver, but torch (CUDA {cuda}) cannot use it",
        "compare nvidia-smi's CUDA version with torch's; check CUDA_VISIBLE_DEVICES",
    )


def topology() -> str:
    """Return the output of `nvidia-smi topo -m`; empty if it fails."""
    return _output("nvidia-smi", "topo", "-m")


def interconnect(count: int, table: str) -> Check:
    """Report the GPU interconnect from nvidia-smi's table: NV# is NVLink, PIX/PXB/PHB PCIe, NODE/SYS through CPUs."""
    links = sorted(_links(count, table))
    if not links:
        return Check("interconnect", "warn", "unknown", "run nvidia-smi topo -m to see it")
    found = ", ".join(links)
    if any(link in ("SYS", "NODE", "PHB") for link in links):
        advice = (
            "some pairs communicate through the CPU, which slows down large models; use GPUs of one CPU socket per job"
        )
        return Check("interconnect", "warn", found, advice)
    return Check("interconnect", "ok", found)


def _links(count: int, table: str) -> set[str]:
    """Return the kinds of connection between pairs of GPUs."""
    rows = [line.split() for line in table.splitlines()]
    pairs = {word for row in rows if row and row[0].startswith("GPU") for word in row[1 : count + 1]}
    return pairs - {"X"} - {f"GPU{index}" for index in range(count)}


def communication() -> Iterator[Check]:
    """Check the communication libraries: NCCL between GPUs, gloo between CPUs."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Check("communication", "fail", "torch has no torch.distributed", "install an official build of torch")
        return
    if dist.is_gloo_available():
        yield Check("gloo", "ok", "available")
    else:
        yield Check("gloo", "fail", "missing from torch", "install an official build of torch")
    if dist.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "available"
        yield Check("NCCL", "ok", version)
    elif torch.cuda.is_available():
        yield Check(
            "NCCL", "fail", "missing from torch", "multi-GPU training needs it: install an official build of torch"
        )
    else:
        yield Check("NCCL", "ok", "missing, and not needed without GPUs")


def cpus() -> Check:
    """Report the available CPUs, which determine the number of workers."""
    from toolkit.distributed.cpu_count import available_cpus

    granted, machine = available_cpus(), os.cpu_count() or 1
    found = f"{granted} granted of {machine}"
    if granted == 1:
        return Check("CPUs", "warn", found, "image loading will be slow: request more (SLURM: --cpus-per-task)")
    return Check("CPUs", "ok", found)


def shared_memory() -> Check:
    """Check the free shared memory, through which data workers pass batches."""
    if not SHARED_MEMORY.is_dir():
        return Check("shared memory", "ok", f"{SHARED_MEMORY} does not exist here; workers use files instead")
    free = shutil.disk_usage(SHARED_MEMORY).free / 2**30
    found = f"{free:.1f} GiB free in {SHARED_MEMORY}"
    if free < SHARED_GIB:
        return Check("shared memory", "warn", found, "docker run --shm-size=8g or --ipc=host; else data.workers = 0")
    return Check("shared memory", "ok", found)


def run_root_is_writable(run_root: Path) -> Check:
    """Check that runs can be written, by writing a file in the folder or its nearest existing parent."""
    absolute = run_root.absolute()
    folder = next(path for path in (absolute, *absolute.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"test")
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Check("run root", "fail", f"{run_root}: {error.strerror}", "set recipe.run_root to a folder of your own")
    found = f"{run_root} can be written, {free:.0f} GiB free"
    if free < DISK_GIB:
        return Check("run root", "warn", found, "checkpoints may not fit: set recipe.run_root to a larger disk")
    return Check("run root", "ok", found)


def wandb_login() -> Check:
    """Report what tracking.mode = "auto" would choose. Never shows the key, never prompts."""
    os.environ.setdefault("WANDB_SILENT", "true")
    from toolkit.trackers import wandb_mode

    answers: list[tuple[str, str]] = []
    asking = threading.Thread(target=lambda: answers.append(wandb_mode("auto")), daemon=True)
    asking.start()
    asking.join(WANDB_SECONDS)
    if not answers:
        return Check("W&B", "warn", f"no answer within {WANDB_SECONDS:.0f} s", "runs will be logged offline")
    mode, why = answers[0]
    if not why:
        source = " (by WANDB_MODE)" if os.environ.get("WANDB_MODE") else ""
        return Check("W&B", "ok", ("logged in, server reached" if mode == "online" and not source else mode) + source)
    return Check("W&B", "warn", f"offline: {why}", "wandb login, or set WANDB_MODE=offline if that is intended")


def slurm() -> Check:
    """Report whether SLURM is available."""
    if shutil.which("sbatch") is None:
        return Check("SLURM", "ok", "not found; only jobs on a cluster need it")
    version = _output("sbatch", "--version") or "found"
    job = os.environ.get("SLURM_JOB_ID")
    return Check("SLURM", "ok", version + (f", inside job {job}" if job else ""))


def _output(*command: str) -> str:
    """Return the output of a command; empty if the command fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
