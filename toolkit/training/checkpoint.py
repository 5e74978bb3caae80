"""Checkpoints that remain valid if the process is killed at any moment.

A checkpoint is a file of tensors and plain values, plus a small JSON manifest that is written after it and holds its
name and SHA-256. A file that no manifest names, or that does not match its checksum, is ignored, and the checkpoint
before it is used. The manifest also has the SHA-256 of the best weights so far, without which a run could not finish
from that checkpoint.

A mid-epoch checkpoint is known to be good once the next step has a finite loss; until then the previous one is kept as
well. If that loss is not finite, the manifest gets the key "refused", and the checkpoint is not used.

    checkpoints/0007-000123.json            {"file": ..., "sha256": ..., "bytes": ..., "epoch": 7, "step": 123, ...}
    checkpoints/0007-000123-5fe1ab0c.pt     completed epochs - steps of the next one - start of the file's checksum
    checkpoints/best-0005.safetensors       weights of the best epoch so far, which the manifest names
    checkpoints/best.safetensors            the same file under its permanent name
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from toolkit.errors import UserError, first_line
from toolkit.models.pretrained import matches_stored_digest, pack_state
from toolkit.reading import Shape, UnreadableFile, read_json, require_file
from toolkit.writing import sync_folder, write_atomically

STEM = re.compile(r"\.?(\d{4,})-(\d{6,})[-.]")
"""Pattern of the epochs and steps at the beginning of a checkpoint's file name; temporary files start with a dot."""
FORMAT = 2
"""Version of the checkpoint format."""

CheckpointStep = tuple[int, int]
"""Completed epochs, and completed steps of the current epoch."""


class _File(Shape):
    """Size and SHA-256 of a file."""

    bytes: int = Field(ge=0)
    sha256: str


class _Manifest(_File):
    """Schema of the JSON manifest of a checkpoint."""

    file: str
    epoch: int = Field(ge=0)
    step: int = Field(ge=0)
    best_epoch: int | None = Field(None, ge=1)
    best_weights: _File | None = None
    classes: str | None = None
    refused: str | None = None


class BestWeightsLost(UserError):
    """Raised if every intact checkpoint lacks its best weights; ``path`` is the newest of them."""

    def __init__(self, path: Path, weights: Path, fault: str) -> None:
        super().__init__(f"{weights} is lost ({fault}), and every remaining checkpoint needs it")
        self.path, self.weights = path, weights


def save_checkpoint(folder: Path, position: CheckpointStep, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then delete the oldest ones.

    Raises OSError (e.g. disk full), which leaves the existing checkpoints intact. The file of an earlier checkpoint at
    the same step is never overwritten: the manifest is switched to the new file.
    """
    # Serialize in memory first: torch and safetensors report a full disk with other exceptions.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    manifest_path = folder / _manifest_name(position)
    path = folder / f"{manifest_path.stem}-{digest[:8]}.pt"
    write_atomically(path, buffer.getbuffer())
    manifest = {
        "file": path.name,
        "sha256": digest,
        "bytes": len(buffer.getbuffer()),
        "epoch": position[0],
        "step": position[1],
        "best_epoch": content.get("best_epoch"),
        "best_weights": content.get("best_weights"),
        "classes": _classes_digest(content.get("classes")),
    }
    write_atomically(manifest_path, json.dumps(manifest).encode())
    _prune(folder, position, keep)
    return path


def find_latest(folder: Path, warn: Callable[[str], None], *, with_best: bool = False) -> Path | None:
    """Return the file of the newest intact checkpoint, or None. Unusable checkpoints are reported through ``warn``.

    ``with_best``: its best weights must be intact as well. Raises BestWeightsLost if only these are missing.
    """
    steps = (checkpoint_step(path) for path in folder.glob("*"))
    positions = sorted({step for step in steps if step is not None}, reverse=True)
    if not folder.is_dir():
        warn(f"{folder} is missing: the run starts over")
    lost: BestWeightsLost | None = None
    for position in positions:
        manifest = folder / _manifest_name(position)
        path, fault = _examine(manifest)
        problem = f"is {'skipped' if _is_refused(manifest) else 'damaged'} ({fault})"
        if path is not None:
            weights, fault = _examine_best(manifest) if with_best else (manifest, "")
            if not fault:
                return path
            lost = lost or BestWeightsLost(path, weights, fault)
            problem = f"is skipped, because {weights.name} is {fault}"
        next_try = "" if position == positions[-1] else "; trying the previous one"
        warn(f"checkpoint {manifest.stem} {problem}{next_try}")
    if lost is not None:
        raise lost
    if positions:
        warn("no intact checkpoint is left: the run starts over")
    return None


def refuse_checkpoint(folder: Path, position: CheckpointStep, reason: str) -> None:
    """Mark the checkpoint at ``position``, if there is one, as unusable. Raises OSError (e.g. disk full)."""
    path = folder / _manifest_name(position)
    try:
        manifest = read_json(path, _Manifest)
        write_atomically(path, json.dumps({**manifest, "refused": reason}).encode())
    except UserError:
        return  # missing or damaged, so it is not used anyway


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor with an infinite value or a NaN, if any.

    Waits once per device and dtype, and again only for tensors whose sum is not finite.
    """
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            groups[tensor.device, tensor.dtype][name] = tensor
    for group in groups.values():
        # A sum is fast, and finite only if all values are. It may overflow, so doubtful tensors are checked in full.
        doubtful = torch.stack([tensor.sum() for tensor in group.values()]).isfinite().logical_not().tolist()
        for name, is_doubtful in zip(group, doubtful, strict=True):
            if is_doubtful and not group[name].isfinite().all():
                return name
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU. Raises UserError if the file contains code or has another format version."""
    require_file(path)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is refused: it holds more than tensors and plain values, or is not a checkpoint "
            f"({first_line(error)})"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version of this toolkit: use that version, or start a new run")
    return content


def save_best(folder: Path, epoch: int, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write the weights of the best epoch so far to a file named after the epoch. Raises OSError (e.g. disk full).

    Returns the manifest's entry for the file: its size in bytes and its SHA-256.
    """
    data = pack_state(state, epoch=epoch)
    write_atomically(best_path(folder, epoch), data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def best_fault(folder: Path, epoch: int, facts: dict[str, Any] | None) -> str:
    """Return what is wrong with the saved weights of the best epoch; "" if nothing is.

    ``facts``: from :func:`save_best`.

    If ``facts`` is None (a checkpoint of an earlier version), only a missing file is detected.
    """
    facts = facts or {}
    path = best_path(folder, epoch)
    try:
        return _file_fault(path, facts.get("bytes"), facts.get("sha256"))
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable: {error.strerror}"


def link_best(folder: Path, epoch: int) -> Path:
    """Link the best epoch's weights to ``best.safetensors`` (a copy if the file system has no hard links)."""
    target, temporary = folder / "best.safetensors", folder / ".best.tmp"
    temporary.unlink(missing_ok=True)
    source = best_path(folder, epoch)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    sync_folder(folder)
    return target


def finished_fault(folder: Path, epoch: int, classes: list[str], weights: Mapping[str, Any] | None = None) -> str:
    """Return how ``best.safetensors`` or the classes of model.json differ from a finished run's last checkpoint, or "".

    Nothing is compared if that checkpoint is gone or names a best epoch other than ``epoch``. ``weights``: size and
    SHA-256 of ``best.safetensors`` if they are not those of an epoch.
    """
    for path in sorted((p for p in folder.glob("*.json") if checkpoint_step(p) is not None), reverse=True):
        try:
            manifest = read_json(path, _Manifest)
            if manifest.get("refused"):
                continue
            facts = weights or manifest.get("best_weights")
            if facts is None or manifest.get("best_epoch") != epoch:
                return ""
            if fault := _file_fault(folder / "best.safetensors", facts["bytes"], facts["sha256"]):
                return f"best.safetensors is not the file that this run ended with ({fault})"
            if manifest.get("classes") not in (None, _classes_digest(classes)):
                return "the classes in model.json, or their order, differ from those that this run was trained with"
            return ""
        except (OSError, UserError):
            continue  # damaged
    return ""


def _classes_digest(classes: list[str] | None) -> str | None:
    """Return the SHA-256 of the class names in order."""
    return None if classes is None else hashlib.sha256(json.dumps(classes).encode()).hexdigest()


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Load a safetensors state dict. Raises UserError if the file is missing or does not match its own checksum."""
    require_file(path)
    if any("\udc80" <= char <= "\udcff" for char in str(path)):  # bytes that are not UTF-8
        raise UserError(f"{path}: safetensors cannot open a path that is not UTF-8; rename the folder")
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
        is_intact = matches_stored_digest(path, tensors)
    except Exception as error:  # safetensors raises its own, private exception types
        raise UnreadableFile(path, error) from None
    if not is_intact:
        raise UserError(f"{path} is damaged: its checksum differs; restore a copy, or train again")
    return tensors


def best_path(folder: Path, epoch: int) -> Path:
    """Return the path of the best epoch's weights."""
    return folder / f"best-{epoch:04d}.safetensors"


def checkpoint_step(path: Path) -> CheckpointStep | None:
    """Return the epochs and steps in a checkpoint's file name; None for other files."""
    match = STEM.match(path.name)
    return (int(match[1]), int(match[2])) if match else None


def _examine(manifest_path: Path) -> tuple[Path | None, str]:
    """Return the file of an intact checkpoint, or None and what is wrong with it."""
    try:
        manifest = read_json(manifest_path, _Manifest)
        path = manifest_path.with_name(Path(manifest["file"]).name)
        if (manifest["epoch"], manifest["step"]) != checkpoint_step(manifest_path):
            return None, f"it contains epoch {manifest['epoch']} and step {manifest['step']}, unlike its name"
        fault = manifest.get("refused") or _file_fault(path, manifest["bytes"], manifest["sha256"])
    except UnreadableFile as error:
        return None, f"half-written: {manifest_path.name} is missing" if error.is_missing else str(error)
    except FileNotFoundError as error:
        return None, f"half-written: {Path(error.filename).name} is missing"
    except (OSError, UserError) as error:
        return None, str(error)
    return (None, fault) if fault else (path, "")


def _examine_best(manifest_path: Path) -> tuple[Path, str]:
    """Return the best weights that a checkpoint names and what is wrong with them ("" if nothing or none named)."""
    manifest = read_json(manifest_path, _Manifest)
    epoch, folder = manifest.get("best_epoch"), manifest_path.parent
    if not isinstance(epoch, int):
        return manifest_path, ""
    return best_path(folder, epoch), best_fault(folder, epoch, manifest.get("best_weights"))


def _file_fault(path: Path, size: int | None, sha256: str | None) -> str:
    """Return how a file differs from the expected size and SHA-256; "" if it does not. Raises OSError."""
    found = path.stat().st_size
    if not path.is_file():
        return "not a regular file"
    if size is not None and found != size:
        return f"{found} bytes instead of {size}"
    with open(path, "rb") as file:
        digest = sha256 and hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == sha256 else "its checksum differs"


def _manifest_name(position: CheckpointStep) -> str:
    return f"{position[0]:04d}-{position[1]:06d}.json"


def _prune(folder: Path, position: CheckpointStep, keep: int) -> None:
    """Keep the last ``keep`` checkpoints up to the new one at ``position``, and their best weights; delete the others.

    Within an epoch at least two are kept, because the loss after the new one is not known yet. Later ones were damaged
    or refused, so the run resumed from an earlier checkpoint; they are deleted.
    """
    if position[1]:
        keep = max(keep, 2)
    manifests = sorted((checkpoint_step(p), p) for p in folder.glob("*.json") if checkpoint_step(p) is not None)
    kept = [path for at, path in manifests if at is not None and at <= position and not _is_refused(path)][-keep:]
    named = set(kept)
    for path in kept:
        try:
            manifest = read_json(path, _Manifest)
            named |= {folder / Path(manifest["file"]).name, best_path(folder, manifest.get("best_epoch") or 0)}
        except UserError:
            continue  # damaged: it names nothing
    for _, path in manifests:  # manifests first: a file without one is ignored
        if path not in named:
            path.unlink(missing_ok=True)
    for path in (*folder.glob("*.pt"), *folder.glob("best-*.safetensors")):
        if path not in named:
            path.unlink(missing_ok=True)


def _is_refused(manifest_path: Path) -> bool:
    with contextlib.suppress(UserError):  # a damaged manifest does not count as refused
        return bool(read_json(manifest_path, _Manifest).get("refused"))
    return False
