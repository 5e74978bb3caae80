"""Job settings: command options override the recipe's [slurm], which overrides the cluster profile."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from toolkit.errors import UserError
from toolkit.recipe.base import ConfigModel
from toolkit.recipe.schema import Recipe, SlurmConfig
from toolkit.similar_names import did_you_mean

DEFAULTS: dict[str, Any] = {
    "nodes": 1,
    "gpus_per_node": 0,
    "max_restarts": 50,
    "signal": "USR1",
    "signal_before_s": 120,
}
"""Defaults of settings that neither the command, the recipe nor the profile contains."""

SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
LOCAL_KINDS = ("tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "apfs", "zfs", "f2fs", "squashfs")
"""File system types that are local to one machine unless exported."""
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/local", "/localscratch")
"""Folders that are usually local to each machine."""


class ClusterProfile(ConfigModel):
    """A cluster profile, read from a TOML file."""

    description: str = ""
    defaults: SlurmConfig = SlurmConfig()
    """Settings used if neither the command nor the recipe contains them."""
    setup: list[str] = Field(default_factory=list)
    """Shell commands run before training, such as loading modules. The job ends if one fails."""
    variables: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(default_factory=dict)
    """Environment variables exported before training; no secrets."""
    python: Annotated[str | None, Field(min_length=1)] = None
    """Python interpreter of the job. Default: the one that runs `toolkit submit`."""
    container: Annotated[str, Field(pattern=r"^[^\n]*$")] = ""
    """Command that runs python in a container, such as ``apptainer exec --nv image.sif``."""
    scratch: Annotated[str | None, Field(pattern=r'^[^\n"`]+$')] = None
    """Folder on each node; may contain $USER and the like. The job's TMPDIR is created there and removed at the end."""
    shared: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Folders that are shared by all nodes although they look local."""

    @model_validator(mode="after")
    def _no_secrets(self) -> ClusterProfile:
        for name in self.variables:
            if SECRET.search(name):
                raise ValueError(
                    f"variables.{name} looks like a secret, which must not be written to a script: export it in the "
                    "shell that submits, or use netrc; jobs inherit both"
                )
        return self


class JobSettings(ConfigModel):
    """Settings from which a job script is generated."""

    table: SlurmConfig
    profile: ClusterProfile = ClusterProfile()
    profile_name: str | None = None

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.table.nodes or 1

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        return self.table.gpus_per_node or 0

    @property
    def processes_per_node(self) -> int:
        """Training processes per node; one per GPU if there are GPUs."""
        return self.gpus or self.table.processes_per_node or 1

    @property
    def world(self) -> int:
        """Total number of training processes."""
        return self.nodes * self.processes_per_node


def resolve_settings(recipe: Recipe) -> JobSettings:
    """Resolve the settings of a recipe whose [slurm] already includes the command's options. Raises UserError."""
    asked = recipe.slurm.model_dump(exclude_none=True) if recipe.slurm else {}
    profile, name = ClusterProfile(), asked.get("profile")
    if name is not None:
        profile = read_profile(find_profile(name))
    table = SlurmConfig(**(DEFAULTS | profile.defaults.model_dump(exclude_none=True) | asked))
    if table.gpus_per_node and table.processes_per_node not in (None, table.gpus_per_node):
        raise UserError(
            f"slurm.processes_per_node = {table.processes_per_node} with slurm.gpus_per_node = {table.gpus_per_node}: "
            "a job with GPUs has one process per GPU; leave processes_per_node out"
        )
    if table.gpu_type and not table.gpus_per_node:
        raise UserError(f"slurm.gpu_type = {table.gpu_type!r} without slurm.gpus_per_node: set the number of GPUs")
    return JobSettings(table=table, profile=profile, profile_name=name)


SHIPPED_PROFILES = Path(__file__).parent / "profiles"
"""Folder of the profiles shipped with the package."""


def profile_folders() -> list[Path]:
    """Return the folders searched for profiles, in order."""
    own = os.environ.get("TOOLKIT_SLURM_PROFILES")
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [*([Path(own)] if own else []), Path("slurm/profiles"), home / "toolkit" / "slurm", SHIPPED_PROFILES]


def find_profile(name: str) -> Path:
    """Return the file of a profile. Raises UserError listing the known names."""
    folders = profile_folders()
    for folder in folders:
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.toml")})
    raise UserError(
        f"no cluster profile {name!r}{did_you_mean(name, known, prefix='; ', otherwise='.')} "
        f"Known: {', '.join(known) or 'none'}. Looked in {', '.join(map(str, folders))}; "
        f"{SHIPPED_PROFILES / 'example.toml'} is an example to copy into one of these folders"
    )


def read_profile(path: Path) -> ClusterProfile:
    """Read and validate a profile. Raises UserError listing all errors."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    try:
        return ClusterProfile.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in _faults(error))) from None


def _faults(error: ValidationError) -> list[str]:
    keys = [*ClusterProfile.model_fields, *(f"defaults.{key}" for key in SlurmConfig.model_fields)]
    lines = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}{did_you_mean(key, keys, prefix='; ')}")
        else:
            lines.append(f"{key}: {fault['msg']}" if key else fault["msg"].removeprefix("Value error, "))
    return lines


def check_paths(settings: JobSettings, run_root: str, files: list[str]) -> list[str]:
    """Return warnings about folders that the nodes may not see.

    Raises UserError if a job on several nodes has a run root that is certainly local.
    """
    root = Path(run_root).resolve()
    why = local_reason(root, settings.profile.shared)
    warnings = []
    if why and settings.nodes > 1 and why[0]:
        raise UserError(
            f"recipe.run_root = {run_root!r}: {root} {why[1]}, and a job on {settings.nodes} nodes needs one folder "
            "that all of them see. Use one on the shared file system; if this one is shared after all, declare it in "
            f"the cluster's profile: shared = [{str(root)!r}]"
        )
    for name, path in (("recipe.run_root", root), *((f"recipe {file}", Path(file).resolve()) for file in files)):
        found = local_reason(path, settings.profile.shared)
        if found:
            warnings.append(f"{name}: {path} {found[1]}; the nodes may not see it")
    return warnings


def local_reason(path: Path, shared: list[str], mounts: Path = Path("/proc/self/mounts")) -> tuple[bool, str] | None:
    """Return whether ``path`` is certainly local to one machine, and the reason; None if it seems to be shared."""
    if any(path.is_relative_to(Path(folder).resolve()) for folder in shared):
        return None
    own = os.environ.get("TMPDIR")
    for folder in (*LOCAL_FOLDERS, *([own] if own else [])):
        if path.is_relative_to(Path(folder).resolve()):
            return True, f"is below {folder}, which is local to each machine"
    kind = file_system(path, mounts)
    if kind in LOCAL_KINDS:
        return kind in ("tmpfs", "ramfs"), f"is on a file system of this machine ({kind})"
    return None


def file_system(path: Path, mounts: Path) -> str:
    """Return the type of the file system of ``path``; "" if unknown."""
    try:
        lines = [line.split(" ")[1:3] for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    found = [(len(point), kind) for point, kind in lines if path.is_relative_to(_unescaped(point))]
    return max(found)[1] if found else ""


def _unescaped(mount_point: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount_point)
